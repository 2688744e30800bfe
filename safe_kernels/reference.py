"""Every public function in plain PyTorch: the definition, the oracle of the tests and the eager baseline.

The signatures are those of `safe_kernels` without `backend`. Autograd does every gradient except that of a product,
nothing is chunked, and any floating dtype works: float64 inputs are computed in float64, all others in float32.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import vocab_parallel
from .formulas import is_zero, soft_min
from .inputs import without_masked
from .kept_sets import kept_mask
from .results import DistillationLoss, PolicyLoss, SafeTerms, TokenStats, ValueTargets


def token_stats(
    logits,
    tokens,
    *,
    ref_logits=None,
    with_ref_kl=False,
    temperature=1.0,
    mask=None,
    kept=None,
    inplace_backward=False,
    process_group=None,
) -> TokenStats:
    """`inplace_backward` is ignored: the reference never overwrites the logits."""
    if kept is not None:
        is_kept = kept_mask(kept, logits.shape[-1]).view(logits.shape)
        logits, ref_logits = (None if x is None else x.masked_fill(~is_kept, -math.inf) for x in (logits, ref_logits))
        tokens = _inside(tokens, is_kept)
    if process_group is not None:
        logits = _Whole.apply(logits, process_group)
        ref_logits = None if ref_logits is None else _Whole.apply(ref_logits.detach(), process_group)
    logp = _log_softmax(logits, temperature, mask)
    p = logp.exp()
    # A probability of 0 contributes 0, whatever its factor is.
    entropy = -(p * logp.masked_fill(p == 0, 0)).sum(-1)
    logprob = _at_token(logp, tokens)
    if ref_logits is None:
        return TokenStats(_live(logprob, mask), _live(entropy, mask), None, None)
    logq = _log_softmax(ref_logits.detach(), temperature, mask)
    found = [logprob, entropy, _at_token(logq, tokens), _kl(p, logp, logq)]
    if with_ref_kl:
        found.append(_kl(logq.exp(), logq, logp))
    return TokenStats(*(_live(x, mask) for x in found))


def linear_token_stats(
    hidden,
    weight,
    tokens,
    *,
    bias=None,
    ref_hidden=None,
    ref_weight=None,
    ref_bias=None,
    with_ref_kl=False,
    temperature=1.0,
    softcap=None,
    logit_scale=1.0,
    mask=None,
    kept=None,
    batch_invariant=False,
    max_kept_bytes=None,  # autograd keeps everything
    process_group=None,
) -> TokenStats:
    if batch_invariant:
        raise ValueError(
            "batch_invariant=True is not offered by backend='reference', whose matmul sees the whole batch"
        )

    def logits(hidden, weight, bias):
        hidden = hidden if mask is None else hidden.where(mask[..., None], 0)
        hidden = hidden if process_group is None else _Shared.apply(_compute(hidden), process_group)
        return _logits(hidden, weight, bias, softcap, logit_scale)

    ref_logits = None
    if ref_hidden is not None:
        shared = ref_weight is None
        ref_bias = bias if shared and ref_bias is None else ref_bias
        with torch.no_grad():
            ref_logits = logits(ref_hidden, weight if shared else ref_weight, ref_bias)
    options = {"with_ref_kl": with_ref_kl, "temperature": temperature, "mask": mask, "kept": kept}
    return token_stats(
        logits(hidden, weight, bias), tokens, ref_logits=ref_logits, process_group=process_group, **options
    )


def safe_terms(
    logits,
    tokens,
    v1,
    v2,
    rewards,
    *,
    kl_threshold,
    alpha,
    gamma=1.0,
    target_v1=None,
    target_v2=None,
    cu_seqlens=None,
    mask=None,
    **options,
) -> SafeTerms:
    stats = token_stats(logits, tokens, mask=mask, **options)
    return with_values(stats, v1, v2, rewards, kl_threshold, alpha, gamma, target_v1, target_v2, cu_seqlens, mask)


def linear_safe_terms(
    hidden,
    weight,
    tokens,
    v1,
    v2,
    rewards,
    *,
    kl_threshold,
    alpha,
    gamma=1.0,
    target_v1=None,
    target_v2=None,
    cu_seqlens=None,
    mask=None,
    **options,
) -> SafeTerms:
    stats = linear_token_stats(hidden, weight, tokens, mask=mask, **options)
    return with_values(stats, v1, v2, rewards, kl_threshold, alpha, gamma, target_v1, target_v2, cu_seqlens, mask)


@torch.no_grad()
def soft_min_gae(
    v1, v2, rewards, mask, *, gamma=1.0, lam=0.95, alpha=0.3, cu_seqlens=None, bootstrap=None
) -> ValueTargets:
    value, reward = soft_min(v1, v2, alpha), _compute(rewards)
    advantage = torch.zeros_like(value)
    for sequence, steps in enumerate(_sequences(value, mask, cu_seqlens)):
        next_value = 0.0 if bootstrap is None else bootstrap.flatten()[sequence]
        next_advantage = 0.0
        for t in reversed(steps):
            delta = reward[t] + gamma * next_value - value[t]
            advantage[t] = next_advantage = delta + gamma * lam * next_advantage
            next_value = value[t]
    return ValueTargets(*(without_masked(x, mask) for x in (value, advantage, advantage + value)))


def linear_policy_loss(
    hidden,
    weight,
    tokens,
    old_logprob,
    advantage,
    *,
    loss_weight=None,
    clip_low=0.2,
    clip_high=0.2,
    entropy_coef=0.0,
    kl_coef=0.0,
    kl_penalty_coef=0.0,
    kl_threshold=0.0,
    ref_kl_coef=0.0,
    mask=None,
    **head,
) -> PolicyLoss:
    stats = linear_token_stats(hidden, weight, tokens, mask=mask, with_ref_kl=not is_zero(ref_kl_coef), **head)
    old_logprob, advantage = (without_masked(_compute(x.detach()), mask) for x in (old_logprob, advantage))
    live = torch.ones_like(old_logprob) if mask is None else mask.to(old_logprob.dtype)
    share = live / live.sum().clamp(min=1)

    ratio = (stats.logprob - old_logprob).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    token_loss = -torch.minimum(ratio * advantage, clipped) - entropy_coef * stats.entropy
    if not is_zero(kl_coef):
        token_loss = token_loss + kl_coef * stats.kl
    if not is_zero(kl_penalty_coef):
        token_loss = token_loss + kl_penalty_coef * (stats.kl - kl_threshold).relu() ** 2
    if not is_zero(ref_kl_coef):
        token_loss = token_loss + ref_kl_coef * stats.ref_kl
    weights = share if loss_weight is None else without_masked(_compute(loss_weight.detach()), mask)
    loss = (weights * without_masked(token_loss, mask)).sum()
    clip_fraction = (share * (clipped < ratio * advantage)).sum()
    found = (*stats[:4], clip_fraction, stats.ref_kl)
    return PolicyLoss._make([loss, *(None if x is None else x.detach() for x in found)])


def distillation_loss(
    logits,
    teacher_logits,
    *,
    divergence="reverse_kl",
    beta=0.5,
    temperature=1.0,
    teacher_temperature=None,
    weights=None,
    mask=None,
    reduction="mean",
    tokens=None,
    cross_entropy_coef=0.0,
    shared_vocabulary=None,
    process_group=None,
) -> DistillationLoss:
    logits, teacher_logits = (x[..., :shared_vocabulary] for x in (logits, teacher_logits.detach()))
    logp = _log_softmax(logits, temperature, mask)
    logq = _log_softmax(teacher_logits, temperature if teacher_temperature is None else teacher_temperature, mask)
    logq = logq.to(logp.dtype)
    p = logp.exp()
    entropy = -(p * logp.masked_fill(p == 0, 0)).sum(-1)
    found = _divergence(logp, logq, divergence, beta)
    loss, logprob = found, None
    if tokens is not None:
        logprob = _at_token(logp, tokens)
        loss = found if is_zero(cross_entropy_coef) else found - cross_entropy_coef * logprob
    loss = without_masked(loss if weights is None else loss * _compute(weights.detach()), mask)
    if reduction != "none":
        live = loss.numel() if mask is None else mask.sum()
        loss = loss.sum() if reduction == "sum" else loss.sum() / max(live, 1)
    results = [None if x is None else without_masked(x.detach(), mask) for x in (found, entropy, logprob)]
    return DistillationLoss._make([loss, *results])


def linear_distillation_loss(
    hidden,
    weight,
    teacher_hidden,
    teacher_weight,
    *,
    bias=None,
    softcap=None,
    logit_scale=1.0,
    teacher_bias=None,
    teacher_softcap=None,
    teacher_logit_scale=1.0,
    mask=None,
    **options,
) -> DistillationLoss:
    if mask is not None:
        hidden, teacher_hidden = (x.where(mask[..., None], 0) for x in (hidden, teacher_hidden))
    with torch.no_grad():
        teacher = _logits(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
    return distillation_loss(_logits(hidden, weight, bias, softcap, logit_scale), teacher, mask=mask, **options)


def _divergence(logp, logq, name, beta):
    """Of the student p from the teacher q. "jsd" with beta 0 and 1 is the forward and the reverse KL."""
    if name == "tv":
        return (logp.exp() - logq.exp()).abs().sum(-1) / 2
    if name == "forward_kl" or (name == "jsd" and beta == 0):
        return _kl(logq.exp(), logq, logp)
    if name == "reverse_kl" or (name == "jsd" and beta == 1):
        return _kl(logp.exp(), logp, logq)
    logp, logq = (x.clamp(min=torch.finfo(x.dtype).min / 4) for x in (logp, logq))  # -inf has no derivative
    logm = torch.logaddexp(logp + math.log(1 - beta), logq + math.log(beta))
    return beta * (logq.exp() * (logq - logm)).sum(-1) + (1 - beta) * (logp.exp() * (logp - logm)).sum(-1)


def _kl(p, logp, logq):
    """KL(p || q); inf where q is 0 and p is not, even if p is too small for its dtype. The gradient in q is finite."""
    kl = (p * (logp - logq).masked_fill(p == 0, 0)).sum(-1)
    outside = ((logq == -math.inf) & (logp > -math.inf)).any(-1)
    return kl + torch.where(outside & (kl < math.inf), math.inf, 0)


def _logits(hidden, weight, bias, softcap, logit_scale):
    u = _product(hidden, weight)
    u = (u if bias is None else u + bias.to(u.dtype)) * logit_scale
    return u if softcap is None else softcap * torch.tanh(u / softcap)


def _compute(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _product(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden @ weight.T in float32 or float64. On NVIDIA's GPUs 16-bit factors use tensor cores, as in any trainer."""
    low_precision = hidden.dtype == weight.dtype and hidden.dtype in (torch.float16, torch.bfloat16)
    if low_precision and hidden.is_cuda and torch.version.hip is None:
        return _TensorCoreProduct.apply(hidden, weight)
    hidden = _compute(hidden)
    return hidden @ weight.to(hidden.dtype).T


