"""Statistics and losses from hidden states: tiles of float32 logits from the BLAS library, read by the row kernels.

A tile has some of the rows and some of the vocabulary. The statistics travel from tile to tile of a row, and in the
backward a tile is turned into its gradient and multiplied back. One tile of logits is in memory at a time.

Shapes: N tokens, R rows and W columns of a tile, V vocabulary, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..inputs import LinearInputs, Terms, take
from ..objective import Objective
from .fused import fused_statistics, is_fastest
from .gemm import product as product_of_rows
from .launch import INNER, PART_BYTES, ROWS_OF_A_TILE, ROWS_OF_A_TRAINED_TILE, SWEEP_BYTES, TILE_BYTES
from .logits import Asked, Rows, gradient, new_stats, statistics
from .rows import CARRY
from .values import terms_of

ADDS_IN_FLOAT32 = torch.__version__ >= (2, 10)  # torch.addmm of 16-bit factors to a float32 sum
MOST = 100  # the largest power of two that a row of float16 is scaled by


def linear_statistics(inputs: LinearInputs, terms: Terms | None) -> tuple[Tensor, Tensor | None]:
    asked, with_reference = asked_of(inputs), inputs.ref_hidden_NH is not None
    stats = new_stats(inputs.tokens_N, with_reference)
    matrices = (inputs.hidden_NH, inputs.weight_VH, inputs.ref_hidden_NH, inputs.ref_weight_VH)
    bias_V, ref_bias_V = biases(inputs).values()
    if inputs.batch_invariant or is_fastest(matrices, bias_V, ref_bias_V, asked):
        fused_statistics(*matrices, bias_V, ref_bias_V, asked, stats)
    else:
        carry = stats.new_empty(len(CARRY), len(inputs.tokens_N))
        for tile in tiles(inputs, with_reference, ROWS_OF_A_TILE, TILE_BYTES):
            tile.statistics(inputs, asked, stats, carry)
    return stats, terms_of(terms, stats, inputs.mask_N)


def linear_gradients(
    inputs: LinearInputs, stats: Tensor, slopes: tuple[Tensor | None, ...], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of (hidden, weight, bias), in float32; None where none is needed."""
    asked, sums = asked_of(inputs), GradientSums(inputs, needed)
    row_limit = ROWS_OF_A_TRAINED_TILE if needed[1] else ROWS_OF_A_TILE
    for tile in tiles(inputs, slopes[2] is not None, row_limit, TILE_BYTES):
        part = tuple(None if x is None else x[tile.rows] for x in slopes)
        sums.add(tile, *tile.gradient(inputs, asked, stats, part))
    return sums.sums


