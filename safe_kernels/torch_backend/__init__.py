"""The operations in memory-lean PyTorch: any device, rows in tiles."""

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
