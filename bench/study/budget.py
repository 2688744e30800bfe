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
from bench.study.budget_report import write_report
from bench.study.report import read_rows
from bench.study.small_model import make_small_model
from safe_train.config import SafeConfig
from safe_train.engines.projection import OverBudget
from safe_train.paper import make_trainer
from safe_train.trainer import SafeTrainer

CURVES = ("reward", "reward_std", "kl", "kl_coef", "entropy", "time/step_s", "time/budget_s") + tuple(
    f"budget/{name}" for name in ("margin", "kl_reached", "kl", "scale", "forwards")
)


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    if args.worker:
        return work(args.worker)
    run.prepare(args)
    failed = 0
    for stage in () if args.report else args.stages:
        if stage == "long":
            make_small_model(ROOT / design.SMALL_MODEL)
            specs = design.long(args.long_steps, args.overrides)
        elif stage == "outside":
            specs = design.outside(args.steps, args.overrides)
        else:
            specs = design.grid(args.count, args.baselines, args.steps, args.overrides)
        done = {row["key"] for row in read_rows(args.results)}
        failed += run.make([spec for spec in specs if spec.key not in done][: args.most], args)
    write_report(args.results)
    print(args.results.with_suffix(".md").read_text())
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--stages", nargs="+", choices=("grid", "outside", "long"), default=["grid"])
    top.add_argument("--count", type=int, default=30, help="runs of the budget in the grid")
    top.add_argument("--baselines", type=int, default=10, help="runs of each arm beside it")
    top.add_argument("--steps", type=int, default=design.GRID_STEPS)
    top.add_argument("--long-steps", type=int, default=design.LONG_STEPS)
    top.add_argument("--most", type=int, help="runs to make now, of those that are left of a stage")
    return run.add_options_of_runs(top, __file__, "budget")


class AdaptiveTrainer(SafeTrainer):
    make_controller = design.AdaptiveController


def work(folder: Path) -> int:
    """One run, in a process of its own, to its end or to the error that ended it."""
    values = json.loads((folder / "spec.json").read_text())
    args, error, started = SafeConfig.from_dict(values["settings"]), None, time.process_time()
    trainer = AdaptiveTrainer(args=args) if values["spec"]["name"] in design.ADAPTIVE else make_trainer(args)
    reward = values["spec"]["reward"]
    before = run.judged(trainer, reward) if values["spec"]["stage"] == "long" else None
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
