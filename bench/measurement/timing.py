"""Seconds of calls that take turns, their peak memory, and the roofs of the machine."""

from __future__ import annotations

import itertools
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.measurement.cost import Roofs
from bench.measurement.workloads import Workload

FEWEST = 3  # repeats
LONGEST = 2.5  # seconds of a call that is worth repeating


class Timing(NamedTuple):
    """Seconds of one call: the median, and the 10th and 90th percentile, of so many repeats."""

    median: float
    low: float
    high: float
    repeats: int


class TooSlow(Exception):
    """A call takes so long that repeats would cost minutes."""


def timed(
    calls: dict[str, list[Callable[[], object]]],
    device: str,
    budget: float,
    most: int = 100,
    longest: float = LONGEST,
) -> dict[str, Timing | Exception]:
    """For each name, about `budget` seconds of repeats going round its calls, which do the same work on other memory;
    one repeat where it is 0.

    All take turns, so that a drift of the machine meets all of them. A name whose first calls fail gets the error.
    """
    clock = _seconds_on_gpu if device == "cuda" else _seconds_on_cpu
    found: dict[str, Timing | Exception] = {}
    repeats: dict[str, int] = {}
    for name, own in calls.items():
        try:
            clock(own[:1])  # compiles and allocates
            (guess,) = clock(own[-1:])
            if guess > longest:
                raise TooSlow(f"one call took {guess:.1f} s")
            repeats[name] = max(FEWEST, min(most, int(budget / max(guess, 1e-7)))) if budget else 1
        except Exception as error:  # too little memory, or whatever a peer raises at this shape
            found[name] = error.with_traceback(None)  # whose frames would keep their tensors
    rounds = max(repeats.values(), default=0)
    turns = [(name, r) for r in range(rounds) for name, n in repeats.items() if (r + 1) * n // rounds > r * n // rounds]
    seconds = clock([calls[name][r % len(calls[name])] for name, r in turns])
    for name, count in repeats.items():
        own_seconds = sorted(x for x, (other, _) in zip(seconds, turns, strict=True) if other == name)
        tenth = (count - 1) // 10
        found[name] = Timing(statistics.median(own_seconds), own_seconds[tenth], own_seconds[-1 - tenth], count)
    return found


def _seconds_on_cpu(calls: list[Callable[[], object]]) -> list[float]:
    found = []
    for call in calls:
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


def _seconds_on_gpu(calls: list[Callable[[], object]]) -> list[float]:
    """By events on the stream; nothing waits for the host between calls."""
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in calls]
    torch.cuda.synchronize()
    for call, (start, end) in zip(calls, marks, strict=True):
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in marks]


def cold_copies(case: dict[str, Any], device: str) -> int:
    """How many sets of the inputs total three times the L2 cache, so that each call finds its own evicted."""
    if device != "cuda":
        return 1
    size = sum(x.nbytes for x in case.values() if isinstance(x, Tensor))
    return max(1, math.ceil(3 * torch.cuda.get_device_properties(0).L2_cache_size / size))


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Most bytes that PyTorch's allocator held at once for `call`, its results counted: in a run of its own.

    Buffers that a BLAS library takes for itself are not seen.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own notes
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    kineto = profiled.profiler
    assert kineto is not None and kineto.kineto_results is not None
    events = [(e.start_ns(), e.nbytes()) for e in kineto.kineto_results.events() if e.name() == "[memory]"]
    sizes = [size for _, size in sorted(events, key=lambda event: event[0])]
    return max(0, *itertools.accumulate(sizes))


def roofs(dtype: str, device: str) -> Roofs:
    """The rates of a large copy and of a large matmul, measured now."""
    size, width = (1 << 30, 8192) if device == "cuda" else (1 << 28, 2048)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    draw = torch.Generator(device).manual_seed(0)
    x, y = (torch.randn(width, width, generator=draw, device=device).to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(x)
    calls: dict[str, list[Callable[[], object]]] = {
        "copy": [lambda: target.copy_(source)],
        "matmul": [lambda: torch.mm(x, y, out=out)],
    }
    found = timed(calls, device, 0.5)
    copy, matmul = found["copy"], found["matmul"]
    if isinstance(copy, Exception) or isinstance(matmul, Exception):
        raise RuntimeError(f"the roofs could not be measured: {copy}, {matmul}")
    return Roofs(2.0 * width**3 / matmul.median, 2.0 * source.nbytes / copy.median)


def timed_roofs(workloads: list[Workload], device: str) -> dict[str, Roofs]:
    return {dtype: roofs(dtype, device) for dtype in sorted({w.dtype for w in workloads})}
