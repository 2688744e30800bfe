"""Credit: from the rewards of completions to the advantages and returns of their tokens.

Shape legend: L response tokens of a micro-batch, K value heads, B completions of the rollout or of a micro-batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safe_train.algorithms.grpo import std
from safe_train.algorithms.registry import ALGORITHMS
from safe_train.algorithms.returns import charge_later_kl, gae, mean_of_others

if TYPE_CHECKING:
    from safe_train.algorithms.controller import Control
    from safe_train.algorithms.critic import Critic
    from safe_train.config import SafeConfig
    from safe_train.data.batches import MicroBatch
    from safe_train.sampling.experience import Experience


def credit(experience: Experience, reward_B: Tensor, control: Control, args: SafeConfig) -> None:
    """Fills in advantages, and returns for a critic, from the completions' rewards, and from the KL as asked for.

    A completion whose reward is nan has no advantage from it, is no target of the critic, and is left out of what
    others are compared with. The KL's part is neither whitened nor divided by a standard deviation of the rewards.

    `reward_B`, as `experience.prefix_BK`, is in float64 on the CPU, where differences are still to be taken. In the
    control run both are permuted across the completions.
    """
    reward_B = permuted(experience, reward_B) if args.shuffle_advantages else reward_B
    of_groups = ALGORITHMS[args.algorithm].advantages
    if of_groups is None:
        credit_tokens(experience, reward_B, args)
    elif experience.prefix_BK is not None:
        credit_what_follows(experience, reward_B, args)
    else:
        advantage_B = of_groups(reward_B, args).float().to(experience.device)
        for micro in experience:
            if micro.indices:
                micro.advantage_L = per_token(advantage_B[micro.indices], micro.batch.response_cu_seqlens)
    if args.kl_gradient == "return":
        charge_later_kl(experience, control, args)


def permuted(experience: Experience, reward_B: Tensor) -> Tensor:
    """The rewards of other completions for each, and with them those of their prefixes."""
    order_B = torch.randperm(len(reward_B))
    if experience.prefix_BK is not None:
        experience.prefix_BK = experience.prefix_BK[order_B]
    return reward_B[order_B]


def credit_tokens(experience: Experience, reward_B: Tensor, args: SafeConfig) -> None:
    """By GAE on the critic; the advantages are whitened over the rollout of all processes."""
    assert experience.critic is not None
    for micro in experience:
        if not micro.indices:
            continue
        rewards_L = earned(experience, micro, reward_B, args)
        micro.advantage_L, micro.returns_L = value_targets(experience.critic, micro, rewards_L, args)
        micro.is_scored_L = is_scored(micro, reward_B)
    scored = experience.tokens("advantage_L")[experience.tokens("is_scored_L")]
    if len(scored):
        mean, variance = scored.mean(), scored.var(correction=0)
    for micro in experience:
        whitened_L = whiten(micro.advantage_L, mean, variance) if len(scored) else micro.advantage_L
        micro.advantage_L = whitened_L.masked_fill(~micro.is_scored_L, 0.0)


def credit_what_follows(experience: Experience, reward_B: Tensor, args: SafeConfig) -> None:
    """By the prefixes' rewards: what a token and those behind it add, less what was added there in other completions.

    What is added n tokens later counts lambda^n, as in GAE. Both the others and the spread that `scale_rewards` divides
    by are those of the group, or of the whole rollout: a group in which all is equal gets 0. Behind its end another
    completion counts as at its last token.
    """
    micros = [micro for micro in experience if micro.indices]
    for micro in micros:
        added_L = earned(experience, micro, reward_B, args)
        none_L = torch.zeros_like(added_L)
        follows_L = gae(none_L, none_L, added_L, micro, args).advantage
        micro.advantage_L = follows_L.masked_fill(~is_scored(micro, reward_B), torch.nan)
    advantage_BT = experience.table("advantage_L")
    if advantage_BT.shape[1] == 0:
        return
    size = args.completions_per_prompt if args.scale_rewards == "group" else len(advantage_BT)
    parts = [part_GT - mean_of_others(carried(part_GT)) for part_GT in advantage_BT.split(size)]
    if args.scale_rewards != "none":
        parts = [part_GT / (std(part_GT.view(1, -1)) + 1e-4) for part_GT in parts]
    advantage_BT = torch.cat(parts)
    for micro in micros:
        micro.advantage_L = advantage_BT[tuple(micro.place_L)].nan_to_num().float()


def earned(experience: Experience, micro: MicroBatch, reward_B: Tensor, args: SafeConfig) -> Tensor:
    """The reward of each token."""
    own_B, prefix_BK = reward_B[micro.indices].nan_to_num(), experience.prefix_BK
    own_BK = None if prefix_BK is None else prefix_BK[micro.indices]
    rewards_L = token_rewards(own_B, micro.batch.response_cu_seqlens.cpu(), own_BK, args.prefix_rewards)
    return rewards_L.float().to(experience.device)


def is_scored(micro: MicroBatch, reward_B: Tensor) -> Tensor:
    """bool [L]: whether a reward applies to the token's completion."""
    is_known_B = ~reward_B[micro.indices].isnan().to(micro.advantage_L.device)
    return per_token(is_known_B, micro.batch.response_cu_seqlens)


