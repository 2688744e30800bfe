"""The arguments of the public functions, flattened: what every backend with kernels of its own starts from.

Shapes: N tokens, V vocabulary, H hidden width, S sequences.
"""

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Fields = TypeVar("Fields", bound=tuple[Any, ...])


class Shard(NamedTuple):
    """Which part of the vocabulary this rank holds."""

    group: str  # its name
    rank: int
    bounds: Tensor  # [K + 1] int64: rank r holds the ids from bounds[r] to bounds[r + 1]

    def local(self, tokens_N: Tensor) -> Tensor:
        """Ids within the part; those of other ranks fall outside of it."""
        return tokens_N.long() - self.bounds[self.rank]

    def holders(self, local_N: Tensor) -> Tensor:
        """bool [K, N]: whether rank k holds the token; nobody does if its id is outside the whole vocabulary."""
        tokens_N = local_N + self.bounds[self.rank]
        return (tokens_N >= self.bounds[:-1, None]) & (tokens_N < self.bounds[1:, None])


class LogitsInputs(NamedTuple):
    logits: Tensor  # [..., V], in the caller's strides
    tokens_N: Tensor
    ref_logits: Tensor | None
    temperature: float | Tensor  # [N]
    mask_N: Tensor | None
    shard: Shard | None  # None: logits of the whole vocabulary; else of a part, and tokens_N count from its first id

    @classmethod
    def of(
        cls,
        logits: Tensor,
        tokens: Tensor,
        *,
        ref_logits: Tensor | None,
        temperature: float | Tensor,
        mask: Tensor | None,
        shard: Shard | None = None,
    ) -> "LogitsInputs":
        ref_logits = None if ref_logits is None else ref_logits.detach()
        tokens_N = local(tokens, shard)
        return cls(logits, tokens_N, ref_logits, flat(temperature), flat(mask), shard)


class LinearInputs(NamedTuple):
    hidden_NH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    ref_hidden_NH: Tensor | None
    ref_weight_VH: Tensor | None  # None: the reference shares the policy's head
    ref_bias_V: Tensor | None
    tokens_N: Tensor
    temperature: float | Tensor  # [N]
    mask_N: Tensor | None
    softcap: float | None
    logit_scale: float
    batch_invariant: bool
    shard: Shard | None  # None: the head of the whole vocabulary; else of a part, and tokens_N count from its first id

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        *,
        bias: Tensor | None,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
        temperature: float | Tensor,
        mask: Tensor | None,
        softcap: float | None,
        logit_scale: float,
        batch_invariant: bool,
        shard: Shard | None = None,
    ) -> "LinearInputs":
        return cls(
            _rows(hidden),
            weight,
            None if bias is None else bias.contiguous(),
            None if ref_hidden is None else _rows(ref_hidden.detach()),
            None if ref_weight is None else ref_weight.detach(),
            None if ref_bias is None else ref_bias.detach().contiguous(),
            local(tokens, shard),
            flat(temperature),
            flat(mask),
            softcap,
            logit_scale,
            batch_invariant,
            shard,
        )

    def reference_head(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the reference: the policy's, as far as it has none of its own."""
        if self.ref_weight_VH is not None:
            return self.ref_weight_VH, self.ref_bias_V
        return self.weight_VH, self.bias_V if self.ref_bias_V is None else self.ref_bias_V

    def take(self, rows: Tensor) -> "LinearInputs":
        """For some of the tokens, by their indices; none of them is masked."""
        return self._replace(
            hidden_NH=self.hidden_NH[rows],
            ref_hidden_NH=None if self.ref_hidden_NH is None else self.ref_hidden_NH[rows],
            tokens_N=self.tokens_N[rows],
            temperature=self.temperature[rows] if isinstance(self.temperature, Tensor) else self.temperature,
            mask_N=None,
        )


class Terms(NamedTuple):
    """What `safe_terms` takes beyond `token_stats`."""

    v1_N: Tensor
    v2_N: Tensor
    rewards_N: Tensor
    target_v1_N: Tensor
    target_v2_N: Tensor
    kl_threshold: float | Tensor
    alpha: float
    gamma: float
    cu_seqlens: Tensor | None  # int32 [S + 1], or None: sequences of `length` tokens
    length: int

    @classmethod
    def of(
        cls,
        v1: Tensor,
        v2: Tensor,
        rewards: Tensor,
        *,
        target_v1: Tensor | None,
        target_v2: Tensor | None,
        kl_threshold: float | Tensor,
        alpha: float,
        gamma: float,
        cu_seqlens: Tensor | None,
    ) -> "Terms":
        return cls(
            flat(v1),
            flat(v2),
            flat(rewards.detach()),
            flat((v1 if target_v1 is None else target_v1).detach()),
            flat((v2 if target_v2 is None else target_v2).detach()),
            kl_threshold,
            alpha,
            gamma,
            cu_seqlens,
            v1.shape[-1],
        )


def take(fields: Fields, rows: slice | Tensor) -> Fields:
    """The same named tuple for some of its rows; what has no rows stays."""
    return type(fields)(*(x[rows] if isinstance(x, Tensor) and x.dim() > 0 else x for x in fields))


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def live(x: Tensor, mask: Tensor | None) -> Tensor:
    """With 0 where masked, whatever stood there."""
    return x if mask is None else x.where(mask, 0)


def flat(x: Any) -> Any:
    """A tensor as one axis; numbers and None stay."""
    return x.reshape(-1) if isinstance(x, Tensor) else x


def local(tokens: Tensor, shard: Shard | None) -> Tensor:
    """int32 or int64, which kernels read."""
    tokens_N = tokens.reshape(-1)
    if tokens_N.dtype != torch.int32:
        tokens_N = tokens_N.long()
    return tokens_N if shard is None else shard.local(tokens_N)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])
