import bz2
import gzip
import json
import lzma
import sys

import datasets
import pandas
import pytest

from safe_train.config import ConfigError
from safe_train.data.datasets_io import from_python, load_rows, read

# What a reader might take for something else: a date, a number, a missing value, objects that differ in their keys.
ROWS = [
    {
        "prompt": "2020-01-01",
        "messages": [{"role": "user", "content": "Kühe"}],
        "answer": "007",
        "tools": [{"name": "a", "parameters": {"x": {"type": "int"}}}],
        "n": 1,
    },
    {
        "prompt": "a\nb, c\u2028d",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "muh"}]}],
        "answer": "NA",
        "tools": [{"name": "b", "parameters": {"y": {"type": "str"}}}],
        "n": 2,
    },
]
TEXT_ROWS = [{"prompt": row["prompt"], "answer": row["answer"]} for row in ROWS]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
OPENERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def rows(dataset, **options):
    return list(read(dataset, **options).rows)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", LINES),
        ("ROWS.JSONL", b"\xef\xbb\xbf" + LINES),
        ("rows.ndjson", LINES.replace(b"\n", b"\r\n\n")),
        ("rows.json", LINES),
        ("rows.json", json.dumps(ROWS)),
        ("rows.Json", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=1).encode()),
        ("rows.jsonl", json.dumps(ROWS)),
        *((f"rows.jsonl.{end}", compress(LINES)) for end, compress in OPENERS.items()),
        ("rows.json.GZ", gzip.compress(json.dumps(ROWS).encode())),
        ("odd [1] *name?.jsonl", LINES),
    ],
)
def test_json_gives_the_rows_that_were_written(name, content, tmp_path):
    assert rows(written(tmp_path / name, content)) == ROWS


@pytest.mark.parametrize(("end", "separator"), [("csv", ","), ("TSV", "\t"), ("csv.gz", ","), ("tsv.bz2", "\t")])
def test_separated_values_are_the_text_that_was_written(end, separator, tmp_path):
    frame = pandas.DataFrame(TEXT_ROWS)
    text = ("\ufeff" + frame.to_csv(index=False, sep=separator)).encode()
    compress = OPENERS.get(end.rpartition(".")[2], lambda content: content)
    assert rows(written(tmp_path / f"rows.{end}", compress(text))) == TEXT_ROWS
    numbers = written(tmp_path / "n.csv", "prompt,answer\n1,007\n2.50,\n")
    assert rows(numbers) == [{"prompt": "1", "answer": "007"}, {"prompt": "2.50", "answer": ""}]


def test_tables_of_arrow(tmp_path):
    table = datasets.Dataset.from_list(TEXT_ROWS)
    table.to_parquet(str(tmp_path / "rows.PARQUET"))
    assert rows(str(tmp_path / "rows.PARQUET")) == TEXT_ROWS
    table.save_to_disk(str(tmp_path / "saved"))
    assert rows(str(tmp_path / "saved")) == TEXT_ROWS
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    assert rows(str(arrow)) == TEXT_ROWS


def test_objects_with_fields_of_rows_and_folders_have_splits(tmp_path):
    splits = {"train": [{"prompt": "a"}, {"prompt": "b"}], "test": [{"prompt": "c"}]}
    one = written(tmp_path / "one.json", json.dumps({"version": 3, "data": splits["train"]}, indent=1))
    several = written(tmp_path / "several.json", json.dumps(splits))
    saved, files = str(tmp_path / "saved"), tmp_path / "files"
    datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits.items()}).save_to_disk(saved)
    for name, values in splits.items():
        written(files / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in values))
    assert rows(one) == splits["train"]
    for name in (several, saved, str(files)):
        assert rows(name) == splits["train"] and rows(f"{name}:test") == splits["test"]
        assert rows(f"{name}:train[1:]+test") == [{"prompt": "b"}, {"prompt": "c"}]
        with pytest.raises(ConfigError, match="no split 'dev' in .*, which has t"):
            read(f"{name}:dev")
    assert read(f"{files}:test").place(0) == f"line 1 of {files}/test.jsonl"
    written(tmp_path / "tables" / "data" / "train-0.csv", "prompt,answer\na,007\n")
    assert rows(str(tmp_path / "tables")) == [{"prompt": "a", "answer": "007"}], "as in a file by itself"
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ConfigError, match="cannot read the data set in|holds no data set"):
        read(str(tmp_path / "nothing"))
    shards = read(f"{files}/t*.jsonl")
    assert list(shards.rows) == [*splits["test"], *splits["train"]]
    assert [shards.place(i) for i in (0, 2)] == [f"line 1 of {files}/test.jsonl", f"line 2 of {files}/train.jsonl"]
    with pytest.raises(ConfigError, match="has no split 'train', but test, dev: name one, "):
        read(written(tmp_path / "other.json", json.dumps({"test": splits["test"], "dev": splits["test"]})))


