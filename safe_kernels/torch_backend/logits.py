"""Statistics of logits that already exist.

Shapes: N tokens, R rows of a tile, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..inputs import LogitsInputs, Terms
from .rows import Gradients, RowStats, Tile, Tokens, logit_gradient, new_stats, restore, row_statistics, take, tiles
from .values import found_terms


def logits_statistics(inputs: LogitsInputs, terms: Terms | None) -> tuple[Tensor, Tensor | None]:
    tokens = asked_of(inputs)
    stats = new_stats(tokens, inputs.ref_logits is not None)
    for rows, some, tile in _loaded_tiles(inputs, tokens, inputs.ref_logits is not None):
        row_statistics(tile, some).write(stats, rows)
    return stats, found_terms(terms, stats, inputs.mask_N)


def logits_gradient(inputs: LogitsInputs, stats: Tensor, slopes: tuple[Tensor | None, ...], out: Tensor) -> None:
    """Write d loss / d logits to `out`, which may be the logits."""
    tokens, row_stats = asked_of(inputs), RowStats.of(stats)
    gradients = Gradients.of(tokens, *slopes)
    for rows, some, tile in _loaded_tiles(inputs, tokens, gradients.kl is not None):
        part = take(row_stats, rows)
        restore(tile, some, part)
        _store_rows(out, rows, logit_gradient(tile, some, part, take(gradients, rows)))


def asked_of(inputs: LogitsInputs) -> Tokens:
    vocabulary = inputs.logits.shape[-1]
    return Tokens.of(inputs.tokens_N, vocabulary, inputs.temperature, inputs.mask_N, inputs.logits.dtype)


def _loaded_tiles(inputs: LogitsInputs, tokens: Tokens, with_reference: bool) -> Iterator[tuple[slice, Tokens, Tile]]:
    """The tiles with logits; a masked row is loaded as zeros."""
    for rows, some, tile in tiles(tokens, inputs.logits.shape[-1], with_reference):
        for buffer, source in ((tile.x, inputs.logits), (tile.y, inputs.ref_logits)):
            if buffer is not None and source is not None:
                buffer.copy_(_rows(source, rows))
                if some.mask_N is not None:
                    buffer.masked_fill_(~some.mask_N[:, None], 0)
        yield rows, some, tile


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
