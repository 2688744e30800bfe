"""The policy loss of a token and its slopes: all that its closed form needs of the logits are their statistics.

Shapes: N tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import LinearInputs, compute_dtype, flat, live

Slopes = tuple[Tensor | None, Tensor | None, Tensor | None]  # d loss / d (logprob, entropy, kl) [N]; None is none


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

    @classmethod
    def of(
        cls,
        inputs: LinearInputs,
        old_logprob: Tensor,
        advantage: Tensor,
        loss_weight: Tensor | None,
        *coefficients: float | Tensor,
    ) -> "Objective":

        def constant(x: Tensor) -> Tensor:
            return live(flat(x.detach()).to(compute_dtype(inputs.hidden_NH)), inputs.mask_N)

        ones = constant(torch.ones_like(inputs.tokens_N))
        share = ones / ones.sum().clamp(min=1)
        weight = share if loss_weight is None else constant(loss_weight)
        return cls._make([constant(old_logprob), constant(advantage), weight, share, *coefficients])

    def evaluate(self, logprob_N: Tensor, entropy_N: Tensor, kl_N: Tensor | None) -> tuple[Tensor, Tensor, Slopes]:
        """Weighted token losses, whether the clip took the ratio's gradient away, and the slopes."""
        ratio = (logprob_N - self.old_logprob_N).exp()
        surrogate = ratio * self.advantage_N
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * self.advantage_N
        is_clipped = clipped < surrogate
        loss = -torch.minimum(surrogate, clipped)
        slope_logprob = (-surrogate).masked_fill(is_clipped, 0) * self.weight_N
        slope_entropy = slope_kl = None
        if not is_zero(self.entropy_coef):
            loss = loss - self.entropy_coef * entropy_N
            slope_entropy = -self.entropy_coef * self.weight_N
        if kl_N is not None and not is_zero(self.kl_coef):
            loss = loss + self.kl_coef * kl_N
            slope_kl = self.kl_coef * self.weight_N
        if kl_N is not None and not is_zero(self.kl_penalty_coef):
            excess = (kl_N - self.kl_threshold).relu()
            loss = loss + self.kl_penalty_coef * excess**2
            slope = 2 * self.kl_penalty_coef * excess * self.weight_N
            slope_kl = slope if slope_kl is None else slope_kl + slope
        return self.weight_N * loss, is_clipped, (slope_logprob, slope_entropy, slope_kl)


def is_zero(coefficient: float | Tensor) -> bool:
    """Without asking a tensor: a term that is switched off stays out of the loss even where it is infinite."""
    return not isinstance(coefficient, Tensor) and coefficient == 0
