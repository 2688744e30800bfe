"""The cost model: FLOPs and bytes of each operation, its floor on measured roofs, and predictions for many GPUs.

    python bench/measurement/cost.py --matmul 700 --copy 3    # predictions at 8B and 70B from your machine's roofs

Shapes: N tokens, H hidden width, V vocabulary, R ranks. One product hidden @ weight.T is U = 2 N H V FLOPs.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a checkout that is not installed

from bench.measurement.workloads import BACKWARD, FORWARD, MODELS, TRAINED, Workload

LOGIT_BYTES = 4  # logits between the product and the exponent are float32


@dataclass(frozen=True)
class Cost:
    flops: float
    bytes: float

    def seconds(self, roofs: Roofs) -> float:
        """The roofline: whichever of the two takes longer, perfectly overlapped."""
        return max(self.flops / roofs.flops, self.bytes / roofs.bytes)


@dataclass(frozen=True)
class Roofs:
    """Rates measured on the machine: a large matmul in the workload's dtype, and a large copy (read and written)."""

    flops: float
    bytes: float


def itemsize(workload: Workload) -> int:
    return 8 if workload.dtype == "float64" else 4 if workload.dtype == "float32" else 2


def products(workload: Workload, part: str) -> int:
    """Multiples of U without a tensor of N x V: each recomputation of the logits counts."""
    tensors = 2 if workload.kl else 1
    forward = tensors
    if part == FORWARD:
        return forward
    recompute = (
        0 if workload.entrance in ("loss", "distill") else tensors
    )  # the closed form takes the gradient in its forward
    return forward + recompute + (2 if part == TRAINED else 1)


def cost(workload: Workload, part: str) -> Cost:
    """The arithmetic floor of a pass: what every implementation that stores no N x V tensor of its own has to do."""
    live, size, tensors = workload.N * (1 - workload.masked), itemsize(workload), 2 if workload.kl else 1
    if workload.entrance == "gae":
        return Cost(0, workload.N * (3 * size + 1 + 3 * 4))  # v1, v2, rewards, mask; three float32 results
    if workload.entrance == "logits":
        reads = tensors * live if part == FORWARD else 2 * tensors * live
        return Cost(0, size * workload.V * (reads + (workload.N if part == BACKWARD else 0)))
    u = 2.0 * live * workload.H * workload.V
    if workload.entrance == "distill":
        count, ratio = products(workload, part), workload.teacher_width / workload.H
        operands = size * workload.H * (live + workload.V)
        return Cost((count + ratio) * u, (count + ratio) * operands)
    if workload.entrance == "kept":  # each token's own ids, and the rows of the head that anyone kept
        u, rows = 2.0 * live * workload.H * workload.ids, min(workload.V, live * workload.ids)
        operands = size * workload.H * (tensors * live + rows)
        return Cost(products(workload, part) * u, products(workload, part) / tensors * operands)
    operands = size * (tensors * live * workload.H + workload.V * workload.H)
    count = products(workload, part)
    return Cost(count * u, count / tensors * operands)


def tile_bytes(workload: Workload, part: str) -> float:
    """Memory traffic that tiles of float32 logits add to the products, whose own writes they hide."""
    if workload.entrance not in ("hidden", "loss"):
        return 0.0
    live_logits = workload.N * (1 - workload.masked) * workload.V
    reads = (2 if workload.kl else 1) * LOGIT_BYTES
    return live_logits * (reads if part == FORWARD else 2 * reads + itemsize(workload))


def sum_bytes(workload: Workload, part: str) -> float:
    """What the backward of `hidden` and `loss` on the triton backend reads and writes of its float32 sums.

    Each tile adds its share of the hidden gradient, and each row of tiles its share of the weight's: the first writes.
    """
    from safe_kernels.triton_backend import launch  # a prediction needs no Triton

    if workload.entrance not in ("hidden", "loss") or part == FORWARD:
        return 0.0
    count, width, vocabulary = workload.N, workload.H, workload.V
    rows = launch.ROWS_OF_A_TRAINED_TILE if part == TRAINED else launch.ROWS_OF_A_TILE
    if workload.entrance == "loss":
        rows = launch.SWEEP_BYTES // (LOGIT_BYTES * vocabulary) // launch.ROWS_OF_A_PRODUCT * launch.ROWS_OF_A_PRODUCT
    rows = min(rows, count)
    columns = vocabulary if workload.entrance == "loss" else launch.TILE_BYTES // (LOGIT_BYTES * rows) // 16 * 16
    hidden = 2 * math.ceil(vocabulary / columns) * 4.0 * count * width
    weight = (2 * math.ceil(count / rows) - 1) * 4.0 * vocabulary * width if part == TRAINED else 0.0
    return hidden + weight


