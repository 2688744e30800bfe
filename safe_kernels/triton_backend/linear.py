"""Statistics and losses from hidden states: tiles of float32 logits from the BLAS library, read by the row kernels.

A tile has some of the rows and some of the vocabulary. The statistics travel from tile to tile of a row, and in the
backward a tile is turned into its gradient and multiplied back. No tensor of N x V elements is ever made.

Shapes: N tokens, R rows and W columns of a tile, V vocabulary, H hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..inputs import LinearInputs, LiveTokens
from ..objective import Objective, Results, policy_loss
from ..results import PolicyLoss, TokenStats
from .launch import ROWS_OF_A_TILE, SWEEP_BYTES, TILE_BYTES
from .logits import Asked, Rows, logit_gradient, new_carry, new_stats, results_of, statistics


def linear_token_stats(
    hidden: Tensor, weight: Tensor, tokens: Tensor, *, mask: Tensor | None = None, **head: Any
) -> TokenStats:
    live = all_tokens(tokens.shape, mask)
    results = _LinearTokenStats.apply(*LinearInputs.of(live, hidden, weight, tokens, **head))
    return TokenStats._make(None if x is None else live.scatter(x) for x in results)


def linear_policy_loss(*tensors: Tensor, mask: Tensor | None, **options: Any) -> PolicyLoss:
    _, _, tokens, *_ = tensors
    return policy_loss(sweep, all_tokens(tokens.shape, mask), *tensors, **options)


def all_tokens(shape: torch.Size, mask: Tensor | None) -> LiveTokens:
    """Masked tokens stay: the kernels skip their rows without asking the device how many there are."""
    return LiveTokens(shape, None, None if mask is None else mask.reshape(-1))


class _LinearTokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        inputs = LinearInputs(*args)
        with_reference = inputs.ref_hidden_NH is not None
        asked, stats = asked_of(inputs), new_stats(inputs.hidden_NH, len(inputs.tokens_N))
        carry = new_carry(inputs.hidden_NH, len(inputs.tokens_N))
        for tile in tiles(inputs, with_reference, ROWS_OF_A_TILE, TILE_BYTES):
            tile.statistics(inputs, asked, stats, carry)
        tensors = [x if isinstance(x, Tensor) else None for x in inputs]
        ctx.save_for_backward(*tensors, stats)
        ctx.constants = [None if isinstance(x, Tensor) else x for x in inputs]
        results = results_of(stats, with_reference)
        if results[2] is not None:
            ctx.mark_non_differentiable(results[2])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, stats = ctx.saved_tensors
        inputs = LinearInputs(*(c if x is None else x for x, c in zip(tensors, ctx.constants, strict=True)))
        grad_logprob, grad_entropy, _, grad_kl = (None if x is None else x.contiguous() for x in grads)
        asked, sums = asked_of(inputs), GradientSums(inputs, ctx.needs_input_grad)
        for tile in tiles(inputs, grad_kl is not None, ROWS_OF_A_TILE, TILE_BYTES):
            slopes = (None if x is None else x[tile.rows] for x in (grad_logprob, grad_entropy, grad_kl))
            sums.add(tile, tile.gradient(inputs, asked, stats, tuple(slopes)))
        gradients = (None if x is None else x.to(i.dtype) for x, i in zip(sums.sums, inputs, strict=False))
        return *gradients, *(None,) * (len(inputs) - 3)


def sweep(inputs: LinearInputs, objective: Objective, needed: tuple[bool, ...]) -> tuple[Results, list[Tensor | None]]:
    """Statistics, slopes and gradients of whole rows while their logits are there: one product forward, one back."""
    with_reference = inputs.ref_hidden_NH is not None
    asked, stats = asked_of(inputs), new_stats(inputs.hidden_NH, len(inputs.tokens_N))
    vocabulary, sums = len(inputs.weight_VH), GradientSums(inputs, needed)
    for tile in tiles(inputs, with_reference, max(1, SWEEP_BYTES // (4 * vocabulary)), None):
        tile.statistics(inputs, asked, stats, None)
        if any(needed):
            logprob, entropy, _, kl = results_of(stats[:, tile.rows], with_reference)
            *_, slopes = objective.rows(tile.rows).evaluate(logprob, entropy, kl)
            sums.add(tile, tile.gradient(inputs, asked, stats, slopes))
    return results_of(stats, with_reference), sums.sums


def asked_of(inputs: LinearInputs) -> Asked:
    temperature, mask = inputs.temperature, inputs.mask_N
    return Asked(
        inputs.tokens_N.contiguous(),
        len(inputs.weight_VH),
        temperature.contiguous() if isinstance(temperature, Tensor) else temperature,
        None if mask is None else mask.contiguous(),
        inputs.logit_scale,
        inputs.softcap,
    )


class Tile(NamedTuple):
    rows: slice
    columns: slice
    logits_RW: Tensor  # float32, hidden @ weight.T as the product left it
    ref_logits_RW: Tensor | None
    hidden_RH: Tensor
    weight_WH: Tensor

    def statistics(self, inputs: LinearInputs, asked: Asked, stats: Tensor, carry: Tensor | None) -> None:
        statistics(
            Rows.of(self.logits_RW),
            None if self.ref_logits_RW is None else Rows.of(self.ref_logits_RW),
            asked.rows(self.rows),
            stats[:, self.rows],
            carry=None if carry is None else carry[:, self.rows],
            first_column=self.columns.start,
            **biases(inputs),
        )

    def gradient(self, inputs: LinearInputs, asked: Asked, stats: Tensor, slopes: tuple[Tensor | None, ...]) -> Tensor:
        """d loss / d (hidden @ weight.T) of the tile, in the dtype of the products; float32 goes over the tile."""
        float32 = self.weight_WH.dtype == torch.float32
        out = self.logits_RW if float32 else torch.empty_like(self.logits_RW, dtype=self.weight_WH.dtype)
        logit_gradient(
            Rows.of(self.logits_RW),
            None if self.ref_logits_RW is None else Rows.of(self.ref_logits_RW),
            asked.rows(self.rows),
            stats[:, self.rows],
            slopes,
            Rows.of(out),
            first_column=self.columns.start,
            **biases(inputs),
        )
        return out


def biases(inputs: LinearInputs) -> dict[str, Tensor | None]:
    shared = inputs.ref_weight_VH is None and inputs.ref_bias_V is None
    return {"bias": inputs.bias_V, "ref_bias": inputs.bias_V if shared else inputs.ref_bias_V}


def tiles(inputs: LinearInputs, with_reference: bool, row_step: int, tile_bytes: int | None) -> Iterator[Tile]:
    """Tiles with their products, row by row of tiles; `tile_bytes` None takes whole rows. All share one memory."""
    if inputs.batch_invariant:
        raise ValueError("batch_invariant=True is not offered by backend='triton'; backend='torch' offers it")
    count, vocabulary = len(inputs.tokens_N), len(inputs.weight_VH)
    row_step = max(1, min(row_step, count))
    column_step = vocabulary if tile_bytes is None else max(16, tile_bytes // (4 * row_step) // 16 * 16)
    column_step = min(column_step, vocabulary)
    buffers = [
        torch.empty(row_step * column_step, dtype=torch.float32, device=inputs.hidden_NH.device)
        for _ in range(1 + with_reference)
    ]
    for start in range(0, count, row_step):
        rows = slice(start, min(start + row_step, count))
        hidden_RH, ref_hidden_RH = (live_rows(x, inputs.mask_N, rows) for x in (inputs.hidden_NH, inputs.ref_hidden_NH))
        for first in range(0, vocabulary, column_step):
            columns = slice(first, min(first + column_step, vocabulary))
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            logits, *ref_logits = (buffer[: shape[0] * shape[1]].view(shape) for buffer in buffers)
            hidden, weight = common(hidden_RH, inputs.weight_VH[columns])
            product(hidden, weight.T, logits)
            if ref_logits:
                ref_weight = inputs.weight_VH if inputs.ref_weight_VH is None else inputs.ref_weight_VH
                ref_hidden, ref_weight_WH = common(ref_hidden_RH, ref_weight[columns])
                product(ref_hidden, ref_weight_WH.T, ref_logits[0])
            yield Tile(rows, columns, logits, ref_logits[0] if ref_logits else None, hidden, weight)


def live_rows(x_NH: Tensor | None, mask_N: Tensor | None, rows: slice) -> Tensor | None:
    """Rows with zeros where masked: whatever stands there must not reach a product."""
    if x_NH is None or mask_N is None:
        return None if x_NH is None else x_NH[rows]
    return x_NH[rows].where(mask_N[rows, None], 0)


def common(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


def product(x: Tensor, y: Tensor, out: Tensor) -> None:
    """out = x @ y with float32 sums and a float32 result."""
    if x.dtype == torch.float32:
        torch.mm(x, y, out=out)
    elif x.is_cuda:
        torch.mm(x, y, out_dtype=torch.float32, out=out)
    else:
        torch.mm(x.float(), y.float(), out=out)


class GradientSums:
    """Gradients of hidden, weight and bias in float32, as far as they are needed."""

    def __init__(self, inputs: LinearInputs, needed: tuple[bool, ...]) -> None:
        leaves = (inputs.hidden_NH, inputs.weight_VH, inputs.bias_V)
        self.sums = [
            torch.zeros_like(x, dtype=torch.float32) if x is not None and need else None
            for x, need in zip(leaves, needed, strict=False)
        ]

    def add(self, tile: Tile, du_RW: Tensor) -> None:
        hidden_NH, weight_VH, bias_V = self.sums
        if hidden_NH is not None:
            add_product(hidden_NH[tile.rows], du_RW, tile.weight_WH)
        if weight_VH is not None:
            add_product(weight_VH[tile.columns], du_RW.T, tile.hidden_RH)
        if bias_V is not None:
            bias_V[tile.columns] += du_RW.sum(0, dtype=torch.float32)


def add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    if x.dtype == torch.float32:
        total.addmm_(x, y)
    else:
        part = torch.empty_like(total)
        product(x, y, part)
        total += part
