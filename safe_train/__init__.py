"""Train language models with SAFE, PPO, GRPO or CISPO on the fused losses of `safe_kernels`."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safe_train.config import SafeConfig
    from safe_train.trainer import SafeTrainer

__all__ = ["SafeConfig", "SafeTrainer"]


def __getattr__(name: str) -> Any:
    """Loads what is asked for: `safe-train config` need not wait for PyTorch and transformers."""
    homes = {"SafeConfig": "safe_train.config", "SafeTrainer": "safe_train.trainer"}
    if name not in homes:
        raise AttributeError(f"module 'safe_train' has no attribute {name!r}")
    return getattr(importlib.import_module(homes[name]), name)
