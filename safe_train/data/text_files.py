"""Rows of JSON and of separated values, as they were written, and the lines on which they stand.

`datasets` reads the files. JSON it reads as text, which is decoded when a row is asked for: its reader of JSON makes
timestamps of text that looks like dates and numbers of text like "007", and fixes columns by the first ten megabytes.
"""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import importlib
import itertools
import json
import lzma
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safe_train.config import ConfigError

OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
COMPRESSIONS = (*OPENERS, ".zst")


@dataclass(frozen=True)
class Tables:
    """The splits of a data set."""

    splits: Mapping[str, Any]
    name: str
    lines: Mapping[str, Callable[[int], str]] = field(default_factory=dict)  # of the rows of a split that has lines
    skipped: Sequence[str] = ()  # lines that could not be read, and why

    def place(self, split: str, index: int) -> str:
        if split in self.lines:
            return self.lines[split](index)
        return f"row {index} of {self.name}" + (f":{split}" if len(self.splits) > 1 else "")


class JsonRows(Sequence[dict[str, Any]]):
    """Rows that are JSON, one a line of a table of text."""

    def __init__(self, lines: Any, column_names: Sequence[str]):
        self.lines, self.column_names = lines, list(column_names)

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: Any) -> Any:
        return json.loads(self.lines[index]["text"])

    def select(self, rows: Sequence[int]) -> JsonRows:
        return JsonRows(self.lines.select(rows), self.column_names)

    @classmethod
    def joined(cls, parts: Sequence[JsonRows]) -> JsonRows:
        import datasets

        names = dict.fromkeys(name for part in parts for name in part.column_names)
        return cls(datasets.concatenate_datasets([part.lines for part in parts]), [*names])


def load(builder: str, paths: Sequence[Path], **options: Any) -> Any:
    """One table, mapped from a file that is deleted already: it takes no memory, and leaves nothing to clean."""
    import datasets

    files = [glob.escape(str(path.resolve())) for path in paths]
    with tempfile.TemporaryDirectory() as cache:
        return datasets.load_dataset(builder, data_files=files, split="train", cache_dir=cache, **options)


def load_text(path: Path, sample_by: str) -> Any:
    """Lines, or the whole document; a byte that is not UTF-8 becomes an escape that JSON does not have."""
    import datasets

    text = datasets.Features({"text": datasets.Value("string")})
    options = {"encoding": "utf-8-sig", "encoding_errors": "backslashreplace", "features": text}
    return load("text", [path], sample_by=sample_by, **options)


def read_json(paths: Sequence[Path], name: str, kind: str, on_bad_row: str) -> Tables:
    """Rows one a line, an array of rows, or an object with a field of rows, or several: its splits."""
    files = [load_text(path, "line") for path in paths]
    if has_rows_in_lines(files[0], kind):
        return read_json_lines(paths, files, name, on_bad_row)
    documents = [json.loads(load_text(path, "document")[0]["text"]) for path in paths]
    if all(isinstance(document, list) for document in documents):
        return Tables({"train": table_of(itertools.chain(*documents), name)}, name)
    fields = {k: v for k, v in documents[0].items() if isinstance(v, list) and v and isinstance(v[0], dict)}
    if len(paths) > 1 or not fields:
        raise ConfigError(
            f"{name} must hold an array of rows, or one object in which a field is a list of rows, got an object with "
            f"{', '.join(documents[0])}"
        )
    splits = {field: table_of(rows, name) for field, rows in fields.items()}
    return Tables(splits if len(splits) > 1 else {"train": next(iter(splits.values()))}, name)


def has_rows_in_lines(lines: Any, kind: str) -> bool:
    first, *more = [*itertools.islice((row["text"] for row in lines if row["text"].strip()), 2)] or [""]
    if first.lstrip().startswith("["):
        return False
    if kind != ".json" or more:
        return kind != ".json" or not why_no_row(first)
    row = {} if why_no_row(first) else json.loads(first)
    return not any(isinstance(v, list) and v and isinstance(v[0], dict) and "role" not in v[0] for v in row.values())


def table_of(rows: Any, name: str) -> JsonRows:
    import datasets

    names: dict[str, None] = {}
    lines = []
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ConfigError(f"row {index} of {name}: a row must be a JSON object, got {row!r:.100}")
        names |= dict.fromkeys(row)
        lines.append(json.dumps(row))
    return JsonRows(datasets.Dataset.from_dict({"text": lines}), [*names])


