"""`python -m safe_kernels.inspect`: what every shipped choice of the row kernels compiles to, without a GPU.

Prints registers and bytes of shared and spilled memory a thread or block, for each target, with no optional argument
and with all. `--json` prints the same for programs.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .triton_backend.launch import ROW_CHOICES, RowChoice
from .triton_backend.rows import gradient_kernel, statistics_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    **dict.fromkeys(("logits", "ref_logits", "bias", "ref_bias", "grad_logits"), "*bf16"),
    **dict.fromkeys(("temperatures", "carry", "stats", "grad_logprob", "grad_entropy", "grad_kl"), "*fp32"),
    "tokens": "*i64",
    "mask": "*u8",
}
OPTIONAL = ("ref_logits", "temperatures", "mask", "bias", "ref_bias", "carry", "softcap", "grad_entropy", "grad_kl")


def main() -> None:
    rows = list(measure())
    if "--json" in sys.argv:
        print(json.dumps(rows))
        return
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))


def measure() -> Iterator[dict[str, Any]]:
    for target in TARGETS:
        for kernel in (statistics_kernel, gradient_kernel):
            for choice in ROW_CHOICES:
                for optional in (False, True):
                    binary = compiled(kernel, choice, TARGETS[target], optional)
                    names = {"target": target, "kernel": kernel.__name__, "columns": choice.columns}
                    yield names | {"arguments": "all" if optional else "required"} | resources(binary)


def compiled(kernel: Any, choice: RowChoice, target: GPUTarget, optional: bool) -> Any:
    """The kernel with every optional argument, or with none."""
    names = kernel.arg_names
    flags = {"FIRST": not optional, "LAST": not optional, "ALIGNED": True, "R": choice.rows, "C": choice.columns}
    constants: dict[str, Any] = {name: flags[name] for name in names if name in flags}
    if not optional:
        constants |= {name: None for name in names if name in OPTIONAL}
    signature = {name: "constexpr" if name in constants else kind(name) for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    places = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=aligned)
    return triton.compile(source, target=target, options={"num_warps": choice.num_warps})


def kind(name: str) -> str:
    """The type of an argument, as Triton writes it."""
    if name in POINTERS:
        return POINTERS[name]
    if name in ("temperature", "logit_scale", "softcap"):
        return "fp32"
    return "i64" if "stride" in name else "i32"


def resources(binary: Any) -> dict[str, int]:
    """Registers, shared and spilled memory of a compiled kernel, and its vector loads of 16 bytes."""
    if "amdgcn" in binary.asm:
        listing = binary.asm["amdgcn"]
        # A spilled scalar register goes into a vector register, not into memory.
        spilled = sum(int(n) for n in re.findall(r"vgpr_spill_count:\s*(\d+)", listing))
        registers = max(int(n) for n in re.findall(r"\.vgpr_count:\s*(\d+)", listing))
        return {"registers": registers, "shared": binary.metadata.shared, "spilled": spilled,
                "vector_loads": len(re.findall(r"load_dwordx4", listing))}  # fmt: skip
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    return {
        "registers": found["REG"],
        "shared": found["SHARED"],
        "spilled": found["STACK"] + found["LOCAL"],
        "vector_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", binary.asm["ptx"])),
    }


if __name__ == "__main__":
    main()
