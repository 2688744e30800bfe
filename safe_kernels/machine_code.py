"""What a kernel spends on one element of the vocabulary, counted in NVIDIA's machine code, without a GPU.

Counted: the hot loop's instructions, by purpose and by the pipe that executes them, and the widths of its loads and
stores. The hot loop is the longest innermost loop that loads from global memory without a mask. Derived: the warps that
fit on a multiprocessor, their bytes in flight, and the least time that each pipe and the memory of a GPU allow.
Guessed: the latency of memory, for the least time that so many warps allow.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton

LINE = re.compile(  # address, predicate, opcode, operands; the second word of its code begins the line below
    r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*([^;\n]*);.*\n\s*/\* 0x([0-9a-f]{16}) \*/"
)
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
PIPES = {  # that execute instructions; uniform and control instructions only take an issue slot
    "fma": ("FFMA", "FADD", "FMUL", "IMAD", "HFMA2", "HADD2", "HMUL2"),
    "mufu": ("MUFU", "F2F", "F2I", "I2F", "FRND", "POPC", "FLO"),
    "lsu": ("LDG", "STG", "LDGSTS", "SHFL", "LDS", "STS", "LDSM", "STSM", "LDL", "STL", "ATOMG", "RED"),
    "none": ("BRA", "EXIT", "BSSY", "BSYNC", "NOP", "WARPSYNC", "YIELD", "BAR", "DEPBAR", "LDGDEPBAR", "HGMMA"),
}
PIPE_OF = {name: pipe for pipe, names in PIPES.items() for name in names}
# Lanes a cycle of a multiprocessor of sm_90: "Throughput of Native Arithmetic Instructions", CUDA Programming Guide.
LANES = {"issue": 128, "fma": 128, "alu": 64, "mufu": 16, "lsu": 32}
HALF_RATE = ("IMAD", "HFMA2", "HADD2", "HMUL2")  # of the fma pipe
WARP, REGISTERS, WARPS, BLOCKS, SHARED = 32, 65_536, 64, 32, 228 << 10  # of a multiprocessor of sm_90 and sm_100
LATENCY = 650  # cycles from a load to its data, unloaded: a guess from published microbenchmarks, 560 to 800


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
    stall: int  # cycles until the warp's next instruction may issue

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def kind(self) -> str:
        """Its purpose; addresses and loop control are `other`."""
        return KIND_OF.get(self.name, "other")

    @property
    def pipe(self) -> str:
        return "none" if self.name.startswith(("U", "R2U")) else PIPE_OF.get(self.name, "alu")

    @property
    def slots(self) -> float:
        """How many lanes of its pipe a thread takes: the load/store path moves 4 bytes a lane."""
        if self.pipe == "lsu":
            return max(1, self.bytes / 4)
        return 2 if self.name in HALF_RATE else 1

    @property
    def bytes(self) -> int:
        """Of memory, a thread."""
        if self.pipe != "lsu" or self.name == "SHFL":
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
    found = LINE.finditer(cuobjdump(cubin, "--dump-sass"))
    return [Instruction(int(x[1], 16), x[2] or "", x[3], x[4].strip(), int(x[5], 16) >> 41 & 15) for x in found]


def loops(code: list[Instruction]) -> list[tuple[int, int]]:
    """Positions of the first and the last instruction of each loop."""
    at = {x.address: i for i, x in enumerate(code)}
    found: dict[int, int] = {}
    for i, x in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", x.operands) if x.name == "BRA" else None
        if target and int(target[1], 16) < x.address:
            found[at[int(target[1], 16)]] = i
    return sorted(found.items())


def innermost(found: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(a, b) for a, b in found if not any(a < c and d <= b for c, d in found)]


def hot_loop(code: list[Instruction], may_mask: bool = False) -> list[Instruction]:
    return max(hot_loops(code, may_mask), key=len)


def hot_loops(code: list[Instruction], may_mask: bool = False) -> list[list[Instruction]]:
    """Innermost loops that load from global memory, without a mask unless they may have one; ValueError if none does.

    In the order of the code: a kernel that walks a row twice has two.
    """
    bodies = [code[a : b + 1] for a, b in innermost(loops(code))]
    loads = [[x for x in body if x.name in ("LDG", "LDGSTS") and x.bytes >= 4] for body in bodies]
    loading = [(body, any(x.predicate for x in load)) for body, load in zip(bodies, loads, strict=True) if load]
    found = [body for body, is_masked in loading if may_mask or not is_masked]
    if not found:
        raise ValueError("no loop loads from global memory without a mask")
    return found


def spills_in_loops(code: list[Instruction]) -> int:
    inside = {i for a, b in loops(code) for i in range(a, b + 1)}
    return sum(x.kind == "spill" for i, x in enumerate(code) if i in inside)


def spent(code: list[Instruction], elements: float) -> dict[str, Any]:
    """Of a warp's instructions for each of its elements, of which each thread has so many."""
    kinds, pipes = Counter(x.kind for x in code), dict.fromkeys((*LANES, "none"), 0.0)
    for x in code:
        pipes[x.pipe] += x.slots
    return {
        "instructions": round(len(code) / elements, 2),
        "kinds": {kind: round(kinds[kind] / elements, 2) for kind in (*KINDS, "other") if kinds[kind]},
        "pipes": {pipe: round(pipes[pipe] / elements, 2) for pipe in LANES if pipes[pipe]},
    }


def resident_warps(registers: int, shared: int, num_warps: int) -> int:
    by_registers = REGISTERS // (-(-registers // 8) * 8 * WARP * num_warps)
    return num_warps * min(WARPS // num_warps, BLOCKS, by_registers, SHARED // (shared + 1024))


def counts(
    loop: list[Instruction], resources: dict[str, int], num_warps: int, logit_bytes: int, streams: int
) -> dict[str, Any]:
    """Of the hot loop of a row kernel that reads `streams` tensors of logits."""
    loads = [x.bytes for x in loop if x.name in ("LDG", "LDGSTS")]
    stores = [x.bytes for x in loop if x.name == "STG"]
    elements = sum(loads) / logit_bytes / streams  # of a thread in an iteration
    warps = resident_warps(resources["registers"], resources["shared"], num_warps)
    return {
        **spent(loop, elements),
        "load_bytes": sorted(set(loads)),
        "store_bytes": sorted(set(stores)),
        "warps": warps,
        "bytes_in_flight": sum(loads) * WARP * warps,
        "moved": (sum(loads) + sum(stores)) / elements,  # bytes an element
        "cycles": round((LATENCY + sum(x.stall for x in loop)) / elements / warps / WARP, 3),  # an element
    }


def least_seconds(found: dict[str, Any], gpu: Gpu, elements: int) -> dict[str, float]:
    """The limit of each resource alone: no kernel is faster than the slowest of them.

    `latency`: each warp waits for its loads and then issues its instructions, while the others do the same.
    """
    a_second = gpu.multiprocessors * gpu.clock
    slots = {"issue": found["instructions"], **found["pipes"]}
    pipes = {name: slots[name] * elements / LANES[name] / a_second for name in slots}
    latency = found["cycles"] * elements / a_second
    return {"memory": found["moved"] * elements / gpu.bandwidth, **pipes, "latency": latency}
