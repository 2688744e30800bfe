"""The operations in memory-lean PyTorch: any device, rows in tiles, backward passes of their own."""

from .linear import linear_token_stats
from .logits import token_stats
from .policy_loss import linear_policy_loss
from .values import soft_min, soft_min_gae, terms_of

safe_terms, linear_safe_terms = terms_of(token_stats), terms_of(linear_token_stats)

__all__ = [
    "linear_policy_loss",
    "linear_safe_terms",
    "linear_token_stats",
    "safe_terms",
    "soft_min",
    "soft_min_gae",
    "token_stats",
]
