"""Checks of arguments at the call: which argument, what it was, what it must be.

What would need the device's answer (ids, NaN, values of tensors) is checked only with SAFE_KERNELS_DEBUG=1.
"""

import math
import os
import sys
from numbers import Real

import torch
from torch import Tensor


def debugging() -> bool:
    return os.environ.get("SAFE_KERNELS_DEBUG", "0") not in ("", "0")


def is_floating(name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {type(x).__name__}; it must be a tensor")
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}; it must be a floating dtype")
    return x


def has_shape(name: str, x: Tensor, shape, why: str):
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {tuple(shape)}, {why}")


def is_on(name: str, x: Tensor, device: torch.device):
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}; it must be on {device}, with the other arguments")


def are_tokens(tokens: object, leading: torch.Size, device: torch.device, source: str):
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens is {type(tokens).__name__}; it must be a tensor of ids")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"tokens has dtype {tokens.dtype}; it must be torch.int64 or torch.int32")
    has_shape("tokens", tokens, leading, f"the leading shape of {source}")
    is_on("tokens", tokens, device)


def is_mask(mask: object, tokens: Tensor):
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask is {kind}; it must be a torch.bool tensor, True where a token counts")
    has_shape("mask", mask, tokens.shape, "one entry a token")
    is_on("mask", mask, tokens.device)


def per_token(tokens: Tensor, **tensors):
    """Floating tensors with one entry a token; None passes."""
    for name, x in tensors.items():
        if x is not None:
            has_shape(name, is_floating(name, x), tokens.shape, "one entry a token")
            is_on(name, x, tokens.device)


def is_temperature(temperature: object, tokens: Tensor, mask: Tensor | None) -> float | Tensor:
    """As a float, or a tensor with one entry a token."""
    if not isinstance(temperature, Tensor):
        return is_positive("temperature", temperature)
    if temperature.dim() == 0:
        temperature = temperature.expand(tokens.shape)
    per_token(tokens, temperature=temperature)
    if debugging():
        live = temperature if mask is None else temperature[mask]
        if not bool((live > 0).all()):
            raise ValueError(f"temperature has a minimum of {live.min().item()}; it must be > 0 for every live token")
    return temperature.detach()


def is_number(name: str, x: object, low: float = -math.inf, high: float = math.inf) -> float:
    if isinstance(x, bool) or not isinstance(x, Real):
        raise TypeError(f"{name} is {type(x).__name__}; it must be a number")
    if not (math.isfinite(x) and low <= x <= high):
        allowed = "finite" if low == -math.inf else f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
        raise ValueError(f"{name} is {x}; it must be {allowed}")
    return float(x)


def is_positive(name: str, x: object) -> float:
    if is_number(name, x) <= 0:
        raise ValueError(f"{name} is {x}; it must be > 0")
    return float(x)  # type: ignore[arg-type]


def is_coefficient(name: str, x: object) -> float | Tensor:
    """A number, or a 0-dim tensor that nobody asks for its value."""
    if not isinstance(x, Tensor):
        return is_number(name, x)
    if x.dim() != 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be a number or a 0-dim tensor")
    return x.detach()


def is_head(hidden: Tensor, weight: object, bias: object, prefix: str = ""):
    """hidden [..., H], weight [V, H], bias [V] or None."""
    _is_whole(f"{prefix}weight", weight)
    is_floating(f"{prefix}weight", weight)
    assert isinstance(weight, Tensor)
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{prefix}weight has shape {tuple(weight.shape)}; it must be (V, {hidden.shape[-1]}), "
            f"the last axis that of {prefix}hidden"
        )
    is_on(f"{prefix}weight", weight, hidden.device)
    if bias is not None:
        has_shape(f"{prefix}bias", is_floating(f"{prefix}bias", bias), weight.shape[:1], "one entry a vocabulary id")


def _is_whole(name: str, weight: object):
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(weight, distributed.DTensor):
        raise ValueError(
            f"{name} is a DTensor; it must be the whole weight. A shard of it holds part of the vocabulary while each "
            "rank of FSDP holds other tokens: gather it first (weight.full_tensor(), or call inside the module's forward)"
        )
    if isinstance(weight, Tensor) and weight.numel() == 0:
        raise ValueError(
            f"{name} is empty, shape {tuple(weight.shape)}; it must be the whole weight. An empty tensor is what FSDP "
            "and ZeRO-3 leave of a sharded one outside its module's forward: gather it first"
        )


def does_not_overlap(name: str, x: Tensor):
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride <= reach:
            raise ValueError(
                f"{name} has strides {x.stride()} for shape {tuple(x.shape)}: elements share memory; "
                "inplace_backward=True needs each to have its own"
            )
        reach += stride * (size - 1)


def is_time(tokens_like: Tensor, cu_seqlens: object, bootstrap: object = None):
    """Time is the last axis, or packed in one axis with cu_seqlens int32 [B + 1]."""
    sequences = tokens_like.shape[:-1]
    if tokens_like.dim() == 0:
        raise ValueError("v1 has no axes; its last axis must be time")
    if cu_seqlens is not None:
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
            kind = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
            raise TypeError(f"cu_seqlens is {kind}; it must be a torch.int32 tensor")
        if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or tokens_like.dim() != 1:
            raise ValueError(
                f"cu_seqlens has shape {tuple(cu_seqlens.shape)} and tokens {tuple(tokens_like.shape)}; "
                "it must be (B + 1,) with B >= 1, and tokens packed in one axis"
            )
        is_on("cu_seqlens", cu_seqlens, tokens_like.device)
        if debugging():
            bounds = cu_seqlens.tolist()
            if bounds[0] != 0 or bounds[-1] != len(tokens_like) or bounds != sorted(bounds):
                raise ValueError(f"cu_seqlens is {bounds}; it must rise from 0 to {len(tokens_like)}")
        sequences = torch.Size([len(cu_seqlens) - 1])
    if bootstrap is not None:
        has_shape("bootstrap", is_floating("bootstrap", bootstrap), sequences, "one entry a sequence")
        is_on("bootstrap", bootstrap, tokens_like.device)


def debug_values(tokens: Tensor, vocabulary: int, mask: Tensor | None, **tensors):
    """With SAFE_KERNELS_DEBUG=1: live ids inside the vocabulary, and no NaN in the rows of live tokens."""
    if not debugging():
        return
    live = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    outside = live & ((tokens < 0) | (tokens >= vocabulary))
    if outside.any():
        raise ValueError(f"tokens has the id {tokens[outside][0].item()}; it must be in [0, {vocabulary}) or masked")
    for name, x in tensors.items():
        if x is not None and torch.isnan(x[live]).any():
            raise ValueError(f"{name} has NaN in the row of a live token; it must have none")