def value_targets(critic: Critic, micro: MicroBatch, rewards_L: Tensor, args: SafeConfig) -> tuple[Tensor, Tensor]:
    """Advantages under the online heads and returns under the target heads, by one scan of GAE each.

    Each scan has one value function in both of its places: bootstrapping on lagged targets under an online baseline
    would leave a bias that does not vanish even for a perfect critic.
    """
    online, target = (
        gae(*critic.pair(values_KL), rewards_L, micro, args) for values_KL in (micro.values_KL, micro.target_values_KL)
    )
    return online.advantage, target.returns


def token_rewards(
    reward_B: Tensor, response_cu_seqlens: Tensor, prefix_BK: Tensor | None = None, every: int = 0
) -> Tensor:
    """The sequence's reward on its last token, 0 on the others. Empty responses get nothing.

    Given the rewards of its first 0, `every`, 2 `every`, ... tokens, the last token of each such part gets what the
    part adds: they sum to the reward less that of no token. A prefix whose reward is nan stands where the one before it
    does, and the first at 0.
    Source: potential-based shaping (Ng, Harada and Russell 1999), the potential being the reward of the text so far.
    """
    starts_B1, lengths_B1 = response_cu_seqlens[:-1, None].long(), response_cu_seqlens.diff()[:, None].long()
    if prefix_BK is None:
        prefix_BK, every = torch.zeros_like(reward_B)[:, None], max(1, int(response_cu_seqlens[-1]))
    part_BK = torch.arange(prefix_BK.shape[1]).expand_as(prefix_BK)
    before_BK = carried(prefix_BK).nan_to_num()
    after_BK = torch.cat([before_BK[:, 1:], reward_B[:, None]], dim=1)
    is_last_BK = (part_BK + 1) * every >= lengths_B1
    after_BK = torch.where(is_last_BK, reward_B[:, None], after_BK)
    end_BK = starts_B1 + ((part_BK + 1) * every).minimum(lengths_B1) - 1
    is_part_BK = part_BK * every < lengths_B1
    total = reward_B.new_zeros(int(response_cu_seqlens[-1]))
    return total.index_copy(0, end_BK[is_part_BK], (after_BK - before_BK)[is_part_BK])


def carried(x_BT: Tensor) -> Tensor:
    """What stands before it in its row, in the place of a nan."""
    place_BT = torch.arange(x_BT.shape[1], device=x_BT.device).expand_as(x_BT)
    return x_BT.gather(1, place_BT.masked_fill(x_BT.isnan(), 0).cummax(1).values)


def per_token(values_B: Tensor, response_cu_seqlens: Tensor) -> Tensor:
    """A number a sequence, repeated for each of its response tokens."""
    return values_B.repeat_interleave(response_cu_seqlens.diff().long())


def whiten(values: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Zero mean and unit variance; centred only where the standard deviation is below 1e-6."""
    std = variance.sqrt()
    return torch.where(std < 1e-6, values - mean, (values - mean) / std.clamp(min=1e-6))
