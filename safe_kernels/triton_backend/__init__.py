"""The operations as Triton kernels: float32 inside, whatever the inputs; float64 belongs to the other backends."""

from ..torch_backend.values import soft_min, terms_of
from .linear import linear_policy_loss, linear_token_stats
from .logits import token_stats
from .values import soft_min_gae

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
