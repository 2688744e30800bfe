"""PPO (arXiv 1707.06347) with one critic, or with two whose mean is read.

Shape legend: L response tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safe_train.algorithms.algorithm import Algorithm, TokenLoss

if TYPE_CHECKING:
    from torch import Tensor

    from safe_train.config import SafeConfig


def clipped(ratio_L: Tensor, logprob_L: Tensor, advantage_L: Tensor, args: SafeConfig) -> TokenLoss:
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), which `linear_policy_loss` has built in."""
    plain_L = ratio_L * advantage_L
    bounded_L = ratio_L.clamp(1 - args.clip_low, 1 + args.clip_high) * advantage_L
    return TokenLoss(-plain_L.minimum(bounded_L), bounded_L < plain_L)


# In docs/study.md a beta of 0.01 let PPO run away, and 0.1 held it.
PPO = Algorithm(clipped, advantages=None, critic="single", controller="fixed", beta=0.1)
PPO_TWO_HEADS = Algorithm(clipped, advantages=None, critic="mean", controller="fixed", beta=0.1)
