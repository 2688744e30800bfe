"""Checks of arguments at the call: which argument, what it was, what it must be.

What would need the device's answer (ids, NaN, values of tensors) is checked only with SAFE_KERNELS_DEBUG=1.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from . import vocab_parallel
from .inputs import Head

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def debugging() -> bool:
    return os.environ.get("SAFE_KERNELS_DEBUG", "0") not in ("", "0")


def require_given(name: str, x: object) -> None:
    if x is None:
        raise TypeError(f"{name} is NoneType; it must be a tensor")


def require_reference_for(option: str, value: object, name: str, x: object) -> None:
    if x is None:
        off = False if value is True else 0
        raise ValueError(f"{option} is {value} without {name}; it must be {off}, or {name} given")


def require_floating(name: str, x: object) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {type(x).__name__}; it must be a tensor")
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}; it must be a floating dtype")
    return x if type(x) is Tensor else require_local(name, x)


def require_local(name: str, x: Tensor) -> Tensor:
    if is_dtensor(x):
        raise TypeError(f"{name} is a DTensor; it must be a tensor that this rank holds: {name}.to_local()")
    return x


def require_place(name: str, x: Tensor, shape: Sequence[int], why: str, device: torch.device) -> None:
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be {tuple(shape)}, {why}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}; it must be on {device}, with the other arguments")


def require_tokens(tokens: object, leading: torch.Size, device: torch.device, source: str) -> None:
    if not isinstance(tokens, Tensor):
        raise TypeError(f"tokens is {type(tokens).__name__}; it must be a tensor of ids")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"tokens has dtype {tokens.dtype}; it must be torch.int64 or another integer dtype")
    if type(tokens) is not Tensor:
        require_local("tokens", tokens)
    require_place("tokens", tokens, leading, f"the leading shape of {source}", device)


def require_mask(mask: object, tokens: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask is {kind}; it must be a torch.bool tensor, True where a token counts")
    require_place("mask", mask, tokens.shape, "one entry a token", tokens.device)


def require_per_token(name: str, x: object, like: Tensor, tokens: Tensor) -> Tensor:
    """A floating tensor with one entry a token.

    float64, which is what numpy makes, comes back as float32 unless `like` is float64: it is the model's tensors that
    say in what dtype, and by which backend, a result is computed.
    """
    x = require_floating(name, x)
    require_place(name, x, tokens.shape, "one entry a token", tokens.device)
    return no_wider(x, like)


def no_wider(x: Tensor, like: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float64 and like.dtype != torch.float64 else x


def require_temperatures(
    temperature: Tensor, tokens: Tensor, mask: Tensor | None, like: Tensor, name: str = "temperature"
) -> Tensor:
    """One entry a token, without gradient."""
    if temperature.dim() == 0:
        temperature = temperature.to(torch.promote_types(like.dtype, torch.float32)).expand(tokens.shape)
    temperature = require_per_token(name, temperature, like, tokens)
    if debugging():
        live = temperature if mask is None else temperature[mask]
        if not bool((live > 0).all()):
            raise ValueError(f"{name} has a minimum of {live.min().item()}; it must be > 0 for every live token")
    return temperature.detach()


def require_temperature(
    name: str, temperature: float | Tensor, tokens: Tensor, mask: Tensor | None, like: Tensor
) -> float | Tensor:
    if isinstance(temperature, Tensor):
        return require_temperatures(temperature, tokens, mask, like, name)
    return require_number(name, temperature, above=0)


def require_one_of(name: str, x: object, allowed: Sequence[str]) -> None:
    if x not in allowed:
        raise ValueError(f"{name} is {x!r}; it must be one of {', '.join(map(repr, allowed))}")


def require_number(
    name: str, x: object, low: float = -math.inf, high: float = math.inf, above: float = -math.inf
) -> float:
    """A finite number between `low` and `high`, and larger than `above`."""
    if isinstance(x, bool) or not isinstance(x, Real):
        raise TypeError(f"{name} is {type(x).__name__}; it must be a number")
    number = float(x)
    if not (-math.inf < number < math.inf and low <= number <= high):  # which torch.compile can trace
        allowed = "finite" if low == -math.inf else f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
        raise ValueError(f"{name} is {x}; it must be {allowed}")
    if number <= above:
        raise ValueError(f"{name} is {x}; it must be > {above}")
    return number


def require_coefficient(name: str, x: object) -> float | Tensor:
    """A number, or a 0-dim tensor, never read on the host."""
    if not isinstance(x, Tensor):
        return require_number(name, x)
    if x.dim() != 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; it must be a number or a 0-dim tensor")
    return x.detach()


def is_dtensor(x: object) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # without it there is none
    return module is not None and isinstance(x, module.DTensor)


def local_parts(process_group: ProcessGroup | None, axis: int = 0, **tensors: Any) -> list[Any]:
    """What this rank holds of tensors that have the vocabulary along `axis`, DTensors or not, and the group: None if it
    is of one rank, which holds the whole.
    """
    if process_group is None:
        for name, x in tensors.items():
            if x is not None and type(x) is not Tensor and is_dtensor(x):
                raise ValueError(
                    f"{name} is a DTensor; it must be the whole {name}. A shard holds part of the vocabulary, while "
                    f"each rank of FSDP holds other tokens: gather it first ({name}.full_tensor(), or call inside the "
                    "module's forward). Where tensor-parallel ranks hold the same tokens, give their process_group"
                )
        return [*tensors.values(), None]
    if not distributed.is_available() or not isinstance(process_group, distributed.ProcessGroup):
        raise TypeError(
            f"process_group is {type(process_group).__name__}; it must be a torch.distributed.ProcessGroup that has "
            "this rank in it, or None"
        )
    parts = [local_part(name, x, process_group, axis) if is_dtensor(x) else x for name, x in tensors.items()]
    return [*parts, process_group if process_group.size() > 1 else None]


def local_part(name: str, x: Any, process_group: ProcessGroup, axis: int) -> Tensor:
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


def require_logits(
    logits: Tensor, tokens: Tensor, ref_logits: Tensor | None, mask: Tensor | None, process_group: Any = None
) -> None:
    if require_floating("logits", logits).dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; it must be (..., V) with V >= 1")
    require_tokens(tokens, logits.shape[:-1], logits.device, "logits")
    if mask is not None:
        require_mask(mask, tokens)
    if ref_logits is not None:
        require_floating("ref_logits", ref_logits)
        require_place("ref_logits", ref_logits, logits.shape, "that of logits", logits.device)
    if "SAFE_KERNELS_DEBUG" in os.environ and debugging():
        require_clean_values(tokens, logits.shape[-1], mask, process_group, logits=logits, ref_logits=ref_logits)


def require_head(head: Head) -> Head:
    """Check how hidden states become logits; with this rank's part of what has the vocabulary."""
    hidden, _, tokens, _, ref_hidden, _, _, temperature, softcap, logit_scale, mask, _, group = head
    weight, bias, ref_weight, ref_bias, group = local_parts(
        group, weight=head.weight, bias=head.bias, ref_weight=head.ref_weight, ref_bias=head.ref_bias
    )
    if require_floating("hidden", hidden).dim() == 0:
        raise ValueError("hidden has no axes; it must be (..., H)")
    require_tokens(tokens, hidden.shape[:-1], hidden.device, "hidden")
    if mask is not None:
        require_mask(mask, tokens)
    require_weight("", hidden, weight, bias)
    if ref_hidden is not None:
        require_reference(hidden, weight, ref_hidden, ref_weight, ref_bias)
    elif ref_weight is not None or ref_bias is not None:
        name = "ref_bias" if ref_weight is None else "ref_weight"
        raise ValueError(f"{name} is given without ref_hidden; it must be None, or ref_hidden given")
    if "SAFE_KERNELS_DEBUG" in os.environ and debugging():
        require_clean_values(tokens, len(weight), mask, group, hidden=hidden, ref_hidden=ref_hidden)
    return Head(
        *(hidden, weight, tokens, bias, ref_hidden, ref_weight, ref_bias),
        require_temperatures(temperature, tokens, mask, hidden)
        if isinstance(temperature, Tensor)
        else require_number("temperature", temperature, above=0),
        None if softcap is None else require_number("softcap", softcap, above=0),
        require_number("logit_scale", logit_scale),
        mask,
        head.batch_invariant,
        group,
    )


