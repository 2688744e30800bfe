"""The prompts of a run: rows, rendered and tokenized, in an order that the seed decides."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from safe_train import parallel
from safe_train.config import ConfigError, SafeConfig, require_name
from safe_train.data.chat import Chat, Messages, cut_chat, cut_text, text_tokens, without_nulls
from safe_train.data.datasets_io import Source, from_python, read
from safe_train.data.formats import BESIDE, PromptFormat
from safe_train.screen import bar

SHOWN = 2000  # characters of the first prompt


@dataclass(frozen=True)
class Prompt:
    text: str | Messages  # as the data set has it; of one that is too long, what is left
    ids: list[int]
    columns: dict[str, Any]  # the row's other fields, passed on to the rewards
    is_cut: bool = False  # to max_prompt_tokens


@dataclass
class Seen:
    """What there is to say of the prompts that were rendered."""

    prompts: int = 0
    cut: int = 0
    longest: int = 0  # in tokens
    texts: Counter[int] = field(default_factory=Counter)
    skipped: list[str] = field(default_factory=list)

    def add(self, prompt: Prompt) -> None:
        self.prompts += 1
        self.cut += prompt.is_cut
        self.longest = max(self.longest, len(prompt.ids))
        self.texts[hash(tuple(prompt.ids))] += 1

    @property
    def repeated(self) -> int:
        return self.prompts - len(self.texts)


class PromptDataset:
    """Rows with a prompt, tokenized when asked for; `formats` has the columns and their order.

    `at(start, count)` is a pure function of the seed and the position, so a resumed run sees the same prompts. The
    first `visits` prompts of the run (default: all rows) are rendered at once, so that a row that cannot be is an error
    before the run, or is left out with `on_bad_row` skip. `is_held_out` says that they are visited in turn.
    """

    def __init__(
        self,
        rows: Any,
        tokenizer: Any,
        max_prompt_tokens: int,
        seed: int = 0,
        *,
        format: PromptFormat | None = None,
        columns: list[str] | None = None,
        visits: int | None = None,
        on_bad_row: str = "error",
        is_held_out: bool = False,
    ):
        self.source = rows if isinstance(rows, Source) else from_python(rows)
        self.rows, self.tokenizer = self.source.rows, tokenizer
        self.max_prompt_tokens, self.seed = max_prompt_tokens, seed
        self.on_bad_row, self.is_held_out = on_bad_row, is_held_out
        self.bad: set[int] = set()  # rows that are left out
        self.fingerprints: dict[int, str] = {}  # by the number of prompts
        first = self.first = self.first_row()
        names = column_names(self.rows, first)
        self.format = (format or PromptFormat()).of_rows(first, names)
        self.columns = columns
        if missing := [name for name in columns or () if name not in names]:
            raise ConfigError(f"columns {', '.join(missing)}: not in the data set, which has {', '.join(names)}")
        self.inputs = self.rows
        if hasattr(self.rows, "select_columns"):  # no image is decoded, no column read that nobody wants
            needed = [name for name in names if name == self.format.prompt_column or name in BESIDE]
            self.inputs = self.rows.select_columns(needed)
            self.rows = self.rows.select_columns([n for n in names if n in needed or columns is None or n in columns])
        self.seen = Seen(skipped=list(self.source.skipped))
        self.check(visits)

    def first_row(self) -> Any:
        if len(self.rows) == 0:
            raise ConfigError("the prompt data set is empty")
        return self.rows[0]

    def check(self, visits: int | None) -> None:
        """Renders the prompts that the run will visit."""
        rows: Iterable[int] = range(len(self.rows)) if self.is_held_out or visits is None else self.order(0)
        wanted = len(self.rows) if visits is None else min(visits, len(self.rows))
        with bar("rendering prompts", wanted, "prompt") as progress:
            for index in rows:
                if self.seen.prompts == wanted:
                    break
                if (prompt := self.try_row(index, row_of(self.inputs, index))) is not None:
                    self.seen.add(prompt)
                    progress.update()
        if not self.seen.prompts:
            raise ConfigError(f"no row of the data set can be used: {self.seen.skipped[0]}")

    def try_row(self, index: int, row: Any) -> Prompt | None:
        """The prompt of a row; None for one that is left out."""
        try:
            return self.prompt(index, row)
        except ConfigError as error:
            if self.on_bad_row == "error":
                raise
            self.bad.add(index)
            self.seen.skipped.append(str(error))
            return None

    def __len__(self) -> int:
        return len(self.rows) - len(self.bad)

    @property
    def known_length(self) -> int | None:
        """How many prompts an epoch has; None for a stream."""
        return len(self)

    @property
    def total(self) -> int | None:
        """How many rows there are, with those that are left out, of which a longer run may find more."""
        return len(self.rows)

    @property
    def visited(self) -> int:
        """How many prompts were rendered, those that the run will visit; one of a stream."""
        return self.seen.prompts

    def fingerprint(self, count: int) -> str:
        """What tells the first `count` prompts of the run from others, as the data set has them."""
        if count not in self.fingerprints:
            rows = self.order(0)[:count]
            self.fingerprints[count] = digest(self.content(row_of(self.inputs, index)) for index in rows)
        return self.fingerprints[count]

    def content(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What the prompt of a row is made of."""
        return {name: row[name] for name in (str(self.format.prompt_column), *BESIDE) if name in row}

    def order(self, epoch: int) -> list[int]:
        """The rows of an epoch, shuffled, without those that are left out."""
        shuffled = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows)).tolist()
        return [index for index in shuffled if index not in self.bad]

    def at(self, start: int, count: int) -> list[Prompt]:
        """Prompts number start .. start + count - 1 of an endless stream of shuffled epochs."""
        orders: dict[int, list[int]] = {}
        prompts = []
        for i in range(start, start + count):
            epoch, position = divmod(i, len(self))
            if epoch not in orders:
                orders[epoch] = self.order(epoch)
            prompts.append(self[orders[epoch][position]])
        return prompts

    def in_turn(self, start: int, count: int) -> list[Prompt]:
        """The same without shuffling, for evaluations."""
        rows = [index for index in range(len(self.rows)) if index not in self.bad]
        return [self[rows[i % len(rows)]] for i in range(start, start + count)]

    def __getitem__(self, index: int) -> Prompt:
        return self.prompt(index, row_of(self.rows, index))

    def prompt(self, index: int, row: Any) -> Prompt:
        try:
            if isinstance(row, UnicodeDecodeError):
                raise ConfigError(f"it is not UTF-8: {row}")
            return self.rendered(self.format(row), row)
        except ConfigError as error:
            place = self.source.place(index)
            raise ConfigError(f"prompt {index} of the data set{place and f' ({place})'}: {error}") from None

    def rendered(self, text: str | Chat, row: Mapping[str, Any]) -> Prompt:
        tokenizer, limit = self.tokenizer, self.max_prompt_tokens
        kept = row.keys() if self.columns is None else self.columns
        columns = {name: row[name] for name in kept if name in row and name != self.format.prompt_column}
        if isinstance(text, Chat):
            ids = text.tokens(tokenizer)
            left = cut_chat(tokenizer, text, ids, limit) if len(ids) > limit else (text.messages, ids)
            return Prompt(*left, columns, len(ids) > limit)
        ids = text_tokens(tokenizer, text)
        if not ids:
            raise ConfigError(f"it is empty: {text!r}")
        left_text = cut_text(tokenizer, text, ids, limit) if len(ids) > limit else (text, ids)
        return Prompt(*left_text, columns, len(ids) > limit)

    def summary(self, setting: str) -> str:
        """What was found, and the first prompt of the run as the model will see it, for the terminal."""
        seen, first = self.seen, (self.in_turn if self.is_held_out else self.at)(0, 1)[0]
        counts = f"{seen.prompts} rendered" if seen.prompts else "read as they come"
        counts += f", {seen.cut} of them cut to {self.max_prompt_tokens} tokens" if seen.cut else ""
        counts += f", {seen.repeated} of them repeat another" if seen.repeated else ""
        lines = [f"{setting}: {self.size()}; prompts from {self.format.described()}: {counts}"]
        if seen.skipped:
            lines.append(f"{setting}: {len(seen.skipped)} rows skipped, such as {seen.skipped[0]}")
        if isinstance(first.text, str) and self.tokenizer.chat_template:
            lines.append(
                f"{setting}: the model has a chat template, but these prompts are plain text, which goes to it as it "
                "stands; prompt_as=user makes each a user's turn"
            )
        bos = self.tokenizer.bos_token_id
        begins_texts = bos is not None and text_tokens(self.tokenizer, "a")[:1] == [bos]
        if begins_texts and first.ids[0] != bos:
            lines.append(
                f"{setting}: the chat template writes no {self.tokenizer.bos_token!r}, the BOS token with which the "
                "tokenizer begins texts; chats go to the model as the template has them"
            )
        shown = self.tokenizer.decode(first.ids)
        shown = shown[:SHOWN] + "..." * (len(shown) > SHOWN)
        lines.append(f"{setting}: the first prompt as the model sees it:\n{shown}")
        return "\n".join(lines)

    def size(self) -> str:
        return f"{len(self.rows)} rows"


