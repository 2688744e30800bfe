"""`linear_policy_loss`: the clipped policy loss, its gradient taken in the forward. Public function, op and gradient.

Shapes: N tokens, V vocabulary, H hidden width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import checks, reference, vocab_parallel
from .dispatch import backend_of, choose_backend, differentiable, exact, first_derivative_only, register
from .formulas import Objective, is_zero
from .inputs import Head, LinearInputs, RowStats, compute_dtype, without_masked
from .linear import flat_inputs
from .results import PolicyLoss, TokenStats, new_results, results_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    *,
    loss_weight: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    entropy_coef: float | Tensor = 0.0,
    kl_coef: float | Tensor = 0.0,
    kl_penalty_coef: float | Tensor = 0.0,
    kl_threshold: float | Tensor = 0.0,
    ref_kl_coef: float | Tensor = 0.0,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    batch_invariant: bool = False,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> PolicyLoss:
    """The clipped policy loss with entropy bonus and KL terms, its gradient taken in the forward. Equivalent to

        stats = linear_token_stats(hidden, weight, tokens, ...)
        ratio = exp(stats.logprob - old_logprob)
        l = -min(ratio * advantage, clip(ratio, 1 - clip_low, 1 + clip_high) * advantage) - entropy_coef * stats.entropy
        l = l + kl_coef * stats.kl + kl_penalty_coef * relu(stats.kl - kl_threshold)**2 + ref_kl_coef * stats.ref_kl
        loss = (loss_weight * l).sum()

    (Schulman et al., arXiv 1707.06347) with one sweep over the vocabulary instead of a forward and a recomputing
    backward. `logprob`, `entropy` and `kl` have the same bits in and out of torch.no_grad and whatever the advantages
    are, so that a ratio to log-probs that this function returned before is exactly 1; on the torch backend they also
    have those of `linear_token_stats`.

    With `process_group` it takes two sweeps, as no token's slope is known before all ranks have given their statistics:
    it costs a `linear_token_stats` and its backward, whose bits it has on every backend.

    Args:
        old_logprob, advantage: [...]; without gradient.
        loss_weight: [...]; it carries the reduction. Default: 1 / number of live tokens, the token mean.
        clip_low, clip_high: >= 0.
        entropy_coef, kl_coef, kl_penalty_coef, ref_kl_coef: numbers or 0-dim tensors. The number 0 switches its term
            off, and of `ref_kl_coef` also the result `ref_kl`.
        kl_threshold: a number or a 0-dim tensor, in nats.

    The other arguments are those of `linear_token_stats`.

    Returns:
        PolicyLoss; only `loss` carries a gradient, to hidden, weight and bias as far as they require it.
    """
    head = checks.require_head(
        Head(
            hidden, weight, tokens, bias, ref_hidden, ref_weight, ref_bias, temperature, softcap, logit_scale, mask
        )._replace(batch_invariant=batch_invariant, process_group=process_group)
    )
    old_logprob = checks.require_per_token("old_logprob", old_logprob, hidden, tokens)
    advantage = checks.require_per_token("advantage", advantage, hidden, tokens)
    if loss_weight is not None:
        loss_weight = checks.require_per_token("loss_weight", loss_weight, hidden, tokens)
    coefficients = {
        "entropy_coef": checks.require_coefficient("entropy_coef", entropy_coef),
        "kl_coef": checks.require_coefficient("kl_coef", kl_coef),
        "kl_penalty_coef": checks.require_coefficient("kl_penalty_coef", kl_penalty_coef),
        "kl_threshold": checks.require_coefficient("kl_threshold", kl_threshold),
        "ref_kl_coef": checks.require_coefficient("ref_kl_coef", ref_kl_coef),
    }
    for name in ("kl_coef", "kl_penalty_coef", "ref_kl_coef"):
        if not is_zero(coefficients[name]):
            checks.require_reference_for(name, coefficients[name], "ref_hidden", ref_hidden)
    clip = checks.require_number("clip_low", clip_low, 0), checks.require_number("clip_high", clip_high, 0)
    given = (*head[:8], old_logprob, advantage, loss_weight)
    backend = choose_backend(backend, *given, group=head.process_group)
    if backend == "reference":
        options = {"loss_weight": loss_weight, "clip_low": clip[0], "clip_high": clip[1]}
        with exact(hidden):
            return reference.linear_policy_loss(
                old_logprob=old_logprob, advantage=advantage, **options, **coefficients, **head._asdict()
            )
    inputs, group, bounds = flat_inputs(head, not is_zero(coefficients["ref_kl_coef"])), None, None
    if head.process_group is not None:
        inputs, group, bounds = vocab_parallel.sharded(inputs, len(head.weight), head.process_group)
    found = linear_policy_loss_op(
        *inputs,
        *(group, bounds),
        *weights_of(inputs, old_logprob, advantage, loss_weight),
        *clip,
        *(0.0 if isinstance(x, Tensor) else x for x in coefficients.values()),
        *(x if isinstance(x, Tensor) else None for x in coefficients.values()),
        *(torch.is_grad_enabled() and x is not None and may_require_grad(x) for x in inputs[:3]),
        backend,
    )
    stats = TokenStats.of(found[2:7], tokens, inputs.stats_rows)
    return PolicyLoss(found[0], *stats[:4], found[1], stats.ref_kl)


def weights_of(
    inputs: LinearInputs, old_logprob: Tensor, advantage: Tensor, loss_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The tensors of `Objective`, constants in the compute dtype."""

    def constant(x: Tensor) -> Tensor:
        return without_masked(x.detach().reshape(-1).to(compute_dtype(inputs.hidden_NH)), inputs.mask_N)

    ones = constant(torch.ones_like(inputs.tokens_N))
    share = ones / ones.sum().clamp(min=1)
    return constant(old_logprob), constant(advantage), share if loss_weight is None else constant(loss_weight), share