def require_weight(prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """hidden [..., H], weight [V, H], bias [V] or None."""
    name = f"{prefix}weight"
    if isinstance(weight, Tensor) and weight.numel() == 0:
        raise ValueError(
            f"{name} is empty, shape {tuple(weight.shape)}; it must be the whole weight. An empty tensor is what FSDP "
            "and ZeRO-3 leave of a sharded one outside its module's forward: gather it first"
        )
    if require_floating(name, weight).dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{name} has shape {tuple(weight.shape)}; it must be (V, {hidden.shape[-1]}), "
            f"the last axis that of {prefix}hidden"
        )
    require_place(name, weight, weight.shape, "", hidden.device)
    if bias is not None:
        require_bias(f"{prefix}bias", bias, weight)


def require_bias(name: str, bias: Tensor, weight: Tensor) -> None:
    bias = require_floating(name, bias)
    require_place(name, bias, weight.shape[:1], "one entry a vocabulary id", weight.device)


def require_reference(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor | None, ref_bias: Tensor | None
) -> None:
    shared = ref_weight is None
    require_floating("ref_hidden", ref_hidden)
    width = (hidden if shared else ref_hidden).shape[-1:]
    why = "as hidden, whose head it shares" if shared else "with the leading shape of hidden"
    require_place("ref_hidden", ref_hidden, (*hidden.shape[:-1], *width), why, hidden.device)
    if ref_weight is not None:
        require_weight("ref_", ref_hidden, ref_weight, ref_bias)
        require_place("ref_weight", ref_weight, (len(weight), *width), "with the vocabulary of weight", hidden.device)
    elif ref_bias is not None:
        require_bias("ref_bias", ref_bias, weight)


def require_overwritable(name: str, x: Tensor) -> None:
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


def require_time(tokens_like: Tensor, cu_seqlens: object, bootstrap: object = None) -> None:
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
        require_place("cu_seqlens", cu_seqlens, cu_seqlens.shape, "", tokens_like.device)
        if debugging():
            bounds = cu_seqlens.tolist()
            if bounds[0] != 0 or bounds[-1] != len(tokens_like) or bounds != sorted(bounds):
                raise ValueError(f"cu_seqlens is {bounds}; it must rise from 0 to {len(tokens_like)}")
        sequences = torch.Size([len(cu_seqlens) - 1])
    if bootstrap is not None:
        bootstrap = require_floating("bootstrap", bootstrap)
        require_place("bootstrap", bootstrap, sequences, "one entry a sequence", tokens_like.device)


def require_clean_values(
    tokens: Tensor, vocabulary: int, mask: Tensor | None, process_group: Any = None, **tensors: Tensor | None
) -> None:
    """Live ids inside the vocabulary, and no NaN in the rows of live tokens."""
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
