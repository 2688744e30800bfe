"""What one natural-gradient step of a constant buys: a vector added to the last hidden state, in all places the same.

    python bench/study/shift.py [--completions K] [--kl X,X] [setting=value ...]

Samples of the reference give the gradient g of the reward in the vector, with the trainer's own advantages. The metric
of the KL is exact here, since the logits are linear in the hidden state: KL ~ 1/2 d' F d nats a token, where

    F = mean over states of W' (diag p - p p') W

is H x H for a head W. The natural gradient d = (F + damping)^-1 g buys the most reward for this KL to first order.

The first table compares it with g itself: reward per sqrt(nat) of a completion, by the gradient of the whole reward of
the half of the samples that did not give the direction, and by that of its own half. The second has the reference moved
to a KL of one's choice along d, on held-out prompts: real samples, not a first order.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a checkout that is not installed

from bench.study.arms import BASE, FRESH
from bench.study.directions import beside_others, sampled
from safe_train import SafeTrainer
from safe_train.algorithms.advantages import per_token
from safe_train.config import SafeConfig, parse

DAMPING = 0.01  # of F's mean diagonal
ROWS = 1024  # states whose probabilities are there at once
PROMPTS = 32
OWN = {
    "prompts_per_step": PROMPTS, "algorithm": "grpo", "reward": ["vader"], "scale_rewards": "none", "prefix_rewards": 1,
    "gae_lambda": 0.5, "eval_completions": 512, "eval_completions_per_prompt": 64, "max_tokens_per_microbatch": 4096,
    "use_cpu": True,
}  # fmt: skip


class Half(NamedTuple):
    """Of one half of the samples, each a completion: what the trainer would follow, the reward's own, the KL's."""

    credit_H: Tensor
    reward_H: Tensor
    metric_HH: Tensor
    length: float  # tokens a completion


class Shift:
    """Adds a vector to what the last norm returns, but for the reference: where the adapters are switched off."""

    def __init__(self, trainer: SafeTrainer):
        layers: list[Any] = list(trainer.policy.modules())
        self.adapter = next(layer for layer in layers if hasattr(layer, "lora_A"))
        self.vector_H: Tensor | None = None
        trainer.policy.causal_lm.model.norm.register_forward_hook(self.added)

    def added(self, norm: Any, inputs: Any, hidden: Tensor) -> Tensor:
        if self.vector_H is None or self.adapter.disable_adapters:
            return hidden
        return hidden + self.vector_H.to(hidden.dtype)


def main() -> None:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--completions", type=int, default=32, help="of each prompt, in each half")
    top.add_argument("--kl", default="0.03,0.09", help="nats a token, to second order")
    top.add_argument("overrides", nargs="*", metavar="setting=value")
    found = top.parse_args()
    overrides = {key: parse(key, value) for key, _, value in (pair.partition("=") for pair in found.overrides)}
    settings = BASE | FRESH | OWN | {"completions_per_prompt": found.completions} | overrides
    with tempfile.TemporaryDirectory() as folder:
        trainer = SafeTrainer(args=SafeConfig.from_dict(settings | {"output_dir": folder}))
        halves = [measured(trainer, step) for step in (0, 1)]
        compare(halves)
        judge(trainer, halves, [float(kl) for kl in found.kl.split(",")])


@torch.no_grad()
def measured(trainer: SafeTrainer, step: int) -> Half:
    experience, reward_B = sampled(trainer, step)
    advantage_B = beside_others(reward_B, trainer.args.completions_per_prompt)
    weight_VH = trainer.policy.head()["weight"].float()
    size, width = weight_VH.shape
    mean_V, square_HH, tokens = torch.zeros(size), torch.zeros(width, width), 0
    credit_H, reward_H = torch.zeros(width), torch.zeros(width)
    for micro in experience:
        own_L = per_token(advantage_B[micro.indices], micro.batch.response_cu_seqlens)
        parts = (trainer.policy(micro.batch).float(), micro.batch.targets_L, micro.advantage_L, own_L)
        for hidden_NH, target_N, credit_N, own_N in zip(*(part.split(ROWS) for part in parts), strict=True):
            p_NV = (hidden_NH @ weight_VH.T).softmax(-1)
            mean_NH = p_NV @ weight_VH
            score_NH = weight_VH[target_N] - mean_NH
            credit_H += score_NH.T @ credit_N
            reward_H += score_NH.T @ own_N
            mean_V += p_NV.sum(0)
            square_HH += mean_NH.T @ mean_NH
            tokens += len(target_N)
    metric_HH = (weight_VH.T @ (mean_V[:, None] * weight_VH) - square_HH) / tokens
    count = len(reward_B)
    print(f"{count} completions, reward {reward_B.mean():.3f}, variance {reward_B.var():.3f}", flush=True)
    return Half(credit_H / count, reward_H / count, metric_HH, tokens / count)


def natural(gradient_H: Tensor, metric_HH: Tensor) -> Tensor:
    damping = DAMPING * metric_HH.diagonal().mean()
    return torch.linalg.solve(metric_HH + damping * torch.eye(len(metric_HH)), gradient_H)


def nats(vector_H: Tensor, metric_HH: Tensor) -> float:
    """Of a token, to second order."""
    return (vector_H @ metric_HH @ vector_H).item() / 2


def compare(halves: list[Half]) -> None:
    print("\n| direction | reward per sqrt(nat) by the other half | by its own half |\n|---|---|---|")
    directions = {"gradient": lambda h: h.credit_H, "natural gradient": lambda h: natural(h.credit_H, h.metric_HH)}
    for name, of in directions.items():
        other, own = 0.0, 0.0
        for half, another in (halves, halves[::-1]):
            unit_H = of(half) / math.sqrt(nats(of(half), another.metric_HH) * another.length)
            other, own = other + (unit_H @ another.reward_H).item() / 2, own + (unit_H @ half.reward_H).item() / 2
        print(f"| {name} | {other:.3f} | {own:.3f} |", flush=True)


def judge(trainer: SafeTrainer, halves: list[Half], kls: list[float]) -> None:
    """Held-out prompts, along the natural gradient of all samples."""
    metric_HH = torch.stack([half.metric_HH for half in halves]).mean(0)
    vector_H = natural(torch.stack([half.credit_H for half in halves]).mean(0), metric_HH)
    shift, length = Shift(trainer), halves[0].length
    before = trainer.evaluate()
    print("\n| held-out | reward (standard error) | KL, nats a token | gain per sqrt(nat) |\n|---|---|---|---|")
    print(f"| the reference | {before.reward:.3f} ({before.reward_error:.3f}) | {before.kl:.4f} | |", flush=True)
    for kl in kls:
        shift.vector_H = vector_H * math.sqrt(kl / nats(vector_H, metric_HH))
        found = trainer.evaluate()
        gain = (found.reward - before.reward) / math.sqrt(found.kl * length)
        line = f"{found.reward:.3f} ({found.reward_error:.3f}) | {found.kl:.4f} | {gain:.3f}"
        print(f"| aimed at {kl:g} | {line} |", flush=True)


if __name__ == "__main__":
    main()
