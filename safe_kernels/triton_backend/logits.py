"""Launches of the row kernels, and the statistics of logits that already exist.

Shapes: N tokens, W columns of a tile, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..inputs import ALL_ROWS, LinearInputs, LogitsInputs, StatsGrad
from . import launch
from .rows import gradient_kernel, statistics_kernel


class Rows(NamedTuple):
    """A tensor [..., W] as N rows in two levels of strides, so that `logits[:, :-1]` is read without a copy."""

    tensor: Tensor
    inner: int
    stride_outer: int
    stride_inner: int
    is_aligned: bool  # rows start at multiples of 16 entries, and have as many; axes of size 1 count, too

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        """A view if the strides allow one, otherwise a contiguous copy."""
        found = levels_of(x.shape, x.stride())
        return cls.of(x.contiguous()) if found is None else cls(x, *found)


@functools.lru_cache(maxsize=1024)
def levels_of(shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, int, int, bool] | None:
    """The fields of `Rows` beyond the tensor; None where two levels are too few."""
    if 0 in shape:
        return 1, 0, 0, True
    width, levels = shape[-1], list[tuple[int, int]]()
    for size, stride in zip(shape[:-1], strides[:-1], strict=True):
        if size == 1:
            continue
        if levels and levels[-1][1] == size * stride:
            levels[-1] = (levels[-1][0] * size, stride)
        else:
            levels.append((size, stride))
    if (width > 1 and strides[-1] != 1) or len(levels) > 2:
        return None
    inner, stride_inner = levels[-1] if levels else (1, 0)
    is_aligned = width % 16 == 0 and all(stride % 16 == 0 for stride in strides[:-1])
    return inner, levels[0][1] if len(levels) == 2 else 0, stride_inner, is_aligned


class RowInputs(NamedTuple):
    """The inputs of each row, and how tiles become logits, under the kernels' argument names."""

    tokens: Tensor
    temperature: float
    temperatures: Tensor | None
    mask: Tensor | None  # uint8
    N: int
    bias: Tensor | None = None
    ref_bias: Tensor | None = None
    logit_scale: float | None = None  # None is 1
    softcap: float | None = None

    @classmethod
    def of(cls, inputs: LogitsInputs | LinearInputs) -> RowInputs:
        """Makes the vectors contiguous: kernels read them with stride 1."""
        temperatures, mask = inputs.temperatures_N, inputs.mask_N
        head: tuple[Any, ...] = ()
        if isinstance(inputs, LinearInputs):
            ref_bias = None if inputs.ref_hidden_NH is None else inputs.reference_head()[1]
            logit_scale = None if inputs.logit_scale == 1.0 else inputs.logit_scale
            head = (inputs.bias_V, ref_bias, logit_scale, inputs.softcap)
        return cls(
            inputs.tokens_N.contiguous(),
            inputs.temperature,
            None if temperatures is None else temperatures.contiguous(),
            None if mask is None else mask.contiguous().view(torch.uint8),
            len(inputs.tokens_N),
            *head,
        )

    def take(self, rows: slice) -> RowInputs:
        temperatures, mask = (None if x is None else x[rows] for x in (self.temperatures, self.mask))
        count = rows.stop - rows.start
        return self._replace(tokens=self.tokens[rows], temperatures=temperatures, mask=mask, N=count)


def logits_statistics(inputs: LogitsInputs) -> Tensor:
    stats = torch.empty(inputs.stats_rows, len(inputs.tokens_N), dtype=torch.float32, device=inputs.logits.device)
    statistics(inputs.logits, inputs.ref_logits, RowInputs.of(inputs), stats, inputs.logits.shape[-1])
    return stats


def logits_gradient(inputs: LogitsInputs, stats: Tensor, grads: StatsGrad, out: Tensor) -> None:
    gradient(inputs.logits, inputs.ref_logits, RowInputs.of(inputs), stats, grads, out)


def statistics(
    logits: Tensor,
    ref_logits: Tensor | None,
    per_row: RowInputs,
    stats: Tensor,
    vocabulary: int,
    *,
    carry: Tensor | None = None,
    first_column: int = 0,
) -> None:
    """Fill `stats` from a tile; with `carry`, continue the state of the previous tile."""
    x, width, choice = Rows.of(logits), logits.shape[-1], launch.ROWS
    reference = x if ref_logits is None else Rows.of(ref_logits)
    statistics_kernel[(-(-per_row.N // choice.rows),)](
        logits=x.tensor,
        ref_logits=None if ref_logits is None else reference.tensor,
        carry=carry,
        stats=stats,
        rows_inner=x.inner,
        stride_outer=x.stride_outer,
        stride_inner=x.stride_inner,
        ref_rows_inner=reference.inner,
        ref_stride_outer=reference.stride_outer,
        ref_stride_inner=reference.stride_inner,
        stride_stats=stats.stride(0),
        W=width,
        first_column=first_column,
        vocabulary=vocabulary,
        REF_KL=len(stats) == ALL_ROWS,
        FIRST=first_column == 0,
        LAST=first_column + width == vocabulary,
        ALIGNED=x.is_aligned and reference.is_aligned,
        R=choice.rows,
        C=choice.columns,
        num_warps=choice.num_warps,
        **per_row._asdict(),
    )


def gradient(
    logits: Tensor,
    ref_logits: Tensor | None,
    per_row: RowInputs,
    stats: Tensor,
    grads: StatsGrad,
    out: Tensor,
    *,
    first_column: int = 0,
) -> None:
    """Write d loss / d logits of a tile to `out`, which may be the logits."""
    x, written, choice = Rows.of(logits), Rows.of(out), launch.ROWS
    grad_logprob, grad_entropy, grad_kl, grad_ref_kl = (None if g is None else g.contiguous() for g in grads)
    if not grads.reads_reference:
        ref_logits = None
    reference = x if ref_logits is None else Rows.of(ref_logits)
    gradient_kernel[(-(-per_row.N // choice.rows),)](
        logits=x.tensor,
        ref_logits=None if ref_logits is None else reference.tensor,
        stats=stats,
        grad_logprob=grad_logprob,
        grad_entropy=grad_entropy,
        grad_kl=grad_kl,
        grad_ref_kl=grad_ref_kl,
        grad_logits=written.tensor,
        rows_inner=x.inner,
        stride_outer=x.stride_outer,
        stride_inner=x.stride_inner,
        ref_rows_inner=reference.inner,
        ref_stride_outer=reference.stride_outer,
        ref_stride_inner=reference.stride_inner,
        grad_rows_inner=written.inner,
        grad_stride_outer=written.stride_outer,
        grad_stride_inner=written.stride_inner,
        stride_stats=stats.stride(0),
        W=logits.shape[-1],
        first_column=first_column,
        ALIGNED=x.is_aligned and reference.is_aligned and written.is_aligned,
        R=choice.rows,
        C=choice.columns,
        num_warps=choice.num_warps,
        **per_row._asdict(),
    )
    if written.tensor is not out:  # its strides allow no view as rows
        out.copy_(written.tensor)
