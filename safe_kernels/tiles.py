"""Statistics by tiles of some rows: within the ids that a sampler kept, and log-probs of several ids a token.

The ids that some rows kept are,
together, a small vocabulary. Its logits are one tile, -inf where a row did not keep an id, and the backend's statistics
of logits do the rest. While the tile is there, the logits of K ids a token are read off it. Without `kept` a tile has
the whole vocabulary. The backward makes the tile again, and its gradient, to which those K ids add theirs.

Shapes: N tokens, K ids of a token, R rows of a chunk, U ids of its vocabulary, C some of them, W >= U columns of its
tile, V vocabulary, H width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import Backend
from .inputs import KeptIds, LinearInputs, LogitsInputs, StatsGrad, compute_dtype, take, without_masked
from .kept_sets import Chunk, chunks
from .results import results_of

WEIGHT_BYTES = 16 << 20  # of the rows of a weight that are gathered at a time


class Tile(NamedTuple):
    chunk: Chunk
    logits: LogitsInputs  # with a token of each row: its own, or any where it has K
    ids_RK: Tensor | None  # the K
    hidden_RH: Tensor | None = None  # that the logits were made of

    def statistics(self, backend: Backend) -> tuple[Tensor, list[Tensor]]:
        """The rows of `RowStats`, and if each row has K ids their log-probs [R, K] under policy and reference."""
        stats, logprobs = backend.logits_statistics(self.logits), list[Tensor]()
        if self.ids_RK is not None:
            logprobs = [self._logprobs(self.logits.logits, stats[2], stats[3])]
            if self.logits.ref_logits is not None:
                logprobs.append(self._logprobs(self.logits.ref_logits, stats[6], stats[7]))
        return stats, logprobs

    def _logprobs(self, logits_RW: Tensor, peak_R: Tensor, log_total_R: Tensor) -> Tensor:
        a_RK = logits_RW.gather(1, self.chunk.tokens_R.clamp(min=0)).to(peak_R.dtype)
        found_RK = (a_RK - peak_R[:, None]) / self._temperature() - log_total_R[:, None]
        found_RK = found_RK.masked_fill(self.chunk.tokens_R < 0, torch.nan).masked_fill(self._is_none(), -torch.inf)
        return without_masked(found_RK, self._mask_R1())

    def gradient(self, stats: Tensor, grads: StatsGrad, out_RW: Tensor, backend: Backend) -> None:
        """d loss / d logits, written to `out_RW`, which may be the logits; 0 for ids that a row did not keep."""
        rows, logits, slopes_RK = self.chunk.rows, self.logits, None
        grads = take(grads, rows)
        if self.ids_RK is not None:
            logits = logits._replace(tokens_N=torch.full_like(logits.tokens_N, -1))  # no column's
            if grads.logprob is not None:
                slopes_RK = self._slopes(grads.logprob.to(stats.dtype))
                grads = grads._replace(logprob=slopes_RK.sum(1))
        backend.logits_gradient(logits, stats[:, rows], grads, out_RW)
        if slopes_RK is not None:
            out_RW.scatter_add_(1, self.chunk.tokens_R.clamp(min=0), slopes_RK / self._temperature())
        self.chunk.fill_others(out_RW, 0)

    def _slopes(self, grad_RK: Tensor) -> Tensor:
        """0 for what is no id, NaN for one whose log-prob is."""
        grad_RK = grad_RK.masked_fill(self.chunk.tokens_R < 0, torch.nan).masked_fill(self._is_none(), 0)
        return without_masked(grad_RK, self._mask_R1())

    def _is_none(self) -> Tensor:
        assert self.ids_RK is not None
        return self.ids_RK.long() == -1

    def _mask_R1(self) -> Tensor | None:
        return None if self.logits.mask_N is None else self.logits.mask_N[:, None]

    def _temperature(self) -> float | Tensor:
        if self.logits.temperatures_N is None:
            return self.logits.temperature
        temperature_R1 = self.logits.temperatures_N[:, None].to(compute_dtype(self.logits.logits))
        mask_R1 = self._mask_R1()
        return temperature_R1 if mask_R1 is None else temperature_R1.where(mask_R1, 1)


def statistics(
    tiles: Iterator[Tile], like: Tensor, inputs: LogitsInputs | LinearInputs, backend: Backend
) -> tuple[Tensor, ...]:
    """What an op returns: the results and the rows of `RowStats`."""
    stats = like.new_empty(inputs.stats_rows, len(inputs.tokens_N), dtype=compute_dtype(like))
    several = [stats.new_empty(inputs.tokens_N.shape) for _ in range(1 if inputs.stats_rows == 4 else 2)]
    for tile in tiles:
        stats[:, tile.chunk.rows], logprobs = tile.statistics(backend)
        for x_NK, x_RK in zip(several, logprobs, strict=False):
            x_NK[tile.chunk.rows] = x_RK
    return results_of(stats) if inputs.tokens_N.dim() == 1 else with_several(results_of(stats), several)


def with_several(found: Sequence[Tensor], logprobs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The results with the log-probs of K ids in the places of those of one."""
    return logprobs[0], found[1], logprobs[1] if len(logprobs) == 2 else found[2], *found[3:]


