"""Whether a person looks on, and the bar of a phase that would be silent.

tqdm's bars are the only lines that change: a second library that draws over the screen would hide those of transformers
and datasets.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from rich.console import Console
from tqdm import tqdm

from safe_train import parallel

QUIET = "SAFE_TRAIN_QUIET"  # in the environment: what `--quiet` sets
BAR_DELAY = 3.0  # seconds that a phase may be silent


def is_quiet() -> bool:
    return not parallel.is_main() or os.environ.get(QUIET, "0") not in ("", "0")


def is_live() -> bool:
    """Whether a line may be drawn over: on a screen, not in a pipe, a notebook, CI or a terminal that cannot."""
    is_screen = sys.stdout.isatty() and sys.stderr.isatty() and not Console().is_dumb_terminal
    return is_screen and not is_quiet() and os.environ.get("CI", "false") in ("", "0", "false")


def bar(what: str, total: int, unit: str = "it") -> Any:
    """A bar of a phase that may be silent for long; it goes away at its end."""
    return tqdm(total=total, desc=what, unit=unit, delay=BAR_DELAY, leave=False, disable=not is_live())