def may_require_grad(x: Tensor) -> bool:
    """Inside vmap a tensor does not say."""
    return x.requires_grad or (torch._C._are_functorch_transforms_active() and torch._C._functorch.is_batchedtensor(x))


def linear_policy_loss_fake(*arguments: Any) -> tuple[Tensor, ...]:
    leaves, needed = arguments[:3], arguments[32:35]
    *results, _ = new_results(arguments[0], arguments[6], arguments[13])
    shapes = [x.shape if need else (0,) for x, need in zip(leaves, needed, strict=True)]
    loss, clip_fraction, *gradients = [results[0].new_empty(shape) for shape in ((), (), *shapes)]
    return loss, clip_fraction, *results, *gradients


@register(linear_policy_loss_fake)
def linear_policy_loss_op(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    ref_hidden_NH: Tensor | None,
    ref_weight_VH: Tensor | None,
    ref_bias_V: Tensor | None,
    tokens_N: Tensor,
    temperature: float,
    temperatures_N: Tensor | None,
    mask_N: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    batch_invariant: bool,
    stats_rows: int,
    group: str | None,
    bounds: Tensor | None,
    old_logprob_N: Tensor,
    advantage_N: Tensor,
    weight_N: Tensor,
    share_N: Tensor,
    clip_low: float,
    clip_high: float,
    entropy_coef: float,
    kl_coef: float,
    kl_penalty_coef: float,
    kl_threshold: float,
    ref_kl_coef: float,
    entropy_coef_tensor: Tensor | None,
    kl_coef_tensor: Tensor | None,
    kl_penalty_coef_tensor: Tensor | None,
    kl_threshold_tensor: Tensor | None,
    ref_kl_coef_tensor: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, clip_fraction, logprob, entropy, ref_logprob, kl, ref_kl, and the gradients of (hidden, weight, bias).

    A coefficient's tensor, if there is one, takes the place of its number.
    """
    head = (hidden_NH, weight_VH, bias_V, ref_hidden_NH, ref_weight_VH, ref_bias_V)
    per_row = (tokens_N, temperature, temperatures_N, mask_N)
    inputs = LinearInputs(*head, *per_row, softcap, logit_scale, batch_invariant, stats_rows)
    objective = Objective(
        *(old_logprob_N, advantage_N, weight_N, share_N, clip_low, clip_high),
        entropy_coef if entropy_coef_tensor is None else entropy_coef_tensor,
        kl_coef if kl_coef_tensor is None else kl_coef_tensor,
        kl_penalty_coef if kl_penalty_coef_tensor is None else kl_penalty_coef_tensor,
        kl_threshold if kl_threshold_tensor is None else kl_threshold_tensor,
        ref_kl_coef if ref_kl_coef_tensor is None else ref_kl_coef_tensor,
    )
    needed, kernels = (need_hidden, need_weight, need_bias), backend_of(backend)
    if group is not None and bounds is not None:
        stats, gradients = vocab_parallel.linear_loss(kernels, inputs, objective, needed, group, bounds)
    else:
        stats, gradients = kernels.linear_loss(inputs, objective, needed)
    *results, _ = results_of(stats)
    loss_N, is_clipped_N, _ = objective.evaluate(RowStats(*stats.unbind()))
    clip_fraction = (objective.share_N * is_clipped_N).sum()
    empty = (stats.new_empty(0) if x is None else x for x in gradients)
    return loss_N.sum(), clip_fraction, *results, *empty  # type: ignore[return-value]


def save_gradients(ctx: Any, arguments: tuple[Any, ...], found: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*found[1:])
    ctx.dtypes = [None if x is None else x.dtype for x in arguments[:3]]
    ctx.save_for_backward(*found[-3:])


def linear_policy_loss_gradient(ctx: Any, grad_loss: Tensor | None, *_: None) -> list[Tensor | None]:
    if grad_loss is None:
        return [None, None, None]
    first_derivative_only("linear_policy_loss")
    found = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[1:4], strict=True)
    return [scaled_op(x, grad_loss, dtype) if need else None for x, dtype, need in found]


def scaled_fake(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


@register(scaled_fake)
def scaled_op(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded as it is written: a GPU does not hold a head's gradient a second time in float32."""
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


differentiable(linear_policy_loss_op, 3, save_gradients, linear_policy_loss_gradient)
