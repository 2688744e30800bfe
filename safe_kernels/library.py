"""The operations of the fast backends, registered with PyTorch: eager, autograd and torch.compile meet here.

A backend is a module of plain functions on flattened inputs; what a gradient needs, and who asks for one, is decided
here once for all of them. An op returns plain tensors, empty where there is nothing to return.

    logits_statistics(inputs, terms)              the statistics of rows, `stats` [4 or 8, N], and the terms [3, N]
    logits_gradient(inputs, stats, slopes, out)   d loss / d logits, written to `out`, which may be the logits
    linear_statistics, linear_gradients           the same from hidden states; gradients of (hidden, weight, bias)
    sweep(inputs, objective, needed)              statistics, and the gradients of the closed-form loss
    terms_of(terms, stats, mask_N)                the terms [3, N] of tokens whose statistics are known
    soft_min_gae(...)                             value, advantage, returns

`stats` has the rows logprob, entropy, the maximum of the logits and the total of their exponentials, or its logarithm
if TOTALS_ARE_LOGS; with a reference the same four again: ref_logprob, kl, and so on. A token's log-prob that is NaN has
a NaN gradient: by that log-prob, not by the id, a backward knows a token outside the vocabulary. Where `inputs.shard`
says that this rank has only a part of it, an id outside the part may be another rank's: a backend computes the
statistics of the part, and gets back those of the whole.

Shapes: N tokens, V vocabulary, H hidden width.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import reference, vocab_parallel
from .inputs import LinearInputs, LogitsInputs, Shard, Terms, compute_dtype
from .objective import Objective, Slopes
from .results import PolicyLoss, SafeTerms, TokenStats, ValueTargets
from .schema import Signature

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def token_stats(
    logits: Tensor,
    tokens: Tensor,
    *,
    inplace_backward: bool,
    process_group: ProcessGroup | None,
    backend: str,
    **options: Any,
) -> TokenStats:
    inputs = LogitsInputs.of(logits, tokens, **options, shard=_shard(process_group, logits.shape[-1], tokens))
    return _token_stats(_logits_op(*_LOGITS.flatten(inputs, None, inplace_backward, backend)), tokens.shape)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    process_group: ProcessGroup | None,
    backend: str,
    **head: Any,
) -> TokenStats:
    inputs = LinearInputs.of(hidden, weight, tokens, **head, shard=_shard(process_group, len(weight), tokens))
    return _token_stats(_linear_op(*_LINEAR.flatten(inputs, None, backend)), tokens.shape)


def safe_terms(
    logits: Tensor,
    tokens: Tensor,
    *values: Tensor,
    ref_logits: Tensor,
    temperature: float | Tensor,
    mask: Tensor | None,
    inplace_backward: bool,
    process_group: ProcessGroup | None,
    backend: str,
    **options: Any,
) -> SafeTerms:
    shard = _shard(process_group, logits.shape[-1], tokens)
    inputs = LogitsInputs.of(logits, tokens, ref_logits=ref_logits, temperature=temperature, mask=mask, shard=shard)
    terms = Terms.of(*values, **options)
    found = _logits_op(*_LOGITS.flatten(inputs, terms, inplace_backward, backend))
    return SafeTerms._make(x.view(tokens.shape) for x in found[:-1])


def linear_safe_terms(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *values: Tensor,
    process_group: ProcessGroup | None,
    backend: str,
    **options: Any,
) -> SafeTerms:
    names = ("target_v1", "target_v2", "kl_threshold", "alpha", "gamma", "cu_seqlens")
    terms = Terms.of(*values, **{name: options.pop(name) for name in names})
    inputs = LinearInputs.of(hidden, weight, tokens, **options, shard=_shard(process_group, len(weight), tokens))
    found = _linear_op(*_LINEAR.flatten(inputs, terms, backend))
    return SafeTerms._make(x.view(tokens.shape) for x in found[:-1])


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    *,
    loss_weight: Tensor | None,
    clip_low: float,
    clip_high: float,
    entropy_coef: float | Tensor,
    kl_coef: float | Tensor,
    kl_penalty_coef: float | Tensor,
    kl_threshold: float | Tensor,
    process_group: ProcessGroup | None,
    backend: str,
    **head: Any,
) -> PolicyLoss:
    inputs = LinearInputs.of(hidden, weight, tokens, **head, shard=_shard(process_group, len(weight), tokens))
    coefficients = (clip_low, clip_high, entropy_coef, kl_coef, kl_penalty_coef, kl_threshold)
    objective = Objective.of(inputs, old_logprob, advantage, loss_weight, *coefficients)
    needed = (torch.is_grad_enabled() and x is not None and _may_require_grad(x) for x in inputs[:3])
    loss, clip_fraction, *results, _, _, _ = _loss_op(*_LOSS.flatten(inputs, objective, *needed, backend))
    results = _shaped(results, tokens.shape, inputs.ref_hidden_NH is not None)
    return PolicyLoss._make([loss, *results, clip_fraction])


def _may_require_grad(x: Tensor) -> bool:
    """Inside vmap a tensor does not say."""
    return x.requires_grad or (torch._C._are_functorch_transforms_active() and torch._C._functorch.is_batchedtensor(x))


def soft_min(v1: Tensor, v2: Tensor, alpha: float, *, backend: str) -> Tensor:
    """Plain PyTorch on every backend: an elementwise function of [tokens] earns no kernel."""
    return reference.soft_min(v1, v2, alpha)


def soft_min_gae(
    v1: Tensor, v2: Tensor, rewards: Tensor, mask: Tensor | None, *, bootstrap: Tensor | None, **options: Any
) -> ValueTargets:
    values = (v1.detach(), v2.detach(), rewards.detach(), mask)
    options["bootstrap"] = None if bootstrap is None else bootstrap.detach()
    return ValueTargets._make(_gae_op(*values, *(options[name] for name in _GAE.names[len(values) :])))


def statistics(inputs: LinearInputs | LogitsInputs, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob [N], entropy [N], stats), without autograd: for a Function of one's own, with the gradients below."""
    if isinstance(inputs, LinearInputs):
        found = _linear_op(*_LINEAR.flatten(inputs, None, backend))
    else:
        found = _logits_op(*_LOGITS.flatten(inputs, None, False, backend))
    return found[0], found[1], found[-1]


