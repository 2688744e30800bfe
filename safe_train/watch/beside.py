"""A page beside a run: a process of its own, which the run does not wait for and which ends with it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safe_train.config import ConfigError

PACKAGES = ("starlette", "uvicorn", "plotly")
SECONDS = 5.0  # that the page has to come to its end


def require_packages() -> None:
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        raise ConfigError(f"watching needs {', '.join(absent)}, which this brings: pip install 'safe-kernels[watch]'")


@contextmanager
def watched(run: Path) -> Iterator[None]:
    """Inside, a page shows the run.

    It ends when the pipe to it does, even if this process is killed. Ctrl-C, which the terminal sends to a whole group
    of processes, does not reach it: the step that is then finished can still be seen.
    """
    run.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "safe_train.cli", "watch", str(run), "--until-input-ends"]
    page = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        assert page.stdin is not None
        page.stdin.close()
        try:
            page.wait(SECONDS)
        except subprocess.TimeoutExpired:
            page.kill()
        print(f"the page ended with the run; this shows it again: safe-train watch {run}", flush=True)
