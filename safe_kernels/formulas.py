"""Elementwise formulas of tokens that more than one backend needs.

Shapes: N tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import DivergenceGrad, RowStats, StatsGrad, compute_dtype


class Objective(NamedTuple):
    """The policy loss of tokens and its slopes: all that it needs of the logits are their statistics.

    sum of w (-min(rho A, clip(rho) A) - entropy_coef H + kl_coef KL + kl_penalty_coef relu(KL - kl_threshold)^2
              + ref_kl_coef KL(reference || policy))
    """

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
    ref_kl_coef: float | Tensor

    def evaluate(self, stats: RowStats) -> tuple[Tensor, Tensor, StatsGrad]:
        """Weighted token losses, whether the clip took the ratio's gradient away, and d loss / d the statistics."""
        logprob_N, entropy_N, kl_N, ref_kl_N = stats.logprob, stats.entropy, stats.kl, stats.ref_kl
        ratio = (logprob_N - self.old_logprob_N).exp()
        surrogate = ratio * self.advantage_N
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * self.advantage_N
        is_clipped = clipped < surrogate
        loss = -torch.minimum(surrogate, clipped)
        grad_logprob = (-surrogate).masked_fill(is_clipped, 0) * self.weight_N
        grad_entropy = grad_kl = grad_ref_kl = None
        if not is_zero(self.entropy_coef):
            loss = loss - self.entropy_coef * entropy_N
            grad_entropy = -self.entropy_coef * self.weight_N
        if kl_N is not None and not is_zero(self.kl_coef):
            loss = loss + self.kl_coef * kl_N
            grad_kl = self.kl_coef * self.weight_N
        if kl_N is not None and not is_zero(self.kl_penalty_coef):
            excess = (kl_N - self.kl_threshold).relu()
            loss = loss + self.kl_penalty_coef * excess**2
            slope = 2 * self.kl_penalty_coef * excess * self.weight_N
            grad_kl = slope if grad_kl is None else grad_kl + slope
        if ref_kl_N is not None and not is_zero(self.ref_kl_coef):
            loss = loss + self.ref_kl_coef * ref_kl_N
            grad_ref_kl = self.ref_kl_coef * self.weight_N
        return self.weight_N * loss, is_clipped, StatsGrad(grad_logprob, grad_entropy, grad_kl, grad_ref_kl)


class DistillationObjective(NamedTuple):
    """The distillation loss of tokens and its slopes: weight (divergence - cross_entropy_coef logprob)."""

    weight_N: Tensor  # 0 where masked
    cross_entropy_coef: float

    def evaluate(self, divergence_N: Tensor, logprob_N: Tensor) -> Tensor:
        """Weighted token losses."""
        if is_zero(self.cross_entropy_coef):
            return self.weight_N * divergence_N
        return self.weight_N * (divergence_N - self.cross_entropy_coef * logprob_N)

    def slopes(self) -> DivergenceGrad:
        is_plain = is_zero(self.cross_entropy_coef)
        return DivergenceGrad(self.weight_N, None if is_plain else -self.cross_entropy_coef * self.weight_N)


def is_zero(coefficient: float | Tensor) -> bool:
    """Without asking a tensor: a term that is switched off stays out of the loss even where it is infinite."""
    return not isinstance(coefficient, Tensor) and coefficient == 0


def soft_min(v1: Tensor, v2: Tensor, alpha: float) -> Tensor:
    """-alpha log((e^(-v1 / alpha) + e^(-v2 / alpha)) / 2): the minimum, and what the other value adds.

    So nothing cancels for any alpha.
    """
    v1 = v1.to(compute_dtype(v1))
    v2 = v2.to(v1.dtype)
    return torch.minimum(v1, v2) - alpha * torch.log1p(torch.expm1(-(v1 - v2).abs() / alpha) / 2)
