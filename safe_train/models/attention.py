"""The attention of forwards: which implementation runs here, and PyTorch's own FlashAttention for transformers.

Shape legend: N tokens of all sequences laid end to end, A query heads, K key and value heads, D head width.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from safe_kernels.integrations.transformers import text_config
from safe_train.config import ConfigError
from safe_train.data.batches import TokenBatch
from safe_train.settings.limits import ATTENTION

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch < 2.10
    varlen_attn = None  # type: ignore[assignment]

VARLEN = "varlen"
FLASH = ("flash_attention_3", "flash_attention_2", VARLEN)  # these read the sequences' boundaries instead of a mask
LAYERS_OF_FLASH = {"full_attention", "sliding_attention"}
NO_SOFTCAP = "has no softcap of attention logits, which this model applies"


def choose_attention(name: str, model: Any, device: torch.device, dtype: torch.dtype, takes_masks: bool = False) -> str:
    """The implementation `name`, or for "auto" the fastest that can run `model` in `dtype` on `device`.

    `takes_masks` says that rows will be padded, for which `varlen` has no mask.

    Raises:
        ConfigError: the implementation asked for cannot run here; the message says why.
    """
    if name == "auto":
        known = [each for each in ATTENTION if not (takes_masks and each == VARLEN)]
        return next(each for each in known if not obstacle(each, model, device, dtype))
    reason = obstacle(name, model, device, dtype)
    if reason:
        raise ConfigError(f"attn_implementation {name} {reason}; auto takes the fastest that can run")
    return name


def obstacle(name: str, model: Any, device: torch.device, dtype: torch.dtype) -> str:
    """What keeps the implementation from running, or nothing: "eager" always runs."""
    architecture = type(model).__name__
    if name != model.config._attn_implementation and not model._can_set_attn_implementation():
        return f"cannot be set for {architecture} in transformers"
    if name == "eager":
        return ""
    if name == "sdpa":
        return sdpa_obstacle(model)
    if device.type != "cuda":
        return f"needs a GPU to train on, the device is {device.type}"
    if name == "flex_attention":
        return "" if model._supports_flex_attn else f"is not supported for {architecture} by transformers"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs a 16-bit dtype, the model runs in {dtype}"
    if not (model._supports_flash_attn and model._supports_attention_backend):
        return f"is not supported for {architecture} by transformers"
    other_layers = set(getattr(text_config(model), "layer_types", None) or ()) - LAYERS_OF_FLASH
    if other_layers:
        return f"has no {', '.join(sorted(other_layers))}, which {architecture} uses"
    return varlen_obstacle(model, device) if name == VARLEN else package_obstacle(name)


def sdpa_obstacle(model: Any) -> str:
    if softcapped(model):  # which transformers 5.17 would leave out without a word
        return NO_SOFTCAP
    return "" if model._supports_sdpa else f"is not supported for {type(model).__name__} by transformers"


def softcapped(model: Any) -> bool:
    return getattr(text_config(model), "attn_logit_softcapping", None) is not None


def package_obstacle(name: str) -> str:
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if name == "flash_attention_2":
        return "" if is_flash_attn_2_available() else "needs the package flash-attn: pip install 'safe-kernels[flash]'"
    return "" if is_flash_attn_3_available() else "needs the package flash-attn-3, built from FlashAttention's sources"


def varlen_obstacle(model: Any, device: torch.device) -> str:
    if varlen_attn is None or not {"scale", "window_size"} <= parameters(varlen_attn):
        return f"needs torch 2.11 or newer, this is {torch.__version__}"
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return "needs an NVIDIA GPU of compute capability 8.0 or newer"
    if softcapped(model):
        return NO_SOFTCAP
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        return "has no attention sinks, which this model has"
    config = text_config(model)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if width > 256 or width % 8 or getattr(config, "v_head_dim", width) != width:
        return f"needs keys and values of one width, a multiple of 8 up to 256, this model's heads have {width}"
    return ""


@functools.cache
def parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def use_attention(model: Any, name: str) -> None:
    if name == VARLEN:
        from transformers import AttentionInterface

        # Without a mask function of this name, transformers makes no mask: the boundaries say it all.
        AttentionInterface.register(VARLEN, varlen_attention)
    if name != model.config._attn_implementation:  # transformers warns of each part that cannot be set
        model.set_attn_implementation(name)


def generation_attention(model: Any) -> str:
    """What sampling runs on: it pads on the left and fills a cache, so it needs an implementation that takes a mask."""
    packed = model.config._attn_implementation
    if packed in ("sdpa", "eager"):
        return packed
    return "eager" if sdpa_obstacle(model) else "sdpa"


@contextmanager
def as_published(model: Any) -> Iterator[None]:
    """Inside, the model is in evaluation mode, with an attention that takes masks and caches and runs on any device."""
    was_training, attention = model.training, model.config._attn_implementation
    model.eval()
    use_attention(model, generation_attention(model))
    try:
        yield
    finally:
        use_attention(model, attention)
        model.train(was_training)


def boundaries(model: Any, batch: TokenBatch) -> dict[str, Any]:
    """Arguments of a packed forward that tell FlashAttention where sequences begin; other implementations use
    `position_ids`."""
    if model.config._attn_implementation not in FLASH:
        return {}
    starts, longest = batch.cu_seqlens, batch.max_seqlen
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}


def varlen_attention(
    module: Any,
    query: Tensor,  # [1, A, N, D]
    key: Tensor,  # [1, K, N, D]
    value: Tensor,  # [1, K, N, D]
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers over `torch.nn.attention.varlen.varlen_attn`. Returns [1, N, A, D].

    A token sees its own sequence up to itself or, with `sliding_window`, the last so many tokens of that.
    """
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown or kwargs.get("dropout"):
        raise NotImplementedError(f"varlen attention has no {', '.join(unknown) or 'dropout'}; set attn_implementation")
    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError("varlen attention needs a packed forward with cu_seq_lens_q and max_length_q")
    query_NAD, key_NKD, value_NKD = (x[0].transpose(0, 1) for x in (query, key, value))
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in parameters(varlen_attn) else {}
    if not grouped:
        groups = query_NAD.shape[1] // key_NKD.shape[1]
        key_NKD, value_NKD = (x.repeat_interleave(groups, dim=1) for x in (key_NKD, value_NKD))
    before = -1 if sliding_window is None else sliding_window - 1  # varlen_attn does not count the token itself
    starts, longest = cu_seq_lens_q, max_length_q
    out_NAD: Any = varlen_attn(
        query_NAD, key_NKD, value_NKD, starts, starts, longest, longest,
        scale=scaling, window_size=(before, 0), **grouped,
    )  # fmt: skip
    return out_NAD[None], None
