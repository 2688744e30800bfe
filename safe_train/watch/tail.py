"""Files that grow while they are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

MARK_BYTES = 128


class Line(NamedTuple):
    offset: int  # bytes
    length: int
    row: dict[str, Any]


class Tail:
    """The rows of a .jsonl file, each read once.

    A last line without its end waits for it. A line that is no JSON object with a step is left out and counted. A file
    that was replaced or cut, as by a run that was resumed, is read from its start again: the bytes before the place
    where reading stopped tell, since on a network disk neither time nor inode has to.
    """

    def __init__(self, path: Path):
        self.path = path
        self.problem = ""  # why the file cannot be read
        self.start_over()

    def start_over(self) -> None:
        self.offset, self.mark, self.unreadable = 0, b"", 0

    def feed(self, add: Callable[[Line], None], clear: Callable[[], None]) -> None:
        """Calls `add` with each new row; `clear` before, if those that it was given are void."""
        try:
            with self.path.open("rb") as file:
                if not self.goes_on(file):
                    clear()
                    self.start_over()
                    file.seek(0)
                for line in self.lines(file):
                    add(line)
                self.problem = ""
        except FileNotFoundError:  # not yet, or not any more
            pass
        except OSError as error:
            self.problem = str(error)

    def goes_on(self, file: BinaryIO) -> bool:
        """Whether what was read is still there; the file then stands behind it."""
        file.seek(self.offset - len(self.mark))
        return file.read(len(self.mark)) == self.mark

    def lines(self, file: BinaryIO) -> Iterator[Line]:
        for text in file:
            if not text.endswith(b"\n"):
                break
            offset = self.offset
            self.offset += len(text)
            self.mark = (self.mark + text)[-MARK_BYTES:]
            if (row := row_of(text)) is None:
                self.unreadable += 1
            else:
                yield Line(offset, len(text), row)


def row_of(text: bytes) -> dict[str, Any] | None:
    """None for what is no JSON object with a whole number as its step."""
    try:
        row = json.loads(text)
    except ValueError:
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None
