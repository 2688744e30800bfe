"""This project: each backend through the public functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import safe_kernels
from bench.measurement.workloads import OUTPUTS, WITH_KL
from bench.providers.provider import KERNELS, OPERATIONS, Compute, Provider, by_name, from_best

KEPT = {  # of logits, beside the default: max_kept_bytes
    "torch": {"128 MiB": 128 << 20},
    "triton": {"2 GiB": 2 << 30, "all": 1 << 40},
}


def ours(entrance: str, backend: str, **options: Any) -> Compute:
    """The functions are looked up when they are called: an older revision has fewer."""

    def function(*given: Any, **case: Any) -> Any:
        return getattr(safe_kernels, OPERATIONS[entrance])(*given, **case, **options, backend=backend)

    def divergence(*best: Any, **how: Any) -> Tensor:
        return safe_kernels.truncated_divergence(*best, **how, backend=backend)

    return from_best(function, divergence) if entrance == "best" else lambda case: by_name(function(**case))


class Computed(torch.autograd.Function):
    """The leaf's memory, as what an operation returned: a trainer's logits are no leaf."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def over_the_logits(run: Compute) -> Compute:
    return lambda case: run(case | {"logits": Computed.apply(case["logits"])})


def our_providers() -> list[Provider]:
    on_gpus: dict[str, Any] = {"needs_gpu": KERNELS, "interpreted": True}
    found = []
    for name, where in (("torch", {}), ("triton", on_gpus)):
        for entrance, outputs in OUTPUTS.items():
            found.append(Provider(f"safe-kernels {name}", entrance, outputs, ours(entrance, name), **where))
        in_place = over_the_logits(ours("logits", name, inplace_backward=True))
        found.append(Provider(f"safe-kernels {name}, in place", "logits", WITH_KL, in_place, **where))
        for kept, size in KEPT[name].items():
            keeping = ours("hidden", name, max_kept_bytes=size)
            found.append(Provider(f"safe-kernels {name}, keeping {kept}", "hidden", WITH_KL, keeping, **where))
    fused = ours("hidden", "triton", batch_invariant=True)
    return [*found, Provider("safe-kernels triton, batch-invariant", "hidden", WITH_KL, fused, **on_gpus)]