def plan_seconds(workload: Workload, part: str, roofs: Roofs) -> float:
    """The floor of the tiled plan: its products at the full matmul roof, then its passes over the tiles."""
    floor = cost(workload, part)
    return floor.seconds(roofs) + tile_bytes(workload, part) / roofs.bytes


def plain_bytes(workload: Workload, part: str) -> float:
    """Memory of plain PyTorch: float32 tensors of N x V alive at its peak, counted on reference.py."""
    tensors = (5 if part == FORWARD else 6.25) + (2.25 if workload.kl else 0)  # a quarter: a tensor of bools
    return LOGIT_BYTES * float(workload.N) * workload.V * tensors


def sharded_seconds(workload: Workload, part: str, roofs: Roofs, ranks: int, link: float, by: str) -> float:
    """A pass on `ranks` GPUs whose links move `link` bytes/s each way, communication not overlapped.

    "tokens": every rank has N / R tokens and gathers the head once a sweep over it.
    "vocabulary": every rank has V / R rows of the head and all N tokens; each gets the others' statistics, and they sum
    hidden gradients. The loss then has no closed form: its slopes wait for the statistics.
    """
    share = (ranks - 1) / ranks
    sweeps = 1 if part == FORWARD or workload.entrance == "loss" else 2
    head = float(itemsize(workload)) * workload.V * workload.H
    if by == "vocabulary" and workload.entrance == "loss":
        workload = replace(workload, entrance="hidden")
    alone = plan_seconds(workload, part, roofs) / ranks
    if by == "tokens":
        gathers = sweeps * share * head
        reduces = share * 4.0 * workload.V * workload.H if part == TRAINED else 0.0
        return alone + (gathers + reduces) / link
    states = (8 if workload.kl else 4) * 4.0 * workload.N
    hidden = 0.0 if part == FORWARD else 4.0 * workload.N * workload.H
    return alone + ((ranks - 1) * states + 2 * share * hidden) / link


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--matmul", type=float, required=True, help="measured matmul roof, TFLOP/s (bf16)")
    parser.add_argument("--copy", type=float, required=True, help="measured copy roof, TB/s, read and written")
    parser.add_argument("--link", type=float, default=0.0, help="measured GB/s between GPUs; 0: one GPU only")
    parser.add_argument("--tokens", type=int, default=8192)
    args = parser.parse_args()
    roofs = Roofs(args.matmul * 1e12, args.copy * 1e12)
    print(f"PREDICTIONS, not measurements: N={args.tokens}, bf16, {args.matmul} TFLOP/s, {args.copy} TB/s")
    heads = {**MODELS, "Llama-3-70B": (8192, 128_256)}
    for name in ("Qwen2.5-3B", "Llama-3-8B", "Llama-3-70B"):
        for entrance in ("hidden", "loss"):
            for kl in (False, True):
                width, vocabulary = heads[name]
                workload = Workload(entrance, name, args.tokens, width, vocabulary, kl=kl, dtype="bfloat16")
                print(prediction(workload, roofs, args.link * 1e9))


def prediction(workload: Workload, roofs: Roofs, link: float) -> str:
    part = workload.passes[-2]
    text = f"{workload}, {part}: 1 GPU {1e3 * plan_seconds(workload, part, roofs):.1f} ms"
    for ranks in (8, 64) if link else ():
        times = {by: sharded_seconds(workload, part, roofs, ranks, link, by) for by in ("tokens", "vocabulary")}
        text += f"; {ranks} GPUs " + ", ".join(f"by {by} {1e3 * t:.2f} ms" for by, t in times.items())
    return text


if __name__ == "__main__":
    main()
