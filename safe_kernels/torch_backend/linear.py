"""Statistics from hidden states: the logits of some rows are computed, used and dropped.

At most PRODUCT_BYTES of logits are ever in memory, and never a whole float32 copy of a low-precision weight.

Shapes: N tokens, R rows of a tile, V vocabulary, C columns of a weight tile, H hidden width.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..formulas import Objective
from ..inputs import ALL_ROWS, LinearInputs, RowStats, StatsGrad, compute_dtype, take
from .rows import RowInputs, Slopes, Tile, is_on_host, logit_gradient, restore, row_statistics, slopes_of, tiles, write

PRODUCT_BYTES = 64 << 20  # logits of the rows of one product; a reference doubles it
WEIGHT_TILE_BYTES = 16 << 20


def kept_rows(inputs: LinearInputs, max_bytes: int | None) -> int:
    """Those of whole products, so that a row's product is the same whether it is kept or not. None is one on a CPU."""
    if inputs.batch_invariant:
        return 0
    streams, height = 1 if inputs.ref_hidden_NH is None else 2, product_height(inputs)
    if max_bytes is None:
        products = int(is_on_host(inputs.hidden_NH))
    else:
        product_bytes = height * inputs.weight_VH.shape[0] * compute_dtype(inputs.hidden_NH).itemsize
        products = max_bytes // (streams * product_bytes)
    return torch.sym_min(inputs.tokens_N.shape[0], products * height)


def linear_statistics(inputs: LinearInputs, logits: Tensor | None = None) -> Tensor:
    live, live_inputs = without_masked_rows(inputs)
    per_row, with_reference = per_row_of(live_inputs), inputs.ref_hidden_NH is not None
    stats = per_row.new_stats(inputs.stats_rows)
    for product in products(live_inputs, per_row, with_reference, logits, are_known=False):
        for rows, per_row_R, tile in product.tiles():
            write(row_statistics(tile, per_row_R), stats[:, product.rows], rows)
    return among_masked(stats, 1, live, len(inputs.tokens_N))


def linear_gradients(
    inputs: LinearInputs, stats: Tensor, grads: StatsGrad, needed: Sequence[bool], logits: Tensor | None = None
) -> list[Tensor | None]:
    live, live_inputs = without_masked_rows(inputs)
    row_stats = RowStats(*stats.unbind())
    if live is not None:
        row_stats, grads = take(row_stats, live), take(grads, live)
    per_row, head, sums = per_row_of(live_inputs), head_of(live_inputs), GradientSums(live_inputs, needed)
    slopes = slopes_of(per_row, row_stats, grads)
    for product in products(live_inputs, per_row, grads.reads_reference, logits, are_known=True):
        stats_here, slopes_here = take(row_stats, product.rows), take(slopes, product.rows)
        for rows, per_row_R, tile in product.tiles():
            stats_R = take(stats_here, rows)
            restore(tile, per_row_R, stats_R, product.is_centred)
            head.write_gradient(tile, per_row_R, stats_R, take(slopes_here, rows))
        sums.add(product)
    return sums.among_masked(live, len(inputs.tokens_N))


