"""Part two of the study: what buys more reward for each nat, one change at a time under a KL budget of 0.1.

    python bench/study/per_nat.py --jobs 1 --seeds 3               # a million parameters: two minutes a run
    python bench/study/per_nat.py --stages smollm2 --jobs 1        # SmolLM2-135M, 40 rollouts of 96: an hour a run
    python bench/study/per_nat.py --report                         # only the tables, from the rows that are there

The ruler is the best of n samples of the reference. Rows go to bench/results/per_nat.jsonl, tables beside them
(docs/study.md).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a checkout that is not installed

from bench.study import run
from bench.study.arms import BASE, FRESH, Settings, Spec
from bench.study.budget_report import Measure, made, table
from bench.study.design import LONG
from bench.study.report import Row
from bench.study.updates import after, bought, gain_per_nat, spread
from safe_train.config import SafeConfig
from safe_train.run.evaluation import Evaluation
from safe_train.run.frontier import ruler
from safe_train.trainer import SafeTrainer

SEEDS, BUDGET = 1, 0.1
STEPS = {"small": 80, "smollm2": 40}
GRPO: Settings = {
    "algorithm": "grpo", "kl_budget": BUDGET, "beta": 0.0, "entropy_coef": 0.0, "prompts_per_step": 12,
    "completions_per_prompt": 8, "minibatch_size": 32, "inner_epochs": 1, "lr_scheduler_type": "linear",
}  # fmt: skip
# The evaluations are of 8 prompts; those of the reference give the ruler, too.
SMALL: Settings = LONG | GRPO | {
    "learning_rate": 2e-3, "eval_completions": 2048, "eval_completions_per_prompt": 256,
}  # fmt: skip
SMOLLM2: Settings = BASE | FRESH | GRPO | {
    "eval_completions": 512, "eval_completions_per_prompt": 64, "save_every": 10, "dtype": "float32",
    "learning_rate": 2e-3, "lora_last_layers": 12, "lora_target_modules": ["v_proj", "o_proj"],
    "max_tokens_per_microbatch": 4096,
}  # fmt: skip
PREFIX: Settings = {"prefix_rewards": 1, "gae_lambda": 0.5}
CHANGES: dict[str, Settings] = {
    "grpo": {},
    "reward of each token": PREFIX,
    "the same, lambda 0.9": PREFIX | {"gae_lambda": 0.9},
    "the same, lambda 1": PREFIX | {"gae_lambda": 1.0},
    "the same, every 4 tokens": PREFIX | {"prefix_rewards": 4},
    "the same, scaled by the batch": PREFIX | {"scale_rewards": "batch"},
    "scaled by the batch": {"scale_rewards": "batch"},
    "critic": {"algorithm": "ppo", "critic_learning_rate": 1e-3},
    "critic and reward of each token": PREFIX | {"algorithm": "ppo", "critic_learning_rate": 1e-3},
    "rate 5e-4": {"learning_rate": 5e-4},
    "rate 5e-3": {"learning_rate": 5e-3},
    "constant rate": {"lr_scheduler_type": "constant"},
    "one update a rollout": {"minibatch_size": 96},
    "32 completions a rollout": {"prompts_per_step": 4},
    "adam_beta1 0": {"adam_beta1": 0.0},
    "adam_beta1 0.98": {"adam_beta1": 0.98},
    "adam_beta2 0.95": {"adam_beta2": 0.95},
    "averaged iterates": {},
    "preconditioned LoRA": {},
    "LoRA rank 64": {"lora_r": 64},
    "all parameters": {"lora_r": 0, "learning_rate": 2e-4},
    "step bounded to 0.003 nats": {"max_preview_kl": 0.003, "learning_rate": 5e-3},
    "no controller": {"kl_budget_control": False},
    "kl_gradient return": {"kl_gradient": "return"},
    "sequence_mean": {"loss_aggregation": "sequence_mean"},
    "dynamic sampling": {"dynamic_sampling": 2},
}
BASES = {"small": SMALL, "smollm2": SMOLLM2}
ARMS = {"small": tuple(CHANGES), "smollm2": ("reward of each token", "grpo")}
CURVES = ("reward", "kl", "kl_coef", "entropy", "grad_norm", "time/step_s", "time/reward_s")
DECAY = 0.8  # of the averaged iterates, a rollout
DAMPING = 1e-3


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    if args.worker:
        return work(args.worker)
    return 1 if run.make_and_report(lambda: planned(args), args, report) else 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--stages", nargs="+", choices=tuple(ARMS), default=["small"])
    top.add_argument("--steps", type=int, help=f"rollouts of 96 completions (default: {STEPS})")
    top.add_argument("--seeds", type=int, default=SEEDS)
    return run.add_options_of_runs(top, __file__, "per_nat")


def planned(args: argparse.Namespace) -> list[Spec]:
    """The same number of completions in each run."""
    specs = []
    for seed in range(args.seeds):
        for stage in args.stages:
            base = BASES[stage] | args.overrides
            for name in ARMS[stage]:
                steps = args.steps or STEPS[stage]
                steps = steps * base["prompts_per_step"] // (base | CHANGES[name])["prompts_per_step"]
                specs.append(Spec(stage, "vader", name, seed, steps, base, CHANGES[name]))
    return specs


class Averaged(SafeTrainer):
    """Keeps an average of what the budget left of each update; `train` ends with it as the policy."""

    def train_step(self, step: int, session: Any) -> Any:
        found = super().train_step(step, session)
        self.average = getattr(self, "average", None) or [p.detach().clone() for p in self.trainable]
        for mean, now in zip(self.average, self.trainable, strict=True):
            mean.lerp_(now.detach(), 1 - DECAY)
        return found

    def train(self, resume_from_checkpoint: Any = None) -> Any:
        found = super().train()  # a part of an average could not go on
        with torch.no_grad():
            for mean, now in zip(self.average, self.trainable, strict=True):
                now.copy_(mean)
        return found


class Preconditioned(SafeTrainer):
    """The gradient of each LoRA factor in the metric of the other one, before AdamW sees it (arXiv 2402.02347).

    dB (A A^T + damping)^-1 and (B^T B + damping)^-1 dA
    """

    def take_step(self) -> None:
        with torch.no_grad():
            layers: list[Any] = list(self.policy.modules())
            for module in layers:
                for name in getattr(module, "lora_A", {}):
                    a, b = module.lora_A[name].weight, module.lora_B[name].weight
                    if a.grad is not None and b.grad is not None:
                        a.grad = torch.linalg.solve(damped(b.T @ b), a.grad)
                        b.grad = torch.linalg.solve(damped(a @ a.T), b.grad.T).T.contiguous()
        super().take_step()


def damped(square: torch.Tensor) -> torch.Tensor:
    return square + torch.eye(len(square)) * (DAMPING * square.diag().mean() + 1e-12)


OWN: dict[str, type[SafeTrainer]] = {"averaged iterates": Averaged, "preconditioned LoRA": Preconditioned}


def work(folder: Path) -> int:
    """One run, in a process of its own, judged on held-out prompts before and after."""
    values = json.loads((folder / "spec.json").read_text())
    started, reward, name = time.process_time(), values["spec"]["reward"], values["spec"]["name"]
    trainer = OWN.get(name, SafeTrainer)(args=SafeConfig.from_dict(values["settings"]))
    reference = trainer.evaluate()
    trainer.train(resume_from_checkpoint=True)
    found: Row = {"before": run.judgement(reference, reward), "after": run.judged(trainer, reward)}
    found |= {"ruler": ruler_of(reference), "curves": run.curves(folder, CURVES)}
    run.write_row(folder, found | {"cpu_s": time.process_time() - started})
    return 0


def ruler_of(reference: Evaluation) -> list[dict[str, float]]:
    """What the best of n samples earn, and their KL a token at most, for the first few n."""
    return [point._asdict() for point in ruler(reference.rows(step=0))[:16]]


def last_third(name: str) -> Callable[[Sequence[Row]], float]:
    def mean(row: Row) -> float:
        values = row["curves"][name]
        return statistics.fmean(values[-(len(values) // 3) :])

    return lambda rows: statistics.fmean(map(mean, rows))


MEASURES: tuple[Measure, ...] = (
    ("seeds", len, "d"),
    ("reward, last third", last_third("reward"), ".3f"),
    ("KL, last third", last_third("kl"), ".3f"),
    ("held-out reward", after("reward"), ".3f"),
    ("seeds apart", spread, ".3f"),
    ("gold", after("gold"), ".3f"),
    ("held-out KL", after("kl"), ".3f"),
    ("gain per sqrt(nat)", bought, ".3f"),
)
TITLES = {"small": "## A model of a million parameters", "smollm2": "## SmolLM2-135M"}


def report(rows: Sequence[Row]) -> str:
    parts = ["# What buys more reward for each nat", "By `python bench/study/per_nat.py --report`, from its rows."]
    for stage, title in TITLES.items():
        own = [row for row in rows if row["stage"] == stage]
        arms = {name: [row for row in own if row["name"] == name] for name in ARMS[stage]}
        arms = {name: some for name, some in arms.items() if some}
        if arms:
            parts += [title, made(arms), table(arms, MEASURES, "arm"), ruler_line(own[0])]
    return "\n\n".join(parts) + "\n"


def ruler_line(row: Row) -> str:
    points = [(n, row["ruler"][n - 1]) for n in (2, 4, 8, 16)]
    best = [f"n = {n}: {at['reward']:.2f} at {at['kl']:.3f}, {gain_per_nat(row, at):.2f}" for n, at in points]
    return (
        f"Before: {row['before']['reward']:.3f}. The best of n samples of the reference, with the KL that it costs at "
        f"most and the gain per sqrt(nat): {'; '.join(best)}."
    )


if __name__ == "__main__":
    sys.exit(main())
