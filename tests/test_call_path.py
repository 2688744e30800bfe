"""From the public function to the launch: few functions, in few files, which a reader can follow."""

import os
import sys
from pathlib import Path

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

import safe_kernels

PACKAGE = os.path.dirname(safe_kernels.__file__)
PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
LONGEST, FILES = 20, 5


class Launched(Exception):
    pass


def functions_before_the_launch(call):
    """(file, name, line) of every function of the package that runs before the first launch, in their order."""
    seen = {}

    def record(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and not code.co_name.startswith("<"):
            seen[os.path.relpath(code.co_filename, PACKAGE), code.co_name, code.co_firstlineno] = None

    sys.setprofile(record)
    try:
        with pytest.raises(Launched):
            call()
    finally:
        sys.setprofile(None)
    return list(seen)


def launched(*_, **__):
    raise Launched


@pytest.mark.parametrize("wants_gradient", [False, True])
def test_from_hidden_states_to_the_launch(wants_gradient, monkeypatch):
    hidden = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=wants_gradient)
    weight, tokens = torch.randn(160, 32, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.int64)

    def call():
        return safe_kernels.linear_token_stats(hidden, weight, tokens, backend="triton")

    call()
    monkeypatch.setattr(InterpretedFunction, "run", launched)
    found = functions_before_the_launch(call)
    table = "\n".join(f"| `safe_kernels/{file}:{line}` | `{name}` |" for file, name, line in found)
    assert len(found) <= LONGEST + wants_gradient, table  # autograd's own forward
    assert len({file for file, _, _ in found}) <= FILES, table
    assert wants_gradient or table in PAGE.read_text(), f"docs/architecture.md needs this table:\n{table}"
