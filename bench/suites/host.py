"""What a call costs the host, in microseconds and in launches of an empty kernel: the Python around our kernels.

A GPU that finishes a call's kernels sooner than this waits for the host. The launches do nothing and the tensors are
small and lie on the CPU, so that it is measured on any machine; nothing is computed, and no gate can judge it. It is
the CPU time of the thread, which other programs on the machine change little.
"""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable
from dataclasses import replace

import torch

import safe_kernels
from bench.measurement import OURS
from bench.measurement.rows import ALL_PASSES, Row
from bench.measurement.timing import Timing
from bench.measurement.workloads import BACKWARD, FORWARD, Workload, gae, make_case
from bench.providers.provider import OPERATIONS, Case
from bench.suites.kernels import Settings, first_line, status_of
from safe_kernels.inputs import StatsGrad
from safe_kernels.logits import flat_inputs

WITH_GRADIENT = "forward, leaf wants gradient"
BACKEND = {FORWARD: "the backend's statistics", BACKWARD: "the backend's gradient"}  # from its entry to the launcher
NAME = f"{OURS} triton"
REPEATS, CALLS, QUICK_CALLS = 9, 800, 100  # the best of so many means of so many calls


def host_workloads(device: str, quick: bool) -> list[Workload]:
    """Of one size on every device: the tokens of a decoding step, and a vocabulary of a few tiles."""
    toy = Workload("logits", "toy", 16, 16, 160, dtype="bfloat16")
    operations = [("logits", True), ("logits", False), ("hidden", True), ("hidden", False), ("loss", True)]
    return [*(replace(toy, entrance=entrance, kl=kl) for entrance, kl in operations), gae(2, 64)]


def calls(workload: Workload, case: Case) -> dict[str, Callable[[], object]]:
    """By pass, the public function on the Triton backend; the reference and the head never want a gradient."""
    function = getattr(safe_kernels, OPERATIONS[workload.entrance])
    found: dict[str, Callable[[], object]] = {FORWARD: lambda: function(**case, backend="triton")}
    if workload.entrance == "gae":
        return found
    (leaf,) = workload.leaves(BACKWARD)
    wanted = case | {leaf: case[leaf].detach().requires_grad_()}
    graded = workload.graded(workload.outputs)
    ones = [torch.ones_like(x) for x in results(function, wanted, graded)]

    def backward() -> object:
        return torch.autograd.grad(results(function, wanted, graded), wanted[leaf], ones)

    return found | {WITH_GRADIENT: lambda: function(**wanted, backend="triton"), BACKWARD: backward}


def backend_calls(case: Case) -> dict[str, Callable[[], object]]:
    """The functions of the Triton backend that launch the row kernels."""
    from safe_kernels import triton_backend

    inputs = flat_inputs(case["logits"], case["tokens"], case.get("ref_logits"), 1.0, None)
    stats, out = triton_backend.logits_statistics(inputs), torch.empty_like(inputs.logits)
    ones = torch.ones(len(inputs.tokens_N))
    grads = StatsGrad(ones, ones, None if inputs.ref_logits is None else ones)
    return {
        BACKEND[FORWARD]: lambda: triton_backend.logits_statistics(inputs),
        BACKEND[BACKWARD]: lambda: triton_backend.logits_gradient(inputs, stats, grads, out),
    }


def results(function: Callable[..., object], case: Case, names: list[str]) -> list[torch.Tensor]:
    found = function(**case, backend="triton")
    return [getattr(found, name) for name in names]


def measured(workload: Workload, settings: Settings, title: str = "") -> list[Row]:
    """The passes of one function, and an empty launch beside them."""
    try:
        from bench.suites.no_device import empty_launch, no_device

        with no_device():
            case = make_case(workload, "cpu")
            own = calls(workload, case)
            own |= backend_calls(case) if workload.entrance == "logits" else {}
            count = QUICK_CALLS if settings.quick else CALLS
            taken = best({"empty": empty_launch, **own}, count, timer=time.thread_time)
    except Exception as error:
        return [Row(ALL_PASSES, NAME, None, status_of(error, NAME), first_line(error))]
    unit = taken.pop("empty")
    rows = [Row(part, NAME, None, "ok", units=x.median / unit.median).timed(x) for part, x in taken.items()]
    return [*rows, Row(FORWARD, "empty launch", None, "ok", units=1.0).timed(unit)]


def best(
    functions: dict[str, Callable[[], object]],
    count: int,
    repeats: int = REPEATS,
    timer: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """The best mean of each, which take turns; garbage is not collected meanwhile."""
    for function in functions.values():
        timeit.timeit(function, number=1 + count // 8)  # compiles, and fills caches
    rounds = [
        {name: timeit.timeit(f, number=count, timer=timer) / count for name, f in functions.items()}
        for _ in range(repeats)
    ]
    seconds = {name: sorted(each[name] for each in rounds) for name in functions}
    return {name: Timing(x[0], x[0], x[-1], repeats) for name, x in seconds.items()}
