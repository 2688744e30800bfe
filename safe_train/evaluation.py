"""What a policy is worth on prompts it was not trained on: its reward, and what is left of its language."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safe_train import parallel
from safe_train.config import SafeConfig
from safe_train.data import PromptDataset
from safe_train.experience import Experience, gathered, joined
from safe_train.models import Policy
from safe_train.randomness import guest, own_random_numbers, seeded
from safe_train.report import strict_json
from safe_train.rewards import Rewards
from safe_train.rollout import Rollout, Sampler

EVALUATION_SEED = 20_250


@dataclass(frozen=True)
class Evaluation:
    reward: float
    reward_error: float  # standard error of the mean
    greedy_reward: float  # of the completions with the likeliest token each time, one a prompt
    distinct_words: float  # distinct words / words, mean over completions
    reference_logprob: float  # mean log-likelihood of a token under the reference, nats
    entropy: float  # nats per token
    kl: float  # exact KL to the reference, nats per token
    rollout: Rollout  # what was sampled
    completions: list[dict[str, Any]]  # rows of evaluation.jsonl, sampled and greedy

    def numbers(self) -> dict[str, float]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("rollout", "completions")}


class Judged(NamedTuple):
    """Completions of all processes, with what they are worth and what they cost."""

    rollout: Rollout
    rewards: dict[str, Tensor]  # [B] of each reward, and their sum
    parts: list[Experience]  # in which the tokens' statistics are

    def mean(self, name: str) -> float:
        return torch.cat([part.tokens(name) for part in self.parts]).mean().item()


class Judge:
    """Samples completions of held-out prompts and judges them, each process equally many."""

    def __init__(self, policy: Policy, sampler: Sampler, rewards: Rewards, args: SafeConfig, device: torch.device):
        self.policy, self.sampler, self.rewards, self.args, self.device = policy, sampler, rewards, args, device

    def __call__(self, prompts: PromptDataset, count: int, *, greedy: bool) -> Judged:
        """Of the first `count` prompts in turn, rounded up to equally many on each process."""
        each, size = (-(-total // parallel.size()) for total in (count, self.args.completions_per_step))
        chosen = prompts.in_turn(parallel.rank() * each, each)
        with own_random_numbers(EVALUATION_SEED, 0):
            rollouts = [self.sampler(chosen[i : i + size], greedy=greedy) for i in range(0, each, size)]
        parts = [Experience(self.policy, None, gathered(part), self.args, self.device) for part in rollouts]
        own = joined(rollouts)
        with parallel.together("the rewards of evaluate()"), guest(EVALUATION_SEED, 1):
            own_rewards = self.rewards(*own.for_rewards())
        scores = parallel.gather(torch.stack(list(own_rewards.values())))
        return Judged(gathered(own), dict(zip(own_rewards, scores, strict=True)), parts)


def evaluate(
    policy: Policy, sampler: Sampler, prompts: PromptDataset, rewards: Rewards, args: SafeConfig, device: torch.device
) -> Evaluation:
    """Samples `eval_completions` completions, prompts in turn, with fixed random numbers of its own.

    Beside them each of these prompts is completed greedily, once. All processes have to call it.
    """
    parallel.meet("evaluate()")
    judge, count = Judge(policy, sampler, rewards, args, device), args.eval_completions
    with seeded(EVALUATION_SEED):
        sampled = judge(prompts, count, greedy=False)
        greedy = judge(prompts, min(count, prompts.known_length or count), greedy=True)
    reward_B = sampled.rewards["reward"]
    return Evaluation(
        reward=reward_B.mean().item(),
        reward_error=(reward_B.std() / len(reward_B) ** 0.5).item() if len(reward_B) > 1 else 0.0,
        greedy_reward=greedy.rewards["reward"].mean().item(),
        distinct_words=statistics.fmean(map(distinct_words, sampled.rollout.texts)),
        reference_logprob=sampled.mean("ref_logprob_L"),
        entropy=sampled.mean("entropy_L"),
        kl=sampled.mean("kl_L"),
        rollout=sampled.rollout,
        completions=[*rows("sampled", sampled), *rows("greedy", greedy)],
    )


def rows(how: str, judged: Judged) -> list[dict[str, Any]]:
    """One a completion: its text, every reward, and its sums over the tokens."""
    rollout = judged.rollout
    sums = {name: by_completion(judged.parts, f"{name}_L") for name in ("logprob", "ref_logprob", "kl")}
    scores = {f"rewards/{name}": x.tolist() for name, x in judged.rewards.items() if name != "reward"}
    found = []
    for i, tokens in enumerate(rollout.completions):
        found.append(
            {
                "how": how,
                "prompt": rollout.prompts[i].text,
                "completion": rollout.texts[i],
                "reward": judged.rewards["reward"][i].item(),
                **{name: values[i] for name, values in scores.items()},
                "kl": sums["kl"][i] / max(1, len(tokens)),
                "logprob": sums["logprob"][i],
                "reference_logprob": sums["ref_logprob"][i],
                "tokens": len(tokens),
                "ended": rollout.ended[i],
            }
        )
    return found


def by_completion(parts: Sequence[Experience], name: str) -> list[float]:
    """Sums over the tokens of each completion, in the order of the gathered rollout: by rank."""
    sums = []
    for part in parts:
        own_B = torch.zeros(part.count, dtype=torch.float64)
        for micro in part:
            lengths = micro.batch.response_cu_seqlens.diff().tolist()
            values = [x.double().sum().cpu() for x in getattr(micro, name).split(lengths)]
            for i, value in zip(
                micro.indices, values, strict=False
            ):  # an empty micro-batch has one sequence, of no one
                own_B[i] = value
        sums.append(parallel.total(own_B).view(parallel.size(), -1))
    return torch.cat(sums, dim=1).flatten().tolist()


def distinct_words(text: str) -> float:
    words = text.lower().split()
    return len(set(words)) / len(words) if words else 1.0


def comparison(evaluations: Mapping[str, Evaluation]) -> str:
    """A table for the terminal, with a column for each evaluation."""
    titles = {
        "reward": "reward",
        "reward_error": "standard error of the reward",
        "greedy_reward": "reward of greedy completions",
        "distinct_words": "distinct words",
        "reference_logprob": "log-likelihood under the reference",
        "entropy": "entropy, nats per token",
        "kl": "KL to the reference, nats per token",
    }
    count = len(next(iter(evaluations.values())).rollout.texts)
    lines = [f"{f'on {count} held-out completions':<38}" + "".join(f"{name:>10}" for name in evaluations)]
    for name, title in titles.items():
        lines.append(f"{title:<38}" + "".join(f"{getattr(each, name):>10.3f}" for each in evaluations.values()))
    return "\n".join(lines)


@parallel.main_only
def save(folder: Path, evaluations: Mapping[str, Evaluation], step: int) -> None:
    """The numbers of evaluations before a run and at a step of it, and all their completions."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {"step": step, **{name: each.numbers() for name, each in evaluations.items()}}
    (folder / "evaluation.json").write_text(strict_json(numbers, indent=2) + "\n")
    lines = [
        strict_json({"step": 0 if name == "before" else step, **row})
        for name, each in evaluations.items()
        for row in each.completions
    ]
    (folder / "evaluation.jsonl").write_text("\n".join(lines) + "\n")
