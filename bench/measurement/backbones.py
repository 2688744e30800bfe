"""Models with random weights, built from the configurations of real ones: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch

from bench.measurement.workloads import SEED

BACKBONES: dict[str, dict[str, int]] = {  # as the models' own configurations have them
    "Qwen2.5-0.5B": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
                     "intermediate_size": 4864, "vocab_size": 151_936},
    "Qwen2.5-3B": {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
                   "intermediate_size": 11_008, "vocab_size": 151_936},
    "two layers": {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                   "intermediate_size": 512, "vocab_size": 49_152},
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 48, "vocab_size": 97},
}  # fmt: skip


def random_model(config: dict[str, int], dtype: torch.dtype, device: str, **special_tokens: int) -> Any:
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(SEED)
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | special_tokens
    with torch.device(device):
        return AutoModelForCausalLM.from_config(Qwen2Config(**config, **tokens, tie_word_embeddings=True), dtype=dtype)
