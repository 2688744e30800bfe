"""The policy loss in closed form: its gradient is known in the forward, where the tile of logits is at hand.

Shapes: N tokens, R rows of a tile, V vocabulary, H hidden width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..results import PolicyLoss
from .linear import GradientSums, LinearInputs, LiveTokens
from .rows import Gradients, RowStats, Tokens, logit_gradient, row_statistics, take


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    *,
    loss_weight: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    entropy_coef: float | Tensor = 0.0,
    kl_coef: float | Tensor = 0.0,
    kl_penalty_coef: float | Tensor = 0.0,
    kl_threshold: float | Tensor = 0.0,
    mask: Tensor | None = None,
    **head: Any,
) -> PolicyLoss:
    live = LiveTokens.of(tokens.shape, mask)
    inputs = LinearInputs.of(live, hidden, weight, tokens, **head)
    asked = inputs.asked()
    ones = torch.ones_like(asked.known_N)
    share = asked.live(ones) / asked.live(ones).sum().clamp(min=1)

    def constant(x: Tensor) -> Tensor:
        return asked.live(live.gather(x.detach().to(ones.dtype)))

    objective = Objective(
        old_logprob_N=constant(old_logprob),
        advantage_N=constant(advantage),
        weight_N=share if loss_weight is None else constant(loss_weight),
        share_N=share,
        clip_low=clip_low,
        clip_high=clip_high,
        entropy_coef=entropy_coef,
        kl_coef=kl_coef,
        kl_penalty_coef=kl_penalty_coef,
        kl_threshold=kl_threshold,
    )
    loss, clip_fraction, *stats = _PolicyLoss.apply(*inputs, objective, torch.is_grad_enabled())
    return PolicyLoss._make([loss, *(None if x is None else live.scatter(x) for x in stats), clip_fraction])


class Objective(NamedTuple):
    """sum of w (-min(rho A, clip(rho) A) - entropy_coef H + kl_coef KL + kl_penalty_coef relu(KL - kl_threshold)^2)."""

    old_logprob_N: Tensor
    advantage_N: Tensor
    weight_N: Tensor
    share_N: Tensor  # 1 / number of live tokens; 0 where masked
    clip_low: float
    clip_high: float
    entropy_coef: float | Tensor
    kl_coef: float | Tensor
    kl_penalty_coef: float | Tensor
    kl_threshold: float | Tensor

    def evaluate(self, stats: RowStats, tokens: Tokens) -> tuple[Tensor, Tensor, Gradients]:
        """Weighted token losses, whether the clip took the ratio's gradient away, and the gradients."""
        logprob, entropy, _, kl = stats.results(tokens)
        ratio = (logprob - self.old_logprob_N).exp()
        surrogate = ratio * self.advantage_N
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * self.advantage_N
        is_clipped = clipped < surrogate
        loss, slope_l = -torch.minimum(surrogate, clipped), (-surrogate).masked_fill(is_clipped, 0)
        slope_h = slope_k = None
        if not _is_zero(self.entropy_coef):
            loss, slope_h = loss - self.entropy_coef * entropy, -self.entropy_coef * self.weight_N
        if kl is not None and not _is_zero(self.kl_coef):
            loss, slope_k = loss + self.kl_coef * kl, self.kl_coef * self.weight_N
        if kl is not None and not _is_zero(self.kl_penalty_coef):
            excess = (kl - self.kl_threshold).relu()
            loss, slope = loss + self.kl_penalty_coef * excess**2, 2 * self.kl_penalty_coef * excess * self.weight_N
            slope_k = slope if slope_k is None else slope_k + slope
        gradients = Gradients.of(tokens, slope_l * self.weight_N, slope_h, slope_k)
        return tokens.live(self.weight_N * loss), is_clipped, gradients


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        *values, objective, grad_enabled = args
        inputs = LinearInputs(*values)
        tokens, with_reference, head = inputs.asked(), inputs.ref_hidden_NH is not None, inputs.head()
        stats = RowStats.empty(tokens, with_reference)
        sums = GradientSums(inputs, ctx.needs_input_grad) if grad_enabled and any(ctx.needs_input_grad) else None
        for rows, some, tile, hidden_RH in inputs.loaded_tiles(tokens, with_reference):
            part = row_statistics(tile, some)
            stats.write(rows, part)
            if sums is not None:
                *_, gradients = take(objective, rows).evaluate(part, some)
                logit_gradient(tile, some, part, gradients)
                sums.add(rows, head.product_gradient(tile, some, part), hidden_RH)
        loss_N, is_clipped_N, _ = objective.evaluate(stats, tokens)
        results = (loss_N.sum(), (objective.share_N * is_clipped_N).sum(), *stats.results(tokens))
        if sums is not None:
            ctx.save_for_backward(*sums.sums)
            ctx.dtypes, ctx.constants = sums.dtypes, len(args) - len(sums.dtypes)
        ctx.mark_non_differentiable(*(x for x in results[1:] if x is not None))
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        gradients = (None if x is None else (x * grad_loss).to(dtype) for x, dtype in pairs)
        return *gradients, *(None,) * ctx.constants


def _is_zero(coefficient: float | Tensor) -> bool:
    """Without asking a tensor: a term that is switched off stays out of the loss even where it is infinite."""
    return not isinstance(coefficient, Tensor) and coefficient == 0
