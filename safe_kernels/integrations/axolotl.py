"""Axolotl on these kernels: two lines of its config,

    plugins:
      - safe_kernels.integrations.axolotl.SafeKernelsPlugin

or `apply()` in a script of your own. Axolotl's trainers are TRL's, and its asynchronous GRPO calls TRL's functions of
logits, so the patch is that of TRL, which Axolotl applies in each of its processes when it has read the config.
"""

from __future__ import annotations

import importlib
from typing import Any

from safe_kernels import integrations
from safe_kernels.integrations import trl

PATCHES, apply, revert = trl.PATCHES, trl.apply, trl.revert


def __getattr__(name: str) -> Any:
    """The plugin's class, once Axolotl, whose class it derives from, asks for it."""
    if name != "SafeKernelsPlugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base: Any = importlib.import_module("axolotl.integrations.base")

    class SafeKernelsPlugin(base.BasePlugin):
        def register(self, cfg: Any) -> None:
            apply()
            integrations.report()

    return SafeKernelsPlugin
