"""The completions of a run: an index in memory, the texts on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safe_train.watch.tail import Line, Tail, row_of

ORDERS = ("newest", "oldest", "highest", "lowest")
PAGE = 20
LONGEST_TEXT = 20_000  # characters of a cell


class Place(NamedTuple):
    """A row of the file."""

    offset: int
    length: int
    step: int
    row: int  # of its step, from 0
    reward: float | None
    prompt: str


class Query(NamedTuple):
    order: str = "newest"
    lowest: float = -math.inf
    highest: float = math.inf
    first_step: int = 0
    last_step: int | None = None
    prompt: str = ""  # a part of it
    has_tokens: bool = False
    page: int = 0

    def takes(self, place: Place) -> bool:
        is_bounded = self.lowest > -math.inf or self.highest < math.inf
        has_reward = not is_bounded if place.reward is None else self.lowest <= place.reward <= self.highest
        has_step = self.first_step <= place.step and (self.last_step is None or place.step <= self.last_step)
        return has_reward and has_step and self.prompt.lower() in place.prompt.lower()


class Samples:
    """samples.jsonl or evaluation.jsonl, with tokens.jsonl where it has their tokens."""

    def __init__(self, path: Path, tokens: Path | None = None):
        self.tail = Tail(path)
        self.tokens_tail = None if tokens is None else Tail(tokens)
        self.places: list[Place] = []
        self.token_places: dict[tuple[int, int], Line] = {}
        self.prompts: dict[str, str] = {}  # each is in memory once

    @property
    def tails(self) -> list[Tail]:
        return [tail for tail in (self.tail, self.tokens_tail) if tail is not None]

    def refresh(self) -> None:
        self.tail.feed(self.add, self.clear)
        if self.tokens_tail is not None:
            self.tokens_tail.feed(self.add_tokens, self.token_places.clear)

    def clear(self) -> None:
        self.places, self.prompts = [], {}

    def add_tokens(self, line: Line) -> None:
        if type(line.row.get("row")) is int:
            self.token_places[line.row["step"], line.row["row"]] = line._replace(row={})

    def add(self, line: Line) -> None:
        row, last = line.row, self.places[-1] if self.places else None
        number = last.row + 1 if last is not None and last.step == row["step"] else 0
        prompt = text_of(row.get("prompt"))
        given, reward = row.get("reward"), None
        if isinstance(given, (int, float)) and math.isfinite(given):
            reward = float(given)
        known = self.prompts.setdefault(prompt, prompt)
        self.places.append(Place(line.offset, line.length, row["step"], number, reward, known))

    def select(self, query: Query) -> tuple[int, list[dict[str, Any]]]:
        """How many rows the query takes, and those of its page, with their tokens."""
        found = [place for place in self.places if query.takes(place)]
        if query.has_tokens:
            found = [place for place in found if (place.step, place.row) in self.token_places]
        if query.order in ("highest", "lowest"):
            sign = -1 if query.order == "highest" else 1
            found = sorted((x for x in found if x.reward is not None), key=lambda x: sign * (x.reward or 0.0))
        elif query.order == "newest":
            found = found[::-1]
        page = found[query.page * PAGE : (query.page + 1) * PAGE]
        return len(found), list(self.rows(page))

    def rows(self, places: list[Place]) -> Iterator[dict[str, Any]]:
        for place in places:
            row = read_row(self.tail.path, place.offset, place.length, place.step)
            if row is None:  # the file was replaced a moment ago
                continue
            line = self.token_places.get((place.step, place.row))
            tokens = None
            if line is not None and self.tokens_tail is not None:
                tokens = read_row(self.tokens_tail.path, line.offset, line.length, place.step)
            more = {k: v for k, v in row.items() if k not in ("step", "prompt", "completion", "reward")}
            yield {
                "step": place.step,
                "prompt": cut(place.prompt),
                "completion": cut(text_of(row.get("completion"))),
                "reward": place.reward,
                "more": {name: cut(text_of(value)) for name, value in more.items()},
                "tokens": tokens if is_whole(tokens) else None,
            }


def read_row(path: Path, offset: int, length: int, step: int) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            row = row_of(file.read(length))
    except OSError:
        return None
    return row if row is not None and row["step"] == step else None


def is_whole(tokens: dict[str, Any] | None) -> bool:
    """Whether it has a text and all numbers of each token."""
    columns = [(tokens or {}).get(name) for name in ("tokens", "logprob", "entropy", "kl")]
    lengths = {len(x) if isinstance(x, list) else -1 for x in columns}
    return len(lengths) == 1 and -1 not in lengths


def text_of(value: Any) -> str:
    """Text as it is, a chat as its turns, a number with four digits, anything else as JSON."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and value and all(isinstance(x, dict) and "content" in x for x in value):
        return "\n".join(f"{x.get('role', '')}: {text_of(x['content'])}" for x in value)
    return json.dumps(value, ensure_ascii=False)


def cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} … ({len(text):,} characters in all)"
