"""Checks of arguments at the call: which argument, what it was, what it must be.

What would need the device's answer (ids, NaN, values of tensors) is checked only with SAFE_KERNELS_DEBUG=1.
"""

import math
import os
import sys
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, distributed

from . import vocab_parallel


def debugging() -> bool:
    return os.environ.get("SAFE_KERNELS_DEBUG", "0") not in ("", "0")


def is_floating(name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {type(x).__name__}; it must be a tensor")
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}; it must be a floating dtype")
    return is_local(name, x)


def is_local(name: str, x: Tensor) -> Tensor:
    if _is_dtensor(x):
        raise TypeError(f"{name} is a DTensor; it must be a tensor that this rank holds: {name}.to_local()")
    return x


def has_shape(name: str, x: Tensor, shape: Sequence[int], why: str) -> None:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {tuple(shape)}, {why}")


def is_on(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}; it must be on {device}, with the other arguments")


def are_tokens(tokens: object, leading: torch.Size, device: torch.device, source: str) -> None:
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens is {type(tokens).__name__}; it must be a tensor of ids")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"tokens has dtype {tokens.dtype}; it must be torch.int64 or another integer dtype")
    has_shape("tokens", is_local("tokens", tokens), leading, f"the leading shape of {source}")
    is_on("tokens", tokens, device)


