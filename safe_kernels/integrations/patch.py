"""Replaces functions of an installed package, all of them or none, and puts them back."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple


class Replacement(NamedTuple):
    """One function, class or method of the package, and what takes its place."""

    module: str  # "trl.trainer.utils"
    name: str  # "entropy_from_logits", or "Actor.forward" for a method
    signatures: Sequence[tuple[str, ...]]  # the parameter names that are known, one tuple a version
    make: Callable[[Any], Any]  # from the original to its replacement; called when the patch is applied


class Patch:
    """The replacements in one package. `apply`, `revert`, or a `with` block; applying twice is applying once.

    What the package does not have is left out. A signature that is not known means that its version is not: then
    nothing is replaced, with one warning. What another library has replaced already is refused with RuntimeError,
    since the two would train wrong together without a word.
    """

    def __init__(self, package: str, replacements: Sequence[Replacement]):
        self.package, self.replacements = package, replacements
        self._made: list[tuple[Replacement, Any, Any]] = []  # (what, the original, ours)
        self._warned = False

    @property
    def replaced(self) -> list[str]:
        """What is replaced now, by its full name; empty when the patch is not active."""
        return [f"{what.module}.{what.name}" for what, _, _ in self._made]

    def apply(self) -> Patch:
        if self._made:
            return self
        if importlib.util.find_spec(self.package) is None:
            raise ModuleNotFoundError(f"{self.package} is not installed: there is nothing to replace", name=self.package)
        found = [(what, original) for what in self.replacements if (original := _find(what)) is not None]
        for what, original in found:
            _refuse_foreign(self.package, what, original)
        unknown = [_unknown(what, original) for what, original in found if _parameters(original) not in what.signatures]
        if unknown or not found:
            self._warn(unknown)
            return self
        for what, original in found:
            ours = what.make(original)
            self._made.append((what, original, ours))
            self._rebind(what, original, ours)
        return self

    def revert(self) -> None:
        for what, _, ours in self._made:
            if _find(what) is not ours:
                raise RuntimeError(
                    f"{what.module}.{what.name} was replaced again after safe_kernels had replaced it; "
                    "undo that first, then this"
                )
        while self._made:
            what, original, ours = self._made.pop()
            self._rebind(what, ours, original)

    def __enter__(self) -> Patch:
        return self.apply()

    def __exit__(self, *_: object) -> None:
        self.revert()

    def _rebind(self, what: Replacement, old: Any, new: Any) -> None:
        """Where it is defined, and under every name it was imported to inside the package."""
        owner, _, attribute = what.name.rpartition(".")
        if owner:
            setattr(_get(sys.modules[what.module], owner), attribute, new)
            return
        for module in self._modules():
            for name in [name for name, value in vars(module).items() if value is old]:
                setattr(module, name, new)

    def _modules(self) -> Iterator[ModuleType]:
        for name, module in list(sys.modules.items()):
            if module is not None and (name == self.package or name.startswith(self.package + ".")):
                yield module

    def _warn(self, unknown: Sequence[str]) -> None:
        if not self._warned:
            self._warned = True
            reason = "; ".join(unknown) or "none of the functions that it would replace is there"
            warnings.warn(
                f"safe_kernels leaves {self.package} as it is, whose version it does not know: {reason}", stacklevel=3
            )


def _find(what: Replacement) -> Any:
    """None where this version of the package does not have it."""
    try:
        return _get(importlib.import_module(what.module), what.name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{what.module}.".startswith(f"{error.name}."):
            return None
        raise
    except AttributeError:
        return None


def _get(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _parameters(function: Any) -> tuple[str, ...]:
    """Of a function, or of the `forward` of an autograd function or a module, without `self` and `ctx`."""
    target = getattr(function, "forward") if inspect.isclass(function) else function  # noqa: B009
    return tuple(name for name in inspect.signature(target).parameters if name not in ("self", "ctx"))


def _unknown(what: Replacement, original: Any) -> str:
    return f"{what.module}.{what.name} takes ({', '.join(_parameters(original))})"


def _refuse_foreign(package: str, what: Replacement, original: Any) -> None:
    origin = getattr(original, "__module__", None) or "?"
    if origin != package and not origin.startswith(package + "."):
        raise RuntimeError(
            f"{what.module}.{what.name} comes from {origin}: another library has replaced it. Use one of the two"
        )
