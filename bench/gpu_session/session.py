"""The processes of bench/gpu.py: each part in one of its own, under a limit, ended with all that it starts."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu_session import page
from bench.gpu_session.page import Record
from bench.measurement import machine

GRACE = 2.0  # seconds before a part's limit at which it ends by itself
LOST = 75  # exit code: the device no longer answers, go on in a new process
RESTART = 15.0  # seconds that must be left to start a part again
TAIL = 60  # lines of output that are kept
PR_SET_PDEATHSIG = 1
PROCESS = Path(__file__).with_name("process.py")


@dataclass(frozen=True)
class Part:
    """One process and one file. `seconds` is its share of eight minutes; what a part leaves unused, later ones get."""

    name: str
    seconds: float
    command: tuple[str, ...]  # `--file`, `--seconds` and `--skip` are added

    def path(self, out: Path) -> Path:
        return out / f"{self.name}.jsonl"


SHARES = {"smoke": 30, "correctness": 120, "rows": 180, "roof": 30, "launches": 60, "step": 60}  # 480 s in all


def part(name: str, seconds: float, options: Sequence[str]) -> Part:
    return Part(name, seconds, (sys.executable, str(PROCESS), name, *options))


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """SIGTERM ends the run like Ctrl-C does: the part in hand is ended, and the page is written."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass
class Session:
    parts: list[Part]
    out: Path
    seconds: float
    commit: tuple[str, bool | None]
    rehearsal: bool
    site: Path  # packages that the parts import before all others
    gpu: dict[str, str] = field(default_factory=machine.gpu_state)

    def start(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        with alone_in(self.out):
            for each in self.parts:
                each.path(self.out).unlink(missing_ok=True)
            end = time.monotonic() + self.seconds
            for i, each in enumerate(self.parts):
                left = end - time.monotonic()
                limit = left * each.seconds / sum(later.seconds for later in self.parts[i:])
                self.run_part(each, max(limit, 1.0))
                if page.is_unusable(read(each.path(self.out))):
                    break

    def run_part(self, part: Part, limit: float) -> None:
        path, started = part.path(self.out), time.monotonic()
        append(path, self.head(part, limit))
        self.page()
        status, output = "cut", ""
        try:
            status, output = self.attempts(part, started + limit)
        finally:
            seconds = round(time.monotonic() - started, 2)
            output = "" if status == "done" else output
            append(path, {"record": "end", "status": status, "seconds": seconds, "output": output})
            self.page()

    def attempts(self, part: Part, end: float) -> tuple[str, str]:
        """Status and last output. An item that killed the process is skipped in the next one."""
        while True:
            code, output = self.attempt(part, end)
            path = part.path(self.out)
            fatal = unfinished(path)
            if code is None:
                return "over its limit", output
            if fatal is None and code != LOST:
                return ("failed" if code else "done"), output
            if fatal is not None:
                reason = "hung" if code == -signal.SIGALRM else "crashed"
                append(path, {"record": "item", "item": fatal, "status": reason, "reason": last_line(output)})
            if end - time.monotonic() < RESTART:
                return "failed", output

    def attempt(self, part: Part, end: float) -> tuple[int | None, str]:
        """Exit code, None at the limit, and the end of what the process printed, here as well."""
        path = part.path(self.out)
        added = {"file": str(path), "end": f"{end - GRACE:.1f}", "commit": self.commit[0], "site": str(self.site)}
        added["skip"] = json.dumps(started_items(path))
        options = [f"--{name}={value}" for name, value in added.items()]
        paths = [str(self.site), str(machine.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        process = subprocess.Popen(
            [*part.command, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"},
            preexec_fn=own_group,
        )
        lines: collections.deque[str] = collections.deque(maxlen=TAIL)
        reader = threading.Thread(target=echo, args=(process.stdout, lines), daemon=True)
        reader.start()
        try:
            code: int | None = process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # one that waits for the driver may not end at all
                process.wait(5)
            reader.join(5)
        return code, "".join(lines)

    def head(self, part: Part, limit: float) -> Record:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return {"record": "start", "part": part.name, "time": stamp, "limit_s": round(limit, 1),
                "rehearsal": self.rehearsal, "commit": self.commit[0], "dirty": self.commit[1],
                "gpu": self.gpu}  # fmt: skip

    def page(self) -> str:
        """Writes summary.md from the files, and returns it."""
        names = [part.name for part in self.parts]
        others = [
            path.stem for path in sorted(self.out.glob("*.jsonl")) if path.stem in SHARES and path.stem not in names
        ]
        text = page.summary({name: read(self.out / f"{name}.jsonl") for name in [*names, *others]})
        unfinished_page = self.out / ".summary.md"
        unfinished_page.write_text(text)
        unfinished_page.replace(self.out / "summary.md")
        return text

    def failed(self) -> bool:
        found = {part.name: read(part.path(self.out)) for part in self.parts}
        return any(page.problems(records) or page.cuts(name, records) for name, records in found.items())


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Two runs in one folder would mix their records."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        sys.exit(f"another run writes into {folder}: wait for it, or choose another --out")
    finally:
        os.close(descriptor)


def own_group() -> None:
    """In a part's process, before anything else: it is ended with all that it starts, and, on Linux, with this one."""
    os.setpgrp()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def echo(stream: Any, lines: collections.deque[str]) -> None:
    for text in stream:
        lines.append(text)
        print(text, end="", flush=True)


def last_line(output: str) -> str:
    lines = [text.strip() for text in output.splitlines() if text.strip()]
    return lines[-1][:300] if lines else ""


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
