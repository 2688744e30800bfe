"""Statistics straight from hidden states: a matrix product whose logits never leave the registers.

A program takes some rows and one split of the vocabulary, and walks its tiles: the product of a tile accumulates in
float32 and goes into the streaming state as soon as it is complete. A second kernel merges the states of the splits.
As in `gemm.py`, the bits of a row do not depend on the other rows.

Shapes: N tokens, V vocabulary, H hidden width; M rows, C columns and K of the width at a time.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import ALL_ROWS, LinearInputs
from . import launch
from .gemm import (
    add_products,
    add_products_of_two,
    by_row,
    loads_of,
    operand_bits,
    place,
    rows_of,
    source_of,
    takes_descriptor,
)
from .logits import RowInputs
from .online_softmax import (
    empty_forward,
    empty_policy,
    empty_reference,
    merge,
    merge_forward,
    merge_policy,
    update,
    update_forward,
    update_policy,
)
from .rows import (
    CARRIED,
    load_forward,
    load_policy,
    load_reference,
    load_rows,
    logits_of,
    store_forward,
    store_forward_stats,
    store_policy,
    store_policy_stats,
    store_reference,
    store_reference_stats,
)

NOT_SPECIALIZED = ["N", "temperature", "logit_scale", "stride_stats", "splits"]
STRIDES = ["stride_hidden", "stride_weight", "stride_ref_hidden", "stride_ref_weight"]


@triton.jit(do_not_specialize=[*NOT_SPECIALIZED, *STRIDES])
def fused_kernel(
    hidden,  # [N, H], rows stride_hidden apart, or its descriptor; the same for the next three
    weight,  # [V, H]
    ref_hidden,  # [N, ref_H], or None: no reference
    ref_weight,  # [V, ref_H], or None: the reference shares the policy's head
    bias,  # [V], or None
    ref_bias,  # [V], or None
    tokens,  # [N]
    temperatures,  # [N], or None: temperature
    mask,  # [N], or None
    carry,  # [splits, CARRIED, N]
    stride_hidden,
    stride_weight,
    stride_ref_hidden,
    stride_ref_weight,
    N,
    vocabulary,
    H,
    ref_H,
    splits,
    temperature,
    logit_scale,  # or None
    softcap,  # or None
    REF_KL: tl.constexpr,  # asked for
    LOADS: tl.constexpr,  # "descriptors", "aligned" pointers or "any" pointers
    CARRIED: tl.constexpr,  # rows of carry a split
    SPLIT: tl.constexpr,  # columns
    GROUP: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
):
    row_tile, split = place(tl.cdiv(N, M), splits, GROUP)
    row = row_tile.to(tl.int64) * M + tl.arange(0, M)
    inside = row < N
    live = (load_rows(mask, 1.0, row, inside) != 0) & inside
    inverse = 1.0 / tl.where(live, load_rows(temperatures, temperature, row, inside), 1.0)
    token = tl.load(tokens + row, mask=inside, other=0).to(tl.int32)  # merge_kernel handles ids outside the vocabulary
    first, end = split * SPLIT, tl.minimum((split + 1) * SPLIT, vocabulary)
    end = tl.where(tl.max(live.to(tl.int32), axis=0) > 0, end, first)  # rows that are all masked cost nothing
    x = rows_of(hidden, row_tile * M, N, stride_hidden, H, M)
    a_token = tl.zeros([M], tl.float32)
    policy = empty_policy(a_token)
    state = carry + split.to(tl.int64) * CARRIED * N + row

    if ref_hidden is None:
        for start in range(first, end, C):
            columns = start + tl.arange(0, C)[None, :]
            y = rows_of(weight, start, vocabulary, stride_weight, H, C)
            u = add_products(tl.zeros([M, C], tl.float32), x, y, LOADS, True, K)
            a = logits_of(u, columns, columns < end, bias, logit_scale, softcap)
            a_token += tl.sum(tl.where(columns == token[:, None], a, 0.0), axis=1)
            policy = update_policy(policy, a, inverse)
    else:
        x_ref = rows_of(ref_hidden, row_tile * M, N, stride_ref_hidden, ref_H, M)
        a_ref_token = tl.zeros([M], tl.float32)
        reference, forward = empty_reference(a_ref_token), empty_forward(a_ref_token)
        for start in range(first, end, C):
            columns = start + tl.arange(0, C)[None, :]
            zero = tl.zeros([M, C], tl.float32)
            y = rows_of(weight, start, vocabulary, stride_weight, H, C)
            if ref_weight is None:
                u, u_ref = add_products_of_two(zero, zero, x, x_ref, y, LOADS, K)
            else:
                u = add_products(zero, x, y, LOADS, True, K)
                y_ref = rows_of(ref_weight, start, vocabulary, stride_ref_weight, ref_H, C)
                u_ref = add_products(zero, x_ref, y_ref, LOADS, True, K)
            a = logits_of(u, columns, columns < end, bias, logit_scale, softcap)
            a_ref = logits_of(u_ref, columns, columns < end, ref_bias, logit_scale, softcap)
            a_token += tl.sum(tl.where(columns == token[:, None], a, 0.0), axis=1)
            a_ref_token += tl.sum(tl.where(columns == token[:, None], a_ref, 0.0), axis=1)
            before, ref_before = policy, reference
            policy, reference = update(policy, reference, a, a_ref, inverse)
            if REF_KL:
                forward = update_forward(forward, before, ref_before, policy, reference, a, a_ref, inverse)
        store_reference(state, N, reference, a_ref_token, inside)
        if REF_KL:
            store_forward(state, N, forward, inside)
    store_policy(state, N, policy, a_token, inside)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def merge_kernel(
    carry,  # as fused_kernel leaves it
    tokens,  # [N]
    temperatures,  # [N], or None: temperature
    mask,  # [N], or None
    stats,  # rows of RowStats
    stride_stats,
    N,
    vocabulary,
    splits,
    temperature,
    CARRIED: tl.constexpr,
    REFERENCE: tl.constexpr,
    REF_KL: tl.constexpr,
    R: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = row < N
    live = (load_rows(mask, 1.0, row, inside) != 0) & inside
    inverse = 1.0 / tl.where(live, load_rows(temperatures, temperature, row, inside), 1.0)
    token = tl.load(tokens + row, mask=inside, other=0)
    known = (token >= 0) & (token < vocabulary)
    step = tl.full([], CARRIED, tl.int64) * N
    a_token = tl.zeros([R], tl.float32)
    policy = empty_policy(a_token)
    if REFERENCE:
        a_ref_token = tl.zeros([R], tl.float32)
        reference, forward = empty_reference(a_ref_token), empty_forward(a_ref_token)
        for split in range(0, splits):
            state = carry + split * step + row
            other, a_here = load_policy(state, N, live)
            other_reference, a_ref_here = load_reference(state, N, live)
            if REF_KL:
                other_forward = load_forward(state, N, live)
                forward = merge_forward(forward, policy, reference, other_forward, other, other_reference, inverse)
            policy, reference = merge(policy, reference, other, other_reference, inverse)
            a_token += a_here
            a_ref_token += a_ref_here
        store_reference_stats(stats + row, stride_stats, policy, reference, a_ref_token, inverse, known, live, inside)
        if REF_KL:
            store_forward_stats(stats + row, stride_stats, forward, policy, reference, live, inside)
    else:
        for split in range(0, splits):
            other, a_here = load_policy(carry + split * step + row, N, live)
            policy = merge_policy(policy, other, inverse)
            a_token += a_here
    store_policy_stats(stats + row, stride_stats, policy, a_token, inverse, known, live, inside)


def fused_statistics(inputs: LinearInputs, per_row: RowInputs, stats: Tensor) -> None:
    """Fill `stats` [stats_rows, N]."""
    if per_row.N == 0:
        return
    matrices = [None if x is None else by_row(x) for x in matrices_of(inputs)]
    choice = choice_for(matrices, is_plain(inputs))
    splits = triton.cdiv(len(inputs.weight_VH), choice.split)
    carry = stats.new_empty(splits, CARRIED[inputs.stats_rows], per_row.N)
    multiply(inputs, matrices, per_row, carry, choice)
    merge_splits(carry, per_row, stats, len(inputs.weight_VH))


def matrices_of(inputs: LinearInputs) -> list[Tensor | None]:
    return [inputs.hidden_NH, inputs.weight_VH, inputs.ref_hidden_NH, inputs.ref_weight_VH]


def choice_for(matrices: Sequence[Tensor | None], plain: bool) -> launch.GemmChoice:
    """Depends only on widths and dtypes, so that bits do not depend on where a tensor begins."""
    kind = kind_of(matrices)
    may_load_in_bulk = all(x is None or x.shape[1] * x.element_size() % 16 == 0 for x in matrices)
    larger = launch.plain_choice(*kind) if plain and may_load_in_bulk else None
    return larger or launch.gemm_choice(*kind)


def is_fastest(inputs: LinearInputs) -> bool:
    """Whether the fused kernel beats a product and the row kernel: if it can load the larger tiles in bulk."""
    matrices = matrices_of(inputs)
    in_bulk = all(x is None or (x.stride(1) == 1 and takes_descriptor(x)) for x in matrices)
    return in_bulk and is_plain(inputs) and launch.plain_choice(*kind_of(matrices)) is not None


def is_plain(inputs: LinearInputs) -> bool:
    return inputs.bias_V is None and inputs.ref_bias_V is None and inputs.softcap is None


def kind_of(matrices: Sequence[Tensor | None]) -> tuple[torch.device, str, int]:
    given = [x for x in matrices if x is not None]
    return given[0].device, "statistics" if matrices[2] is None else "with reference", operand_bits(*given)


def multiply(
    inputs: LinearInputs,
    matrices: list[Tensor | None],
    per_row: RowInputs,
    carry: Tensor,
    choice: launch.GemmChoice,
) -> None:
    """Leave the state of every split in `carry` [splits, carried, N]."""
    splits, carried, count = carry.shape
    loads = loads_of(choice, *(x for x in matrices if x is not None))
    blocks = [(height, choice.inner) for height in (choice.rows, choice.columns)]
    names = ("hidden", "weight", "ref_hidden", "ref_weight")
    operands: dict[str, Any] = {}
    for name, x, block in zip(names, matrices, blocks * 2, strict=True):
        operands |= {name: source_of(x, block, loads), f"stride_{name}": 0 if x is None else x.stride(0)}
    fused_kernel[(triton.cdiv(count, choice.rows) * splits,)](
        **operands,
        carry=carry,
        vocabulary=len(inputs.weight_VH),
        H=inputs.hidden_NH.shape[1],
        ref_H=0 if inputs.ref_hidden_NH is None else inputs.ref_hidden_NH.shape[1],
        splits=splits,
        REF_KL=inputs.stats_rows == ALL_ROWS,
        LOADS=loads,
        CARRIED=carried,
        SPLIT=choice.split,
        GROUP=launch.ROW_TILES_TOGETHER,
        M=choice.rows,
        C=choice.columns,
        K=choice.inner,
        num_warps=choice.num_warps,
        num_stages=choice.num_stages,
        **per_row._asdict(),
    )


def merge_splits(carry: Tensor, per_row: RowInputs, stats: Tensor, vocabulary: int) -> None:
    splits, carried, count = carry.shape
    merge_kernel[(triton.cdiv(count, launch.MERGE.rows),)](
        carry=carry,
        tokens=per_row.tokens,
        temperatures=per_row.temperatures,
        temperature=per_row.temperature,
        mask=per_row.mask,
        N=count,
        stats=stats,
        stride_stats=stats.stride(0),
        vocabulary=vocabulary,
        splits=splits,
        CARRIED=carried,
        REFERENCE=len(stats) > 4,
        REF_KL=len(stats) == ALL_ROWS,
        R=launch.MERGE.rows,
        num_warps=launch.MERGE.num_warps,
    )
