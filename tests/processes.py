"""Processes of a run on this machine without their start-up time: several over gloo, or a command in one of its own."""

import io
import multiprocessing
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import torch

from safe_train.run import run_folder

CONTEXT = multiprocessing.get_context("forkserver")  # imports once, then forks
CONTEXT.set_forkserver_preload(
    "safe_train.trainer peft transformers.models.llama.modeling_llama tokenizers datasets pandas pytest".split()
)


class Outcome(NamedTuple):
    result: Any  # of the function; None if it raised
    error: str  # "" if it did not
    printed: str
    exit_code: int | None  # None: had to be killed


def run(function, size: int, *arguments, seconds: float = 120) -> list[Outcome]:
    """function(*arguments) in `size` processes, by rank; those that are not done after `seconds` are killed."""
    port = free_port()
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(size)]
    processes = [
        CONTEXT.Process(target=child, args=(pipe, rank, size, port, function, arguments), daemon=True)
        for rank, (_, pipe) in enumerate(pipes)
    ]
    for process, (_, pipe) in zip(processes, pipes, strict=True):
        process.start()
        pipe.close()
    deadline = time.monotonic() + seconds
    return [outcome(process, pipe, deadline) for process, (pipe, _) in zip(processes, pipes, strict=True)]


def outcome(process, pipe, deadline: float) -> Outcome:
    answer = (None, "no answer", "")
    try:
        if pipe.poll(max(0.0, deadline - time.monotonic())):
            answer = pipe.recv()
    except EOFError:
        pass
    process.join(max(1.0, deadline - time.monotonic()))
    exit_code = process.exitcode
    if exit_code is None:
        process.kill()
        process.join()
    return Outcome(*answer, exit_code)


def child(pipe, rank: int, size: int, port: int, function, arguments) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")  # fmt: skip
    keep_small()
    printed = sys.stdout = sys.stderr = io.StringIO()
    result, error, code = None, "", 0
    try:
        result = function(*arguments)
    except SystemExit as stop:
        error, code = repr(stop), stop.code
    except BaseException:
        error, code = traceback.format_exc(), 1
    pipe.send((result, error, printed.getvalue()))
    pipe.close()
    os._exit(code)


def keep_small() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    run_folder.write_report = lambda *_: None  # a picture takes longer than everything else


class Command:
    """main(arguments) in a process of its own, which prints into a file; it has the methods of `subprocess.Popen`."""

    def __init__(self, main, arguments: list[str], printed: Path):
        self.printed = printed
        self.process = CONTEXT.Process(target=command, args=(main, arguments, printed), daemon=True)
        self.process.start()
        self.pid, self.send_signal = self.process.pid, lambda number: os.kill(self.pid, number)
        self.terminate = self.process.terminate

    def poll(self) -> int | None:
        return self.process.exitcode

    returncode = property(poll)

    def wait(self, timeout: float | None = None) -> int | None:
        self.process.join(timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        if self.wait(timeout) is None:
            self.process.kill()
            raise TimeoutError(f"the command did not end in {timeout} s: {self.printed.read_text()}")
        return self.printed.read_text(), None


def command(main, arguments: list[str], printed: Path) -> None:
    keep_small()
    with printed.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(n, "w", closefd=False), write_through=True) for n in (1, 2))
    sys.exit(main(arguments))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
