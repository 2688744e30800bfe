"""Other trainers on these kernels: one module a trainer, each with a `Patch` that is applied and undone as a whole.

from safe_kernels import integrations
integrations.apply()    # after the import of your trainer: patches what is loaded, and says what it replaced
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType

MODULES = {  # a trainer's package: the module here
    "trl": "trl",
    "verl": "verl",
    "openrlhf": "openrlhf",
    "swift": "ms_swift",
    "axolotl": "axolotl",
    "llamafactory": "llamafactory",
    "areal": "areal",
    "skyrl": "skyrl",
}
DISTRIBUTIONS = ("trl", "verl", "openrlhf", "ms-swift", "axolotl", "llamafactory", "areal", "skyrl")


def apply() -> None:
    """Patch each of these trainers that this process has imported, and print a line for each."""
    loaded = [package for package in MODULES if package in sys.modules]
    for package in loaded:
        importlib.import_module(f".{MODULES[package]}", __name__).apply()
    if loaded:
        report()
    else:
        print(f"nothing patched: import your trainer first ({', '.join(MODULES)})", file=sys.stderr)


def revert() -> None:
    """Every trainer as it was."""
    for module in _modules():
        module.revert()


def status() -> dict[str, list[str]]:
    """Of each package for which a patch was loaded, every name that leads to one of ours now: none, if none is."""
    found: dict[str, list[str]] = {}
    for patch in dict.fromkeys(patch for module in _modules() for patch in module.PATCHES):
        found.setdefault(patch.package, []).extend(patch.status())
    return found


def report() -> None:
    """`status()` on stderr, a line a package; of the first process of a machine alone."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for package, names in status().items():
            version = getattr(sys.modules.get(package), "__version__", "?")
            print(f"safe_kernels in {package} {version}: {', '.join(names) or 'nothing replaced'}", file=sys.stderr)


def _modules() -> list[ModuleType]:
    """Those modules here that were imported, in the order to undo their patches."""
    names = [f"{__name__}.{name}" for name in reversed(MODULES.values())]
    return [sys.modules[name] for name in names if name in sys.modules]
