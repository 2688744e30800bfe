"""Ends of completions that are set by hand: `stop_tokens` and `stop_strings`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from safe_train.config import ConfigError


def stop_tokens(tokenizer: Any, tokens: Sequence[str]) -> list[int]:
    ids = tokenizer.get_vocab()
    for token in tokens:
        if token not in ids:
            added = ", ".join(repr(each.content) for each in tokenizer.added_tokens_decoder.values())
            raise ConfigError(
                f"stop_tokens: {token!r} is no token of the model's, whose added ones are {added:.500}; stop_strings "
                "takes any text"
            )
    return [ids[token] for token in tokens]


def described(tokenizer: Any, eos_ids: Iterable[int], strings: Sequence[str] | None) -> str:
    """What ends a completion, for the terminal."""
    ends = [f"{tokenizer.decode([token])!r} ({token})" for token in eos_ids] + [repr(text) for text in strings or ()]
    return f"a completion ends with {' or '.join(ends)}" if ends else "a completion ends at max_new_tokens only"


class StopStrings(StoppingCriteria):
    """Ends a completion with the token that completes one of the strings; the prompt does not count."""

    def __init__(self, tokenizer: Any, strings: Sequence[str], prompt_width: int = 0):
        self.tokenizer, self.strings, self.prompt_width = tokenizer, strings, prompt_width
        self.reach = max(len(string.encode()) for string in strings) + 1  # in tokens: each has a byte at least

    def behind(self, prompt_width: int) -> StopStrings:
        return StopStrings(self.tokenizer, self.strings, prompt_width)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        rows = input_ids[:, self.prompt_width :].tolist()
        return torch.tensor([self.are_completed(row) for row in rows], device=input_ids.device)

    def are_completed(self, tokens: Sequence[int]) -> bool:
        text = self.tokenizer.decode(tokens[-self.reach :], clean_up_tokenization_spaces=False)
        return any(string in text for string in self.strings)

    def through_first(self, tokens: list[int]) -> tuple[list[int], bool]:
        """The tokens up to and including the one that completes a string, and whether one does."""
        for end in range(1, len(tokens) + 1):
            if self.are_completed(tokens[:end]):
                return tokens[:end], True
        return tokens, False
