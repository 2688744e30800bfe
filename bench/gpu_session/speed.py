"""How fast: rows of the field, rates of kernels beside a plain copy and product, host time, launch choices."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.gpu_session.place import SECONDS, Place
from bench.gpu_session.records import Record
from bench.measurement import timing
from bench.measurement.cost import itemsize
from bench.measurement.rows import record
from bench.measurement.workloads import Workload, make_case
from bench.providers.provider import OPERATIONS, Case, Provider
from bench.suites import host, launch_choices
from bench.suites.kernels import measured
from safe_kernels import linear_token_stats, token_stats

FEW_SECONDS = 0.1  # of a candidate in a sweep


def timed(place: Place, workload: Workload, passes: tuple[str, ...], offered: list[Provider]) -> Iterator[Record]:
    settings = place.settings(workload, passes=passes)
    found = measured(workload, settings, offer=lambda _: offered)
    yield from ({"record": "row"} | record(place.run, "gpu", workload, row) for row in found)


def kernel_calls(place: Place, workload: Workload) -> dict[str, tuple[Callable[[], Any], float, float]]:
    """By kernel: one call of it, the FLOPs and the bytes that it has to move."""
    dtype, device = getattr(torch, workload.dtype), place.device
    N, H, V, size = workload.N, workload.H, workload.V, itemsize(workload)
    draw = torch.Generator(device).manual_seed(0)
    hidden, ref_hidden = torch.randn(2, N, H, generator=draw, device=device).to(dtype)
    weight = (torch.randn(V, H, generator=draw, device=device) * (2 / H**0.5)).to(dtype)
    logits, ref_logits = hidden @ weight.T, ref_hidden @ weight.T
    out = torch.empty_like(logits)
    common = {"tokens": torch.randint(V, (N,), generator=draw, device=device), "backend": "triton"}
    alone = {"logits": logits} | common
    fused = {"hidden": hidden, "weight": weight, "batch_invariant": True} | common
    both, fused_both = alone | {"ref_logits": ref_logits}, fused | {"ref_hidden": ref_hidden}
    NV, U = float(N) * V, 2.0 * N * H * V
    return {
        "plain copy of the logits": (lambda: out.copy_(logits), 0, 2 * size * NV),
        "plain product of the head": (lambda: torch.mm(hidden, weight.T, out=out), U, size * NV),
        "statistics": (lambda: token_stats(**alone), 0, size * NV),
        "statistics with a reference": (lambda: token_stats(**both), 0, 2 * size * NV),
        "gradient": (gradient(alone), 0, 2 * size * NV),
        "gradient with KL": (gradient(both), 0, 3 * size * NV),
        "fused statistics": (lambda: linear_token_stats(**fused), U, 0),
        "fused statistics with a reference": (lambda: linear_token_stats(**fused_both), 2 * U, 0),
    }


def gradient(case: Case) -> Callable[[], Any]:
    """A backward alone, of all statistics that `case` has."""
    logits = case["logits"].detach().requires_grad_()
    found = token_stats(**case | {"logits": logits})
    results = [x for x in (found.logprob, found.entropy, found.kl) if x is not None]
    incoming = [torch.ones_like(x) for x in results]
    return lambda: torch.autograd.grad(results, logits, incoming, retain_graph=True)


RATES = (
    *("plain copy of the logits", "statistics", "statistics with a reference", "gradient", "gradient with KL"),
    *("plain product of the head", "fused statistics", "fused statistics with a reference"),
)
_calls = functools.cache(kernel_calls)


def kernel_rate(place: Place, workload: Workload, name: str) -> Iterator[Record]:
    call, flops, moved = _calls(place, workload)[name]
    taken = timing.timed({name: [call]}, place.device, 0.0 if place.tiny else SECONDS)[name]
    if isinstance(taken, Exception):
        raise taken
    yield {"record": "kernel", "name": name, "workload": str(workload), "seconds": taken.median, "flops": flops,
           "bytes": moved, "repeats": taken.repeats}  # fmt: skip


def host_times(place: Place) -> Iterator[Record]:
    """Seconds that the host spends on a call before the device is done, on inputs so small that it never waits."""
    for workload in host.host_workloads(place.device, quick=True):
        case = make_case(place.shrink(workload), place.device)
        for part, call in host.calls(workload, case).items():
            name = f"{OPERATIONS[workload.entrance]}{' with KL' * workload.kl}, {part}"
            yield {"record": "host", "call": name, "seconds": host_seconds(place, call)}
    logits = torch.zeros(16, 160, device=place.device)
    call = functools.partial(torch.log_softmax, logits, -1)
    yield {"record": "host", "call": "torch.log_softmax, forward", "seconds": host_seconds(place, call)}


def host_seconds(place: Place, call: Callable[[], Any]) -> float:
    """The median of batches of calls, the device's queue emptied between them."""
    batches, size = (1, 1) if place.tiny else (10, 20)
    call()
    found = []
    for _ in range(batches):
        if place.device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(size):
            call()
        found.append((time.perf_counter() - started) / size)
    return sorted(found)[len(found) // 2]


def sweep(place: Place, knob: launch_choices.Knob, passes: tuple[str, ...]) -> Iterator[Record]:
    settings = place.settings(knob.workloads[0], FEW_SECONDS, passes)
    found = launch_choices.search(knob, settings, time.time() + 60)
    yield from ({"record": "row"} | record(place.run, "tune", workload, row) for workload, row, _ in found)
    ranking = launch_choices.ranked(found)
    print(launch_choices.listing(found, ranking), flush=True)
    yield {"record": "line", "text": launch_choices.line(knob, ranking, knob.current())}