def log_total(stats: Tensor, backend: str) -> Tensor:
    """[N], log of the sum of exp((logits - their maximum) / T): minus the log-prob of the most likely token."""
    return stats[3] if backend == "triton" else stats[3].log()  # TOTALS_ARE_LOGS, which torch.compile cannot look up


def linear_gradients(
    inputs: LinearInputs, backend: str, stats: Tensor, slopes: Slopes, needed: Sequence[bool], leaves: Sequence[Any]
) -> list[Tensor | None]:
    """Gradients of (hidden, weight, bias), summed in the compute dtype, in that of the leaf; None if not needed."""
    sums = _linear_backward_op(*_LINEAR_BACKWARD.flatten(inputs, backend, stats, *slopes, *needed))
    return [x.to(leaf.dtype) if need else None for x, leaf, need in zip(sums, leaves, needed, strict=True)]


def logits_gradient(inputs: LogitsInputs, backend: str, stats: Tensor, slopes: Slopes) -> Tensor:
    return _logits_backward_op(*_LOGITS_BACKWARD.flatten(inputs, backend, stats, *slopes))


def _shard(group: ProcessGroup | None, width: int, tokens: Tensor) -> Shard | None:
    if group is None:
        return None
    return Shard(group.group_name, group.rank(), _bounds_op(tokens, width, group.group_name))


def _token_stats(found: Sequence[Tensor], shape: torch.Size) -> TokenStats:
    return TokenStats._make(_shaped(found[:4], shape, found[-1].shape[0] == 8))


def _shaped(results: Sequence[Tensor], shape: torch.Size, with_reference: bool) -> list[Tensor | None]:
    """(logprob, entropy, ref_logprob, kl) in the shape of the tokens; None without a reference."""
    return [x.view(shape) if with_reference or i < 2 else None for i, x in enumerate(results)]


