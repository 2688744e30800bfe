"""What is random in a model is off, and what user code left switched in PyTorch is as the run needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from safe_train.config import ConfigError
from safe_train.data.batches import TokenBatch
from safe_train.engines import sharding
from safe_train.randomness import python_generators, seeded, torch_generators

if TYPE_CHECKING:
    from safe_train.models.policy import Policy

RANDOM = ("drop", "jitter", "noise")  # parts of the names of rates: residual_dropout, layerdrop, router_jitter_noise

# Rates that decide in evaluation mode, too: experts whose scores differ by less than PhiMoE's share a token's weight.
READ_IN_EVALUATION = {"phimoe": "router_jitter_noise"}

FORWARDS = 32


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


@torch.no_grad()
def check_deterministic(policy: Policy, device: torch.device) -> None:
    """Refuses a model whose forward, in the mode that the update runs it in, is random.

    On a CPU the bits tell; some sums of a GPU have no fixed order. A model that draws random numbers is tried more
    often: it may leave out a layer once in ten times, or multiply by 1.
    """
    vocabulary = policy.causal_lm.config.get_text_config().vocab_size
    batch = TokenBatch.pack([[i % vocabulary for i in range(8)]], [[1, 0]]).to(device)
    with seeded(0):
        before, numbers = torch_generators(), python_generators()
        first_LH = policy(batch)
        after = torch_generators()
        is_same = all(torch.equal(before[name], after[name]) for name in before)
        is_drawing = not is_same or numbers != python_generators()
        gap = max((policy(batch) - first_LH).abs().max().item() for _ in range(FORWARDS if is_drawing else 1))
    sharding.reshard(policy)
    rounding = 0.0 if device.type == "cpu" else 8 * torch.finfo(first_LH.dtype).eps * first_LH.abs().max().item()
    if not gap <= rounding:
        raise ConfigError(
            f"two forwards of {type(policy.causal_lm).__name__} on the same tokens differ by {gap:.3g}: something in "
            "it is random in training, and is named neither dropout, jitter nor noise; switch it off in its config, "
            "or set gradient_checkpointing to false, which runs it in evaluation mode"
        )
