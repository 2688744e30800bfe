"""Statistics from hidden states: a tile of logits is computed, used and forgotten.

No tensor of N x V elements is ever made, and no whole float32 copy of a low-precision weight.

Shapes: N tokens, R rows of a tile, V vocabulary, C columns of a weight tile, H hidden width.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..results import TokenStats
from .rows import Gradients, RowStats, Tile, Tokens, logit_gradient, restore, row_chunks, row_statistics

WEIGHT_TILE_BYTES = 16 << 20


def linear_token_stats(hidden, weight, tokens, *, mask=None, **head) -> TokenStats:
    live = LiveTokens.of(tokens.shape, mask)
    results = _LinearTokenStats.apply(*LinearInputs.of(live, hidden, weight, tokens, **head))
    return TokenStats(*(None if x is None else live.scatter(x) for x in results))


class _LinearTokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        ctx.set_materialize_grads(False)
        inputs = LinearInputs(*inputs)
        tokens, with_reference = inputs.tokens(), inputs.ref_hidden_NH is not None
        stats = RowStats.empty(len(inputs.tokens_N), with_reference, tokens.known_N)
        for rows, _, tile in inputs.tiles(tokens, with_reference):
            stats.write(rows, row_statistics(tile, tokens.at(rows)))
        results = stats.results(tokens)
        ctx.constants = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs), *stats)
        if with_reference:
            ctx.mark_non_differentiable(results[2])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob, grad_entropy, _, grad_kl):
        saved, count = ctx.saved_tensors, len(ctx.constants)
        inputs = LinearInputs(*(x if c is None else c for x, c in zip(saved[:count], ctx.constants, strict=True)))
        tokens, stats, head = inputs.tokens(), RowStats(*saved[count:]), inputs.head()
        grads = Gradients(grad_logprob, grad_entropy, grad_kl).prepare(tokens)
        sums = GradientSums(inputs, ctx.needs_input_grad)
        for rows, hidden_RH, tile in inputs.tiles(tokens, with_reference=grads.kl is not None):
            part, some = stats.at(rows), tokens.at(rows)
            restore(tile, some, part)
            logit_gradient(tile, some, part, grads.at(rows))
            sums.add(rows, head.product_gradient(tile, some, part), hidden_RH)
        return *sums.rounded(), *(None,) * (count - 3)


class Head(NamedTuple):
    """a = softcap * tanh(u / softcap) with u = logit_scale * (hidden @ weight.T + bias); a = u without softcap."""

    weight_VH: Tensor
    bias_V: Tensor | None
    softcap: float | None
    logit_scale: float

    def logits(self, hidden_RH, out_RV):
        for columns, weight_CH in self._weight_tiles(out_RV.dtype):
            torch.mm(hidden_RH, weight_CH.T, out=out_RV[:, columns])
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

    def hidden_gradient(self, du_RV) -> Tensor:
        grad_RH = du_RV.new_zeros(len(du_RV), self.weight_VH.shape[1])
        for columns, weight_CH in self._weight_tiles(du_RV.dtype):
            grad_RH.addmm_(du_RV[:, columns], weight_CH)
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


class LinearInputs(NamedTuple):
    """The flattened arguments of a `linear_*` function, in the order of its autograd.Function."""

    hidden_NH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    ref_hidden_NH: Tensor | None
    ref_weight_VH: Tensor | None  # None: the reference shares the policy's head
    ref_bias_V: Tensor | None
    tokens_N: Tensor
    temperature: float | Tensor
    mask_N: Tensor | None
    softcap: float | None
    logit_scale: float
    batch_invariant: bool

    @classmethod
    def of(
        cls,
        live: "LiveTokens",
        hidden,
        weight,
        tokens,
        *,
        bias=None,
        ref_hidden=None,
        ref_weight=None,
        ref_bias=None,
        temperature=1.0,
        softcap=None,
        logit_scale=1.0,
        batch_invariant=False,
    ) -> "LinearInputs":
        hidden, tokens = live.gather(hidden), live.gather(tokens)
        ref_hidden = None if ref_hidden is None else live.gather(ref_hidden.detach())
        temperature = live.gather(temperature) if isinstance(temperature, Tensor) else temperature
        reference = (ref_hidden, ref_weight, ref_bias)
        return cls(
            hidden, weight, bias, *reference, tokens, temperature, live.mask, softcap, logit_scale, batch_invariant
        )

    def tokens(self) -> Tokens:
        dtype = torch.float64 if self.hidden_NH.dtype == torch.float64 else torch.float32
        return Tokens.prepare(self.tokens_N, len(self.weight_VH), self.temperature, self.mask_N, dtype)

    def head(self) -> Head:
        return Head(self.weight_VH, self.bias_V, self.softcap, self.logit_scale)

    def ref_head(self) -> Head:
        if self.ref_weight_VH is not None:
            return Head(self.ref_weight_VH, self.ref_bias_V, self.softcap, self.logit_scale)
        return self.head() if self.ref_bias_V is None else self.head()._replace(bias_V=self.ref_bias_V)

    def tiles(self, tokens: Tokens, with_reference: bool) -> Iterator[tuple[slice, Tensor, Tile]]:
        """Yield (rows, hidden_RH, tile): float hidden states and the tile loaded with their logits."""
        count, vocabulary, dtype = len(self.tokens_N), len(self.weight_VH), tokens.known_N.dtype
        buffers = None
        for rows in row_chunks(count, vocabulary, dtype, 1 if self.batch_invariant else None):
            size = rows.stop - rows.start
            buffers = buffers or Tile.allocate(size, vocabulary, with_reference, tokens.known_N)
            tile, hidden_RH = buffers.rows(size), _float_rows(self.hidden_NH, rows, tokens)
            self.head().logits(hidden_RH, tile.x)
            if tile.y is not None:
                self.ref_head().logits(_float_rows(self.ref_hidden_NH, rows, tokens), tile.y)
            yield rows, hidden_RH, tile


class GradientSums:
    """Gradients of hidden, weight and bias, those that are needed, in the compute dtype until the end."""

    def __init__(self, inputs: LinearInputs, needed):
        self.head, dtype = inputs.head(), inputs.tokens().known_N.dtype
        self.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
        self.sums = [
            torch.zeros(x.shape, dtype=dtype, device=x.device) if need else None
            for x, need in zip(inputs[:3], needed, strict=False)
        ]

    def add(self, rows: slice, du_RV: Tensor, hidden_RH: Tensor):
        hidden_NH, weight_VH, bias_V = self.sums
        if hidden_NH is not None:
            hidden_NH[rows] = self.head.hidden_gradient(du_RV)
        if weight_VH is not None:
            weight_VH.addmm_(du_RV.T, hidden_RH)
        if bias_V is not None:
            bias_V.add_(du_RV.sum(0))

    def rounded(self, scale: Tensor | None = None):
        """In the inputs' dtypes; `scale` multiplies in place, before the rounding."""
        sums, self.sums = self.sums, [None] * 3
        for x in sums:
            if x is not None and scale is not None:
                x.mul_(scale)
        return [None if x is None else x.to(dtype) for x, dtype in zip(sums, self.dtypes, strict=True)]


