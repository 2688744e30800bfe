"""A provider takes the arguments of the public function (`case`), does its work, and returns {output: tensor}."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.measurement.workloads import Workload

Case = dict[str, Any]
Results = dict[str, Tensor]
Compute = Callable[[Case], Results]
OPERATIONS = dict(logits="token_stats", hidden="linear_token_stats", loss="linear_policy_loss", gae="soft_min_gae",
                  distill="linear_distillation_loss", kept="linear_token_stats", best="linear_token_stats")  # fmt: skip
PER_TOKEN = ("logits", "ref_logits", "hidden", "ref_hidden", "tokens", "mask", "old_logprob", "advantage",
             "loss_weight", "teacher_hidden", "weights", "kept", "teacher_logprob", "v1", "v2", "rewards")  # fmt: skip
STATS = ("logprob", "entropy")
NO_KL = "no exact KL"
KERNELS = "Triton kernels, which need a GPU"


@dataclass(frozen=True)
class Provider:
    name: str
    entrance: str
    outputs: tuple[str, ...]  # what it offers; a workload may ask for less
    run: Compute
    package: str | None = None  # distribution whose version goes into the rows; None: PyTorch, or this project
    needs_gpu: str = ""  # why it cannot run on a CPU, "" where it can
    interpreted: bool = False  # its kernels run on a CPU in Triton's interpreter, for correctness alone
    low_precision_only: bool = False  # the same as another provider for float32 inputs
    slow: bool = False  # compiles for most of a minute at each shape, or takes seconds a call: not in --quick

    def refusal(self, workload: Workload, device: str, interpreter: bool, quick: bool) -> str:
        """Why it has no place in a workload on this device; "" where it has."""
        if quick and self.slow:
            return "too slow for --quick"
        if workload.kl and "kl" not in self.outputs:
            return NO_KL
        if device == "cpu" and self.needs_gpu and not (self.interpreted and interpreter):
            return self.needs_gpu
        return ""

    def version(self) -> str:
        """Raises PackageNotFoundError where the peer is not installed."""
        return torch.__version__ if self.package is None else importlib.metadata.version(self.package)


def from_best(stats: Callable[..., Any], divergence: Callable[..., Tensor]) -> Compute:
    """The loss of a teacher's best ids, on a function that gives the student's log-probs of them."""

    def run(case: Case) -> Results:
        logprob_NK = stats(case["hidden"], case["weight"], case["tokens"]).logprob
        served = (case["teacher_logprob"], case["tokens"], case["vocabulary"])
        divergence_N = divergence(logprob_NK, *served, divergence=case["divergence"])
        return {"loss": (case["weights"] * divergence_N).sum(), "divergence": divergence_N.detach()}

    return run


def by_name(result: Any) -> Results:
    """The fields of a named tuple that are there."""
    return {name: x for name, x in result._asdict().items() if x is not None}
