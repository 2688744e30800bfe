"""`token_stats`: statistics of logits that already exist. The public function, its op, and the op's gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import checks, reference, vocab_parallel
from .dispatch import (
    backend_of,
    choose_backend,
    differentiable,
    exact,
    first_derivative_only,
    keep,
    kept,
    register,
    without_second_derivative,
)
from .inputs import LogitsInputs, StatsGrad, compute_dtype
from .results import TokenStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def token_stats(
    logits: Tensor,
    tokens: Tensor,
    *,
    ref_logits: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> TokenStats:
    """Log-prob of each token, entropy, and exact KL to a reference, from logits. Equivalent to

        logp, logq = log_softmax(logits / temperature), log_softmax(ref_logits / temperature)
        logprob, ref_logprob = (x.gather(-1, tokens[..., None])[..., 0] for x in (logp, logq))
        entropy, kl = -(logp.exp() * logp).sum(-1), (logp.exp() * (logp - logq)).sum(-1)

    Args:
        logits: [..., V], any floating dtype and strides.
        tokens: [...] of any integer dtype. An id outside 0..V-1 that is not masked has NaN log-probs.
        ref_logits: [..., V]; never receives a gradient. A reference of -inf where the policy is not has kl = inf.
        temperature: > 0, a number or [...]; divides the logits of both.
        mask: [...] bool.
        inplace_backward: write the gradient over `logits`, which must not be a leaf. A second backward, or another
            operation that needs the logits afterwards, raises. The KL's backward copies a reference that overlaps them.
        process_group: the ranks that share the vocabulary; None is this one alone. See `safe_kernels`.

    Returns:
        TokenStats; `ref_logprob` and `kl` are None without `ref_logits`.
    """
    logits, ref_logits, group = checks.local_parts(process_group, -1, logits=logits, ref_logits=ref_logits)
    checks.require_logits(logits, tokens, ref_logits, mask, group)
    if inplace_backward:
        checks.require_overwritable("logits", logits)
    if isinstance(temperature, Tensor):
        temperature = checks.require_temperatures(temperature, tokens, mask, logits)
    else:
        temperature = checks.require_number("temperature", temperature, above=0)
    backend = choose_backend(backend, logits, ref_logits, temperature, group=group)
    if backend == "reference":
        with exact(logits):
            return reference.token_stats(
                logits, tokens, ref_logits=ref_logits, temperature=temperature, mask=mask, process_group=group
            )
    inputs, name, bounds = flat_inputs(logits, tokens, ref_logits, temperature, mask), None, None
    if group is not None:
        inputs, name, bounds = vocab_parallel.sharded(inputs, logits.shape[-1], group)
    found = token_stats_op(*inputs, name, bounds, inplace_backward, backend)
    return TokenStats.of(found[:4], tokens, ref_logits is not None)


def flat_inputs(
    logits: Tensor, tokens: Tensor, ref_logits: Tensor | None, temperature: float | Tensor, mask: Tensor | None
) -> LogitsInputs:
    tokens_N = tokens.reshape(-1)
    number, temperatures = (1.0, temperature) if isinstance(temperature, Tensor) else (temperature, None)
    return LogitsInputs(
        logits,
        None if ref_logits is None else ref_logits.detach(),
        tokens_N if tokens_N.dtype == torch.int32 else tokens_N.long(),
        number,
        None if temperatures is None else temperatures.reshape(-1),
        None if mask is None else mask.reshape(-1),
    )


def new_results(x: Tensor, tokens_N: Tensor, with_reference: bool) -> tuple[Tensor, ...]:
    """What an op of statistics returns for tensors without memory."""
    dtype, N = compute_dtype(x), tokens_N.shape[0]  # len() would make a number of a symbolic size
    sizes = [N, N, *[N if with_reference else 0] * 2]
    return *(x.new_empty(size, dtype=dtype) for size in sizes), x.new_empty(8 if with_reference else 4, N, dtype=dtype)


def results_of(stats: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprob, entropy, ref_logprob, kl, stats), the first four with memory of their own: what callers get."""
    if stats.shape[0] == 8:
        return stats[0].clone(), stats[1].clone(), stats[4].clone(), stats[5].clone(), stats
    return stats[0].clone(), stats[1].clone(), stats.new_empty(0), stats.new_empty(0), stats


