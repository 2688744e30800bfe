"""Divergences of a student from a teacher: launches of the kernels in `divergence_rows.py`.

Shapes: N tokens, R rows of a tile, V vocabulary, which is the width of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..formulas import DistillationObjective
from ..inputs import Divergence, DivergenceGrad, LinearInputs, LogitsInputs, take
from . import launch
from .divergence_rows import divergence_gradient_kernel, divergence_kernel
from .linear import GradientSums, Sweep
from .logits import RowInputs, Rows


def logits_divergence(student: LogitsInputs, teacher: LogitsInputs, divergence: Divergence) -> Tensor:
    per_row = RowInputs.of(student)
    stats = new_stats(student)
    statistics(student.logits, teacher.logits, arguments_of(per_row, RowInputs.of(teacher), divergence), stats)
    return stats


def logits_divergence_gradient(
    student: LogitsInputs,
    teacher: LogitsInputs,
    divergence: Divergence,
    stats: Tensor,
    grads: DivergenceGrad,
    out: Tensor,
) -> None:
    arguments = arguments_of(RowInputs.of(student), RowInputs.of(teacher), divergence)
    gradient(student.logits, teacher.logits, arguments, stats, grads, out)


def linear_divergence(
    student: LinearInputs,
    teacher: LinearInputs,
    divergence: Divergence,
    objective: DistillationObjective,
    needed: Sequence[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """One product forward of each model, one back: whole rows become their gradient while still in memory."""
    per_row, teacher_rows = RowInputs.of(student), RowInputs.of(teacher)
    stats, sums, slopes = new_stats(student), GradientSums(student, needed), objective.slopes()
    sweep = Sweep(slice(0, per_row.N), launch.SWEEP_BYTES // (4 * len(student.weight_VH)), whole_rows=True)
    both = zip(sweep.tiles(student, per_row, False), sweep.tiles(teacher, teacher_rows, False), strict=True)
    for tile, ref_tile in both:
        part, arguments = stats[:, tile.rows], arguments_of(tile.per_row, ref_tile.per_row, divergence)
        statistics(tile.logits_RW, ref_tile.logits_RW, arguments, part)
        if any(needed):
            out, grads, scale_R = tile.prepared(student, take(slopes, tile.rows))
            gradient(tile.logits_RW, ref_tile.logits_RW, arguments, part, grads, out)
            sums.add(tile, out, scale_R)
    return stats, sums.sums


def new_stats(inputs: LogitsInputs | LinearInputs) -> Tensor:
    size = (inputs.stats_rows, inputs.tokens_N.shape[0])
    return torch.empty(size, dtype=torch.float32, device=inputs.tokens_N.device)


def arguments_of(student: RowInputs, teacher: RowInputs, divergence: Divergence) -> dict[str, Any]:
    """Of each row, under the kernels' argument names."""
    names = ("temperature", "temperatures", "bias", "logit_scale", "softcap")
    given = student._asdict() | {f"ref_{name}": getattr(teacher, name) for name in names}
    return given | {"DIVERGENCE": divergence.name, "beta": divergence.beta}


def statistics(logits: Tensor, ref_logits: Tensor, arguments: dict[str, Any], stats: Tensor) -> None:
    launched(divergence_kernel, {"logits": Rows.of(logits), "ref_logits": Rows.of(ref_logits)}, arguments, stats)


def gradient(
    logits: Tensor, ref_logits: Tensor, arguments: dict[str, Any], stats: Tensor, grads: DivergenceGrad, out: Tensor
) -> None:
    """Write d loss / d logits to `out`, which may be the logits."""
    written, zeros = Rows.of(out), torch.zeros_like(stats[0])
    operands = {"logits": Rows.of(logits), "ref_logits": Rows.of(ref_logits), "grad_logits": written}
    slopes = {
        "grad_divergence": zeros if grads.divergence is None else grads.divergence.contiguous(),
        "grad_logprob": None if grads.logprob is None else grads.logprob.contiguous(),
    }
    launched(divergence_gradient_kernel, operands, arguments | slopes, stats)
    if written.tensor is not out:  # its strides allow no view as rows
        out.copy_(written.tensor)


def launched(kernel: Any, operands: dict[str, Rows], arguments: dict[str, Any], stats: Tensor) -> None:
    choice, strides = launch.ROWS, dict[str, Any]()
    for name, x in operands.items():
        prefix = name.removesuffix("logits")
        strides |= {name: x.tensor, f"{prefix}rows_inner": x.inner}
        strides |= {f"{prefix}stride_outer": x.stride_outer, f"{prefix}stride_inner": x.stride_inner}
    kernel[(-(-arguments["N"] // choice.rows),)](
        **strides,
        stats=stats,
        stride_stats=stats.stride(0),
        W=operands["logits"].tensor.shape[-1],
        ALIGNED=all(x.is_aligned for x in operands.values()),
        R=choice.rows,
        C=choice.columns,
        num_warps=choice.num_warps,
        **arguments,
    )
