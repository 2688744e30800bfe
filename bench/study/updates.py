"""Part three of the study: what bounds an update, and the best of n samples as a teacher.

    python bench/study/updates.py --jobs 1         # six runs a seed; run it again to go on
    python bench/study/updates.py --report         # only the tables, from the rows that are there

The model is the small one of the long runs of part two. The stage `trust_region` takes GRPO far from its rollout, 12
optimizer steps each, and bounds the way by the clip of the sampled token's ratio, by the exact KL or total variation to
the policy that sampled, or not at all. The stage `best_of_n` has GRPO beside the distillation of the best of n samples
of the reference. Rows go to bench/results/updates.jsonl, tables beside them (docs/study.md).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a checkout that is not installed

from bench.study import run
from bench.study.arms import Settings, Spec
from bench.study.budget_report import Measure, made, table
from bench.study.design import LONG
from bench.study.report import Row
from safe_kernels import PolicyLoss, linear_token_stats
from safe_train.algorithms import losses
from safe_train.algorithms.advantages import per_token
from safe_train.config import SafeConfig
from safe_train.models import adapters
from safe_train.run.frontier import ruler
from safe_train.trainer import SafeTrainer

SEEDS, STEPS, N = 1, 40, 4  # N of the best of n, which are all completions of a prompt
UNCLIPPED: Settings = {"clip_low": math.inf, "clip_high": math.inf}
COMMON: Settings = LONG | {"algorithm": "grpo", "learning_rate": 1e-3}
FAR: Settings = {"inner_epochs": 3, "minibatch_size": 4}
ARMS: dict[str, dict[str, Settings]] = {
    "trust_region": {
        "clip 0.2": FAR,
        "no bound": FAR | UNCLIPPED,
        "exact KL 0.05": FAR | UNCLIPPED | {"trust_region_kl": 0.05},
        "exact TV 0.15": FAR | UNCLIPPED | {"trust_region_tv": 0.15},
    },
    "best_of_n": {"grpo": {}, "best of n": {"beta": 0.0, "entropy_coef": 0.0, "max_sampler_gap": math.inf}},
}
CURVES = ("reward", "kl", "entropy", "clip_fraction", "approx_kl", "ratio_mean", "time/step_s")
LAST = 10  # rollouts


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    if args.worker:
        return work(args.worker)
    return 1 if run.make_and_report(lambda: planned(args), args, report) else 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--stages", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    top.add_argument("--steps", type=int, default=STEPS)
    top.add_argument("--seeds", type=int, default=SEEDS)
    return run.add_options_of_runs(top, __file__, "updates")


def planned(args: argparse.Namespace) -> list[Spec]:
    base = COMMON | args.overrides
    return [
        Spec(stage, "vader", name, seed, args.steps, base, settings)
        for seed in range(args.seeds)
        for stage in args.stages
        for name, settings in ARMS[stage].items()
    ]


class BestOfN(SafeTrainer):
    """Distils the best of n samples of the reference: the forward KL to that policy, but for a constant.

    KL(best of n || policy) = E[-log p(y)] + constant, y the best of n samples of the reference. With as many
    completions of a prompt as n the expectation is estimated by the best one.
    """

    def sample(self, step: int) -> Any:
        with adapters.disabled(self.policy.model):
            return super().sample(step)

    def compute_advantages(self, experience: Any, reward_B: Tensor, control: Any) -> None:
        weight_B = chance_to_be_best(reward_B, self.args.completions_per_prompt).float().to(self.device)
        for micro in experience:
            micro.advantage_L = per_token(weight_B[micro.indices], micro.batch.response_cu_seqlens)

    def loss(self, micro: Any, control: Any, totals: losses.Totals) -> tuple[Tensor, dict[str, Tensor]]:
        weight_L = losses.token_weights(micro, totals, self.args) * micro.advantage_L
        hidden_LH = self.engine.forward(micro.batch)
        stats = linear_token_stats(hidden_LH, tokens=micro.batch.targets_L, **self.policy.head())
        loss = -(weight_L * stats.logprob).sum()
        seen = (stats.logprob.detach(), stats.entropy.detach(), micro.ref_logprob_L, micro.kl_L, loss.new_zeros(()))
        return loss, losses.means(PolicyLoss(loss, *seen), torch.zeros_like(loss), micro, totals)


def chance_to_be_best(reward_B: Tensor, size: int) -> Tensor:
    """[B]: 1 for the best of each prompt's `size` completions, shared equally by those that are equal."""
    reward_PG = reward_B.view(-1, size)
    is_best_PG = (reward_PG == reward_PG.amax(1, keepdim=True)).double()
    return (is_best_PG / is_best_PG.sum(1, keepdim=True)).view(-1)


