"""Triton's interpreter, twice as fast, with the maximum of GPUs, and with products whose sums have one order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


class RowByRow:
    """numpy, whose products of a tile have the same bits for a row wherever it stands.

    A library of matrix products takes the last rows of a tile by another loop, on some processors in another order.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def matmul(a_MK: Any, b_KN: Any, dtype: Any) -> Any:
        return np.matmul(a_MK[..., :, None, :], b_KN[..., None, :, :], dtype=dtype)[..., :, 0, :]


def patch_language_once_a_launch() -> None:
    """Triton patches its language again for every device function that a kernel calls, which takes half of the time.

    Here a launch patches all of it, and the functions that it calls find it patched. And a maximum or minimum ignores
    NaN, as that of a GPU does unless told otherwise. A row's product does not depend on the rows beside it.
    """
    if interpreter.InterpretedFunction.__call__ is not call:
        patch = interpreter._patch_lang
        language = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
        interpreter._patch_lang = lambda fn: patch(language)
        interpreter.InterpretedFunction.__call__ = call
        interpreter.np = RowByRow()
        interpreter.InterpreterBuilder.create_maxnumf = lambda self, x, y: self.binary_op(x, y, np.fmax)
        interpreter.InterpreterBuilder.create_minnumf = lambda self, x, y: self.binary_op(x, y, np.fmin)


def call(self: interpreter.InterpretedFunction, *arguments: Any, **options: Any) -> Any:
    try:
        return self.rewrite()(*arguments, **options)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error
