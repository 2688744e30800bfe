"""Launch choices of the Triton backend: what is tried, each candidate behind the gate and timed, and the ranking."""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch

from bench.measurement.rows import Row
from bench.measurement.workloads import Workload, gae, make_case, of
from bench.providers.ours import ours
from bench.providers.provider import Provider
from bench.suites.gate import Gate
from bench.suites.kernels import Settings, first_line, progress, rows_of
from safe_kernels.triton_backend import launch

ACCUMULATORS = 128  # float32 registers of a thread that may hold sums


@dataclass(frozen=True)
class Knob:
    """A name in launch.py, or a key of a table there, with the choices to try and what they are timed on."""

    name: str
    key: tuple[Any, ...] | None
    choices: tuple[Any, ...]
    workloads: tuple[Workload, ...]
    options: tuple[tuple[str, Any], ...] = ()  # of the public function

    def __str__(self) -> str:
        return self.name if self.key is None else f"{self.name}[{', '.join(map(repr, self.key))}]"

    def current(self) -> Any:
        value = getattr(launch, self.name)
        return value if self.key is None else value[self.key]

    def set(self, choice: Any) -> contextlib.AbstractContextManager[Any]:
        if self.key is not None:
            return mock.patch.dict(getattr(launch, self.name), {self.key: choice})
        return mock.patch.object(launch, self.name, choice)


def knobs(device: torch.device) -> list[Knob]:
    """What is searched, at the shape of Qwen2.5-3B with 8192 tokens."""
    rows = [
        launch.RowChoice(rows, columns, warps)
        for rows, columns, warps in itertools.product((1, 2), (1024, 2048, 4096, 8192, 16_384), (4, 8, 16, 32))
        if 8 <= rows * columns // (32 * warps) <= 32
    ]
    scans = [launch.ScanChoice(t, w) for t, w in itertools.product((256, 512, 1024, 2048, 4096), (1, 2, 4, 8, 16))
             if 1 <= t // (32 * w) <= 16]  # fmt: skip
    logits, hidden, loss = (_pair(entrance) for entrance in ("logits", "hidden", "loss"))
    found = [
        Knob("ROWS", None, tuple(rows), logits),
        Knob("TILE_BYTES", None, tuple(n << 20 for n in (48, 64, 96, 128, 192, 256)), hidden),
        Knob("ROWS_OF_A_TILE", None, (2048, 4096, 8192), hidden),
        Knob("SWEEP_BYTES", None, tuple(n << 20 for n in (128, 256, 384, 512, 768, 1024)), loss),
        Knob("SCAN", None, tuple(scans), (gae(64, 1024), gae(16, 16_384))),
    ]
    target, invariant = launch.architecture(device), (("batch_invariant", True),)
    works = (("statistics", hidden[:1], 1), ("with reference", hidden[1:], 2), ("product", hidden[:1], 1))
    for work, workload, sums in works:
        key = (target, work, 16)
        table = "PLAIN" if key in launch.PLAIN else "GEMMS"  # the workloads have neither bias nor softcap
        found.append(Knob(table, key, _gemms(getattr(launch, table)[key], sums), workload, invariant))
    found.append(Knob("ROW_TILES_TOGETHER", None, (4, 8, 16, 32, 64), hidden[:1], invariant))
    return found


def _pair(entrance: str) -> tuple[Workload, ...]:
    return tuple(of(entrance, "Qwen2.5-3B", 8192, kl=kl, dtype="bfloat16") for kl in (False, True))


def _gemms(shipped: Any, sums: int) -> tuple[Any, ...]:
    """Tiles, warps and depths of pipeline whose `sums` accumulators fit the registers; bulk loads or not; splits."""
    tiles = ((128, 128, 64), (128, 256, 64), (256, 128, 64), (128, 64, 64), (64, 128, 64), (128, 128, 32))
    found = [
        replace(shipped, rows=rows, columns=columns, inner=inner, num_warps=warps, num_stages=stages)
        for (rows, columns, inner), warps, stages in itertools.product(tiles, (8, 4), (4, 3))
        if sums * rows * columns // (32 * warps) <= ACCUMULATORS
    ]
    others = [replace(shipped, descriptors=not shipped.descriptors)]
    return (*others, *(replace(shipped, split=split) for split in (1024, 4096, 8192)), *found)


Found = list[tuple[Workload, Row, Any]]


def search(knob: Knob, settings: Settings, deadline: float) -> Found:
    """Rows of every candidate on every workload, the shipped one first; a failure is a row."""
    choices = list(dict.fromkeys((knob.current(), *knob.choices)))
    gates: dict[Workload, Gate] = {}
    found: Found = []
    for i, choice in enumerate(progress(choices, str(knob))):
        if time.time() > deadline:
            print(f"{knob}: out of time, {len(choices) - i} candidates not tried: {choices[i:]}")
            break
        with knob.set(choice):
            for workload in knob.workloads:
                try:
                    if workload not in gates:
                        gates[workload] = Gate(workload, make_case(workload, settings.device))
                except torch.OutOfMemoryError as error:
                    sys.exit(f"{workload} does not fit this device: {first_line(error)}")
                run = ours(workload.entrance, "triton", **dict(knob.options))
                provider = Provider("safe-kernels triton", workload.entrance, workload.outputs, run)
                rows = rows_of([provider], gates[workload], settings)
                found += [(workload, replace(row, choice=f"{knob} = {choice}"), choice) for row in rows]
    return found


def ranked(found: Found) -> list[tuple[Any, float]]:
    """Candidates that ran everywhere, by the sum of their medians."""
    most = max((sum(1 for f in found if f[2] == choice) for *_, choice in found), default=0)
    totals = {}
    for *_, choice in found:
        seconds = [row.seconds for _, row, other in found if other == choice]
        if len(seconds) == most and all(s is not None for s in seconds):
            totals[choice] = sum(s for s in seconds if s is not None)
    return sorted(totals.items(), key=lambda item: item[1])


def line(knob: Knob, ranking: list[tuple[Any, float]], before: Any) -> str:
    """For launch.py: the best choice, its time, and that of the choice before."""
    if not ranking:
        return f"# {knob}: no candidate ran"
    (best, seconds), shipped = ranking[0], dict(ranking).get(before)
    was = "not measured" if shipped is None else f"{1e3 * shipped:.2f} ms"
    return f"{knob} = {best}  # {1e3 * seconds:.2f} ms; shipped: {was}"


def listing(found: Found, ranking: list[tuple[Any, float]]) -> str:
    lines = []
    for choice, total in ranking:
        parts = ", ".join(f"{1e3 * row.seconds:.2f}" for _, row, c in found if c == choice and row.seconds is not None)
        lines.append(f"  {1e3 * total:9.2f} ms  {choice}  ({parts})")
    good = dict(ranking)
    for workload, row, choice in found:
        if choice not in good and row.seconds is None:
            lines.append(f"  {row.status:>12}  {choice}, {workload.entrance}{' with KL' * workload.kl}: {row.reason}")
    return "\n".join(lines)
