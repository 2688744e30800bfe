"""GRPO (arXiv 2402.03300): PPO's clip, with advantages from the other completions of the same prompt.

Its relatives are settings: `scale_rewards`, `loss_aggregation`, `importance_sampling_level`, `dynamic_sampling`.

Shape legend: B completions of a rollout, P prompts, G completions of a prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safe_train.algorithms.algorithm import Algorithm
from safe_train.algorithms.ppo import clipped

if TYPE_CHECKING:
    from torch import Tensor

    from safe_train.config import SafeConfig


def advantages(reward_B: Tensor, args: SafeConfig) -> Tensor:
    """Rewards within their groups, scaled as `scale_rewards` says.

    With `normalize_then_sum` each reward was standardised within its group before, and their sum is over the rollout.
    """
    if args.multi_objective_aggregation == "normalize_then_sum":
        return group_advantages(reward_B, len(reward_B))
    return group_advantages(reward_B, args.completions_per_prompt, args.scale_rewards)


def group_advantages(reward_B: Tensor, group_size: int, scale: str = "group") -> Tensor:
    """Rewards less the mean of their group, over the standard deviation of the group or the whole batch, or neither.

    Equal rewards give 0. A reward that is nan is left out of mean and standard deviation, and gets 0.
    """
    reward_PG = reward_B.view(-1, group_size)
    if scale == "none":
        return centred(reward_PG).view(-1)
    std_P1 = std(reward_PG if scale == "group" else reward_B.view(1, -1))
    return (centred(reward_PG) / (std_P1 + 1e-4)).view(-1)


def centred(reward_PG: Tensor) -> Tensor:
    """The first known reward of a group is subtracted before the mean is taken, which would be rounded."""
    first_P1 = (~reward_PG.isnan()).int().argmax(1, keepdim=True)
    reward_PG = reward_PG - reward_PG.gather(1, first_P1)
    return (reward_PG - reward_PG.nanmean(1, keepdim=True)).nan_to_num()


def std(reward_PG: Tensor) -> Tensor:
    """The unbiased standard deviation [P, 1] of what is known."""
    degrees_P1 = ((~reward_PG.isnan()).sum(1, keepdim=True) - 1).clamp(min=1)
    return (centred(reward_PG).square().sum(1, keepdim=True) / degrees_P1).sqrt()


GRPO = Algorithm(clipped, advantages, critic="none", controller="fixed", beta=0.1)
