"""The public functions. Each checks its arguments, chooses a backend and calls it.

Shapes: `...` is any leading shape, V the vocabulary, H the hidden width. Statistics are in nats, float32 (float64 where
logits or hidden states are), with the leading shape. A token that `mask` (torch.bool, True where a token counts) leaves
out has results of exactly 0 and gradients of exactly 0, and what its row holds, NaN included, spreads nowhere.

Every function takes `backend`: "triton", "torch", "reference", or None, which is the environment variable
SAFE_KERNELS_BACKEND or else Triton on GPUs, and PyTorch elsewhere and for float64. Wrong arguments raise ValueError or
TypeError at the call. SAFE_KERNELS_DEBUG=1 also checks what needs a synchronisation with the device: ids, NaN, the
values of tensors; and what needs an exchange between ranks: that they agree.

With `process_group` its ranks share the vocabulary, as tensor-parallel ranks do. Of what has an axis V each rank gives
its part, of at least one id; the parts follow one another in the order of the ranks and need not be equal. Of all else,
hidden states, tokens (ids of the whole vocabulary), masks, temperature, every rank gives the same: ranks of FSDP, which
hold different tokens, are no such group. Every rank gets the results of the whole vocabulary, with the same bits, and
must compute the same loss from them, as incoming gradients are taken to be the same on all ranks; none may leave out a
call or a backward. Gradients of a part stay with its rank, that of the hidden states is complete on each. What is
exchanged: the sizes of the parts, 4 numbers a token, 8 with a reference, and the hidden gradient in float32; never
logits, except by the reference backend, which gathers them.
A DTensor that is sharded along V over the group stands for its part, and its gradient is such a DTensor.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import checks, derivatives, library, reference
from .results import PolicyLoss, SafeTerms, TokenStats, ValueTargets

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_BACKENDS = ("reference", "torch", "triton")
_HAS_TRITON = importlib.util.find_spec("triton") is not None


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
        process_group: the ranks that share the vocabulary; None is this one alone. See the top of this module.

    Returns:
        TokenStats; `ref_logprob` and `kl` are None without `ref_logits`.
    """
    logits, ref_logits, group = checks.parts_of(process_group, -1, logits=logits, ref_logits=ref_logits)
    checks.logits_arguments(logits, tokens, ref_logits, mask, group)
    if inplace_backward:
        checks.may_be_overwritten("logits", logits)
    temperature = checks.is_temperature(temperature, tokens, mask, logits)
    return _call(
        "token_stats",
        backend,
        logits,
        tokens,
        ref_logits=ref_logits,
        temperature=temperature,
        mask=mask,
        inplace_backward=inplace_backward,
        process_group=group,
    )


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
    """The same from hidden states and the head's weight, with some of the logits at a time. Equivalent to

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
        process_group: the ranks that share the head; None is this one alone. See the top of this module.

    The other arguments and the results are those of `token_stats`; where `mask` leaves most tokens out, select the
    others first on a GPU. Gradients go to hidden, weight and bias, as far as they require them.

    Of the logits at most 64 MiB are in memory at a time on a CPU, and 96 MiB on a GPU; with a reference twice that.
    """
    weight, head = checks.head_arguments(
        hidden,
        weight,
        tokens,
        bias=bias,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        mask=mask,
        process_group=process_group,
    )
    return _call(
        "linear_token_stats", backend, hidden, weight, tokens, mask=mask, batch_invariant=batch_invariant, **head
    )


