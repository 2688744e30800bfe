"""The completions of a prompt are a group: rewards within it, and groups that are drawn again.

Shape legend: B completions of a rollout, P prompts; the G completions of a prompt are consecutive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from safe_train import parallel
from safe_train.algorithms.grpo import centred, group_advantages
from safe_train.config import SafeConfig
from safe_train.rewards.rewards import Scores, weighted
from safe_train.sampling.rollout import Rollout, joined


def without_spread(reward_B: Tensor, group_size: int) -> Tensor:
    """bool [P]: whether all completions of a prompt have one reward, those that no reward applies to left out.

    Such a group teaches nothing: dynamic sampling (DAPO, arXiv 2503.14476) draws it again, from other prompts.
    """
    return centred(reward_B.view(-1, group_size)).eq(0).all(1)


def refilled(
    rollout: Rollout, scores: Scores, more: Rollout, more_scores: Scores, group_size: int
) -> tuple[Rollout, Scores]:
    """The rollout with groups of `more` that have a spread in the places of those that have none."""
    flat_P = without_spread(scores["reward"], group_size)
    fresh_P = ~without_spread(more_scores["reward"], group_size)
    order_P = torch.arange(len(flat_P))
    places, found = order_P[flat_P], len(flat_P) + fresh_P.nonzero().flatten()
    count = min(len(places), len(found))
    order_P[places[:count]] = found[:count]
    order_B = (order_P[:, None] * group_size + torch.arange(group_size)).flatten().tolist()
    return joined([rollout, more]).take(order_B), scores.joined(more_scores).take(order_B)


def warn_if_unscored(scores: Scores, step: int, args: SafeConfig) -> None:
    if scores["reward"].isnan().all() and args.algorithm != "distill":
        parallel.say(f"step {step + 1}: every reward is None, so this step learns from KL and entropy alone")


def learned_from(scores: Scores, args: SafeConfig) -> Tensor:
    """What advantages [B] are made of, from the scores of a whole rollout.

    It is "reward", or for `normalize_then_sum` the weighted sum of scores that are standardised within the completions
    of a prompt, each reward by itself.
    Source of the latter: GDPO (arXiv 2601.05242).
    """
    if args.multi_objective_aggregation != "normalize_then_sum":
        return scores["reward"]
    normal = {name: group_advantages(scores[name], args.completions_per_prompt) for name in scores.weights}
    return weighted(normal, scores.weights).sum(0).masked_fill(scores["reward"].isnan(), torch.nan)
