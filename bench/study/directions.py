"""How much reward a nat buys in what an adapter may train, from samples of the reference alone.

    python bench/study/directions.py [--layers K] [--rollouts N] [setting=value ...]

Half of the rollouts gives a direction d: the trainer's own advantages times the gradients of the log-probs in lora_B,
or the signs of that sum, which is a first step of Adam. So `prefix_rewards=1 gae_lambda=0.5` shows the direction that
the reward of each token gives. The cosine of the two halves' directions says how much of one is noise.

The other half, whose noise is not in d, says what the direction earns, by the gradient g of the expected reward with
one reward a completion, which no setting biases. To first order a small step s d earns s (g_other, d), for a KL that
grows with s^2, so reward per sqrt(nat) does not depend on s. The same of the half that gave d is higher by what is
noise. A policy tilted toward the reward has the most, sqrt(2 var(reward)).
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a checkout that is not installed

from bench.study.arms import BASE
from safe_kernels import linear_token_stats
from safe_train import SafeTrainer
from safe_train.algorithms.advantages import per_token
from safe_train.algorithms.returns import mean_of_others
from safe_train.config import SafeConfig, parse
from safe_train.engines.projection import mean_kl
from safe_train.sampling.experience import Experience

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SETS = {"all": MODULES, **{name: (name,) for name in MODULES}, "v_proj, o_proj": ("v_proj", "o_proj")}
STEPS: dict[str, Callable[[Tensor], Tensor]] = {"gradient": lambda g: g, "signs (Adam)": torch.sign}
SMALL = 0.003, 0.03  # nats a token, where KL ~ s^2
Gradient = dict[str, Tensor]


class Half(NamedTuple):
    """Of one half of the rollouts: the direction that the trainer would take, and the gradient of the reward."""

    direction: Gradient
    reward: Gradient


def main() -> None:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--layers", type=int, default=10, help="the last so many")
    top.add_argument("--rollouts", type=int, default=4, help="an even number, of 768 completions each")
    top.add_argument("overrides", nargs="*", metavar="setting=value")
    found = top.parse_args()
    own = {"lora_last_layers": found.layers, "prompts_per_step": 32, "completions_per_prompt": 24, "algorithm": "grpo"}
    own |= {"reward": ["vader"], "scale_rewards": "none", "dataset": "demo_train.jsonl"}
    own |= {"max_tokens_per_microbatch": 2048, "use_cpu": True}
    overrides = {key: parse(key, value) for key, _, value in (pair.partition("=") for pair in found.overrides)}
    with tempfile.TemporaryDirectory() as folder:
        trainer = SafeTrainer(args=SafeConfig.from_dict(BASE | own | overrides | {"output_dir": folder}))
        report(trainer, found.rollouts)


def report(trainer: SafeTrainer, rollouts: int) -> None:
    trained = {name: p for name, p in trainer.policy.named_parameters() if p.requires_grad and "lora_B" in name}
    halves = [Half(*({name: torch.zeros_like(p) for name, p in trained.items()} for _ in range(2))) for _ in range(2)]
    rewards = []
    for step in range(rollouts):
        experience, reward_B = sampled(trainer, step)
        add_gradients(trainer, experience, reward_B, trained, halves[step % 2])
        rewards.append(reward_B)
    reward = torch.cat(rewards)
    for half in halves:
        for gradient in half.reward.values():
            gradient /= len(reward) / 2
    error = reward.std().item() * (2 / (len(reward) / 2)) ** 0.5
    print(f"{len(reward)} completions, reward {reward.mean():.3f}; standard error of each figure {error:.3f}")
    print(f"most there is: {(2 * reward.var()).sqrt():.3f} reward per sqrt(nat) of a completion\n")
    print("| trained | direction | cosine of the halves | earned | of its own half |\n|---|---|---|---|---|")
    for title, modules in SETS.items():
        for step_name, of in STEPS.items():
            both = [per_nat(trainer, experience, trained, halves, i, modules, of) for i in (0, 1)]
            earned, seen = (sum(column) / 2 for column in zip(*both, strict=True))
            one, other = (flat(directed(half, modules, of)) for half in halves)
            cosine = torch.cosine_similarity(one, other, dim=0).item()
            print(f"| {title} | {step_name} | {cosine:.2f} | {earned:.3f} | {seen:.3f} |", flush=True)


def sampled(trainer: SafeTrainer, step: int) -> tuple[Experience, Tensor]:
    """A rollout of the reference, with the trainer's advantages; and the rewards [B] themselves."""
    rollout, scores = trainer.collect(step)
    experience = Experience(trainer.policy, None, rollout, trainer.args, trainer.device)
    control = trainer.update_controller(experience, scores["reward"])
    experience.prefix_BK = None if scores.prefix_BK is None else trainer.normalised(scores.prefix_BK)
    trainer.compute_advantages(experience, trainer.training_rewards(scores["reward"], rollout), control)
    return experience, scores["reward"]


