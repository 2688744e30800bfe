"""CISPO (arXiv 2506.13585): REINFORCE on every token, weighted by an importance ratio that is clipped from above.

Shape legend: L response tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safe_train.algorithms.algorithm import Algorithm, TokenLoss
from safe_train.algorithms.grpo import advantages

if TYPE_CHECKING:
    from torch import Tensor

    from safe_train.config import SafeConfig


def clipped_weight(ratio_L: Tensor, logprob_L: Tensor, advantage_L: Tensor, args: SafeConfig) -> TokenLoss:
    """-min(ratio, 1 + clip_high) A log p, with a constant weight: no token loses its gradient."""
    largest = 1 + args.clip_high
    weight_L = ratio_L.detach().clamp(max=largest)
    return TokenLoss(-weight_L * advantage_L * logprob_L, is_clipped_L=ratio_L > largest)


CISPO = Algorithm(clipped_weight, advantages, critic="none", controller="fixed", beta=0.1)
