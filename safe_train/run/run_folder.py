"""What a run leaves on disk beside its checkpoints: settings, environment, metrics, completions and the report."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from safe_train import parallel
from safe_train.config import ConfigError, SafeConfig, read_yaml
from safe_train.rewards.rewards import Scores
from safe_train.run import folder_lock, trackers
from safe_train.run.evaluation import Evaluation
from safe_train.run.hardware import processor
from safe_train.run.metrics import as_rows, completion_columns
from safe_train.run.report import read_rows, strict_json, write_report
from safe_train.sampling.rollout import Rollout
from safe_train.settings.written import plain

PACKAGES = ("safe-kernels", "torch", "triton", "transformers", "accelerate", "peft", "flash-attn", "liger-kernel")


class RunFolder:
    """Appends to a run's files; on resume, drops the rows written after the checkpoint, which will be made again.

    Only the first process writes.
    """

    def __init__(self, args: SafeConfig, accelerator: Accelerator, resume_at: int = 0, layout: str | None = None):
        self.path, self.accelerator = Path(args.output_dir), accelerator
        self.metrics, self.samples = self.path / "metrics.jsonl", self.path / "samples.jsonl"
        self.evaluations, self.tokens = self.path / "evaluation.jsonl", self.path / "tokens.jsonl"
        self.open(args, resume_at, layout)

    @parallel.main_only
    def open(self, args: SafeConfig, resume_at: int, layout: str | None) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        if resume_at == 0:
            self.refuse_to_erase(args)
        for rows in (self.metrics, self.samples, self.tokens, self.evaluations):
            keep_rows(rows, resume_at)
        found = {**environment(self.accelerator.device), "layout": layout}
        (self.path / "environment.json").write_text(json.dumps(found, indent=2) + "\n")
        args.save(self.path / "config.yaml")
        if args.report_to:
            self.accelerator.init_trackers("safe_train", config={k: str(v) for k, v in args.items()})

    def refuse_to_erase(self, args: SafeConfig) -> None:
        """Rows past the step of the first checkpoint are of a run that had one."""
        rows = read_rows(self.metrics) if self.metrics.exists() else []
        last = max((row["step"] for row in rows), default=0)
        saved = self.path / "config.yaml"
        settings = plain(read_yaml(saved)) if saved.is_file() else {}
        if last > settings.get("save_every", args.save_every):
            raise ConfigError(
                f"{self.metrics} has {last} steps, and {self.path / 'checkpoints'} no checkpoint to continue from; "
                "starting at step 0 would erase them. Put the checkpoints back, or choose another output_dir"
            )

    @parallel.main_only
    def log(self, step: int, metrics: dict[str, Any]) -> None:
        append(self.metrics, [{"step": step, **metrics}])
        self.accelerator.log({k: v for k, v in metrics.items() if not isinstance(v, str)}, step=step)

    @parallel.main_only
    def log_samples(self, step: int, rollout: Rollout, scores: Scores, tokens: Sequence[dict[str, Any]]) -> None:
        """A row a completion: each reward, and what the rewards logged beside it; and the tokens of a few."""
        columns = completion_columns(rollout, scores)
        append(self.tokens, [{"step": step, **row} for row in tokens])
        rows = as_rows(columns | scores.columns(taken=("step", *columns)), step=step)
        append(self.samples, rows)
        trackers.send_samples(self.accelerator.trackers, rows, scores["reward"], step)

    @parallel.main_only
    def log_evaluation(self, step: int, evaluation: Evaluation) -> None:
        append(self.evaluations, evaluation.rows(step))

    @parallel.main_only
    def finish(self, step: int) -> None:
        write_report([self.path], picture := self.path / "report.png")
        if self.accelerator.trackers:
            trackers.send_picture(self.accelerator.trackers, picture, step)
        for tracker in self.accelerator.trackers:
            tracker.finish()


def refuse_existing(run: Path) -> None:
    """A run is never overwritten by accident."""
    metrics = run / "metrics.jsonl"
    if metrics.exists() and metrics.stat().st_size > 0:
        raise ConfigError(
            f"{run} already holds a run; continue it with --resume (in Python train(resume_from_checkpoint=True)), "
            "replace it with --overwrite (in Python delete it first), or choose another output_dir"
        )


def refuse_foreign(folder: Path) -> None:
    """A folder that holds something else than a run is never replaced."""
    is_run = all((folder / name).is_file() for name in ("config.yaml", "environment.json"))
    if folder.exists() and any(path.name != folder_lock.NAME for path in folder.iterdir()) and not is_run:
        raise ConfigError(f"{folder} is not a run folder (no config.yaml and environment.json); not overwriting it")


@parallel.main_only
def remove_run(folder: Path) -> None:
    for path in folder.iterdir() if folder.exists() else ():
        if path.name == folder_lock.NAME:  # by which this process keeps others out
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    try:
        with path.open("a") as file:
            file.writelines(strict_json(row) + "\n" for row in rows)
    except OSError as error:
        raise OSError(
            f"cannot write {path}: {error}. The run stops; when there is room, continue from its last checkpoint with "
            "--resume"
        ) from error


def keep_rows(path: Path, last_step: int) -> None:
    """Keeps the rows up to `last_step`; a row that a crash cut short is dropped, too. A kill leaves the old file."""
    if not path.exists():
        return
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(strict_json(row) + "\n" for row in read_rows(path) if row["step"] <= last_step))
    unfinished.replace(path)


@cache
def environment(device: torch.device) -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {"python": platform.python_version(), "device": str(device), "device_name": name, "packages": versions,
            "commit": commit()}  # fmt: skip


def commit() -> str | None:
    """The commit of the source tree, when it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git on this machine
        return None
    return result.stdout.strip() or None
