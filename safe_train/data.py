"""Prompts in, packed token batches out. Labels are shifted and response tokens chosen here and nowhere else.

Shape legend: N tokens of all sequences, L response tokens of all sequences, B sequences.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safe_train.config import CONFIGS, ConfigError

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class TokenBatch:
    """Sequences laid end to end, without padding, and the positions that predict a response token."""

    input_ids_N: Tensor  # int64, prompt and completion of each sequence in turn
    position_ids_N: Tensor  # int64, 0 at the start of each sequence
    cu_seqlens: Tensor  # int32 [B + 1], boundaries of the sequences in N
    predict_L: Tensor  # int64, index in N of the state that predicts each response token
    targets_L: Tensor  # int64, the response tokens
    response_cu_seqlens: Tensor  # int32 [B + 1], boundaries of the sequences in L

    @classmethod
    def pack(cls, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> TokenBatch:
        """Packs sequences; a completion may be empty, a prompt may not: its last token predicts the first response."""
        input_ids: list[int] = []
        position_ids: list[int] = []
        predict: list[int] = []
        starts, response_starts = [0], [0]
        for prompt, completion in zip(prompts, completions, strict=True):
            if not prompt:
                raise ValueError("a prompt has no tokens; give it at least one, such as the BOS token")
            first = len(input_ids) + len(prompt) - 1
            predict += range(first, first + len(completion))
            input_ids += [*prompt, *completion]
            position_ids += range(len(prompt) + len(completion))
            starts.append(len(input_ids))
            response_starts.append(len(predict))
        ids_N, predict_L = torch.tensor(input_ids, dtype=torch.long), torch.tensor(predict, dtype=torch.long)
        return cls(
            input_ids_N=ids_N,
            position_ids_N=torch.tensor(position_ids, dtype=torch.long),
            cu_seqlens=torch.tensor(starts, dtype=torch.int32),
            predict_L=predict_L,
            targets_L=ids_N[predict_L + 1],
            response_cu_seqlens=torch.tensor(response_starts, dtype=torch.int32),
        )

    def to(self, device: torch.device) -> TokenBatch:
        return TokenBatch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


def through_first_eos(completion: Sequence[int], eos_ids: Iterable[int]) -> tuple[list[int], bool]:
    """The completion up to and including its first end token, and whether it has one."""
    ends = set(eos_ids)
    for i, token in enumerate(completion):
        if token in ends:
            return list(completion[: i + 1]), True
    return list(completion), False


def microbatches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of consecutive sequences grouped so that a group holds at most `max_tokens` tokens, or one sequence."""
    groups: list[list[int]] = []
    room = 0
    for i, length in enumerate(lengths):
        if not groups or length > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(i)
        room -= length
    return groups


@dataclass(frozen=True)
class Prompt:
    text: str | Messages  # as the data set has it
    ids: list[int]
    columns: dict[str, Any]  # the row's other fields, passed on to the rewards


class PromptDataset:
    """Rows with a `prompt` field (text, or chat messages), tokenized when asked for.

    `at(start, count)` is a pure function of the seed and the position, so a resumed run sees the same prompts.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], tokenizer: Any, max_prompt_tokens: int, seed: int = 0):
        if len(rows) == 0:
            raise ConfigError("the prompt data set is empty")
        if "prompt" not in rows[0]:
            raise ConfigError(f"the prompt data set needs a 'prompt' field, its first row has {sorted(rows[0])}")
        self.rows, self.tokenizer, self.max_prompt_tokens, self.seed = rows, tokenizer, max_prompt_tokens, seed

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, start: int, count: int) -> list[Prompt]:
        """Prompts number start .. start + count - 1 of an endless stream of shuffled epochs."""
        order: dict[int, list[int]] = {}
        prompts = []
        for i in range(start, start + count):
            epoch, position = divmod(i, len(self))
            if epoch not in order:
                generator = torch.Generator().manual_seed(self.seed + epoch)
                order[epoch] = torch.randperm(len(self), generator=generator).tolist()
            prompts.append(self[order[epoch][position]])
        return prompts

    def __getitem__(self, index: int) -> Prompt:
        row = self.rows[index]
        text = row["prompt"]
        if isinstance(text, str):
            ids = self.tokenizer(text)["input_ids"]
        else:
            chat = self.tokenizer.apply_chat_template(text, add_generation_prompt=True, tokenize=False)
            ids = self.tokenizer(chat, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"prompt {index} of the data set is empty: {text!r}")
        return Prompt(text, list(ids[-self.max_prompt_tokens :]), {k: v for k, v in row.items() if k != "prompt"})


def load_rows(dataset: str, split: str = "train") -> Sequence[Mapping[str, Any]]:
    """Rows of a `.jsonl` file (a path, or the name of a shipped one) or of a Hub data set."""
    if not dataset.endswith((".jsonl", ".json")):
        import datasets

        try:
            return datasets.load_dataset(dataset, split=split)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot load the data set {dataset!r}, split {split!r}: {error}") from error
    path = next((p for p in (Path(dataset), CONFIGS / dataset) if p.is_file()), None)
    if path is None:
        raise ConfigError(f"no prompt file {dataset!r} (looked here and among the shipped ones in {CONFIGS})")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        try:
            if line.strip():
                rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from None
    return rows
