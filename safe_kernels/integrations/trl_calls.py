"""What surrounds a call of TRL: autocast, ZeRO-3, and the backend that the environment asks for."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..dispatch import choose_backend

UTILS = "trl.trainer.utils"


def fast_backend(*tensors: Tensor) -> str:
    name = choose_backend(None, *tensors, has_gradient=None)
    if name == "reference":
        raise ValueError(
            "SAFE_KERNELS_BACKEND is 'reference'; inside TRL it must be 'torch' or 'triton'. TRL's own functions come "
            "back with SAFE_KERNELS_TRL=0"
        )
    return name


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """That to which hidden states and weights are rounded, if to any."""
    device = x.device.type
    is_rounded = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if is_rounded else None


def gathered(*parameters: Tensor | None) -> Any:
    """Under ZeRO-3 the whole parameters, where TRL has not gathered them."""
    gather = None if parameters[0] is None else getattr(sys.modules[UTILS], "maybe_gather_lm_head_ctx", None)
    return nullcontext() if gather is None else gather(*parameters)
