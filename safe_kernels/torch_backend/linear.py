"""Statistics from hidden states: a tile of logits is computed, used and forgotten.

No tensor of N x V elements is ever made, and no whole float32 copy of a low-precision weight.

Shapes: N tokens, R rows of a tile, V vocabulary, C columns of a weight tile, H hidden width.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
        tokens, with_reference = inputs.asked(), inputs.ref_hidden_NH is not None
        stats = RowStats.empty(tokens, with_reference)
        for rows, some, tile, _ in inputs.loaded_tiles(tokens, with_reference):
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
        tokens, head, sums = inputs.asked(), inputs.head(), GradientSums(inputs, ctx.needs_input_grad)
        grad_logprob, grad_entropy, _, grad_kl = grads
        gradients = Gradients.of(tokens, grad_logprob, grad_entropy, grad_kl)
        with torch.autocast(inputs.hidden_NH.device.type, enabled=False):
            for rows, some, tile, hidden_RH in inputs.loaded_tiles(tokens, grad_kl is not None):
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
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        *,
        bias: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        batch_invariant: bool = False,
    ) -> "LinearInputs":
        return cls(
            live.gather(hidden),
            weight,
            bias,
            None if ref_hidden is None else live.gather(ref_hidden.detach()),
            None if ref_weight is None else ref_weight.detach(),
            None if ref_bias is None else ref_bias.detach(),
            live.gather(tokens),
            live.gather(temperature) if isinstance(temperature, Tensor) else temperature,
            live.mask,
            softcap,
            logit_scale,
            batch_invariant,
        )

    def asked(self) -> Tokens:
        return Tokens.of(self.tokens_N, len(self.weight_VH), self.temperature, self.mask_N, self.hidden_NH.dtype)

    def head(self) -> Head:
        return Head(self.weight_VH, self.bias_V, self.softcap, self.logit_scale)

    def ref_head(self) -> Head:
        if self.ref_weight_VH is not None:
            return Head(self.ref_weight_VH, self.ref_bias_V, self.softcap, self.logit_scale)
        return self.head() if self.ref_bias_V is None else self.head()._replace(bias_V=self.ref_bias_V)

    def loaded_tiles(self, tokens: Tokens, with_reference: bool) -> Iterator[tuple[slice, Tokens, Tile, Tensor]]:
        """The tiles with their logits computed, and the float hidden states [R, H] they came from."""
        head, ref_head = self.head(), self.ref_head()
        for rows, some, tile in tiles(tokens, len(self.weight_VH), with_reference, self.batch_invariant):
            hidden_RH = _float_rows(self.hidden_NH, rows, some)
            head.logits(hidden_RH, tile.x)
            if tile.y is not None and self.ref_hidden_NH is not None:
                ref_head.logits(_float_rows(self.ref_hidden_NH, rows, some), tile.y)
            yield rows, some, tile, hidden_RH


class GradientSums:
    """Gradients of hidden, weight and bias, as far as they are needed, in the compute dtype until they are rounded."""

    def __init__(self, inputs: LinearInputs, needed: tuple[bool, ...]) -> None:
        self.head, like = inputs.head(), inputs.asked().known_N
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


class LiveTokens(NamedTuple):
    """Flattens what has the leading shape, and gives results that shape back.

    On a CPU masked tokens are left out, which costs no synchronisation there; elsewhere `mask` says whose rows to zero.
    """

    shape: torch.Size
    kept: Tensor | None  # indices of the tokens that stay, or None for all
    mask: Tensor | None

    @classmethod
    def of(cls, shape: torch.Size, mask: Tensor | None) -> "LiveTokens":
        if mask is None:
            return cls(shape, None, None)
        mask = mask.reshape(-1)
        return cls(shape, mask.nonzero().squeeze(1), None) if mask.device.type == "cpu" else cls(shape, None, mask)

    def gather(self, x: Tensor) -> Tensor:
        x = x.reshape(self.shape.numel(), *x.shape[len(self.shape) :])
        return x if self.kept is None else x.index_select(0, self.kept)

    def scatter(self, x: Tensor) -> Tensor:
        if self.kept is not None:
            x = x.new_zeros(self.shape.numel()).index_copy(0, self.kept, x)
        return x.view(self.shape)


def _product(rows_RK: Tensor, matrix: Tensor) -> Tensor:
    """A lone row is taken twice: as a vector its product would be summed serially, ten times less precisely."""
    return rows_RK @ matrix if len(rows_RK) > 1 else (rows_RK.expand(2, -1) @ matrix)[:1]


def _float_rows(x_NH: Tensor, rows: slice, tokens: Tokens) -> Tensor:
    """A copy in the compute dtype: its alignment, hence the bits of its products, does not depend on the row."""
    x_RH = x_NH[rows].to(tokens.known_N.dtype, copy=True)
    return x_RH if tokens.mask_N is None else x_RH.where(tokens.mask_N[:, None], 0)