def tile_of(
    chunk: Chunk,
    inputs: LogitsInputs | LinearInputs,
    logits_RW: Tensor,
    ref_logits_RW: Tensor | None,
    hidden_RH: Tensor | None = None,
) -> Tile:
    for x in (logits_RW, ref_logits_RW):
        if x is not None:
            chunk.fill_others(x, -torch.inf)
    per_row = (inputs.temperatures_N, inputs.mask_N)
    temperatures_R, mask_R = (None if x is None else x[chunk.rows] for x in per_row)
    several = inputs.tokens_N.dim() == 2
    tokens_R = torch.zeros_like(chunk.tokens_R[:, 0]) if several else chunk.tokens_R
    others = (inputs.temperature, temperatures_R, mask_R, inputs.stats_rows)
    logits = LogitsInputs(logits_RW, ref_logits_RW, tokens_R, *others)
    return Tile(chunk, logits, inputs.tokens_N[chunk.rows] if several else None, hidden_RH)


def tiles_of_logits(inputs: LogitsInputs, sets: KeptIds | None) -> Iterator[Tile]:
    dtype, vocabulary = compute_dtype(inputs.logits), inputs.logits.shape[-1]
    for chunk in chunks(sets, inputs.tokens_N, vocabulary, dtype):

        def load(x: Tensor, chunk: Chunk = chunk) -> Tensor:
            if chunk.is_kept_RW is None:
                return some_logits(x, chunk)
            out_RW = x.new_empty(chunk.is_kept_RW.shape, dtype=dtype)
            out_RW[:, chunk.columns] = some_logits(x, chunk)
            return out_RW

        yield tile_of(
            chunk, inputs, load(inputs.logits), None if inputs.ref_logits is None else load(inputs.ref_logits)
        )


def some_logits(x: Tensor, chunk: Chunk) -> Tensor:
    """[R, U] of logits [..., V] with any strides: a view of those of all ids, if strides allow one."""
    try:
        x_RV = x.view(-1, x.shape[-1])[chunk.rows]
    except RuntimeError:
        rows = torch.arange(chunk.rows.start, chunk.rows.stop, device=x.device)
        index = torch.unravel_index(rows, x.shape[:-1])
        if isinstance(chunk.ids, slice):
            return x[index]
        return x[(*[index_R[:, None] for index_R in index], chunk.ids)]
    return x_RV if isinstance(chunk.ids, slice) else x_RV.index_select(1, chunk.ids)


