"""Values of two critics: their soft-min, its advantages, and the terms that SAFE makes of them once the KL is known.

Shapes: `...` any leading shape, T the time axis, N tokens, B sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, formulas, reference
from .dispatch import (
    backend_of,
    choose_backend,
    differentiable,
    exact,
    keep,
    kept,
    register,
    without_second_derivative,
)
from .inputs import ScanInputs, TermsInputs, compute_dtype, without_masked
from .results import ValueTargets


def soft_min(v1: Tensor, v2: Tensor, alpha: float, *, backend: str | None = None) -> Tensor:
    """A smooth minimum of two values, between their minimum (alpha -> 0) and their mean (alpha -> inf). Equivalent to

        -alpha * log(0.5 * (exp(-v1 / alpha) + exp(-v2 / alpha)))

    in float32, or float64 if v1 is, with the gradient softmax(-v / alpha). v1, v2: [...]; alpha > 0, in their unit.
    Plain PyTorch on every backend: an elementwise function of [tokens] earns no kernel.
    """
    v2 = checks.require_per_token("v2", v2, checks.require_floating("v1", v1), v1)
    alpha = checks.require_number("alpha", alpha, above=0)
    choose_backend(backend, v1, v2, has_gradient=None)
    return formulas.soft_min(v1, v2, alpha)


def soft_min_gae(
    v1: Tensor,
    v2: Tensor,
    rewards: Tensor,
    mask: Tensor | None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    alpha: float = 0.3,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
    backend: str | None = None,
) -> ValueTargets:
    """Generalised advantage estimates with the soft-min of two critics as the value. Backwards over live tokens,

        value        = soft_min(v1, v2, alpha)
        delta_t      = rewards_t + gamma * value_{t+1} - value_t
        advantage_t  = delta_t + gamma * lam * advantage_{t+1}
        returns      = advantage + value

    where t + 1 is the next token of the sequence that is not masked; past the last one, value is `bootstrap` and
    advantage 0.

    Args:
        v1, v2, rewards: [..., T], or [N] packed with `cu_seqlens`.
        mask: the same shape, bool; None counts every token.
        gamma, lam: in [0, 1].
        alpha: > 0, in the unit of the values.
        cu_seqlens: int32 [B + 1], from 0 to N.
        bootstrap: [...] or [B], the value after the last token; default 0.

    Returns:
        ValueTargets, without gradient; the estimates are those of Schulman et al., arXiv 1506.02438.
    """
    v2 = checks.require_per_token("v2", v2, checks.require_floating("v1", v1), v1)
    rewards = checks.require_per_token("rewards", rewards, v1, v1)
    if mask is not None:
        checks.require_mask(mask, v1)
    checks.require_time(v1, cu_seqlens, bootstrap)
    gamma, lam = checks.require_number("gamma", gamma, 0, 1), checks.require_number("lam", lam, 0, 1)
    alpha = checks.require_number("alpha", alpha, above=0)
    bootstrap = None if bootstrap is None else checks.no_wider(bootstrap, v1)
    backend = choose_backend(backend, v1, v2, rewards, bootstrap, has_gradient=False)
    if backend == "reference":
        options: dict[str, Any] = {"gamma": gamma, "lam": lam, "alpha": alpha}
        with exact(v1):
            return reference.soft_min_gae(v1, v2, rewards, mask, **options, cu_seqlens=cu_seqlens, bootstrap=bootstrap)
    values = (v1.detach(), v2.detach(), rewards.detach(), mask)
    after_last = None if bootstrap is None else bootstrap.detach()
    return ValueTargets(*soft_min_gae_op(*values, gamma, lam, alpha, cu_seqlens, after_last, backend))


def soft_min_gae_fake(v1: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(v1.new_empty(v1.shape, dtype=compute_dtype(v1)) for _ in range(3))


@register(soft_min_gae_fake)
def soft_min_gae_op(
    v1: Tensor,
    v2: Tensor,
    rewards: Tensor,
    mask: Tensor | None,
    gamma: float,
    lam: float,
    alpha: float,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = ScanInputs(v1, v2, rewards, mask, gamma, lam, alpha, cu_seqlens, bootstrap)
    return backend_of(backend).soft_min_gae(inputs)


def value_terms_fake(kl_N: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(kl_N) for _ in range(3))


@register(value_terms_fake)
def value_terms_op(
    kl_N: Tensor,
    v1_N: Tensor,
    v2_N: Tensor,
    rewards_N: Tensor,
    target_v1_N: Tensor,
    target_v2_N: Tensor,
    mask_N: Tensor | None,
    cu_seqlens: Tensor | None,
    length: int,
    kl_threshold: float,
    kl_threshold_tensor: Tensor | None,
    alpha: float,
    gamma: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(kl_penalty, value, value_target) [N], as `safe_terms` defines them."""
    inputs = TermsInputs(
        *(v1_N, v2_N, rewards_N, target_v1_N, target_v2_N, mask_N, cu_seqlens, length),
        *(kl_threshold, kl_threshold_tensor, alpha, gamma),
    )
    penalty, value, value_target = backend_of(backend).value_terms(kl_N, inputs).unbind()
    return penalty.clone(), value.clone(), value_target.clone()


def save_values(ctx: Any, arguments: tuple[Any, ...], found: tuple[Tensor, ...]) -> None:
    """The penalty's slope in the KL now: the KL is a result of the caller's, who may change it."""
    kl_N, inputs = arguments[0], TermsInputs(*arguments[1:-1])
    threshold = inputs.kl_threshold if inputs.kl_threshold_tensor is None else inputs.kl_threshold_tensor
    ctx.mark_non_differentiable(found[2])
    ctx.alpha = inputs.alpha
    keep(ctx, (inputs.v1_N, inputs.v2_N, inputs.mask_N), 2 * (kl_N - threshold).relu())


def value_terms_gradient(
    ctx: Any, grad_penalty: Tensor | None, grad_value: Tensor | None, _: None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The slopes of a soft-min are the softmax of -v / alpha."""
    v1_N, v2_N, mask_N, slope_N = kept(ctx)
    grad_v1 = grad_v2 = None
    if grad_value is not None:
        gap = (v2_N.to(grad_value) - v1_N.to(grad_value)) / ctx.alpha
        grad_v1, grad_v2 = (without_masked(grad_value * torch.sigmoid(x), mask_N) for x in (gap, -gap))
        grad_v1, grad_v2 = grad_v1.to(v1_N.dtype), grad_v2.to(v2_N.dtype)
    return None if grad_penalty is None else kl_penalty_backward_op(slope_N, grad_penalty), grad_v1, grad_v2


@register(lambda slope_N, grad_penalty: torch.empty_like(slope_N))
def kl_penalty_backward_op(slope_N: Tensor, grad_penalty: Tensor) -> Tensor:
    """d loss / d kl. Nothing connects the slope to the KL: as plain PyTorch this would have a second derivative."""
    return slope_N * grad_penalty


differentiable(value_terms_op, 3, save_values, value_terms_gradient)
without_second_derivative(kl_penalty_backward_op, 2)
