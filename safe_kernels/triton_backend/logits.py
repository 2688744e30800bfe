"""Launches of the row kernels, and the statistics of logits that already exist.

Shapes: N tokens, W columns of a tile, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..inputs import LogitsInputs, Terms
from . import launch
from .rows import STATS, gradient_kernel, statistics_kernel
from .values import terms_arguments


class Rows(NamedTuple):
    """A tensor [..., W] as N rows in two levels, so that a slice such as `logits[:, :-1]` is read where it lies."""

    tensor: Tensor
    inner: int
    stride_outer: int
    stride_inner: int

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        """A view where the strides allow one, else a contiguous copy."""
        if x.numel() == 0:
            return cls(x, 1, 0, 0)
        width = x.shape[-1]
        shape = [(n, s) for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n != 1]
        levels: list[tuple[int, int]] = []
        for size, stride in shape:
            if levels and levels[-1][1] == size * stride:
                levels[-1] = (levels[-1][0] * size, stride)
            else:
                levels.append((size, stride))
        if (width > 1 and x.stride(-1) != 1) or len(levels) > 2:
            return cls.of(x.contiguous())
        inner, stride_inner = levels[-1] if levels else (1, 0)
        return cls(x, inner, levels[0][1] if len(levels) == 2 else 0, stride_inner)

    def is_aligned(self) -> bool:
        """Whether rows begin at 16 entries: by axes of size 1, too, so that one row is read as it is among others."""
        return all(stride % 16 == 0 for stride in self.tensor.stride()[:-1])


class Asked(NamedTuple):
    """What is asked of the rows: everything with one entry a row, and how tiles become logits."""

    tokens_N: Tensor
    vocabulary: int
    temperature: float | Tensor
    mask_N: Tensor | None
    logit_scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, tokens_N: Tensor, vocabulary: int, temperature: float | Tensor, mask_N: Tensor | None) -> Asked:
        """Kernels step through these by one."""
        if isinstance(temperature, Tensor):
            temperature = temperature.contiguous()
        mask_N = None if mask_N is None else mask_N.contiguous()
        return cls(tokens_N.contiguous(), vocabulary, temperature, mask_N)

    def arguments(self) -> dict[str, Any]:
        per_row = isinstance(self.temperature, Tensor)
        return {
            "tokens": self.tokens_N,
            "temperatures": self.temperature if per_row else None,
            "temperature": 1.0 if per_row else self.temperature,
            "mask": None if self.mask_N is None else self.mask_N.view(torch.uint8),
            "N": len(self.tokens_N),
            "logit_scale": None if self.logit_scale == 1.0 else self.logit_scale,
            "softcap": self.softcap,
        }


def statistics(
    logits: Rows,
    ref_logits: Rows | None,
    asked: Asked,
    stats: Tensor,
    *,
    carry: Tensor | None = None,
    first_column: int = 0,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    **terms: Any,
) -> None:
    """Fill `stats` from a tile; with `carry` [9, N], from the state of the tile before, for the tile after."""
    width, reference = logits.tensor.shape[-1], ref_logits or logits
    choice = launch.ROWS
    statistics_kernel[(triton.cdiv(len(asked.tokens_N), choice.rows),)](
        logits=logits.tensor,
        ref_logits=None if ref_logits is None else ref_logits.tensor,
        bias=bias,
        ref_bias=ref_bias,
        carry=carry,
        stats=stats,
        rows_inner=logits.inner,
        stride_outer=logits.stride_outer,
        stride_inner=logits.stride_inner,
        ref_rows_inner=reference.inner,
        ref_stride_outer=reference.stride_outer,
        ref_stride_inner=reference.stride_inner,
        stride_stats=stats.stride(0),
        W=width,
        first_column=first_column,
        vocabulary=asked.vocabulary,
        FIRST=first_column == 0,
        LAST=first_column + width == asked.vocabulary,
        ALIGNED=width % 16 == 0 and logits.is_aligned() and reference.is_aligned(),
        R=choice.rows,
        C=choice.columns,
        num_warps=choice.num_warps,
        **asked.arguments(),
        **(terms or terms_arguments(None, None)),
    )


def gradient(
    logits: Rows,
    ref_logits: Rows | None,
    asked: Asked,
    stats: Tensor,
    slopes: tuple[Tensor | None, ...],
    out: Rows,
    *,
    first_column: int = 0,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
) -> None:
    """Write d loss / d logits of a tile to `out`, from the slopes [N] of (logprob, entropy, kl); None is none."""
    width = logits.tensor.shape[-1]
    grad_logprob, grad_entropy, grad_kl = (None if x is None else x.contiguous() for x in slopes)
    reference = ref_logits if ref_logits is not None and grad_kl is not None else None
    read = reference or logits
    choice = launch.ROWS
    gradient_kernel[(triton.cdiv(len(asked.tokens_N), choice.rows),)](
        logits=logits.tensor,
        ref_logits=None if reference is None else reference.tensor,
        bias=bias,
        ref_bias=ref_bias,
        stats=stats,
        grad_logprob=grad_logprob,
        grad_entropy=grad_entropy,
        grad_kl=grad_kl,
        grad_logits=out.tensor,
        rows_inner=logits.inner,
        stride_outer=logits.stride_outer,
        stride_inner=logits.stride_inner,
        ref_rows_inner=read.inner,
        ref_stride_outer=read.stride_outer,
        ref_stride_inner=read.stride_inner,
        grad_rows_inner=out.inner,
        grad_stride_outer=out.stride_outer,
        grad_stride_inner=out.stride_inner,
        stride_stats=stats.stride(0),
        W=width,
        first_column=first_column,
        ALIGNED=width % 16 == 0 and logits.is_aligned() and read.is_aligned() and out.is_aligned(),
        R=choice.rows,
        C=choice.columns,
        num_warps=choice.num_warps,
        **asked.arguments(),
    )


def logits_statistics(inputs: LogitsInputs, terms: Terms | None) -> tuple[Tensor, Tensor | None]:
    stats = new_stats(inputs.tokens_N, inputs.ref_logits is not None)
    reference = None if inputs.ref_logits is None else Rows.of(inputs.ref_logits)
    found = None if terms is None else stats.new_empty(3, len(inputs.tokens_N))
    statistics(Rows.of(inputs.logits), reference, asked_of(inputs), stats, **terms_arguments(terms, found))
    return stats, found


def logits_gradient(inputs: LogitsInputs, stats: Tensor, slopes: tuple[Tensor | None, ...], out: Tensor) -> None:
    """Write d loss / d logits to `out`, which may be the logits."""
    reference = None if inputs.ref_logits is None else Rows.of(inputs.ref_logits)
    written = Rows.of(out)
    gradient(Rows.of(inputs.logits), reference, asked_of(inputs), stats, slopes, written)
    if written.tensor is not out:  # strides that no view in rows can follow
        out.copy_(written.tensor)


def asked_of(inputs: LogitsInputs) -> Asked:
    return Asked.of(inputs.tokens_N, inputs.logits.shape[-1], inputs.temperature, inputs.mask_N)


def new_stats(tokens_N: Tensor, with_reference: bool) -> Tensor:
    return tokens_N.new_empty(len(STATS) if with_reference else len(STATS) // 2, len(tokens_N), dtype=torch.float32)
