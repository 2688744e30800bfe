"""What a policy is worth on prompts it was not trained on: its reward, and what is left of its language."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from safe_train import parallel
from safe_train.config import SafeConfig
from safe_train.data import PromptDataset
from safe_train.experience import Experience, gathered, joined
from safe_train.models import Policy
from safe_train.randomness import guest, own_random_numbers, seeded
from safe_train.rewards import Rewards
from safe_train.rollout import Rollout, Sampler

EVALUATION_SEED = 20_250


@dataclass(frozen=True)
class Evaluation:
    reward: float
    reward_error: float  # standard error of the mean
    distinct_words: float  # distinct words / words, mean over completions
    reference_logprob: float  # mean log-likelihood of a token under the reference, nats
    entropy: float  # nats per token
    kl: float  # exact KL to the reference, nats per token
    rollout: Rollout

    def numbers(self) -> dict[str, float]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rollout"}


def evaluate(
    policy: Policy, sampler: Sampler, prompts: PromptDataset, rewards: Rewards, args: SafeConfig, device: torch.device
) -> Evaluation:
    """Samples `eval_completions` completions, prompts in turn, with fixed random numbers of its own.

    Each process samples and judges equally many; `eval_completions` is rounded up to that. All of them have to call it.
    """
    parallel.meet("evaluate()")
    each, size = (-(-total // parallel.size()) for total in (args.eval_completions, args.completions_per_step))
    first = parallel.rank() * each
    chosen = prompts.in_turn(first, each)
    with seeded(EVALUATION_SEED):
        with own_random_numbers(EVALUATION_SEED, 0):
            rollouts = [sampler(chosen[i : i + size]) for i in range(0, each, size)]
        scored = [Experience(policy, None, gathered(rollout), args, device) for rollout in rollouts]
        own = joined(rollouts)
        with parallel.together("the rewards of evaluate()"), guest(EVALUATION_SEED, 1):
            own_reward_B = rewards(*own.for_rewards())["reward"]
    rollout, reward_B = gathered(own), parallel.gather(own_reward_B)

    def mean(name: str) -> float:
        return torch.cat([experience.tokens(name) for experience in scored]).mean().item()

    return Evaluation(
        reward=reward_B.mean().item(),
        reward_error=(reward_B.std() / len(reward_B) ** 0.5).item() if len(reward_B) > 1 else 0.0,
        distinct_words=statistics.fmean(map(distinct_words, rollout.texts)),
        reference_logprob=mean("ref_logprob_L"),
        entropy=mean("entropy_L"),
        kl=mean("kl_L"),
        rollout=rollout,
    )


def distinct_words(text: str) -> float:
    words = text.lower().split()
    return len(set(words)) / len(words) if words else 1.0


def comparison(before: Evaluation, after: Evaluation) -> str:
    """A before/after table for the terminal."""
    rows: Sequence[tuple[str, str]] = (
        ("reward", "reward"),
        ("distinct words", "distinct_words"),
        ("log-likelihood under the reference", "reference_logprob"),
        ("entropy, nats per token", "entropy"),
        ("KL to the reference, nats per token", "kl"),
    )
    lines = [f"{'on ' + str(len(before.rollout.texts)) + ' held-out completions':<38}{'before':>10}{'after':>10}"]
    for title, name in rows:
        lines.append(f"{title:<38}{getattr(before, name):>10.3f}{getattr(after, name):>10.3f}")
    lines.append(f"{'standard error of the reward':<38}{before.reward_error:>10.3f}{after.reward_error:>10.3f}")
    return "\n".join(lines)