def _register(name: str, signature: Signature, outputs: str, mutates: str = "") -> Callable[..., Any]:
    """Make an op of a function of the signature's values; it runs on its tensors' device, and autocast is off."""

    def register(body: Callable[..., Any]) -> Any:
        def run(*flat: Any) -> Any:
            device = flat[0].device
            with torch.autocast(device.type, enabled=False), torch.accelerator.device_index(device.index):
                return body(*signature.restore(flat))

        schema = signature.schema.replace(f"Tensor {mutates},", f"Tensor(a!) {mutates},", 1)
        _LIBRARY.define(f"{name}({schema}) -> {outputs}", tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        op = getattr(torch.ops.safe_kernels, name).default
        if mutates:
            _LIBRARY.impl(name, _mutating(op, signature.names.index(mutates)), "ADInplaceOrView", with_keyset=True)
        return op

    return register


def _mutating(op: Any, index: int) -> Callable[..., Any]:
    """Tells autograd that the argument has changed."""

    def run(keyset: Any, *flat: Any) -> Any:
        torch.autograd.graph.increment_version(flat[index])
        return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *flat)

    return run


def _differentiable(op: Any, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """What `torch.library.register_autograd` does, without its time quadratic in the number of arguments."""

    def forward_below(*flat_and_keyset: Any) -> Any:
        *flat, keyset = flat_and_keyset
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *flat)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *flat_and_keyset: Any) -> Any:
            found = forward_below(*flat_and_keyset)
            setup_context(ctx, flat_and_keyset[:-1], found)
            return found

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return *backward(ctx, *grads), None

    def run(keyset: Any, *flat: Any) -> Any:
        wanted = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in flat)
        return Differentiable.apply(*flat, keyset) if wanted else forward_below(*flat, keyset)

    _LIBRARY.impl(op.name().partition("::")[2], run, "Autograd", with_keyset=True)


def _fake(op: Any) -> Callable[..., Any]:
    """What the op returns for tensors without memory."""
    return torch.library.register_fake(op.name(), lib=_LIBRARY)


def _backend(name: str) -> Any:
    return importlib.import_module(f"safe_kernels.{name}_backend")


_LIBRARY = torch.library.Library("safe_kernels", "DEF")

# What the two statistics return: logprob, entropy, ref_logprob, kl, kl_penalty, value, value_target, stats.
_STATISTICS = f"({', '.join(['Tensor'] * 8)})"
_SLOPES = {name: Tensor | None for name in ("grad_logprob", "grad_entropy", "grad_kl")}
_LOGITS = Signature(inputs=LogitsInputs, terms=Terms | None, inplace_backward=bool, backend=str)
_LOGITS_BACKWARD = Signature(inputs=LogitsInputs, backend=str, stats=Tensor, **_SLOPES)
_LINEAR = Signature(inputs=LinearInputs, terms=Terms | None, backend=str)
_NEEDS = dict.fromkeys(("need_hidden", "need_weight", "need_bias"), bool)
_LINEAR_BACKWARD = Signature(inputs=LinearInputs, backend=str, stats=Tensor, **_SLOPES, **_NEEDS)
_LOSS = Signature(inputs=LinearInputs, objective=Objective, **_NEEDS, backend=str)
_BOUNDS = Signature(like=Tensor, width=int, group=str)
_SCALED = Signature(gradient=Tensor, factor=Tensor, dtype=str)
_GAE = Signature(
    v1=Tensor,
    v2=Tensor,
    rewards=Tensor,
    mask=Tensor | None,
    gamma=float,
    lam=float,
    alpha=float,
    cu_seqlens=Tensor | None,
    bootstrap=Tensor | None,
    backend=str,
)


@_register("token_stats", _LOGITS, _STATISTICS)
def _logits_op(inputs: LogitsInputs, terms: Terms | None, inplace_backward: bool, backend: str) -> tuple[Tensor, ...]:
    return _outputs(*vocab_parallel.statistics(_backend(backend), inputs, terms))


@_register("linear_token_stats", _LINEAR, _STATISTICS)
def _linear_op(inputs: LinearInputs, terms: Terms | None, backend: str) -> tuple[Tensor, ...]:
    return _outputs(*vocab_parallel.statistics(_backend(backend), inputs, terms))


def _outputs(stats: Tensor, terms: Tensor | None) -> tuple[Tensor, ...]:
    """Outputs that share no memory."""
    absent = stats.new_empty(0)
    extra = (absent,) * 3 if terms is None else terms.unbind()
    return *(x.clone() for x in (*_results(stats), *extra)), stats