def tiles_of_hidden(
    inputs: LinearInputs, sets: KeptIds | None, backend: Backend, with_reference: bool
) -> Iterator[Tile]:
    hidden_NH, ref_hidden_NH, mask_N = inputs.hidden_NH, inputs.ref_hidden_NH, inputs.mask_N
    for chunk in chunks(sets, inputs.tokens_N, len(inputs.weight_VH), compute_dtype(hidden_NH)):
        mask_R1, ref_logits_RW = None if mask_N is None else mask_N[chunk.rows, None], None
        # NaNs in masked rows must not reach a product.
        hidden_RH = without_masked(hidden_NH[chunk.rows], mask_R1)
        logits_RW = logits_of(hidden_RH, inputs.weight_VH, inputs.bias_V, inputs, chunk, backend)
        if with_reference and ref_hidden_NH is not None:
            ref_hidden_RH = without_masked(ref_hidden_NH[chunk.rows], mask_R1)
            ref_logits_RW = logits_of(ref_hidden_RH, *inputs.reference_head(), inputs, chunk, backend)
        yield tile_of(chunk, inputs, logits_RW, ref_logits_RW, hidden_RH)


def logits_of(
    hidden_RH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, inputs: LinearInputs, chunk: Chunk, backend: Backend
) -> Tensor:
    """[R, W]: softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) of the ids of the chunk."""
    out_RW = hidden_RH.new_empty(len(hidden_RH), chunk.width, dtype=compute_dtype(inputs.hidden_NH))
    dtype = torch.promote_types(hidden_RH.dtype, weight_VH.dtype)
    for columns, weight_CH in weights(weight_VH, chunk, dtype):
        backend.matrix_product(hidden_RH.to(dtype), weight_CH.T, out_RW[:, columns])
    if bias_V is not None:
        out_RW[:, chunk.columns] += bias_V[chunk.ids]
    if inputs.logit_scale != 1:
        out_RW *= inputs.logit_scale
    if inputs.softcap is not None:
        out_RW.div_(inputs.softcap).tanh_().mul_(inputs.softcap)
    return out_RW


def weights(weight_VH: Tensor, chunk: Chunk, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Columns of the chunk's tile, and their rows of the weight."""
    step = max(1, WEIGHT_BYTES // (4 * weight_VH.shape[1]))
    for start in range(0, chunk.columns.stop, step):
        columns = slice(start, min(start + step, chunk.columns.stop))
        yield columns, weight_VH[chunk.ids_of(columns)].to(dtype)


def logits_gradient(
    inputs: LogitsInputs, sets: KeptIds | None, stats: Tensor, grads: StatsGrad, backend: Backend
) -> Tensor:
    new = torch.empty_like if sets is None else torch.zeros_like
    out = new(inputs.logits, memory_format=torch.contiguous_format)
    if not grads.reads_reference:
        inputs = inputs._replace(ref_logits=None)
    for tile in tiles_of_logits(inputs, sets):
        chunk, du_RW = tile.chunk, tile.logits.logits
        out_RV = out.view(-1, out.shape[-1])[chunk.rows]
        if chunk.is_kept_RW is None:  # then the tile is the caller's
            du_RW = out_RV if out.dtype == stats.dtype else torch.empty_like(out_RV, dtype=stats.dtype)
        tile.gradient(stats, grads, du_RW, backend)
        if du_RW is not out_RV:
            out_RV[:, chunk.ids] = du_RW[:, chunk.columns].to(out.dtype)
    return out


def linear_gradients(
    inputs: LinearInputs,
    sets: KeptIds | None,
    stats: Tensor,
    grads: StatsGrad,
    needed: Sequence[bool],
    backend: Backend,
) -> list[Tensor | None]:
    """Of (hidden, weight, bias), in the compute dtype; None where not needed."""
    leaves = zip((inputs.hidden_NH, inputs.weight_VH, inputs.bias_V), needed, strict=True)
    sums = [stats.new_zeros(x.shape) if x is not None and need else None for x, need in leaves]
    for tile in tiles_of_hidden(inputs, sets, backend, grads.reads_reference):
        du_RW, share_RW = tile.logits.logits, None
        if inputs.softcap is not None:
            share_RW = tile.chunk.fill_others(1 - (du_RW / inputs.softcap).square_(), 0)
        tile.gradient(stats, grads, du_RW, backend)
        if share_RW is not None:
            du_RW *= share_RW
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
            grad_weight_VH[chunk.ids_of(columns)] += part_CH
    if grad_bias_V is not None:
        grad_bias_V[chunk.ids] += du_RW[:, chunk.columns].sum(0)
