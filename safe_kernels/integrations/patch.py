"""Replaces functions of an installed package, all of them or none, and puts them back."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

logger = logging.getLogger("safe_kernels")
DECORATORS = ("torch", "contextlib")  # whose wrappers a package may put around its own functions
ONE_AT_A_TIME = threading.RLock()

F = TypeVar("F", bound=Callable[..., Any])


def one_at_a_time(method: F) -> F:
    """Of all patches: they look for their names in the same modules."""

    @functools.wraps(method)
    def locked(*arguments: Any) -> Any:
        with ONE_AT_A_TIME:
            return method(*arguments)

    return locked  # type: ignore[return-value]


class Replacement(NamedTuple):
    """One function, class or method of the package, and what takes its place."""

    module: str  # "trl.trainer.utils"
    name: str  # "entropy_from_logits", or "Actor.forward" for a method
    signatures: Sequence[tuple[str, ...]]  # the parameter names that are known, one tuple a version
    make: Callable[[Any], Any]  # from the original to its replacement; called when the patch is applied


class Patch:
    """The replacements in one package. `apply`, `revert`, or a `with` block; applying twice has the effect of once,
    and a block inside an applied patch undoes nothing.

    A function is replaced where it is defined and under every name that a loaded module of the package, or of one of
    the `downstream` packages that build on it, has bound to it. Names elsewhere, such as those of your script, stay.

    A function that the package lacks is skipped, unless the patch `needs` it. An unknown signature means an unknown
    version, and so does one before `oldest`: then nothing is replaced, with one warning. If another library has already
    replaced a function, `apply` raises RuntimeError, since the two together would silently train wrong.
    SAFE_KERNELS_<PACKAGE>=0 in the environment switches the patch off. The replaced names are logged at INFO by the
    logger "safe_kernels".
    """

    def __init__(
        self,
        package: str,
        replacements: Sequence[Replacement],
        needs: Sequence[Replacement] = (),
        downstream: Sequence[str] = (),
        oldest: str = "0",
    ):
        self.package, self.replacements, self.needs, self.downstream = package, replacements, needs, downstream
        self.oldest = oldest
        self.switch = f"SAFE_KERNELS_{package.upper()}"
        self._made: list[tuple[Replacement, Any, Any]] = []  # (what, the original, ours)
        self._said: set[str] = set()
        self._is_new = False  # whether the last `apply` made the replacements
        self._blocks: list[bool] = []  # of each `with` block that is open, whether it reverts

    @property
    def replaced(self) -> list[str]:
        """What leads to ours now, by its full name; empty when the patch is not active."""
        return [f"{what.module}.{what.name}" for what, _, ours in self._made if _find(what) == ours]

    def status(self) -> list[str]:
        """Every name that leads to one of ours now: those of `replaced`, and those bound to them in loaded modules."""
        names = [f"{place}.{name}" for what, _, ours in self._made for place, _, name in self._places(what, ours)]
        return list(dict.fromkeys([*self.replaced, *names]))

    @one_at_a_time
    def apply(self) -> Patch:
        self._is_new = False
        if self._made:
            return self
        if os.environ.get(self.switch) == "0":
            self._warn(f"safe_kernels leaves {self.package} as it is: {self.switch} is 0")
            return self
        if self.package not in sys.modules and importlib.util.find_spec(self.package) is None:
            raise ModuleNotFoundError(
                f"{self.package} is not installed: there is nothing to replace", name=self.package
            )
        found = [(what, original) for what in self.replacements if (original := _find(what)) is not None]
        for what, original in found:
            _refuse_foreign(self.package, what, original)
        unknown = [_unknown(what, original) for what, original in found if _parameters(original) not in what.signatures]
        there = [what for what, _ in found]
        unknown += [f"{x.module}.{x.name} is not there" for x in self.needs if x not in there]
        if _numbers(version := _version(self.package)) < _numbers(self.oldest):
            unknown.append(f"it is {version}, and {self.oldest} is the oldest that was compared")
        if unknown or not found:
            reason = "; ".join(unknown) or "none of the functions that it would replace is there"
            self._warn(f"safe_kernels leaves {self.package} as it is, whose version it does not know: {reason}")
            return self
        made = [(what, original, what.make(original)) for what, original in found]
        for what, original, ours in made:
            self._rebind(what, original, ours)
        self._made, self._is_new = made, True
        logger.info("in %s %s these are now of safe_kernels: %s", self.package, version, ", ".join(self.replaced))
        return self

    @one_at_a_time
    def revert(self) -> None:
        for what, _, ours in self._made:
            if _find(what) != ours:
                raise RuntimeError(
                    f"{what.module}.{what.name} was replaced again after safe_kernels had replaced it; "
                    "undo that first, then this"
                )
        while self._made:
            what, original, ours = self._made.pop()
            self._rebind(what, ours, original)

    def __enter__(self) -> Patch:
        if not self._made:
            self.apply()
        self._blocks.append(self._is_new)
        self._is_new = False
        return self

    def __exit__(self, *_: object) -> None:
        if self._blocks.pop():
            self.revert()

    def _rebind(self, what: Replacement, old: Any, new: Any) -> None:
        for _, owner, name in list(self._places(what, old)):
            is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
            setattr(owner, name, staticmethod(new) if is_static else new)

    def _places(self, what: Replacement, value: Any) -> Iterator[tuple[str, Any, str]]:
        """The name of a module or class, itself, and its attribute: where `value` is defined and was imported to."""
        path, _, attribute = what.name.rpartition(".")
        if path:
            owner = _get(sys.modules[what.module], path)
            if getattr(owner, attribute) == value:
                yield f"{what.module}.{path}", owner, attribute
            return
        for name, module in list(sys.modules.items()):
            if module is not None and name.partition(".")[0] in (self.package, *self.downstream):
                yield from ((name, module, bound) for bound, x in list(vars(module).items()) if x is value)

    def _warn(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, stacklevel=4)


def _find(what: Replacement) -> Any:
    """None if this version of the package does not have it."""
    try:
        module = importlib.import_module(what.module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{what.module}.".startswith(f"{error.name}."):
            return None
        raise
    try:
        return _get(module, what.name)
    except AttributeError:
        return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules[package], "__version__", "?"))


def _numbers(version: str) -> list[int]:
    """The leading ones; none of a version that has none, which counts as new."""
    return [int(x) for x in re.findall(r"\d+", version)[:3]] or [sys.maxsize]


def _get(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _definition(function: Any) -> Any:
    """The class of an autograd function's `apply`, whose own module and signature are PyTorch's; else itself."""
    owner = getattr(function, "__self__", None)
    return owner if inspect.isclass(owner) else function


def _parameters(function: Any) -> tuple[str, ...]:
    """Of a function, or of the `forward` of an autograd function or a module, without `self` and `ctx`."""
    target = _definition(function)
    target = getattr(target, "forward", target) if inspect.isclass(target) else target
    return tuple(name for name in inspect.signature(target).parameters if name not in ("self", "ctx"))


def _unknown(what: Replacement, original: Any) -> str:
    return f"{what.module}.{what.name} takes ({', '.join(_parameters(original))})"


def _refuse_foreign(package: str, what: Replacement, original: Any) -> None:
    """By where it was defined; functools.wraps copies `__module__`, but not the globals of the code that runs."""
    original = _definition(original)
    origins = [getattr(original, "__module__", None) or "?"]
    origins += [getattr(original, "__globals__", {}).get("__name__", origins[0])]
    for origin, allowed in zip(origins, ((package,), (package, *DECORATORS)), strict=True):
        if origin.partition(".")[0] not in allowed:
            raise RuntimeError(
                f"{what.module}.{what.name} comes from {origin}: another library has replaced it. Use one of the two"
            )
