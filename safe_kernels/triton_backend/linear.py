"""Statistics and losses from hidden states: tiles of float32 logits from the BLAS library, read by the row kernels.

A tile covers some rows and some of the vocabulary. The forward carries the statistics of a row from tile to tile; the
backward turns a tile into its gradient and multiplies it back. Only one tile of logits is ever in memory.

Shapes: N tokens, R rows and W columns of a tile, V vocabulary, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..formulas import Objective
from ..inputs import LinearInputs, RowStats, StatsGrad, take
from . import launch
from .fused import fused_statistics, is_fastest
from .gemm import product as product_of_rows
from .logits import RowInputs, gradient, statistics
from .rows import CARRIED

ADDS_IN_FLOAT32 = torch.__version__ >= "2.10"  # torch.addmm of 16-bit factors to a float32 sum
Grads = TypeVar("Grads", bound=tuple[Any, ...])  # slopes of each row
MOST = 100  # a float16 row is scaled by at most 2^100


def kept_rows(inputs: LinearInputs, max_bytes: int | None) -> int:
    """A multiple of the product's tile, or all. Up to 15 more are allocated: a reference's begin aligned."""
    if inputs.batch_invariant or max_bytes is None:
        return 0
    row_bytes = (4 if inputs.ref_hidden_NH is None else 8) * inputs.weight_VH.shape[0]
    most = max_bytes // row_bytes // launch.ROWS_OF_A_PRODUCT * launch.ROWS_OF_A_PRODUCT
    return (torch.sym_min(inputs.tokens_N.shape[0], most) + 15) // 16 * 16


def linear_statistics(inputs: LinearInputs, logits: Tensor | None = None) -> Tensor:
    per_row, with_reference = RowInputs.of(inputs), inputs.ref_hidden_NH is not None
    stats = torch.empty(inputs.stats_rows, per_row.N, dtype=torch.float32, device=per_row.tokens.device)
    kept = 0 if logits is None else min(logits.shape[1], per_row.N)
    sweeps, rest = [Sweep(slice(0, kept), launch.ROWS_OF_A_TILE, logits)] if kept else [], slice(kept, per_row.N)
    if inputs.batch_invariant or (launch.architecture(stats.device) in launch.PLAIN_TARGETS and is_fastest(inputs)):
        others = (inputs.of_rows(rest), per_row.take(rest), stats[:, rest]) if kept else (inputs, per_row, stats)
        fused_statistics(*others)
    else:
        sweeps.append(Sweep(rest, launch.ROWS_OF_A_TILE))
    carry, vocabulary = stats.new_empty(CARRIED[len(stats)], per_row.N if sweeps else 0), len(inputs.weight_VH)
    for tile in (tile for sweep in sweeps for tile in sweep.tiles(inputs, per_row, with_reference)):
        rows, first = tile.rows, tile.columns.start
        given = (tile.logits_RW, tile.ref_logits_RW, tile.per_row)
        statistics(*given, stats[:, rows], vocabulary, carry=carry[:, rows], first_column=first)
    return stats


def linear_gradients(
    inputs: LinearInputs, stats: Tensor, grads: StatsGrad, needed: Sequence[bool], logits: Tensor | None = None
) -> list[Tensor | None]:
    per_row, sums = RowInputs.of(inputs), GradientSums(inputs, needed)
    kept = 0 if logits is None else min(logits.shape[1], per_row.N)
    row_limit = launch.ROWS_OF_A_TRAINED_TILE if needed[1] else launch.ROWS_OF_A_TILE
    sweeps = [Sweep(slice(kept, per_row.N), row_limit)]
    if kept:
        sweeps.insert(0, Sweep(slice(0, kept), launch.ROWS_OF_A_TILE, logits, are_known=True))
    for tile in (tile for sweep in sweeps for tile in sweep.tiles(inputs, per_row, grads.reads_reference)):
        sums.add(tile, *tile.gradient(inputs, stats, take(grads, tile.rows)))
    return sums.sums


def linear_loss(
    inputs: LinearInputs, objective: Objective, needed: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """One product forward, one back: the logits of whole rows become their gradient while still in memory."""
    with_reference, vocabulary = inputs.ref_hidden_NH is not None, len(inputs.weight_VH)
    per_row = RowInputs.of(inputs)
    stats = torch.empty(inputs.stats_rows, per_row.N, dtype=torch.float32, device=per_row.tokens.device)
    sums = GradientSums(inputs, needed)
    sweep = Sweep(slice(0, per_row.N), launch.SWEEP_BYTES // (4 * vocabulary), whole_rows=True)
    for tile in sweep.tiles(inputs, per_row, with_reference):
        part = stats[:, tile.rows]
        statistics(tile.logits_RW, tile.ref_logits_RW, tile.per_row, part, vocabulary)
        if any(needed):
            *_, grads = take(objective, tile.rows).evaluate(RowStats(*part.unbind()))
            sums.add(tile, *tile.gradient(inputs, stats, grads))
    return stats, sums.sums


class Tile(NamedTuple):
    rows: slice
    columns: slice
    per_row: RowInputs
    logits_RW: Tensor  # float32, hidden @ weight.T as the product left it
    ref_logits_RW: Tensor | None
    hidden_RH: Tensor
    weight_WH: Tensor

    def gradient(self, inputs: LinearInputs, stats: Tensor, grads: StatsGrad) -> tuple[Tensor, Tensor | None]:
        """d loss / d (hidden @ weight.T) of the tile, and the scale of each row."""
        out, grads, scale_R = self.prepared(inputs, grads)
        logits = (self.logits_RW, self.ref_logits_RW, self.per_row)
        gradient(*logits, stats[:, self.rows], grads, out, first_column=self.columns.start)
        return out, scale_R

    def prepared(self, inputs: LinearInputs, grads: Grads) -> tuple[Tensor, Grads, Tensor | None]:
        """Where the gradient goes, in the dtype of the products; the slopes that make it, and the scale of each row.

        In float32 it overwrites the tile, unscaled. float16 would lose small entries, so each row is scaled up.
        """
        dtype = self.weight_WH.dtype
        out = self.logits_RW if dtype == torch.float32 else torch.empty_like(self.logits_RW, dtype=dtype)
        if dtype != torch.float16:
            return out, grads, None
        scale_R = row_scales(inputs, grads, self.rows)
        scaled: list[Any] = [None if x is None else x * scale_R for x in grads]
        return out, type(grads)(*scaled), scale_R


def row_scales(inputs: LinearInputs, grads: tuple[Tensor | None, ...], rows: slice) -> Tensor:
    """Powers of two that bring the largest slope of each row to between 64 and 128 before the product."""
    temperature = inputs.temperature if inputs.temperatures_N is None else inputs.temperatures_N[rows]
    largest = torch.stack([x.abs() for x in grads if x is not None]).amax(0) * abs(inputs.logit_scale) / temperature
    usable = (largest > 0) & largest.isfinite()
    if inputs.mask_N is not None:
        usable &= inputs.mask_N[rows]
    power = 6 - torch.floor(torch.log2(largest.where(usable, 1)))
    return torch.exp2(power.where(usable, MOST).clamp(max=MOST))


class Sweep(NamedTuple):
    """Over the tiles of some rows: one row of tiles after another."""

    rows: slice
    row_limit: int  # of a tile
    storage: Tensor | None = None  # [1 or 2, K, V], of the tiles one after another; None: all share a buffer
    are_known: bool = False  # the logits in the storage
    whole_rows: bool = False

    def tiles(self, inputs: LinearInputs, per_row: RowInputs, with_reference: bool) -> Iterator[Tile]:
        count, vocabulary = self.rows.stop - self.rows.start, len(inputs.weight_VH)
        # A multiple of the product's tile; a tile's slice of a per-row vector begins at a multiple of 16 bytes.
        tall = launch.ROWS_OF_A_PRODUCT
        row_limit = self.row_limit // tall * tall or self.row_limit // 16 * 16 or max(1, self.row_limit)
        row_step = max(1, min(row_limit, count))
        height = row_limit if inputs.batch_invariant else row_step  # so that a tile's columns do not depend on N
        widest = vocabulary if self.whole_rows else max(16, launch.TILE_BYTES // (4 * height) // 16 * 16)
        column_step = min(widest, vocabulary)
        product = product_of_rows if inputs.batch_invariant else blas_product
        heads = [(inputs.hidden_NH, inputs.weight_VH)]
        if with_reference and inputs.ref_hidden_NH is not None:
            heads.append((inputs.ref_hidden_NH, inputs.reference_head()[0]))
        dtypes = [torch.promote_types(x.dtype, weight.dtype) for x, weight in heads]
        if self.storage is None:
            size, device = row_step * column_step, inputs.hidden_NH.device
            buffers = [torch.empty(size, dtype=torch.float32, device=device) for _ in heads]
        else:
            buffers = [x.view(-1) for x in self.storage[: len(heads)]]
        for start in range(self.rows.start, self.rows.stop, row_step):
            rows = slice(start, min(start + row_step, self.rows.stop))
            per_row_R = per_row if rows == slice(0, per_row.N) else per_row.take(rows)
            hidden = [x[rows].to(dtype) for (x, _), dtype in zip(heads, dtypes, strict=True)]
            if inputs.mask_N is not None:  # NaNs in masked rows must not reach a product
                hidden = [x_RH.where(inputs.mask_N[rows, None], 0) for x_RH in hidden]
            for first in range(0, vocabulary, column_step):
                columns = slice(first, min(first + column_step, vocabulary))
                shape = (rows.stop - rows.start, columns.stop - columns.start)
                weights = [weight[columns].to(dtype) for (_, weight), dtype in zip(heads, dtypes, strict=True)]
                place = 0 if self.storage is None else (start - self.rows.start) * vocabulary + first * shape[0]
                logits = [buffer[place : place + shape[0] * shape[1]].view(shape) for buffer in buffers]
                for x_RH, weight_WH, out_RW in zip(hidden, weights, logits, strict=True):
                    if not self.are_known:
                        product(x_RH, weight_WH.T, out_RW)
                ref_logits_RW = logits[1] if len(logits) == 2 else None
                yield Tile(rows, columns, per_row_R, logits[0], ref_logits_RW, hidden[0], weights[0])


def matrix_product(x: Tensor, y: Tensor, out: Tensor) -> None:
    """`blas_product`; beside a y of 16 bits a gradient x in float32 is rounded, its rows scaled to be in the range."""
    if x.dtype == y.dtype:
        return blas_product(x, y, out)
    largest = x.abs().amax(1, keepdim=True)
    power = 6 - torch.floor(torch.log2(largest.where((largest > 0) & largest.isfinite(), 1)))
    scale = torch.exp2(power.clamp(-MOST, MOST))
    blas_product((x * scale).to(y.dtype), y, out)
    out /= scale


def blas_product(x: Tensor, y: Tensor, out: Tensor) -> None:
    """out = x @ y with float32 sums; 16-bit factors by PyTorch on NVIDIA's GPUs, by our own product elsewhere."""
    if x.dtype == torch.float32:
        torch.mm(x, y, out=out)
    elif x.is_cuda and torch.version.hip is None:
        torch.mm(x, y, out_dtype=torch.float32, out=out)
    elif x.device.type == "cpu":  # the interpreter, whose products of bfloat16 are wrong
        torch.mm(x.float(), y.float(), out=out)
    else:
        product_of_rows(x, y, out)


