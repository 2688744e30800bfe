"""What `token_stats` and `linear_token_stats` call with `kept`, or with tokens [..., K]: ops, and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dispatch import backend_of, differentiable, keep, kept, register, without_second_derivative
from .inputs import KeptIds, LinearInputs, LogitsInputs, StatsGrad
from .results import constants_of, new_results
from .tiles import linear_gradients, logits_gradient, statistics, tiles_of_hidden, tiles_of_logits, with_several


def sets_of(ids: Tensor | None, offsets: Tensor | None) -> KeptIds | None:
    return None if ids is None or offsets is None else KeptIds(ids, offsets)


def new_several(found: tuple[Tensor, ...], tokens_N: Tensor) -> tuple[Tensor, ...]:
    """Of an op on tensors without memory."""
    if tokens_N.dim() == 1:
        return found
    streams = 1 if found[-1].shape[0] == 4 else 2
    return with_several(found, [found[0].new_empty(tokens_N.shape) for _ in range(streams)])


def tiled_token_stats_fake(logits: Tensor, ref_logits: Tensor | None, tokens_N: Tensor, *others: Any) -> Any:
    return new_several(new_results(logits, tokens_N, stats_rows=others[3]), tokens_N)


@register(tiled_token_stats_fake)
def tiled_token_stats_op(
    logits: Tensor,
    ref_logits: Tensor | None,
    tokens_N: Tensor,
    temperature: float,
    temperatures_N: Tensor | None,
    mask_N: Tensor | None,
    stats_rows: int,
    ids: Tensor | None,
    offsets: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `token_stats_op`; log-probs are [N, K] if the tokens are."""
    inputs = LogitsInputs(logits, ref_logits, tokens_N, temperature, temperatures_N, mask_N, stats_rows)
    tiles = tiles_of_logits(inputs, sets_of(ids, offsets))
    return statistics(tiles, logits, inputs, backend_of(backend))  # type: ignore[return-value]


@register(lambda logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format))
def tiled_token_stats_backward_op(
    logits: Tensor,
    ref_logits: Tensor | None,
    tokens_N: Tensor,
    temperature: float,
    temperatures_N: Tensor | None,
    mask_N: Tensor | None,
    stats_rows: int,
    ids: Tensor | None,
    offsets: Tensor | None,
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
    return logits_gradient(inputs, sets_of(ids, offsets), stats, grads, backend_of(backend))


def linear_tiled_token_stats_fake(hidden_NH: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return new_several(new_results(hidden_NH, others[5], stats_rows=others[12]), others[5])


@register(linear_tiled_token_stats_fake)
def linear_tiled_token_stats_op(
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
    ids: Tensor | None,
    offsets: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `linear_token_stats_op`, likewise."""
    head = (hidden_NH, weight_VH, bias_V, ref_hidden_NH, ref_weight_VH, ref_bias_V)
    per_row = (tokens_N, temperature, temperatures_N, mask_N)
    inputs = LinearInputs(*head, *per_row, softcap, logit_scale, batch_invariant, stats_rows)
    tiles = tiles_of_hidden(inputs, sets_of(ids, offsets), backend_of(backend), with_reference=True)
    return statistics(tiles, hidden_NH, inputs, backend_of(backend))  # type: ignore[return-value]


def linear_tiled_token_stats_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    leaves, stats, needed = arguments[:3], arguments[16], arguments[21:24]
    return tuple(stats.new_empty(x.shape if need else 0) for x, need in zip(leaves, needed, strict=True))


@register(linear_tiled_token_stats_backward_fake)
def linear_tiled_token_stats_backward_op(
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
    ids: Tensor | None,
    offsets: Tensor | None,
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
    found = linear_gradients(inputs, sets_of(ids, offsets), stats, grads, needed, backend_of(backend))
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


differentiable(tiled_token_stats_op, 1, save_stats, gradient_of(tiled_token_stats_backward_op, 1))
differentiable(linear_tiled_token_stats_op, 3, save_stats, gradient_of(linear_tiled_token_stats_backward_op, 3))
without_second_derivative(tiled_token_stats_backward_op, 14)
without_second_derivative(linear_tiled_token_stats_backward_op, 21)
