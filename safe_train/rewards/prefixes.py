"""Rewards of what a completion begins with: they say which of its tokens earned the reward of the whole.

Shape legend: B completions, K prefixes of one at most, of 0, k, 2 k, ... tokens, all shorter than the completion.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from safe_train.config import SafeConfig
from safe_train.rewards.rewards import Rewards, Scores
from safe_train.sampling.rollout import Rollout


def scored(rollout: Rollout, rewards: Rewards, tokenizer: Any, args: SafeConfig) -> Scores:
    """The scores of the completions, and with `prefix_rewards` those of their prefixes, by one call more.

    What the rewards log of prefixes is dropped. A score that is None is nan.
    """
    scores, every = rewards(*rollout.for_rewards()), args.prefix_rewards
    if every == 0:
        return scores
    places = [(i, n) for i, tokens in enumerate(rollout.completions) for n in range(0, len(tokens), every)]
    found = rewards(*prefixes(rollout, places, tokenizer, args).for_rewards())
    prefix_BK = torch.full((len(rollout.completions), math.ceil(args.max_new_tokens / every)), torch.nan).double()
    for (i, n), value in zip(places, found["reward"].tolist(), strict=True):
        prefix_BK[i, n // every] = value
    seconds = {name: own + found.seconds[name] for name, own in scores.seconds.items()}
    return replace(scores, prefix_BK=prefix_BK, seconds=seconds)


def prefixes(rollout: Rollout, places: list[tuple[int, int]], tokenizer: Any, args: SafeConfig) -> Rollout:
    """The first n tokens of completion i for each of the places (i, n), as completions that have not ended."""
    tokens = [rollout.completions[i][:n] for i, n in places]
    return Rollout(
        prompts=[rollout.prompts[i] for i, _ in places],
        completions=tokens,
        texts=tokenizer.batch_decode(tokens, skip_special_tokens=args.reward_skip_special_tokens),
        ended=[False] * len(places),
        sampler_logprobs=[[] for _ in places],  # which no reward sees
    )
