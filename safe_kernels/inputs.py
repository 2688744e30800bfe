"""What the functions of the package hand to one another, by name.

Shapes: `...` any leading shape, N tokens, V vocabulary, H hidden width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Fields = TypeVar("Fields", bound=tuple[Any, ...])


class Head(NamedTuple):
    """How hidden states become logits, and for which tokens: the arguments that all `linear_*` functions share."""

    hidden: Tensor  # [..., H]
    weight: Tensor  # [V, H]
    tokens: Tensor  # [...]
    bias: Tensor | None = None  # [V]
    ref_hidden: Tensor | None = None
    ref_weight: Tensor | None = None
    ref_bias: Tensor | None = None
    temperature: float | Tensor = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0
    mask: Tensor | None = None
    batch_invariant: bool = False
    process_group: ProcessGroup | None = None


class KeptIds(NamedTuple):
    """The ids that a sampler kept for each of N tokens, those of one after those of another; repeated ones count once.

    vLLM's `SamplingMask(token_ids, offsets)` is `KeptIds(*map(torch.as_tensor, mask))`.
    """

    ids: Tensor  # [E], any integer dtype; -1 is none
    offsets: Tensor  # [N + 1], from 0 to E: where the ids of each token start


class LogitsInputs(NamedTuple):
    logits: Tensor  # [..., V], in the caller's strides
    ref_logits: Tensor | None
    tokens_N: Tensor  # int32 or int64; of a part of the vocabulary they count from its first id
    temperature: float
    temperatures_N: Tensor | None  # in the place of `temperature`
    mask_N: Tensor | None
    stats_rows: int  # what is asked for: so many rows of `RowStats`


class LinearInputs(NamedTuple):
    hidden_NH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    ref_hidden_NH: Tensor | None
    ref_weight_VH: Tensor | None  # None: the reference shares the policy's head
    ref_bias_V: Tensor | None
    tokens_N: Tensor  # as those of LogitsInputs
    temperature: float
    temperatures_N: Tensor | None
    mask_N: Tensor | None
    softcap: float | None
    logit_scale: float
    batch_invariant: bool
    stats_rows: int

    def reference_head(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the reference: the policy's, as far as it has none of its own."""
        if self.ref_weight_VH is not None:
            return self.ref_weight_VH, self.ref_bias_V
        return self.weight_VH, self.bias_V if self.ref_bias_V is None else self.ref_bias_V

    def of_rows(self, rows: slice | Tensor) -> LinearInputs:
        names = ("hidden_NH", "ref_hidden_NH", "tokens_N", "temperatures_N", "mask_N")
        return self._replace(**{name: x[rows] for name in names if (x := getattr(self, name)) is not None})


class TermsInputs(NamedTuple):
    """What `safe_terms` takes beyond `token_stats`."""

    v1_N: Tensor
    v2_N: Tensor
    rewards_N: Tensor
    target_v1_N: Tensor
    target_v2_N: Tensor
    mask_N: Tensor | None
    cu_seqlens: Tensor | None  # int32 [S + 1], or None: sequences of `length` tokens
    length: int
    kl_threshold: float
    kl_threshold_tensor: Tensor | None  # 0-dim, in the place of `kl_threshold`
    alpha: float
    gamma: float


class ScanInputs(NamedTuple):
    """What `soft_min_gae` takes, in the caller's shape."""

    v1: Tensor
    v2: Tensor
    rewards: Tensor
    mask: Tensor | None
    gamma: float
    lam: float
    alpha: float
    cu_seqlens: Tensor | None
    bootstrap: Tensor | None


class RowStats(NamedTuple):
    """The rows of `stats` [4, N], [8, N] with a reference or [9, N] with KL(reference || policy), too: the results of a
    token, and what its softmax needs.

    The log-prob is NaN for an id outside the vocabulary. `peak` and `log_total` stay apart: their sum, the usual
    log-sum-exp, would lose digits to a large common offset of the logits.
    """

    logprob: Tensor
    entropy: Tensor
    peak: Tensor  # the largest logit
    log_total: Tensor  # log of the sum of exp((logit - peak) / temperature)
    ref_logprob: Tensor | None = None
    kl: Tensor | None = None
    ref_peak: Tensor | None = None
    ref_log_total: Tensor | None = None
    ref_kl: Tensor | None = None


ALL_ROWS = len(RowStats._fields)
RESULTS = {4: 2, 8: 4, ALL_ROWS: 5}  # how many of them callers get, by the number of rows


DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "tv")


class Divergence(NamedTuple):
    """Which one, of a student p from a teacher q. With 0 < beta < 1 where it is "jsd"; otherwise beta is not read."""

    name: str
    beta: float


class DivergenceStats(NamedTuple):
    """The rows of `stats` [8, N] of a divergence. Its gradient in the logits over T is p (f - slope), where f is an
    entry's own; of the forward KL it is p - q.
    """

    divergence: Tensor
    entropy: Tensor  # of the student
    logprob: Tensor  # as that of RowStats
    slope: Tensor  # sum of p f
    peak: Tensor
    log_total: Tensor
    ref_peak: Tensor  # of the teacher
    ref_log_total: Tensor


class DivergenceGrad(NamedTuple):
    """d loss / d (divergence, logprob), each [N]; None is no gradient."""

    divergence: Tensor | None
    logprob: Tensor | None


class StatsGrad(NamedTuple):
    """d loss / d (logprob, entropy, kl, ref_kl), each [N]; None is no gradient."""

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    kl: Tensor | None = None
    ref_kl: Tensor | None = None

    @property
    def reads_reference(self) -> bool:
        return self.kl is not None or self.ref_kl is not None


def take(fields: Fields, rows: slice | Tensor) -> Fields:
    """The same named tuple for some of its rows; what has no rows stays."""
    return type(fields)(*(x[rows] if isinstance(x, Tensor) and x.dim() > 0 else x for x in fields))


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def without_masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """With 0 where masked, whatever stood there."""
    return x if mask is None else x.where(mask, 0)