def _results(stats: Tensor) -> tuple[Tensor, ...]:
    """(logprob, entropy, ref_logprob, kl); the last two are empty without a reference."""
    absent = stats.new_empty(0)
    return (stats[0], stats[1], stats[4], stats[5]) if len(stats) == 8 else (stats[0], stats[1], absent, absent)


@_fake(_logits_op)
def _(*flat: Any) -> tuple[Tensor, ...]:
    inputs, terms, _, _ = _LOGITS.restore(flat)
    return _fake_outputs(inputs.logits, inputs.tokens_N, inputs.ref_logits is not None, terms is not None)


@_fake(_linear_op)
def _(*flat: Any) -> tuple[Tensor, ...]:
    inputs, terms, _ = _LINEAR.restore(flat)
    return _fake_outputs(inputs.hidden_NH, inputs.tokens_N, inputs.ref_hidden_NH is not None, terms is not None)


def _fake_outputs(x: Tensor, tokens_N: Tensor, with_reference: bool, with_terms: bool) -> tuple[Tensor, ...]:
    dtype, N = compute_dtype(x), tokens_N.shape[0]  # len() would make a number of a symbolic size
    sizes = [N, N, *[N if with_reference else 0] * 2, *[N if with_terms else 0] * 3]
    return *(x.new_empty(size, dtype=dtype) for size in sizes), x.new_empty(8 if with_reference else 4, N, dtype=dtype)


@_register("token_stats_backward", _LOGITS_BACKWARD, "Tensor")
def _logits_backward_op(inputs: LogitsInputs, backend: str, stats: Tensor, *slopes: Tensor | None) -> Tensor:
    out = torch.empty_like(inputs.logits, memory_format=torch.contiguous_format)
    _backend(backend).logits_gradient(inputs, stats, slopes, out)
    return out


@_register("token_stats_backward_", _LOGITS_BACKWARD, "()", mutates="logits")
def _logits_backward_inplace_op(inputs: LogitsInputs, backend: str, stats: Tensor, *slopes: Tensor | None) -> None:
    if inputs.ref_logits is not None and slopes[2] is not None and _overlap(inputs.logits, inputs.ref_logits):
        inputs = inputs._replace(ref_logits=inputs.ref_logits.clone())
    _backend(backend).logits_gradient(inputs, stats, slopes, inputs.logits)


def _overlap(x: Tensor, y: Tensor) -> bool:
    """Whether a write to some element of x may change another one of y. The very same tensor is read where written."""
    if x.numel() == 0 or (x.data_ptr() == y.data_ptr() and x.stride() == y.stride() and x.dtype == y.dtype):
        return False
    (start, end), (other_start, other_end) = _reach(x), _reach(y)
    return start < other_end and other_start < end


def _reach(x: Tensor) -> tuple[int, int]:
    """Addresses of the first byte, and of the one past the last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


@_register("linear_token_stats_backward", _LINEAR_BACKWARD, "(Tensor, Tensor, Tensor)")
def _linear_backward_op(inputs: LinearInputs, backend: str, stats: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    sums = vocab_parallel.linear_gradients(_backend(backend), inputs, stats, rest[:3], rest[3:])
    return tuple(stats.new_empty(0) if x is None else x for x in sums)


@_fake(_logits_backward_op)
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@_fake(_logits_backward_inplace_op)
def _(*_: Any) -> None:
    return None


@_fake(_linear_backward_op)
def _(*flat: Any) -> tuple[Tensor, ...]:
    inputs, _, stats, *rest = _LINEAR_BACKWARD.restore(flat)
    leaves = zip(inputs[:3], rest[3:], strict=True)
    return tuple(stats.new_empty(x.shape if need else 0) for x, need in leaves)


# What a backward does not read; and what it reads only for the gradient of logits, hidden states or head.
_UNREAD = {"rewards_N", "target_v1_N", "target_v2_N", "cu_seqlens"}
_LARGE = {"logits", "ref_logits", "hidden_NH", "weight_VH", "bias_V", "ref_hidden_NH", "ref_weight_VH", "ref_bias_V"}


def _statistics_context(signature: Signature, leaves: int) -> Callable[..., None]:
    """What autograd keeps of a forward; the first `leaves` arguments may want a gradient."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        _, _, ref_logprob, kl, penalty, value, value_target, stats = output
        absent = [] if stats.shape[0] == 8 else [kl]
        absent += [penalty, value] if signature.restore(inputs)[1] is None else []
        ctx.mark_non_differentiable(ref_logprob, value_target, stats, *absent)
        unread = _UNREAD if any(ctx.needs_input_grad[:leaves]) else _UNREAD | _LARGE
        kept = (None if name in unread else x for name, x in zip(signature.names, inputs, strict=True))
        _save(ctx, tuple(kept), stats)

    return setup_context


