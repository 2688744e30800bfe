"""Prompts in, token batches out. Labels are shifted and response tokens chosen here and nowhere else.

Shape legend: N tokens of all sequences, L response tokens of all sequences, B sequences.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safe_train.config import CONFIGS, ConfigError

Messages = list[dict[str, str]]

PROMPT_FIELDS = ("prompt", "messages", "chosen")  # the first that a row has holds its prompt
SPEAKERS = {"Human": "user", "Assistant": "assistant"}  # of a transcript such as Anthropic/hh-rlhf's


@dataclass(frozen=True)
class TokenBatch:
    """Sequences laid end to end, without padding, and the positions that predict a response token."""

    input_ids_N: Tensor  # int64, prompt and completion of each sequence in turn
    position_ids_N: Tensor  # int64, 0 at the start of each sequence
    cu_seqlens: Tensor  # int32 [B + 1], boundaries of the sequences in N
    predict_L: Tensor  # int64, index in N of the state that predicts each response token
    targets_L: Tensor  # int64, the response tokens
    response_cu_seqlens: Tensor  # int32 [B + 1], boundaries of the sequences in L
    max_seqlen: int  # tokens of the longest sequence, on the host: reading it from the device would wait for it

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
            max_seqlen=max(position_ids, default=-1) + 1,
        )

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same tokens [B, T] with one sequence a row, padded on the right; their mask; and `predict_L` in B x T."""
        lengths_B = self.cu_seqlens.diff().long()
        row_N = torch.arange(len(lengths_B), device=lengths_B.device)
        row_N = row_N.repeat_interleave(lengths_B, output_size=len(self.input_ids_N))
        ids_BT = self.input_ids_N.new_zeros(len(lengths_B), self.max_seqlen)
        mask_BT = torch.zeros_like(ids_BT)
        ids_BT[row_N, self.position_ids_N] = self.input_ids_N
        mask_BT[row_N, self.position_ids_N] = 1
        return ids_BT, mask_BT, (row_N * self.max_seqlen + self.position_ids_N)[self.predict_L]

    def to(self, device: torch.device) -> TokenBatch:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: x.to(device, non_blocking=True) for name, x in values.items() if isinstance(x, Tensor)}
        return TokenBatch(**values | tensors)


def through_first_eos(completion: Sequence[int], eos_ids: Iterable[int]) -> tuple[list[int], bool]:
    """The completion up to and including its first end token, and whether it has one."""
    ends = set(eos_ids)
    for i, token in enumerate(completion):
        if token in ends:
            return list(completion[: i + 1]), True
    return list(completion), False


@dataclass
class MicroBatch:
    """Sequences that pass through the model together, drawn once a rollout and kept so by every inner epoch: the same
    composition gives the same bits, so the ratio before the first optimizer step is exactly 1.
    """

    batch: TokenBatch
    indices: list[int]  # of its sequences in the rollout; none in a micro-batch that only fills up
    sampler_logprob_L: Tensor
    ref_hidden_LH: Tensor
    logprob_L: Tensor
    entropy_L: Tensor
    ref_logprob_L: Tensor
    kl_L: Tensor
    values_KL: Tensor  # K = 0 without a critic
    target_values_KL: Tensor
    advantage_L: Tensor
    returns_L: Tensor


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


def padded_microbatches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of the sequences, the longest first, in groups that hold at most `max_tokens` tokens when padded, or one
    sequence."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not groups or (len(groups[-1]) + 1) * lengths[groups[-1][0]] > max_tokens:
            groups.append([])
        groups[-1].append(i)
    return groups


