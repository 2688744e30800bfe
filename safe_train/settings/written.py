"""Values as they were written: YAML whose plain scalars stay text until the setting's type says what they mean.

YAML 1.1 alone would read `0100` as 64, `1:30` as 90, `no` as false, `2024-01-01` as a date and `1e-5` as text, and of a
key that stands there twice it would take the last.
"""

from __future__ import annotations

import math
import os
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from safe_train.settings.limits import ConfigError

NULLS = ("", "null", "Null", "NULL")
SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class Written(str):
    """A plain scalar, whose type nobody has decided yet; what stood in quotes is text already."""


class Loader(yaml.SafeLoader):
    """YAML without guesses about types; a key that stands twice in a mapping is an error."""

    yaml_implicit_resolvers: dict = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"the name in line {line} is a {key.id}; a name is one word")
            if key.value in lines:
                raise ConfigError(f"{key.value} is set twice, in lines {lines[key.value]} and {line}; keep one of them")
            lines[key.value] = line
        return super().construct_mapping(node, deep)

    def construct_yaml_str(self, node: yaml.ScalarNode) -> Any:
        text = self.construct_scalar(node)
        if node.style is not None:
            return text
        return None if text in NULLS else Written(text)


Loader.add_constructor("tag:yaml.org,2002:str", Loader.construct_yaml_str)


def read(path: Path) -> dict[str, Any]:
    """The settings of a file, by name."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader) or {}
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file in UTF-8: {error}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{path} is not YAML: {error}. Each line is `setting: value`, and starts at the margin"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `setting: value` lines, got {plain(values)!r:.100}")
    return {str(name): value for name, value in values.items()}


def parse(name: str, text: str, hint: Any) -> Any:
    """The value of a `key=value` pair: text as it stands where text is wanted, YAML elsewhere."""
    if hint is str:
        return text
    if hint == str | None:
        return None if text in (*NULLS, "~") else text
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError:
        raise ConfigError(f"{name} must be a YAML value, got {text!r}") from None


def typed(name: str, value: Any, hint: Any, choices: Sequence[str] = ()) -> Any:
    """The value as the declared type. A whole number may be written `1e3`, and a number as text: `"1e-5"`."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in options and (value is None or isinstance(value, Written) and value == "~"):
        return None
    kind = options[0]
    if typing.get_origin(kind) is list:
        items = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        return [typed(name, item, typing.get_args(kind)[0]) for item in items]
    readers = {bool: as_bool, int: as_int, float: as_float, str: as_text}
    found = readers[kind](value) if kind in readers else plain(value)
    if kind is str and str(value).lower() in choices:
        return str(value).lower()
    if found is not None and isinstance(found, typing.get_origin(kind) or kind):
        return found
    raise ConfigError(f"{name} must be {kind.__name__}, got {plain(value)!r}{advice(name, value, kind)}")


def advice(name: str, value: Any, kind: Any) -> str:
    """What to write instead, where that is known."""
    if isinstance(value, dict):
        return "; settings are flat: no line is indented under another"
    if kind in (int, bool) and isinstance(value, str) and not isinstance(value, Written):
        return f"; write {name}: {value}, without quotes" if isinstance(plain(Written(value)), kind) else ""
    return ""


def as_bool(value: Any) -> bool | None:
    return SWITCHES.get(value.lower()) if isinstance(value, Written) else value if isinstance(value, bool) else None


def as_int(value: Any) -> int | None:
    if isinstance(value, Written):
        if re.fullmatch(r"[-+]?\d+(_\d+)*", value):
            return int(value)  # `0100` is a hundred
        value = as_float(value)
    if isinstance(value, bool):
        return None
    if isinstance(value, float):
        return int(value) if math.isfinite(value) and value.is_integer() else None
    return value if isinstance(value, int) else None


def as_float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(re.sub(r"^([-+]?)\.(inf|nan)$", r"\1\2", value, flags=re.I) if isinstance(value, str) else value)
    except (ValueError, OverflowError):
        return None


def as_text(value: Any) -> str | None:
    return str(value) if isinstance(value, str) else None


def plain(value: Any) -> Any:
    """The value by YAML's core schema, for messages and for settings that hold whatever is written there."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    if not isinstance(value, Written):
        return value
    if value == "~":
        return None
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    if re.fullmatch(r"[-+]?\d+", value):
        return int(value)
    if re.fullmatch(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|nan)", value, flags=re.I):
        return as_float(value)
    return str(value)


def at_home(name: str, path: str | None) -> str | None:
    """A path that starts with ~ from the home folder on, as a shell would have it."""
    if path is None or not path.startswith("~"):
        return path
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise ConfigError(f"{name} {path!r} is in the home folder of a user that this machine does not know")
    return found
