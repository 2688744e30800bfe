"""Part two of the study: does a KL budget hold, on rewards, algorithms and rates that it was not tuned for?

    python bench/study/budget.py                   # the grid, the budget's runs first; run it again to go on
    python bench/study/budget.py --stages long     # 1,500 steps of a small model
    python bench/study/budget.py --report          # only the tables and the pictures, from the rows that are there

Rows go to bench/results/budget.jsonl, one a run, with its curves; tables and pictures beside them (docs/study.md).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a checkout that is not installed

from bench.measurement.machine import ROOT
from bench.study import design, run
from bench.study.arms import Spec
from bench.study.budget_report import write_report
from bench.study.report import read_rows
from bench.study.small_model import make_small_model
from safe_train.config import SafeConfig
from safe_train.engines.projection import Budget, OverBudget
from safe_train.paper import make_trainer
from safe_train.trainer import SafeTrainer

CURVES = ("reward", "reward_std", "kl", "kl_coef", "entropy", "time/step_s", "time/budget_s") + tuple(
    f"budget/{name}" for name in ("margin", "kl_reached", "kl", "scale", "forwards")
)

STAGES = ("grid", "outside", "variants", "long", "ensembles")


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    if args.worker:
        return work(args.worker)
    run.prepare(args)
    failed = 0
    for stage in () if args.report else args.stages:
        if stage in ("long", "ensembles"):
            make_small_model(ROOT / design.SMALL_MODEL)
        specs = planned(stage, args)
        done = {row["key"] for row in read_rows(args.results)}
        failed += run.make([spec for spec in specs if spec.key not in done][: args.most], args)
    write_report(args.results)
    print(args.results.with_suffix(".md").read_text())
    return 1 if failed else 0


def planned(stage: str, args: argparse.Namespace) -> list[Spec]:
    return {
        "grid": lambda: design.grid(args.count, args.baselines, args.steps, args.overrides),
        "outside": lambda: design.outside(args.steps, args.overrides),
        "variants": lambda: design.variants(args.count, args.steps, args.overrides),
        "long": lambda: design.long(args.long_steps, args.overrides),
        "ensembles": lambda: design.ensembles(args.overrides),
    }[stage]()


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--stages", nargs="+", choices=STAGES, default=["grid"])
    top.add_argument("--count", type=int, default=30, help="runs of the budget in the grid")
    top.add_argument("--baselines", type=int, default=10, help="runs of each arm beside it")
    top.add_argument("--steps", type=int, default=design.GRID_STEPS)
    top.add_argument("--long-steps", type=int, default=design.LONG_STEPS)
    top.add_argument("--most", type=int, help="runs to make now, of those that are left of a stage")
    return run.add_options_of_runs(top, __file__, "budget")


class BudgetWithMoments(Budget):
    """Moves AdamW's moments back with the weights: the first by the scale, the second by its square."""

    def hold(self, *arguments: Any) -> dict[str, float]:
        found = super().hold(*arguments)
        scale = found.get("budget/scale", 1.0)
        for state in self.engine.optimizer.state.values() if scale != 1 else ():
            state["exp_avg"].mul_(scale)
            state["exp_avg_sq"].mul_(scale**2)
        return found


class MomentsTrainer(SafeTrainer):
    def __init__(self, args: SafeConfig):
        super().__init__(args=args)
        self.budget = BudgetWithMoments(self.engine, args)


class AdaptiveTrainer(SafeTrainer):
    make_controller = design.AdaptiveController


OWN_TRAINERS: dict[str, Any] = dict.fromkeys(design.ADAPTIVE, AdaptiveTrainer) | {"moments": MomentsTrainer}


def work(folder: Path) -> int:
    """One run, in a process of its own, to its end or to the error that ended it."""
    values = json.loads((folder / "spec.json").read_text())
    args, error, started = SafeConfig.from_dict(values["settings"]), None, time.process_time()
    name, stage, reward = (values["spec"][key] for key in ("name", "stage", "reward"))
    trainer = OWN_TRAINERS.get(name, make_trainer)(args=args)
    before = run.judged(trainer, reward) if stage in ("long", "ensembles") else None
    try:
        trainer.train(resume_from_checkpoint=True)
    except (FloatingPointError, OverBudget):
        error = traceback.format_exc(limit=0).strip()
    found: dict[str, Any] = {
        "error": error,
        "curves": run.curves(folder, CURVES),
        "cpu_s": time.process_time() - started,
    }
    if before is not None:
        found |= {"before": before, "after": run.judged(trainer, reward)}
    run.write_row(folder, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
