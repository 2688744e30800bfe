"""FSDP2: the policy's weights cut over the processes, and gathered layer by layer where they are needed.

The embeddings, the final norm and the head, tied or not, are the root's: they stay gathered from a forward to the end
of its backward, so the kernels see the whole head, and its gradient is summed and cut again with the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from safe_train import parallel
from safe_train.config import ConfigError, SafeConfig
from safe_train.data.batches import TokenBatch

if TYPE_CHECKING:
    from safe_train.models.policy import Policy


def settings() -> FullyShardedDataParallelPlugin | None:
    """What `accelerate launch` was told about FSDP, if it shards here."""
    if parallel.size() == 1 or not parallel.flag("ACCELERATE_USE_FSDP"):
        return None
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ConfigError(f"fsdp_version of the accelerate config must be 2, got {plugin.fsdp_version}")
    refused = {
        "fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_cpu_ram_efficient_loading": plugin.cpu_ram_efficient_loading,
        "fsdp_activation_checkpointing": plugin.activation_checkpointing,
    }
    for name, given in refused.items():
        if given:
            raise ConfigError(f"{name} of the accelerate config must be false (see gradient_checkpointing for memory)")
    return plugin


def precision(device: torch.device, dtype: torch.dtype, args: SafeConfig) -> MixedPrecisionPolicy:
    """What FSDP computes in: float32 weights are gathered in bfloat16 on a GPU, unless `dtype` asks for float32.

    The shards, the sums of gradients over processes and micro-batches, and the optimizer stay float32.
    """
    if device.type == "cuda" and dtype == torch.float32 and args.dtype == "auto":
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return MixedPrecisionPolicy()


def compute_dtype(device: torch.device, dtype: torch.dtype, args: SafeConfig) -> torch.dtype:
    """What the forward of a model with weights of `dtype` will run in."""
    return dtype if settings() is None else precision(device, dtype, args).param_dtype or dtype


def shard(policy: Policy, device: torch.device, args: SafeConfig) -> None:
    """Shards the policy, and its frozen reference with it, if accelerate is set to FSDP."""
    plugin = settings()
    if plugin is None:
        return
    mesh = init_device_mesh(device.type, (parallel.size(),))
    if policy.frozen_copies:
        policy.add_module("frozen", policy.frozen_copies[0])
    mixed = precision(device, policy.causal_lm.dtype, args)
    for layer in layers(policy):
        fully_shard(layer, mesh=mesh, reshard_after_forward=plugin.reshard_after_forward, mp_policy=mixed)
    fully_shard(policy, mesh=mesh, reshard_after_forward=False, mp_policy=mixed)
    register_fsdp_forward_method(policy, "reference_states")
    for part in parts(policy):
        # Sums, not means: the loss is normalised by the tokens of all processes already.
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    policy.causal_lm._can_compile_fullgraph = False  # FSDP's hooks are not for the compiler
    with torch.no_grad():  # the first forward decides who is the root
        policy(TokenBatch.pack([[0]], [[]]).to(device))
    reshard(policy)


def layers(policy: Policy) -> list[nn.Module]:
    names = set(policy.causal_lm._no_split_modules or ())
    found = [module for module in policy.modules() if type(module).__name__ in names]
    if not found:
        raise ConfigError(f"FSDP finds no layers in {type(policy.causal_lm).__name__}: transformers names none for it")
    return found


def parts(module: nn.Module) -> list[FSDPModule]:
    """The parts that are gathered together: the root's own weights, and each layer's. None without FSDP."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def reshard(policy: Policy) -> None:
    """Frees what a forward without backward left gathered: it would not see a change of the weights."""
    for part in parts(policy):
        part.reshard()


@contextmanager
def gathered(policy: Policy) -> Iterator[None]:
    """The whole policy on every process, for generation: one exchange instead of one a layer and token."""
    plugin, root, inner = settings(), parts(policy)[:1], parts(policy.model)
    for part in inner:
        part.set_reshard_after_forward(False, recurse=False)
    for part in (*root, *inner):
        part.unshard()
    try:
        yield
    finally:
        for part in inner:
            part.set_reshard_after_forward(plugin is not None and plugin.reshard_after_forward, recurse=False)
        for part in (*root, *inner):
            part.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or gathered from its shards: on the CPU of rank 0, and empty elsewhere."""
    return parallel.cpu_on_main(tensor.full_tensor()) if isinstance(tensor, DTensor) else tensor


def unsharded(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those whose gradients FSDP does not sum."""
    return [parameter for parameter in parameters if not isinstance(parameter, DTensor)]


def number(value: Tensor) -> Tensor:
    """A 0-dim result about sharded tensors, on every process."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def shard_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The whole tensor, which every process has, cut as the parameter of its shape is."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(
        tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
