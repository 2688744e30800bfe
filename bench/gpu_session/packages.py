"""Packages beside those of this machine: installed for one run, and what they compile."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from bench.gpu_session.page import Record
from bench.gpu_session.place import Place
from bench.measurement.machine import ROOT
from bench.suites.launch_choices import Knob


def pip(place: Place, *arguments: str) -> Iterator[Record]:
    done([sys.executable, "-m", "pip", "install", "-q", "--no-input", "--target", str(place.site), *arguments])
    found = sorted(path.name.removesuffix(".dist-info") for path in place.site.glob("*.dist-info"))
    yield {"record": "installed", "packages": found}


def done(command: list[str]) -> list[Record]:
    """Runs it; raises with the end of what it printed."""
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(command, cwd=ROOT, env=compiling, capture_output=True, text=True)
    print(finished.stdout[-2000:], finished.stderr[-2000:], flush=True)
    if finished.returncode:
        lines = (finished.stdout + finished.stderr).strip().splitlines() or [""]
        raise RuntimeError(f"exit code {finished.returncode}: {lines[-1]}")
    return []


def compile_for_hopper(knobs: list[Knob]) -> Iterator[Record]:
    """Each choice as the kernels that take it compile for sm_90; one that spills is a fact, one that fails an error."""
    from safe_kernels import inspect

    for knob in knobs:
        for choice in knob.choices:
            for resources in inspected(inspect, knob, choice):
                yield {"record": "compiled", "choice": f"{knob} = {choice}", **resources}


def inspected(inspect: Any, knob: Knob, choice: Any) -> list[Record]:
    with knob.set(choice):
        if knob.name == "ROWS":
            cases = list(inspect.row_cases(choice))
        elif knob.name == "SCAN":
            cases = list(inspect.scan_cases())[:1]
        elif knob.key is not None:
            _, work, _ = knob.key
            cases = list(inspect.product_cases("sm_90") if work == "product" else inspect.fused_cases("sm_90"))
            wanted = {"statistics": ("none",), "with reference": ("shared", "own"), "product": (None,)}[work]
            cases = [case for case in cases if case.label["bits"] == 16 and case.label.get("reference") in wanted]
            cases = [case for case in cases if case.label.get("plain", False) == (knob.name == "PLAIN")]
        else:
            return []  # a size of memory or an order: no kernel's constant that could fail
        return [inspect.measured("sm_90", case, optional) for case in cases for optional in case.optional]
