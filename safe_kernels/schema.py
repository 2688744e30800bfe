"""How named tuples of arguments become the flat arguments of a registered op, and come back.

The dispatcher knows tensors, numbers and text. A `float | Tensor` becomes two arguments of which one counts, and a
group that may be absent becomes as many None.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from torch import Tensor

_NAMES = {Tensor: "Tensor", float: "float", int: "SymInt", bool: "bool", str: "str"}


class Signature:
    """The arguments of an op, by name and type; a type may be a NamedTuple, or one or None."""

    def __init__(self, **hints: Any) -> None:
        self._group = _Group(tuple, hints)

    @property
    def schema(self) -> str:
        return ", ".join(self._group.declare("", False))

    @property
    def names(self) -> list[str]:
        """Of the flat arguments."""
        return [declaration.split()[1] for declaration in self._group.declare("", False)]

    def flatten(self, *values: Any) -> list[Any]:
        return self._group.flatten(values)

    def restore(self, flat: Sequence[Any]) -> Any:
        """The values that `flatten` was given."""
        return self._group.restore(flat)


class _Single:
    count = 1

    def __init__(self, name: str) -> None:
        self.name = name

    def declare(self, name: str, optional: bool) -> list[str]:
        return [f"{self.name}{'?' if optional else ''} {name}"]

    def flatten(self, value: Any) -> list[Any]:
        return [value]

    def restore(self, flat: Sequence[Any]) -> Any:
        return flat[0]


class _Number:
    """A float | Tensor."""

    count = 2

    def declare(self, name: str, optional: bool) -> list[str]:
        return [f"float? {name}", f"Tensor? {name}_tensor"]

    def flatten(self, value: Any) -> list[Any]:
        return [None, value] if isinstance(value, Tensor) else [value, None]

    def restore(self, flat: Sequence[Any]) -> Any:
        return flat[0] if flat[1] is None else flat[1]


class _Group:
    def __init__(self, make: Any, hints: dict[str, Any]) -> None:
        self.make = make
        self.fields = {name: _field(hint) for name, hint in hints.items()}
        self.count = sum(field.count for field, _ in self.fields.values())

    def declare(self, name: str, optional: bool) -> list[str]:
        fields = self.fields.items()
        return [text for own, (field, may_miss) in fields for text in field.declare(own, optional or may_miss)]

    def flatten(self, values: Any) -> list[Any]:
        if values is None:
            return [None] * self.count
        fields = self.fields.values()
        return [x for (field, _), value in zip(fields, values, strict=True) for x in field.flatten(value)]

    def restore(self, flat: Sequence[Any]) -> Any:
        if all(x is None for x in flat):
            return None
        values, at = [], 0
        for field, _ in self.fields.values():
            values.append(field.restore(flat[at : at + field.count]))
            at += field.count
        return self.make(values) if self.make is tuple else self.make(*values)


def _field(hint: Any) -> tuple[Any, bool]:
    """What takes an argument of this type apart, and whether it may be None."""
    options = set(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else {hint}
    rest = options - {types.NoneType}
    if rest == {float, Tensor}:
        return _Number(), True
    (kind,) = rest
    single = _NAMES.get(kind)
    return (_Single(single) if single else _Group(kind, get_type_hints(kind))), len(rest) < len(options)