def linear_loss(
    inputs: LinearInputs, objective: Objective, needed: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    live, live_inputs = without_masked_rows(inputs)
    objective = objective if live is None else take(objective, live)
    per_row, with_reference, head = per_row_of(live_inputs), inputs.ref_hidden_NH is not None, head_of(live_inputs)
    stats, sums = per_row.new_stats(inputs.stats_rows), GradientSums(live_inputs, needed)
    for product in products(live_inputs, per_row, with_reference):
        goal = take(objective, product.rows)
        for rows, per_row_R, tile in product.tiles():
            stats_R = row_statistics(tile, per_row_R)
            write(stats_R, stats[:, product.rows], rows)
            if any(needed):
                *_, grads = take(goal, rows).evaluate(stats_R)
                head.write_gradient(tile, per_row_R, stats_R, slopes_of(per_row_R, stats_R, grads))
        sums.add(product)
    count = len(inputs.tokens_N)
    return among_masked(stats, 1, live, count), sums.among_masked(live, count)


def without_masked_rows(inputs: LinearInputs) -> tuple[Tensor | None, LinearInputs]:
    """On a CPU, the inputs of the live tokens and their indices. On a GPU, selecting them would synchronise."""
    if inputs.mask_N is None or not is_on_host(inputs.mask_N):
        return None, inputs
    live = inputs.mask_N.nonzero().squeeze(1)
    return live, inputs.of_rows(live)._replace(mask_N=None)


def among_masked(x: Tensor, axis: int, live: Tensor | None, count: int) -> Tensor:
    """Scatter the rows of live tokens to their places; masked rows are 0."""
    if live is None:
        return x
    shape = [*x.shape[:axis], count, *x.shape[axis + 1 :]]
    return x.new_zeros(shape).index_copy_(axis, live, x)


def per_row_of(inputs: LinearInputs) -> RowInputs:
    return RowInputs.of(inputs, len(inputs.weight_VH), compute_dtype(inputs.hidden_NH))


class Head(NamedTuple):
    """a = softcap * tanh(u / softcap) with u = logit_scale * (hidden @ weight.T + bias); a = u without softcap."""

    weight_VH: Tensor
    bias_V: Tensor | None
    softcap: float | None
    logit_scale: float

    def logits(self, hidden_RH: Tensor, out_RV: Tensor) -> None:
        for columns, weight_CH in self._weight_tiles(out_RV.dtype):
            matrix_product(hidden_RH, weight_CH.T, out_RV[:, columns])
        if self.bias_V is not None:
            out_RV.add_(self.bias_V)
        if self.logit_scale != 1:
            out_RV.mul_(self.logit_scale)
        if self.softcap is not None:
            out_RV.div_(self.softcap).tanh_().mul_(self.softcap)

    def write_gradient(self, tile: Tile, per_row: RowInputs, stats: RowStats, slopes: Slopes) -> None:
        """Write d loss / d (hidden @ weight.T + bias) over the logits of a centred tile."""
        gradient_RV = logit_gradient(tile, per_row, slopes, tile.x if self.softcap is None else tile.e)
        self.through(gradient_RV, tile.x, per_row, stats.peak)

    def through(self, gradient_RV: Tensor, x_RV: Tensor, per_row: RowInputs, peak_R: Tensor) -> None:
        """From d loss / d a to d loss / d (hidden @ weight.T + bias), over centred logits `x_RV`."""
        if self.softcap is not None:
            share = x_RV.mul_(per_row.temperature_N1).add_(peak_R[:, None]).div_(self.softcap)
            share.square_().neg_().add_(1).mul_(gradient_RV)
        elif gradient_RV is not x_RV:
            x_RV.copy_(gradient_RV)
        if self.logit_scale != 1:
            x_RV.mul_(self.logit_scale)
        if per_row.mask_N is not None:  # 0 times the log ratio where only the reference's bias is -inf
            x_RV.masked_fill_(~per_row.mask_N[:, None], 0)

    def hidden_gradient(self, du_RV: Tensor) -> Tensor:
        grad_RH = du_RV.new_zeros(len(du_RV), self.weight_VH.shape[1])
        for columns, weight_CH in self._weight_tiles(du_RV.dtype):
            grad_RH.add_(_product(du_RV[:, columns], weight_CH))
        return grad_RH

    def _weight_tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        vocabulary, width = self.weight_VH.shape
        if self.weight_VH.dtype == dtype:
            yield slice(0, vocabulary), self.weight_VH
            return
        step = max(1, WEIGHT_TILE_BYTES // (width * dtype.itemsize))
        buffer = self.weight_VH.new_empty(min(step, vocabulary), width, dtype=dtype)
        for start in range(0, vocabulary, step):
            weight_CH = self.weight_VH[start : start + step]
            yield slice(start, start + len(weight_CH)), buffer[: len(weight_CH)].copy_(weight_CH)


def head_of(inputs: LinearInputs) -> Head:
    return Head(inputs.weight_VH, inputs.bias_V, inputs.softcap, inputs.logit_scale)


def ref_head_of(inputs: LinearInputs) -> Head:
    return Head(*inputs.reference_head(), inputs.softcap, inputs.logit_scale)


class Product(NamedTuple):
    """The logits of some rows and the hidden states they came from."""

    rows: slice
    per_row: RowInputs
    logits_SRV: Tensor  # the gradient may write over them; S = 2 with a reference
    hidden_RH: Tensor
    is_centred: bool  # as `row_statistics` left them
    keep_y: bool

    def tiles(self) -> Iterator[tuple[slice, RowInputs, Tile]]:
        def load(rows: slice) -> tuple[Tensor, Tensor | None]:
            x, *y = self.logits_SRV[:, rows]
            return x, y[0] if y else None

        return tiles(self.per_row, self.logits_SRV.shape[2], load, self.keep_y)


def products(
    inputs: LinearInputs,
    per_row: RowInputs,
    with_reference: bool,
    logits_SKV: Tensor | None = None,
    are_known: bool = False,
) -> Iterator[Product]:
    """Enough rows at a time to make reading the weight worth it. All share one buffer: with `logits_SKV`, which keeps
    those of the first K rows, its beginning, which is filled last and emptied first.
    """
    count, height, streams = len(per_row.index_N), product_height(inputs), 1 + with_reference
    keep_y = with_reference and inputs.stats_rows == ALL_ROWS
    kept, starts = 0 if logits_SKV is None else logits_SKV.shape[1], range(0, count, height)
    if logits_SKV is None or kept == 0:
        buffer = per_row.known_N.new_empty(streams, min(height, count), len(inputs.weight_VH))
    else:
        buffer = logits_SKV[:streams]
    for start in reversed(starts) if kept and not are_known else starts:
        rows, first = slice(start, min(start + height, count)), start if start < kept else 0
        per_row_R, logits_SRV = take(per_row, rows), buffer[:, first : first + rows.stop - start]
        hidden_RH = float_rows(inputs.hidden_NH, rows, per_row_R)
        is_centred = are_known and start < kept
        if not is_centred:
            head_of(inputs).logits(hidden_RH, logits_SRV[0])
            if with_reference and inputs.ref_hidden_NH is not None:
                ref_head_of(inputs).logits(float_rows(inputs.ref_hidden_NH, rows, per_row_R), logits_SRV[1])
        yield Product(rows, per_row_R, logits_SRV, hidden_RH, is_centred, keep_y)


def product_height(inputs: LinearInputs) -> int:
    row_bytes = len(inputs.weight_VH) * compute_dtype(inputs.hidden_NH).itemsize
    return 1 if inputs.batch_invariant else max(1, PRODUCT_BYTES // row_bytes)


class GradientSums:
    """Gradients of hidden, weight and bias in the compute dtype, each only if needed."""

    def __init__(self, inputs: LinearInputs, needed: Sequence[bool]) -> None:
        self.head, like = head_of(inputs), per_row_of(inputs).known_N
        leaves = zip((inputs.hidden_NH, inputs.weight_VH, inputs.bias_V), needed, strict=True)
        self.sums = [like.new_zeros(x.shape) if x is not None and need else None for x, need in leaves]

    def add(self, product: Product) -> None:
        """Add the contribution of a product whose logits now hold their gradient."""
        du_RV, (grad_hidden_NH, grad_weight_VH, grad_bias_V) = product.logits_SRV[0], self.sums
        if grad_hidden_NH is not None:
            grad_hidden_NH[product.rows] = self.head.hidden_gradient(du_RV)
        if grad_weight_VH is not None:
            grad_weight_VH.addmm_(du_RV.T, product.hidden_RH)
        if grad_bias_V is not None:
            grad_bias_V.add_(du_RV.sum(0))

    def among_masked(self, live: Tensor | None, count: int) -> list[Tensor | None]:
        grad_hidden_NH, *rest = self.sums
        return [None if grad_hidden_NH is None else among_masked(grad_hidden_NH, 0, live, count), *rest]


def matrix_product(x: Tensor, y: Tensor, out: Tensor) -> None:
    x, y = x.to(out.dtype), y.to(out.dtype)
    if len(x) > 1:
        torch.mm(x, y, out=out)
    else:
        out.copy_(_product(x, y))


def _product(rows_RK: Tensor, matrix: Tensor) -> Tensor:
    """Duplicates a single row: the product of a vector is summed serially, ten times less precisely."""
    return rows_RK @ matrix if len(rows_RK) > 1 else (rows_RK.expand(2, -1) @ matrix)[:1]


def float_rows(x_NH: Tensor, rows: slice, per_row: RowInputs) -> Tensor:
    """A copy in the compute dtype: its alignment, hence the bits of its products, does not depend on the row."""
    x_RH = x_NH[rows].to(per_row.known_N.dtype, copy=True)
    return x_RH if per_row.mask_N is None else x_RH.where(per_row.mask_N[:, None], 0)
