"""The numbers of a step, under the names that `metrics.jsonl`, the trackers and the report use."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch
from torch import Tensor

from safe_train.controller import Control
from safe_train.experience import Experience
from safe_train.rollout import Rollout


def step_metrics(
    rollout: Rollout,
    rewards: dict[str, Tensor],
    experience: Experience,
    control: Control,
    update: dict[str, float],
    seconds: dict[str, float],
) -> dict[str, Any]:
    lengths = [len(tokens) for tokens in rollout.completions]
    reward_B = rewards["reward"]
    values = {
        "reward": reward_B.mean().item(),
        "reward_std": reward_B.std(correction=0).item(),
        **{f"rewards/{name}/mean": scores.mean().item() for name, scores in rewards.items() if name != "reward"},
        "kl": experience.tokens("kl_L").mean().item(),
        "entropy": experience.tokens("entropy_L").mean().item(),
        **control._asdict(),
        **update,
        "sampler_gap": sampler_gap(rollout, experience),
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/clipped_fraction": 1 - sum(rollout.ended) / len(rollout.ended),
        **{f"time/{name}_s": value for name, value in seconds.items()},
        "tokens_per_second": sum(lengths) / seconds["step"],
        "memory/peak_gb": peak_memory_gb(experience.device),
    }
    if experience.critic is not None:
        values_KL, returns_L = experience.tokens("values_KL"), experience.tokens("returns_L")
        residual = (returns_L - values_KL.mean(0)).var(correction=0)
        values["explained_variance"] = (1 - residual / returns_L.var(correction=0).clamp(min=1e-8)).item()
        values["value_gap"] = (values_KL[0] - values_KL[-1]).abs().mean().item()
    return values


def sampler_gap(rollout: Rollout, experience: Experience) -> float:
    """Mean |log-prob of the sampler - log-prob of the trainer| over the response tokens."""
    sampler = torch.tensor([lp for micro in experience for i in micro.indices for lp in rollout.sampler_logprobs[i]])
    return (experience.tokens("logprob_L").cpu() - sampler).abs().mean().item()


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far: allocated on the GPU that trains, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
