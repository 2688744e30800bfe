"""Every shipped choice of the row kernels, compiled for GPUs that are not here."""

import json
import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def rows():
    """Compiled in a process of its own: with the interpreter on there is nothing to compile."""
    command = [sys.executable, "-m", "safe_kernels.inspect", "--json"]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def test_every_target_kernel_and_choice_is_there(rows):
    assert len(rows) == 4 * 2 * 2 * 2
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}


def test_nothing_spills(rows):
    assert [row for row in rows if row["spilled"]] == []


def test_logits_are_loaded_16_bytes_at_a_time(rows):
    assert [row for row in rows if row["vector_loads"] < 1] == []


def test_row_kernels_need_next_to_no_shared_memory(rows):
    assert max(row["shared"] for row in rows) <= 4096
