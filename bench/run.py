"""How fast, how lean and how right the kernels are, beside everyone else's on the same machine.

    python bench/run.py                          # everything that runs here; less than ten minutes
    python bench/run.py --quick                  # two minutes, without what compiles for long
    python bench/run.py --compare HEAD~1         # also this project at another revision, and the ratio
    python bench/run.py --gate-only              # correctness alone; on a CPU in Triton's interpreter

Rows go to bench/results/<machine>.jsonl, a picture of them beside it; docs/performance.md says how to read them.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # for a checkout that is not installed

import measure  # noqa: E402
from compare import Revision, ratios  # noqa: E402
from gate import Gate, backward  # noqa: E402
from integrations import integration_workloads  # noqa: E402
from integrations import offered as offered_in_trainers  # noqa: E402
from model import Roofs, cost  # noqa: E402
from peers import NO_KL, Case, Provider, interpret_trl, providers  # noqa: E402
from rows import ALL_PASSES, Row, Run, append, record, table  # noqa: E402
from trainer import measured as measured_step  # noqa: E402
from trainer import trainer_workloads  # noqa: E402
from workloads import Workload, gate_workloads, kernel_workloads, make_case  # noqa: E402

SUITES: dict[str, Callable[[str, bool], list[Workload]]] = {
    "kernels": kernel_workloads,
    "trainer": trainer_workloads,
    "integrations": integration_workloads,
}
RESULTS = ROOT / "bench" / "results"
OURS = "safe-kernels"  # how the names of this project's providers begin
SECONDS, QUICK_SECONDS = 0.8, 0.3  # of repeats for each pass of each provider


@dataclass(frozen=True)
class Settings:
    device: str
    seconds: float  # of repeats for each pass of each provider
    roofs: dict[str, Roofs]  # by dtype; empty: the gate alone
    interpreter: bool = False
    quick: bool = False


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: no CUDA device is here")
    started, interpreter = time.time(), args.gate_only and device == "cpu"
    if interpreter:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
        interpret_trl()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started))
    run = Run(stamp, measure.machine(device), *measure.commit(args.commit), device)
    path = args.results / f"{run.machine['name']}.jsonl"
    workloads = [(suite, w) for suite, w in chosen(args, device) if re.search(args.only, str(w))]
    roofs = {} if args.gate_only else measure.timed_roofs([w for _, w in workloads], device)
    settings = Settings(device, QUICK_SECONDS if args.quick else SECONDS, roofs, interpreter, args.quick)
    print_header(run, roofs)
    rows: list[Row] = []
    with Revision(args.compare, settings) if args.compare else contextlib.nullcontext() as other:
        for i, (suite, workload) in enumerate(workloads):
            if time.time() - started > 60 * args.minutes:
                left = "\n  ".join(str(w) for _, w in workloads[i:])
                print(f"--minutes {args.minutes:g} are over; not measured:\n  {left}")
                break
            found = MEASURED_BY.get(suite, measured)(workload, settings, title=f"{i + 1}/{len(workloads)}")
            if other is not None and suite not in MEASURED_BY:
                found += other.measured(workload)
            append(path, [record(run, suite, workload, row) for row in found])
            print(table(workload, found), ratios(found), sep="\n", flush=True)
            rows += found
    print(f"{len(rows)} rows in {path}")
    if roofs:
        draw(path)
    return 1 if any(row.status in ("red", "failed") for row in rows if row.provider.startswith(OURS)) else 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--suite", choices=[*SUITES, "all"], default="all")
    found.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if there is one")
    found.add_argument("--quick", action="store_true", help="small shapes, few repeats")
    found.add_argument("--gate-only", action="store_true", help="toy shapes, correctness alone")
    found.add_argument("--only", default="", metavar="REGEX", help="workloads whose title matches")
    found.add_argument("--compare", metavar="REV", help="a git revision of this project, as one more provider")
    found.add_argument("--minutes", type=float, default=8, help="start no workload after so many; default 8")
    found.add_argument("--commit", help="for a copy of the tree without git: the commit that it is")
    found.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows; default bench/results")
    return found


def chosen(args: argparse.Namespace, device: str) -> list[tuple[str, Workload]]:
    """Workloads, each with its suite; the interpreter is wrong in bfloat16, so that a CPU's gate leaves it out."""
    if args.gate_only:
        dtypes = ("float32", "float16") if device == "cpu" else ("float32", "float16", "bfloat16")
        return [("gate", workload) for workload in gate_workloads(dtypes)]
    suites = list(SUITES) if args.suite == "all" else [args.suite]
    return [(suite, workload) for suite in suites for workload in SUITES[suite](device, args.quick)]


