"""Train language models with SAFE, PPO or GRPO on the fused losses of `safe_kernels`."""

from safe_train.config import SafeConfig
from safe_train.trainer import SafeTrainer

__all__ = ["SafeConfig", "SafeTrainer"]
