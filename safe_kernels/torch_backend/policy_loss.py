"""The policy loss in closed form: its gradient is known in the forward, where the tile of logits is at hand.

Shapes: N tokens, R rows of a tile, V vocabulary, H hidden width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..results import PolicyLoss
from .linear import GradientSums, LinearInputs, LiveTokens
from .rows import Gradients, RowStats, logit_gradient, row_statistics


def linear_policy_loss(
    hidden,
    weight,
    tokens,
    old_logprob,
    advantage,
    *,
    loss_weight=None,
    clip_low=0.2,
    clip_high=0.2,
    entropy_coef=0.0,
    kl_coef=0.0,
    kl_penalty_coef=0.0,
    kl_threshold=0.0,
    mask=None,
    **head,
) -> PolicyLoss:
    live = LiveTokens.of(tokens.shape, mask)
    inputs = LinearInputs.of(live, hidden, weight, tokens, **head)
    known = inputs.tokens()
    share = torch.ones_like(known.known_N) if live.mask is None else live.mask.to(known.known_N.dtype)
    share = share / share.sum().clamp(min=1)
    per_token = (x.detach().to(share.dtype) for x in (old_logprob, advantage, loss_weight) if x is not None)
    old_logprob, advantage, *weights = (known.live(live.gather(x)) for x in per_token)
    objective = Objective(
        old_logprob,
        advantage,
        weights[0] if weights else share,
        share,
        (clip_low, clip_high),
        entropy_coef,
        kl_coef,
        kl_penalty_coef,
        kl_threshold,
    )
    loss, clip_fraction, *stats = _PolicyLoss.apply(*inputs, objective, torch.is_grad_enabled())
    stats = (None if x is None else live.scatter(x) for x in stats)
    return PolicyLoss(loss, *stats, clip_fraction)


class Objective(NamedTuple):
    """sum of w_t (-min(rho A, clip(rho) A) - entropy_coef H + kl_coef KL + kl_penalty_coef relu(KL - threshold)^2)."""

    old_logprob_N: Tensor
    advantage_N: Tensor
    weight_N: Tensor
    share_N: Tensor  # 1 / number of live tokens; 0 where masked
    clip: tuple[float, float]
    entropy_coef: float | Tensor
    kl_coef: float | Tensor
    kl_penalty_coef: float | Tensor
    kl_threshold: float | Tensor

    def at(self, rows: slice) -> "Objective":
        return Objective(*(x[rows] for x in self[:4]), *self[4:])

    def evaluate(self, logprob, entropy, kl) -> tuple[Tensor, Tensor, Gradients]:
        """Weighted token losses, whether the clip took the ratio's gradient away, and the gradients."""
        ratio = (logprob - self.old_logprob_N).exp()
        surrogate = ratio * self.advantage_N
        clipped = ratio.clamp(1 - self.clip[0], 1 + self.clip[1]) * self.advantage_N
        is_clipped = clipped < surrogate
        loss, slope_l, slope_h, slope_k = -torch.minimum(surrogate, clipped), -surrogate, None, None
        if not _is_zero(self.entropy_coef):
            loss, slope_h = loss - self.entropy_coef * entropy, -self.entropy_coef
        if not _is_zero(self.kl_coef):
            loss, slope_k = loss + self.kl_coef * kl, self.kl_coef
        if not _is_zero(self.kl_penalty_coef):
            excess = (kl - self.kl_threshold).relu()
            loss = loss + self.kl_penalty_coef * excess.square()
            slope_k = (0 if slope_k is None else slope_k) + 2 * self.kl_penalty_coef * excess
        slopes = (slope_l.masked_fill(is_clipped, 0), slope_h, slope_k)
        return self.weight_N * loss, is_clipped, Gradients(*(None if x is None else x * self.weight_N for x in slopes))


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        ctx.set_materialize_grads(False)
        inputs, objective, with_gradient = LinearInputs(*args[:-2]), *args[-2:]
        tokens, with_reference, head = inputs.tokens(), inputs.ref_hidden_NH is not None, inputs.head()
        stats = RowStats.empty(len(inputs.tokens_N), with_reference, tokens.known_N)
        sums = GradientSums(inputs, ctx.needs_input_grad) if with_gradient and any(ctx.needs_input_grad) else None
        for rows, hidden_RH, tile in inputs.tiles(tokens, with_reference):
            some = tokens.at(rows)
            part = row_statistics(tile, some)
            stats.write(rows, part)
            if sums is not None:
                logprob, entropy, _, kl = part.results(some)
                gradients = objective.at(rows).evaluate(logprob, entropy, kl)[2].prepare(some)
                logit_gradient(tile, some, part, gradients)
                sums.add(rows, head.product_gradient(tile, some, part), hidden_RH)
        logprob, entropy, ref_logprob, kl = stats.results(tokens)
        loss_N, is_clipped, _ = objective.evaluate(logprob, entropy, kl)
        results = (tokens.live(loss_N).sum(), (objective.share_N * is_clipped).sum(), *stats.results(tokens))
        ctx.sums, ctx.inputs = sums, len(args)
        ctx.mark_non_differentiable(*(x for x in results[1:] if x is not None))
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        if ctx.sums is None:
            raise RuntimeError(
                "linear_policy_loss: its gradient, computed in the forward, was given away by an earlier backward; "
                "call it again instead of retaining the graph"
            )
        sums, ctx.sums = ctx.sums, None
        return *sums.rounded(grad_loss), *(None,) * (ctx.inputs - 3)


def _is_zero(coefficient: float | Tensor) -> bool:
    return not isinstance(coefficient, Tensor) and coefficient == 0
