"""One run a folder: a lock of the operating system on a file in it, held by the process that runs.

The lock ends with its process, however that ends, so nothing stale is ever left to be cleaned up.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import socket
import time
import weakref
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import ClassVar, ParamSpec, TypeVar

from safe_train import parallel
from safe_train.config import ConfigError

NAME = "run.lock"
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # of file systems that have none

T = TypeVar("T")
P = ParamSpec("P")


class FolderLock:
    """The first process of a run holds it; another process that asks for it meanwhile is refused.

    Within one process several may be held on a folder: they are released one by one.
    """

    descriptors: ClassVar[dict[str, int]] = {}  # of this process, by path
    holders: ClassVar[dict[str, set[int]]] = {}
    made: ClassVar[dict[str, list[Path]]] = {}  # the folders that this process made for them, the innermost first

    def __init__(self, folder: Path):
        self.path = os.path.realpath(folder / NAME)
        weakref.finalize(self, self.let_go, self.path, id(self))  # at the interpreter's end while modules still live

    @parallel.main_only
    def acquire(self) -> None:
        if self.path not in self.descriptors:
            new = [folder for folder in Path(self.path).parents if not folder.exists()]
            try:
                self.descriptors[self.path] = locked(Path(self.path))
            except ConfigError:
                remove_empty(new)
                raise
            self.made[self.path] = new
        self.holders.setdefault(self.path, set()).add(id(self))

    def release(self) -> None:
        self.let_go(self.path, id(self))

    @classmethod
    def let_go(cls, path: str, holder: int) -> None:
        holders = cls.holders.get(path, set())
        holders.discard(holder)
        if not holders and path in cls.descriptors:
            leave(Path(path), cls.descriptors.pop(path), cls.made.pop(path, []))


def releasing(always: bool) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A method that releases its object's `folder_lock` when it fails, or at its end, however it comes."""

    def decorate(method: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(method)
        def run(*arguments: P.args, **options: P.kwargs) -> T:
            is_over = True
            try:
                result = method(*arguments, **options)
                is_over = always
                return result
            finally:
                lock: FolderLock | None = getattr(arguments[0], "folder_lock", None)
                if is_over and lock is not None:
                    lock.release()

        return run

    return decorate


def locked(path: Path) -> int:
    """A descriptor of the file, locked, with this process's name in it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not path.parent.exists():  # its owner took it away in between
            return locked(path)
        raise ConfigError(f"cannot write in output_dir {str(path.parent)!r}: {error}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not is_at(descriptor, path):  # its owner left, and took the file along, in between
            os.close(descriptor)
            return locked(path)
        sign(descriptor)
    except BlockingIOError:
        owner = owner_of(descriptor)
        os.close(descriptor)
        raise ConfigError(
            f"{path.parent} belongs to a run that is going on, of {owner}: wait for it, stop it, or choose another "
            "output_dir"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            leave(path, descriptor, made=[])
            raise ConfigError(f"cannot write in output_dir {str(path.parent)!r}: {error}") from error
        print(f"{path.parent} is on a file system without locks: nothing keeps a second run out of it", flush=True)
    return descriptor


def is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def sign(descriptor: int) -> None:
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}).encode(), 0)


def owner_of(descriptor: int) -> str:
    """In words. It signs right after it locked: until then the file is empty, or names a process that was killed."""
    for _ in range(100):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            found = json.loads(os.pread(descriptor, 1000, 0))
            owner = f"process {found['pid']} on {found['host']}, since {found['since']}"
            if found["host"] != socket.gethostname() or is_alive(found["pid"]):
                return owner
        time.sleep(0.01)
    return "another process"


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True


def leave(path: Path, descriptor: int, made: list[Path]) -> None:
    """Gives the lock back, and takes away folders that were made for it and that nothing was written to."""
    with contextlib.suppress(OSError):
        if is_at(descriptor, path):
            path.unlink()
            remove_empty(made)
    os.close(descriptor)


def remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):  # there is none, or it holds something
        for folder in folders:
            folder.rmdir()


def forget() -> None:
    """A forked child has the parent's descriptors, and would keep the lock when the parent dies."""
    for descriptor in FolderLock.descriptors.values():
        os.close(descriptor)
    FolderLock.descriptors.clear()
    FolderLock.holders.clear()


os.register_at_fork(after_in_child=forget)
