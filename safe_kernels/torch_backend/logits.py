"""Statistics of logits that already exist.

Shapes: N tokens, R rows of a tile, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..inputs import ALL_ROWS, LogitsInputs, RowStats, StatsGrad, compute_dtype, take
from .rows import RowInputs, logit_gradient, restore, row_statistics, slopes_of, tile_height, tiles, write


def logits_statistics(inputs: LogitsInputs) -> Tensor:
    vocabulary = inputs.logits.shape[-1]
    per_row = RowInputs.of(inputs, vocabulary, compute_dtype(inputs.logits))
    stats = per_row.new_stats(inputs.stats_rows)
    load, keep_y = loader(inputs, per_row, inputs.ref_logits), inputs.stats_rows == ALL_ROWS
    for rows, per_row_R, tile in tiles(per_row, vocabulary, load, keep_y):
        write(row_statistics(tile, per_row_R), stats, rows)
    return stats


def logits_gradient(inputs: LogitsInputs, stats: Tensor, grads: StatsGrad, out: Tensor) -> None:
    vocabulary, row_stats = inputs.logits.shape[-1], RowStats(*stats.unbind())
    per_row = RowInputs.of(inputs, vocabulary, compute_dtype(inputs.logits))
    slopes = slopes_of(per_row, row_stats, grads)
    load = loader(inputs, per_row, inputs.ref_logits if grads.reads_reference else None)
    for rows, per_row_R, tile in tiles(per_row, vocabulary, load, keep_y=grads.ref_kl is not None):
        restore(tile, per_row_R, take(row_stats, rows))
        store_rows(out, rows, logit_gradient(tile, per_row_R, take(slopes, rows), tile.e))


def loader(
    inputs: LogitsInputs, per_row: RowInputs, ref_logits: Tensor | None
) -> Callable[[slice], tuple[Tensor, Tensor | None]]:
    """Copies rows of the logits into buffers of the compute dtype; a masked row becomes zeros."""
    vocabulary, like = inputs.logits.shape[-1], per_row.known_N
    height = min(tile_height(vocabulary, like), len(like))
    x, y = like.new_empty(height, vocabulary), None if ref_logits is None else like.new_empty(height, vocabulary)

    def fill(buffer: Tensor, source: Tensor, rows: slice) -> Tensor:
        buffer = buffer[: rows.stop - rows.start].copy_(_rows(source, rows))
        return buffer if per_row.mask_N is None else buffer.masked_fill_(~per_row.mask_N[rows, None], 0)

    def load(rows: slice) -> tuple[Tensor, Tensor | None]:
        reference = None if y is None or ref_logits is None else fill(y, ref_logits, rows)
        return fill(x, inputs.logits, rows), reference

    return load


def _rows(x: Tensor, rows: slice) -> Tensor:
    """Rows of `x` [..., V] counted over its leading shape: a view if the strides allow one, otherwise a copy."""
    try:
        return x.view(-1, x.shape[-1])[rows]
    except RuntimeError:
        return x[_leading_index(x, rows)]


def store_rows(x: Tensor, rows: slice, values_RV: Tensor) -> None:
    try:
        x.view(-1, x.shape[-1])[rows] = values_RV
    except RuntimeError:
        x[_leading_index(x, rows)] = values_RV.to(x.dtype)


def _leading_index(x: Tensor, rows: slice) -> tuple[Tensor, ...]:
    return torch.unravel_index(torch.arange(rows.start, rows.stop, device=x.device), x.shape[:-1])
