"""Statistics from hidden states: a tile of logits is computed, used and forgotten.

No tensor of N x V elements is ever made, and no whole float32 copy of a low-precision weight.

Shapes: N tokens, R rows of a tile, V vocabulary, C columns of a weight tile, H hidden width.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..inputs import LinearInputs, LiveTokens
from ..results import TokenStats
from .logits import save, saved
from .rows import Gradients, RowStats, Tile, Tokens, logit_gradient, restore, row_statistics, take, tiles

WEIGHT_TILE_BYTES = 16 << 20


def linear_token_stats(
    hidden: Tensor, weight: Tensor, tokens: Tensor, *, mask: Tensor | None = None, **head: Any
) -> TokenStats:
    live = LiveTokens.of(tokens.shape, mask)
    results = _LinearTokenStats.apply(*LinearInputs.of(live, hidden, weight, tokens, **head))
    return TokenStats._make(None if x is None else live.scatter(x) for x in results)


class _LinearTokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        inputs = LinearInputs(*args)
        tokens, with_reference = asked_of(inputs), inputs.ref_hidden_NH is not None
        stats = RowStats.empty(tokens, with_reference)
        for rows, some, tile, _ in loaded_tiles(inputs, tokens, with_reference):
            stats.write(rows, row_statistics(tile, some))
        results = stats.results(tokens)
        save(ctx, (*inputs, *stats))
        if results[2] is not None:
            ctx.mark_non_differentiable(results[2])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        values, count = saved(ctx), len(LinearInputs._fields)
        inputs, stats = LinearInputs(*values[:count]), RowStats(*values[count:])
        tokens, head, sums = asked_of(inputs), head_of(inputs), GradientSums(inputs, ctx.needs_input_grad)
        grad_logprob, grad_entropy, _, grad_kl = grads
        gradients = Gradients.of(tokens, grad_logprob, grad_entropy, grad_kl)
        with torch.autocast(inputs.hidden_NH.device.type, enabled=False):
            for rows, some, tile, hidden_RH in loaded_tiles(inputs, tokens, grad_kl is not None):
                part = take(stats, rows)
                restore(tile, some, part)
                logit_gradient(tile, some, part, take(gradients, rows))
                sums.add(rows, head.product_gradient(tile, some, part), hidden_RH)
        return *sums.rounded(), *(None,) * (count - 3)


class Head(NamedTuple):
    """a = softcap * tanh(u / softcap) with u = logit_scale * (hidden @ weight.T + bias); a = u without softcap."""

    weight_VH: Tensor
    bias_V: Tensor | None
    softcap: float | None
    logit_scale: float

    def logits(self, hidden_RH: Tensor, out_RV: Tensor) -> None:
        for columns, weight_CH in self._weight_tiles(out_RV.dtype):
            if len(hidden_RH) > 1:
                torch.mm(hidden_RH, weight_CH.T, out=out_RV[:, columns])
            else:
                out_RV[:, columns] = _product(hidden_RH, weight_CH.T)
        if self.bias_V is not None:
            out_RV.add_(self.bias_V)
        if self.logit_scale != 1:
            out_RV.mul_(self.logit_scale)
        if self.softcap is not None:
            out_RV.div_(self.softcap).tanh_().mul_(self.softcap)

    def product_gradient(self, tile: Tile, tokens: Tokens, stats: RowStats) -> Tensor:
        """Turn tile.e from d loss / d a into d loss / d (hidden @ weight.T + bias)."""
        if self.softcap is not None:
            share = tile.x.mul_(tokens.temperature_N1).add_(stats.peak[:, None]).div_(self.softcap)
            tile.e.mul_(share.square_().neg_().add_(1))
        return tile.e if self.logit_scale == 1 else tile.e.mul_(self.logit_scale)

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
            part = self.weight_VH[start : start + step]
            yield slice(start, start + len(part)), buffer[: len(part)].copy_(part)


def asked_of(inputs: LinearInputs) -> Tokens:
    return Tokens.of(inputs.tokens_N, len(inputs.weight_VH), inputs.temperature, inputs.mask_N, inputs.hidden_NH.dtype)


def head_of(inputs: LinearInputs) -> Head:
    return Head(inputs.weight_VH, inputs.bias_V, inputs.softcap, inputs.logit_scale)


def ref_head_of(inputs: LinearInputs) -> Head:
    if inputs.ref_weight_VH is not None:
        return Head(inputs.ref_weight_VH, inputs.ref_bias_V, inputs.softcap, inputs.logit_scale)
    return head_of(inputs) if inputs.ref_bias_V is None else head_of(inputs)._replace(bias_V=inputs.ref_bias_V)


def loaded_tiles(
    inputs: LinearInputs, tokens: Tokens, with_reference: bool
) -> Iterator[tuple[slice, Tokens, Tile, Tensor]]:
    """The tiles with their logits computed, and the float hidden states [R, H] they came from."""
    head, ref_head = head_of(inputs), ref_head_of(inputs)
    for rows, some, tile in tiles(tokens, len(inputs.weight_VH), with_reference, inputs.batch_invariant):
        hidden_RH = _float_rows(inputs.hidden_NH, rows, some)
        head.logits(hidden_RH, tile.x)
        if tile.y is not None and inputs.ref_hidden_NH is not None:
            ref_head.logits(_float_rows(inputs.ref_hidden_NH, rows, some), tile.y)
        yield rows, some, tile, hidden_RH


class GradientSums:
    """Gradients of hidden, weight and bias, as far as they are needed, in the compute dtype until they are rounded."""

    def __init__(self, inputs: LinearInputs, needed: tuple[bool, ...]) -> None:
        self.head, like = head_of(inputs), asked_of(inputs).known_N
        leaves = (inputs.hidden_NH, inputs.weight_VH, inputs.bias_V)
        self.dtypes = [None if x is None else x.dtype for x in leaves]
        self.sums = [
            like.new_zeros(x.shape) if x is not None and need else None for x, need in zip(leaves, needed, strict=False)
        ]

    def add(self, rows: slice, du_RV: Tensor, hidden_RH: Tensor) -> None:
        hidden_NH, weight_VH, bias_V = self.sums
        if hidden_NH is not None:
            hidden_NH[rows] = self.head.hidden_gradient(du_RV)
        if weight_VH is not None:
            weight_VH.addmm_(du_RV.T, hidden_RH)
        if bias_V is not None:
            bias_V.add_(du_RV.sum(0))

    def rounded(self) -> list[Tensor | None]:
        return [None if x is None else x.to(dtype) for x, dtype in zip(self.sums, self.dtypes, strict=True)]


def _product(rows_RK: Tensor, matrix: Tensor) -> Tensor:
    """A lone row is taken twice: as a vector its product would be summed serially, ten times less precisely."""
    return rows_RK @ matrix if len(rows_RK) > 1 else (rows_RK.expand(2, -1) @ matrix)[:1]


def _float_rows(x_NH: Tensor, rows: slice, tokens: Tokens) -> Tensor:
    """A copy in the compute dtype: its alignment, hence the bits of its products, does not depend on the row."""
    x_RH = x_NH[rows].to(tokens.known_N.dtype, copy=True)
    return x_RH if tokens.mask_N is None else x_RH.where(tokens.mask_N[:, None], 0)
