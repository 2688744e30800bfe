"""From a rollout to what credit and update need: micro-batches with log-probs, entropy, KL and values.

Shape legend: L response tokens of a micro-batch, K value heads, H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from safe_train import parallel
from safe_train.algorithms.critic import Critic, value_states
from safe_train.algorithms.trust_region import kind_of
from safe_train.config import ConfigError, SafeConfig
from safe_train.data.batches import MicroBatch, TokenBatch, balanced, balanced_rows, microbatches
from safe_train.models import scoring
from safe_train.models.adapters import is_cut_up
from safe_train.models.layout import ROWS
from safe_train.models.policy import Policy
from safe_train.models.teacher import Teaches
from safe_train.sampling.rollout import Rollout, joined


class Experience:
    """A rollout of all processes, cut into minibatches (one optimizer step each) of micro-batches (one forward each).

    All processes have the whole rollout and cut the same minibatches; each scores and trains on its share of every one.
    """

    def __init__(
        self,
        policy: Policy,
        critic: Critic | None,
        rollout: Rollout,
        args: SafeConfig,
        device: torch.device,
        teacher: Teaches | None = None,
        is_update: bool = True,
    ):
        self.args, self.critic, self.device = args, critic, device
        self.prefix_BK: Tensor | None = None  # with `prefix_rewards`, in the units of the rewards that are trained on
        count = self.count = len(rollout.completions)
        size = args.minibatch_size or count
        order, kept_head = torch.randperm(count).tolist(), trained_head(policy, args) if is_update else None
        self.minibatches = [
            [
                score(policy, critic, rollout, group, args, device, teacher, kept_head)
                for group in cut(rollout, minibatch, args, policy.layout)
            ]
            for minibatch in (order[i : i + size] for i in range(0, count, size))
        ]

    def __iter__(self) -> Iterator[MicroBatch]:
        return (micro for minibatch in self.minibatches for micro in minibatch)

    def tokens(self, name: str) -> Tensor:
        """A field of all micro-batches of all processes, over all response tokens."""
        return parallel.gather(torch.cat([getattr(micro, name) for micro in self], dim=-1))

    def table(self, name: str) -> Tensor:
        """A field of all response tokens of all processes [B, T] in float64, nan behind the end of a completion."""
        completion_L, position_L = self.tokens("place_L")
        longest = int(position_L.max()) + 1 if len(position_L) else 0
        found = torch.full((self.count, longest), torch.nan, dtype=torch.float64, device=position_L.device)
        found[completion_L, position_L] = self.tokens(name).double()
        return found


def trained_head(policy: Policy, args: SafeConfig) -> dict[str, Any] | None:
    """What a trust region has to keep of the head that samples: copies of what is trained. None without a bound."""
    if kind_of(args) is None:
        return None
    return {f"teacher_{name}": x.detach().clone() for name, x in trained_of(policy).items()}


def trained_of(policy: Policy) -> dict[str, Tensor]:
    """The tensors of the head that are trained."""
    head = {name: x for name, x in policy.head().items() if isinstance(x, Tensor) and not name.startswith("ref_")}
    return {name: x for name, x in head.items() if x.requires_grad}


def check_trust_region(policy: Policy, args: SafeConfig) -> None:
    if kind_of(args) is not None and is_cut_up(policy.causal_lm) and trained_of(policy):
        raise ConfigError(
            "a trust region remembers the head that sampled, and a trained head is in parts here: train LoRA without "
            "the head, or keep whole weights on each process (DDP)"
        )


def gathered(rollout: Rollout) -> Rollout:
    """The completions of all processes, by rank."""
    rollouts = parallel.gather_objects(rollout)
    return rollouts[0] if len(rollouts) == 1 else joined(rollouts)


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
    policy: Policy,
    critic: Critic | None,
    rollout: Rollout,
    group: list[int],
    args: SafeConfig,
    device: torch.device,
    teacher: Teaches | None = None,
    kept_head: dict[str, Any] | None = None,
) -> MicroBatch:
    """Statistics under policy and reference, and values under online and target heads, of some completions.

    For an empty group the models run over one token without a response.
    """
    prompts, completions = [rollout.prompts[i].ids for i in group], [rollout.completions[i] for i in group]
    kept = [rollout.kept[i] for i in group] if rollout.kept else None
    batch = TokenBatch.pack(prompts or [[0]], completions or [[]], kept).to(device)
    ref_hidden_LH, hidden_LH = policy.reference(batch), policy(batch)  # whose head stays gathered
    stats = scoring.statistics(hidden_LH, policy.head(), batch, ref_hidden_LH)
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
        later_cost_L=torch.zeros_like(stats.logprob),
        unusual_cost_L=torch.zeros_like(stats.logprob),
        kl_charge_L=torch.zeros_like(stats.logprob),
        teacher={} if teacher is None else teacher.teach(batch),
        sampled_from={} if kept_head is None else {"teacher_hidden": hidden_LH, **kept_head},
    )