def _logits_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    (inputs, terms, inplace, backend), stats = _saved(ctx, _LOGITS)
    slopes, found = _slopes(terms, stats, grads), _nothing(_LOGITS)
    if ctx.needs_input_grad[0] and any(x is not None for x in slopes):
        if inplace:
            _first_derivative_only("inplace_backward=True")
            inputs = inputs._replace(logits=inputs.logits.detach())
        arguments = _LOGITS_BACKWARD.flatten(inputs, backend, stats, *slopes)
        if inplace:
            _logits_backward_inplace_op(*arguments)
        found[0] = arguments[0] if inplace else _logits_backward_op(*arguments)
    return _with_value_gradients(found, _LOGITS, inputs.mask_N, terms, grads)


def _linear_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    (inputs, terms, backend), stats = _saved(ctx, _LINEAR)
    slopes, found = _slopes(terms, stats, grads), _nothing(_LINEAR)
    if any(ctx.needs_input_grad[:3]) and any(x is not None for x in slopes):
        found[:3] = linear_gradients(inputs, backend, stats, slopes, ctx.needs_input_grad[:3], inputs[:3])
    return _with_value_gradients(found, _LINEAR, inputs.mask_N, terms, grads)


def _refuse_second_derivative(op: Any) -> None:
    """In the words of ours; without, PyTorch names an op that no caller knows."""

    name = op.name().removesuffix("_backward").replace("::", ".")

    def backward(ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(f"{name} has no second derivative: use backend='reference'")

    _differentiable(op, lambda *_: None, backward)


def _first_derivative_only(what: str) -> None:
    """With create_graph=True, a gradient that nothing connects to the inputs would pass for a constant."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{what} has no second derivative: take its gradient without create_graph=True")


def _nothing(signature: Signature) -> list[Tensor | None]:
    return [None] * len(signature.names)


def _slopes(terms: Terms | None, stats: Tensor, grads: Sequence[Tensor | None]) -> Slopes:
    """The penalty's slope goes into that of the KL."""
    grad_logprob, grad_entropy, _, grad_kl, grad_penalty, *_ = grads
    if terms is not None and grad_penalty is not None:
        slope = 2 * (stats[5] - terms.kl_threshold).relu() * grad_penalty
        grad_kl = slope if grad_kl is None else grad_kl + slope
    return grad_logprob, grad_entropy, grad_kl


def _with_value_gradients(
    found: list[Any], signature: Signature, mask_N: Tensor | None, terms: Terms | None, grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Add d loss / d (v1, v2): a soft-min's slopes are the softmax of -v / alpha."""
    grad_value = grads[5]
    if terms is not None and grad_value is not None:
        gap = (terms.v2_N.to(grad_value) - terms.v1_N.to(grad_value)) / terms.alpha
        for name, odds in (("v1_N", gap), ("v2_N", -gap)):
            gradient = grad_value * torch.sigmoid(odds)
            gradient = gradient if mask_N is None else gradient.where(mask_N, 0)
            found[signature.names.index(name)] = gradient.to(getattr(terms, name).dtype)
    return tuple(found)


_refuse_second_derivative(_logits_backward_op)
_refuse_second_derivative(_linear_backward_op)
_differentiable(_logits_op, _statistics_context(_LOGITS, 1), _logits_backward)
_differentiable(_linear_op, _statistics_context(_LINEAR, 3), _linear_backward)


@_register("linear_policy_loss", _LOSS, f"({', '.join(['Tensor'] * 9)})")
def _loss_op(inputs: LinearInputs, objective: Objective, *rest: Any) -> tuple[Tensor, ...]:
    """loss, clip_fraction, logprob, entropy, ref_logprob, kl, and the gradients of (hidden, weight, bias)."""
    *needed, backend = rest
    stats, gradients = vocab_parallel.sweep(_backend(backend), inputs, objective, tuple(needed))
    logprob, entropy, _, kl = _results(stats)
    loss_N, is_clipped_N, _ = objective.evaluate(logprob, entropy, kl if len(stats) == 8 else None)
    clip_fraction = (objective.share_N * is_clipped_N).sum()
    gradients_or_empty = (stats.new_empty(0) if x is None else x for x in gradients)
    return loss_N.sum(), clip_fraction, *(x.clone() for x in _results(stats)), *gradients_or_empty


@_fake(_loss_op)
def _(*flat: Any) -> tuple[Tensor, ...]:
    inputs, _, *needed, _ = _LOSS.restore(flat)
    dtype = compute_dtype(inputs.hidden_NH)
    results = _fake_outputs(inputs.hidden_NH, inputs.tokens_N, inputs.ref_hidden_NH is not None, False)[:4]
    shapes = [x.shape if need else (0,) for x, need in zip(inputs[:3], needed, strict=True)]
    others = [inputs.hidden_NH.new_empty(shape, dtype=dtype) for shape in ((), (), *shapes)]
    return *others[:2], *results, *others[2:]


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # zeros as large as the head's gradient
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtypes = [None if x is None else x.dtype for x in inputs[:3]]
    ctx.save_for_backward(*output[-3:])


def _loss_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * len(_LOSS.names)
    _first_derivative_only("linear_policy_loss")
    leaves = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
    gradients = [_scaled_op(x, grad_loss, str(dtype)) if need else None for x, dtype, need in leaves]
    return tuple(gradients + [None] * (len(_LOSS.names) - 3))


@_register("scaled", _SCALED, "Tensor")
def _scaled_op(gradient: Tensor, factor: Tensor, dtype: str) -> Tensor:
    """Rounded as it is written: a GPU does not hold a head's gradient a second time in float32."""
    out = torch.empty_like(gradient, dtype=getattr(torch, dtype.removeprefix("torch.")))
    return torch.mul(gradient, factor, out=out)


@_fake(_scaled_op)
def _(gradient: Tensor, factor: Tensor, dtype: str) -> Tensor:
    return torch.empty_like(gradient, dtype=getattr(torch, dtype.removeprefix("torch.")))


_differentiable(_loss_op, _save_loss, _loss_backward)


@_register("vocabulary_bounds", _BOUNDS, "Tensor")
def _bounds_op(like: Tensor, width: int, group: str) -> Tensor:
    return vocab_parallel.bounds_of(like, width, vocab_parallel.group_of(group))


@_fake(_bounds_op)
def _(like: Tensor, width: int, group: str) -> Tensor:
    return like.new_empty(vocab_parallel.group_of(group).size() + 1, dtype=torch.int64)


@_register("soft_min_gae", _GAE, "(Tensor, Tensor, Tensor)")
def _gae_op(*arguments: Any) -> tuple[Tensor, ...]:
    *values, backend = arguments
    return tuple(_backend(backend).soft_min_gae(*values))


@_fake(_gae_op)
def _(v1: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(v1.new_empty(v1.shape, dtype=compute_dtype(v1)) for _ in range(3))


def _save(ctx: Any, inputs: tuple[Any, ...], stats: Tensor) -> None:
    """Keep tensors where autograd watches their versions, the other arguments beside them.

    Those of torch.inference_mode, as a reference's may be, have no versions.
    """
    watched = [x if isinstance(x, Tensor) and not x.is_inference() else None for x in inputs]
    ctx.constants = tuple(x if w is None else None for x, w in zip(inputs, watched, strict=True))
    ctx.save_for_backward(*watched, stats)


def _saved(ctx: Any, signature: Signature) -> tuple[Any, Tensor]:
    *tensors, stats = ctx.saved_tensors
    flat = [x if c is None else c for x, c in zip(tensors, ctx.constants, strict=True)]
    return signature.restore(flat), stats
