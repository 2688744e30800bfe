"""Rows of results: one a provider, workload and pass, and how they are stored."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measurement.machine import commit, identity
from bench.measurement.timing import Timing
from bench.measurement.workloads import SEED, Workload

BASELINES = ("pytorch", "published layout")
ALL_PASSES = "all passes"


@dataclass(frozen=True)
class Run:
    """What all rows of one run share."""

    time: str  # UTC, of its start
    machine: dict[str, str]
    commit: str
    dirty: bool | None  # files differed from the commit; None where that is unknown
    device: str

    @classmethod
    def begin(cls, device: str, given_commit: str | None) -> Run:
        return cls(now(), identity(device), *commit(given_commit), device)

    def path(self, folder: Path) -> Path:
        return folder / f"{self.machine['name']}.jsonl"


@dataclass(frozen=True)
class Row:
    """A row of the results file, next to the fields of its Run and its Workload."""

    part: str  # the pass, or ALL_PASSES where none was timed
    provider: str
    version: str | None
    status: str  # ok, red, lacks, not installed, cannot run, failed (ours), too slow, no inputs, out of memory
    reason: str = ""  # where it is not ok, or no pass was timed
    gate: str | None = None  # green, rounds or red; None where it did not run
    errors: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    lacks: tuple[str, ...] = ()  # outputs that it does not have: it is judged and timed without
    seconds: float | None = None
    seconds_low: float | None = None  # 10th percentile
    seconds_high: float | None = None  # 90th
    repeats: int = 0
    peak_bytes: int | None = None  # beyond the inputs, gradients included
    gradient_bytes: int | None = None
    flops: float | None = None  # counted, of the arithmetic floor
    bytes: float | None = None
    matmul_roof: float | None = None  # FLOP/s, measured in the same run
    copy_roof: float | None = None  # bytes/s
    roof_share: float | None = None  # time of the arithmetic floor / seconds
    choice: str | None = None  # of a launch, in tune.py
    units: float | None = None  # in suite host: seconds / those of an empty launch
    seed: int = SEED

    def timed(self, timing: Timing) -> Row:
        seconds, low, high, repeats = timing
        return dataclasses.replace(self, seconds=seconds, seconds_low=low, seconds_high=high, repeats=repeats)


def record(run: Run, suite: str, workload: Workload, row: Row) -> dict[str, Any]:
    """A row as it is stored; `suite` is kernels, trainer, integrations, host, gate, gpu or tune."""
    fields = [dataclasses.asdict(part) for part in (run, workload, row)]
    return {"suite": suite} | fields[0] | fields[1] | fields[2]


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def append(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(r) + "\n" for r in records)
