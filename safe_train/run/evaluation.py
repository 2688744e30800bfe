"""What a policy is worth on prompts it was not trained on: its reward, and what is left of its language."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safe_train import parallel
from safe_train.config import SafeConfig
from safe_train.data.prompts import Prompt, PromptDataset
from safe_train.models.policy import Policy
from safe_train.randomness import guest, own_random_numbers, seeded
from safe_train.rewards.rewards import Rewards, Scores
from safe_train.run.metrics import as_rows, completion_columns, logged_metrics, mean_of, reward_metrics
from safe_train.run.report import strict_json
from safe_train.sampling.experience import Experience, gathered
from safe_train.sampling.rollout import Rollout, Sampler, joined

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
    more: dict[str, float]  # of each reward, pass@k, and what rewards logged
    scale: float | None = None  # of a policy on the line from its reference, 0, to what was trained, 1

    def numbers(self) -> dict[str, float]:
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("rollout", "completions", "more")}
        return {name: value for name, value in own.items() if value is not None} | self.more

    def rows(self, step: int) -> list[dict[str, Any]]:
        """Of evaluation.jsonl, with the place on the line and the KL there, if it is known."""
        place = {} if self.scale is None else {"scale": self.scale, "policy_kl": self.kl}
        return [{"step": step, **place, **row} for row in self.completions]


class Judged(NamedTuple):
    """Completions of all processes, with what they are worth and what they cost."""

    rollout: Rollout
    scores: Scores
    parts: list[Experience]  # in which the tokens' statistics are

    def mean(self, name: str) -> float:
        return mean_over_tokens(self.parts, name)


class Judge:
    """Samples completions of held-out prompts and judges them, each process equally many."""

    def __init__(self, policy: Policy, sampler: Sampler, rewards: Rewards, args: SafeConfig, device: torch.device):
        self.policy, self.sampler, self.rewards, self.args, self.device = policy, sampler, rewards, args, device

    def __call__(self, prompts: PromptDataset, count: int, *, of_each: int = 1, greedy: bool) -> Judged:
        """`of_each` completions of the first prompts in turn, `count` or more in all, as many on each process."""
        sampled, parts = self.sample(prompts, count, of_each=of_each, greedy=greedy)
        with parallel.together("the rewards of evaluate()"), guest(EVALUATION_SEED, 1):
            own_scores = self.rewards(*sampled.for_rewards())
        return Judged(gathered(sampled), own_scores.gathered(), parts)

    def sample(
        self, prompts: PromptDataset, count: int, *, of_each: int, greedy: bool
    ) -> tuple[Rollout, list[Experience]]:
        """The completions of this process, and the statistics of those of all processes."""
        own, size = (-(-total // parallel.size()) for total in (-(-count // of_each), self.args.completions_per_step))
        chosen = [prompt for prompt in prompts.in_turn(parallel.rank() * own, own) for _ in range(of_each)]
        with own_random_numbers(EVALUATION_SEED, 0):
            rollouts = [self.sampler(chosen[i : i + size], greedy=greedy) for i in range(0, len(chosen), size)]
        how: Any = {"args": self.args, "device": self.device, "is_update": False}
        parts = [Experience(self.policy, None, gathered(part), **how) for part in rollouts]
        return joined(rollouts), parts

    def kl(self, prompts: PromptDataset) -> float:
        """What `evaluate` finds for the KL, of the same completions, with the same bits on every process."""
        with seeded(EVALUATION_SEED):
            of_each = self.args.eval_completions_per_prompt
            _, parts = self.sample(prompts, self.args.eval_completions, of_each=of_each, greedy=False)
        return parallel.from_main(mean_over_tokens(parts, "kl_L"))


def mean_over_tokens(parts: Sequence[Experience], name: str) -> float:
    return torch.cat([part.tokens(name) for part in parts]).mean().item()


def evaluate(
    policy: Policy, sampler: Sampler, prompts: PromptDataset, rewards: Rewards, args: SafeConfig, device: torch.device
) -> Evaluation:
    """Samples `eval_completions` completions, prompts in turn, with fixed random numbers of its own.

    Beside them each of these prompts is completed greedily, once. All processes have to call it.
    """
    parallel.meet("evaluate()")
    judge, of_each = Judge(policy, sampler, rewards, args, device), args.eval_completions_per_prompt
    with seeded(EVALUATION_SEED):
        sampled = judge(prompts, args.eval_completions, of_each=of_each, greedy=False)
        count = -(-args.eval_completions // of_each)
        greedy = judge(prompts, min(count, prompts.known_length or count), greedy=True)
    reward_B = sampled.scores["reward"]
    more = {name: x for name, x in reward_metrics(sampled.scores).items() if name.startswith("rewards/")}
    more |= {f"pass@{k}": pass_at(k, reward_B.view(-1, of_each), args.pass_reward) for k in args.eval_pass_at}
    return Evaluation(
        reward=mean_of(reward_B),
        reward_error=standard_error(reward_B, sampled.rollout.prompts),
        greedy_reward=mean_of(greedy.scores["reward"]),
        distinct_words=statistics.fmean(map(distinct_words, sampled.rollout.texts)),
        reference_logprob=sampled.mean("ref_logprob_L"),
        entropy=sampled.mean("entropy_L"),
        kl=sampled.mean("kl_L"),
        rollout=sampled.rollout,
        completions=[*rows("sampled", sampled), *rows("greedy", greedy)],
        more=more | logged_metrics(sampled.scores, taken=[*more, *(f.name for f in fields(Evaluation))]),
    )


def rows(how: str, judged: Judged) -> list[dict[str, Any]]:
    """One a completion: its text, every reward, its sums over the tokens, and what rewards logged of it."""
    rollout = judged.rollout
    sums = {name: by_completion(judged.parts, f"{name}_L") for name in ("logprob", "ref_logprob", "kl")}
    lengths = [len(tokens) for tokens in rollout.completions]
    columns = {
        **completion_columns(rollout, judged.scores),
        "kl": [kl / max(1, length) for kl, length in zip(sums["kl"], lengths, strict=True)],
        "logprob": sums["logprob"],
        "reference_logprob": sums["ref_logprob"],
        "tokens": lengths,
        "ended": rollout.ended,
    }
    return as_rows(columns | judged.scores.columns(taken=("step", "scale", "policy_kl", "how", *columns)), how=how)


def by_completion(parts: Sequence[Experience], name: str) -> list[float]:
    """Sums over the tokens of each completion, in the order of the gathered rollout: by rank."""
    sums = []
    for part in parts:
        own_B = torch.zeros(part.count, dtype=torch.float64)
        for micro in part:
            lengths = micro.batch.response_cu_seqlens.diff().tolist()
            values = [x.double().sum().cpu() for x in getattr(micro, name).split(lengths)]
            for i, value in zip(micro.indices, values, strict=False):  # an empty one has a sequence of no one
                own_B[i] = value
        sums.append(parallel.total(own_B).view(parallel.size(), -1))
    return torch.cat(sums, dim=1).flatten().tolist()


def standard_error(reward_B: Tensor, prompts: Sequence[Prompt]) -> float:
    """Of the mean, when the completions of a prompt may be alike, however often it comes; nan is left out.

    With equally many completions of P prompts it is the standard deviation of their P means over sqrt(P).
    """
    numbers: dict[tuple[int, ...], int] = {}
    prompt_B = torch.tensor([numbers.setdefault(tuple(prompt.ids), len(numbers)) for prompt in prompts])
    known_B = ~reward_B.isnan()
    count = len(prompt_B[known_B].unique())
    if count < 2:
        return math.nan
    deviation_B = (reward_B - reward_B.nanmean()).nan_to_num()
    deviation_P = torch.zeros(len(numbers), dtype=reward_B.dtype).index_add(0, prompt_B, deviation_B)
    return (deviation_P.square().sum() * count / (count - 1)).sqrt().item() / known_B.sum().item()


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
    if any(each.scale is not None for each in evaluations.values()):
        scales = ("" if each.scale is None else f"{each.scale:.3f}" for each in evaluations.values())
        lines.append(f"{'scale: 0 the reference, 1 as trained':<38}" + "".join(f"{scale:>10}" for scale in scales))
    for name in next(iter(evaluations.values())).more:
        if name.startswith("pass@"):
            lines.append(f"{name:<38}" + "".join(f"{each.more[name]:>10.3f}" for each in evaluations.values()))
    return "\n".join(lines)


@parallel.main_only
def save(folder: Path, evaluations: Mapping[str, Evaluation], step: int, overrides: Sequence[str] = ()) -> None:
    """The numbers of evaluations before a run and at a step of it, and all their completions.

    Args:
        overrides: settings that were not the run's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {"step": step, **{name: each.numbers() for name, each in evaluations.items()}}
    numbers |= {"overrides": list(overrides)} if overrides else {}
    (folder / "evaluation.json").write_text(strict_json(numbers, indent=2) + "\n")
    rows = [row for name, each in evaluations.items() for row in each.rows(0 if name in ("before", "base") else step)]
    (folder / "evaluation.jsonl").write_text("\n".join(map(strict_json, rows)) + "\n")
