"""What is random in a model is off, and what user code left switched in PyTorch is as the run needs it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from safe_train.config import ConfigError

RANDOM = ("drop", "jitter", "noise")  # parts of the names of rates: residual_dropout, layerdrop, router_jitter_noise

# Rates that decide in evaluation mode, too: experts whose scores differ by less than PhiMoE's share a token's weight.
READ_IN_EVALUATION = {"phimoe": "router_jitter_noise"}


def check_torch_state() -> None:
    """Refuses switches of PyTorch that user code left on: what the run makes from here on would obey them."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    autocast = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    wrong = {
        f"torch's default dtype is {dtype}; call torch.set_default_dtype(torch.float32)": dtype != torch.float32,
        f"torch's default device is {device}; call torch.set_default_device(None)": device.type != "cpu",
        "gradients are switched off; leave torch.no_grad(), or call torch.set_grad_enabled(True)": not (
            torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        ),
        f"autocast is on for {' and '.join(autocast)}; leave torch.autocast, and see dtype": bool(autocast),
    }
    for message, found in wrong.items():
        if found:
            raise ConfigError(f"{message}, before the trainer is made and while it trains")


def switch_off_randomness(model: nn.Module) -> None:
    """Dropout would make the update's policy differ from the one that was sampled and scored.

    Models keep its rates in their modules and, to be read at each forward, in their configs.
    """
    configs = {id(config): config for module in model.modules() for config in configs_of(module)}
    kept = {READ_IN_EVALUATION.get(config.model_type) for config in configs.values()}
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
    for holder in (*model.modules(), *configs.values()):
        for name, value in list(vars(holder).items()):
            if isinstance(value, float) and name not in kept and any(part in name for part in RANDOM):
                setattr(holder, name, 0.0)


def configs_of(module: nn.Module) -> list[Any]:
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "sub_configs"):
        return []
    return [config, *(getattr(config, name) for name in config.sub_configs if getattr(config, name, None) is not None)]
