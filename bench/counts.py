"""What the kernels of others spend on an element of the vocabulary beside ours, counted in machine code without a GPU.

    python bench/counts.py            # a line a kernel: ours, and those of the projects that are installed here
    python bench/counts.py --json     # the same for programs

Each is compiled for sm_90 with the blocks and warps that its project launches at 151,936 columns. A kernel that loads
logits is counted in its hot loop, one whose program takes a single block in the whole program, and a matrix product in
its tile's work beside the product: that part of a tile costs registers and issue slots, not memory.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for a checkout that is not installed

from bench.providers.peers import without_package_init
from safe_kernels.inspect import TARGETS, VOCABULARY, counted, least_times, resources
from safe_kernels.machine_code import (
    WARP,
    Instruction,
    counts,
    hot_loop,
    innermost,
    instructions,
    loops,
    spent,
)

TARGET = "sm_90"


class Peer(NamedTuple):
    """A kernel as its project launches it; arguments that are not named are int32."""

    name: str
    package: str
    kernel: str  # module:function
    types: dict[str, str]
    constants: dict[str, Any]
    multiples: Sequence[str]  # integers that are multiples of 16
    num_warps: int
    num_stages: int
    part: str = "loop"  # that is counted: "loop", "program" or "epilogue"
    elements: int = 0  # of a block, where the part is no loop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    as_json = parser.parse_args().json
    rows = []
    for row in all_counted():
        rows.append(row)
        if not as_json:
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if as_json:
        print(json.dumps(rows))


def all_counted() -> Iterator[dict[str, Any]]:
    for row in counted(TARGET):
        yield {"project": "safe-kernels", **row}
    for peer in (*trl(), *liger(), *verl(), *cut_cross_entropy()):
        if version := version_of(peer.package):
            yield {"project": f"{peer.package} {version}", "counted": peer.name, "target": TARGET, **counted_peer(peer)}


def version_of(package: str) -> str | None:
    """None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def counted_peer(peer: Peer) -> dict[str, Any]:
    binary = compiled(peer)
    found: dict[str, Any] = resources(binary)
    code = instructions(binary.asm["cubin"])
    if peer.part == "loop":
        found |= counts(hot_loop(code, may_mask=True), found, peer.num_warps, logit_bytes=2, streams=1)
        return found | least_times(found)
    part = epilogue(code) if peer.part == "epilogue" else program(code)
    return found | {"of": peer.part, **spent(part, peer.elements / WARP / peer.num_warps)}


def program(code: list[Instruction]) -> list[Instruction]:
    """Up to where every thread leaves."""
    last = next(i for i, x in enumerate(code) if x.name == "EXIT" and not x.predicate)
    return code[: last + 1]


def epilogue(code: list[Instruction]) -> list[Instruction]:
    """The work on a tile beside its product: the loop around the product's, or the program, without the product's."""
    found = loops(code)
    products = [(a, b) for a, b in innermost(found) if any(x.name in ("HGMMA", "HMMA") for x in code[a : b + 1])]
    around = [(a, b) for a, b in found for c, d in products if a <= c and d <= b and (a, b) != (c, d)]
    first, last = around[0] if around else (0, len(code) - 1)
    inside = {i for a, b in products for i in range(a, b + 1)}
    return [x for i, x in enumerate(code[first : last + 1], first) if i not in inside]


def compiled(peer: Peer) -> Any:
    module, _, name = peer.kernel.partition(":")
    kernel = getattr(load(module), name)
    while not isinstance(kernel, triton.JITFunction):  # under autotuners and heuristics
        kernel = kernel.fn
    names = kernel.arg_names
    constants = {name: value for name, value in peer.constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else peer.types.get(name, "i32") for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in peer.multiples]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": peer.num_warps, "num_stages": peer.num_stages}
    return triton.compile(source, target=TARGETS[TARGET], options=options)


def load(module: str) -> Any:
    if module.startswith("verl."):
        return without_package_init(module, "verl", "verl.utils", "verl.utils.kernel")
    return importlib.import_module(module)


def pointers(dtype: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, f"*{dtype}")


def trl() -> Iterator[Peer]:
    types = pointers("bf16", "logits_ptr", "grad_logits_ptr") | pointers("i64", "index_ptr", "row_mask_ptr")
    types |= pointers("fp32", "logprobs_ptr", "entropy_ptr", "log_z_ptr", "expected_logit_ptr")
    types |= pointers("fp32", "grad_logprobs_ptr", "grad_entropy_ptr")
    constants = {"n_cols": VOCABULARY, "TEMPERATURE": 1.0, "HAS_MASK": False, "BLOCK_SIZE": 1024}
    constants |= {"HAS_LOGPROB_GRAD": True, "HAS_ENTROPY_GRAD": True, "index_row_stride": 1}
    strides = ["logits_batch_stride", "logits_row_stride", "grad_logits_batch_stride", "grad_logits_row_stride"]
    strides += ("index_batch_stride", "mask_batch_stride", "mask_row_stride", "rows_per_batch")
    module, launched = "trl.kernels.logprob_entropy", (types, constants, strides, 4, 3)
    yield Peer("statistics", "trl", f"{module}:_forward_kernel", *launched)
    yield Peer("gradient", "trl", f"{module}:_backward_kernel", *launched, part="program", elements=1024)


