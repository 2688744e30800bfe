"""The rows of a workload: every provider behind the gate, then those that are right, timed in turns."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bench.measurement import OURS, timing
from bench.measurement.cost import Roofs, cost
from bench.measurement.rows import ALL_PASSES, Row
from bench.measurement.workloads import Workload, make_case
from bench.providers import providers
from bench.providers.provider import NO_KL, Case, Provider
from bench.suites.gate import Gate, backward


@dataclass(frozen=True)
class Settings:
    device: str
    seconds: float  # of repeats for each pass of each provider
    roofs: dict[str, Roofs]  # by dtype; empty: the gate alone
    interpreter: bool = False
    quick: bool = False
    only_passes: tuple[str, ...] = ()  # () is all

    def passes(self, workload: Workload) -> list[str]:
        return [part for part in workload.passes if part in self.only_passes or not self.only_passes]


def progress(items: Sequence[Any], title: str) -> Iterable[Any]:
    """The items, behind a progress bar where tqdm is installed and a person watches."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return items
    return tqdm(items, desc=title, leave=False, disable=None)


def measured(
    workload: Workload,
    settings: Settings,
    title: str = "",
    only: str | tuple[str, ...] = "",
    offer: Callable[[Workload], list[Provider]] = providers,
) -> list[Row]:
    """Rows of every provider that has something like this operation."""
    offered = [p for p in offer(workload) if p.name.startswith(only)]
    try:
        case = make_case(workload, settings.device)
        gate = Gate(workload, case)
        gate.expected(workload.outputs)
    except Exception as error:  # weights that are not here, or too little memory: neither ends the run
        return [Row(ALL_PASSES, "all", None, "no inputs", first_line(error))]
    rows = rows_of(progress(offered, f"{title} {workload.entrance}"), gate, settings)
    torch.compiler.reset()
    clean(settings.device)
    return rows


def rows_of(offered: Iterable[Provider], gate: Gate, settings: Settings) -> list[Row]:
    """The gate of each; then each pass of those that are right, who take turns in it."""
    rows, right = [], {}
    for provider in offered:
        row = gated(provider, gate, settings)
        if row.status == "ok" and settings.roofs:
            right[provider] = row
        else:
            rows.append(row)
        clean(settings.device)
    passes = settings.passes(gate.workload) if right else []
    return [row for part in passes for row in timed_rows(part, right, gate, settings)] + rows


def gated(provider: Provider, gate: Gate, settings: Settings) -> Row:
    """A row of no pass: that the provider is right, or why it has no place here."""
    workload = gate.workload
    lacks = tuple(name for name in workload.outputs if name not in provider.outputs)
    row = Row(ALL_PASSES, provider.name, None, "ok", lacks=lacks)
    try:
        row = replace(row, version=provider.version())
        refusal = provider.refusal(workload, settings.device, settings.interpreter, settings.quick)
        if refusal:
            return replace(row, status="lacks" if refusal == NO_KL else "cannot run", reason=refusal)
        verdict = gate.judge(provider.run, provider.outputs)
    except Exception as error:  # a peer may refuse a device, a shape or a version in any way
        return replace(row, status=status_of(error, provider.name), reason=first_line(error))
    errors = {name: error._asdict() for name, error in verdict.errors.items()}
    status = "red" if verdict.gate == "red" else "ok"
    return replace(row, status=status, gate=verdict.gate, errors=errors, reason=verdict.worst())


def timed_rows(part: str, right: dict[Provider, Row], gate: Gate, settings: Settings) -> list[Row]:
    copies = range(timing.cold_copies(gate.case, settings.device))
    cases = [{k: x.clone() if isinstance(x, torch.Tensor) else x for k, x in gate.case.items()} for _ in copies]
    calls = {provider.name: [call_of(provider, part, case, gate) for case in cases] for provider in right}
    timings = timing.timed(calls, settings.device, settings.seconds)
    floor, roofs = cost(gate.workload, part), settings.roofs[gate.workload.dtype]
    rows = []
    for provider, first in right.items():
        taken, row = timings[provider.name], replace(first, part=part, reason="")
        if isinstance(taken, Exception):
            rows.append(replace(row, status=status_of(taken, provider.name), reason=first_line(taken)))
            continue
        clean(settings.device)
        call = calls[provider.name][0]
        new = new_bytes(call(), cases[0]) if gate.workload.leaves(part) else 0
        row = replace(row.timed(taken), gradient_bytes=new, peak_bytes=timing.peak_bytes(call, settings.device))
        row = replace(row, flops=floor.flops, bytes=floor.bytes, matmul_roof=roofs.flops, copy_roof=roofs.bytes)
        rows.append(replace(row, roof_share=floor.seconds(roofs) / taken.median))
    return rows


def new_bytes(results: Iterable[torch.Tensor], case: Case) -> int:
    """Of results that do not lie in the memory of an input."""
    places = {x.data_ptr() for x in case.values() if isinstance(x, torch.Tensor)}
    return sum(x.nbytes for x in results if x.data_ptr() not in places)


def call_of(provider: Provider, part: str, case: Case, gate: Gate) -> Callable[[], Any]:
    """One pass, to be called again and again: results without a graph, or the gradients."""
    workload = gate.workload
    leaves = workload.leaves(part)
    asked = tuple(name for name in workload.outputs if name in provider.outputs)
    case = {name: x.detach().requires_grad_() if name in leaves else x for name, x in case.items()}

    def call() -> Any:
        if leaves:
            return backward(workload, provider.run(case), asked, case, leaves, gate.upstream)
        with torch.no_grad():
            return provider.run(case)

    return call


def clean(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def status_of(error: Exception, provider: str) -> str:
    if isinstance(error, ModuleNotFoundError):  # PackageNotFoundError is one, too
        return "not installed"
    if isinstance(error, timing.TooSlow):
        return "too slow"
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return "failed" if provider.startswith(OURS) else "cannot run"


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}"[:300]
