"""A step of the trainer on a random model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import torch

from bench.gpu_session.place import Place
from bench.gpu_session.records import Record
from bench.measurement.backbones import BACKBONES, random_model


def train(place: Place, name: str) -> Iterator[Record]:
    """16 completions of 64 tokens to prompts of 64; the second step's times."""
    from safe_train import SafeConfig, SafeTrainer

    config = BACKBONES["tiny" if place.tiny else name]
    tokens = 4 if place.tiny else 64
    words = [f"w{i}" for i in range(config["vocab_size"])]
    rows = [{"prompt": " ".join(words[i + 2 :: len(words) // (tokens + 1)][:tokens])} for i in range(16)]
    with tempfile.TemporaryDirectory() as folder:
        args = SafeConfig(
            output_dir=folder, use_cpu=place.tiny, total_steps=2, prompts_per_step=16, max_prompt_tokens=tokens,
            max_new_tokens=tokens, cache_implementation="dynamic", save_every=1000, samples_every=1000,
        )  # fmt: skip
        dtype = torch.float32 if place.tiny else torch.bfloat16
        model = random_model(config, dtype, place.device, eos_token_id=1, pad_token_id=0)
        trainer = SafeTrainer(model, number_of_words, args, rows, processing_class=word_tokenizer(words))
        last = trainer.train()[-1]
    attention = trainer.policy.causal_lm.config._attn_implementation
    shown = ("time/", "memory/", "tokens_per", "sampler")
    numbers = {key: value for key, value in last.items() if key.startswith(shown)}
    yield {"record": "step", "model": name, "attention": attention, **numbers}


def word_tokenizer(words: list[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token=words[0], eos_token=words[1])


def number_of_words(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]
