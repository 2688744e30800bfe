"""`python -m safe_kernels.inspect`: what every shipped choice of the kernels compiles to, without a GPU.

    python -m safe_kernels.inspect                       registers, shared and spilled memory, for each target
    python -m safe_kernels.inspect --every-combination   the same of the row kernels with all options, in many minutes
    python -m safe_kernels.inspect --counts              what the row kernels spend on an element of the vocabulary

The first compiles each kernel with no optional argument and with all. `--only REGEX` takes the lines that match,
`--json` prints the same for programs. The exit code is 1 if something spills in a loop.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .inputs import ALL_ROWS, DIVERGENCES
from .machine_code import GPUS, counts, cuobjdump, hot_loops, instructions, least_seconds, spills_in_loops
from .triton_backend import launch
from .triton_backend.divergence_rows import divergence_gradient_kernel, divergence_kernel
from .triton_backend.fused import fused_kernel, merge_kernel
from .triton_backend.gemm import product_kernel
from .triton_backend.launch import GemmChoice, RowChoice
from .triton_backend.rows import CARRIED, gradient_kernel, statistics_kernel
from .triton_backend.values import gae_kernel, terms_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    **dict.fromkeys(("logits", "ref_logits", "grad_logits", "bias", "ref_bias"), "*bf16"),
    **dict.fromkeys(("temperatures", "carry", "stats", "out"), "*fp32"),
    **dict.fromkeys(("grad_logprob", "grad_entropy", "grad_kl", "grad_ref_kl"), "*fp32"),
    **dict.fromkeys(("v1", "v2", "rewards", "bootstrap", "value", "advantage", "returns"), "*fp32"),
    **dict.fromkeys(("ref_temperatures", "grad_divergence"), "*fp32"),
    **dict.fromkeys(("kl", "target_v1", "target_v2", "threshold_tensor", "terms"), "*fp32"),
    "cu_seqlens": "*i32",
    "tokens": "*i64",
    "mask": "*u8",
}
FLOATS = {"temperature", "logit_scale", "softcap", "gamma", "decay", "alpha", "threshold", "beta"}
FLOATS |= {"ref_temperature", "ref_logit_scale", "ref_softcap"}
COUNTED: dict[str, tuple[Any, tuple[str, ...]]] = {  # kernel, and its optional arguments; `ref_kl` is REF_KL
    "statistics": (statistics_kernel, ()),
    "statistics with a reference": (statistics_kernel, ("ref_logits",)),
    "statistics with both KLs": (statistics_kernel, ("ref_logits", "ref_kl")),
    "gradient": (gradient_kernel, ("grad_logprob", "grad_entropy")),
    "gradient with KL": (gradient_kernel, ("ref_logits", "grad_logprob", "grad_entropy", "grad_kl")),
    "gradient with both KLs": (
        gradient_kernel,
        ("ref_logits", "grad_logprob", "grad_entropy", "grad_kl", "grad_ref_kl"),
    ),
    "statistics with a reference and softcap": (statistics_kernel, ("ref_logits", "softcap")),
}
WALKS: dict[str, tuple[Any, str, int]] = {  # of the divergences of a teacher: kernel, divergence, which of its loops
    "reverse KL": (divergence_kernel, "reverse_kl", 0),
    "forward KL": (divergence_kernel, "forward_kl", 0),
    "JSD and TV, first walk": (divergence_kernel, "jsd", 0),
    "JSD, second walk": (divergence_kernel, "jsd", 1),
    "TV, second walk": (divergence_kernel, "tv", 1),
    "gradient of the reverse KL": (divergence_gradient_kernel, "reverse_kl", 0),
    "gradient of the forward KL": (divergence_gradient_kernel, "forward_kl", 0),
    "gradient of the JSD": (divergence_gradient_kernel, "jsd", 0),
    "gradient of the TV": (divergence_gradient_kernel, "tv", 0),
}
HEAD_OPTIONS = ("bias", "ref_bias", "logit_scale", "softcap")
GRADIENTS = ("grad_logprob", "grad_entropy", "grad_kl", "grad_ref_kl")
COMBINED = (  # kernel, what it reads and writes, and the options that reach it there beside a reference
    (statistics_kernel, "bf16", "", ("ref_kl",)),
    (statistics_kernel, "fp16", "", ("ref_kl",)),
    (statistics_kernel, "fp32", "", ("ref_kl", *HEAD_OPTIONS, "carry")),
    (gradient_kernel, "bf16", "bf16", GRADIENTS),
    (gradient_kernel, "fp16", "fp16", GRADIENTS),
    (gradient_kernel, "fp32", "fp32", (*GRADIENTS, *HEAD_OPTIONS)),
    (gradient_kernel, "fp32", "bf16", (*GRADIENTS, *HEAD_OPTIONS)),  # float16 is packed alike
)
TOKENS, VOCABULARY = 8192, 151_936  # that the times are derived for
ABSENT = {  # of the fused kernel, by its reference
    "none": ("ref_hidden", "ref_weight", "ref_bias"),
    "shared": ("ref_weight",),
    "own": (),
}
FUSED = [  # reference, rows of the statistics, bits of the operands
    (reference, rows, bits)
    for reference in ABSENT
    for rows in CARRIED
    for bits in (16, 32)
    if (reference == "none") == (rows == 4)
]
NOT_PLAIN = ("bias", "ref_bias", "softcap")
INSTRUCTIONS = {"wgmma": "HGMMA", "bulk_loads": "UTMALDG", "tcgen05": r"UTC\w*MMA", "mfma": "v_mfma"}


class Case(NamedTuple):
    kernel: Any
    label: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int]
    types: dict[str, str] = {}
    required: tuple[str, ...] = ()  # of the optional arguments
    optional: tuple[bool, ...] = (False, True)  # without and with them

    def __str__(self) -> str:
        return f"kernel {self.kernel.__name__}  " + "  ".join(f"{name} {value}" for name, value in self.label.items())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", action="store_true")
    parser.add_argument("--every-combination", action="store_true")
    parser.add_argument("--only", default="", metavar="REGEX")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    rows = (
        counted(args.only) if args.counts else measure(combinations if args.every_combination else cases_of, args.only)
    )
    found = []
    for row in rows:
        found.append(row)
        if not args.json:
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    spilling = [row.get("spills_in_loops", row["spilled"]) for row in found if row["spilled"]]
    in_loops = sum(n > 0 for n in spilling)
    print(json.dumps(found) if args.json else f"{len(found)} compiled, {len(spilling)} spill, {in_loops} in a loop")
    return 1 if in_loops else 0


def counted(only: str = "", target: str = "sm_90") -> Iterator[dict[str, Any]]:
    """The row kernels on bfloat16 logits: instructions an element, and the times that memory and issue slots allow."""
    choice = launch.ROWS_BY_WARP[TARGETS[target].warp_size]
    cases = {}
    for name, (kernel, present) in COUNTED.items():
        case = next(x for x in row_cases(choice) if x.kernel is kernel)._replace(required=present)
        case.constants["REF_KL"] = "ref_kl" in present
        cases[name] = case, 0, 1 + ("ref_logits" in present)
    for name, (kernel, divergence, walk) in WALKS.items():
        label = {"divergence": divergence, "reads": "bf16"}
        case = next(x for x in divergence_cases(choice) if x.kernel is kernel and x.label == label)
        cases[name] = case, walk, 2
    for name, (case, walk, streams) in cases.items():
        if re.search(only, name):
            binary = compiled(case, TARGETS[target], False)
            found: dict[str, Any] = resources(binary)
            loop = hot_loops(instructions(binary.asm["cubin"]))[walk]
            found |= counts(loop, found, choice.num_warps, logit_bytes=2, streams=streams)
            yield {"counted": name, "target": target, **found, **least_times(found)}


def least_times(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By GPU, for so many tokens and such a vocabulary."""
    by_gpu = {gpu: least_seconds(found, rates, TOKENS * VOCABULARY) for gpu, rates in GPUS.items()}
    return {gpu: {f"{x}_ms": round(1e3 * least[x], 2) for x in least} for gpu, least in by_gpu.items()}