def work(folder: Path) -> int:
    """One run, in a process of its own, judged on held-out prompts before and after."""
    values = json.loads((folder / "spec.json").read_text())
    started, error, reward = time.process_time(), None, values["spec"]["reward"]
    trainer_class = BestOfN if values["spec"]["name"] == "best of n" else SafeTrainer
    trainer = trainer_class(args=SafeConfig.from_dict(values["settings"]))
    reference = trainer.evaluate()
    best = ruler(reference.rows(step=0))[N - 1]
    try:
        trainer.train(resume_from_checkpoint=True)
    except FloatingPointError:
        error = traceback.format_exc(limit=0).strip()
    found: Row = {"error": error, "before": run.judgement(reference, reward), "after": run.judged(trainer, reward)}
    found |= {"best_of_n": best._asdict(), "curves": run.curves(folder, CURVES)}
    run.write_row(folder, found | {"cpu_s": time.process_time() - started})
    return 0


def curve(name: str, part: slice = slice(None)) -> Callable[[Sequence[Row]], float]:
    return lambda rows: statistics.fmean(statistics.fmean(row["curves"][name][part]) for row in rows)


def after(name: str) -> Callable[[Sequence[Row]], float]:
    return lambda rows: statistics.fmean(row["after"][name] for row in rows)


def gain_per_nat(row: Row, at: Row) -> float:
    """Reward above that of the reference per sqrt(nat) of a completion of the full length."""
    nats = at["kl"] * row["base"]["max_new_tokens"]
    return (at["reward"] - row["before"]["reward"]) / math.sqrt(nats) if nats > 0 else math.nan


def bought(rows: Sequence[Row]) -> float:
    return statistics.fmean(gain_per_nat(row, row["after"]) for row in rows)


def spread(rows: Sequence[Row]) -> float:
    """Largest less smallest held-out reward of the seeds."""
    rewards = [row["after"]["reward"] for row in rows]
    return max(rewards) - min(rewards)


UPDATES: tuple[Measure, ...] = (
    ("tokens bounded", curve("clip_fraction"), ".1%"),
    ("k3 to the rollout", curve("approx_kl"), ".4f"),
)
SHARED: tuple[Measure, ...] = (
    ("seeds", len, "d"),
    (f"reward, last {LAST}", curve("reward", slice(-LAST, None)), ".2f"),
    (f"KL, last {LAST}", curve("kl", slice(-LAST, None)), ".3f"),
    ("largest KL", lambda rows: max(max(row["curves"]["kl"]) for row in rows), ".3f"),
    ("held-out reward", after("reward"), ".3f"),
    ("its standard error", after("reward_error"), ".3f"),
    ("seeds apart", spread, ".3f"),
    ("gold", after("gold"), ".3f"),
    ("held-out KL", after("kl"), ".3f"),
    ("gain per sqrt(nat)", bought, ".2f"),
)
TITLES = {"trust_region": "## What bounds an update", "best_of_n": "## The best of n as a teacher"}


def report(rows: Sequence[Row]) -> str:
    parts = ["# The tables of part three", "Written by `python bench/study/updates.py --report` from its rows."]
    for stage, title in TITLES.items():
        own = [row for row in rows if row["stage"] == stage]
        arms = {name: [row for row in own if row["name"] == name] for name in dict.fromkeys(r["name"] for r in own)}
        if not arms:
            continue
        best, before = own[0]["best_of_n"], own[0]["before"]["reward"]
        of_best = gain_per_nat(own[0], best)
        parts += [title, made(arms), table(arms, (*UPDATES, *SHARED) if stage == "trust_region" else SHARED, "arm")]
        parts += [
            f"The best of {N} samples of the reference: reward {best['reward']:.3f} ({best['error']:.3f}), KL at most "
            f"{best['kl']:.3f}, {of_best:.2f} per sqrt(nat). Before: reward {before:.3f}."
        ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