class PromptStream(PromptDataset):
    """Prompts of an IterableDataset, in its own order, read and rendered as they come.

    A position that was passed already, as in a run that is resumed, is reached by reading from the beginning.
    """

    def first_row(self) -> Any:
        first = next(iter(self.rows), None)
        if first is None:
            raise ConfigError("the prompt data set is empty")
        return first

    def check(self, visits: int | None) -> None:
        self.stream, self.position = self.endless(), 0

    def endless(self) -> Iterator[tuple[int, Any]]:
        """Rows with their numbers, epoch after epoch."""
        for epoch in itertools.count():
            if hasattr(self.rows, "set_epoch"):
                self.rows.set_epoch(epoch)
            self.is_usable = False
            yield from enumerate(self.rows)
            if not self.is_usable:
                raise ConfigError(f"no row of the data set can be used: {self.seen.skipped[0]}")

    def at(self, start: int, count: int) -> list[Prompt]:
        if start < self.position:
            self.stream, self.position = self.endless(), 0
        for _ in range(start - self.position):
            self.pass_by()
        self.position = start + count
        return [self.next_prompt() for _ in range(count)]

    in_turn = at

    def pass_by(self) -> None:
        """One prompt further; where no row is left out, it need not be rendered for that."""
        if self.on_bad_row == "skip":
            self.next_prompt()
        else:
            next(self.stream)
            self.is_usable = True

    def next_prompt(self) -> Prompt:
        while True:
            index, row = next(self.stream)
            prompt = self.try_row(index, row)
            if prompt is not None:
                self.is_usable = True
                return prompt
            parallel.say(f"row skipped: {self.seen.skipped[-1]}")

    @property
    def known_length(self) -> int | None:
        return None

    @property
    def total(self) -> int | None:
        return None

    @property
    def visited(self) -> int:
        return 1

    def fingerprint(self, count: int) -> str:
        """Of the first row: the others come when they are needed."""
        return digest([self.content(self.first)])

    def size(self) -> str:
        return "a stream of rows"


