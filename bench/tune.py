"""Search the launch choices of the Triton backend on the GPU that is here, offline: the kernels never tune themselves.

    python bench/tune.py                  # about nine minutes at most
    python bench/tune.py --only GEMMS     # some of the choices

Every candidate passes the correctness gate on the inputs that it is timed on; one that does not compile, or does not
fit the device, is a row with the reason. Each choice starts from the winners before it. Prints each table best first,
and at the end the lines for safe_kernels/triton_backend/launch.py with the measurements that chose them.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for a checkout that is not installed

from bench.measurement import timing
from bench.measurement.machine import RESULTS
from bench.measurement.rows import Run, append, record
from bench.suites.kernels import Settings
from bench.suites.launch_choices import Knob, knobs, line, listing, ranked, search

SECONDS = 0.2  # of repeats for each pass of each candidate


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="choices whose name matches")
    parser.add_argument("--minutes", type=float, default=9, help="try no candidate after so many; default 9")
    parser.add_argument("--commit", help="for a copy of the tree without git: the commit that it is")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows; default bench/results")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("bench/tune.py times Triton kernels: it needs a CUDA device")
    wanted = [knob for knob in knobs(torch.device("cuda")) if re.search(args.only, str(knob))]
    return tune(wanted, "cuda", args.minutes, args.commit, args.results)


def tune(wanted: Sequence[Knob], device: str, minutes: float, commit: str | None, results: Path) -> int:
    run = Run.begin(device, commit)
    path = run.path(results)
    roofs = timing.timed_roofs([w for knob in wanted for w in knob.workloads], device)
    settings, end, lines = Settings(device, SECONDS, roofs), time.time() + 60 * minutes, []
    with contextlib.ExitStack() as winners:
        for i, knob in enumerate(wanted):
            share = (end - time.time()) / (len(wanted) - i)
            found = search(knob, settings, time.time() + share)
            append(path, [record(run, "tune", workload, row) for workload, row, _ in found])
            ranking, before = ranked(found), knob.current()
            print(f"\n{knob}, shipped: {before}\n{listing(found, ranking)}", flush=True)
            lines.append(line(knob, ranking, before))
            if ranking:
                winners.enter_context(knob.set(ranking[0][0]))
    print(f"\nFor launch.py, measured on {run.machine['processor']} at commit {run.commit}; rows in {path}:")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
