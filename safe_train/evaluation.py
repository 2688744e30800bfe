"""What a policy is worth on prompts it was not trained on: its reward, and what is left of its language."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from safe_train import parallel
from safe_train.config import SafeConfig
from safe_train.data import PromptDataset
from safe_train.experience import Experience, gathered, joined
from safe_train.metrics import logged_metrics, mean_of, reward_metrics, std_of
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
    more: dict[str, float] = field(default_factory=dict)  # of each reward, pass@k, and what rewards logged

    def numbers(self) -> dict[str, float]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("rollout", "more")} | self.more


def evaluate(
    policy: Policy, sampler: Sampler, prompts: PromptDataset, rewards: Rewards, args: SafeConfig, device: torch.device
) -> Evaluation:
    """Samples `eval_completions` completions, prompts in turn, with fixed random numbers of its own.

    Each process samples and judges equally many prompts; `eval_completions` is rounded up to that. All of them have to
    call it.
    """
    parallel.meet("evaluate()")
    size, of_each = -(-args.completions_per_step // parallel.size()), args.eval_completions_per_prompt
    own_prompts = -(-args.eval_completions // (of_each * parallel.size()))
    own = prompts.in_turn(parallel.rank() * own_prompts, own_prompts)
    chosen = [prompt for prompt in own for _ in range(of_each)]
    with seeded(EVALUATION_SEED):
        with own_random_numbers(EVALUATION_SEED, 0):
            rollouts = [sampler(chosen[i : i + size]) for i in range(0, len(chosen), size)]
        scored = [Experience(policy, None, gathered(rollout), args, device) for rollout in rollouts]
        sampled = joined(rollouts)
        with parallel.together("the rewards of evaluate()"), guest(EVALUATION_SEED, 1):
            own_scores = rewards(*sampled.for_rewards())
    rollout, scores = gathered(sampled), own_scores.gathered()
    reward_B = scores["reward"]
    more = {name: x for name, x in reward_metrics(scores).items() if name.startswith("rewards/")}
    more |= {f"pass@{k}": pass_at(k, reward_B.view(-1, of_each), args.pass_reward) for k in args.eval_pass_at}

    def mean(name: str) -> float:
        return torch.cat([experience.tokens(name) for experience in scored]).mean().item()

    return Evaluation(
        reward=mean_of(reward_B),
        reward_error=standard_error(reward_B.view(-1, of_each)),
        distinct_words=statistics.fmean(map(distinct_words, rollout.texts)),
        reference_logprob=mean("ref_logprob_L"),
        entropy=mean("entropy_L"),
        kl=mean("kl_L"),
        rollout=rollout,
        more=more | logged_metrics(scores, taken=[*more, *(f.name for f in fields(Evaluation))]),
    )


def standard_error(reward_PG: Tensor) -> float:
    """Of the mean over P prompts with G completions each, which are alike; nan is left out."""
    mean_P = reward_PG.nanmean(1)
    known_P = mean_P[~mean_P.isnan()]
    return std_of(known_P) / (len(known_P) - 1) ** 0.5 if len(known_P) > 1 else 0.0


def pass_at(k: int, reward_PG: Tensor, pass_reward: float) -> float:
    """The chance that one of k completions of a prompt passes, the mean over P prompts with G completions each.

    From n completions of which c pass, 1 - C(n - c, k) / C(n, k): unbiased, where 1 - (1 - c / n)^k is not. Completions
    that no reward applies to (nan) do not count, nor do prompts with fewer than k others.
    Source: arXiv 2107.03374.
    """
    found = []
    for rewards in reward_PG.tolist():
        known = [reward for reward in rewards if not math.isnan(reward)]
        n, c = len(known), sum(reward >= pass_reward for reward in known)
        if n >= k:
            found.append(1 - math.comb(n - c, k) / math.comb(n, k))
    return statistics.fmean(found) if found else math.nan


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
    for name in before.more:
        if name.startswith("pass@"):
            lines.append(f"{name:<38}{before.more[name]:>10.3f}{after.more[name]:>10.3f}")
    return "\n".join(lines)