def safe_terms(
    logits: Tensor,
    tokens: Tensor,
    v1: Tensor,
    v2: Tensor,
    rewards: Tensor,
    *,
    ref_logits: Tensor,
    kl_threshold: float | Tensor,
    alpha: float,
    gamma: float = 1.0,
    target_v1: Tensor | None = None,
    target_v2: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    inplace_backward: bool = False,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> SafeTerms:
    """Everything SAFE needs of a token in one call: `token_stats`, and

        kl_penalty   = relu(kl - kl_threshold)**2
        value        = soft_min(v1, v2, alpha)
        value_target = rewards + gamma * soft_min(target_v1, target_v2, alpha) at the next live token, 0 past the last

    Args:
        v1, v2: [...] values of the two critics.
        rewards: [...].
        kl_threshold: a number or a 0-dim tensor, in nats.
        alpha: > 0, in the unit of the values.
        target_v1, target_v2: [...] values of the target critics; None takes `v1`, `v2`. Without gradient.
        cu_seqlens: int32 [B + 1], bounds of the sequences packed in one axis. None: the last axis is time.

    The other arguments are those of `token_stats`.
    """
    logits, ref_logits, group = checks.parts_of(process_group, -1, logits=logits, ref_logits=ref_logits)
    checks.logits_arguments(logits, tokens, checks.is_floating("ref_logits", ref_logits), mask, group)
    if inplace_backward:
        checks.may_be_overwritten("logits", logits)
    values, options = checks.value_arguments(
        logits, tokens, v1, v2, rewards, kl_threshold, alpha, gamma, target_v1, target_v2, cu_seqlens
    )
    temperature = checks.is_temperature(temperature, tokens, mask, logits)
    return _call(
        "safe_terms",
        backend,
        logits,
        tokens,
        *values,
        ref_logits=ref_logits,
        temperature=temperature,
        mask=mask,
        inplace_backward=inplace_backward,
        process_group=group,
        **options,
    )


def linear_safe_terms(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    v1: Tensor,
    v2: Tensor,
    rewards: Tensor,
    *,
    ref_hidden: Tensor,
    kl_threshold: float | Tensor,
    alpha: float,
    gamma: float = 1.0,
    target_v1: Tensor | None = None,
    target_v2: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    batch_invariant: bool = False,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> SafeTerms:
    """`safe_terms` from hidden states. Equivalent to

        logits = softcap * tanh(logit_scale * (hidden.float() @ weight.float().T + bias) / softcap)
        safe_terms(logits, tokens, v1, v2, rewards, ref_logits=the same of the reference, ...)

    Args:
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, softcap, logit_scale, batch_invariant: as in
            `linear_token_stats`; ref_hidden is needed.

    The other arguments are those of `safe_terms`.
    """
    checks.is_floating("ref_hidden", ref_hidden)
    weight, head = checks.head_arguments(
        hidden,
        weight,
        tokens,
        bias=bias,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        mask=mask,
        process_group=process_group,
    )
    values, options = checks.value_arguments(
        hidden, tokens, v1, v2, rewards, kl_threshold, alpha, gamma, target_v1, target_v2, cu_seqlens
    )
    return _call(
        "linear_safe_terms",
        backend,
        hidden,
        weight,
        tokens,
        *values,
        mask=mask,
        batch_invariant=batch_invariant,
        **head,
        **options,
    )


def soft_min(v1: Tensor, v2: Tensor, alpha: float, *, backend: str | None = None) -> Tensor:
    """A smooth minimum of two values, between their minimum (alpha -> 0) and their mean (alpha -> inf). Equivalent to

        -alpha * log(0.5 * (exp(-v1 / alpha) + exp(-v2 / alpha)))

    in float32, or float64 if v1 is, with the gradient softmax(-v / alpha). v1, v2: [...]; alpha > 0, in their unit.
    """
    (v2,) = checks.per_token(v1, checks.is_floating("v1", v1), v2=v2)
    alpha = checks.is_positive("alpha", alpha)
    return _call("soft_min", backend, v1, v2, alpha)


def soft_min_gae(
    v1: Tensor,
    v2: Tensor,
    rewards: Tensor,
    mask: Tensor | None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    alpha: float = 0.3,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
    backend: str | None = None,
) -> ValueTargets:
    """Generalised advantage estimates with the soft-min of two critics as the value. Backwards over live tokens,

        value        = soft_min(v1, v2, alpha)
        delta_t      = rewards_t + gamma * value_{t+1} - value_t
        advantage_t  = delta_t + gamma * lam * advantage_{t+1}
        returns      = advantage + value

    where t + 1 is the next token of the sequence that is not masked; past the last one, value is `bootstrap` and
    advantage 0.

    Args:
        v1, v2, rewards: [..., T], or [N] packed with `cu_seqlens`.
        mask: the same shape, bool; None counts every token.
        gamma, lam: in [0, 1].
        alpha: > 0, in the unit of the values.
        cu_seqlens: int32 [B + 1], from 0 to N.
        bootstrap: [...] or [B], the value after the last token; default 0.

    Returns:
        ValueTargets, without gradient; the estimates are those of Schulman et al., arXiv 1506.02438.
    """
    v2, rewards = checks.per_token(v1, checks.is_floating("v1", v1), v2=v2, rewards=rewards)
    checks.is_mask(mask, v1)
    checks.is_time(v1, cu_seqlens, bootstrap)
    gamma, lam = checks.is_number("gamma", gamma, 0, 1), checks.is_number("lam", lam, 0, 1)
    alpha = checks.is_positive("alpha", alpha)
    return _call(
        "soft_min_gae",
        backend,
        v1,
        v2,
        rewards,
        mask,
        gamma=gamma,
        lam=lam,
        alpha=alpha,
        cu_seqlens=cu_seqlens,
        bootstrap=None if bootstrap is None else checks.no_wider(bootstrap, v1),
    )


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    old_logprob: Tensor,
    advantage: Tensor,
    *,
    loss_weight: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    entropy_coef: float | Tensor = 0.0,
    kl_coef: float | Tensor = 0.0,
    kl_penalty_coef: float | Tensor = 0.0,
    kl_threshold: float | Tensor = 0.0,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    batch_invariant: bool = False,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> PolicyLoss:
    """The clipped policy loss with entropy bonus and KL terms, its gradient taken in the forward. Equivalent to

        stats = linear_token_stats(hidden, weight, tokens, ...)
        ratio = exp(stats.logprob - old_logprob)
        l = -min(ratio * advantage, clip(ratio, 1 - clip_low, 1 + clip_high) * advantage) - entropy_coef * stats.entropy
        l = l + kl_coef * stats.kl + kl_penalty_coef * relu(stats.kl - kl_threshold)**2
        loss = (loss_weight * l).sum()

    (Schulman et al., arXiv 1707.06347) with one sweep over the vocabulary instead of a forward and a recomputing
    backward. `logprob`, `entropy` and `kl` have the same bits in and out of torch.no_grad and whatever the advantages
    are, so that a ratio to log-probs that this function returned before is exactly 1; on the torch backend they also
    have those of `linear_token_stats`.

    With `process_group` it takes two sweeps, as no token's slope is known before all ranks have given their statistics:
    it costs a `linear_token_stats` and its backward, whose bits it has on every backend.

    Args:
        old_logprob, advantage: [...]; without gradient.
        loss_weight: [...]; it carries the reduction. Default: 1 / number of live tokens, the token mean.
        clip_low, clip_high: >= 0.
        entropy_coef, kl_coef, kl_penalty_coef: numbers or 0-dim tensors. The number 0 switches its term off.
        kl_threshold: a number or a 0-dim tensor, in nats.

    The other arguments are those of `linear_token_stats`.

    Returns:
        PolicyLoss; only `loss` carries a gradient, to hidden, weight and bias as far as they require it.
    """
    weight, head = checks.head_arguments(
        hidden,
        weight,
        tokens,
        bias=bias,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        mask=mask,
        process_group=process_group,
    )
    old_logprob, advantage = checks.per_token(hidden, tokens, old_logprob=old_logprob, advantage=advantage)
    (loss_weight,) = checks.per_token_or_none(hidden, tokens, loss_weight=loss_weight)
    coefficients = {
        name: checks.is_coefficient(name, x)
        for name, x in (
            ("entropy_coef", entropy_coef),
            ("kl_coef", kl_coef),
            ("kl_penalty_coef", kl_penalty_coef),
            ("kl_threshold", kl_threshold),
        )
    }
    for name in ("kl_coef", "kl_penalty_coef"):
        if ref_hidden is None and (isinstance(coefficients[name], Tensor) or coefficients[name] != 0):
            raise ValueError(f"{name} is {coefficients[name]} without ref_hidden; it must be 0, or ref_hidden given")
    return _call(
        "linear_policy_loss",
        backend,
        hidden,
        weight,
        tokens,
        old_logprob,
        advantage,
        loss_weight=loss_weight,
        clip_low=checks.is_number("clip_low", clip_low, 0),
        clip_high=checks.is_number("clip_high", clip_high, 0),
        mask=mask,
        batch_invariant=batch_invariant,
        **coefficients,
        **head,
    )


def _call(function: str, backend: str | None, like: Tensor, *arguments: Any, **options: Any) -> Any:
    """By the backend asked for, or the best one for a first argument like this."""
    name = chosen_backend(backend, like, *arguments, *options.values())
    if function != "soft_min" and (name != "reference" or options.get("process_group") is not None):
        every = (like, *arguments, *options.values())
        derivatives.refuse_transforms(name, every, has_gradient=function != "soft_min_gae")
    if name != "reference":
        return getattr(library, function)(like, *arguments, **options, backend=name)
    with torch.autocast(like.device.type, enabled=False):  # it would round logits on their way to the exponent
        return getattr(reference, function)(like, *arguments, **options)


def chosen_backend(backend: str | None, like: Tensor, *others: object) -> str:
    wide = any(_is_wide(x) for x in (like, *others))
    name = backend or os.environ.get("SAFE_KERNELS_BACKEND") or ("torch" if wide else _best(like))
    if name not in _BACKENDS:
        origin = "backend" if backend else "the environment variable SAFE_KERNELS_BACKEND"
        raise ValueError(f"{origin} is {name!r}; it must be one of {', '.join(map(repr, _BACKENDS))}")
    if name == "triton" and like.device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        raise ValueError(
            "backend 'triton' needs tensors on a GPU, got CPU tensors; use backend 'torch', or set TRITON_INTERPRET=1 "
            "before Triton is imported to run the kernels in its interpreter"
        )
    if name == "triton" and wide:
        raise ValueError("backend 'triton' computes in float32; float64 inputs need backend 'torch' or 'reference'")
    return name


def _best(like: Tensor) -> str:
    """Triton on GPUs; PyTorch on CPUs, and where Triton is not installed."""
    return "triton" if _HAS_TRITON and like.device.type in ("cuda", "xpu") else "torch"


def _is_wide(x: object) -> bool:
    """A scalar does not count."""
    return isinstance(x, Tensor) and x.dtype == torch.float64 and x.dim() > 0
