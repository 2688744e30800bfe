"""What a kernel spends on one element of the vocabulary, counted in NVIDIA's machine code, without a GPU.

It counts the hot loop's instructions by purpose, and the widths of its loads and stores. The hot loop is the
longest innermost loop that loads from global memory without a mask. Derived from the counts: warps that fit on a
multiprocessor, bytes in flight there, and the least time that a GPU's memory and issue slots allow.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
KINDS = {  # of instructions, by their names without modifiers
    "arithmetic": ("FFMA", "FADD", "FMUL", "FFMA2", "FADD2", "FMUL2", "HFMA2", "HADD2", "HMUL2"),
    "maximum": ("FMNMX", "IMNMX", "VIMNMX", "FMNMX3", "VIMNMX3"),
    "exponential": ("MUFU",),
    "conversion": ("F2FP", "F2F", "PRMT", "F2I", "I2F"),
    "selection": ("ISETP", "FSETP", "PLOP3", "FSEL", "SEL", "FSET"),
    "memory": ("LDG", "STG", "LDGSTS"),
    "exchange": ("SHFL", "LDS", "STS", "LDSM", "STSM", "BAR"),
    "spill": ("LDL", "STL"),
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}
WARP, REGISTERS, WARPS, BLOCKS = 32, 65_536, 64, 32  # of a multiprocessor of sm_90 and sm_100


class Gpu(NamedTuple):
    multiprocessors: int
    clock: float  # Hz under such a load
    bandwidth: float  # bytes read and written a second, of a copy


GPUS = {
    "H100": Gpu(132, 1.7e9, 3.0e12),
    "H200": Gpu(132, 1.8e9, 4.2e12),  # measured, bench/results
    "B200": Gpu(148, 1.8e9, 6.5e12),  # a guess from its data sheet
}


class Instruction(NamedTuple):
    address: int
    predicate: str
    opcode: str  # with its modifiers
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def kind(self) -> str:
        """Its purpose; addresses and loop control are `other`."""
        return KIND_OF.get(self.name, "other")

    @property
    def bytes(self) -> int:
        """Of memory, a thread."""
        if self.kind != "memory":
            return 0
        widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return next((widths[part] for part in self.opcode.split(".") if part in widths), 4)


def cuobjdump(cubin: bytes, what: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), what, file.name], capture_output=True, text=True, check=True).stdout


def instructions(cubin: bytes) -> list[Instruction]:
    found = (LINE.search(line) for line in cuobjdump(cubin, "--dump-sass").splitlines())
    return [Instruction(int(x[1], 16), x[2] or "", x[3], x[4].strip()) for x in found if x]


def hot_loop(code: list[Instruction]) -> list[Instruction]:
    """Raises ValueError if no innermost loop loads from global memory without a mask."""
    at = {x.address: i for i, x in enumerate(code)}
    loops: dict[int, int] = {}
    for i, x in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", x.operands) if x.name == "BRA" else None
        if target and int(target[1], 16) < x.address:
            loops[at[int(target[1], 16)]] = i
    inner = [(a, b) for a, b in loops.items() if not any(a < c and d <= b for c, d in loops.items())]
    bodies = [code[a : b + 1] for a, b in inner]
    loads = [[x for x in body if x.name in ("LDG", "LDGSTS") and x.bytes >= 4] for body in bodies]
    found = [body for body, load in zip(bodies, loads, strict=True) if load and not any(x.predicate for x in load)]
    if not found:
        raise ValueError("no loop without masks that loads from global memory")
    return max(found, key=len)


def counts(cubin: bytes, registers: int, num_warps: int, logit_bytes: int, streams: int) -> dict[str, Any]:
    """Of a row kernel that reads `streams` tensors of logits; instructions are a warp's, for each of its elements."""
    loop = hot_loop(instructions(cubin))
    loads = [x.bytes for x in loop if x.name in ("LDG", "LDGSTS")]
    stores = [x.bytes for x in loop if x.name == "STG"]
    elements = sum(loads) / logit_bytes / streams  # of a thread in an iteration
    kinds = Counter(x.kind for x in loop)
    blocks = min(WARPS // num_warps, BLOCKS, REGISTERS // (-(-registers // 8) * 8 * WARP * num_warps))
    return {
        "instructions": round(len(loop) / elements, 2),
        "kinds": {kind: round(kinds[kind] / elements, 2) for kind in (*KINDS, "other") if kinds[kind]},
        "load_bytes": sorted(set(loads)),
        "store_bytes": sorted(set(stores)),
        "warps": blocks * num_warps,
        "bytes_in_flight": sum(loads) * WARP * num_warps * blocks,
        "moved": (sum(loads) + sum(stores)) / elements,  # bytes an element
    }


def least_seconds(found: dict[str, Any], gpu: Gpu, elements: int) -> dict[str, float]:
    """The limits of memory and of issue slots, separately: a multiprocessor issues four instructions a cycle."""
    issue = found["instructions"] * elements / WARP / 4 / gpu.multiprocessors / gpu.clock
    return {"memory": found["moved"] * elements / gpu.bandwidth, "issue": issue}