def sweep(inputs: LinearInputs, objective: Objective, needed: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
    """Statistics, slopes and gradients of whole rows while their logits are there: one product forward, one back."""
    with_reference, vocabulary = inputs.ref_hidden_NH is not None, len(inputs.weight_VH)
    asked, stats = asked_of(inputs), new_stats(inputs.tokens_N, with_reference)
    sums = GradientSums(inputs, needed)
    for tile in tiles(inputs, with_reference, SWEEP_BYTES // (4 * vocabulary), None):
        tile.statistics(inputs, asked, stats, None)
        if any(needed):
            part = stats[:, tile.rows]
            *_, slopes = take(objective, tile.rows).evaluate(part[0], part[1], part[5] if with_reference else None)
            sums.add(tile, *tile.gradient(inputs, asked, stats, slopes))
    return stats, sums.sums


def asked_of(inputs: LinearInputs) -> Asked:
    asked = Asked.of(inputs.tokens_N, len(inputs.weight_VH), inputs.temperature, inputs.mask_N)
    return asked._replace(logit_scale=inputs.logit_scale, softcap=inputs.softcap)


class Tile(NamedTuple):
    rows: slice
    columns: slice
    logits_RW: Tensor  # float32, hidden @ weight.T as the product left it
    ref_logits_RW: Tensor | None
    hidden_RH: Tensor
    weight_WH: Tensor

    def statistics(self, inputs: LinearInputs, asked: Asked, stats: Tensor, carry: Tensor | None) -> None:
        statistics(
            Rows.of(self.logits_RW),
            None if self.ref_logits_RW is None else Rows.of(self.ref_logits_RW),
            take(asked, self.rows),
            stats[:, self.rows],
            carry=None if carry is None else carry[:, self.rows],
            first_column=self.columns.start,
            **biases(inputs),
        )

    def gradient(
        self, inputs: LinearInputs, asked: Asked, stats: Tensor, slopes: tuple[Tensor | None, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """d loss / d (hidden @ weight.T) of the tile in the dtype of the products, and what its rows are scaled by.

        float32 goes over the tile, as it is. float16 would lose the small entries, so it holds each row scaled up.
        """
        dtype, scale_R = self.weight_WH.dtype, None
        out = self.logits_RW if dtype == torch.float32 else torch.empty_like(self.logits_RW, dtype=dtype)
        if dtype == torch.float16:
            scale_R = row_scales(inputs, slopes, self.rows)
            slopes = tuple(None if x is None else x * scale_R for x in slopes)
        gradient(
            Rows.of(self.logits_RW),
            None if self.ref_logits_RW is None else Rows.of(self.ref_logits_RW),
            take(asked, self.rows),
            stats[:, self.rows],
            slopes,
            Rows.of(out),
            first_column=self.columns.start,
            **biases(inputs),
        )
        return out, scale_R


def row_scales(inputs: LinearInputs, slopes: tuple[Tensor | None, ...], rows: slice) -> Tensor:
    """Powers of two that bring the largest slope of each row, on its way to the product, to between 64 and 128."""
    temperature = inputs.temperature[rows] if isinstance(inputs.temperature, Tensor) else inputs.temperature
    largest = torch.stack([x.abs() for x in slopes if x is not None]).amax(0) * abs(inputs.logit_scale) / temperature
    usable = (largest > 0) & largest.isfinite()
    if inputs.mask_N is not None:
        usable &= inputs.mask_N[rows]
    power = 6 - torch.floor(torch.log2(largest.where(usable, 1)))
    return torch.exp2(power.where(usable, MOST).clamp(max=MOST))


def biases(inputs: LinearInputs) -> dict[str, Tensor | None]:
    return {"bias": inputs.bias_V, "ref_bias": inputs.reference_head()[1]}


def tiles(inputs: LinearInputs, with_reference: bool, row_limit: int, tile_bytes: int | None) -> Iterator[Tile]:
    """Tiles with their products, row by row of tiles; `tile_bytes` None takes whole rows. All share one memory."""
    count, vocabulary = len(inputs.tokens_N), len(inputs.weight_VH)
    # Whole tiles of a product; vectors of a tile's rows begin at 16 bytes.
    row_limit = row_limit // 128 * 128 or row_limit // 16 * 16 or max(1, row_limit)
    row_step = max(1, min(row_limit, count))
    height = row_limit if inputs.batch_invariant else row_step  # then the columns of a tile do not depend on N either
    widest = vocabulary if tile_bytes is None else max(16, tile_bytes // (4 * height) // 16 * 16)
    column_step = min(widest, vocabulary)
    product = product_for(inputs)
    buffers = [
        torch.empty(row_step * column_step, dtype=torch.float32, device=inputs.hidden_NH.device)
        for _ in range(1 + with_reference)
    ]
    for start in range(0, count, row_step):
        rows = slice(start, min(start + row_step, count))
        hidden_RH, ref_hidden_RH = (live_rows(x, inputs.mask_N, rows) for x in (inputs.hidden_NH, inputs.ref_hidden_NH))
        for first in range(0, vocabulary, column_step):
            columns = slice(first, min(first + column_step, vocabulary))
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            logits, *ref_logits = (buffer[: shape[0] * shape[1]].view(shape) for buffer in buffers)
            hidden, weight = common(hidden_RH, inputs.weight_VH[columns])
            product(hidden, weight.T, logits)
            if ref_logits:
                ref_hidden, ref_weight_WH = common(ref_hidden_RH, inputs.reference_head()[0][columns])
                product(ref_hidden, ref_weight_WH.T, ref_logits[0])
            yield Tile(rows, columns, logits, ref_logits[0] if ref_logits else None, hidden, weight)


def live_rows(x_NH: Tensor | None, mask_N: Tensor | None, rows: slice) -> Tensor | None:
    """Rows with zeros where masked: whatever stands there must not reach a product."""
    if x_NH is None or mask_N is None:
        return None if x_NH is None else x_NH[rows]
    return x_NH[rows].where(mask_N[rows, None], 0)


def common(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


def product_for(inputs: LinearInputs) -> Callable[..., None]:
    """(x, y, out): out = x @ y with float32 sums and a float32 result."""
    return product_of_rows if inputs.batch_invariant else blas_product


def blas_product(x: Tensor, y: Tensor, out: Tensor) -> None:
    """16-bit factors are summed into a float32 result by PyTorch where it can, elsewhere by our own product."""
    if x.dtype == torch.float32:
        torch.mm(x, y, out=out)
    elif sums_in_float32(x):
        torch.mm(x, y, out_dtype=torch.float32, out=out)
    elif x.device.type == "cpu":  # the interpreter, whose products of bfloat16 are wrong
        torch.mm(x.float(), y.float(), out=out)
    else:
        product_of_rows(x, y, out)


def sums_in_float32(x: Tensor) -> bool:
    """Whether PyTorch's products take `out_dtype`: on NVIDIA's GPUs alone."""
    return x.is_cuda and torch.version.hip is None


class GradientSums:
    """Gradients of hidden, weight and bias in float32, as far as they are needed."""

    def __init__(self, inputs: LinearInputs, needed: Sequence[bool]) -> None:
        leaves = zip((inputs.hidden_NH, inputs.weight_VH, inputs.bias_V), needed, strict=True)
        self.sums = [
            torch.zeros(x.shape, dtype=torch.float32, device=x.device) if x is not None and need else None
            for x, need in leaves
        ]
        self.product = product_for(inputs)

    def add(self, tile: Tile, du_RW: Tensor, scale_R: Tensor | None) -> None:
        """Add those of a tile's gradient `du_RW`, which is scaled by `scale_R` if that is given."""
        hidden_NH, weight_VH, bias_V = self.sums
        if hidden_NH is not None:
            factor_R = None if scale_R is None else 1 / scale_R
            add_product(hidden_NH[tile.rows], self.product, du_RW, tile.weight_WH, factor_R)
        factor = share_R1 = None
        if scale_R is not None:  # sums over rows are in the scale of the row with the largest slopes
            factor, share_R1 = 1 / scale_R.amin(), (scale_R.amin() / scale_R).to(du_RW.dtype)[:, None]
        if weight_VH is not None:
            hidden_RH = tile.hidden_RH if share_R1 is None else tile.hidden_RH * share_R1
            add_product(weight_VH[tile.columns], blas_product, du_RW.T, hidden_RH, factor)
        if bias_V is not None and share_R1 is None:
            bias_V[tile.columns].add_(du_RW.sum(0, dtype=torch.float32))
        elif bias_V is not None:
            add_product(bias_V[None, tile.columns], blas_product, share_R1.T, du_RW, factor)


def add_product(total: Tensor, product: Callable[..., None], x: Tensor, y: Tensor, factor: Tensor | None) -> None:
    """total += factor * (x @ y), some rows at a time: a float32 product of all would be as large as a head's gradient.

    `factor` has an entry for each row, or is 0-dim.
    """
    if product is blas_product and x.dtype == torch.float32:
        for first in range(0, x.shape[1], INNER):
            total.addmm_(x[:, first : first + INNER], y[first : first + INNER])
        return
    if product is blas_product and sums_in_float32(x) and ADDS_IN_FLOAT32 and factor is None:
        torch.addmm(total, x, y, out_dtype=torch.float32, out=total)
        return
    step = max(1, PART_BYTES // (4 * total.shape[1]))
    part = total.new_empty(min(step, len(total)), total.shape[1])
    for start in range(0, len(total), step):
        rows = total[start : start + step]
        product(x[start : start + step], y, part[: len(rows)])
        if factor is None:
            rows += part[: len(rows)]
        else:
            rows.addcmul_(part[: len(rows)], factor if factor.dim() == 0 else factor[start : start + step, None])
