"""What the public functions return. Every field has the leading shape of `tokens` unless it says otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .inputs import RESULTS, compute_dtype


class TokenStats(NamedTuple):
    """Per-token statistics of a policy, in nats; float32, or float64 for float64 inputs."""

    logprob: Tensor  # log pi(token), differentiable; of K ids a token [..., K]
    entropy: Tensor  # H(pi), differentiable
    ref_logprob: Tensor | None  # log pi_ref(token), likewise, no gradient; None without a reference
    kl: Tensor | None  # KL(pi || pi_ref) over the whole vocabulary, differentiable in the policy
    ref_kl: Tensor | None = None  # KL(pi_ref || pi), likewise; None unless asked for

    @classmethod
    def of(cls, found: Sequence[Tensor], like: Tensor, stats_rows: int, tokens: Tensor | None = None) -> TokenStats:
        """From flat (logprob, entropy, ref_logprob, kl, ref_kl), those that are there, in the shape of `like`;
        log-probs in that of `tokens`, if given.
        """
        found = found[: RESULTS[stats_rows]]
        if like.dim() != 1:  # each view is a node of the graph
            ids = like if tokens is None else tokens
            found = [x.view_as(shape) for x, shape in zip(found, (ids, like, ids, like, like), strict=False)]
        return cls(*found, *[None] * (5 - len(found)))


class SafeTerms(NamedTuple):
    """Everything SAFE needs of a token, from one pass over the vocabulary."""

    logprob: Tensor  # differentiable
    entropy: Tensor  # differentiable
    ref_logprob: Tensor  # no gradient
    kl: Tensor  # differentiable in the policy
    kl_penalty: Tensor  # relu(kl - kl_threshold)**2, differentiable in the policy
    value: Tensor  # soft_min(v1, v2, alpha), differentiable in v1 and v2
    value_target: Tensor  # reward + gamma * soft_min of the target heads at the next live token, no gradient


class ValueTargets(NamedTuple):
    """Soft-min values and their generalised advantage estimates; constants, without gradient."""

    value: Tensor  # soft_min(v1, v2, alpha)
    advantage: Tensor  # A_t = delta_t + gamma lam A_{t+1}
    returns: Tensor  # advantage + value


class PolicyLoss(NamedTuple):
    """A policy loss and the statistics it was made from; only `loss` carries a gradient."""

    loss: Tensor  # 0-dim
    logprob: Tensor
    entropy: Tensor
    ref_logprob: Tensor | None
    kl: Tensor | None
    clip_fraction: Tensor  # 0-dim: share of live tokens where the clip took the gradient away
    ref_kl: Tensor | None = None  # None where `ref_kl_coef` is the number 0


class DistillationLoss(NamedTuple):
    """A distillation loss and what it was made from; only `loss` carries a gradient, to the student."""

    loss: Tensor  # 0-dim, or with reduction="none" one entry a token
    divergence: Tensor  # between student and teacher, in nats (tv: between 0 and 1), without weights
    entropy: Tensor  # of the student
    logprob: Tensor | None  # of `tokens` under the student; None without them


def new_results(x: Tensor, tokens_N: Tensor, stats_rows: int) -> tuple[Tensor, ...]:
    """What an op of statistics returns for tensors without memory."""
    dtype, N = compute_dtype(x), tokens_N.shape[0]  # len() would make a number of a symbolic size
    found = [x.new_empty(N if i < RESULTS[stats_rows] else 0, dtype=dtype) for i in range(5)]
    return *found, x.new_empty(stats_rows, N, dtype=dtype)


def results_of(stats: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprob, entropy, ref_logprob, kl, ref_kl), with memory of their own, of which callers get the first two, four
    or five and the others are empty; and the statistics.
    """
    found = [stats[row].clone() for row in (0, 1, 4, 5, 8)[: RESULTS[stats.shape[0]]]]
    return *found, *[stats.new_empty(0) for _ in range(5 - len(found))], stats  # type: ignore[return-value]


def constants_of(found: Sequence[Tensor]) -> list[Tensor]:
    """What has no gradient of the results that are there, and those that are not."""
    *results, stats = found
    return [results[2], stats, *results[max(3, RESULTS[stats.shape[0]]) :]]
