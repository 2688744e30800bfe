"""Part two's arms and its plan: which runs of a full grid are made, in an order any part of which is balanced."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bench.study.arms import BASE, FRESH, Settings, Spec
from safe_train.algorithms.controller import Controller, clip

FACTORS: dict[str, Sequence[Any]] = {
    "reward": ("vader", "length", "exploit", "noisy", "shuffled"),
    "kl_budget": (0.05, 0.1, 0.2),
    "algorithm": ("safe", "ppo", "grpo"),
    "learning_rate": (5e-4, 2e-3, 5e-3),
}
GRID: Settings = BASE | FRESH | {"ema_short": 0.5, "save_every": 10}
GRID_STEPS, LONG_STEPS = 20, 1500
# Between the levels of the grid, with seeds of their own; and levels of it with no `beta` under the controller.
OUTSIDE: dict[str, Sequence[Any]] = {
    "kl_budget": (0.1, 0.15),
    "algorithm": ("safe", "grpo"),
    "learning_rate": (1e-3, 3e-3),
}
WITHOUT_BETA: dict[str, Sequence[Any]] = {
    "reward": ("length", "vader"),
    "kl_budget": (0.05, 0.1),
    "algorithm": ("ppo", "grpo"),
    "learning_rate": (2e-3, 5e-3),
}
OUTSIDE_SEED = 100
# Lines of the grid's plan, which are its seeds: two each of ppo and grpo, and those where the budget acted most.
VARIED = {"return": (14, 3, 22, 23), "moments": (12, 20, 16, 2)}
# Reward models that share VADER and have a fault of their own each, as one alone and as an ensemble of three.
FAULTS = ("exploit", "dashes", "brackets")
ENSEMBLE_STEPS, ENSEMBLE_RATE = 600, 1e-3
AGGREGATED: dict[str, Settings] = {
    "mean": {"reward_weights": [1 / len(FAULTS)] * len(FAULTS)},
    "min": {"multi_objective_aggregation": "min"},
    "mean_minus_variance": {"multi_objective_aggregation": "mean_minus_variance", "reward_variance_coef": 1.0},
}
SMALL_MODEL = "runs/small-model"
LONG: Settings = GRID | {
    "model": SMALL_MODEL, "dtype": "float32", "lora_last_layers": None, "ema_short": None, "save_every": 100,
    "samples_every": 500, "max_new_tokens": 8, "inner_epochs": 1, "eval_completions": 512,
}  # fmt: skip
LONG_BUDGET, LONG_RATES = 0.1, (1e-3, 2e-4)
HORIZON, ERROR_MAX = 10_000, 0.2  # of the adaptive controllers of TRL and of verl


def cover(factors: Mapping[str, Sequence[Any]], count: int) -> list[Settings]:
    """`count` runs of the full grid, each the one whose levels and pairs of levels were made least often so far.

    Greedy: a pair weighs as much as it has combinations, so the short factors do not outvote the long one.
    """
    every = [dict(zip(factors, levels, strict=True)) for levels in itertools.product(*factors.values())]
    random.Random(0).shuffle(every)
    seen: Counter[tuple[Any, ...]] = Counter()

    def parts(run: Settings) -> dict[tuple[Any, ...], int]:
        singles = {(name, level): len(factors[name]) for name, level in run.items()}
        pairs = itertools.combinations(run.items(), 2)
        return singles | {(a, b): len(factors[a[0]]) * len(factors[b[0]]) for a, b in pairs}

    chosen = []
    for _ in range(count):
        run = min(every, key=lambda run: sum(seen[part] * weight for part, weight in parts(run).items()))
        every.remove(run)
        seen.update(parts(run).keys())
        chosen.append(run)
    return chosen


@dataclass
class AdaptiveController(Controller):
    """The adaptive controller of TRL (up to 0.11) and of verl, which both take from arXiv 1909.08593.

        coef <- coef (1 + clip(KL / target - 1, -0.2, 0.2) completions / 10000)

    TRL starts at 0.2 and verl at 0.001. TRL takes KL and target a sequence, verl a token: the ratio is the same for
    completions of one length. Here the KL is exact and charged in the loss, as in the other arms.
    """

    coef: float = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.coef = self.args.beta

    def update(self, kl: float, entropy: float, reward: float, reward_std: float) -> Any:
        control, args = super().update(kl, entropy, reward, reward_std), self.args
        used, error = self.coef, clip(kl / args.kl_threshold - 1, -ERROR_MAX, ERROR_MAX)
        if math.isfinite(kl):
            self.coef *= 1 + error * args.completions_per_step / HORIZON
        return control._replace(kl_coef=used)


def held(budget: float, algorithm: str) -> dict[str, Settings]:
    """What each arm of part two makes of a budget."""
    plain = {"algorithm": algorithm, "kl_threshold": budget, "kl_threshold_min": budget / 3}
    plain |= {"kl_threshold_max": 2 * budget}  # the published range, as parts of the published threshold
    fixed = plain | {"controller": "fixed"}
    return {
        "budget": {"algorithm": algorithm, "kl_budget": budget},
        "fixed": fixed | {"beta": 0.1},
        "trl": fixed | {"beta": 0.2},
        "verl": fixed | {"beta": 0.001},
        "published": plain | {"algorithm": "safe_paper", "top_k": 50, "weight_decay": 0.01},
    }


HELD = tuple(held(0.1, "ppo"))
ADAPTIVE = ("trl", "verl")


def grid(count: int, baselines: int, steps: int, overrides: Settings) -> list[Spec]:
    """The runs of each arm: the first `baselines` of the budget's, with the same seeds, for the arms beside it."""
    specs = []
    for name in HELD:
        for seed, run in enumerate(cover(FACTORS, count)[: count if name == "budget" else baselines]):
            settings = held(run["kl_budget"], run["algorithm"])[name] | {"learning_rate": run["learning_rate"]}
            settings |= {"shuffle_advantages": True} if run["reward"] == "shuffled" else {}
            specs.append(Spec("grid", run["reward"], name, seed, steps, GRID | overrides, settings))
    return specs


