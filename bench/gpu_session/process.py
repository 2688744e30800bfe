"""The process of a part of bench/gpu.py: one item after another, each written when it ends.

    python -m bench.gpu_session.process plan        # the predictions beside the limits

bench/gpu.py starts it, and starts it again without the item that ended it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import site
import sys
import time
from pathlib import Path

if "--rehearse" in sys.argv:
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}  # before triton is imported

import torch

from bench.gpu_session.page import VERSIONS
from bench.gpu_session.parts import PARTS, Item, candidates, plan
from bench.gpu_session.place import Place
from bench.gpu_session.session import LOST, append
from bench.measurement.interpreter import patch_language_once_a_launch
from bench.measurement.machine import gpu_state, versions
from bench.suites.kernels import clean, first_line

SLACK = 10.0  # seconds beyond three times its prediction after which an item is ended
TINY_SLACK = 120.0  # the same in a rehearsal, since the prediction is for an H100


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "plan", "candidates"])
    parser.add_argument("--file", type=Path, default=Path())
    parser.add_argument("--end", type=float, default=0.0, help="on the monotonic clock, which processes share")
    parser.add_argument("--commit", default="")
    parser.add_argument("--site", type=Path, default=Path())
    parser.add_argument("--wheels", type=Path, default=Path())
    parser.add_argument("--skip", type=json.loads, default=[])
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    place = Place(args.rehearse, args.file, args.commit, args.site, args.wheels)
    if args.site.is_dir() and args.site != Path():
        site.addsitedir(str(args.site))  # PYTHONPATH alone leaves out the .pth files, which CUTLASS's DSL needs
    if args.part == "plan":
        print(plan())
        return 0
    if args.part == "candidates":
        candidates()
        return 0
    items = PARTS[args.part](place)
    append(place.file, {"record": "versions", "versions": versions()})  # of what this process imports
    append(place.file, {"record": "planned", "items": [item.name for item in items]})
    return run_items(items, place, args.end, set(args.skip))


def run_items(items: list[Item], place: Place, end: float, skip: set[str]) -> int:
    """Each item that is left and fits the time left; its records are written as they come."""
    if place.tiny:
        patch_language_once_a_launch()
    slack = TINY_SLACK if place.tiny else SLACK
    for item in items:
        left = end - time.monotonic()
        if item.name in skip:
            continue
        if left < item.seconds and not place.tiny:
            log(place, item, "left out", f"{left:.0f} s were left, it needs {item.seconds:.0f}")
            continue
        log(place, item, "started")
        started, status, reason = time.monotonic(), "done", ""
        # The default action of an alarm ends the process, even one that waits for the device.
        signal.setitimer(signal.ITIMER_REAL, max(1.0, min(left, 3 * item.seconds + slack)))
        try:
            for found in item.run():
                append(place.file, found | {"item": item.name})
        except Exception as error:
            status = "out of memory" if isinstance(error, torch.OutOfMemoryError) else "failed"
            reason = first_line(error)
        signal.setitimer(signal.ITIMER_REAL, 0)
        seconds = round(time.monotonic() - started, 2)
        log(place, item, status, reason, seconds=seconds, predicted_s=round(item.seconds, 2))
        print(f"{item.name}: {status}, {seconds:.1f} s (predicted {item.seconds:.1f}) {reason}", flush=True)
        if item.name == VERSIONS and status != "done":
            return 1
        if not is_alive(place):
            return LOST
    append(place.file, {"record": "state", "gpu": gpu_state()})  # while the device is warm
    return 0


def log(place: Place, item: Item, status: str, reason: str = "", **numbers: float) -> None:
    append(place.file, {"record": "item", "item": item.name, "status": status, "reason": reason, **numbers})


def is_alive(place: Place) -> bool:
    """False after an error that ends a CUDA context: everything later in this process would fail as well."""
    try:
        if place.device == "cuda":
            torch.cuda.synchronize()
        clean(place.device)
    except Exception as error:
        print(f"the device no longer answers: {first_line(error)}", flush=True)
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
