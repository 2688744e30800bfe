"""From a rollout to what an update needs: micro-batches with statistics, values, advantages and returns.

Shape legend: L response tokens of a micro-batch, K value heads, B completions of the rollout, H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from safe_kernels import ValueTargets, soft_min_gae
from safe_train import parallel
from safe_train.algorithms import losses
from safe_train.algorithms.critic import Critic
from safe_train.config import SafeConfig
from safe_train.data.batches import MicroBatch, TokenBatch, balanced, balanced_rows, microbatches
from safe_train.models import scoring
from safe_train.models.layout import ROWS
from safe_train.models.policy import Policy
from safe_train.sampling.rollout import Rollout


class Experience:
    """A rollout of all processes, cut into minibatches (one optimizer step each) of micro-batches (one forward each).

    All processes have the whole rollout and cut the same minibatches; each scores and trains on its share of every one.
    """

    def __init__(self, policy: Policy, critic: Critic | None, rollout: Rollout, args: SafeConfig, device: torch.device):
        self.args, self.critic, self.device = args, critic, device
        count = self.count = len(rollout.completions)
        size = args.minibatch_size or count
        order = torch.randperm(count).tolist()
        self.minibatches = [
            [
                score(policy, critic, rollout, group, args, device)
                for group in cut(rollout, minibatch, args, policy.layout)
            ]
            for minibatch in (order[i : i + size] for i in range(0, count, size))
        ]

    def __iter__(self) -> Iterator[MicroBatch]:
        return (micro for minibatch in self.minibatches for micro in minibatch)

    def tokens(self, name: str) -> Tensor:
        """A field of all micro-batches of all processes, over all response tokens."""
        return parallel.gather(torch.cat([getattr(micro, name) for micro in self], dim=-1))

    def compute_advantages(self, reward_B: Tensor, kl_charge: float) -> None:
        """Fills in advantages and returns from the completions' rewards and a charge per nat of sampled KL.

        A completion whose reward is nan has advantage 0, is no target of the critic, and is left out of what others
        are compared with.
        """
        if self.critic is None:
            is_normal = self.args.multi_objective_aggregation == "normalize_then_sum"  # within the groups
            size = len(reward_B) if is_normal else self.args.completions_per_prompt
            reward_B = losses.group_advantages(reward_B, size).float().to(self.device)
        for micro in self:
            if not micro.indices:
                continue
            own_B, boundaries = reward_B[micro.indices], micro.batch.response_cu_seqlens
            if self.critic is None:
                micro.advantage_L = losses.per_token(own_B, boundaries)
            else:
                charge_L = kl_charge * (micro.logprob_L - micro.ref_logprob_L)
                rewards_L = losses.token_rewards(own_B.nan_to_num(), boundaries, charge_L)
                micro.advantage_L, micro.returns_L = value_targets(self.critic, micro, rewards_L, self.args)
                micro.is_scored_L = losses.per_token(~own_B.isnan(), boundaries)
        if self.critic is not None:
            scored = self.tokens("advantage_L")[self.tokens("is_scored_L")]
            if len(scored):
                mean, variance = scored.mean(), scored.var(correction=0)
            for micro in self:
                whitened_L = losses.whiten(micro.advantage_L, mean, variance) if len(scored) else micro.advantage_L
                micro.advantage_L = whitened_L.masked_fill(~micro.is_scored_L, 0.0)


def gathered(rollout: Rollout) -> Rollout:
    """The completions of all processes, by rank."""
    rollouts = parallel.gather_objects(rollout)
    return rollouts[0] if len(rollouts) == 1 else joined(rollouts)


def joined(rollouts: Sequence[Rollout]) -> Rollout:
    return Rollout(*(sum((getattr(rollout, f.name) for rollout in rollouts), []) for f in fields(Rollout)))


def cut(rollout: Rollout, indices: list[int], args: SafeConfig, layout: str) -> list[list[int]]:
    """This process's share of a minibatch, in groups that fit one forward pass.

    All processes get equally many groups, some of them empty: with FSDP, each forward takes all of them.
    """
    lengths = [len(rollout.prompts[i].ids) + len(rollout.completions[i]) for i in indices]
    most = args.max_tokens_per_microbatch
    if layout == ROWS:
        by_rank = balanced_rows(lengths, parallel.size(), most)
    elif parallel.size() == 1:
        by_rank = [microbatches(lengths, most)]
    else:
        by_rank = balanced(lengths, parallel.size(), most)
    filled = [[group for group in groups if group] for groups in by_rank]
    groups = filled[parallel.rank()]
    groups += [[]] * (max(map(len, filled)) - len(groups))
    return [[indices[j] for j in group] for group in groups]


@torch.no_grad()
def score(
    policy: Policy, critic: Critic | None, rollout: Rollout, group: list[int], args: SafeConfig, device: torch.device
) -> MicroBatch:
    """Statistics under policy and reference, and values under online and target heads, of some completions.

    For an empty group the models run over one token without a response.
    """
    prompts, completions = [rollout.prompts[i].ids for i in group], [rollout.completions[i] for i in group]
    batch = TokenBatch.pack(prompts or [[0]], completions or [[]]).to(device)
    ref_hidden_LH, hidden_LH = policy.reference(batch), policy(batch)  # whose head stays gathered
    stats = scoring.statistics(hidden_LH, policy.head(), batch.targets_L, ref_hidden_LH)
    states_LH = value_states(hidden_LH, batch, args)
    assert stats.ref_logprob is not None and stats.kl is not None
    absent = stats.logprob.new_zeros(0, len(batch.targets_L))
    sampler = [logprob for i in group for logprob in rollout.sampler_logprobs[i]]
    return MicroBatch(
        batch=batch,
        indices=group,
        sampler_logprob_L=torch.tensor(sampler, device=device),
        ref_hidden_LH=ref_hidden_LH,
        logprob_L=stats.logprob,
        entropy_L=stats.entropy,
        ref_logprob_L=stats.ref_logprob,
        kl_L=stats.kl,
        values_KL=absent if critic is None else critic(states_LH),
        target_values_KL=absent if critic is None else critic.target(states_LH),
        advantage_L=torch.zeros_like(stats.logprob),
        returns_L=torch.zeros_like(stats.logprob),
        is_scored_L=torch.ones_like(stats.logprob, dtype=torch.bool),
    )


def value_states(hidden_LH: Tensor, batch: TokenBatch, args: SafeConfig) -> Tensor:
    """The states that V reads: each token's own prediction, or its sequence's first one, which is the prompt's end."""
    if args.value_level == "token":
        return hidden_LH
    return hidden_LH[losses.per_token(batch.response_cu_seqlens[:-1].long(), batch.response_cu_seqlens)]


def value_targets(critic: Critic, micro: MicroBatch, rewards_L: Tensor, args: SafeConfig) -> tuple[Tensor, Tensor]:
    """Advantages under the online heads and returns under the target heads, by one scan of GAE each.

    Each scan has one value function in both of its places: bootstrapping on lagged targets under an online baseline
    would leave a bias that does not vanish even for a perfect critic.
    """

    def scan(values_KL: Tensor) -> ValueTargets:
        lam = 1 - 1 / args.max_new_tokens if args.gae_lambda is None else args.gae_lambda
        boundaries = micro.batch.response_cu_seqlens
        v1, v2 = critic.pair(values_KL)
        return soft_min_gae(v1, v2, rewards_L, None, gamma=args.gamma, lam=lam, alpha=args.alpha, cu_seqlens=boundaries)

    return scan(micro.values_KL).advantage, scan(micro.target_values_KL).returns
