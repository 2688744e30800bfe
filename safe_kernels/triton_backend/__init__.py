"""The operations as Triton kernels: float32 inside, whatever the inputs; float64 belongs to the other backends.

`dispatch.Backend` says what each is.
"""

from .divergences import linear_divergence, logits_divergence, logits_divergence_gradient
from .linear import kept_rows, linear_gradients, linear_loss, linear_statistics, matrix_product
from .logits import logits_gradient, logits_statistics
from .values import soft_min_gae, value_terms

__all__ = [
    "kept_rows",
    "linear_divergence",
    "linear_gradients",
    "linear_loss",
    "linear_statistics",
    "logits_divergence",
    "logits_divergence_gradient",
    "logits_gradient",
    "logits_statistics",
    "matrix_product",
    "soft_min_gae",
    "value_terms",
]
