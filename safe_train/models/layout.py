"""How the sequences of a micro-batch lie in a forward: one right-padded row each, or packed end to end.

Rows with the attention mask are right for every causal model: no token sees what comes after it. Packed sequences stay
apart only where attention reads their boundaries, as FlashAttention and `varlen` do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from safe_kernels import linear_token_stats
from safe_kernels.integrations import transformers as hf
from safe_train.config import ConfigError, SafeConfig
from safe_train.data.batches import TokenBatch
from safe_train.models.attention import FLASH, VARLEN, as_published, boundaries

PACKED, ROWS = "packed", "rows"
WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "local_attention", "window_size")
LARGEST_GAP = {torch.float32: 1e-4, torch.float64: 1e-4}  # nats on average; a leak between sequences is 0.8 to 3.2
LARGEST_GAP_OF_16_BITS = 0.15
LONGEST = 16  # tokens of a sequence that layouts are compared on


def choose_layout(args: SafeConfig, model: Any) -> str:
    """`rows` or `packed`, for a model whose attention is chosen.

    Raises:
        ConfigError: the layout asked for cannot run, or would mix sequences.
    """
    attention = model.config._attn_implementation
    if args.layout == PACKED:
        check_packed(model)
        return PACKED
    if in_rows(args, model) and attention == VARLEN:
        reason = "layout is rows" if args.layout == ROWS else f"{type(model).__name__} carries a state"
        raise ConfigError(f"attn_implementation varlen cannot run on padded rows, and {reason}; set it to auto")
    return PACKED if attention in FLASH and not in_rows(args, model) else ROWS


def in_rows(args: SafeConfig, model: Any) -> bool:
    """Whether the layout is `rows` whatever the attention is."""
    return args.layout == ROWS or (args.layout == "auto" and carries_state(model))


def carries_state(model: Any) -> bool:
    """Whether layers carry a state from token to token, which would run on from one packed sequence into the next."""
    return bool(getattr(model, "_is_stateful", False))


def check_packed(model: Any) -> None:
    """Raises a ConfigError when `model` cannot run on packed sequences, or mixes them."""
    name, attention = type(model).__name__, model.config._attn_implementation
    if carries_state(model):
        raise ConfigError(
            f"layout packed: {name} carries a state from token to token, which would run on across the packed "
            "sequences; set layout to rows"
        )
    if attention in FLASH:
        return
    if windows(hf.text_config(model)):
        raise ConfigError(
            f"layout packed: {name} has {windows(hf.text_config(model))}, and {attention} attention would lose it on "
            "packed sequences; set layout to rows, or attn_implementation to one that reads boundaries: "
            + ", ".join(FLASH)
        )
    gap, limit = layout_gap(model, PACKED), largest_gap(model.dtype)
    if not gap <= limit:
        raise ConfigError(
            f"layout packed: on {attention} attention the log-probs of {name} differ by {gap:.2g} nats on average from "
            f"those of each sequence alone, at most {limit} is rounding: sequences see one another; set layout to rows"
        )


def windows(config: Any) -> str:
    """What keeps a token from seeing its whole sequence, or nothing."""
    others = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if others:
        return " and ".join(others)
    if getattr(config, "layer_types", None) or getattr(config, "use_sliding_window", True) is False:
        return ""
    return next((f"{name} {getattr(config, name)}" for name in WINDOWS if getattr(config, name, None)), "")


def largest_gap(dtype: torch.dtype, temperature: float = 1.0) -> float:
    """Of a forward in `dtype`. A temperature below 1 multiplies the logits, and with them their rounding."""
    return LARGEST_GAP.get(dtype, LARGEST_GAP_OF_16_BITS) / min(1.0, temperature)


def response_states(model: Any, batch: TokenBatch, layout: str) -> Tensor:
    """Hidden states [L, H] that predict the response tokens, as the output head of `model` receives them."""
    if layout == PACKED:
        inputs = {"input_ids": batch.input_ids_N[None], "position_ids": batch.position_ids_N[None]}
        states = hf.head_inputs(model, **inputs, **boundaries(model, batch))
        return states[0, batch.predict_L]
    ids_BT, mask_BT, predict_L = batch.rows()
    return hf.head_inputs(model, input_ids=ids_BT, attention_mask=mask_BT).flatten(0, 1)[predict_L]


@torch.no_grad()
def layout_gap(model: Any, layout: str, sequences: list[list[int]] | None = None) -> float:
    """How far log-probs of sequences together are from those of each alone: the mean of |difference|, in nats."""
    sequences = sequences or probes(model)
    together = logprobs(model, sequences, layout)
    with as_published(model):
        alone = torch.cat([logprobs(model, [ids], ROWS) for ids in sequences])
    return (together - alone).abs().mean().item()


def check_causal(model: Any) -> None:
    """Raises a ConfigError when what a token's state is depends on the tokens after it."""
    ids = hf.plain_ids(model, LONGEST)
    whole, prefix = (logprobs(model, [each], ROWS) for each in (ids, ids[:-2]))
    gap = (whole[: len(prefix)] - prefix).abs().mean().item()
    if not gap <= largest_gap(model.dtype):
        raise ConfigError(
            f"{type(model).__name__} is not causal: the log-probs of {len(prefix)} tokens change by {gap:.2g} nats on "
            "average when others follow them; a model of this kind may need is_decoder=True in its config"
        )


@torch.no_grad()
def logprobs(model: Any, sequences: list[list[int]], layout: str) -> Tensor:
    """Of all tokens but each sequence's first, through the bare head."""
    batch = TokenBatch.pack([ids[:1] for ids in sequences], [ids[1:] for ids in sequences]).to(model.device)
    hidden_LH = response_states(model, batch, layout)
    return linear_token_stats(hidden_LH, tokens=batch.targets_L, **hf.output_head(model)).logprob


def probes(model: Any) -> list[list[int]]:
    """Three sequences of 4 to 16 tokens, none of which the config gives a special meaning."""
    ids = hf.plain_ids(model, LONGEST)
    return [[ids[step * i % len(ids)] for i in range(length)] for step, length in ((1, 9), (3, 4), (5, LONGEST))]
