"""The engine that `accelerate launch` asked for, and where a model waits for it."""

from __future__ import annotations

from typing import Any

import torch

from safe_train.config import SafeConfig
from safe_train.engines import sharding, zero
from safe_train.engines.engine import Engine
from safe_train.models.policy import Policy


def make_engine(policy: Policy, device: torch.device, args: SafeConfig) -> Engine:
    return {None: Engine, 2: zero.Zero2Engine, 3: zero.Zero3Engine}[zero.stage()](policy, device, args)


def cuts_weights() -> bool:
    """Whether each process will hold a part of the weights: FSDP2 and ZeRO-3."""
    return sharding.settings() is not None or zero.stage() == 3


def place_model(model: Any, device: torch.device) -> Any:
    """The model on its device. One that will be cut up waits on the CPU, and moves part by part."""
    return model if cuts_weights() else model.to(device)
