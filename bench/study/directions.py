"""How much reward a nat buys in what an adapter may train, from samples of the reference alone.

    python bench/study/directions.py [--layers K] [--rollouts N] [setting=value ...]    # half an hour on one core

Half of the rollouts gives a direction d: the gradient g of the expected reward in lora_B, or its signs, which is a
first step of Adam. The other half, whose noise is not in d, says what the direction earns. To first order a small step
s d earns s (g_other, d), for a KL that grows with s^2, so reward per sqrt(nat) does not depend on s. The same of the
half that gave d is higher by what is noise. A policy tilted toward the reward has the most, sqrt(2 var(reward)).
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a checkout that is not installed

from bench.study.arms import BASE
from safe_kernels import linear_token_stats
from safe_train import SafeTrainer
from safe_train.algorithms.advantages import per_token
from safe_train.config import SafeConfig, parse
from safe_train.engines.projection import mean_kl
from safe_train.sampling.experience import Experience

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SETS = {"all": MODULES, **{name: (name,) for name in MODULES}, "v_proj, o_proj": ("v_proj", "o_proj")}
STEPS: dict[str, Callable[[Tensor], Tensor]] = {"gradient": lambda g: g, "signs (Adam)": torch.sign}
SMALL = 0.003, 0.03  # nats a token, where KL ~ s^2
Gradient = dict[str, Tensor]


def main() -> None:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--layers", type=int, default=10, help="the last so many")
    top.add_argument("--rollouts", type=int, default=4, help="an even number, of 768 completions each")
    top.add_argument("overrides", nargs="*", metavar="setting=value")
    found = top.parse_args()
    own = {"lora_last_layers": found.layers, "prompts_per_step": 32, "completions_per_prompt": 24, "algorithm": "grpo"}
    own |= {"reward": ["vader"], "dataset": "demo_train.jsonl", "max_tokens_per_microbatch": 2048, "use_cpu": True}
    overrides = {key: parse(key, value) for key, _, value in (pair.partition("=") for pair in found.overrides)}
    with tempfile.TemporaryDirectory() as folder:
        trainer = SafeTrainer(args=SafeConfig.from_dict(BASE | own | overrides | {"output_dir": folder}))
        report(trainer, found.rollouts)


def report(trainer: SafeTrainer, rollouts: int) -> None:
    trained = {name: p for name, p in trainer.policy.named_parameters() if p.requires_grad and "lora_B" in name}
    halves: list[Gradient] = [{name: torch.zeros_like(p) for name, p in trained.items()} for _ in range(2)]
    rewards = []
    for step in range(rollouts):
        experience, reward_B = sampled(trainer, step)
        add_gradient(trainer, experience, reward_B, trained, halves[step % 2])
        rewards.append(reward_B)
    reward = torch.cat(rewards)
    for half in halves:
        for gradient in half.values():
            gradient /= len(reward) / 2
    error = reward.std().item() * (2 / (len(reward) / 2)) ** 0.5
    print(f"{len(reward)} completions, reward {reward.mean():.3f}; standard error of each figure {error:.3f}")
    print(f"most there is: {(2 * reward.var()).sqrt():.3f} reward per sqrt(nat) of a completion\n")
    print("| trained | direction | earned | of its own half |\n|---|---|---|---|")
    for title, modules in SETS.items():
        for step_name, of in STEPS.items():
            both = [per_nat(trainer, experience, trained, halves, i, modules, of) for i in (0, 1)]
            earned, seen = (sum(column) / 2 for column in zip(*both, strict=True))
            print(f"| {title} | {step_name} | {earned:.3f} | {seen:.3f} |", flush=True)


def sampled(trainer: SafeTrainer, step: int) -> tuple[Experience, Tensor]:
    rollout, scores = trainer.collect(step)
    return Experience(trainer.policy, None, rollout, trainer.args, trainer.device), scores["reward"]


def add_gradient(
    trainer: SafeTrainer, experience: Experience, reward_B: Tensor, trained: dict[str, nn.Parameter], total: Gradient
) -> None:
    """Adds sum_i A_i grad log p(completion i), with the mean of the prompt's other completions as the baseline of A."""
    size = trainer.args.completions_per_prompt
    groups = reward_B.unflatten(0, (-1, size))
    advantage_B = ((groups - groups.mean(1, keepdim=True)) * size / (size - 1)).flatten().float()
    for micro in experience:
        advantage_L = per_token(advantage_B[micro.indices], micro.batch.response_cu_seqlens)
        hidden_LH, head = trainer.policy(micro.batch), trainer.policy.head()
        logprob_L = linear_token_stats(hidden_LH, tokens=micro.batch.targets_L, **head).logprob
        found = torch.autograd.grad((advantage_L * logprob_L).sum(), list(trained.values()))
        for sum_, gradient in zip(total.values(), found, strict=True):
            sum_ += gradient


def per_nat(
    trainer: SafeTrainer,
    experience: Experience,
    trained: dict[str, nn.Parameter],
    halves: list[Gradient],
    own: int,
    modules: tuple[str, ...],
    of: Callable[[Tensor], Tensor],
) -> tuple[float, float]:
    """Reward per sqrt(nat) of a completion on the direction of one half: by the other half, and by itself."""
    pattern = re.compile("|".join(modules))
    direction = {name: of(g) for name, g in halves[own].items() if pattern.search(name)}
    batches = next(iter(experience.minibatches))[:1]
    length = sum(len(m.batch.targets_L) for m in batches) / sum(len(m.indices) for m in batches)
    scale, kl = 1e-3 / max(d.abs().max().item() for d in direction.values()), 0.0
    while not SMALL[0] < kl < SMALL[1]:
        scale *= min(8.0, max(0.1, math.sqrt(0.01 / kl))) if kl > 0 else 1.0
        place(trained, direction, scale)
        kl = mean_kl(trainer.policy, batches)
    place(trained, direction, 0.0)
    earned, seen = (
        scale * sum((halves[i][name] * d).sum().item() for name, d in direction.items()) for i in (1 - own, own)
    )
    return earned / math.sqrt(kl * length), seen / math.sqrt(kl * length)


@torch.no_grad()
def place(trained: dict[str, nn.Parameter], direction: Gradient, scale: float) -> None:
    for name, parameter in trained.items():
        parameter.copy_(scale * direction[name] if name in direction else torch.zeros_like(parameter))


if __name__ == "__main__":
    main()