def is_mask(mask: object, tokens: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask is {kind}; it must be a torch.bool tensor, True where a token counts")
    has_shape("mask", mask, tokens.shape, "one entry a token")
    is_on("mask", mask, tokens.device)


def per_token(like: Tensor, tokens: Tensor, **tensors: Tensor) -> list[Tensor]:
    """Check floating tensors with one entry a token, and return them.

    float64, which is what numpy makes, comes back as float32 unless `like` is float64: it is the model's tensors that
    say in what dtype, and by which backend, a result is computed.
    """
    for name, x in tensors.items():
        has_shape(name, is_floating(name, x), tokens.shape, "one entry a token")
        is_on(name, x, tokens.device)
    return [no_wider(x, like) for x in tensors.values()]


def per_token_or_none(like: Tensor, tokens: Tensor, **tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else per_token(like, tokens, **{name: x})[0] for name, x in tensors.items()]


def no_wider(x: Tensor, like: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float64 and like.dtype != torch.float64 else x


def is_temperature(temperature: object, tokens: Tensor, mask: Tensor | None, like: Tensor) -> float | Tensor:
    """As a float, or a tensor with one entry a token."""
    if not isinstance(temperature, Tensor):
        return is_positive("temperature", temperature)
    if temperature.dim() == 0:
        temperature = temperature.to(torch.promote_types(like.dtype, torch.float32)).expand(tokens.shape)
    (temperature,) = per_token(like, tokens, temperature=temperature)
    if debugging():
        live = temperature if mask is None else temperature[mask]
        if not bool((live > 0).all()):
            raise ValueError(f"temperature has a minimum of {live.min().item()}; it must be > 0 for every live token")
    return temperature.detach()


def is_number(name: str, x: object, low: float = -math.inf, high: float = math.inf) -> float:
    if isinstance(x, bool) or not isinstance(x, Real):
        raise TypeError(f"{name} is {type(x).__name__}; it must be a number")
    number = float(x)
    if not (-math.inf < number < math.inf and low <= number <= high):  # which torch.compile can trace
        allowed = "finite" if low == -math.inf else f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
        raise ValueError(f"{name} is {x}; it must be {allowed}")
    return number


def is_positive(name: str, x: object) -> float:
    number = is_number(name, x)
    if number <= 0:
        raise ValueError(f"{name} is {x}; it must be > 0")
    return number


def is_coefficient(name: str, x: object) -> float | Tensor:
    """A number, or a 0-dim tensor that nobody asks for its value."""
    if not isinstance(x, Tensor):
        return is_number(name, x)
    if x.dim() != 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be a number or a 0-dim tensor")
    return x.detach()


def parts_of(process_group, axis: int = 0, **tensors: Tensor | None) -> list[Any]:
    """What this rank holds of tensors that have the vocabulary along `axis`, DTensors or not, and the group: None if it
    is of one rank, which holds the whole.
    """
    if process_group is None:
        for name, x in tensors.items():
            _is_no_dtensor(name, x)
        return [*tensors.values(), None]
    if not distributed.is_available() or not isinstance(process_group, distributed.ProcessGroup):
        raise TypeError(
            f"process_group is {type(process_group).__name__}; it must be a torch.distributed.ProcessGroup that has "
            "this rank in it, or None"
        )
    parts = [_part(name, x, process_group, axis) if _is_dtensor(x) else x for name, x in tensors.items()]
    return [*parts, process_group if process_group.size() > 1 else None]


def _part(name, x, process_group, axis):
    ranks, mesh, axis = distributed.get_process_group_ranks(process_group), x.device_mesh.mesh.tolist(), axis % x.dim()
    if mesh != ranks or not x.placements[0].is_shard(axis):
        raise ValueError(
            f"{name} is a DTensor with the placements {x.placements} on the ranks {mesh}; with process_group it must "
            f"have Shard({axis}) on the group's ranks, in their order: {ranks}. They must hold the same tokens: those "
            "of FSDP hold different ones, and its weights must be gathered first"
        )
    widest = -(-x.shape[axis] // len(ranks))
    if widest * (len(ranks) - 1) >= x.shape[axis]:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} on {len(ranks)} ranks, which leaves none of axis {axis} to the last; "
            "every rank must hold at least one id"
        )
    return x.to_local(grad_placements=x.placements)


def _is_no_dtensor(name, x):
    if _is_dtensor(x):
        raise ValueError(
            f"{name} is a DTensor; it must be the whole {name}. A shard holds part of the vocabulary, while each rank "
            f"of FSDP holds other tokens: gather it first ({name}.full_tensor(), or call inside the module's forward). "
            "Where tensor-parallel ranks hold the same tokens, give their process_group"
        )


def _is_dtensor(x):
    module = sys.modules.get("torch.distributed.tensor")  # without it there is none
    return module is not None and isinstance(x, module.DTensor)


def logits_arguments(
    logits: Tensor, tokens: Tensor, ref_logits: Tensor | None, mask: Tensor | None, process_group=None
) -> None:
    if is_floating("logits", logits).dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; it must be (..., V) with V >= 1")
    are_tokens(tokens, logits.shape[:-1], logits.device, "logits")
    is_mask(mask, tokens)
    if ref_logits is not None:
        has_shape("ref_logits", is_floating("ref_logits", ref_logits), logits.shape, "that of logits")
        is_on("ref_logits", ref_logits, logits.device)
    debug_values(tokens, logits.shape[-1], mask, process_group, logits=logits, ref_logits=ref_logits)


def head_arguments(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    mask: Tensor | None = None,
    process_group=None,
) -> tuple[Tensor, dict[str, Any]]:
    """Check how hidden states become logits; return this rank's weight, and the rest as keyword arguments of every
    `linear_*` function.
    """
    weight, bias, ref_weight, ref_bias, group = parts_of(
        process_group, weight=weight, bias=bias, ref_weight=ref_weight, ref_bias=ref_bias
    )
    if is_floating("hidden", hidden).dim() == 0:
        raise ValueError("hidden has no axes; it must be (..., H)")
    are_tokens(tokens, hidden.shape[:-1], hidden.device, "hidden")
    is_mask(mask, tokens)
    is_head(hidden, weight, bias)
    if ref_hidden is None:
        for name, x in (("ref_weight", ref_weight), ("ref_bias", ref_bias)):
            if x is not None:
                raise ValueError(f"{name} is given without ref_hidden; it must be None, or ref_hidden given")
    else:
        _is_reference(hidden, weight, ref_hidden, ref_weight, ref_bias)
    debug_values(tokens, len(weight), mask, group, hidden=hidden, ref_hidden=ref_hidden)
    return weight, {
        "bias": bias,
        "ref_hidden": ref_hidden,
        "ref_weight": ref_weight,
        "ref_bias": ref_bias,
        "temperature": is_temperature(temperature, tokens, mask, hidden),
        "softcap": None if softcap is None else is_positive("softcap", softcap),
        "logit_scale": is_number("logit_scale", logit_scale),
        "process_group": group,
    }


def value_arguments(
    like: Tensor,
    tokens: Tensor,
    v1: Tensor,
    v2: Tensor,
    rewards: Tensor,
    kl_threshold: float | Tensor,
    alpha: float,
    gamma: float,
    target_v1: Tensor | None,
    target_v2: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[list[Tensor], dict[str, Any]]:
    """Check what `safe_terms` takes beyond `token_stats`; return (v1, v2, rewards), and the rest by name."""
    values = per_token(like, tokens, v1=v1, v2=v2, rewards=rewards)
    target_v1, target_v2 = per_token_or_none(like, tokens, target_v1=target_v1, target_v2=target_v2)
    is_time(tokens, cu_seqlens)
    kl_threshold = is_coefficient("kl_threshold", kl_threshold)
    if isinstance(kl_threshold, Tensor):
        kl_threshold = kl_threshold.to(tokens.device, non_blocking=kl_threshold.device.type == "cpu")
    return values, {
        "kl_threshold": kl_threshold,
        "alpha": is_positive("alpha", alpha),
        "gamma": is_number("gamma", gamma, 0, 1),
        "target_v1": target_v1,
        "target_v2": target_v2,
        "cu_seqlens": cu_seqlens,
    }


def is_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> None:
    """hidden [..., H], weight [V, H], bias [V] or None."""
    name = f"{prefix}weight"
    _is_gathered(name, weight)
    is_floating(name, weight)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{name} has shape {tuple(weight.shape)}; it must be (V, {hidden.shape[-1]}), "
            f"the last axis that of {prefix}hidden"
        )
    is_on(name, weight, hidden.device)
    _is_bias(f"{prefix}bias", bias, weight)


def _is_reference(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor | None, ref_bias: Tensor | None
) -> None:
    shared = ref_weight is None
    is_floating("ref_hidden", ref_hidden)
    width = (hidden if shared else ref_hidden).shape[-1:]
    why = "as hidden, whose head it shares" if shared else "with the leading shape of hidden"
    has_shape("ref_hidden", ref_hidden, (*hidden.shape[:-1], *width), why)
    is_on("ref_hidden", ref_hidden, hidden.device)
    if ref_weight is None:
        _is_bias("ref_bias", ref_bias, weight)
    else:
        is_head(ref_hidden, ref_weight, ref_bias, "ref_")
        has_shape("ref_weight", ref_weight, (len(weight), *width), "with the vocabulary of weight")


def _is_bias(name: str, bias: Tensor | None, weight: Tensor) -> None:
    if bias is not None:
        has_shape(name, is_floating(name, bias), weight.shape[:1], "one entry a vocabulary id")
        is_on(name, bias, weight.device)


def _is_gathered(name: str, weight: object) -> None:
    if isinstance(weight, Tensor) and weight.numel() == 0:
        raise ValueError(
            f"{name} is empty, shape {tuple(weight.shape)}; it must be the whole weight. An empty tensor is what FSDP "
            "and ZeRO-3 leave of a sharded one outside its module's forward: gather it first"
        )


def may_be_overwritten(name: str, x: Tensor) -> None:
    leaf = x if x._base is None else x._base
    if leaf.is_leaf and leaf.requires_grad:
        raise ValueError(
            f"{name} is a leaf that requires a gradient, or a view of one: inplace_backward=True would write the "
            "gradient over it. It must be computed from others, as a model's are"
        )
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride <= reach:
            raise ValueError(
                f"{name} has strides {x.stride()} for shape {tuple(x.shape)}: elements share memory; "
                "inplace_backward=True needs each to have its own"
            )
        reach += stride * (size - 1)


def is_time(tokens_like: Tensor, cu_seqlens: object, bootstrap: object = None) -> None:
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
        bootstrap = is_floating("bootstrap", bootstrap)
        has_shape("bootstrap", bootstrap, sequences, "one entry a sequence")
        is_on("bootstrap", bootstrap, tokens_like.device)


def debug_values(
    tokens: Tensor, vocabulary: int, mask: Tensor | None, process_group=None, **tensors: Tensor | None
) -> None:
    """With SAFE_KERNELS_DEBUG=1: live ids inside the vocabulary, and no NaN in the rows of live tokens."""
    if not debugging():
        return
    if process_group is not None:
        vocabulary = vocab_parallel.agreed_vocabulary(process_group, tokens, vocabulary, mask, **tensors)
    tokens = tokens.long()  # uint8 beside a vocabulary of 300 would compare with 44
    live = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    outside = live & ((tokens < 0) | (tokens >= vocabulary))
    if outside.any():
        raise ValueError(f"tokens has the id {tokens[outside][0].item()}; it must be in [0, {vocabulary}) or masked")
    for name, x in tensors.items():
        if x is None:
            continue
        is_bad = torch.isnan(x[live]).any()
        if process_group is not None:  # all ranks raise, or none: one that went on would wait for the others
            is_bad = vocab_parallel.gathered(is_bad.int().view(1), process_group).any()
        if is_bad:
            raise ValueError(f"{name} has NaN in the row of a live token; it must have none")
