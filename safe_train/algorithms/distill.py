"""On-policy distillation: at the states that the policy's own samples pass, its distribution is pulled to a teacher's.

The divergence is over the whole vocabulary, so no token needs a reward (`losses.distillation_loss`). As in GKD
(arXiv 2306.13649) the states are taken as given: what a token does to the divergence at later ones has no gradient.

Shape legend: B completions of a rollout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safe_train.algorithms.algorithm import Algorithm
from safe_train.algorithms.ppo import clipped

if TYPE_CHECKING:
    from torch import Tensor

    from safe_train.config import SafeConfig


def no_advantages(reward_B: Tensor, args: SafeConfig) -> Tensor:
    """Rewards are logged, and teach nothing."""
    return reward_B.new_zeros(len(reward_B))


DISTILL = Algorithm(clipped, no_advantages, critic="none", controller="fixed", beta=0.0, entropy_coef=0.0)