def liger() -> Iterator[Peer]:
    types = {"X_ptr": "*bf16", "Y_ptr": "*i64", "loss_ptr": "*fp32", "n_non_ignore": "fp32"}
    constants = dict.fromkeys(("weight_ptr", "z_loss_ptr", "token_accuracy_ptr", "predicted_tokens_ptr", "softcap"))
    constants |= {"lse_square_scale": 0.0, "label_smoothing": 0.0, "reduction": "mean", "RETURN_Z_LOSS": False}
    constants |= {"RETURN_TOKEN_ACCURACY": False, "RETURN_PREDICTED_TOKENS": False, "BLOCK_SIZE": 32768}
    constants |= {"HAS_WEIGHT": False, "HAS_SOFTCAPPING": False, "loss_stride": 1, "Y_stride": 1}
    constants |= {"token_accuracy_stride": 0, "predicted_tokens_stride": 0}
    constants |= {"sum_non_ignore_weight": 0.0, "weight_sum": 0.0}
    for name, gradients in {"log-prob": False, "log-prob, gradient": True}.items():
        every = constants | {"HAS_GRADIENTS": gradients}
        kernel = "liger_kernel.ops.cross_entropy:liger_cross_entropy_kernel"
        yield Peer(name, "liger-kernel", kernel, types, every, ("X_stride", "n_cols"), 32, 3)


def verl() -> Iterator[Peer]:
    types = pointers("bf16", "hidden_ptr", "weight_ptr", "d_logits_ptr") | {"labels_ptr": "*i64"}
    types |= pointers("fp32", "max_ptr", "accu_ptr", "entropy_b_ptr", "global_logprobs_ptr", "maximum_ptr")
    types |= pointers("fp32", "global_logprobs_scalar_ptr", "d_entropy_ptr", "d_logprobs_ptr")
    rows = ("hidden_m", "weight_n", "max_m", "accu_m", "entropy_b_m", "d_logits_m")
    types |= {f"stride_{name}": "i64" for name in rows} | {"rcp_temperature": "fp32"}
    columns = ["hidden_k", "weight_k", "max_n", "accu_n", "entropy_b_n", "global_logprobs", "labels", "maximum", "accu"]
    columns += ("d_entropy", "d_logprobs", "entropy_b", "d_logits_n")
    constants = {"BLOCK_SIZE_M": 128, "BLOCK_SIZE_N": 256, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 16, "USE_TMA": True}
    constants |= {f"stride_{name}": 1 for name in columns} | {"reduction": 0}
    multiples = ["num_tokens", "hidden_size", "vocab_size", "vocab_per_split", "rank"]
    multiples += [f"stride_{name}" for name in ("hidden_m", "weight_n", "d_logits_m", "accu_m")]
    launched = (types, constants, multiples, 8, 3, "epilogue", 128 * 256)
    kernels = "verl.utils.kernel.kernels:efficient_entropy_"
    yield Peer("fused statistics", "verl", f"{kernels}kernel_general_mainloop", *launched)
    yield Peer("gradient", "verl", f"{kernels}backward_kernel_general_d_logits_split_N", *launched)


def cut_cross_entropy() -> Iterator[Peer]:
    types = pointers("bf16", "E", "C", "dE", "dC") | pointers("fp32", "LSE", "dOut")
    types |= pointers("u32", "Locks", "dELocks", "dCLocks")
    types |= {"Targets": "*i64", "filter_eps": "fp32", "grad_scale": "fp32"}
    constants = dict.fromkeys(("LA", "Valids", "softcap", "VocabOrdering"))
    constants |= {"stride_ed": 1, "stride_cd": 1, "stride_lse_b": 1, "stride_vb": 1, "B_BIN": 1024}
    constants |= {"BLOCK_D": 32, "GROUP_B": 8, "MM_BACK_BLOCK_D": 64, "DOT_PRECISION": "ieee"}
    constants |= dict.fromkeys(("EVEN_D", "MM_BACK_EVEN_D", "FILTER_GRAD", "HAS_TARGETS"), True)
    constants |= dict.fromkeys(("HAS_VALIDS", "HAS_SOFTCAP", "HAS_LA", "ITEM_DO", "SHIFT"), False)
    constants |= dict.fromkeys(("HAS_VOCAB_ORDERING", "REQUIRES_GRAD"), False)
    for name, kernel, rows, warps, stages in (
        ("fused log-prob", "cce_lse_forward:_cce_lse_forward_kernel", 256, 8, 3),
        ("gradient", "cce_backward:_cce_backward_kernel", 128, 4, 4),
    ):
        every, multiples = constants | {"BLOCK_B": rows, "BLOCK_V": 128}, ("B", "V", "D", "stride_eb", "stride_cv")
        launched = (types, every, multiples, warps, stages, "epilogue", rows * 128)
        yield Peer(name, "cut-cross-entropy", f"cut_cross_entropy.{kernel}", *launched)


if __name__ == "__main__":
    main()
