"""The numbers of a step, under the names that `metrics.jsonl`, the trackers and the report use.

Shape legend: L response tokens, B completions, K value heads.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from safe_train import parallel
from safe_train.algorithms.controller import Control
from safe_train.algorithms.critic import reward_heads
from safe_train.algorithms.losses import k3
from safe_train.rewards.rewards import Scores, distinct
from safe_train.sampling.experience import Experience
from safe_train.sampling.rollout import Rollout


def step_metrics(
    rollout: Rollout,
    rewards: Scores,
    experience: Experience,
    control: Control,
    update: dict[str, float],
    seconds: dict[str, float],
) -> dict[str, Any]:
    lengths = [len(tokens) for tokens in rollout.completions]
    values = {
        **reward_metrics(rewards),
        "kl": experience.tokens("kl_L").mean().item(),
        "entropy": experience.tokens("entropy_L").mean().item(),
        **control._asdict(),
        **update,
        **sampler_metrics(experience.tokens("logprob_L"), experience.tokens("sampler_logprob_L")),
        "prompts/cut_fraction": sum(prompt.is_cut for prompt in rollout.prompts) / len(rollout.prompts),
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/clipped_fraction": 1 - sum(rollout.ended) / len(rollout.ended),
        **costs(seconds, sum(lengths), experience.device),
    }
    if experience.critic is not None:
        values_KL = experience.tokens("values_KL")[: reward_heads(experience.args)]
        returns_L = experience.tokens("returns_L")
        scored_L = experience.tokens("is_scored_L")
        residual = variance_of((returns_L - values_KL.mean(0))[scored_L])
        values["explained_variance"] = 1 - residual / max(variance_of(returns_L[scored_L]), 1e-8)
        values["value_gap"] = (values_KL[0] - values_KL[-1]).abs().mean().item()
    if experience.args.kl_gradient == "return":
        cost_L, left_L = experience.tokens("later_cost_L"), experience.tokens("kl_charge_L")
        values["kl_return"] = cost_L.mean().item()
        values["kl_return_explained"] = 1 - (left_L.square().sum() / cost_L.square().sum()).item()
    return values | logged_metrics(rewards, taken=values)


def reward_metrics(scores: Scores) -> dict[str, float]:
    """Means and standard deviations over the completions that a reward applies to."""
    own = {f"rewards/{name}": x_B for name, x_B in scores.items() if name != "reward"}
    values = {"reward": mean_of(scores["reward"]), "reward_std": std_of(scores["reward"])}
    for name, score_B in own.items():
        values |= {f"{name}/mean": mean_of(score_B), f"{name}/std": std_of(score_B)}
    return values | {"rewards/none_fraction": scores["reward"].isnan().double().mean().item()}


def completion_columns(rollout: Rollout, scores: Scores) -> dict[str, list[Any]]:
    """The texts of completions, and every reward."""
    return {
        "prompt": [prompt.text for prompt in rollout.prompts],
        "completion": rollout.texts,
        "reward": scores["reward"].tolist(),
        **{f"rewards/{name}": score_B.tolist() for name, score_B in scores.items() if name != "reward"},
    }


def as_rows(columns: Mapping[str, list[Any]], **more: Any) -> list[dict[str, Any]]:
    return [{**more, **dict(zip(columns, row, strict=True))} for row in zip(*columns.values(), strict=True)]


def mean_of(x_B: Tensor) -> float:
    return x_B.nanmean().item()


def std_of(x_B: Tensor) -> float:
    return variance_of(x_B[~x_B.isnan()]) ** 0.5


def variance_of(x: Tensor) -> float:
    return x.var(correction=0).item() if len(x) else math.nan


def logged_metrics(scores: Scores, taken: Iterable[str] = ()) -> dict[str, float]:
    """What rewards logged by `log_metric`, averaged over calls and processes."""
    own = (f"logged/{name}" if name.startswith("eval/") else name for name in scores.metrics)  # no evaluation's
    names = distinct(own, taken=("step", "layout", *taken))
    return {name: sum(x) / len(x) for name, x in zip(names, scores.metrics.values(), strict=True)}


def sampler_metrics(logprob_L: Tensor, sampler_logprob_L: Tensor) -> dict[str, float]:
    """How far the trainer's log-probs of the rollout are from those it was sampled with.

    `sampler_gap` and `sampler_gap_max` are the mean and maximum of |difference|; `sampler_kl` estimates
    KL(sampler || trainer) in nats per token.
    """
    if len(logprob_L) == 0:
        return {"sampler_gap": 0.0, "sampler_gap_max": 0.0, "sampler_kl": 0.0}
    gap_L = (logprob_L - sampler_logprob_L).abs()
    return {
        "sampler_gap": gap_L.mean().item(),
        "sampler_gap_max": gap_L.max().item(),
        "sampler_kl": k3(sampler_logprob_L, logprob_L).mean().item(),
    }


def costs(seconds: dict[str, float], tokens: int, device: torch.device) -> dict[str, float]:
    """Time and memory, of the process that needed most."""
    times = {f"time/{name}_s": value for name, value in seconds.items()}
    found = parallel.maxima({**times, "memory/peak_gb": peak_memory_gb(device)})
    return {**found, "tokens_per_second": tokens / found["time/step_s"]}


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far: allocated on the GPU that trains, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
