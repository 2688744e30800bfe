"""The operations in memory-lean PyTorch: any device, rows in tiles, backward passes of their own."""

from ..results import SafeTerms
from .linear import linear_token_stats
from .logits import token_stats
from .policy_loss import linear_policy_loss
from .values import soft_min, soft_min_gae, with_values

__all__ = [
    "linear_policy_loss",
    "linear_safe_terms",
    "linear_token_stats",
    "safe_terms",
    "soft_min",
    "soft_min_gae",
    "token_stats",
]


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
