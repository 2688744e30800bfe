"""The policy loss in closed form: its gradient is known in the forward, where the logits are at hand.

A backend brings the sweep over the vocabulary; the loss of a token and its slopes are here.

Shapes: N tokens, V vocabulary, H hidden width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .inputs import LinearInputs, LiveTokens
from .results import PolicyLoss

Results = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # logprob, entropy, ref_logprob, kl
Slopes = tuple[Tensor, Tensor | None, Tensor | None]  # d loss / d (logprob, entropy, kl)


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

    def rows(self, rows: slice) -> "Objective":
        """For some of the tokens."""
        return self._replace(**{name: getattr(self, name)[rows] for name in self._fields if name.endswith("_N")})

    def evaluate(self, logprob_N: Tensor, entropy_N: Tensor, kl_N: Tensor | None) -> tuple[Tensor, Tensor, Slopes]:
        """Weighted token losses, whether the clip took the ratio's gradient away, and the slopes."""
        ratio = (logprob_N - self.old_logprob_N).exp()
        surrogate = ratio * self.advantage_N
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * self.advantage_N
        is_clipped = clipped < surrogate
        loss, slope_l = -torch.minimum(surrogate, clipped), (-surrogate).masked_fill(is_clipped, 0) * self.weight_N
        slope_h = slope_k = None
        if not is_zero(self.entropy_coef):
            loss, slope_h = loss - self.entropy_coef * entropy_N, -self.entropy_coef * self.weight_N
        if kl_N is not None and not is_zero(self.kl_coef):
            loss, slope_k = loss + self.kl_coef * kl_N, self.kl_coef * self.weight_N
        if kl_N is not None and not is_zero(self.kl_penalty_coef):
            excess = (kl_N - self.kl_threshold).relu()
            loss, slope = loss + self.kl_penalty_coef * excess**2, 2 * self.kl_penalty_coef * excess * self.weight_N
            slope_k = slope if slope_k is None else slope_k + slope
        return self.weight_N * loss, is_clipped, (slope_l, slope_h, slope_k)


COEFFICIENTS = tuple(name for name in Objective._fields if not name.endswith("_N"))

# (inputs, objective, which of hidden, weight, bias need a gradient) -> the results of every token, and those gradients
# in the compute dtype, None where none is needed.
Sweep = Callable[[LinearInputs, Objective, tuple[bool, ...]], tuple[Results, list[Tensor | None]]]


def policy_loss(
    sweep: Sweep,
    live: LiveTokens,
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    *,
    loss_weight: Tensor | None,
    **options: Any,
) -> PolicyLoss:
    """The public `linear_policy_loss`, by a backend's sweep."""
    coefficients = {name: options.pop(name) for name in COEFFICIENTS}
    inputs = LinearInputs.of(live, hidden, weight, tokens, **options)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    ones = live.zeroed(torch.ones(len(inputs.tokens_N), dtype=dtype, device=hidden.device))
    share = ones / ones.sum().clamp(min=1)

    def constant(x: Tensor) -> Tensor:
        return live.zeroed(live.gather(x.detach().to(dtype)))

    weight_N = share if loss_weight is None else constant(loss_weight)
    objective = Objective(constant(old_logprob), constant(advantage), weight_N, share, **coefficients)
    loss, clip_fraction, *results = _PolicyLoss.apply(*inputs, sweep, objective, torch.is_grad_enabled())
    return PolicyLoss._make([loss, *(None if x is None else live.scatter(x) for x in results), clip_fraction])


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        *values, sweep, objective, grad_enabled = args
        inputs = LinearInputs(*values)
        needed = tuple(need and grad_enabled for need in ctx.needs_input_grad[:3])
        results, gradients = sweep(inputs, objective, needed)
        logprob, entropy, _, kl = results
        loss_N, is_clipped_N, _ = objective.evaluate(logprob, entropy, kl)
        clip_fraction = (objective.share_N * is_clipped_N).sum()
        ctx.save_for_backward(*gradients)
        ctx.dtypes, ctx.constants = [None if x is None else x.dtype for x in inputs[:3]], len(args) - 3
        ctx.mark_non_differentiable(clip_fraction, *(x for x in results if x is not None))
        return loss_N.sum(), clip_fraction, *results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        gradients = (None if x is None else (x * grad_loss).to(dtype) for x, dtype in pairs)
        return *gradients, *(None,) * ctx.constants


def is_zero(coefficient: float | Tensor) -> bool:
    """Without asking a tensor: a term that is switched off stays out of the loss even where it is infinite."""
    return not isinstance(coefficient, Tensor) and coefficient == 0
