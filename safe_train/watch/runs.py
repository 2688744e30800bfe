"""A run folder as the page shows it: numbers, state, warnings and settings, read again as they change."""

from __future__ import annotations

import json
import math
import os
import socket
import statistics
import time
from pathlib import Path
from typing import Any

from safe_train.config import ConfigError
from safe_train.run.advice import advice
from safe_train.run.frontier import Evaluated
from safe_train.run.panels import Panel, panels_of
from safe_train.run.report import read_evaluations, settings_of
from safe_train.watch.samples import Samples
from safe_train.watch.tail import Line, Tail

LOCK = "run.lock"  # as in run/folder_lock.py, which imports PyTorch
SILENT_SECONDS, SILENT_STEPS = 120.0, 10.0  # without a row: the longer of these, the second in typical steps


class Metrics:
    """metrics.jsonl by columns, nan where a step has no number."""

    def __init__(self, path: Path):
        self.tail = Tail(path)
        self.steps: list[int] = []
        self.columns: dict[str, list[float]] = {}
        self.texts: dict[str, str] = {}  # the last of each, such as the phase
        self.generation = 0

    def refresh(self) -> None:
        self.tail.feed(self.add, self.clear)
        for column in self.columns.values():
            column += [math.nan] * (len(self.steps) - len(column))

    def clear(self) -> None:
        self.steps, self.columns, self.texts = [], {}, {}
        self.generation += 1

    def add(self, line: Line) -> None:
        count = len(self.steps)
        self.steps.append(line.row["step"])
        for name, value in line.row.items():
            if isinstance(value, str):
                self.texts[name] = value
            elif name != "step" and (value is None or isinstance(value, (int, float))):
                column = self.columns.setdefault(name, [])
                column += [math.nan] * (count - len(column))
                column.append(math.nan if value is None else float(value))

    def last(self, name: str) -> float:
        column = self.columns.get(name)
        return column[-1] if column else math.nan


class WatchedRun:
    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name
        self.metrics = Metrics(path / "metrics.jsonl")
        self.samples = {
            "samples": Samples(path / "samples.jsonl", path / "tokens.jsonl"),
            "evaluation": Samples(path / "evaluation.jsonl"),
        }
        self.settings: dict[str, Any] = {}
        self.environment: dict[str, Any] = {}
        self.problem = ""  # with the settings
        self.evaluated = 0  # changes with what `safe-train eval` left
        self.times: dict[str, int] = {}  # of files when they were last read

    def refresh(self) -> None:
        self.metrics.refresh()
        if self.has_changed("config.yaml"):
            self.read_settings()
        if self.has_changed("environment.json"):
            self.environment = read_json(self.path / "environment.json")
        self.evaluated = hash(tuple(map(time_of, sorted(self.path.glob("eval/*/evaluation.json")))))

    def has_changed(self, name: str) -> bool:
        before, now = self.times.get(name, 0), time_of(self.path / name)
        self.times[name] = now
        return now not in (0, before)

    def read_settings(self) -> None:
        try:
            self.settings, self.problem = settings_of(self.path), ""
        except ConfigError as error:  # half written
            self.problem = str(error)
            self.times.pop("config.yaml")

    @property
    def version(self) -> str:
        """Changes when the panels do."""
        metrics = self.metrics
        return f"{metrics.generation}.{len(metrics.steps)}.{len(self.settings)}.{self.evaluated}"

    @property
    def step(self) -> int:
        return self.metrics.steps[-1] if self.metrics.steps else 0

    @property
    def panels(self) -> list[Panel]:
        return panels_of(self.metrics.columns, self.settings)

    def evaluations(self) -> list[Evaluated]:
        """Those that `safe-train eval` left."""
        return read_evaluations(self.path, self.step) if self.step else []

    def state(self) -> tuple[str, str]:
        """A word, and a sentence for whoever has to do something."""
        total, owner = self.settings.get("total_steps"), read_json(self.path / LOCK)
        if total is not None and self.step >= total:
            return "finished", ""
        after = f"after step {self.step}" + (f" of {total}" if total is not None else "")
        again = f"It goes on with: safe-train run --resume output_dir={self.path}"
        if owner.get("host") == socket.gethostname() and not is_alive(owner.get("pid")):
            return (
                "killed",
                f"The run's process {owner.get('pid')} is gone, {after}. {again}",
            )
        quiet = self.seconds_since_a_step()
        if not owner and self.step and quiet > 5:  # a new row may be seen before the lock
            return "stopped", f"The run stopped {after}. {again}"
        if self.step == 0:
            return ("starting" if owner else "waiting"), ""
        if quiet > max(SILENT_SECONDS, SILENT_STEPS * self.step_seconds()):
            where = f", on {owner['host']}" if "host" in owner else ""
            return "silent", f"No step for {duration(quiet)}: is the run{where} still going on?"
        return "running", ""

    def seconds_since_a_step(self) -> float:
        written = time_of(self.metrics.tail.path) / 1e9
        return max(0.0, time.time() - written) if written else 0.0

    def step_seconds(self) -> float:
        known = [x for x in self.metrics.columns.get("time/step_s", [])[-10:] if math.isfinite(x)]
        return statistics.median(known) if known else 0.0

    def warnings(self, said: str) -> list[str]:
        """What asks for a hand: of the run's state, its files and its numbers."""
        tails = [self.metrics.tail, *(tail for samples in self.samples.values() for tail in samples.tails)]
        files = [f"{tail.path.name} cannot be read: {tail.problem}" for tail in tails if tail.problem]
        files += [
            f"{tail.path.name} has lines that are not JSON rows with a step: {tail.unreadable} are left out."
            for tail in tails
            if tail.unreadable
        ]
        found = advice(self.metrics.columns, self.settings, str(self.environment.get("device", "cpu")))
        return [x for x in (said, self.problem, *files, *found) if x]

    def summary(self) -> dict[str, Any]:
        state, said = self.state()
        total = self.settings.get("total_steps")
        left = (total - self.step) * self.step_seconds() if total and state == "running" else None
        return {
            "name": self.name,
            "folder": str(self.path),
            "algorithm": self.settings.get("algorithm", ""),
            "model": str(self.settings.get("model") or ""),
            "state": state,
            "step": self.step,
            "total": total,
            "left": None if left is None else duration(left),
            "phase": self.metrics.texts.get("phase", "") if self.settings.get("controller") == "safe" else "",
            "reward": self.metrics.last("reward"),
            "kl": self.metrics.last("kl"),
            "version": self.version,
            "warnings": self.warnings(said),
        }


def time_of(path: Path) -> int:
    """When the file was last written, in nanoseconds; 0 if there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.0f} h"


def is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl"))


def find_runs(paths: list[Path]) -> list[WatchedRun]:
    """The runs of these folders; a folder of runs stands for all in it. Their names are as short as they may be.

    Raises:
        ConfigError: a folder that is none, or holds no run.
    """
    folders: list[Path] = []
    for path in paths:
        inner = [path] if is_run(path) else sorted(x for x in path.iterdir() if is_run(x)) if path.is_dir() else []
        if not inner:
            raise ConfigError(f"{path} holds no run (no config.yaml or metrics.jsonl), nor do the folders in it")
        folders += [folder for folder in inner if folder not in folders]
    return named(folders)


def named(folders: list[Path]) -> list[WatchedRun]:
    short = [folder.resolve().name for folder in folders]
    return [
        WatchedRun(folder, name if short.count(name) == 1 else str(folder))
        for folder, name in zip(folders, short, strict=True)
    ]
