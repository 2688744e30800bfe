"""Rows of prompt data sets, in every format that the library `datasets` reads, by one grammar of names.

    PATH[:SPLIT]                                   a file, a folder or a glob, if there is one
    OWNER/NAME[/CONFIG][@REVISION][:SPLIT]         otherwise a data set of the Hub

SPLIT may have slices: `train[:100]`, `train[:10%]+test`.
"""

from __future__ import annotations

import difflib
import glob
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safe_train.config import CONFIGS, ConfigError
from safe_train.data.text_files import COMPRESSIONS, JsonRows, Tables, load, read_csv, read_json, require_zstandard

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
SEPARATORS = {".csv": ",", ".tsv": "\t"}

PART = r"\w[\w.]*(?:\[[^\[\]]*\])?"
WITH_SPLIT = re.compile(rf"(?P<place>.+):(?P<split>{PART}(?:\+{PART})*)")
ON_HUB = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:/(?P<config>[^/@:]+))?(?:@(?P<revision>[^:]+))?")


@dataclass(frozen=True)
class Source:
    """Rows, and what is known of where they stand."""

    rows: Any  # a sequence of rows, or an IterableDataset
    place: Callable[[int], str] = lambda index: ""  # of a row, such as "line 5 of rows.jsonl"
    skipped: Sequence[str] = ()  # lines that could not be read, and why


def load_rows(dataset: str) -> Any:
    return read(dataset).rows


def read(dataset: str, on_bad_row: str = "error") -> Source:
    """The data set of that name; with `on_bad_row` skip, without the lines that cannot be read."""
    paths, split = locate(dataset)
    if not paths:
        return Source(read_hub(dataset))
    tables = read_folder(paths[0], on_bad_row) if paths[0].is_dir() else read_files(paths, on_bad_row)
    return take(tables, split)


def from_python(rows: Any, setting: str = "dataset") -> Source:
    """A list of rows, a DataFrame, or what `datasets` has: a Dataset, a DatasetDict or an IterableDataset."""
    if isinstance(rows, (list, tuple)):
        return Source(rows)
    import datasets

    if isinstance(rows, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        splits, wanted = list(rows), "train" if setting == "dataset" else None
        if wanted not in splits and len(splits) != 1:
            raise ConfigError(f"{setting} has the splits {', '.join(splits)}: pass one of them, data[{splits[0]!r}]")
        return Source(rows[wanted if wanted in splits else splits[0]])
    if isinstance(rows, datasets.IterableDataset):
        return Source(rows)
    if hasattr(rows, "to_dict") and hasattr(rows, "iloc"):
        return Source([{str(k): plain(v) for k, v in row.items()} for row in rows.to_dict("records")])
    if isinstance(rows, Mapping) or not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        raise ConfigError(
            f"{setting} must be a list of rows, a DataFrame or a data set of `datasets`, got a {type(rows).__name__}"
        )
    return Source(rows)


def plain(value: Any) -> Any:
    """Lists and numbers in place of NumPy's, at any depth: pandas reads parquet's lists as arrays."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list) else value


def locate(dataset: str) -> tuple[list[Path], str | None]:
    """The paths that a name means, none for a Hub data set's, and the split."""
    if paths := find(dataset):
        return paths, None
    named = WITH_SPLIT.fullmatch(dataset)
    if named and (paths := find(named["place"])):
        return paths, named["split"]
    place = named["place"] if named else dataset
    suffixes = {suffix.lower() for suffix in Path(place).suffixes}
    if place.startswith((".", "/", "~")) or glob.has_magic(place) or suffixes & {*FORMATS, *COMPRESSIONS}:
        folder = Path(place).expanduser().parent
        files = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        near = difflib.get_close_matches(Path(place).name, files, n=1, cutoff=0.8)
        hint = f"; did you mean {str(folder / near[0])!r}?" if near else ""
        raise ConfigError(f"no prompt file {place!r} (looked here and among the shipped ones in {CONFIGS}){hint}")
    return [], None


def find(place: str) -> list[Path]:
    path = Path(place).expanduser()
    for candidate in (path, CONFIGS / place):
        if place and candidate.exists():
            return [candidate]
    return sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())


