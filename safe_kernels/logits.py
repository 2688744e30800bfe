"""`token_stats`: statistics of logits that already exist. The public function, its op, and the op's gradient."""

from __future__ import annotations

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
    first_derivative_only,
    keep,
    kept,
    register,
    without_second_derivative,
)
from .inputs import ALL_ROWS, KeptIds, LogitsInputs, StatsGrad
from .results import TokenStats, constants_of, new_results, results_of
from .tiled import tiled_token_stats_op

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def token_stats(
    logits: Tensor,
    tokens: Tensor,
    *,
    ref_logits: Tensor | None = None,
    with_ref_kl: bool = False,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    kept: KeptIds | Tensor | Sequence[Any] | None = None,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> TokenStats:
    """Log-prob of each token, entropy, and exact KL to a reference, from logits. Equivalent to

        logp, logq = log_softmax(logits / temperature), log_softmax(ref_logits / temperature)
        logprob, ref_logprob = (x.gather(-1, tokens[..., None])[..., 0] for x in (logp, logq))
        entropy, kl = -(logp.exp() * logp).sum(-1), (logp.exp() * (logp - logq)).sum(-1)
        ref_kl = (logq.exp() * (logq - logp)).sum(-1)

    Args:
        logits: [..., V], any floating dtype and strides.
        tokens: [...] of any integer dtype. An id outside 0..V-1 that is not masked has NaN log-probs.
        ref_logits: [..., V]; never receives a gradient. A reference of -inf where the policy is not has kl = inf.
        with_ref_kl: whether to compute `ref_kl`, too, from the same read. A policy of -inf where the reference is not
            has ref_kl = inf; its gradient (p - q) / temperature stays finite, unlike that of an infinite kl.
        temperature: > 0, a number or [...]; divides the logits of both.
        mask: [...] bool.
        kept: the ids that a sampler kept for each token, as KeptIds, as a tensor [..., K] with -1 for none, or as lists
            nested like the tokens: log-probs, entropy and KL of both distributions restricted to them, and divided by
            their sum there. A token outside of its set has NaN log-probs; a set without any id makes NaN of its row, on
            a CPU it raises, as ids outside of the vocabulary do. They are not read elsewhere, except with
            SAFE_KERNELS_DEBUG=1, and then count as -1. The host waits for the device. Not with `inplace_backward` or
            `process_group`.
        inplace_backward: write the gradient over `logits`, which must not be a leaf. A second backward, or another
            operation that needs the logits afterwards, raises. The KL's backward copies a reference that overlaps them.
        process_group: the ranks that share the vocabulary; None is this one alone. See `safe_kernels`.

    Returns:
        TokenStats; `ref_logprob` and `kl` are None without `ref_logits`, `ref_kl` without `with_ref_kl`.
    """
    logits, ref_logits, group = checks.local_parts(process_group, -1, logits=logits, ref_logits=ref_logits)
    has_axis_of_ids = getattr(tokens, "ndim", None) == getattr(logits, "ndim", 0)
    one = kept_sets.one_of(tokens) if has_axis_of_ids else tokens
    checks.require_logits(logits, one, ref_logits, mask, group)
    if with_ref_kl:
        checks.require_reference_for("with_ref_kl", with_ref_kl, "ref_logits", ref_logits)
    if is_tiled := kept is not None or one is not tokens:
        kept_sets.require_offered(kept, inplace_backward=inplace_backward, process_group=group)
        kept = kept_sets.require_kept(kept, one, logits.shape[-1], mask)
    if inplace_backward:
        checks.require_overwritable("logits", logits)
    if isinstance(temperature, Tensor):
        temperature = checks.require_temperatures(temperature, one, mask, logits)
    else:
        temperature = checks.require_number("temperature", temperature, above=0)
    backend = choose_backend(backend, logits, ref_logits, temperature, group=group)
    if backend == "reference":
        with exact(logits):
            options: dict[str, Any] = {"with_ref_kl": with_ref_kl, "temperature": temperature, "mask": mask}
            options |= {"kept": kept, "process_group": group}
            return reference.token_stats(logits, tokens, ref_logits=ref_logits, **options)
    inputs, name, bounds = flat_inputs(logits, one, ref_logits, temperature, mask, with_ref_kl), None, None
    if is_tiled:
        inputs = inputs._replace(tokens_N=kept_sets.flat_ids(tokens, one))
        found = tiled_token_stats_op(*inputs, *(kept or (None, None)), backend)
        return TokenStats.of(found, one, inputs.stats_rows, tokens)
    if group is not None:
        inputs, name, bounds = vocab_parallel.sharded(inputs, logits.shape[-1], group)
    found = token_stats_op(*inputs, name, bounds, inplace_backward, backend)
    return TokenStats.of(found, tokens, inputs.stats_rows)


def flat_inputs(
    logits: Tensor,
    tokens: Tensor,
    ref_logits: Tensor | None,
    temperature: float | Tensor,
    mask: Tensor | None,
    with_ref_kl: bool = False,
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
        4 if ref_logits is None else ALL_ROWS if with_ref_kl else 8,
    )


def token_stats_fake(logits: Tensor, ref_logits: Tensor | None, tokens_N: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return new_results(logits, tokens_N, stats_rows=others[3])


@register(token_stats_fake)
def token_stats_op(
    logits: Tensor,
    ref_logits: Tensor | None,
    tokens_N: Tensor,
    temperature: float,
    temperatures_N: Tensor | None,
    mask_N: Tensor | None,
    stats_rows: int,
    group: str | None,
    bounds: Tensor | None,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprob, entropy, ref_logprob, kl, ref_kl) [N], empty if not asked for, and the rows of `RowStats`."""
    inputs = LogitsInputs(logits, ref_logits, tokens_N, temperature, temperatures_N, mask_N, stats_rows)
    stats = backend_of(backend).logits_statistics(inputs)
    if group is not None and bounds is not None:
        stats = vocab_parallel.merged_stats(stats, inputs, group, bounds)
    return results_of(stats)


def save_stats(ctx: Any, arguments: tuple[Any, ...], found: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*constants_of(found))
    keep(ctx, arguments, found[-1])


def token_stats_gradient(
    ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, _: None, *others: Tensor | None
) -> tuple[Tensor | None]:
    grads = StatsGrad(grad_logprob, grad_entropy, *others[:2])
    if not any(x is not None for x in grads):
        return (None,)
    *arguments, stats = kept(ctx)
    inputs, inplace, backend = LogitsInputs(*arguments[:7]), arguments[9], arguments[10]
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
    stats_rows: int,
    stats: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_kl: Tensor | None,
    grad_ref_kl: Tensor | None,
    backend: str,
) -> Tensor:
    """d loss / d logits; of a part of the vocabulary, from the statistics of the whole."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    inputs = LogitsInputs(logits, ref_logits, tokens_N, temperature, temperatures_N, mask_N, stats_rows)
    grads = StatsGrad(grad_logprob, grad_entropy, grad_kl, grad_ref_kl)
    backend_of(backend).logits_gradient(inputs, stats, grads, out)
    return out


@register(lambda *_: None, mutates="logits")
def token_stats_backward__op(
    logits: Tensor,
    ref_logits: Tensor | None,
    tokens_N: Tensor,
    temperature: float,
    temperatures_N: Tensor | None,
    mask_N: Tensor | None,
    stats_rows: int,
    stats: Tensor,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    grad_kl: Tensor | None,
    grad_ref_kl: Tensor | None,
    backend: str,
) -> None:
    """The same, written over the logits."""
    grads = StatsGrad(grad_logprob, grad_entropy, grad_kl, grad_ref_kl)
    if ref_logits is not None and grads.reads_reference and overlap(logits, ref_logits):
        ref_logits = ref_logits.clone()
    inputs = LogitsInputs(logits, ref_logits, tokens_N, temperature, temperatures_N, mask_N, stats_rows)
    backend_of(backend).logits_gradient(inputs, stats, grads, logits)


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
without_second_derivative(token_stats_backward_op, 12)
