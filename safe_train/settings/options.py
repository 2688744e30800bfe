"""How a setting is declared, and what marks one that nobody set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


def group(name: str) -> Callable[[Any, str], Any]:
    """What declares the settings of a group: by default and meaning."""

    def option(default: Any, help: str) -> Any:
        metadata = {"help": help, "group": name}
        if isinstance(default, list):
            return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
        return dataclasses.field(default=default, metadata=metadata)

    return option


class Followed:
    """Marks a value that the algorithm decided. A copy of the settings with another algorithm takes that one's."""

    def plain(self) -> Any:
        return (float if isinstance(self, float) else str)(self)  # type: ignore[arg-type]


class FollowedText(Followed, str):
    pass


class FollowedNumber(Followed, float):
    pass
