"""From a row to its prompt, in the public formats: plain text, or a chat."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from safe_train.config import ConfigError, SafeConfig
from safe_train.data.chat import Chat, Messages, as_tools, read_tools

PROMPT_COLUMNS = ("prompt", "messages", "conversations", "chosen", "question", "instruction")  # the first that is there
WITH_ANSWER = ("messages", "conversations", "chosen")  # these hold the answer as well
BESIDE = ("input", "tools", "chat_template_kwargs", "continue_final_message")  # what else decides a prompt
SPEAKERS = {"Human": "user", "Assistant": "assistant"}  # of a transcript such as Anthropic/hh-rlhf's
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "function_call": "assistant"}  # ShareGPT's
ROLES |= {"observation": "tool", "function": "tool"}
STANDARD_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class PromptFormat:
    """How a row becomes a prompt; see docs/trainer.md."""

    prompt_column: str | None = None
    system_prompt: str | None = None
    prompt_as: str = "text"
    continue_final_message: bool = False
    tools: list[Any] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, args: SafeConfig) -> PromptFormat:
        tools = None if args.tools is None else read_tools(args.tools)
        kwargs = args.chat_template_kwargs or {}
        return cls(args.prompt_column, args.system_prompt, args.prompt_as, args.continue_final_message, tools, kwargs)

    def of_rows(self, first: Any, columns: list[str]) -> PromptFormat:
        """With the column that holds the prompts of these rows."""
        if self.prompt_column is not None:
            if self.prompt_column not in columns:
                near = difflib.get_close_matches(self.prompt_column, columns, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"prompt_column {self.prompt_column!r} is no column of {', '.join(columns)}{hint}")
            return self
        known = [name for name in PROMPT_COLUMNS if name in columns]
        if not known:
            raise ConfigError(
                f"the prompt data set needs a 'prompt' field (or {', '.join(PROMPT_COLUMNS[1:])}) in each row, or "
                f"prompt_column, got {first!r:.200} in row 0"
            )
        return replace(self, prompt_column=next((name for name in known if first.get(name) is not None), known[0]))

    def __call__(self, row: Any) -> str | Chat:
        column = self.prompt_column
        if not isinstance(row, Mapping) or column not in row:
            raise ConfigError(f"a row must have the field {column!r}, got {row!r:.200}")
        value = row[column]
        if column == "chosen" and isinstance(value, str):
            value = transcript_messages(value)
        if column == "instruction" and isinstance(value, str) and row.get("input"):
            value = f"{value}\n\n{row['input']}"
        if isinstance(value, str):
            return self.text(value)
        return self.chat(messages_of(column, value), row)

    def described(self) -> str:
        holds_answers = self.prompt_column in WITH_ANSWER and not self.continue_final_message
        return f"{self.prompt_column!r}{', up to the last turn of a user' * holds_answers}"

    def text(self, value: str) -> str | Chat:
        if self.prompt_as == "user" and value.strip():
            return Chat(self.with_system([{"role": "user", "content": value}]), self.tools, self.template_kwargs)
        if self.system_prompt is not None and self.prompt_as == "text":
            raise ConfigError(
                f"system_prompt needs chats, got text, {value!r:.200}: set prompt_as=user, which makes it a user's turn"
            )
        return value

    def chat(self, messages: Messages, row: Mapping[str, Any]) -> Chat:
        said = row.get("continue_final_message")
        is_continued = self.continue_final_message if said is None else bool(said)
        has_answer = messages[-1]["role"] == "assistant"
        if has_answer and not is_continued:
            messages = without_answer(messages, self.prompt_column in WITH_ANSWER)
        if not any(message.get("content") or message.get("tool_calls") for message in messages):
            raise ConfigError(f"it is empty: {messages!r:.200}")
        tools = self.tools if row.get("tools") is None else as_tools(row["tools"])
        kwargs = {**self.template_kwargs, **(row.get("chat_template_kwargs") or {})}
        return Chat(self.with_system(messages), tools, kwargs, has_answer and is_continued)

    def with_system(self, messages: Messages) -> Messages:
        if self.system_prompt is None or messages[0]["role"] in ("system", "developer"):
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]


def messages_of(column: str | None, value: Any) -> Messages:
    """Chat messages with a role each; ShareGPT's say who is speaking in `from`, and what in `value`."""
    is_list = isinstance(value, list) and bool(value) and all(isinstance(message, Mapping) for message in value)
    if is_list and all("role" in message for message in value):
        return value
    if not is_list or not all("from" in message and "value" in message for message in value):
        raise ConfigError(f"{column!r} must be text, or chat messages with a role each, got {value!r:.200}")
    messages = []
    for message in value:
        role = ROLES.get(message["from"], message["from"])
        if role not in STANDARD_ROLES:
            raise ConfigError(
                f"{message['from']!r} is no speaker of ShareGPT's: {', '.join((*ROLES, *STANDARD_ROLES))}"
            )
        messages.append({"role": role, "content": message["value"]})
    return messages


def without_answer(messages: Messages, is_expected: bool) -> Messages:
    """The turns up to the user's last, of a conversation that ends with an assistant's message."""
    if not is_expected:
        raise ConfigError(
            "it ends with an assistant's message: set continue_final_message=true to have the policy continue it, or "
            f"leave it out, got {messages[-1]!r:.200}"
        )
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        raise ConfigError(f"no turn of a user in {messages!r:.200}")
    return messages[: last + 1]


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