def add_gradients(
    trainer: SafeTrainer, experience: Experience, reward_B: Tensor, trained: dict[str, nn.Parameter], half: Half
) -> None:
    """Adds sum_t A_t grad log p(token t): with the trainer's A, and with one A a completion."""
    advantage_B = beside_others(reward_B, trainer.args.completions_per_prompt)
    for micro in experience:
        of_reward_L = per_token(advantage_B[micro.indices], micro.batch.response_cu_seqlens)
        hidden_LH, head = trainer.policy(micro.batch), trainer.policy.head()
        logprob_L = linear_token_stats(hidden_LH, tokens=micro.batch.targets_L, **head).logprob
        for total, advantage_L in ((half.direction, micro.advantage_L), (half.reward, of_reward_L)):
            found = torch.autograd.grad((advantage_L * logprob_L).sum(), list(trained.values()), retain_graph=True)
            for sum_, gradient in zip(total.values(), found, strict=True):
                sum_ += gradient


def beside_others(reward_B: Tensor, size: int) -> Tensor:
    """The reward of a completion less the mean of the `size` - 1 others of its prompt."""
    reward_KG = reward_B.unflatten(0, (-1, size)).T
    return (reward_KG - mean_of_others(reward_KG)).T.flatten().float()


def per_nat(
    trainer: SafeTrainer,
    experience: Experience,
    trained: dict[str, nn.Parameter],
    halves: list[Half],
    own: int,
    modules: tuple[str, ...],
    of: Callable[[Tensor], Tensor],
) -> tuple[float, float]:
    """Reward per sqrt(nat) of a completion on the direction of one half: by the other half, and by itself."""
    direction = directed(halves[own], modules, of)
    batches = next(iter(experience.minibatches))[:1]
    length = sum(len(m.batch.targets_L) for m in batches) / sum(len(m.indices) for m in batches)
    scale, kl = 1e-3 / max(d.abs().max().item() for d in direction.values()), 0.0
    while not SMALL[0] < kl < SMALL[1]:
        scale *= min(8.0, max(0.1, math.sqrt(0.01 / kl))) if kl > 0 else 1.0
        place(trained, direction, scale)
        kl = mean_kl(trainer.policy, batches)
    place(trained, direction, 0.0)
    earned, seen = (
        scale * sum((halves[i].reward[name] * d).sum().item() for name, d in direction.items()) for i in (1 - own, own)
    )
    return earned / math.sqrt(kl * length), seen / math.sqrt(kl * length)


def directed(half: Half, modules: tuple[str, ...], of: Callable[[Tensor], Tensor]) -> Gradient:
    pattern = re.compile("|".join(modules))
    return {name: of(g) for name, g in half.direction.items() if pattern.search(name)}


def flat(gradient: Gradient) -> Tensor:
    return torch.cat([g.flatten() for g in gradient.values()])


@torch.no_grad()
def place(trained: dict[str, nn.Parameter], direction: Gradient, scale: float) -> None:
    for name, parameter in trained.items():
        parameter.copy_(scale * direction[name] if name in direction else torch.zeros_like(parameter))


if __name__ == "__main__":
    main()