def print_header(run: Run, roofs: dict[str, Roofs]) -> None:
    versions = ", ".join(f"{k} {v}" for k, v in run.machine.items() if k not in ("name", "processor", "system"))
    print(f"{run.machine['processor']}, {versions}; commit {run.commit}{' with changes' if run.dirty else ''}")
    for dtype, found in roofs.items():
        print(f"  measured roofs: {dtype} matmul {found.flops / 1e12:.3g} TFLOP/s, copy {found.bytes / 1e9:.3g} GB/s")
    print("  each cell: time, times faster than pytorch, memory beyond inputs and gradients, share of the roof\n")


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
    rows = rows_of(tqdm(offered, desc=f"{title} {workload.entrance}", leave=False, disable=None), gate, settings)
    torch.compiler.reset()
    clean(settings.device)
    return rows


MEASURED_BY = {"trainer": measured_step, "integrations": partial(measured, offer=offered_in_trainers)}


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
    return [row for part in gate.workload.passes if right for row in timed_rows(part, right, gate, settings)] + rows


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
    copies = range(measure.cold_copies(gate.case, settings.device))
    cases = [{k: x.clone() if isinstance(x, torch.Tensor) else x for k, x in gate.case.items()} for _ in copies]
    calls = {provider.name: [call_of(provider, part, case, gate) for case in cases] for provider in right}
    timings = measure.timed(calls, settings.device, settings.seconds)
    floor, roofs = cost(gate.workload, part), settings.roofs[gate.workload.dtype]
    rows = []
    for provider, first in right.items():
        timing, row = timings[provider.name], replace(first, part=part, reason="")
        if isinstance(timing, Exception):
            rows.append(replace(row, status=status_of(timing, provider.name), reason=first_line(timing)))
            continue
        clean(settings.device)
        call = calls[provider.name][0]
        results = call()
        places = {x.data_ptr() for x in cases[0].values() if isinstance(x, torch.Tensor)}
        new = [x for x in results if x.data_ptr() not in places] if gate.workload.leaves(part) else []
        gradient_bytes = sum(x.nbytes for x in new)
        del results, new
        rows.append(
            replace(
                row,
                seconds=timing.median,
                seconds_low=timing.low,
                seconds_high=timing.high,
                repeats=timing.repeats,
                peak_bytes=measure.peak_bytes(call, settings.device),
                gradient_bytes=gradient_bytes,
                flops=floor.flops,
                bytes=floor.bytes,
                matmul_roof=roofs.flops,
                copy_roof=roofs.bytes,
                roof_share=floor.seconds(roofs) / timing.median,
            )
        )
    return rows


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
    if isinstance(error, (importlib.metadata.PackageNotFoundError, ModuleNotFoundError)):
        return "not installed"
    if isinstance(error, measure.TooSlow):
        return "too slow"
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return "failed" if provider.startswith(OURS) else "cannot run"


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}"[:300]


def draw(path: Path) -> None:
    try:
        from picture import draw_picture
    except ModuleNotFoundError as error:
        print(f"no picture: {error}")
        return
    print(f"picture in {draw_picture(path)}")


if __name__ == "__main__":
    sys.exit(main())
