"""Statistics over the ids that a sampler kept: what `kept=` of `token_stats` and `linear_token_stats` calls.

The ids that some rows kept are, together, a small vocabulary. Its logits are one tile of float32, -inf where a row did
not keep an id, and the backend's statistics of logits do the rest. Both the forward and the backward make the tile.

Shapes: N tokens, R rows of a chunk, U ids of it, C some of them, W >= U columns of its tile, V vocabulary, H width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dispatch import Backend, backend_of, differentiable, keep, kept, register, without_second_derivative
from .inputs import KeptIds, LinearInputs, LogitsInputs, StatsGrad, compute_dtype, take, without_masked
from .kept_sets import Chunk, chunks
from .results import constants_of, new_results, results_of

WEIGHT_BYTES = 16 << 20  # of the rows of a weight that are gathered at a time


class Tile(NamedTuple):
    chunk: Chunk
    logits: LogitsInputs
    hidden_RH: Tensor | None = None  # that they were made of

    def gradient(self, stats: Tensor, grads: StatsGrad, backend: Backend) -> Tensor:
        """d loss / d logits [R, W], written over them; 0 outside of the sets."""
        logits_RW, rows = self.logits.logits, self.chunk.rows
        backend.logits_gradient(self.logits, stats[:, rows], take(grads, rows), logits_RW)
        return logits_RW.masked_fill_(~self.chunk.is_kept_RW, 0)


def statistics(tiles: Iterator[Tile], like: Tensor, inputs: LogitsInputs | LinearInputs, backend: str) -> Tensor:
    stats = like.new_empty(inputs.stats_rows, len(inputs.tokens_N), dtype=compute_dtype(like))
    for tile in tiles:
        stats[:, tile.chunk.rows] = backend_of(backend).logits_statistics(tile.logits)
    return stats


def tile_of(
    chunk: Chunk, inputs: LogitsInputs | LinearInputs, logits_RW: Tensor, ref_logits_RW: Tensor | None
) -> LogitsInputs:
    for x in (logits_RW, ref_logits_RW):
        if x is not None:
            x.masked_fill_(~chunk.is_kept_RW, -torch.inf)
    temperatures_R, mask_R = (None if x is None else x[chunk.rows] for x in (inputs.temperatures_N, inputs.mask_N))
    others = (inputs.temperature, temperatures_R, mask_R, inputs.stats_rows)
    return LogitsInputs(logits_RW, ref_logits_RW, chunk.tokens_R, *others)


def tiles_of_logits(inputs: LogitsInputs, sets: KeptIds) -> Iterator[Tile]:
    dtype, vocabulary = compute_dtype(inputs.logits), inputs.logits.shape[-1]
    for chunk in chunks(sets, inputs.tokens_N, vocabulary, dtype.itemsize):
        tiles: list[Tensor | None] = [None, None]
        for i, x in enumerate((inputs.logits, inputs.ref_logits)):
            if x is not None:
                tiles[i] = new_tile = x.new_empty(chunk.is_kept_RW.shape, dtype=dtype)
                new_tile[:, chunk.columns] = some_logits(x, chunk)
        assert tiles[0] is not None
        yield Tile(chunk, tile_of(chunk, inputs, tiles[0], tiles[1]))


def some_logits(x: Tensor, chunk: Chunk) -> Tensor:
    """[R, U] of logits [..., V] with any strides."""
    try:
        return x.view(-1, x.shape[-1])[chunk.rows].index_select(1, chunk.ids_U)
    except RuntimeError:
        rows = torch.arange(chunk.rows.start, chunk.rows.stop, device=x.device)
        return x[(*[index_R[:, None] for index_R in torch.unravel_index(rows, x.shape[:-1])], chunk.ids_U)]


def tiles_of_hidden(inputs: LinearInputs, sets: KeptIds, backend: Backend, with_reference: bool) -> Iterator[Tile]:
    hidden_NH, ref_hidden_NH, mask_N = inputs.hidden_NH, inputs.ref_hidden_NH, inputs.mask_N
    vocabulary, itemsize = len(inputs.weight_VH), compute_dtype(hidden_NH).itemsize
    for chunk in chunks(sets, inputs.tokens_N, vocabulary, itemsize):
        mask_R1, ref_logits_RW = None if mask_N is None else mask_N[chunk.rows, None], None
        # NaNs in masked rows must not reach a product.
        hidden_RH = without_masked(hidden_NH[chunk.rows], mask_R1)
        logits_RW = logits_of(hidden_RH, inputs.weight_VH, inputs.bias_V, inputs, chunk, backend)
        if with_reference and ref_hidden_NH is not None:
            ref_hidden_RH = without_masked(ref_hidden_NH[chunk.rows], mask_R1)
            ref_logits_RW = logits_of(ref_hidden_RH, *inputs.reference_head(), inputs, chunk, backend)
        yield Tile(chunk, tile_of(chunk, inputs, logits_RW, ref_logits_RW), hidden_RH)


def logits_of(
    hidden_RH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, inputs: LinearInputs, chunk: Chunk, backend: Backend
) -> Tensor:
    """[R, W]: softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) of the ids of the chunk."""
    out_RW = hidden_RH.new_empty(chunk.is_kept_RW.shape, dtype=compute_dtype(inputs.hidden_NH))
    dtype = torch.promote_types(hidden_RH.dtype, weight_VH.dtype)
    for columns, weight_CH in weights(weight_VH, chunk, dtype):
        backend.matrix_product(hidden_RH.to(dtype), weight_CH.T, out_RW[:, columns])
    if bias_V is not None:
        out_RW[:, chunk.columns] += bias_V[chunk.ids_U]
    if inputs.logit_scale != 1:
        out_RW *= inputs.logit_scale
    if inputs.softcap is not None:
        out_RW.div_(inputs.softcap).tanh_().mul_(inputs.softcap)
    return out_RW


def weights(weight_VH: Tensor, chunk: Chunk, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Columns of the chunk's tile, and their rows of the weight."""
    step = max(1, WEIGHT_BYTES // (4 * weight_VH.shape[1]))
    for start in range(0, len(chunk.ids_U), step):
        ids_C = chunk.ids_U[start : start + step]
        yield slice(start, start + len(ids_C)), weight_VH[ids_C].to(dtype)


def logits_gradient(inputs: LogitsInputs, sets: KeptIds, stats: Tensor, grads: StatsGrad, backend: Backend) -> Tensor:
    out = torch.zeros_like(inputs.logits, memory_format=torch.contiguous_format)
    if not grads.reads_reference:
        inputs = inputs._replace(ref_logits=None)
    for tile in tiles_of_logits(inputs, sets):
        chunk, du_RW = tile.chunk, tile.gradient(stats, grads, backend)
        out.view(-1, out.shape[-1])[chunk.rows].index_copy_(1, chunk.ids_U, du_RW[:, chunk.columns].to(out.dtype))
    return out


def linear_gradients(
    inputs: LinearInputs, sets: KeptIds, stats: Tensor, grads: StatsGrad, needed: Sequence[bool], backend: Backend
) -> list[Tensor | None]:
    """Of (hidden, weight, bias), in the compute dtype; None where not needed."""
    leaves = zip((inputs.hidden_NH, inputs.weight_VH, inputs.bias_V), needed, strict=True)
    sums = [stats.new_zeros(x.shape) if x is not None and need else None for x, need in leaves]
    for tile in tiles_of_hidden(inputs, sets, backend, grads.reads_reference):
        share_RW = None
        if inputs.softcap is not None:
            share_RW = 1 - (tile.logits.logits / inputs.softcap).square_()
        du_RW = tile.gradient(stats, grads, backend)
        if share_RW is not None:
            du_RW.mul_(share_RW).masked_fill_(~tile.chunk.is_kept_RW, 0)
        if inputs.logit_scale != 1:
            du_RW *= inputs.logit_scale
        add(sums, inputs.weight_VH, tile, du_RW, backend)
    return sums


def add(sums: Sequence[Tensor | None], weight_VH: Tensor, tile: Tile, du_RW: Tensor, backend: Backend) -> None:
    """Add a tile's share to the gradients of (hidden, weight, bias)."""
    (grad_hidden_NH, grad_weight_VH, grad_bias_V), chunk, hidden_RH = sums, tile.chunk, tile.hidden_RH
    assert hidden_RH is not None
    part_RH, dtype = du_RW.new_empty(hidden_RH.shape), torch.promote_types(hidden_RH.dtype, weight_VH.dtype)
    for columns, weight_CH in weights(weight_VH, chunk, dtype):
        if grad_hidden_NH is not None:
            backend.matrix_product(du_RW[:, columns], weight_CH, part_RH)
            grad_hidden_NH[chunk.rows] += part_RH
        if grad_weight_VH is not None:
            part_CH = du_RW.new_empty(weight_CH.shape)
            backend.matrix_product(du_RW[:, columns].T, hidden_RH.to(dtype), part_CH)
            grad_weight_VH.index_add_(0, chunk.ids_U[columns], part_CH)
    if grad_bias_V is not None:
        grad_bias_V.index_add_(0, chunk.ids_U, du_RW[:, chunk.columns].sum(0))


def kept_token_stats_fake(logits: Tensor, ref_logits: Tensor | None, tokens_N: Tensor, *others: Any) -> Any:
    return new_results(logits, tokens_N, stats_rows=others[3])


@register(kept_token_stats_fake)
def kept_token_stats_op(
    logits: Tensor,
    ref_logits: Tensor | None,
    tokens_N: Tensor,
    temperature: float,
    temperatures_N: Tensor | None,
    mask_N: Tensor | None,
    stats_rows: int,
    ids: Tensor,
    offsets: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `token_stats_op`, over the kept ids."""
    inputs = LogitsInputs(logits, ref_logits, tokens_N, temperature, temperatures_N, mask_N, stats_rows)
    tiles = tiles_of_logits(inputs, KeptIds(ids, offsets))
    return results_of(statistics(tiles, logits, inputs, backend))  # type: ignore[return-value]


@register(lambda logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format))
def kept_token_stats_backward_op(
    logits: Tensor,
    ref_logits: Tensor | None,
    tokens_N: Tensor,
    temperature: float,
    temperatures_N: Tensor | None,
    mask_N: Tensor | None,
    stats_rows: int,
    ids: Tensor,
    offsets: Tensor,
    stats: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_kl: Tensor | None,
    grad_ref_kl: Tensor | None,
    backend: str,
) -> Tensor:
    """d loss / d logits."""
    inputs = LogitsInputs(logits, ref_logits, tokens_N, temperature, temperatures_N, mask_N, stats_rows)
    grads = StatsGrad(grad_logprob, grad_entropy, grad_kl, grad_ref_kl)
    return logits_gradient(inputs, KeptIds(ids, offsets), stats, grads, backend_of(backend))


def linear_kept_token_stats_fake(hidden_NH: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return new_results(hidden_NH, others[5], stats_rows=others[12])


@register(linear_kept_token_stats_fake)
def linear_kept_token_stats_op(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    ref_hidden_NH: Tensor | None,
    ref_weight_VH: Tensor | None,
    ref_bias_V: Tensor | None,
    tokens_N: Tensor,
    temperature: float,
    temperatures_N: Tensor | None,
    mask_N: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    batch_invariant: bool,
    stats_rows: int,
    ids: Tensor,
    offsets: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `linear_token_stats_op`, over the kept ids."""
    head = (hidden_NH, weight_VH, bias_V, ref_hidden_NH, ref_weight_VH, ref_bias_V)
    per_row = (tokens_N, temperature, temperatures_N, mask_N)
    inputs = LinearInputs(*head, *per_row, softcap, logit_scale, batch_invariant, stats_rows)
    tiles = tiles_of_hidden(inputs, KeptIds(ids, offsets), backend_of(backend), with_reference=True)
    return results_of(statistics(tiles, hidden_NH, inputs, backend))  # type: ignore[return-value]


def linear_kept_token_stats_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    leaves, stats, needed = arguments[:3], arguments[16], arguments[21:24]
    return tuple(stats.new_empty(x.shape if need else 0) for x, need in zip(leaves, needed, strict=True))


@register(linear_kept_token_stats_backward_fake)
def linear_kept_token_stats_backward_op(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    ref_hidden_NH: Tensor | None,
    ref_weight_VH: Tensor | None,
    ref_bias_V: Tensor | None,
    tokens_N: Tensor,
    temperature: float,
    temperatures_N: Tensor | None,
    mask_N: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    batch_invariant: bool,
    stats_rows: int,
    ids: Tensor,
    offsets: Tensor,
    stats: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_kl: Tensor | None,
    grad_ref_kl: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (hidden, weight, bias) in the compute dtype, empty where not needed."""
    head = (hidden_NH, weight_VH, bias_V, ref_hidden_NH, ref_weight_VH, ref_bias_V)
    per_row = (tokens_N, temperature, temperatures_N, mask_N)
    inputs = LinearInputs(*head, *per_row, softcap, logit_scale, batch_invariant, stats_rows)
    grads, needed = StatsGrad(grad_logprob, grad_entropy, grad_kl, grad_ref_kl), (need_hidden, need_weight, need_bias)
    found = linear_gradients(inputs, KeptIds(ids, offsets), stats, grads, needed, backend_of(backend))
    return tuple(stats.new_empty(0) if x is None else x for x in found)  # type: ignore[return-value]


def save_stats(ctx: Any, arguments: tuple[Any, ...], found: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*constants_of(found))
    keep(ctx, arguments, found[-1])


def gradient_of(op: Any, leaves: int) -> Any:
    """By an op that takes the arguments of the forward, the statistics, their gradients, which of several leaves need
    one, and the backend.
    """

    def backward(ctx: Any, grad_logprob: Any, grad_entropy: Any, _: None, *others: Any) -> Any:
        grads, needed = StatsGrad(grad_logprob, grad_entropy, *others[:2]), ctx.needs_input_grad[1 : 1 + leaves]
        if not any(x is not None for x in grads):
            return [None] * leaves
        *arguments, backend, stats = kept(ctx)
        if leaves == 1:
            return [op(*arguments, stats, *grads, backend)]
        found = zip(op(*arguments, stats, *grads, *needed, backend), arguments, needed, strict=False)
        return [x.to(leaf.dtype) if need else None for x, leaf, need in found]

    return backward


differentiable(kept_token_stats_op, 1, save_stats, gradient_of(kept_token_stats_backward_op, 1))
differentiable(linear_kept_token_stats_op, 3, save_stats, gradient_of(linear_kept_token_stats_backward_op, 3))
without_second_derivative(kept_token_stats_backward_op, 14)
without_second_derivative(linear_kept_token_stats_backward_op, 21)
