"""`linear_token_stats`: statistics from hidden states and the LM head. The public function, its op, and its gradient.

Shapes: N tokens, V vocabulary, H hidden width.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import checks, kept_sets, reference, vocab_parallel
from .dispatch import (
    backend_of,
    choose_backend,
    differentiable,
    exact,
    keep,
    kept,
    register,
    without_second_derivative,
)
from .inputs import ALL_ROWS, Head, KeptIds, LinearInputs, StatsGrad, compute_dtype
from .results import TokenStats, constants_of, new_results, results_of
from .tiled import linear_tiled_token_stats_op

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NOTHING = (0, 0, 0)  # the shape of logits where none are kept


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    with_ref_kl: bool = False,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    kept: KeptIds | Tensor | Sequence[Any] | None = None,
    batch_invariant: bool = False,
    max_kept_bytes: int | None = None,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> TokenStats:
    """`token_stats` from hidden states and the LM head, without materialising the logits. Equivalent to

        logits = logit_scale * (hidden.float() @ weight.float().T + bias)
        logits = softcap * tanh(logits / softcap)
        token_stats(logits, tokens, ref_logits=the same of the reference, temperature=temperature, mask=mask, ...)

    Args:
        hidden: [..., H], any floating dtype. Autocast is ignored: the product is in the dtype of hidden and weight, of
            two different ones in the one that holds both; it is always summed in float32. Of two float32 factors on a
            GPU, torch.set_float32_matmul_precision says how precise the product is.
        weight: [V, H], the whole of it, or with `process_group` this rank's rows. A sharded DTensor raises, and so does
            what FSDP and ZeRO-3 leave of a weight outside its module; a plain tensor is taken for the whole.
        bias: [V].
        ref_hidden: [..., H'] of the reference; None is no reference.
        ref_weight: [V, H']; None shares `weight`, and `bias` unless `ref_bias` is given.
        softcap: > 0, or None for none.
        kept: as in `token_stats`; only rows of the head that someone kept are read, those of some tokens at a time, and
            no logits are kept for the backward. Not with `batch_invariant` or `process_group`.
        batch_invariant: a row's results and hidden gradient have the same bits whatever the other rows are. On the
            torch backend that is one row at a time, and slow; the reference refuses it.
        max_kept_bytes: of logits, a reference's included, that may stay in memory for the backward, which makes the
            others again: for what is kept two products do the work of three, or three of four if the weight is trained.
            Every call whose graph is alive holds so many bytes; its first backward uses them up. None is 0, but on the
            torch backend on a CPU the one tile that exists anyway. With `batch_invariant`, on the torch backend with
            `process_group`, and where nothing wants a gradient, nothing is kept.
        process_group: the ranks that share the head; None is this one alone. See `safe_kernels`.

    The other arguments and the results are those of `token_stats`; where `mask` leaves most tokens out, select the
    others first on a GPU. Gradients go to hidden, weight and bias, as far as they require them.

    Only one tile of logits is ever in memory: at most 64 MiB on a CPU, 96 MiB on a GPU; with a reference twice that.
    """
    has_axis_of_ids = getattr(tokens, "ndim", None) == getattr(hidden, "ndim", 0)
    one = kept_sets.one_of(tokens) if has_axis_of_ids else tokens
    head = checks.require_head(
        Head(
            hidden, weight, one, bias, ref_hidden, ref_weight, ref_bias, temperature, softcap, logit_scale, mask
        )._replace(batch_invariant=batch_invariant, process_group=process_group)
    )
    if with_ref_kl:
        checks.require_reference_for("with_ref_kl", with_ref_kl, "ref_hidden", ref_hidden)
    if is_tiled := kept is not None or one is not tokens:
        kept_sets.require_offered(kept, batch_invariant=batch_invariant, process_group=head.process_group)
        kept = kept_sets.require_kept(kept, one, len(head.weight), mask)
    if max_kept_bytes is not None:
        max_kept_bytes = min(int(checks.require_number("max_kept_bytes", max_kept_bytes, 0)), sys.maxsize)
    backend = choose_backend(backend, *head[:8], group=head.process_group)
    if backend == "reference":
        with exact(hidden):
            given = head._replace(tokens=tokens)._asdict()
            return reference.linear_token_stats(**given, with_ref_kl=with_ref_kl, kept=kept)
    inputs, name, bounds = flat_inputs(head, with_ref_kl), None, None
    if is_tiled:
        inputs = inputs._replace(tokens_N=kept_sets.flat_ids(tokens, one))
        found = linear_tiled_token_stats_op(*inputs, *(kept or (None, None)), backend)
        return TokenStats.of(found, one, inputs.stats_rows, tokens)
    if head.process_group is not None:
        inputs, name, bounds = vocab_parallel.sharded(inputs, len(head.weight), head.process_group)
    wants_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs[:3])
    if not wants_gradient or (max_kept_bytes is None and backend == "triton"):
        max_kept_bytes = 0
    if head.process_group is not None and backend == "torch":  # which keeps them centred by the peak of this part
        max_kept_bytes = 0
    found = linear_token_stats_op(*inputs, max_kept_bytes, name, bounds, backend)
    return TokenStats.of(found, tokens, inputs.stats_rows)


def flat_inputs(head: Head, with_ref_kl: bool = False) -> LinearInputs:
    """With one axis of tokens; what never receives a gradient is detached."""
    tokens_N, ref_hidden, t = head.tokens.reshape(-1), head.ref_hidden, head.temperature
    temperature, temperatures_N = (1.0, t.reshape(-1)) if isinstance(t, Tensor) else (t, None)
    return LinearInputs(
        head.hidden.reshape(-1, head.hidden.shape[-1]),
        head.weight,
        None if head.bias is None else head.bias.contiguous(),
        None if ref_hidden is None else ref_hidden.detach().reshape(-1, ref_hidden.shape[-1]),
        None if head.ref_weight is None else head.ref_weight.detach(),
        None if head.ref_bias is None else head.ref_bias.detach().contiguous(),
        tokens_N if tokens_N.dtype == torch.int32 else tokens_N.long(),
        temperature,
        temperatures_N,
        None if head.mask is None else head.mask.reshape(-1),
        head.softcap,
        head.logit_scale,
        head.batch_invariant,
        4 if ref_hidden is None else ALL_ROWS if with_ref_kl else 8,
    )


def linear_token_stats_fake(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    ref_hidden_NH: Tensor | None,
    ref_weight_VH: Tensor | None,
    ref_bias_V: Tensor | None,
    tokens_N: Tensor,
    *others: Any,
) -> tuple[Tensor, ...]:
    head = (hidden_NH, weight_VH, bias_V, ref_hidden_NH, ref_weight_VH, ref_bias_V)
    *others, max_kept_bytes, _, _, backend = others  # type: ignore[assignment]
    inputs = LinearInputs(*head, tokens_N, *others)
    logits = hidden_NH.new_empty(NOTHING) if max_kept_bytes == 0 else new_logits(inputs, max_kept_bytes, backend)
    return *new_results(hidden_NH, tokens_N, inputs.stats_rows), logits


@register(linear_token_stats_fake)
def linear_token_stats_op(
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
    max_kept_bytes: int | None,
    group: str | None,
    bounds: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprob, entropy, ref_logprob, kl, ref_kl) [N], empty if not asked for, the rows of `RowStats`, and the logits
    that are kept for the backward [1 or 2, K, V], as its backend laid them out.
    """
    head = (hidden_NH, weight_VH, bias_V, ref_hidden_NH, ref_weight_VH, ref_bias_V)
    per_row = (tokens_N, temperature, temperatures_N, mask_N)
    inputs = LinearInputs(*head, *per_row, softcap, logit_scale, batch_invariant, stats_rows)
    logits = hidden_NH.new_empty(NOTHING) if max_kept_bytes == 0 else new_logits(inputs, max_kept_bytes, backend)
    stats = backend_of(backend).linear_statistics(inputs, logits)
    if group is not None and bounds is not None:
        stats = vocab_parallel.merged_stats(stats, inputs, group, bounds)
    return *results_of(stats), logits


def new_logits(inputs: LinearInputs, max_kept_bytes: int | None, backend: str) -> Tensor:
    """Memory for those that are kept."""
    streams, rows = 1 if inputs.ref_hidden_NH is None else 2, backend_of(backend).kept_rows(inputs, max_kept_bytes)
    shape, dtype = (streams, rows, inputs.weight_VH.shape[0]), compute_dtype(inputs.hidden_NH)
    return inputs.hidden_NH.new_empty(shape, dtype=dtype)


def save_for_the_gradient(ctx: Any, arguments: tuple[Any, ...], found: tuple[Tensor, ...]) -> None:
    *results, logits = found
    ctx.mark_non_differentiable(*constants_of(results), logits)
    # A set, to be emptied: an attribute that a backward sets is lost under compiled autograd.
    ctx.unused = {"logits"} if logits.shape[1] > 0 else set()
    keep(ctx, arguments, results[-1], logits)


def linear_token_stats_gradient(
    ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, _: None, *others: Tensor | None
) -> list[Tensor | None]:
    grads, needed = StatsGrad(grad_logprob, grad_entropy, *others[:2]), ctx.needs_input_grad[1:4]
    if not any(x is not None for x in grads):
        return [None, None, None]
    *arguments, stats, logits = kept(ctx)
    inputs, group, backend = LinearInputs(*arguments[:14]), arguments[15], arguments[17]
    if not ctx.unused or any(x is not None and is_of_many_samples(x) for x in grads):
        return linear_gradients(inputs, stats, grads, needed, group, backend)
    # Not where a graph is recorded, by compilation or create_graph: it may run again, or is refused.
    write = type(logits) is Tensor and not torch.is_grad_enabled()
    if write:
        ctx.unused.clear()
        logits = logits.data  # with whose version autograd would refuse a second backward, which makes them again
    return linear_gradients(inputs, stats, grads, needed, group, backend, logits=logits, write=write)


def is_of_many_samples(x: Tensor) -> bool:
    """By is_grads_batched, or by torch.func.vmap."""
    return torch._C._functorch.is_legacy_batchedtensor(x) or torch._C._functorch.is_batchedtensor(x)


def linear_gradients(
    inputs: LinearInputs,
    stats: Tensor,
    grads: StatsGrad,
    needed: Sequence[bool],
    group: str | None,
    backend: str,
    dtypes: Sequence[torch.dtype | None] = (),
    logits: Tensor | None = None,
    write: bool = False,
) -> list[Tensor | None]:
    """Gradients of (hidden, weight, bias) from the statistics and the logits that the op gave, which are written over
    with `write`: summed in the compute dtype, in `dtypes`, or those of the inputs; None where not needed.
    """
    if not any(needed) or not any(x is not None for x in grads):
        return [None, None, None]
    arguments = (*inputs, stats, *grads, *needed, group, backend)
    if write:
        found = linear_token_stats_backward__op(logits, *arguments)
    else:
        found = linear_token_stats_backward_op(*arguments, logits)
    dtypes = dtypes or [None if x is None else x.dtype for x in inputs[:3]]
    return [x.to(dtype) if need else None for x, dtype, need in zip(found, dtypes, needed, strict=True)]


def linear_token_stats_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    leaves, stats, needed = arguments[:3], arguments[14], arguments[19:22]
    return tuple(stats.new_empty(x.shape if need else 0) for x, need in zip(leaves, needed, strict=True))


@register(linear_token_stats_backward_fake)
def linear_token_stats_backward_op(
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
    stats: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_kl: Tensor | None,
    grad_ref_kl: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    group: str | None,
    backend: str,
    logits_SKV: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (hidden, weight, bias) in the compute dtype, empty where not needed. Those of the weight and the
    bias are this rank's; all ranks share the hidden states, whose gradient is a sum over the ranks.
    """
    head = (hidden_NH, weight_VH, bias_V, ref_hidden_NH, ref_weight_VH, ref_bias_V)
    per_row = (tokens_N, temperature, temperatures_N, mask_N)
    inputs = LinearInputs(*head, *per_row, softcap, logit_scale, batch_invariant, stats_rows)
    grads, needed = StatsGrad(grad_logprob, grad_entropy, grad_kl, grad_ref_kl), (need_hidden, need_weight, need_bias)
    own_logits = None if logits_SKV is None else logits_SKV.clone()
    return summed_gradients(inputs, stats, grads, needed, group, backend, own_logits)


@register(lambda _, *arguments: linear_token_stats_backward_fake(*arguments), mutates="logits_SKV")
def linear_token_stats_backward__op(
    logits_SKV: Tensor,
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
    stats: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_kl: Tensor | None,
    grad_ref_kl: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    group: str | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same; the kept logits are written over."""
    head = (hidden_NH, weight_VH, bias_V, ref_hidden_NH, ref_weight_VH, ref_bias_V)
    per_row = (tokens_N, temperature, temperatures_N, mask_N)
    inputs = LinearInputs(*head, *per_row, softcap, logit_scale, batch_invariant, stats_rows)
    grads, needed = StatsGrad(grad_logprob, grad_entropy, grad_kl, grad_ref_kl), (need_hidden, need_weight, need_bias)
    return summed_gradients(inputs, stats, grads, needed, group, backend, logits_SKV)


def summed_gradients(
    inputs: LinearInputs,
    stats: Tensor,
    grads: StatsGrad,
    needed: Sequence[bool],
    group: str | None,
    backend: str,
    logits: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = backend_of(backend).linear_gradients(inputs, stats, grads, needed, logits)
    if group is not None and hidden is not None:
        hidden = vocab_parallel.summed(hidden, vocab_parallel.group_of(group))
    return tuple(stats.new_empty(0) if x is None else x for x in (hidden, weight, bias))  # type: ignore[return-value]


differentiable(linear_token_stats_op, 3, save_for_the_gradient, linear_token_stats_gradient)
without_second_derivative(linear_token_stats_backward_op, 19)
