"""A part's file: a record a line, so that a crash or a cut costs what was running alone."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def append(path: Path, record: Record) -> None:
    with path.open("a+b") as file:
        cut_short = file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write(b"\n" * bool(cut_short) + json.dumps(record).encode() + b"\n")


def read(path: Path) -> list[Record]:
    """Its records; a last line that was cut short is left out."""
    found = []
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(text))
    return found


def started_items(path: Path) -> list[str]:
    return list(dict.fromkeys(r["item"] for r in read(path) if r["record"] == "item"))


def unfinished(path: Path) -> str | None:
    """The item that was running when its process ended."""
    state = {r["item"]: r["status"] for r in read(path) if r["record"] == "item"}
    return next((name for name, status in state.items() if status == "started"), None)