def token_stats_fake(logits: Tensor, ref_logits: Tensor | None, tokens_N: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return new_results(logits, tokens_N, ref_logits is not None)


@register(token_stats_fake)
def token_stats_op(
    logits: Tensor,
    ref_logits: Tensor | None,
    tokens_N: Tensor,
    temperature: float,
    temperatures_N: Tensor | None,
    mask_N: Tensor | None,
    group: str | None,
    bounds: Tensor | None,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprob, entropy, ref_logprob, kl) [N], empty without a reference, and the rows of `RowStats`."""
    inputs = LogitsInputs(logits, ref_logits, tokens_N, temperature, temperatures_N, mask_N)
    stats = backend_of(backend).logits_statistics(inputs)
    if group is not None and bounds is not None:
        stats = vocab_parallel.merged_stats(stats, inputs, group, bounds)
    return results_of(stats)


def save_stats(ctx: Any, arguments: tuple[Any, ...], found: tuple[Tensor, ...]) -> None:
    """For the op of logits and that of hidden states alike."""
    _, _, ref_logprob, kl, stats = found
    ctx.mark_non_differentiable(ref_logprob, stats, *([kl] if stats.shape[0] == 4 else []))
    keep(ctx, arguments, stats)


def token_stats_gradient(
    ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, _: None, grad_kl: Tensor | None, *rest: None
) -> tuple[Tensor | None]:
    grads = StatsGrad(grad_logprob, grad_entropy, grad_kl)
    if not any(x is not None for x in grads):
        return (None,)
    *arguments, stats = kept(ctx)
    inputs, inplace, backend = LogitsInputs(*arguments[:6]), arguments[8], arguments[9]
    if not inplace:
        return (token_stats_backward_op(*inputs, stats, *grads, backend),)
    first_derivative_only("inplace_backward=True")
    logits = inputs.logits.detach()
    token_stats_backward__op(logits, *inputs[1:], stats, *grads, backend)
    return (logits,)


def token_stats_backward_fake(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@register(token_stats_backward_fake)
def token_stats_backward_op(
    logits: Tensor,
    ref_logits: Tensor | None,
    tokens_N: Tensor,
    temperature: float,
    temperatures_N: Tensor | None,
    mask_N: Tensor | None,
    stats: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_kl: Tensor | None,
    backend: str,
) -> Tensor:
    """d loss / d logits; of a part of the vocabulary, from the statistics of the whole."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    inputs = LogitsInputs(logits, ref_logits, tokens_N, temperature, temperatures_N, mask_N)
    backend_of(backend).logits_gradient(inputs, stats, StatsGrad(grad_logprob, grad_entropy, grad_kl), out)
    return out


@register(lambda *_: None, mutates="logits")
def token_stats_backward__op(
    logits: Tensor,
    ref_logits: Tensor | None,
    tokens_N: Tensor,
    temperature: float,
    temperatures_N: Tensor | None,
    mask_N: Tensor | None,
    stats: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_kl: Tensor | None,
    backend: str,
) -> None:
    """The same, written over the logits."""
    if ref_logits is not None and grad_kl is not None and overlap(logits, ref_logits):
        ref_logits = ref_logits.clone()
    inputs = LogitsInputs(logits, ref_logits, tokens_N, temperature, temperatures_N, mask_N)
    backend_of(backend).logits_gradient(inputs, stats, StatsGrad(grad_logprob, grad_entropy, grad_kl), logits)


def overlap(x: Tensor, y: Tensor) -> bool:
    """Whether a write to some element of x may change another one of y. The very same tensor is read where written."""
    if x.numel() == 0 or (x.data_ptr() == y.data_ptr() and x.stride() == y.stride() and x.dtype == y.dtype):
        return False
    (start, end), (other_start, other_end) = reach(x), reach(y)
    return start < other_end and other_start < end


def reach(x: Tensor) -> tuple[int, int]:
    """Addresses of the first byte, and of the one past the last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


differentiable(token_stats_op, 1, save_stats, token_stats_gradient)
without_second_derivative(token_stats_backward_op, 10)
