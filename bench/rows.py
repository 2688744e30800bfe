"""Rows of results: one a provider, workload and pass; how they are stored, and how they look in a terminal."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workloads import SEED, Workload

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
    seed: int = SEED


def record(run: Run, suite: str, workload: Workload, row: Row) -> dict[str, Any]:
    """A row as it is stored; `suite` is kernels, trainer, integrations, gate or tune."""
    fields = [dataclasses.asdict(part) for part in (run, workload, row)]
    return {"suite": suite} | fields[0] | fields[1] | fields[2]


def append(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(r) + "\n" for r in records)


def table(workload: Workload, rows: list[Row]) -> str:
    """A line a provider; times as many times faster than plain PyTorch, memory beyond inputs and gradients."""
    parts = [part for part in dict.fromkeys(row.part for row in rows) if part != ALL_PASSES]
    width = max(28, *(len(row.provider) for row in rows))
    lines = [str(workload), f"  {'':{width}}  {'gate':6}" + "".join(f"  {part:>37}" for part in parts)]
    base = {row.part: row.seconds for row in rows if row.provider in BASELINES}
    for name in dict.fromkeys(row.provider for row in rows):
        of_name = {row.part: row for row in rows if row.provider == name}
        first = next(iter(of_name.values()))
        line = f"  {name:{width}}  {first.gate or '-':6}"
        if first.part == ALL_PASSES:
            line += f"  {first.status}: {first.reason}"
        line += "".join(f"  {_cell(of_name[part], base.get(part)):>37}" for part in parts if part in of_name)
        if first.status == "ok" and first.lacks:
            line += f"  lacks {', '.join(first.lacks)}"
        lines.append(line)
    return "\n".join(lines)


def _cell(row: Row, base: float | None) -> str:
    if row.seconds is None:
        return row.status
    ratio = f"{base / row.seconds:6.2f}x" if base else " " * 7
    memory = "" if row.peak_bytes is None else f"{(row.peak_bytes - (row.gradient_bytes or 0)) / 2**20:8.1f} MiB"
    share = "" if row.roof_share is None else f"{row.roof_share:5.0%}"
    return f"{1e3 * row.seconds:.2f} ms{ratio}{memory}{share}"