def read_hub(dataset: str) -> Any:
    import datasets

    named = WITH_SPLIT.fullmatch(dataset)
    place, split = (named["place"], named["split"]) if named else (dataset, "train")
    parts = ON_HUB.fullmatch(place)
    if parts is None:
        raise ConfigError(
            f"no data set {dataset!r}: there is no such path, and a Hub data set is "
            "OWNER/NAME[/CONFIG][@REVISION][:SPLIT], such as openai/gsm8k/main:train[:100]"
        )
    try:
        return datasets.load_dataset(parts["name"], parts["config"], split=split, revision=parts["revision"])
    except Exception as error:  # the library's own, or those of the Hub, pyarrow, fsspec
        raise ConfigError(f"cannot load the data set {dataset!r} (there is no such path here): {error}") from error


def read_folder(folder: Path, on_bad_row: str) -> Tables:
    """A folder of `save_to_disk`, or one of files, such as a copy of a Hub data set, whose names say their splits."""
    import datasets

    try:
        if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(str(folder))
            return Tables(found if isinstance(found, Mapping) else {"train": found}, str(folder))
        with tempfile.TemporaryDirectory() as cache:
            files = datasets.load_dataset_builder(str(folder), cache_dir=cache).config.data_files or {}
    except Exception as error:
        raise ConfigError(f"cannot read the data set in {folder}: {error}") from error
    if not files:
        raise ConfigError(f"{folder} holds no data set: neither what save_to_disk writes, nor files of rows")
    tables = {str(split): read_files([Path(path) for path in paths], on_bad_row) for split, paths in files.items()}
    return Tables(
        {split: table.splits["train"] for split, table in tables.items()},
        str(folder),
        {split: table.lines["train"] for split, table in tables.items() if "train" in table.lines},
        [line for table in tables.values() for line in table.skipped],
    )


def read_files(paths: list[Path], on_bad_row: str) -> Tables:
    kinds = sorted({format_of(path) for path in paths})
    name = str(paths[0]) if len(paths) == 1 else f"{len(paths)} files in {paths[0].parent}"
    if len(kinds) > 1:
        raise ConfigError(f"the files of a data set must have one format, got {', '.join(kinds)} in {name}")
    try:
        if kinds[0] in SEPARATORS:
            return read_csv(paths, name, SEPARATORS[kinds[0]], on_bad_row)
        if kinds[0] in (".parquet", ".arrow"):
            return Tables({"train": load(kinds[0][1:], paths)}, name)
        return read_json(paths, name, kinds[0], on_bad_row)
    except ConfigError:
        raise
    except Exception as error:  # the library's own, or those of pyarrow, pandas, gzip
        if "corresponds to no data" in str(error):
            raise ConfigError(f"the prompt data set is empty: {name}") from None
        raise ConfigError(f"cannot read {name}: {error.__cause__ or error}") from error


def format_of(path: Path) -> str:
    """The extension that says what is inside, in lower case and without that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS and suffixes.pop() == ".zst":
        require_zstandard(path)
    if not suffixes or suffixes[-1] not in FORMATS:
        raise ConfigError(
            f"cannot tell the format of {path} by its name: it must end with one of {', '.join(FORMATS)}, and may be "
            f"compressed ({', '.join(COMPRESSIONS)})"
        )
    return suffixes[-1]


def take(tables: Tables, split: str | None) -> Source:
    """The rows of a split, which may have slices, as `datasets` cuts them."""
    import datasets

    names = list(tables.splits)
    if split is None and "train" not in names and len(names) > 1:
        raise ConfigError(f"{tables.name} has no split 'train', but {', '.join(names)}: name one, {tables.name}:SPLIT")
    split = split or ("train" if "train" in names else names[0])
    try:
        lengths = {name: len(table) for name, table in tables.splits.items()}
        cuts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(f"no split {split!r} in {tables.name}, which has {', '.join(names)}: {error}") from error
    ranges = [(cut.splitname, range(lengths[cut.splitname])[cut.from_ : cut.to]) for cut in cuts]
    parts = [tables.splits[name].select(rows) for name, rows in ranges]

    def place(index: int) -> str:
        origin = [(name, row) for name, rows in ranges for row in rows]
        return tables.place(*origin[index])

    if len(parts) == 1:
        return Source(parts[0], place, tables.skipped)
    if isinstance(parts[0], JsonRows):
        return Source(JsonRows.joined(parts), place, tables.skipped)
    return Source(datasets.concatenate_datasets(parts), place, tables.skipped)
