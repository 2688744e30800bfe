"""Launch choices: frozen data, by kernel and shape. They never read the number of rows."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RowChoice:
    """A program streams `rows` rows, `columns` at a time."""

    rows: int
    columns: int
    num_warps: int


# By the width of a warp: each thread loads 16 bytes at a time. On an H200 1024, 2048 and 4096 columns take the same
# time to 2 %, at the rate of a copy. 1024 with 4 warps never spill; the others spill with all arguments given.
ROWS_BY_WARP = {32: RowChoice(rows=1, columns=1024, num_warps=4), 64: RowChoice(rows=1, columns=2048, num_warps=4)}
ROWS = ROWS_BY_WARP[32 if torch.version.hip is None else 64]


@dataclass(frozen=True)
class ScanChoice:
    """A program walks one sequence from its end, `tokens` at a time."""

    tokens: int
    num_warps: int


# Not measured yet: chosen by compilation alone (80 registers at most; with 4 warps 128).
SCAN = ScanChoice(tokens=1024, num_warps=8)
LOOK_UP = ScanChoice(tokens=16, num_warps=2)  # programs that look up the next live token; not measured either


@dataclass(frozen=True)
class GemmChoice:
    """A program makes tiles of `rows` x `columns`, summing over `inner` at a time."""

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int
    descriptors: bool = False  # bulk loads, where alignment allows
    split: int = 2048  # columns of the vocabulary that a program of the statistics walks


# By architecture, work and bits of the operands: the largest tile that does not spill, chosen by compilation. The
# comment is the highest number of registers a thread, over references and optional arguments, and the version of
# Triton in which a larger tile spills, though not in 3.7.
GEMMS = {
    ("sm_80", "statistics", 16): GemmChoice(128, 128, 32, num_warps=8, num_stages=4),  # 243
    ("sm_80", "with reference", 16): GemmChoice(128, 64, 32, num_warps=8, num_stages=4),  # 253
    ("sm_80", "product", 16): GemmChoice(128, 64, 32, num_warps=8, num_stages=4),  # 124
    ("sm_90", "statistics", 16): GemmChoice(128, 128, 64, num_warps=8, num_stages=4, descriptors=True),  # 165
    ("sm_90", "with reference", 16): GemmChoice(128, 64, 64, num_warps=8, num_stages=4, descriptors=True),  # 198
    ("sm_90", "product", 16): GemmChoice(128, 64, 64, num_warps=8, num_stages=4, descriptors=True),  # 111
    ("sm_100", "statistics", 16): GemmChoice(128, 128, 64, num_warps=8, num_stages=4, descriptors=True),  # 173
    ("sm_100", "with reference", 16): GemmChoice(64, 128, 64, num_warps=8, num_stages=3, descriptors=True),  # 176
    ("sm_100", "product", 16): GemmChoice(128, 64, 64, num_warps=8, num_stages=4, descriptors=True),  # 123
    ("gfx942", "statistics", 16): GemmChoice(128, 128, 64, num_warps=8, num_stages=2),  # 168
    ("gfx942", "with reference", 16): GemmChoice(128, 64, 64, num_warps=8, num_stages=2),  # 163; 128 columns: 3.8
    ("gfx942", "product", 16): GemmChoice(128, 128, 64, num_warps=8, num_stages=2),  # 130
}
FLOAT32 = {  # NVIDIA's tensor cores do not multiply float32 exactly, and without them bulk loads cost registers
    "statistics": GemmChoice(64, 128, 16, num_warps=8, num_stages=2),  # 190
    "with reference": GemmChoice(64, 64, 16, num_warps=8, num_stages=2),  # 212; an inner 32: 3.8
    "product": GemmChoice(64, 64, 16, num_warps=4, num_stages=1),  # 162; in Triton 3.6 two stages spill on sm_100
}
GEMMS |= {(target, work, 32): FLOAT32[work] for target, work, _ in GEMMS}
# Without bias and softcap larger tiles do not spill. On an H200, at 8192 x 151,936 x 2048, they beat a product and the
# row kernel, and are what runs: 6.8 ms against 8.8 (8.0 with the tiles above), with a reference 15.7 against 18.9.
PLAIN = {
    ("sm_90", "statistics", 16): GemmChoice(128, 256, 64, num_warps=8, num_stages=3, descriptors=True),  # 255
    ("sm_90", "with reference", 16): GemmChoice(128, 128, 64, num_warps=8, num_stages=3, descriptors=True),  # 255
}
PLAIN_TARGETS = {target for target, *_ in PLAIN}
ROW_TILES_TOGETHER = 16  # with H = 4096 in bf16 and 128 rows, 16 MB of hidden states: they stay in L2


@functools.cache
def architecture(device: torch.device) -> str:
    """The key of GEMMS; anything but Hopper, datacentre Blackwell and AMD gets the smallest tiles."""
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip is not None:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def gemm_choice(device: torch.device, work: str, bits: int) -> GemmChoice:
    return GEMMS[architecture(device), work, bits]


def plain_choice(device: torch.device, work: str, bits: int) -> GemmChoice | None:
    """The choice for logits without bias and softcap, if they have a separate one."""
    return PLAIN.get((architecture(device), work, bits))


@dataclass(frozen=True)
class MergeChoice:
    """A program merges the splits of `rows` rows, one after another."""

    rows: int
    num_warps: int


MERGE = MergeChoice(rows=32, num_warps=1)

# Workspaces of `linear.py`: a tile of float32 logits, and the whole rows of the closed form. A reference doubles them,
# low-precision inputs add half of one: less than 400 MB, and 1.2 GB, at 8192 tokens of width 2048. Tiles are wide,
# so that few products are added to each sum over the vocabulary; for a trained head, whose sums are over rows, higher:
# `bench/measurement/cost.py` counts the bytes, fewest at 4096 rows without more memory.
ROWS_OF_A_PRODUCT = 128  # the height of the BLAS library's tiles
ROWS_OF_A_TILE = 2048
ROWS_OF_A_TRAINED_TILE = 4096
TILE_BYTES = 96 << 20
SWEEP_BYTES = 384 << 20
PART_BYTES = 64 << 20  # of a product that is then added to a float32 sum
INNER = 8192  # terms of a float32 product that are summed one after another; 50,000 lose two bits on an H200
