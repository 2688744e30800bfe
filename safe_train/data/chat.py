"""A prompt's tokens, as the model's chat template has them, and the token that ends a turn."""

from __future__ import annotations

import bisect
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safe_train.config import ConfigError

Messages = list[dict[str, Any]]

QUESTION, ANSWERS = "What is it", ("One", "Two?")  # the answers share neither first nor last letter
SYSTEM = {"role": "system", "content": "Answer"}


@dataclass(frozen=True)
class Chat:
    """A conversation and what the template is given beside it."""

    messages: Messages
    tools: list[Any] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    is_continued: bool = False  # the last message is the beginning of the answer

    def render(self, tokenizer: Any) -> str:
        if tokenizer.chat_template is None:
            raise ConfigError(
                "chat messages need a chat template, and the model's tokenizer has none; take a chat model, set "
                "chat_template to a file with one, or use prompts of plain text"
            )
        try:
            return tokenizer.apply_chat_template(
                [without_nulls(message, keep="content") for message in self.messages],
                tools=self.tools and [without_nulls(tool) for tool in self.tools],
                add_generation_prompt=not self.is_continued,
                continue_final_message=self.is_continued,
                tokenize=False,
                **self.template_kwargs,
            )
        except Exception as error:  # a template is a program
            raise ConfigError(f"the chat template refuses it: {type(error).__name__}: {error}") from error

    def tokens(self, tokenizer: Any) -> list[int]:
        return list(tokenizer(self.render(tokenizer), add_special_tokens=False)["input_ids"])


def without_nulls(value: Any, keep: str = "") -> Any:
    """Without the keys that say None at any depth: tables give each object the keys of all."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None or k == keep}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def text_tokens(tokenizer: Any, text: str) -> list[int]:
    """A text's tokens as the tokenizer has them, but no second BOS token where the text begins with one itself."""
    ids = list(tokenizer(text)["input_ids"])
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        own = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids[1:] if len(own) < len(ids) else ids
    return ids


def cut_text(tokenizer: Any, text: str, ids: list[int], limit: int) -> tuple[str, list[int]]:
    """The end of a text, with its BOS token."""
    last_ids = last_tokens(tokenizer, ids, limit)
    return tokenizer.decode(last_ids[kept_tokens(tokenizer, ids) :]), last_ids


def cut_chat(tokenizer: Any, chat: Chat, ids: list[int], limit: int) -> tuple[Messages, list[int]]:
    """A chat without its first turns, but with the system's message; then without the beginning of its last turn.

    Where even that is too long, the tokens lose their beginning.
    """
    for shortened in (by_turns, by_words):
        starts, cut = shortened(tokenizer, chat, limit)
        first = bisect.bisect_left(starts, True, key=lambda start: len(cut(start).tokens(tokenizer)) <= limit)
        if first < len(starts):
            return cut(starts[first]).messages, cut(starts[first]).tokens(tokenizer)
    return chat.messages, last_tokens(tokenizer, ids, limit)


Shortened = tuple[Sequence[int], Callable[[int], Chat]]  # where a chat may begin, and the chat that does


def by_turns(tokenizer: Any, chat: Chat, limit: int) -> Shortened:
    system, turns = split(chat.messages)
    starts = [first for first in turns if first > len(system)]
    return starts, lambda first: replace(chat, messages=[*system, *chat.messages[first:]])


def by_words(tokenizer: Any, chat: Chat, limit: int) -> Shortened:
    """Begins where so many tokens of the user's last turn are left out as are too many, or nearly: words may merge."""
    system, turns = split(chat.messages)
    if not turns or not isinstance(chat.messages[turns[-1]]["content"], str):
        return [], lambda start: chat
    last, *answer = chat.messages[turns[-1] :]
    ids = tokenizer(last["content"], add_special_tokens=False)["input_ids"]
    excess = len(replace(chat, messages=[*system, last, *answer]).tokens(tokenizer)) - limit

    def cut(start: int) -> Chat:
        return replace(chat, messages=[*system, {**last, "content": tokenizer.decode(ids[start:])}, *answer])

    return range(max(1, excess), len(ids)), cut


def split(messages: Messages) -> tuple[Messages, list[int]]:
    """The system's message, and where the user's turns are."""
    system = messages[:1] if messages[0]["role"] == "system" else []
    return system, [i for i, message in enumerate(messages) if message["role"] == "user"]


def last_tokens(tokenizer: Any, ids: list[int], limit: int) -> list[int]:
    kept = kept_tokens(tokenizer, ids)
    return ids[:kept] + ids[kept + len(ids) - limit :]


def kept_tokens(tokenizer: Any, ids: list[int]) -> int:
    return 1 if ids[0] == tokenizer.bos_token_id else 0


def read_tools(path: str) -> list[Any]:
    """The tools of a JSON file: a list of them, as the chat template is given it."""
    return as_tools(read_text("tools", path))


def as_tools(value: Any) -> list[Any]:
    """A list of tools, which may be written as JSON, as tables hold them."""
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ConfigError(f"tools must be a list, or one written as JSON ({error}), got {value!r:.200}") from None
    if not isinstance(tools, list):
        raise ConfigError(f"tools must be a list, or one written as JSON, got {value!r:.200}")
    return tools


def read_text(setting: str, path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {setting} {path!r}, which must be a file: {error}") from None


def turn_end(tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> list[int]:
    """The added token that the chat template writes behind an answer, if it does.

    It is in what two chats have in common behind their answers, which end differently: so the template may alter words.
    A template that takes none of these chats, or writes none of their words, has no such token.
    """
    if not tokenizer.chat_template:
        return []
    for system, as_parts in itertools.product(([], [SYSTEM]), (False, True)):
        chats = [[*system, {"role": "user", "content": QUESTION}, {"role": "assistant", "content": a}] for a in ANSWERS]
        try:
            first, second = (
                tokenizer.apply_chat_template(
                    [in_parts(message) for message in chat] if as_parts else chat,
                    tokenize=False,
                    **(template_kwargs or {}),
                )
                for chat in chats
            )
        except Exception:  # a template is a program, and this one takes no such chat
            continue
        if first != second:
            behind = os.path.commonprefix([first[::-1], second[::-1]])[::-1].lstrip()
            ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
            return [token for token in ids[:1] if token in tokenizer.added_tokens_decoder]
    return []


def in_parts(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}
