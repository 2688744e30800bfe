"""The versions of this package and of those that it needs."""

from __future__ import annotations

from functools import cache
from importlib import metadata

from packaging.requirements import Requirement

from safe_train.settings.limits import ConfigError

NAME = "safe-kernels"


def own_version() -> str:
    try:
        return metadata.version(NAME)
    except metadata.PackageNotFoundError:
        return "of sources that are not installed"


@cache
def check_versions() -> None:
    """Whether the installed packages are as new as those that the trainer asks for."""
    try:
        lines = metadata.requires(NAME) or []
    except metadata.PackageNotFoundError:
        return
    for needed in map(Requirement, lines):
        if needed.marker is not None and not needed.marker.evaluate({"extra": "train"}):
            continue
        try:
            found = metadata.version(needed.name)
        except metadata.PackageNotFoundError:  # whoever needs it says so
            continue
        if not needed.specifier.contains(found, prereleases=True):
            raise ConfigError(
                f"{needed.name} {found} is installed, and safe-train needs {needed.specifier}: pip install --upgrade "
                f"'{needed.name}{needed.specifier}'"
            )
