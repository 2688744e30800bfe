"""The correctness gate: no speed is shown for a provider whose results or gradients are wrong on the same inputs.

The rule is that of the tests: the error against float64 is at most twice that of plain PyTorch in the same dtype, plus
a few ulps (of log V for results, of the largest entry for gradients). Plain PyTorch comes in two kinds: with float32
logits ("green"), and with logits in the dtype of the inputs, as most trainers compute them ("rounds": right, but only
as precise as that). What is worse than both is "red".

Some of the rows are judged on every output and gradient; then all rows run at once, and the same ones are judged again.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.measurement.workloads import Workload
from bench.providers.provider import PER_TOKEN, Case, Compute, Results
from bench.providers.pytorch import plain, rounded_logits, with_policy_loss

ULPS = 4
ROWS = 32
SUMS = ("loss", "d weight")  # over rows: judged where the rows run alone


class Error(NamedTuple):
    """The worst error of one result against float64, what was allowed, and that of plain PyTorch."""

    error: float
    allowed: float
    plain: float

    @classmethod
    def of(cls, error: float, plain: float, dtype: torch.dtype, scale: float) -> Error:
        """The one rule of tolerance: twice plain PyTorch's error, and a few ulps of what has this scale."""
        return cls(error, 2 * plain + ULPS * torch.finfo(dtype).eps * scale, plain)

    @property
    def excess(self) -> float:
        """How many times what is allowed; a NaN is beyond all bounds."""
        ratio = self.error / self.allowed
        return math.inf if math.isnan(ratio) else ratio


class Verdict(NamedTuple):
    gate: str  # green, rounds or red
    errors: dict[str, Error]

    def worst(self) -> str:
        name, found = max(self.errors.items(), key=lambda item: item[1].excess)
        return f"{name}: error {found.error:.2g}, allowed {found.allowed:.2g}, plain PyTorch {found.plain:.2g}"