def _log_softmax(logits, temperature, mask):
    if isinstance(temperature, Tensor):
        temperature = _compute(temperature if mask is None else temperature.where(mask, 1))[..., None]
    logits = logits if mask is None else logits.where(mask[..., None], 0)
    return torch.log_softmax(_compute(logits) / temperature, dim=-1)


def _live(x, mask):
    """0 where masked; x may have several numbers a token."""
    return without_masked(x, mask if mask is None or x.dim() == mask.dim() else mask[..., None])


def _inside(tokens, is_kept):
    """Of those that are in the vocabulary, but not of their set, V: it is in neither."""
    tokens, vocabulary = tokens.long(), is_kept.shape[-1]
    index = tokens.clamp(0, vocabulary - 1)
    index = index if tokens.dim() == is_kept.dim() else index[..., None]
    is_inside = is_kept.gather(-1, index).view_as(tokens)
    return tokens.where(is_inside | (tokens < 0), vocabulary)


def _at_token(logp, tokens):
    """log p of the token, or of K of them; NaN, and a NaN gradient, for an id outside the vocabulary. Of K ids -1 is
    none: -inf, without gradient.
    """
    tokens = tokens.long()
    index = tokens.clamp(0, logp.shape[-1] - 1)
    known = torch.where(index == tokens, 1.0, math.nan).to(logp)
    if tokens.dim() < logp.dim():
        return logp.gather(-1, index[..., None]).squeeze(-1) * known
    return torch.where(tokens == -1, -math.inf, logp.gather(-1, index) * known.masked_fill(tokens == -1, 1))


