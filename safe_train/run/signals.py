"""SIGTERM, which schedulers send, and Ctrl-C: the run ends after the step it is in, with a checkpoint."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from types import FrameType
from typing import Any

from safe_train import parallel


class Stopped(SystemExit):
    """A run ended by a signal, after its checkpoint. The exit code is 128 + the signal: 143 SIGTERM, 130 Ctrl-C."""

    @classmethod
    def after(cls, step: int, number: int, folder: str) -> Stopped:
        command = f"safe-train run --resume {shlex.quote(f'output_dir={folder}')}"
        parallel.say(
            f"{signal.Signals(number).name}: stopped after step {step}, with a checkpoint; continue with {command}, or "
            "from Python with train(resume_from_checkpoint=True)",
            file=sys.stderr,
        )
        return cls(128 + number)


class StopSignals:
    """While it lasts, SIGTERM and the first Ctrl-C are only noted; a second Ctrl-C interrupts at once.

    A signal that the process was started to ignore, as a background job's Ctrl-C, stays ignored.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            heard = [s for s in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(s) != signal.SIG_IGN]
            self.previous = {s: signal.signal(s, self.note) for s in heard}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if signal.SIGINT in self.previous:
            signal.signal(signal.SIGINT, self.previous[signal.SIGINT])
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\n{signal.Signals(number).name}: finishing this step, then a checkpoint\n".encode())

    def agreed(self) -> int | None:
        """The signal that some process has received: then all of them stop after the same step."""
        return next((number for number in parallel.gather_objects(self.received) if number is not None), None)