class Gate:
    """Exact results, and those of plain PyTorch, for some rows of a case: made once for all providers."""

    def __init__(self, workload: Workload, case: Case) -> None:
        self.workload, self.case, self.leaves = workload, case, workload.leaves(workload.passes[-1])
        self.unfused = plain(workload.entrance)
        first = next(case[name] for name in PER_TOKEN if case.get(name) is not None)
        self.count = len(first)
        rows = min(len(first), 2 if workload.T else ROWS)
        self.rows = torch.linspace(0, len(first) - 1, rows).long().to(first.device)
        self.part = {name: x[self.rows] if name in PER_TOKEN and x is not None else x for name, x in case.items()}
        draw = torch.Generator(first.device).manual_seed(1)
        self.upstream = {
            name: torch.ones((), device=first.device) if name == "loss"
            else torch.randn(len(first), generator=draw, device=first.device)
            for name in workload.graded(workload.outputs)
        }  # fmt: skip
        self._expected: dict[tuple[str, ...], dict[str, Results]] = {}

    def judge(self, run: Compute, outputs: tuple[str, ...]) -> Verdict:
        """Of one provider, on the outputs that it has."""
        asked = tuple(name for name in self.workload.outputs if name in outputs)
        expected = self.expected(asked)
        found = self._evaluate(run, self.part, asked, self._of_rows(self.upstream), self.leaves)
        by_row = [name for name in self.leaves if f"d {name}" not in SUMS]
        whole = self._evaluate(run, self.case, asked, self.upstream, by_row)
        found |= {f"{name}, all rows": x[self.rows] for name, x in whole.items() if name not in SUMS}
        for gate in [name for name in expected if name != "exact"]:
            errors = {}
            for name, x in found.items():
                result = name.removesuffix(", all rows")
                seen = _distances(x, expected[gate][result], expected["exact"][result])
                errors[name] = self._allowed(gate, name, *seen.tolist())
            if all(error.excess <= 1 for error in errors.values()):
                return Verdict(gate, errors)
        return Verdict("red", errors)

    def judge_all_rows(self, run: Compute, rows_at_once: int) -> Verdict:
        """Every row, and the sums over all of them, against float64 that is made so many rows at a time."""
        outputs = self.workload.outputs
        found = self._evaluate(run, self.case, outputs, self.upstream, self.leaves)
        worst: dict[str, Tensor] = {}
        sums: dict[str, list[Tensor]] = {}
        for rows in torch.arange(self.count, device=self.rows.device).split(rows_at_once):
            case = {name: x[rows] if name in PER_TOKEN and x is not None else x for name, x in self.case.items()}
            upstream = {name: x[rows] if x.dim() else x for name, x in self.upstream.items()}
            exact, plain = (
                self._evaluate(self.unfused, case, outputs, upstream, self.leaves, dtype)
                for dtype in (torch.float64, None)
            )
            for name, x in exact.items():
                if name in SUMS:
                    before = sums.get(name, [torch.zeros_like(x), torch.zeros_like(x)])
                    sums[name] = [total + part.double() for total, part in zip(before, (x, plain[name]), strict=True)]
                else:
                    seen = _distances(found[name][rows], plain[name], x)
                    worst[name] = torch.maximum(worst[name], seen) if name in worst else seen
        worst |= {name: _distances(found[name], plain, exact) for name, (exact, plain) in sums.items()}
        errors = {name: self._allowed("green", name, *seen.tolist()) for name, seen in worst.items()}
        return Verdict("green" if all(error.excess <= 1 for error in errors.values()) else "red", errors)

    def expected(self, asked: tuple[str, ...]) -> dict[str, Results]:
        """Results of the rows: "exact" in float64, and by gate what plain PyTorch makes of them."""
        if asked not in self._expected:
            workload, upstream = self.workload, self._of_rows(self.upstream)
            kinds: dict[str, Any] = {"exact": (self.unfused, torch.float64), "green": (self.unfused, None)}
            if workload.entrance in ("hidden", "loss") and workload.dtype in ("bfloat16", "float16"):
                rounded = rounded_logits if workload.entrance == "hidden" else with_policy_loss(rounded_logits)
                kinds["rounds"] = (rounded, None)
            self._expected[asked] = {
                kind: self._evaluate(run, self.part, asked, upstream, self.leaves, dtype)
                for kind, (run, dtype) in kinds.items()
            }
        return self._expected[asked]

    def _of_rows(self, upstream: Results) -> Results:
        return {name: x[self.rows] if x.dim() else x for name, x in upstream.items()}

    def _evaluate(
        self, run: Compute, case: Case, asked: tuple[str, ...], upstream: Results, leaves: list[str], dtype: Any = None
    ) -> Results:
        """The outputs asked for, and the gradients of the leaves for fixed incoming gradients."""
        case = {name: _copy(x, name in leaves, dtype) for name, x in case.items()}
        for name in leaves:
            case[name].requires_grad_()
        results = run(case)
        found = {name: results[name].detach() for name in asked}
        if leaves:
            gradients = backward(self.workload, results, asked, case, leaves, upstream)
            found |= {f"d {name}": x for name, x in zip(leaves, gradients, strict=True)}
        return found

    def _allowed(self, gate: str, name: str, error: float, plain_error: float, size: float) -> Error:
        """`size` is the largest entry."""
        is_gradient = name.startswith("d ")
        scale = size if is_gradient else max(1.0, math.log(max(self.workload.V, 1)))
        dtype = getattr(torch, self.workload.dtype) if is_gradient or gate == "rounds" else torch.float32
        return Error.of(error, plain_error, dtype, scale)


def _distances(actual: Tensor, plain: Tensor, exact: Tensor) -> Tensor:
    """[3]: the largest error, that of plain PyTorch, and the largest entry. A NaN stays one."""
    exact = exact.double()
    return torch.stack([(x - exact).abs().max() for x in (actual.double(), plain.double())] + [exact.abs().max()])


def backward(
    workload: Workload, results: Results, asked: tuple[str, ...], case: Case, leaves: list[str], upstream: Results
) -> tuple[Tensor, ...]:
    """Gradients of the leaves, for the incoming gradients of the outputs asked for."""
    graded = workload.graded(asked)
    incoming = [upstream[name].to(results[name].dtype) for name in graded]
    return torch.autograd.grad([results[name] for name in graded], [case[name] for name in leaves], incoming)


def _copy(x: object, is_leaf: bool, dtype: torch.dtype | None) -> object:
    if not isinstance(x, Tensor):
        return x
    if dtype is not None and x.is_floating_point():
        return x.detach().to(dtype, copy=True)
    return x.detach().clone() if is_leaf else x.detach()