def test_a_row_is_found_by_its_line(tmp_path):
    """Blank lines, a quoted field of two lines, slices and skipped lines count as they do in an editor."""
    lines = written(tmp_path / "rows.jsonl", '\n{"prompt": "a"}\n\n{"prompt": "b"}\n{"prompt": "c"}\n')
    assert [read(lines).place(i) for i in range(3)] == [f"line {n} of {lines}" for n in (2, 4, 5)]
    assert [read(f"{lines}:train[1:]").place(i) for i in range(2)] == [f"line {n} of {lines}" for n in (4, 5)]
    table = written(tmp_path / "rows.csv", 'prompt,answer\n"a\nb",1\n\nc,2\nd,3,4\ne,5\n')
    kept = read(table, on_bad_row="skip")
    assert [row["prompt"] for row in kept.rows] == ["a\nb", "c", "e"]
    assert [kept.place(i) for i in range(3)] == [f"line {n} of {table}" for n in (2, 5, 7)]
    assert list(kept.skipped) == [f"line 6 of {table}: 3 fields, where the header has 2"]
    assert read(written(tmp_path / "rows.json", json.dumps(TEXT_ROWS))).place(1) == f"row 1 of {tmp_path}/rows.json"


@pytest.mark.parametrize("line", [b'{"prompt"', b"3", b'{"prompt": "\xff"}', b"[1]", b"prompt"])
def test_lines_that_cannot_be_read_are_named_or_skipped(line, tmp_path):
    path = written(tmp_path / "rows.jsonl", b'{"prompt": "a"}\n\n' + line + b'\n{"prompt": "b"}\n')
    with pytest.raises(ConfigError, match=f"line 3 of {path}: .*lines that cannot be read: 1; on_bad_row=skip"):
        read(path)
    kept = read(path, on_bad_row="skip")
    assert list(kept.rows) == [{"prompt": "a"}, {"prompt": "b"}] and kept.place(1) == f"line 4 of {path}"
    assert len(kept.skipped) == 1 and kept.skipped[0].startswith(f"line 3 of {path}: ")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", "", "is empty"),
        ("rows.jsonl", "\n \n", "is empty"),
        ("rows.csv", "", "is empty"),
        ("rows.csv", "prompt\n", "is empty"),
        ("rows.json", "[", "cannot read"),
        ("rows.json", '{\n"a": 1\n}', "or one object in which a field is a list of rows"),
        ("rows.parquet", "no", "cannot read"),
        ("rows.txt", "a", "cannot tell the format of .*rows.txt by its name"),
        ("rows.jsonl.zst", "", "pip install zstandard"),
    ],
)
def test_files_that_cannot_be_read_are_errors(name, content, message, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ConfigError, match=message):
        read(written(tmp_path / name, content))


def test_zstandard(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    assert rows(written(tmp_path / "rows.jsonl.zst", zstandard.compress(LINES))) == ROWS


def test_a_wrong_path_names_the_nearest(tmp_path):
    path = written(tmp_path / "rows.jsonl", LINES)
    with pytest.raises(ConfigError, match=f"no prompt file '{tmp_path}/row.jsonl' .*did you mean '{path}'"):
        read(f"{tmp_path}/row.jsonl:train[:2]")
    written(tmp_path / "rows.csv", "prompt\na\n")
    with pytest.raises(ConfigError, match="must have one format, got .csv, .jsonl in 2 files"):
        read(f"{tmp_path}/rows.*")
    with pytest.raises(ConfigError, match="no prompt file 'shards/part-\\*'"):
        read("shards/part-*")
    with pytest.raises(ConfigError, match="a Hub data set is OWNER/NAME"):
        read("not/a/data/set")


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path / "rows.jsonl", LINES)
    assert rows("~/rows.jsonl:train[1:]") == ROWS[1:]


