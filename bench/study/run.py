"""Does SAFE keep its promise? Trains every arm on hackable rewards, with the same budget for tuning each.

    python bench/study/run.py                     # sweep, then the main arms on fresh seeds: hours; run again to go on
    python bench/study/run.py --quick             # two arms, one seed, few steps: under ten minutes on two cores
    python bench/study/run.py --stages ablation   # SAFE without each mechanism; also: published, sensitivity
    python bench/study/run.py --report            # only the tables and pictures, from the rows that are there

Rows go to bench/results/study.jsonl, one a run, with its curves; tables to study.md and a picture for each reward
beside them (docs/study.md). A run that has its row is not made again, one that was cut off goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a checkout that is not installed

from bench.measurement.machine import RESULTS, ROOT
from bench.study import arms, rewards
from bench.study.arms import ARMS, BASE, BY_REWARD, CHANGES, Settings, Spec, base_of
from bench.study.design import SMALL_MODEL
from bench.study.report import Row, best, read_rows, write_report
from bench.study.small_model import make_small_model
from safe_train.config import SafeConfig, parse
from safe_train.run.evaluation import Evaluation
from safe_train.run.report import read_metrics
from safe_train.run.run_folder import append, commit, strict_json

STAGES = ("sweep", "main", "published", "ablation", "sensitivity")
CURVES = ("reward", "reward_std", "kl", "kl_threshold", "kl_coef", "entropy", "value_loss", "time/step_s")
ROW, LOG = "row.json", "log.txt"


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    if args.worker:
        return work(args.worker)
    prepare(args)
    if args.quick:
        args.rewards, args.arms, args.seeds, args.steps, args.sweep_steps = ["vader"], ["safe", "ppo"], 1, 8, 2
        args.results = args.runs / "quick.jsonl"
    failed = 0
    for stage in () if args.report else args.stages:
        done = {row["key"] for row in read_rows(args.results)}
        specs = [spec for spec in plan(stage, args) if spec.key not in done]
        print(f"{stage}: {len(specs)} runs to make", flush=True)
        failed += make(specs, args)
    write_report(args.results)
    print(args.results.with_suffix(".md").read_text())
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--stages", nargs="+", choices=STAGES, default=["sweep", "main"])
    top.add_argument("--rewards", nargs="+", choices=("vader", "word_count", "noisy", "exploit"))
    top.add_argument(
        "--arms", nargs="+", choices=tuple(ARMS), default=list(arms.MAIN), help="of the sweep and the main runs"
    )
    top.add_argument(
        "--only", default="", metavar="REGEX", help="of the ablation and the sensitivity: changes of such a name"
    )
    top.add_argument("--seeds", type=int, default=3, help="fresh seeds of each arm")
    top.add_argument("--steps", type=int, default=30, help="of a run on a fresh seed")
    top.add_argument("--sweep-steps", type=int, help="half of --steps, if not given")
    top.add_argument("--quick", action="store_true")
    top.set_defaults(rewards=["vader", "word_count"])
    return add_options_of_runs(top, __file__, "study")


def add_options_of_runs(top: argparse.ArgumentParser, script: str, name: str) -> argparse.ArgumentParser:
    """What both parts of the study ask for. `script` is started for each run, with --worker."""
    top.add_argument("--jobs", type=int, default=2, help="runs at once, which share the cores; 1 for a GPU")
    top.add_argument("--set", nargs="+", default=[], metavar="key=value", help="settings for all runs")
    top.add_argument("--runs", type=Path, default=Path("runs") / name, help="where the runs are")
    top.add_argument("--results", type=Path, default=RESULTS / f"{name}.jsonl")
    top.add_argument("--report", action="store_true")
    top.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    top.set_defaults(script=script)
    return top


def prepare(args: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the runs, after a checkpoint
    args.runs, args.results = args.runs.resolve(), args.results.resolve()
    args.overrides = {key: parse(key, value) for key, _, value in (pair.partition("=") for pair in args.set)}


def plan(stage: str, args: argparse.Namespace) -> Iterator[Spec]:
    """The runs of a stage. All but the sweep take the settings that the sweep chose."""
    rows = {row["key"]: row for row in read_rows(args.results)}
    for reward in args.rewards:
        if stage == "sweep":
            for name in args.arms:
                yield from sweep(reward, name, args).values()
            continue
        base = BASE | BY_REWARD.get(reward, {}) | arms.FRESH | args.overrides
        for name, settings in changes(stage, reward, rows, args).items():
            for seed in range(args.seeds):
                yield Spec(stage, reward, name, seed, args.steps, base, settings)


def sweep(reward: str, name: str, args: argparse.Namespace) -> dict[int, Spec]:
    """The runs that an arm chooses among, by their place in its grid."""
    base = BASE | BY_REWARD.get(reward, {}) | arms.DEVELOPMENT | args.overrides
    settings = (ARMS[name].settings | setting for setting in ARMS[name].grid)
    steps = args.sweep_steps or args.steps // 2
    return {i: Spec("sweep", reward, name, arms.DEVELOPMENT_SEED, steps, base, s) for i, s in enumerate(settings)}


def changes(stage: str, reward: str, rows: dict[str, Row], args: argparse.Namespace) -> dict[str, Settings]:
    """Name and settings of what a stage runs on fresh seeds."""

    def chosen(name: str) -> Settings:
        specs = sweep(reward, name, args)
        missing = [spec.key for spec in specs.values() if spec.key not in rows]
        if missing:
            raise SystemExit(f"make the sweep of {name} on {reward} first: it has no row of {missing[0]}")
        return specs[best([rows[spec.key] for spec in specs.values()])].settings

    if stage in ("main", "published"):
        return {name: chosen(name) for name in (args.arms if stage == "main" else arms.PUBLISHED)}
    wanted = {name: change for name, change in CHANGES[stage].items() if re.search(args.only, name)}
    return {name: chosen(base_of(name)) | change for name, change in wanted.items()}


def make_and_report(
    specs: Callable[[], list[Spec]], args: argparse.Namespace, report: Callable[[list[Row]], str]
) -> int:
    """Makes the runs that have no row yet, and writes the tables beside the rows. Returns how many failed."""
    prepare(args)
    done = {row["key"] for row in read_rows(args.results)}
    left = [] if args.report else [spec for spec in specs() if spec.key not in done]
    if any(spec.base["model"] == SMALL_MODEL for spec in left):
        make_small_model(ROOT / SMALL_MODEL)
    failed = make(left, args)
    text = report(read_rows(args.results))
    args.results.with_suffix(".md").write_text(text)
    print(text)
    return failed


def make(specs: list[Spec], args: argparse.Namespace) -> int:
    """Makes the runs, `jobs` at a time, and appends a row for each. Returns how many failed."""
    from tqdm import tqdm

    waiting, failed = list(reversed(specs)), 0
    running: dict[subprocess.Popen, Spec] = {}
    folders = {spec.key: folder_of(spec, args) for spec in specs}
    with tqdm(total=sum(spec.steps for spec in specs), unit="step", smoothing=0) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < args.jobs:
                    spec = waiting.pop()
                    running[start(spec, folders[spec.key], args)] = spec
                time.sleep(1)
                for process in [process for process in running if process.poll() is not None]:
                    folder = folders[running.pop(process).key]
                    failed += not collect(folder, args.results)
                bar.n = sum(steps_of(folder) for folder in folders.values())
                bar.refresh()
        finally:
            for process in running:
                process.terminate()  # after a checkpoint
            for process in running:
                process.wait()
    return failed


def folder_of(spec: Spec, args: argparse.Namespace) -> Path:
    """Of this run at this commit: another version starts it anew."""
    digest = hashlib.sha256(f"{spec.key} {commit()}".encode()).hexdigest()[:8]
    return args.runs / spec.reward / f"{spec.stage}-{spec.name}-{digest}".replace(" ", "-").replace(",", "")


def steps_of(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.is_file() else 0


def start(spec: Spec, folder: Path, args: argparse.Namespace) -> subprocess.Popen:
    folder.mkdir(parents=True, exist_ok=True)
    own = {"seed": spec.seed, "total_steps": spec.steps, "output_dir": str(folder)}
    asked = [f"{rewards.__file__}:{name}" for name in spec.reward.split("+")]
    settings = spec.base | spec.settings | own | {"reward": asked}
    values = {"key": spec.key, "spec": dataclasses.asdict(spec), "settings": settings}
    (folder / "spec.json").write_text(json.dumps(values))
    threads = {} if args.jobs == 1 else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
    with (folder / LOG).open("a") as log:
        command = [sys.executable, args.script, "--worker", str(folder)]
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=os.environ | threads)


def collect(folder: Path, results: Path) -> bool:
    """Appends the row of a run that has ended; says so if it left none."""
    row = folder / ROW
    if not row.is_file():
        tail = "\n  ".join((folder / LOG).read_text().splitlines()[-5:])
        print(f"\n{folder} failed:\n  {tail}", file=sys.stderr)
        return False
    append(results, [json.loads(row.read_text())])
    return True


def judged(trainer: Any, reward: str) -> dict[str, float]:
    """Numbers on held-out prompts, the gold reward among them."""
    return judgement(trainer.evaluate(), reward)


def judgement(found: Evaluation, reward: str) -> dict[str, float]:
    prompts, completions, *_ = found.rollout.for_rewards()
    return found.numbers() | {"gold": statistics.fmean(rewards.GOLD[reward](prompts, completions))}


def curves(folder: Path, names: Sequence[str] = CURVES) -> dict[str, list[float]]:
    """Of each step; NaN where a step did not measure it."""
    rows = read_metrics(folder)
    return {name: [row.get(name, math.nan) for row in rows] for name in names}


def work(folder: Path) -> int:
    """One run, in a process of its own: trained, or trained on, and judged on held-out prompts before and after."""
    from safe_train.paper import make_trainer

    values = json.loads((folder / "spec.json").read_text())
    args = SafeConfig.from_dict(values["settings"])
    trainer = make_trainer(args)
    before, error = judged(trainer, values["spec"]["reward"]), None
    try:
        trainer.train(resume_from_checkpoint=True)
    except FloatingPointError:
        error = traceback.format_exc(limit=0).strip()
    after = judged(trainer, values["spec"]["reward"])
    write_row(folder, {"error": error, "before": before, "after": after, "curves": curves(folder)})
    return 0


def write_row(folder: Path, found: dict[str, Any]) -> None:
    """The row of a run that has ended: what it was, what was found, and where it was made."""
    values = json.loads((folder / "spec.json").read_text())
    made = json.loads((folder / "environment.json").read_text())
    unfinished = folder / "row.unfinished"
    unfinished.write_text(strict_json({"key": values["key"], **values["spec"], **found, **made}))
    unfinished.replace(folder / ROW)


if __name__ == "__main__":
    sys.exit(main())