def with_values(stats, v1, v2, rewards, kl_threshold, alpha, gamma, target_v1, target_v2, cu_seqlens, mask):
    penalty = (stats.kl - kl_threshold).relu() ** 2
    dtype = stats.logprob.dtype
    value = soft_min(without_masked(v1, mask).to(dtype), without_masked(v2, mask).to(dtype), alpha)
    with torch.no_grad():
        targets = (v1 if target_v1 is None else target_v1, v2 if target_v2 is None else target_v2)
        target = soft_min(targets[0].to(dtype), targets[1].to(dtype), alpha)
        value_target = torch.zeros_like(target) + rewards.to(dtype)
        for steps in _sequences(target, mask, cu_seqlens):
            for t, after in zip(steps, steps[1:], strict=False):
                value_target[t] += gamma * target[after]
    return SafeTerms(*stats[:4], *(without_masked(x, mask) for x in (penalty, value, value_target)))


def _sequences(x, mask, cu_seqlens) -> list[list[tuple[int, ...]]]:
    """Indices of the live tokens of each sequence, in time order."""

    def live(t: tuple[int, ...]) -> bool:
        return mask is None or bool(mask[t])

    if cu_seqlens is not None:
        bounds = cu_seqlens.tolist()
        return [[(t,) for t in range(a, b) if live((t,))] for a, b in zip(bounds, bounds[1:], strict=False)]
    rows = [tuple(row) for row in torch.ones(x.shape[:-1]).nonzero().tolist()]
    return [[(*row, t) for t in range(x.shape[-1]) if live((*row, t))] for row in rows]