class GradientSums:
    """Gradients of hidden, weight and bias in float32, each only if needed."""

    def __init__(self, inputs: LinearInputs, needed: Sequence[bool]) -> None:
        leaves = zip((inputs.hidden_NH, inputs.weight_VH, inputs.bias_V), needed, strict=True)
        # The first row of tiles writes the gradient of the weight, if there is one.
        is_written = len(inputs.tokens_N) > 0
        make = (torch.zeros, torch.empty if is_written else torch.zeros, torch.zeros)
        self.sums = [
            new(x.shape, dtype=torch.float32, device=x.device) if x is not None and need else None
            for new, (x, need) in zip(make, leaves, strict=True)
        ]
        self.product = product_of_rows if inputs.batch_invariant else blas_product

    def add(self, tile: Tile, du_RW: Tensor, scale_R: Tensor | None) -> None:
        """Add the contribution of a tile's gradient `du_RW`, whose rows are scaled by `scale_R` if given."""
        grad_hidden_NH, grad_weight_VH, grad_bias_V = self.sums
        if grad_hidden_NH is not None:
            factor_R = None if scale_R is None else 1 / scale_R
            add_product(grad_hidden_NH[tile.rows], self.product, du_RW, tile.weight_WH, factor_R)
        factor = share_R1 = None
        if scale_R is not None:  # sums over rows are in the scale of the row with the largest slopes
            factor, share_R1 = 1 / scale_R.amin(), (scale_R.amin() / scale_R).to(du_RW.dtype)[:, None]
        if grad_weight_VH is not None:
            hidden_RH = tile.hidden_RH if share_R1 is None else tile.hidden_RH * share_R1
            beta = 0 if tile.rows.start == 0 else 1
            add_product(grad_weight_VH[tile.columns], blas_product, du_RW.T, hidden_RH, factor, beta)
        if grad_bias_V is not None and share_R1 is None:
            grad_bias_V[tile.columns].add_(du_RW.sum(0, dtype=torch.float32))
        elif grad_bias_V is not None and share_R1 is not None:
            add_product(grad_bias_V[None, tile.columns], blas_product, share_R1.T, du_RW, factor)