def measure(cases: Callable[[str], Iterator[Case]], only: str) -> Iterator[dict[str, Any]]:
    """In threads: most of the time goes into the assembler and other programs."""
    all_cases = [(target, case, optional) for target in TARGETS for case in cases(target) for optional in case.optional]
    chosen = [(target, case, optional) for target, case, optional in all_cases if re.search(only, f"{target} {case}")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(lambda x: measured(*x), chosen)


def measured(target: str, case: Case, optional: bool) -> dict[str, Any]:
    names = {"target": target, "kernel": case.kernel.__name__, "arguments": "all" if optional else "required"}
    return names | case.label | resources(compiled(case, TARGETS[target], optional))


def cases_of(target: str) -> Iterator[Case]:
    yield from (
        *row_cases(launch.ROWS_BY_WARP[TARGETS[target].warp_size]),
        *divergence_cases(launch.ROWS_BY_WARP[TARGETS[target].warp_size]),
        *scan_cases(),
        *merge_cases(),
        *fused_cases(target),
        *product_cases(target),
    )


def row_cases(choice: RowChoice) -> Iterator[Case]:
    for kernel in (statistics_kernel, gradient_kernel):
        constants = {"ALIGNED": True, "R": choice.rows, "C": choice.columns}
        options = {"num_warps": choice.num_warps}
        yield Case(kernel, {"columns": choice.columns}, constants, options, required=("grad_logprob",))


def divergence_cases(choice: RowChoice) -> Iterator[Case]:
    """Logits in 16 bits, and the float32 tiles of hidden states with all arguments."""
    for kernel, name in itertools.product((divergence_kernel, divergence_gradient_kernel), DIVERGENCES):
        constants = {"DIVERGENCE": name, "ALIGNED": True, "R": choice.rows, "C": choice.columns}
        for reads, optional in (("bf16", False), ("fp32", True)):
            label, types = {"divergence": name, "reads": reads}, dict.fromkeys(("logits", "ref_logits"), f"*{reads}")
            yield Case(kernel, label, constants, {"num_warps": choice.num_warps}, types, optional=(optional,))


def combinations(target: str) -> Iterator[Case]:
    """The row kernels with every combination that changes their loops; a mask and temperatures are read before them."""
    choice = launch.ROWS_BY_WARP[TARGETS[target].warp_size]
    for case in divergence_cases(choice):
        yield case._replace(label=case.label | {"aligned": False}, constants=case.constants | {"ALIGNED": False})
    by_kernel = {case.kernel: case for case in row_cases(choice)}
    for kernel, reads, writes, options in COMBINED:
        case, types = by_kernel[kernel], {"logits": f"*{reads}", "ref_logits": f"*{reads}", "grad_logits": f"*{writes}"}
        for present, aligned in itertools.product(subsets("ref_logits", *options), (True, False)):
            if is_reachable(kernel, present):
                label = {
                    "reads": reads,
                    "writes": writes or "statistics",
                    "aligned": aligned,
                    "with": " ".join(present),
                }
                constants = case.constants | {"ALIGNED": aligned} | without(kernel, present)
                yield Case(kernel, label, constants, case.options, types, optional=(True,))


def subsets(*names: str) -> list[tuple[str, ...]]:
    return [found for n in range(len(names) + 1) for found in itertools.combinations(names, n)]


def is_reachable(kernel: Any, present: Sequence[str]) -> bool:
    if "ref_logits" not in present and any(x in present for x in ("ref_bias", "ref_kl")):
        return False
    reads_reference = any(x in present for x in ("grad_kl", "grad_ref_kl"))
    return kernel is statistics_kernel or (
        reads_reference == ("ref_logits" in present) and any(x in present for x in GRADIENTS)
    )


def without(kernel: Any, present: Sequence[str]) -> dict[str, Any]:
    """Constants for the options that are not present. The gradient reads a reference only for a KL."""
    given, whole = {*present, "mask", "temperatures"}, "carry" not in present
    constants = {"FIRST": whole, "LAST": whole, "REF_KL": "ref_kl" in present}
    return dict.fromkeys(optional_arguments(kernel) - given) | constants


def scan_cases() -> Iterator[Case]:
    options = {"num_warps": launch.SCAN.num_warps}
    yield Case(gae_kernel, {"tokens": launch.SCAN.tokens}, {"B": launch.SCAN.tokens}, options)
    constants, options = {"R": launch.LOOK_UP.tokens}, {"num_warps": launch.LOOK_UP.num_warps}
    yield Case(terms_kernel, {"tokens": launch.LOOK_UP.tokens}, constants, options)


def merge_cases() -> Iterator[Case]:
    for rows in CARRIED:
        constants = statistics_constants(rows) | {"REFERENCE": rows > 4, "R": launch.MERGE.rows}
        yield Case(merge_kernel, {"rows": rows}, constants, {"num_warps": launch.MERGE.num_warps})


def fused_cases(target: str) -> Iterator[Case]:
    for reference, rows, bits in FUSED:
        work, absent = "statistics" if reference == "none" else "with reference", ABSENT[reference]
        optional = (False, True) if bits == 16 else (True,)  # the slowest to compile, and used least
        label = {"reference": reference, "rows": rows, "bits": bits}
        yield fused_case(launch.GEMMS[target, work, bits], label, absent, optional)
        if (target, work, bits) in launch.PLAIN:
            plain = (*absent, *NOT_PLAIN)
            yield fused_case(launch.PLAIN[target, work, bits], label | {"plain": True}, plain, optional)


def fused_case(choice: GemmChoice, label: dict[str, Any], absent: Sequence[str], optional: tuple[bool, ...]) -> Case:
    operands = dict.fromkeys(("hidden", "ref_hidden"), choice.rows)
    operands |= dict.fromkeys(("weight", "ref_weight"), choice.columns)
    types = {name: operand(choice, label["bits"], height, choice.inner) for name, height in operands.items()}
    constants = gemm_constants(choice) | statistics_constants(label["rows"]) | {"SPLIT": choice.split}
    constants |= dict.fromkeys(absent)
    return Case(fused_kernel, label, constants, gemm_options(choice), types, ("ref_hidden", "ref_weight"), optional)


def product_cases(target: str) -> Iterator[Case]:
    """Its two uses: a tile of logits, and the sum of gradients."""
    for bits in (16, 32):
        choice = launch.GEMMS[target, "product", bits]
        for y_by_row in (True, False):
            y_block = (choice.columns, choice.inner) if y_by_row else (choice.inner, choice.columns)
            types = {"x": operand(choice, bits, choice.rows, choice.inner), "y": operand(choice, bits, *y_block)}
            constants = gemm_constants(choice) | {"Y_BY_ROW": y_by_row}
            label = {"y_by_row": y_by_row, "bits": bits}
            yield Case(product_kernel, label, constants, gemm_options(choice), types, optional=(True,))


def statistics_constants(rows: int) -> dict[str, Any]:
    return {"CARRIED": CARRIED[rows], "REF_KL": rows == ALL_ROWS}


def gemm_constants(choice: GemmChoice) -> dict[str, Any]:
    loads = "descriptors" if choice.descriptors else "aligned"
    tile = {"M": choice.rows, "C": choice.columns, "K": choice.inner}
    return {"LOADS": loads, "GROUP": launch.ROW_TILES_TOGETHER, **tile}


def gemm_options(choice: GemmChoice) -> dict[str, int]:
    return {"num_warps": choice.num_warps, "num_stages": choice.num_stages}


def operand(choice: GemmChoice, bits: int, *block: int) -> str:
    dtype = "bf16" if bits == 16 else "fp32"
    return f"tensordesc<{dtype}[{block[0]}, {block[1]}]>" if choice.descriptors else f"*{dtype}"


def compiled(case: Case, target: GPUTarget, optional: bool) -> Any:
    """The kernel with every optional argument, or with none."""
    names = case.kernel.arg_names
    constants = {"FIRST": not optional, "LAST": True, "REF_KL": optional} | case.constants
    if not optional:
        constants |= dict.fromkeys(optional_arguments(case.kernel) - set(case.required))
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else case.types.get(name) or kind(name) for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in ("H", "ref_H")]
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return triton.compile(source, target=target, options=case.options)


