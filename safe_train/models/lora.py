"""Which layers of a model get LoRA."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from safe_kernels.integrations.transformers import head_module, silent_modules, text_config
from safe_train.config import ConfigError, SafeConfig
from safe_train.models.attention import as_published


def lora_config(model: Any, args: SafeConfig) -> Any:
    """LoRA on the linear layers of the language model, but not on its head."""
    import peft
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layers

    with as_published(model):
        silent = tuple(f"{name}." for name in silent_modules(model))
    try:
        head = head_module(model)
    except ValueError as error:
        raise ConfigError(f"{error}; train another model") from None
    modules = dict(model.named_modules())
    linear = {
        name: m
        for name, m in modules.items()
        if (isinstance(m, Conv1D) or is_linear(m)) and m is not head and not f"{name}.".startswith(silent)
    }
    names = {last(name) for name in linear} - read_without_a_call(model)
    if not names:
        raise ConfigError(f"{type(model).__name__} has no linear layer that LoRA could be put on; set lora_r to 0")
    namesakes = [name for name in modules if last(name) in names and name not in linear]
    layers = None
    if args.lora_last_layers is not None:
        depth = text_config(model).num_hidden_layers
        layers = list(range(max(0, depth - args.lora_last_layers), depth))
    return peft.LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha or args.lora_r,
        lora_dropout=0.0,
        target_modules=sorted(names) if args.lora_target_modules is None else chosen_layers(args, names),
        exclude_modules=namesakes or None,
        layers_to_transform=layers,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in linear.values()),
        task_type="CAUSAL_LM",
    )


@torch.no_grad()
def is_linear(module: nn.Module) -> bool:
    """Whether it maps rows to rows. A class of Linear may not: a mixture's router, a layer in groups (DeepSeek-V4)."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return isinstance(module, nn.Linear)
    try:
        dtype = module.weight.dtype if module.weight.is_floating_point() else None  # else it is quantised
        rows = module(torch.zeros(1, module.in_features, dtype=dtype, device=module.weight.device))
    except RuntimeError:  # of another shape
        return False
    return isinstance(rows, Tensor) and rows.shape == (1, module.out_features)


def last(name: str) -> str:
    return name.rpartition(".")[2]


def read_without_a_call(model: nn.Module) -> set[str]:
    """Layers of Mamba whose kernels read the weight, past an adapter that is put on the layer. peft refuses them."""
    return {"out_proj"} if any(hasattr(m, "conv1d") and hasattr(m, "out_proj") for m in model.modules()) else set()


def chosen_layers(args: SafeConfig, names: set[str]) -> list[str]:
    chosen = sorted(set(args.lora_target_modules or ()))
    if absent := [name for name in chosen if name not in names]:
        raise ConfigError(
            f"lora_target_modules must be names of the model's linear layers ({', '.join(sorted(names))}), got "
            f"{absent[0]!r}"
        )
    return chosen
