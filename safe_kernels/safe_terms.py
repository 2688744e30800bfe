"""`safe_terms` and `linear_safe_terms`: the statistics of a token, and what SAFE makes of its KL and its values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import checks, reference
from .dispatch import choose_backend, exact
from .inputs import TermsInputs
from .linear import linear_token_stats
from .logits import token_stats
from .results import SafeTerms, TokenStats
from .values import value_terms_op

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def safe_terms(
    logits: Tensor,
    tokens: Tensor,
    v1: Tensor,
    v2: Tensor,
    rewards: Tensor,
    *,
    ref_logits: Tensor,
    kl_threshold: float | Tensor,
    alpha: float,
    gamma: float = 1.0,
    target_v1: Tensor | None = None,
    target_v2: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> SafeTerms:
    """Everything SAFE needs of a token from one pass over the vocabulary: `token_stats`, and

        kl_penalty   = relu(kl - kl_threshold)**2
        value        = soft_min(v1, v2, alpha)
        value_target = rewards + gamma * soft_min(target_v1, target_v2, alpha) at the next live token, 0 past the last

    Args:
        v1, v2: [...] values of the two critics.
        rewards: [...].
        kl_threshold: a number or a 0-dim tensor, in nats.
        alpha: > 0, in the unit of the values.
        target_v1, target_v2: [...] values of the target critics; None takes `v1`, `v2`. Without gradient.
        cu_seqlens: int32 [B + 1], bounds of the sequences packed in one axis. None: the last axis is time.

    The other arguments are those of `token_stats`.
    """
    checks.require_given("ref_logits", ref_logits)
    options: dict[str, Any] = {"temperature": temperature, "mask": mask, "process_group": process_group}
    stats = token_stats(
        logits, tokens, ref_logits=ref_logits, inplace_backward=inplace_backward, backend=backend, **options
    )
    values = (v1, v2, rewards, target_v1, target_v2, mask, cu_seqlens, kl_threshold, alpha, gamma)
    return with_values(stats, logits, tokens, *values, backend)


def linear_safe_terms(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    v1: Tensor,
    v2: Tensor,
    rewards: Tensor,
    *,
    ref_hidden: Tensor,
    kl_threshold: float | Tensor,
    alpha: float,
    gamma: float = 1.0,
    target_v1: Tensor | None = None,
    target_v2: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    batch_invariant: bool = False,
    max_kept_bytes: int | None = None,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> SafeTerms:
    """`safe_terms` from hidden states. Equivalent to

        logits = softcap * tanh(logit_scale * (hidden.float() @ weight.float().T + bias) / softcap)
        safe_terms(logits, tokens, v1, v2, rewards, ref_logits=the same of the reference, ...)

    Args:
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias: as in `linear_token_stats`; ref_hidden is needed.
        softcap, logit_scale, batch_invariant, max_kept_bytes: as there.

    The other arguments are those of `safe_terms`.
    """
    checks.require_given("ref_hidden", ref_hidden)
    head: dict[str, Any] = {"bias": bias, "ref_hidden": ref_hidden, "ref_weight": ref_weight, "ref_bias": ref_bias}
    head |= {"softcap": softcap, "logit_scale": logit_scale, "batch_invariant": batch_invariant}
    head["max_kept_bytes"] = max_kept_bytes
    options: dict[str, Any] = {"temperature": temperature, "mask": mask, "process_group": process_group}
    stats = linear_token_stats(hidden, weight, tokens, backend=backend, **head, **options)
    values = (v1, v2, rewards, target_v1, target_v2, mask, cu_seqlens, kl_threshold, alpha, gamma)
    return with_values(stats, hidden, tokens, *values, backend)


def with_values(
    stats: TokenStats,
    like: Tensor,
    tokens: Tensor,
    v1: Tensor,
    v2: Tensor,
    rewards: Tensor,
    target_v1: Tensor | None,
    target_v2: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kl_threshold: float | Tensor,
    alpha: float,
    gamma: float,
    backend: str | None,
) -> SafeTerms:
    """Check what `safe_terms` takes beyond `token_stats`, and add its terms; `like` is the model's tensor."""
    v1 = checks.require_per_token("v1", v1, like, tokens)
    v2 = checks.require_per_token("v2", v2, like, tokens)
    rewards = checks.require_per_token("rewards", rewards, like, tokens)
    target_v1 = v1 if target_v1 is None else checks.require_per_token("target_v1", target_v1, like, tokens)
    target_v2 = v2 if target_v2 is None else checks.require_per_token("target_v2", target_v2, like, tokens)
    checks.require_time(tokens, cu_seqlens)
    threshold = checks.require_coefficient("kl_threshold", kl_threshold)
    if isinstance(threshold, Tensor):
        threshold = threshold.to(tokens.device, non_blocking=threshold.device.type == "cpu")
    alpha, gamma = checks.require_number("alpha", alpha, above=0), checks.require_number("gamma", gamma, 0, 1)
    constants = (rewards, target_v1, target_v2)
    backend = choose_backend(backend, stats.logprob, v1, v2, *constants)
    if backend == "reference":
        with exact(like):
            options = (threshold, alpha, gamma, target_v1, target_v2, cu_seqlens, mask)
            return reference.with_values(stats, v1, v2, rewards, *options)
    number, tensor = (0.0, threshold) if isinstance(threshold, Tensor) else (threshold, None)
    assert stats.kl is not None and stats.ref_logprob is not None
    rewards_N, target_v1_N, target_v2_N = (x.detach().reshape(-1) for x in constants)
    mask_N = None if mask is None else mask.reshape(-1)
    values = (v1.reshape(-1), v2.reshape(-1), rewards_N, target_v1_N, target_v2_N, mask_N)
    inputs = TermsInputs(*values, cu_seqlens, tokens.shape[-1], number, tensor, alpha, gamma)
    terms = value_terms_op(stats.kl.reshape(-1), *inputs, backend)
    statistics = (stats.logprob, stats.entropy, stats.ref_logprob, stats.kl)
    return SafeTerms(*statistics, *(x.view(tokens.shape) for x in terms))