def read_json_lines(paths: Sequence[Path], files: Sequence[Any], name: str, on_bad_row: str) -> Tables:
    names: dict[str, None] = {}
    kept: list[list[int]] = [[] for _ in paths]  # line numbers
    bad = []
    for path, lines, numbers in zip(paths, files, kept, strict=True):
        for number, line in enumerate(lines, start=1):
            if reason := why_no_row(line["text"]):
                bad.append(f"line {number} of {path}: {reason}")
            elif line["text"].strip():
                names |= dict.fromkeys(json.loads(line["text"]))
                numbers.append(number)
    refuse(bad, sum(map(len, kept)), name, on_bad_row)
    tables = [JsonRows(f, [*names]).select([n - 1 for n in numbers]) for f, numbers in zip(files, kept, strict=True)]
    places = [(path, numbers) for path, numbers in zip(paths, kept, strict=True)]
    return Tables({"train": JsonRows.joined(tables)}, name, {"train": lambda index: place(index, places)}, bad)


def why_no_row(line: str) -> str:
    """Why a line that is not blank is no row, or nothing."""
    if not line.strip():
        return ""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return f"{error.msg} at character {error.colno}: {line:.100}"
    return "" if isinstance(row, dict) else f"a row must be a JSON object, one a line, got {line:.100}"


def place(index: int, files: Sequence[tuple[Path, Sequence[int]]]) -> str:
    for path, numbers in files:
        if index < len(numbers):
            return f"line {numbers[index]} of {path}"
        index -= len(numbers)
    raise IndexError(index)


def refuse(bad: Sequence[str], rows: int, name: str, on_bad_row: str) -> None:
    if bad and on_bad_row == "error":
        raise ConfigError(f"{bad[0]} (lines that cannot be read: {len(bad)}; on_bad_row=skip leaves them out)")
    if not rows:
        raise ConfigError(f"the prompt data set is empty: {name}")


def read_csv(paths: Sequence[Path], name: str, separator: str, on_bad_row: str) -> Tables:
    """Every column as text, as it was written: NA is no missing value, and 007 is not 7.

    pandas, with which the library reads, moves the columns where a line has more fields than the header.
    """
    import datasets
    import pandas

    kept: list[list[int]] = []
    bad = []
    for path in paths:
        records = csv_records(path, separator)
        width = len(next(records, (0, []))[1])
        numbers = []
        for number, fields in records:
            if len(fields) > width:
                bad.append(f"line {number} of {path}: {len(fields)} fields, where the header has {width}")
            else:
                numbers.append(number)
        kept.append(numbers)
    refuse(bad, sum(map(len, kept)), name, on_bad_row)
    columns = pandas.read_csv(paths[0], sep=separator, nrows=0).columns
    text = datasets.Features({str(column): datasets.Value("string") for column in columns})
    places = list(zip(paths, kept, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        copies = paths
        if bad:
            copies = [without(*file, Path(folder) / f"{i}.csv", separator) for i, file in enumerate(places)]
        table = load("csv", copies, sep=separator, keep_default_na=False, features=text)
    return Tables({"train": table}, name, {"train": lambda index: place(index, places)}, bad)


def csv_records(path: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Records and the lines on which they begin, the header first: a quoted field may span lines."""
    csv.field_size_limit(sys.maxsize)
    with opened(path) as file:
        reader = csv.reader(decoded(path, file), delimiter=separator)
        number = 1
        for record in reader:
            if record:
                yield number, record
            number = reader.line_num + 1


def without(path: Path, numbers: Sequence[int], copy: Path, separator: str) -> Path:
    """A copy of a table with its header and the records that begin on these lines."""
    wanted = set(numbers)
    header, *_ = itertools.islice(csv_records(path, separator), 1)
    records = (fields for number, fields in csv_records(path, separator) if number in wanted)
    with copy.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=separator).writerows(itertools.chain([header[1]], records))
    return copy


def opened(path: Path) -> Any:
    """The bytes of a file that may be compressed."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        return require_zstandard(path).open(path, "rb")
    return OPENERS.get(suffix, open)(path, "rb")


def require_zstandard(path: Path) -> Any:
    try:
        return importlib.import_module("zstandard")
    except ImportError:
        raise ConfigError(f"{path} needs a package: pip install zstandard") from None


def decoded(path: Path, file: Any) -> Iterator[str]:
    for number, text in enumerate(file, start=1):
        try:
            yield text.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"line {number} of {path} is not UTF-8: {error}") from None