def add_product(
    total: Tensor, product: Callable[..., None], x: Tensor, y: Tensor, factor: Tensor | None, beta: int = 1
) -> None:
    """total = beta * total + factor * (x @ y), some rows at a time: the whole float32 product would be as large as a
    head's gradient. With `beta` 0 the total is not read.

    `factor` has an entry for each row, or is 0-dim.
    """
    if product is blas_product and x.dtype == torch.float32:
        for first in range(0, x.shape[1], launch.INNER):
            part = slice(first, first + launch.INNER)
            total.addmm_(x[:, part], y[part], beta=beta if first == 0 else 1)
        return
    if product is blas_product and ADDS_IN_FLOAT32 and x.is_cuda and torch.version.hip is None and factor is None:
        torch.addmm(total, x, y, beta=beta, out_dtype=torch.float32, out=total)
        return
    step = max(1, launch.PART_BYTES // (4 * total.shape[1]))
    part_RW = total.new_empty(min(step, len(total)) if beta else 0, total.shape[1])
    for start in range(0, len(total), step):
        rows = total[start : start + step]
        found = part_RW[: len(rows)] if beta else rows
        product(x[start : start + step], y, found)
        scale = factor if factor is None or factor.dim() == 0 else factor[start : start + step, None]
        if beta and scale is not None:
            rows.addcmul_(found, scale)
        elif beta:
            rows += found
        elif scale is not None:
            rows *= scale
