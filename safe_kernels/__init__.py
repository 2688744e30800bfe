"""Per-token statistics of a language-model policy and pessimistic value targets, forward and backward."""

from .ops import (
    linear_policy_loss,
    linear_safe_terms,
    linear_token_stats,
    safe_terms,
    soft_min,
    soft_min_gae,
    token_stats,
)
from .results import PolicyLoss, SafeTerms, TokenStats, ValueTargets

__all__ = [
    "PolicyLoss",
    "SafeTerms",
    "TokenStats",
    "ValueTargets",
    "linear_policy_loss",
    "linear_safe_terms",
    "linear_token_stats",
    "safe_terms",
    "soft_min",
    "soft_min_gae",
    "token_stats",
]