def test_nothing_is_left_in_a_cache(tmp_path, monkeypatch):
    cache, temporary = tmp_path / "cache", tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    table = load_rows(written(tmp_path / "rows.jsonl", LINES))
    assert not list(temporary.iterdir()) and not [path for path in cache.rglob("*") if path.is_file()]
    assert list(table) == ROWS, "and the rows are still there"


def test_rows_of_later_chunks_may_have_other_columns_and_types(tmp_path):
    """The library fixes both by the first ten megabytes."""
    filler = "x" * 600
    lines = [{"prompt": filler, "answer": i} for i in range(20_000)] + [{"prompt": "a", "answer": "b", "late": 1.5}]
    found = load_rows(written(tmp_path / "rows.jsonl", "".join(json.dumps(line) + "\n" for line in lines)))
    assert found[len(lines) - 1] == lines[-1] and found[0] == {"prompt": filler, "answer": 0}


def test_data_sets_handed_over_in_python(tmp_path):
    table = datasets.Dataset.from_list(TEXT_ROWS)
    both = datasets.DatasetDict({"train": table, "test": table.select([0])})
    assert list(from_python(both).rows) == TEXT_ROWS and from_python(table).rows is table
    with pytest.raises(
        ConfigError, match=r"eval_dataset has the splits train, test: pass one of them, data\['train'\]"
    ):
        from_python(both, "eval_dataset")
    assert from_python(datasets.DatasetDict({"dev": table}), "eval_dataset").rows is table
    frame = pandas.DataFrame(ROWS)
    assert from_python(frame).rows == ROWS
    datasets.Dataset.from_list([{"m": [{"role": "user", "content": "a"}]}]).to_parquet(str(tmp_path / "m.parquet"))
    assert from_python(pandas.read_parquet(tmp_path / "m.parquet")).rows == [{"m": [{"role": "user", "content": "a"}]}]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b", ("a/b", None, "train", None)),
        ("a/b:test[:9]", ("a/b", None, "test[:9]", None)),
        ("openai/gsm8k/main", ("openai/gsm8k", "main", "train", None)),
        ("openai/gsm8k/main@refs/pr/1:train[:10%]+test", ("openai/gsm8k", "main", "train[:10%]+test", "refs/pr/1")),
        ("imdb@v1.2", ("imdb", None, "train", "v1.2")),
    ],
)
def test_a_hub_data_set_may_have_a_configuration_a_revision_and_a_split(name, expected, monkeypatch):
    def load_dataset(path, name, split, revision):
        return path, name, split, revision

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows(name) == expected


def test_rows_from_a_file_name_the_bad_line(tmp_path):
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text('{"prompt": "the"}\n\n{"prompt": "a\u2028b"}\n', encoding="utf-8")
    bad.write_text('{"prompt": "the"}\n{"prompt"\n')
    assert [row["prompt"] for row in load_rows(str(good))] == ["the", "a\u2028b"]
    with pytest.raises(ConfigError, match="line 2"):
        load_rows(str(bad))
    bad.write_text('{"prompt": "the"}\n[{"prompt": "the"}]\n')
    with pytest.raises(ConfigError, match=r"line 2 of .*: a row must be a JSON object, one a line, got \[{"):
        load_rows(str(bad))
    with pytest.raises(ConfigError, match="no prompt file"):
        load_rows(str(tmp_path / "none.jsonl"))


def test_demo_prompts_do_not_overlap():
    sets = [{json.dumps(row) for row in load_rows(f"demo_{name}.jsonl")} for name in ("train", "dev", "eval")]
    assert all(sets) and not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