def balanced(lengths: Sequence[int], ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """Indices of the sequences, cut over ranks and then over micro-batches, each time balanced by tokens.

    A micro-batch holds at most `max_tokens` tokens, or one sequence. Every rank gets the same number of micro-batches,
    as sharded models need; only a rank with fewer sequences than that gets empty ones.
    """
    shares = longest_first(range(len(lengths)), lengths, ranks)
    heaviest = max((sum(lengths[i] for i in share) for share in shares), default=0)
    count = max(1, -(-heaviest // max_tokens))
    while True:
        cuts = [longest_first(share, lengths, count) for share in shares]
        if all(len(group) <= 1 or sum(lengths[i] for i in group) <= max_tokens for cut in cuts for group in cut):
            return cuts
        count += 1


def balanced_rows(lengths: Sequence[int], ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """The same for padded micro-batches, of sequences of like length; a rank may have more of them than another."""
    shares = longest_first(range(len(lengths)), lengths, ranks)
    cuts = [padded_microbatches([lengths[i] for i in share], max_tokens) for share in shares]
    return [[[share[j] for j in group] for group in cut] for share, cut in zip(shares, cuts, strict=True)]


def longest_first(indices: Iterable[int], lengths: Sequence[int], groups: int) -> list[list[int]]:
    """`groups` groups in the order of `indices`; the longest sequence goes first, each into the lightest group."""
    chosen: list[list[int]] = [[] for _ in range(groups)]
    tokens = [0] * groups
    for i in sorted(indices, key=lambda i: (-lengths[i], i)):
        lightest = min(range(groups), key=lambda g: (tokens[g], len(chosen[g])))
        chosen[lightest].append(i)
        tokens[lightest] += lengths[i]
    return [sorted(group) for group in chosen]


@dataclass(frozen=True)
class Prompt:
    text: str | Messages  # as the data set has it; of one that is too long, what is left
    ids: list[int]
    columns: dict[str, Any]  # the row's other fields, passed on to the rewards
    is_cut: bool = False  # to max_prompt_tokens


class PromptDataset:
    """Rows with a prompt, tokenized when asked for.

    A prompt is the field `prompt` (text, or chat messages), or the turns up to the user's last one of the field
    `messages` (chat messages) or `chosen` (chat messages, or a transcript as Anthropic/hh-rlhf has them).
    `at(start, count)` is a pure function of the seed and the position, so a resumed run sees the same prompts.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], tokenizer: Any, max_prompt_tokens: int, seed: int = 0):
        if isinstance(rows, Mapping) or not hasattr(rows, "__len__"):
            raise ConfigError(f"the prompt data set must be a sequence of rows, got a {type(rows).__name__}")
        if len(rows) == 0:
            raise ConfigError("the prompt data set is empty")
        first = rows[0]
        self.field = next((name for name in PROMPT_FIELDS if isinstance(first, Mapping) and name in first), "")
        if not self.field:
            raise ConfigError(
                "the prompt data set needs a 'prompt' field (or 'messages', or hh-rlhf's 'chosen') in each row, got "
                f"{first!r:.200} in row 0"
            )
        self.rows, self.tokenizer, self.max_prompt_tokens, self.seed = rows, tokenizer, max_prompt_tokens, seed
        texts = rows.select_columns([self.field]) if hasattr(rows, "select_columns") else rows  # no image is decoded
        for index, row in zip(range(len(rows)), texts, strict=False):
            text = self.text(index, row)
            if isinstance(text, str) and not text.strip():
                self.prompt(index, row)  # an error, unless the tokenizer adds a token

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, start: int, count: int) -> list[Prompt]:
        """Prompts number start .. start + count - 1 of an endless stream of shuffled epochs."""
        order: dict[int, list[int]] = {}
        prompts = []
        for i in range(start, start + count):
            epoch, position = divmod(i, len(self))
            if epoch not in order:
                order[epoch] = np.random.default_rng([self.seed, epoch]).permutation(len(self)).tolist()
            prompts.append(self[order[epoch][position]])
        return prompts

    def __getitem__(self, index: int) -> Prompt:
        return self.prompt(index, self.rows[index])

    def prompt(self, index: int, row: Mapping[str, Any]) -> Prompt:
        text = self.text(index, row)
        ids = self.tokenize(text)
        if not ids:
            raise ConfigError(f"prompt {index} of the data set is empty: {text!r}")
        is_cut = len(ids) > self.max_prompt_tokens
        if is_cut:
            text, ids = self.cut(text, ids)
        return Prompt(text, ids, {k: v for k, v in row.items() if k != self.field}, is_cut)

    def cut(self, text: str | Messages, ids: list[int]) -> tuple[str | Messages, list[int]]:
        """What fits into `max_prompt_tokens`, as text and as tokens: the rewards judge what the policy was given.

        A text loses its beginning, but not its BOS token. A chat loses its first turns, but not the system's message,
        then the beginning of the user's last turn; where even that is too long, the tokens lose their beginning.
        """
        kept = 1 if ids[0] == self.tokenizer.bos_token_id else 0
        last_ids = ids[:kept] + ids[kept + len(ids) - self.max_prompt_tokens :]
        if isinstance(text, str):
            return self.tokenizer.decode(last_ids[kept:]), last_ids
        for chat in self.shorter(text):
            ids = self.tokenize(chat)
            if len(ids) <= self.max_prompt_tokens:
                return chat, ids
        return text, last_ids

    def shorter(self, chat: Messages) -> Iterator[Messages]:
        """The chat without more and more of its first turns, then of the user's last turn."""
        system = chat[:1] if chat[0]["role"] == "system" else []
        turns = [i for i, message in enumerate(chat) if message["role"] == "user"]
        yield from ([*system, *chat[first:]] for first in turns if first > len(system))
        if not turns or not isinstance(chat[turns[-1]]["content"], str):
            return
        last, *answer = chat[turns[-1] :]
        words = self.tokenizer(last["content"], add_special_tokens=False)["input_ids"]
        excess = len(self.tokenize([*system, last, *answer])) - self.max_prompt_tokens
        for start in range(max(1, excess), len(words)):  # the first of them fits, or nearly: words may merge
            yield [*system, {**last, "content": self.tokenizer.decode(words[start:])}, *answer]

    def text(self, index: int, row: Mapping[str, Any]) -> str | Messages:
        try:
            text = prompt_text(row, self.field)
            if not isinstance(text, str) and self.tokenizer.chat_template is None:
                raise ConfigError(
                    "chat messages need a chat template, and the model's tokenizer has none; take a chat model, "
                    "set tokenizer.chat_template, or use prompts of plain text"
                )
        except ConfigError as error:
            raise ConfigError(f"prompt {index} of the data set: {error}") from None
        return text

    def tokenize(self, text: str | Messages) -> list[int]:
        """A text's tokens as the tokenizer has them; of chat messages, those of the chat template up to the answer."""
        if isinstance(text, str):
            return list(self.tokenizer(text)["input_ids"])
        chat = self.tokenizer.apply_chat_template(text, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(chat, add_special_tokens=False)["input_ids"])


def prompt_text(row: Mapping[str, Any], field: str) -> str | Messages:
    if not isinstance(row, Mapping) or field not in row:
        raise ConfigError(f"a row must have the field {field!r}, got {row!r:.200}")
    value = row[field]
    if not isinstance(value, str) and not is_chat(value):
        raise ConfigError(f"{field!r} must be text, or chat messages with a role each, got {value!r:.200}")
    if field == "prompt":
        return value
    messages = transcript_messages(value) if isinstance(value, str) else value
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        raise ConfigError(f"no turn of a user in {value!r}")
    return messages[: last + 1]


def is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)


def transcript_messages(transcript: str) -> Messages:
    r"""Chat messages of "\n\nHuman: ...\n\nAssistant: ..."; a speaker's turns in a row become one message."""
    opening, *parts = re.split(rf"\n\n({'|'.join(SPEAKERS)}):", transcript)
    if opening.strip() or not parts:
        raise ConfigError(f"not a transcript that starts with '\\n\\nHuman: ': {transcript!r}")
    messages: Messages = []
    for speaker, turn in zip(parts[::2], parts[1::2], strict=True):
        if messages and messages[-1]["role"] == SPEAKERS[speaker]:
            messages[-1]["content"] += "\n\n" + turn.strip()
        else:
            messages.append({"role": SPEAKERS[speaker], "content": turn.strip()})
    return messages


def load_rows(dataset: str) -> Sequence[Mapping[str, Any]]:
    """Rows of a `.jsonl` file (a path, or the name of a shipped one) or of a Hub data set, NAME or NAME:SPLIT."""
    if not dataset.endswith((".jsonl", ".json")):
        import datasets

        name, _, split = dataset.partition(":")
        try:
            return datasets.load_dataset(name, split=split or "train")
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot load the data set {dataset!r}: {error}") from error
    path = next((p for p in (Path(dataset), CONFIGS / dataset) if p.is_file()), None)
    if path is None:
        raise ConfigError(f"no prompt file {dataset!r} (looked here and among the shipped ones in {CONFIGS})")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{path}, line {number}: a row must be a JSON object, one a line, got {line:.100}")
        rows.append(row)
    return rows
