"""Is it right: versions, checks against float64, and tests of the suite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import safe_kernels
from bench.gpu_session.page import Record
from bench.gpu_session.place import Place
from bench.gpu_session.session import append
from bench.measurement.machine import ROOT, versions
from bench.measurement.workloads import Workload, make_case
from bench.providers.ours import ours, over_the_logits
from bench.providers.provider import Case, Results, by_name
from bench.suites.gate import Error, Gate
from safe_kernels import reference


def check_versions(place: Place) -> Iterator[Record]:
    """Raises where PyTorch or Triton is too old; says what else this machine lacks, and what follows."""
    found = versions()
    for name, least in (("torch", (2, 10)), ("triton", (3, 6))):
        if tuple(int(part) for part in found.get(name, "0.0").split(".")[:2]) < least:
            raise RuntimeError(f"{name} {found.get(name)} is too old: {'.'.join(map(str, least))} or newer is needed")
    if not place.tiny and not torch.cuda.is_available():
        raise RuntimeError("PyTorch finds no CUDA device: a CPU build of it, or no driver")
    lacks = {
        **dict.fromkeys(("pytest", "hypothesis"), "no tests of the suite in part correctness"),
        **dict.fromkeys(("transformers", "peft", "datasets"), "no training step"),
        "flash-attn": "the step takes PyTorch's varlen attention",
        **dict.fromkeys(("trl", "liger-kernel", "verl", "cut-cross-entropy", "quack-kernels"), "no row of it"),
    }
    for name, consequence in lacks.items():
        if name not in found:
            yield {"record": "adjusted", "text": f"{name} is not installed: {consequence}"}
    if not place.tiny and torch.cuda.get_device_capability() != (9, 0):
        yield {"record": "adjusted", "text": "this is no H100 or H200: predictions and limits were made for one"}


def judged(place: Place, name: str, workload: Workload, options: Case, own: Case) -> Iterator[Record]:
    gate = Gate(workload, make_case(workload, place.device) | options)
    run = ours(workload.entrance, "triton", **own)
    run = over_the_logits(run) if "inplace_backward" in own else run
    at_once = workload.N // workload.T if workload.T else max(1, (1 << 26) // workload.V)
    verdict = gate.judge_all_rows(run, at_once)
    yield check_record(f"{name}: {workload}", verdict.errors)


def check_record(name: str, errors: dict[str, Error]) -> Record:
    status = "green" if all(error.excess <= 1 for error in errors.values()) else "red"
    return {"record": "check", "name": name, "status": status, "errors": {k: e._asdict() for k, e in errors.items()}}


def check_terms(place: Place) -> Iterator[Record]:
    """`safe_terms`, whose kernel no workload calls."""
    draw, N, T = torch.Generator(place.device).manual_seed(0), 4, 8 if place.tiny else 30
    logits, ref_logits = torch.randn(2, N, T, 97, generator=draw, device=place.device)
    values = dict(zip(("v1", "v2", "rewards"), torch.randn(3, N, T, generator=draw, device=place.device), strict=True))
    tokens = torch.randint(97, (N, T), generator=draw, device=place.device)
    constants = {"ref_logits": ref_logits, "kl_threshold": 0.1, "alpha": 0.3, "gamma": 0.9}

    def terms(dtype: torch.dtype, function: Callable[..., Any], **backend: Any) -> Results:
        case = {name: x.to(dtype) if isinstance(x, torch.Tensor) else x for name, x in (values | constants).items()}
        return by_name(function(logits.to(dtype), tokens, **case, **backend))

    exact, plain = terms(torch.float64, reference.safe_terms), terms(torch.float32, reference.safe_terms)
    found, errors = terms(torch.float32, safe_kernels.safe_terms, backend="triton"), {}
    for name, x in exact.items():
        error, own = ((y[name].double() - x).abs().max().item() for y in (found, plain))
        errors[name] = Error.of(error, own, torch.float32, max(1.0, x.abs().max().item()))
    yield check_record("safe_terms", errors)


GPU_TESTS = (
    *("test_rows_past_two_to_the_31", "test_two_runs_have_the_same_bits", "test_a_row_has_the_same_bits_in_any_batch"),
    *("test_memory_with_a_frozen_head", "test_scan_holds_to_the_reference", "test_safe_terms_hold_to_the_reference"),
    "test_policy_loss_holds_to_the_reference",
)


def suite_tests(place: Place) -> Iterator[Record]:
    """Tests that matter most and that no check repeats, each written when it ends; test_gpu.py has more."""
    import pytest

    tests = ROOT / "tests"
    chosen = [f"{tests / 'test_gpu.py'}::{name}" for name in GPU_TESTS] + ["-m", "gpu"]
    if place.tiny:
        chosen = [str(tests / "test_online_softmax.py")]
    recorder = Recorder(place.file)
    # Our own alarm ends what hangs; the plugin would take the signal away from it.
    options = ["-q", "-o", "addopts=", "-p", "no:timeout", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    code = pytest.main([*options, *chosen], plugins=[recorder])
    yield from ()
    if recorder.count == 0 or code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with exit code {int(code)} after {recorder.count} tests")


class Recorder:
    """A plugin of pytest that appends a record a test."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.count += 1
            reason = "" if report.outcome == "passed" else str(report.longrepr)[-300:]
            name = report.nodeid.rpartition("/")[2]
            append(self.path, {"record": "test", "name": name, "status": report.outcome, "reason": reason})