def outside(steps: int, overrides: Settings) -> list[Spec]:
    """Runs under a budget that no gain was looked at with: between the grid's levels, and with `beta` 0."""
    between, without_beta = cover(OUTSIDE, 4), cover(WITHOUT_BETA, 4)
    plan = [run | {"reward": "vader"} for run in between] + [run | {"beta": 0.0} for run in without_beta]
    return [
        Spec("outside", run.pop("reward"), "budget", OUTSIDE_SEED + at, steps, GRID | overrides, run)
        for at, run in enumerate(plan)
    ]


def variants(count: int, steps: int, overrides: Settings) -> list[Spec]:
    """Runs of the grid made once more: with the KL's whole gradient, and with Adam's moments moved back as well."""
    budget = {spec.seed: spec for spec in grid(count, 0, steps, overrides) if spec.name == "budget"}
    changes: dict[str, Settings] = {"return": {"kl_gradient": "return"}, "moments": {}}
    return [
        replace(budget[seed], stage="variants", name=name, settings=budget[seed].settings | changes[name])
        for name, seeds in VARIED.items()
        for seed in seeds
    ]


def ensembles(overrides: Settings) -> list[Spec]:
    """A fault that one reward model has, and three with one each, put together; under a budget and a fixed beta."""
    specs = []
    for held_by in ("budget", "fixed"):
        settings = held(LONG_BUDGET, "grpo")[held_by] | {"learning_rate": ENSEMBLE_RATE}
        models: dict[str, tuple[str, Settings]] = {"one": (FAULTS[0], {})}
        models |= {name: ("+".join(FAULTS), own) for name, own in AGGREGATED.items()}
        for name, (reward, own) in models.items():
            arm = f"{name}, {held_by}"
            specs.append(Spec("ensembles", reward, arm, 0, ENSEMBLE_STEPS, LONG | overrides, settings | own))
    return specs


def long(steps: int, overrides: Settings) -> list[Spec]:
    """The long runs, the higher rate and the hackable reward first."""
    wanted = [("grpo", "budget"), ("safe", "published"), ("grpo", "fixed"), ("safe", "budget"), ("ppo", "budget")]
    wanted += [("safe", "fixed"), ("ppo", "fixed")]
    own = [held(LONG_BUDGET, algorithm)[name] for algorithm, name in wanted]
    return [
        Spec("long", reward, name, 0, steps, LONG | overrides, settings | {"learning_rate": rate})
        for rate, reward in itertools.product(LONG_RATES, ("exploit", "vader"))
        for (_, name), settings in zip(wanted, own, strict=True)
    ]
