"""Credit: from the rewards of completions to the advantages and returns of their tokens.

Shape legend: L response tokens of a micro-batch, K value heads, B completions of the rollout or of a micro-batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safe_train.algorithms.registry import ALGORITHMS
from safe_train.algorithms.returns import charge_later_kl, gae

if TYPE_CHECKING:
    from safe_train.algorithms.controller import Control
    from safe_train.algorithms.critic import Critic
    from safe_train.config import SafeConfig
    from safe_train.data.batches import MicroBatch, TokenBatch
    from safe_train.sampling.experience import Experience


def credit(experience: Experience, reward_B: Tensor, control: Control, args: SafeConfig) -> None:
    """Fills in advantages, and returns for a critic, from the completions' rewards, and from the KL as asked for.

    A completion whose reward is nan has no advantage from it, is no target of the critic, and is left out of what
    others are compared with. The KL's part is neither whitened nor divided by a standard deviation of the rewards.
    """
    of_groups = ALGORITHMS[args.algorithm].advantages
    if of_groups is None:
        credit_tokens(experience, reward_B, args)
    else:
        advantage_B = of_groups(reward_B, args).float().to(experience.device)
        for micro in experience:
            if micro.indices:
                micro.advantage_L = per_token(advantage_B[micro.indices], micro.batch.response_cu_seqlens)
    if args.kl_gradient == "return":
        charge_later_kl(experience, control, args)


def credit_tokens(experience: Experience, reward_B: Tensor, args: SafeConfig) -> None:
    """By GAE on the critic; the advantages are whitened over the rollout of all processes."""
    assert experience.critic is not None
    for micro in experience:
        if not micro.indices:
            continue
        own_B, boundaries = reward_B[micro.indices], micro.batch.response_cu_seqlens
        rewards_L = token_rewards(own_B.nan_to_num(), micro.batch)
        micro.advantage_L, micro.returns_L = value_targets(experience.critic, micro, rewards_L, args)
        micro.is_scored_L = per_token(~own_B.isnan(), boundaries)
    scored = experience.tokens("advantage_L")[experience.tokens("is_scored_L")]
    if len(scored):
        mean, variance = scored.mean(), scored.var(correction=0)
    for micro in experience:
        whitened_L = whiten(micro.advantage_L, mean, variance) if len(scored) else micro.advantage_L
        micro.advantage_L = whitened_L.masked_fill(~micro.is_scored_L, 0.0)


def value_targets(critic: Critic, micro: MicroBatch, rewards_L: Tensor, args: SafeConfig) -> tuple[Tensor, Tensor]:
    """Advantages under the online heads and returns under the target heads, by one scan of GAE each.

    Each scan has one value function in both of its places: bootstrapping on lagged targets under an online baseline
    would leave a bias that does not vanish even for a perfect critic.
    """
    online, target = (
        gae(*critic.pair(values_KL), rewards_L, micro, args) for values_KL in (micro.values_KL, micro.target_values_KL)
    )
    return online.advantage, target.returns


def token_rewards(reward_B: Tensor, batch: TokenBatch) -> Tensor:
    """The sequence's reward on its last token, 0 on the others. Empty responses get nothing."""
    lives = batch.response_cu_seqlens.diff() > 0
    last = batch.response_cu_seqlens[1:][lives].long() - 1
    return reward_B.new_zeros(len(batch.targets_L)).index_copy(0, last, reward_B[lives])


def per_token(values_B: Tensor, response_cu_seqlens: Tensor) -> Tensor:
    """A number a sequence, repeated for each of its response tokens."""
    return values_B.repeat_interleave(response_cu_seqlens.diff().long())


def whiten(values: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Zero mean and unit variance; centred only where the standard deviation is below 1e-6."""
    std = variance.sqrt()
    return torch.where(std < 1e-6, values - mean, (values - mean) / std.clamp(min=1e-6))
