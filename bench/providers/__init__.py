"""Who is measured: every provider takes the same arguments, does the same work, and returns outputs by name."""

from __future__ import annotations

from bench.measurement import OURS
from bench.measurement.workloads import Workload
from bench.providers.ours import our_providers
from bench.providers.peers import peer_providers
from bench.providers.provider import Provider
from bench.providers.pytorch import pytorch_providers

PROVIDERS = [*pytorch_providers(), *our_providers(), *peer_providers()]


def providers(workload: Workload) -> list[Provider]:
    """All that have an operation like this one; the first is the baseline of the ratios."""
    offered = [p for p in PROVIDERS if p.entrance == workload.entrance]
    if not workload.kl:
        offered = [p for p in offered if set(p.outputs) != {"kl"}]
    if not workload.field:
        offered = [p for p in offered if p.name.startswith(("pytorch", OURS))]
    return [p for p in offered if not (p.low_precision_only and workload.dtype in ("float32", "float64"))]
