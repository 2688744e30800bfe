"""`truncated_divergence`: from a teacher that gives the log-probs of its best K tokens alone.

Shapes: `...` any leading shape, K ids of a token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import checks
from .dispatch import choose_backend
from .inputs import compute_dtype, without_masked

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "tv")
LEAST_TAIL = 2**-24  # of a side: what float32 cannot tell from nothing in 1 - sum


def truncated_divergence(
    logprob: Tensor,
    teacher_logprob: Tensor,
    tokens: Tensor,
    vocabulary: int,
    *,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The divergence of a student from a teacher over K + 1 outcomes: K ids, and all others as one. Equivalent to

        p = cat([logprob.exp(), 1 - logprob.exp().sum(-1, keepdim=True)], -1)       q likewise of the teacher
        {"reverse_kl": (p * (p / q).log()).sum(-1), "forward_kl": (q * (q / p).log()).sum(-1),
         "jsd": beta * (q * (q / m).log()).sum(-1) + (1 - beta) * (p * (p / m).log()).sum(-1),
         "tv": (p - q).abs().sum(-1) / 2}[divergence]                                where m = beta * q + (1 - beta) * p

    It is at most the divergence over the whole vocabulary, which it reaches with all ids, never negative, and does not
    fall as ids are added. The tail of each side counts as 2^-24 at least: in float32 that of a peaked row comes out as
    0 or below, which would make an infinite value with a NaN gradient of it. With all ids there is no tail.

    Args:
        logprob: [..., K] of the student, from `token_stats` or `linear_token_stats` with these tokens; differentiable.
        teacher_logprob: [..., K], normalised over the whole vocabulary at the student's temperature. Servers say them
            at temperature 1, whatever they sample at: then the student's must be at 1, too. Without gradient.
        tokens: [..., K] different ids; -1 is none, and its log-probs are not read.
        vocabulary: the number of ids that there are.
        divergence: "reverse_kl" is KL(student || teacher), "forward_kl" KL(teacher || student).
        beta: of "jsd", in [0, 1]; 0 and 1 are the forward and the reverse KL themselves, as in TRL.
        mask: [...] bool.

    Returns:
        [...] in nats, 0 where masked; plain PyTorch on every backend. A teacher's 0 makes the reverse KL inf, a
        student's the forward one.
    """
    checks.require_floating("logprob", logprob)
    if logprob.dim() == 0:
        raise ValueError("logprob has no axes; it must be (..., K)")
    teacher_logprob = checks.require_floating("teacher_logprob", teacher_logprob)
    checks.require_place("teacher_logprob", teacher_logprob, logprob.shape, "that of logprob", logprob.device)
    checks.require_tokens(tokens, logprob.shape, logprob.device, "logprob")
    if mask is not None:
        checks.require_mask(mask, logprob.new_empty(logprob.shape[:-1]))
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence is {divergence!r}; it must be one of {', '.join(map(repr, DIVERGENCES))}")
    beta = checks.require_number("beta", beta, 0, 1)
    if divergence == "jsd" and beta in (0, 1):
        divergence = "reverse_kl" if beta else "forward_kl"
    count = checks.require_number("vocabulary", vocabulary, 1)
    choose_backend(backend, logprob, teacher_logprob, has_gradient=None)
    if not torch.compiler.is_compiling() and (tokens.device.type == "cpu" or checks.debugging()):
        require_outcomes(tokens, teacher_logprob, count, mask)
    logp, logq = outcomes(logprob, teacher_logprob.detach(), tokens, count, mask)
    return without_masked(divergence_of(divergence, beta, logp, logq), mask)


def require_outcomes(tokens: Tensor, teacher_logprob: Tensor, vocabulary: float, mask: Tensor | None) -> None:
    """Different ids of the vocabulary, whose probabilities sum to no more than 1."""
    live = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask[..., None].expand(tokens.shape)
    tokens = tokens.long().where(live, -1)
    outside = (tokens < -1) | (tokens >= vocabulary)
    if outside.any():
        raise ValueError(f"tokens has the id {tokens[outside][0].item()}; it must be in [0, {vocabulary:g}), or -1")
    ordered = tokens.sort(-1).values
    is_again = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if is_again.any():
        raise ValueError(f"tokens has the id {ordered[..., 1:][is_again][0].item()} twice for one token; once at most")
    total = teacher_logprob.detach().exp().where(tokens >= 0, 0).sum(-1, dtype=torch.float32)
    if (total > 1.02).any():  # 16 bits keep log-probs to a hundredth
        raise ValueError(
            f"teacher_logprob has probabilities that sum to {total.max().item():.4g}; they must sum to 1 at most, as "
            "those of some ids do that are normalised over the vocabulary"
        )


def outcomes(
    logprob: Tensor, teacher_logprob: Tensor, tokens: Tensor, vocabulary: float, mask: Tensor | None
) -> list[Tensor]:
    """Log-probs [..., K + 1] of student and teacher, the tail last; -inf on both sides is no outcome."""
    is_none = tokens.long() == -1
    if mask is not None:
        is_none = is_none | ~mask[..., None]
    is_whole = (~is_none).sum(-1, keepdim=True) >= vocabulary
    sides = []
    for x in (logprob, teacher_logprob):
        logp = x.to(compute_dtype(logprob)).masked_fill(is_none, -math.inf)
        tail = (1 - logp.exp().sum(-1, keepdim=True)).clamp(min=LEAST_TAIL).log()
        sides.append(torch.cat([logp, tail.masked_fill(is_whole, -math.inf)], -1))
    return sides


def divergence_of(name: str, beta: float, logp: Tensor, logq: Tensor) -> Tensor:
    if name == "tv":
        return (logp.exp() - logq.exp()).abs().sum(-1) / 2
    if name == "jsd":
        return jsd(logp, logq, beta)
    return kl(logp, logq) if name == "reverse_kl" else kl(logq, logp)


def kl(logp: Tensor, logq: Tensor) -> Tensor:
    """sum p (log p - log q) - p + q, as p and q sum to 1: so no term is negative, and where both are close none is lost
    to rounding. 0 log 0 is 0.
    """
    p, q, is_zero = logp.exp(), logq.exp(), logp == -math.inf
    x = torch.where(is_zero, 0, logp) - logq.masked_fill(is_zero, 0)
    near = x.clamp(-1, 1)
    terms = torch.where((x.abs() < 1) & ~is_zero, p * (near + torch.expm1(-near)), p * x - p + q)
    return terms.sum(-1).clamp(min=0)


def jsd(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    is_none = (logp == -math.inf) & (logq == -math.inf)
    log_m = torch.logaddexp(
        logq.masked_fill(is_none, 0) + math.log(beta), logp.masked_fill(is_none, 0) + math.log1p(-beta)
    ).masked_fill(is_none, -math.inf)
    return beta * kl(logq, log_m) + (1 - beta) * kl(logp, log_m)
