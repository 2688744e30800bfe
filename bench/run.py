"""How fast, how lean and how right the kernels are, beside everyone else's on the same machine.

    python bench/run.py                          # everything that runs here; less than ten minutes
    python bench/run.py --quick                  # two minutes, without what compiles for long
    python bench/run.py --suite host             # what a call costs before and after its launches, in half a minute
    python bench/run.py --compare HEAD~1         # also this project at another revision, and the ratio
    python bench/run.py --gate-only              # correctness alone; on a CPU in Triton's interpreter

Rows go to bench/results/<machine>.jsonl, a picture of them beside it; docs/performance.md says how to read them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for a checkout that is not installed

from bench.compare import Revision
from bench.measurement import OURS, timing
from bench.measurement.cost import Roofs
from bench.measurement.machine import RESULTS
from bench.measurement.rows import Row, Run, append, record
from bench.measurement.workloads import Workload, gate_workloads, kernel_workloads
from bench.providers.integrations import integration_workloads
from bench.providers.integrations import offered as offered_in_trainers
from bench.providers.peers import interpret_trl
from bench.report import draw_picture, ratios, table
from bench.suites import host, kernels, trainer


class Suite(NamedTuple):
    workloads: Callable[[str, bool], list[Workload]]  # of a device, and whether to be quick
    measured: Callable[..., list[Row]]
    has_roofs: bool = True


SUITES = {
    "kernels": Suite(kernel_workloads, kernels.measured),
    "trainer": Suite(trainer.trainer_workloads, trainer.measured),
    "integrations": Suite(integration_workloads, partial(kernels.measured, offer=offered_in_trainers)),
    "host": Suite(host.host_workloads, host.measured, has_roofs=False),
}
WHAT = (
    "kernels: each operation beside its peers; trainer: a training step beside the published layout; "
    "integrations: functions of TRL, verl and OpenRLHF, and ours in their place; host: the Python around our kernels"
)
SECONDS, QUICK_SECONDS = 0.8, 0.3  # of repeats for each pass of each provider


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
        from bench.measurement.interpreter import patch_language_once_a_launch

        patch_language_once_a_launch()
    run = Run.begin(device, args.commit)
    path = run.path(args.results)
    workloads = [(suite, w) for suite, w in chosen(args, device) if re.search(args.only, str(w))]
    roofs = {} if args.gate_only else timing.timed_roofs([w for s, w in workloads if SUITES[s].has_roofs], device)
    settings = kernels.Settings(device, QUICK_SECONDS if args.quick else SECONDS, roofs, interpreter, args.quick)
    print_header(run, roofs)
    rows: list[Row] = []
    with Revision(args.compare, settings) if args.compare else contextlib.nullcontext() as other:
        for i, (suite, workload) in enumerate(workloads):
            if time.time() - started > 60 * args.minutes:
                left = "\n  ".join(str(w) for _, w in workloads[i:])
                print(f"--minutes {args.minutes:g} are over; not measured:\n  {left}")
                break
            found = SUITES.get(suite, SUITES["kernels"]).measured(workload, settings, title=f"{i + 1}/{len(workloads)}")
            if other is not None and suite in ("kernels", "gate"):
                found += other.measured(workload)
            append(path, [record(run, suite, workload, row) for row in found])
            print(table(workload, found), ratios(found), sep="\n", flush=True)
            rows += found
    print(f"{len(rows)} rows in {path}")
    if roofs:
        try:
            print(f"picture in {draw_picture(path)}")
        except ModuleNotFoundError as error:
            print(f"no picture: {error}")
    return 1 if any(row.status in ("red", "failed") for row in rows if row.provider.startswith(OURS)) else 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--suite", choices=[*SUITES, "all"], default="all", help=f"{WHAT}; default: all")
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
    return [(suite, workload) for suite in suites for workload in SUITES[suite].workloads(device, args.quick)]


def print_header(run: Run, roofs: dict[str, Roofs]) -> None:
    versions = ", ".join(f"{k} {v}" for k, v in run.machine.items() if k not in ("name", "processor", "system"))
    print(f"{run.machine['processor']}, {versions}; commit {run.commit}{' with changes' if run.dirty else ''}")
    for dtype, found in roofs.items():
        print(f"  measured roofs: {dtype} matmul {found.flops / 1e12:.3g} TFLOP/s, copy {found.bytes / 1e9:.3g} GB/s")
    if roofs:
        print("  each cell: time, times faster than pytorch, memory beyond inputs and gradients, share of the roof")
    print()


if __name__ == "__main__":
    sys.exit(main())