def optional_arguments(kernel: Any) -> set[str]:
    """Those that its signature says may be None."""
    return set(re.findall(r"^    (\w+),  # .*\bor None\b", kernel.src, re.MULTILINE))


def kind(name: str) -> str:
    """The type of an argument, as Triton writes it."""
    if name in POINTERS:
        return POINTERS[name]
    if name in FLOATS:
        return "fp32"
    return "i64" if "stride" in name else "i32"


def resources(binary: Any) -> dict[str, int]:
    """Registers, shared and spilled memory of a compiled kernel, its vector loads of 16 bytes and its instructions."""
    inside = {}
    if "amdgcn" in binary.asm:
        listing = binary.asm["amdgcn"]
        # A spilled scalar register goes into a vector register, not into memory.
        spilled = sum(int(n) for n in re.findall(r"vgpr_spill_count:\s*(\d+)", listing))
        registers = max(int(n) for n in re.findall(r"\.vgpr_count:\s*(\d+)", listing))
        vector_loads = len(re.findall(r"load_dwordx4", listing))
    else:
        usage, ptx = cuobjdump(binary.asm["cubin"], "--dump-resource-usage"), binary.asm["ptx"]
        found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
        spilled, registers = found["STACK"] + found["LOCAL"], found["REG"]
        vector_loads = len(re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\.cg", ptx))
        with_bulk_loads = "cp.async.bulk" in ptx  # a listing takes a second
        listing = cuobjdump(binary.asm["cubin"], "--dump-sass") if with_bulk_loads else ""
        if spilled:
            inside = {"spills_in_loops": spills_in_loops(instructions(binary.asm["cubin"]))}
    counts = {name: len(re.findall(rf"\b{pattern}", listing)) for name, pattern in INSTRUCTIONS.items()}
    return {
        "registers": registers,
        "shared": binary.metadata.shared,
        "spilled": spilled,
        **inside,
        "vector_loads": vector_loads,
        **{name: count for name, count in counts.items() if count},
    }


if __name__ == "__main__":
    sys.exit(main())
