"""Statistics of logits that already exist.

Shapes: N tokens, R rows of a tile, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..results import TokenStats
from .rows import Gradients, RowStats, Tile, Tokens, logit_gradient, restore, row_statistics, take, tiles


def token_stats(
    logits: Tensor,
    tokens: Tensor,
    *,
    ref_logits: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    inplace_backward: bool = False,
) -> TokenStats:
    results = _TokenStats.apply(
        logits,
        tokens.reshape(-1),
        None if ref_logits is None else ref_logits.detach(),
        temperature.reshape(-1) if isinstance(temperature, Tensor) else temperature,
        None if mask is None else mask.reshape(-1),
        inplace_backward,
    )
    return TokenStats._make(None if x is None else x.view(tokens.shape) for x in results)


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        tokens_N: Tensor,
        ref_logits: Tensor | None,
        temperature: float | Tensor,
        mask_N: Tensor | None,
        inplace_backward: bool,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.inplace = inplace_backward
        tokens = Tokens.of(tokens_N, logits.shape[-1], temperature, mask_N, logits.dtype)
        stats = RowStats.empty(tokens, ref_logits is not None)
        for rows, some, tile in _loaded_tiles(logits, ref_logits, tokens):
            stats.write(rows, row_statistics(tile, some))
        results = stats.results(tokens)
        save(ctx, (logits, ref_logits, *tokens, *stats))
        if results[2] is not None:
            ctx.mark_non_differentiable(results[2])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, ref_logits, *rest = saved(ctx)
        tokens, stats = Tokens(*rest[:4]), RowStats(*rest[4:])
        grad_logprob, grad_entropy, _, grad_kl = grads
        gradients = Gradients.of(tokens, grad_logprob, grad_entropy, grad_kl)
        grad_logits = logits.detach() if ctx.inplace else logits.new_empty(logits.shape)
        for rows, some, tile in _loaded_tiles(logits, None if grad_kl is None else ref_logits, tokens):
            restore(tile, some, take(stats, rows))
            _store_rows(grad_logits, rows, logit_gradient(tile, some, take(stats, rows), take(gradients, rows)))
        return grad_logits, *(None,) * 5


def save(ctx: Any, values: tuple[Any, ...]) -> None:
    """Keep tensors where autograd watches their versions, the others beside them."""
    ctx.constants = tuple(None if isinstance(x, Tensor) else x for x in values)
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in values))


def saved(ctx: Any) -> list[Any]:
    return [x if c is None else c for x, c in zip(ctx.saved_tensors, ctx.constants, strict=True)]


def _loaded_tiles(logits: Tensor, ref_logits: Tensor | None, tokens: Tokens) -> Iterator[tuple[slice, Tokens, Tile]]:
    """The tiles with logits; a masked row is loaded as zeros."""
    for rows, some, tile in tiles(tokens, logits.shape[-1], ref_logits is not None):
        for buffer, source in ((tile.x, logits), (tile.y, ref_logits)):
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
