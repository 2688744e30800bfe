"""What the study compares: the arms, what each may tune, SAFE without each mechanism, and one factor at a time."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass, field
from typing import Any

Settings = dict[str, Any]

# One step: 4 openings x 4 completions; LoRA on the last 8 layers of SmolLM2-135M, as in the demo.
BASE: Settings = {
    "model": "smollm2-135m-instruct",
    "dtype": "bfloat16",  # of the frozen weights; LoRA's, the critic and all statistics are float32
    "prompts_per_step": 4,
    "completions_per_prompt": 4,
    "max_new_tokens": 16,
    "lora_r": 16,
    "lora_last_layers": 8,
    "critic_learning_rate": 1e-3,
    "inner_epochs": 2,
    "samples_every": 10,
    "save_every": 5,
    "keep_checkpoints": 1,
    "eval_completions": 64,
}
BY_REWARD: dict[str, Settings] = {"word_count": {"max_new_tokens": 24}}  # fewer could not earn its length bonus
FRESH: Settings = {"dataset": "demo_train.jsonl", "eval_dataset": "demo_eval.jsonl"}
# This path is in the key of every row of the sweep: a file elsewhere would make the sweep anew.
DEVELOPMENT: Settings = {"dataset": "bench/study_dev_prompts.jsonl", "eval_dataset": "demo_dev.jsonl"}
DEVELOPMENT_SEED = 1000

LEARNING_RATES = (2e-3, 4e-3)


@dataclass(frozen=True)
class Arm:
    """An algorithm, its fixed settings, and those among which the sweep chooses."""

    name: str
    settings: Settings
    grid: list[Settings]


def grid(**own: tuple[Any, Any]) -> list[Settings]:
    """Two learning rates by two values of a knob of the arm's own."""
    names = ("learning_rate", *own)
    return [dict(zip(names, values, strict=True)) for values in itertools.product(LEARNING_RATES, *own.values())]


def baseline(name: str) -> Arm:
    return Arm(name, {"algorithm": name}, grid(beta=(0.01, 0.1)))


def published(name: str, choices: list[Settings], **settings: Any) -> Arm:
    return Arm(name, {"algorithm": name, "top_k": 50, "weight_decay": 0.01, **settings}, choices)


CRITIC_RATES = grid(critic_learning_rate=(1e-3, 3e-3))
ONE_RATE = [{"learning_rate": rate, "critic_learning_rate": rate} for rate in (1e-3, 2e-3, 4e-3, 8e-3)]
UNCLIPPED = {"normalize_rewards": False, "entropy_coef": 0.0, "critic_max_grad_norm": float("inf")}
ARMS = {
    arm.name: arm
    for arm in (
        # In 30 steps an average over ten would still be that of the start.
        Arm("safe", {"algorithm": "safe", "ema_short": 0.5}, grid(kl_excess_coef=(0.5, 5.0))),
        baseline("ppo"),
        baseline("ppo_two_heads"),
        baseline("grpo"),
        published("safe_paper", CRITIC_RATES),
        published("asymmetric_paper", CRITIC_RATES, critic_max_grad_norm=1.0),
        published("ppo_paper", ONE_RATE, **UNCLIPPED),
    )
}
MAIN = ("safe", "ppo", "ppo_two_heads", "grpo")
PUBLISHED = ("safe_paper", "asymmetric_paper", "ppo_paper")

# Runs with the settings chosen for `safe`, changed in this.
ABLATIONS: dict[str, Settings] = {
    "without soft-min": {"critic": "mean"},
    "without target heads": {"polyak": 1.0},
    "without controller": {"controller": "fixed"},
    "with the integral term": {"kl_integral_coef": 0.1},
    "without threshold penalty": {"kl_excess_coef": 0.0},
    "without momentum penalty": {"kl_momentum_coef": 0.0},
    "without entropy gate": {"entropy_gate": False},
    "with a constant gate": {"gate_min": 0.6, "gate_max": 0.6},  # about the mean of the gate: its strength alone
    "shuffled advantages": {"shuffle_advantages": True},
    "without PID": {"pid_kp": 0.0, "pid_ki": 0.0, "pid_kd": 0.0},
    "without phases": {"phases": False},
}


def one_at_a_time(prefix: str = "", **values: tuple[float, ...]) -> dict[str, Settings]:
    return {f"{prefix}{name} {value:g}": {name: value} for name, some in values.items() for value in some}


SENSITIVITY = one_at_a_time(
    alpha=(0.1, 1.0),
    kl_threshold=(0.15, 0.4),
    kl_excess_coef=(0.1, 2.0),
    kl_momentum_coef=(0.1, 2.0),
    gae_lambda=(0.8, 1.0),
    max_preview_kl=(0.3,),
)
PPO_SENSITIVITY = one_at_a_time("ppo, ", beta=(0.01, 0.3), gae_lambda=(0.8, 1.0), polyak=(1.0,))
CHANGES = {"ablation": ABLATIONS, "sensitivity": SENSITIVITY | PPO_SENSITIVITY}


def base_of(change: str) -> str:
    """The arm that a change of this name changes."""
    return "ppo" if change in PPO_SENSITIVITY else "safe"


# What only the controller reads: replayed on the signals of runs that were made, without training anew.
OF_THE_CONTROLLER = {name: ABLATIONS[name] for name in ("without entropy gate", "without PID", "without phases")}
REPLAYED = OF_THE_CONTROLLER | one_at_a_time(
    gate_min=(0.25, 1.0), pid_kp=(0.1, 1.0), pid_ki=(0.0, 0.1), pid_kd=(0.0, 0.2), kl_threshold=(0.15, 0.4),
    kl_excess_coef=(0.1, 2.0), kl_momentum_coef=(0.1, 2.0), kl_integral_coef=(0.1,),
)  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """One run: it is what its row in the results is found by."""

    stage: str  # sweep, main, published, ablation, sensitivity
    reward: str
    name: str  # the arm, or the change of `safe`
    seed: int
    steps: int
    base: Settings = field(hash=False)  # what all runs of the stage share
    settings: Settings = field(hash=False)  # what this arm or change has of its own

    @property
    def key(self) -> str:
        digest = hashlib.sha256(json.dumps(self.base | self.settings, sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.stage}/{self.reward}/{self.name}/seed {self.seed}/{self.steps} steps/{digest}"