class _TensorCoreProduct(torch.autograd.Function):
    """The float32 product of 16-bit factors, for which PyTorch has no derivative. Tensor cores truncate as they sum."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        rows = hidden.reshape(-1, hidden.shape[-1])
        return torch.mm(rows, weight.T, out_dtype=torch.float32).view(*hidden.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1]).to(hidden.dtype)
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = (rows @ weight).view(hidden.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = rows.T @ hidden.reshape(-1, hidden.shape[-1])
        return grad_hidden, grad_weight


class _Whole(torch.autograd.Function):
    """Logits [..., V] of the whole vocabulary from each rank's columns; all ranks have the same gradient of them."""

    @staticmethod
    def forward(ctx, columns, group):
        bounds = vocab_parallel.bounds_of(columns, columns.shape[-1], group).tolist()
        widths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
        ctx.own = slice(*bounds[group.rank() :][:2])
        padded = torch.nn.functional.pad(columns, (0, max(widths) - columns.shape[-1]))
        parts = vocab_parallel.gathered(padded, group)
        return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient[..., ctx.own], None


class _Shared(torch.autograd.Function):
    """Hidden states [..., H], the same on all ranks; their gradient sums over the ranks' columns of the logits."""

    @staticmethod
    def forward(ctx, hidden, group):
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        rows = gradient.reshape(-1, gradient.shape[-1])
        return vocab_parallel.summed(rows, ctx.group).view(gradient.shape), None
