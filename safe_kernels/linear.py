"""`linear_token_stats`: statistics from hidden states and the LM head. The public function, its op, and its gradient.

Shapes: N tokens, V vocabulary, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import checks, reference, vocab_parallel
from .dispatch import backend_of, choose_backend, differentiable, exact, kept, register, without_second_derivative
from .inputs import Head, LinearInputs, StatsGrad
from .logits import new_results, results_of, save_stats
from .results import TokenStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_token_stats(
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
    mask: Tensor | None = None,
    batch_invariant: bool = False,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> TokenStats:
    """`token_stats` from hidden states and the LM head, without materialising the logits. Equivalent to

        logits = logit_scale * (hidden.float() @ weight.float().T + bias)
        logits = softcap * tanh(logits / softcap)
        token_stats(logits, tokens, ref_logits=the same of the reference, temperature=temperature, mask=mask)

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
        batch_invariant: a row's results and hidden gradient have the same bits whatever the other rows are. On the
            torch backend that is one row at a time, and slow; the reference refuses it.
        process_group: the ranks that share the head; None is this one alone. See `safe_kernels`.

    The other arguments and the results are those of `token_stats`; where `mask` leaves most tokens out, select the
    others first on a GPU. Gradients go to hidden, weight and bias, as far as they require them.

    Only one tile of logits is ever in memory: at most 64 MiB on a CPU, 96 MiB on a GPU; with a reference twice that.
    """
    head = checks.require_head(
        Head(
            hidden, weight, tokens, bias, ref_hidden, ref_weight, ref_bias, temperature, softcap, logit_scale, mask
        )._replace(batch_invariant=batch_invariant, process_group=process_group)
    )
    backend = choose_backend(backend, *head[:8], group=head.process_group)
    if backend == "reference":
        with exact(hidden):
            return reference.linear_token_stats(**head._asdict())
    inputs, name, bounds = flat_inputs(head), None, None
    if head.process_group is not None:
        inputs, name, bounds = vocab_parallel.sharded(inputs, len(head.weight), head.process_group)
    found = linear_token_stats_op(*inputs, name, bounds, backend)
    return TokenStats.of(found[:4], tokens.shape, ref_hidden is not None)


def flat_inputs(head: Head) -> LinearInputs:
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
    )


def linear_token_stats_fake(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    ref_hidden_NH: Tensor | None,
    ref_weight_VH: Tensor | None,
    ref_bias_V: Tensor | None,
    tokens_N: Tensor,
    *_: Any,
) -> tuple[Tensor, ...]:
    return new_results(hidden_NH, tokens_N, ref_hidden_NH is not None)


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
    group: str | None,
    bounds: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprob, entropy, ref_logprob, kl) [N], empty without a reference, and the rows of `RowStats`."""
    head = (hidden_NH, weight_VH, bias_V, ref_hidden_NH, ref_weight_VH, ref_bias_V)
    per_row = (tokens_N, temperature, temperatures_N, mask_N)
    inputs = LinearInputs(*head, *per_row, softcap, logit_scale, batch_invariant)
    stats = backend_of(backend).linear_statistics(inputs)
    if group is not None and bounds is not None:
        stats = vocab_parallel.merged_stats(stats, inputs, group, bounds)
    return results_of(stats)


def linear_token_stats_gradient(
    ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, _: None, grad_kl: Tensor | None, *rest: None
) -> list[Tensor | None]:
    *arguments, stats = kept(ctx)
    inputs, group, backend = LinearInputs(*arguments[:13]), arguments[13], arguments[15]
    grads = StatsGrad(grad_logprob, grad_entropy, grad_kl)
    return linear_gradients(inputs, stats, grads, ctx.needs_input_grad[1:4], group, backend)


def linear_gradients(
    inputs: LinearInputs,
    stats: Tensor,
    grads: StatsGrad,
    needed: Sequence[bool],
    group: str | None,
    backend: str,
    dtypes: Sequence[torch.dtype | None] = (),
) -> list[Tensor | None]:
    """Gradients of (hidden, weight, bias) from the statistics that the op gave: summed in the compute dtype, in
    `dtypes`, or those of the inputs; None where not needed.
    """
    if not any(needed) or not any(x is not None for x in grads):
        return [None, None, None]
    found = linear_token_stats_backward_op(*inputs, stats, *grads, *needed, group, backend)
    dtypes = dtypes or [None if x is None else x.dtype for x in inputs[:3]]
    return [x.to(dtype) if need else None for x, dtype, need in zip(found, dtypes, needed, strict=True)]


def linear_token_stats_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    leaves, stats, needed = arguments[:3], arguments[13], arguments[17:20]
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
    stats: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_kl: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    group: str | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (hidden, weight, bias) in the compute dtype, empty where not needed. Those of the weight and the
    bias are this rank's; all ranks share the hidden states, whose gradient is a sum over the ranks.
    """
    head = (hidden_NH, weight_VH, bias_V, ref_hidden_NH, ref_weight_VH, ref_bias_V)
    per_row = (tokens_N, temperature, temperatures_N, mask_N)
    inputs = LinearInputs(*head, *per_row, softcap, logit_scale, batch_invariant)
    grads, needed = StatsGrad(grad_logprob, grad_entropy, grad_kl), (need_hidden, need_weight, need_bias)
    hidden, weight, bias = backend_of(backend).linear_gradients(inputs, stats, grads, needed)
    if group is not None and hidden is not None:
        hidden = vocab_parallel.summed(hidden, vocab_parallel.group_of(group))
    return tuple(stats.new_empty(0) if x is None else x for x in (hidden, weight, bias))  # type: ignore[return-value]


differentiable(linear_token_stats_op, 3, save_stats, linear_token_stats_gradient)
without_second_derivative(linear_token_stats_backward_op, 17)
