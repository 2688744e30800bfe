"""Launch choices: frozen data, by kernel and shape. They never read the number of rows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowChoice:
    """A program streams `rows` rows, `columns` at a time."""

    rows: int
    columns: int
    num_warps: int


# Not measured yet: chosen by compilation alone (no spills on sm_80, sm_90, sm_100; see tests/test_triton_compile.py).
NARROW_ROWS = RowChoice(rows=2, columns=1024, num_warps=4)
WIDE_ROWS = RowChoice(rows=1, columns=4096, num_warps=8)
ROW_CHOICES = (NARROW_ROWS, WIDE_ROWS)


def row_choice(width: int) -> RowChoice:
    return NARROW_ROWS if width <= NARROW_ROWS.columns else WIDE_ROWS


@dataclass(frozen=True)
class ScanChoice:
    """A program walks one sequence from its end, `tokens` at a time."""

    tokens: int
    num_warps: int


# Not measured yet: chosen by compilation alone (80 registers at most; with 4 warps 128).
SCAN = ScanChoice(tokens=1024, num_warps=8)

# Workspaces of `linear.py`: a tile of float32 logits, and the whole rows of the closed form. A reference doubles them,
# low-precision inputs add half of one: less than 400 MB, and 1.2 GB, at 8192 tokens of width 2048.
ROWS_OF_A_TILE = 8192
TILE_BYTES = 96 << 20
SWEEP_BYTES = 384 << 20
