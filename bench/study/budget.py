"""Part two of the study: does a KL budget hold, on rewards, algorithms and rates that it was not tuned for?

    python bench/study/budget.py                   # the grid, the budget's runs first; run it again to go on
    python bench/study/budget.py --stages long     # 1,500 steps of a small model
    python bench/study/budget.py --report          # only the tables and the pictures, from the rows that are there

Rows go to bench/results/budget.jsonl, one a run, with its curves; tables and pictures beside them (docs/study.md).
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a checkout that is not installed

from bench.measurement.machine import RESULTS
from bench.study import design, run
from bench.study.report import read_rows
from safe_train.config import SafeConfig, parse
from safe_train.engines.projection import OverBudget
from safe_train.paper import make_trainer
from safe_train.trainer import SafeTrainer

CURVES = ("reward", "kl", "kl_coef", "entropy", "budget/margin", "budget/kl_reached", "budget/kl", "budget/scale")
CURVES += ("budget/forwards", "time/step_s", "time/budget_s")


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    if args.worker:
        return work(args.worker)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the runs, after a checkpoint
    args.runs, args.results = args.runs.resolve(), args.results.resolve()
    overrides = {key: parse(key, value) for key, _, value in (pair.partition("=") for pair in args.set)}
    failed = 0
    for _ in () if args.report else args.stages:
        done = {row["key"] for row in read_rows(args.results)}
        specs = [
            spec for spec in design.grid(args.count, args.baselines, args.steps, overrides) if spec.key not in done
        ]
        failed += run.make(specs, args)
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--stages", nargs="+", choices=("grid", "long"), default=["grid"])
    top.add_argument("--count", type=int, default=30, help="runs of the budget in the grid")
    top.add_argument("--baselines", type=int, default=10, help="runs of each arm beside it")
    top.add_argument("--steps", type=int, default=design.GRID_STEPS)
    top.add_argument("--jobs", type=int, default=2, help="runs at once, which share the cores; 1 for a GPU")
    top.add_argument("--set", nargs="+", default=[], metavar="key=value", help="settings for all runs")
    top.add_argument("--runs", type=Path, default=Path("runs/budget"), help="where the runs are")
    top.add_argument("--results", type=Path, default=RESULTS / "budget.jsonl")
    top.add_argument("--report", action="store_true")
    top.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    top.set_defaults(script=__file__)
    return top


class AdaptiveTrainer(SafeTrainer):
    make_controller = design.AdaptiveController


def work(folder: Path) -> int:
    """One run, in a process of its own, to its end or to the error that ended it."""
    values = json.loads((folder / "spec.json").read_text())
    args, error, started = SafeConfig.from_dict(values["settings"]), None, time.process_time()
    trainer = AdaptiveTrainer(args=args) if values["spec"]["name"] in design.ADAPTIVE else make_trainer(args)
    try:
        trainer.train(resume_from_checkpoint=True)
    except (FloatingPointError, OverBudget):
        error = traceback.format_exc(limit=0).strip()
    found = {"error": error, "curves": run.curves(folder, CURVES), "cpu_s": time.process_time() - started}
    run.write_row(folder, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
