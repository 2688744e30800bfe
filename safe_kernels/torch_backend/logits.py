"""Statistics of logits that already exist.

Shapes: N tokens, R rows of a tile, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..inputs import LogitsInputs, Terms, compute_dtype, take
from .rows import (
    Gradients,
    RowStats,
    Tokens,
    logit_gradient,
    new_stats,
    restore,
    row_statistics,
    tile_height,
    tiles,
)
from .values import terms_of


def logits_statistics(inputs: LogitsInputs, terms: Terms | None) -> tuple[Tensor, Tensor | None]:
    tokens = tokens_of(inputs)
    stats = new_stats(tokens, inputs.ref_logits is not None)
    for rows, tokens_R, tile in tiles(tokens, inputs.logits.shape[-1], _loader(inputs, tokens, inputs.ref_logits)):
        row_statistics(tile, tokens_R).write(stats, rows)
    return stats, terms_of(terms, stats, inputs.mask_N)


def logits_gradient(inputs: LogitsInputs, stats: Tensor, slopes: tuple[Tensor | None, ...], out: Tensor) -> None:
    """Write d loss / d logits to `out`, which may be the logits."""
    tokens, row_stats = tokens_of(inputs), RowStats.of(stats)
    gradients = Gradients.of(tokens, row_stats, *slopes)
    reference = None if gradients.kl is None else inputs.ref_logits
    for rows, tokens_R, tile in tiles(tokens, inputs.logits.shape[-1], _loader(inputs, tokens, reference)):
        stats_R = take(row_stats, rows)
        restore(tile, tokens_R, stats_R)
        _store_rows(out, rows, logit_gradient(tile, tokens_R, stats_R, take(gradients, rows)))


def tokens_of(inputs: LogitsInputs) -> Tokens:
    vocabulary = inputs.logits.shape[-1]
    return Tokens.of(inputs.tokens_N, vocabulary, inputs.temperature, inputs.mask_N, compute_dtype(inputs.logits))


def _loader(
    inputs: LogitsInputs, tokens: Tokens, ref_logits: Tensor | None
) -> Callable[[slice], tuple[Tensor, Tensor | None]]:
    """Copies rows of the logits into buffers of the compute dtype; a masked row becomes zeros."""
    vocabulary, like = inputs.logits.shape[-1], tokens.known_N
    height = min(tile_height(vocabulary, like), len(like))
    x, y = like.new_empty(height, vocabulary), None if ref_logits is None else like.new_empty(height, vocabulary)

    def fill(buffer: Tensor, source: Tensor, rows: slice) -> Tensor:
        buffer = buffer[: rows.stop - rows.start].copy_(_rows(source, rows))
        return buffer if tokens.mask_N is None else buffer.masked_fill_(~tokens.mask_N[rows, None], 0)

    def load(rows: slice) -> tuple[Tensor, Tensor | None]:
        reference = None if y is None or ref_logits is None else fill(y, ref_logits, rows)
        return fill(x, inputs.logits, rows), reference

    return load


def _rows(x: Tensor, rows: slice) -> Tensor:
    """Rows of `x` [..., V] counted over its leading shape: a view where the strides allow one, else a copy."""
    try:
        return x.view(-1, x.shape[-1])[rows]
    except RuntimeError:
        return x[_leading_index(x, rows)]


def _store_rows(x: Tensor, rows: slice, values_RV: Tensor) -> None:
    try:
        x.view(-1, x.shape[-1])[rows] = values_RV
    except RuntimeError:
        x[_leading_index(x, rows)] = values_RV.to(x.dtype)


def _leading_index(x: Tensor, rows: slice) -> tuple[Tensor, ...]:
    return torch.unravel_index(torch.arange(rows.start, rows.stop, device=x.device), x.shape[:-1])
