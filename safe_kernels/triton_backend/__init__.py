"""The operations as Triton kernels: float32 inside, whatever the inputs; float64 belongs to the other backends."""

from .linear import linear_gradients, linear_statistics, sweep
from .logits import logits_gradient, logits_statistics
from .values import soft_min_gae

__all__ = [
    "linear_gradients",
    "linear_statistics",
    "logits_gradient",
    "logits_statistics",
    "soft_min_gae",
    "sweep",
]