def digest(rows: Iterable[Any]) -> str:
    """The same for the same rows in any file format: tables add keys that say None."""
    found = hashlib.sha256()
    for row in rows:
        text = json.dumps(without_nulls(row), sort_keys=True, default=lambda value: type(value).__name__)
        found.update(text.encode() + b"\n")
    return found.hexdigest()


def column_names(rows: Any, first: Any) -> list[str]:
    known = getattr(rows, "column_names", None)
    if known:
        return list(known)
    return [str(name) for name in first] if isinstance(first, Mapping) else []


def row_of(rows: Any, index: int) -> Any:
    """A row, or the error of one that is not UTF-8, which Arrow notices when it is read."""
    try:
        return rows[index]
    except UnicodeDecodeError as error:
        return error


def load_prompts(rows: Any, setting: str, tokenizer: Any, args: SafeConfig) -> PromptDataset:
    """Renders the prompts that the run will visit, of the rows given or of the data set that the setting names.

    It says what was found.
    """
    import datasets

    is_held_out, name = setting != "dataset", getattr(args, setting)
    visits = args.total_steps * args.prompts_per_step * (1 + args.dynamic_sampling)
    if is_held_out:
        visits = args.eval_completions + parallel.size()
    try:
        if rows is None or isinstance(rows, (str, Path)):
            require_name(setting, name)
            source = read(name, args.on_bad_row)
        else:
            source = from_python(rows, setting)
        kind = PromptStream if isinstance(source.rows, datasets.IterableDataset) else PromptDataset
        prompts = kind(
            source,
            tokenizer,
            args.max_prompt_tokens,
            args.seed,
            format=PromptFormat.of(args),
            columns=args.columns,
            visits=visits,
            on_bad_row=args.on_bad_row,
            is_held_out=is_held_out,
        )
    except ConfigError as error:
        raise ConfigError(f"{setting} {name}: {error}") from error
    parallel.say(prompts.summary(setting))
    return prompts