class LiveTokens(NamedTuple):
    """Flattens what has the leading shape, and gives results that shape back.

    On a CPU masked tokens are left out, which costs no synchronisation there; elsewhere `mask` says whose rows to zero.
    """

    shape: torch.Size
    index: Tensor | None  # of the tokens that are kept, or None for all
    mask: Tensor | None

    @classmethod
    def of(cls, shape: torch.Size, mask: Tensor | None) -> "LiveTokens":
        if mask is None:
            return cls(shape, None, None)
        mask = mask.reshape(-1)
        return cls(shape, mask.nonzero().squeeze(1), None) if mask.device.type == "cpu" else cls(shape, None, mask)

    def gather(self, x: Tensor) -> Tensor:
        x = x.reshape(self.shape.numel(), *x.shape[len(self.shape) :])
        return x if self.index is None else x.index_select(0, self.index)

    def scatter(self, x: Tensor) -> Tensor:
        if self.index is not None:
            x = x.new_zeros(self.shape.numel()).index_copy(0, self.index, x)
        return x.view(self.shape)


def _float_rows(x_NH: Tensor, rows: slice, tokens: Tokens) -> Tensor:
    """A copy in the compute dtype: its alignment, hence the bits of its products, does not depend on the row."""
    x_RH = x_NH[rows].to(tokens.known_N.dtype, copy=True)
    return x_RH if tokens.mask_N is None else x_RH.where(tokens.mask_N[rows, None], 0)
