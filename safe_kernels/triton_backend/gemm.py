"""Batch-invariant matmuls: every row is summed in a fixed order.

A row's bits depend neither on the other rows, nor on their number, nor on its position. `product` is a plain
product; `fused.py` builds on the same parts.

Shapes: M rows, C columns and K of the inner width at a time.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import launch


class Matrix(NamedTuple):
    """Some rows of a matrix: a tensor descriptor, or a pointer and a stride."""

    source: tl.tensor
    first: tl.tensor  # index of the first row
    row: tl.tensor  # indices of all rows
    rows: tl.tensor  # number of rows in the whole matrix
    stride: tl.tensor
    width: tl.tensor


@triton.jit
def rows_of(source, first, rows, stride, width, R: tl.constexpr):
    return Matrix(source, first, first + tl.arange(0, R), rows, stride, width)


@triton.jit
def load_block(matrix, start, LOADS: tl.constexpr, BY_ROW: tl.constexpr, K: tl.constexpr):
    """[R, K] of a matrix from column `start`, 0 outside. BY_ROW: rows are contiguous, otherwise columns."""
    if LOADS == "descriptors":
        if BY_ROW:
            block = matrix.source.load([matrix.first, start])
        else:
            block = matrix.source.load([start, matrix.first]).T
    else:
        rows, stride, width = matrix.rows, matrix.stride, matrix.width
        if LOADS == "aligned":  # the same values, but now the compiler sees that it can load 16 bytes at a time
            stride = stride // 16 * 16
            if BY_ROW:
                width = width // 16 * 16
            else:
                rows = rows // 16 * 16
        row, column = matrix.row[:, None], start + tl.arange(0, K)[None, :]
        if BY_ROW:
            offset = row.to(tl.int64) * stride + column
        else:
            offset = column.to(tl.int64) * stride + row
        block = tl.load(matrix.source + offset, mask=(row < rows) & (column < width), other=0.0)
    return block


@triton.jit
def add_product(total, x, y):
    """total + x y^T in float32; two different dtypes (bf16, fp16, fp32) are multiplied in fp32."""
    if x.dtype != y.dtype:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y.T, total, input_precision="ieee")


@triton.jit
def add_products(total, x, y, LOADS: tl.constexpr, Y_BY_ROW: tl.constexpr, K: tl.constexpr):
    """[M, C] + every row of x times every row of y."""
    for start in range(0, x.width, K):
        y_block = load_block(y, start, LOADS, Y_BY_ROW, K)
        total = add_product(total, load_block(x, start, LOADS, True, K), y_block)
    return total


@triton.jit
def add_products_of_two(total, ref_total, x, x_ref, y, LOADS: tl.constexpr, K: tl.constexpr):
    """`add_products` for two x, loading each block of y once."""
    for start in range(0, x.width, K):
        y_block = load_block(y, start, LOADS, True, K)
        total = add_product(total, load_block(x, start, LOADS, True, K), y_block)
        ref_total = add_product(ref_total, load_block(x_ref, start, LOADS, True, K), y_block)
    return total, ref_total


@triton.jit
def place(row_tiles, column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile) of this program. GROUP row tiles walk the columns together: their rows stay in L2."""
    program = tl.program_id(0)
    group = program // (GROUP * column_tiles)
    tiles_here = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = program % (GROUP * column_tiles)
    return group * GROUP + within % tiles_here, within // tiles_here


@triton.jit(do_not_specialize=["rows", "columns", "width", "stride_x", "stride_y", "stride_out"])
def product_kernel(
    x,  # [rows, width], rows stride_x apart, or its descriptor
    y,  # [columns, width], rows or columns stride_y apart, or its descriptor
    out,  # [rows, columns] float32, rows stride_out apart
    stride_x,
    stride_y,
    stride_out,
    rows,
    columns,
    width,
    LOADS: tl.constexpr,
    Y_BY_ROW: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
):
    row_tile, column_tile = place(tl.cdiv(rows, M), tl.cdiv(columns, C), GROUP)
    x_rows = rows_of(x, row_tile * M, rows, stride_x, width, M)
    y_rows = rows_of(y, column_tile * C, columns, stride_y, width, C)
    total = add_products(tl.zeros([M, C], tl.float32), x_rows, y_rows, LOADS, Y_BY_ROW, K)
    row, column = x_rows.row[:, None], y_rows.row[None, :]
    pointer = out + row.to(tl.int64) * stride_out + column
    inside = (row < rows) & (column < columns)
    tl.store(pointer, total, mask=inside)


def product(x_MK: Tensor, y_KN: Tensor, out_MN: Tensor) -> None:
    """out = x @ y with float32 sums and a float32 result whose rows depend on no other rows."""
    if out_MN.numel() == 0:
        return
    (rows, width), columns = x_MK.shape, y_KN.shape[1]
    x, y_by_row = by_row(x_MK), y_KN.stride(0) == 1
    y = y_KN.T if y_by_row else by_row(y_KN)  # with contiguous rows
    choice = launch.gemm_choice(x.device, "product", operand_bits(x, y))
    loads = loads_of(choice, x, y)
    y_block = (choice.columns, choice.inner) if y_by_row else (choice.inner, choice.columns)
    product_kernel[(triton.cdiv(rows, choice.rows) * triton.cdiv(columns, choice.columns),)](
        x=source_of(x, (choice.rows, choice.inner), loads),
        y=source_of(y, y_block, loads),
        out=out_MN,
        stride_x=x.stride(0),
        stride_y=y.stride(0),
        stride_out=out_MN.stride(0),
        rows=rows,
        columns=columns,
        width=width,
        LOADS=loads,
        Y_BY_ROW=y_by_row,
        GROUP=launch.ROW_TILES_TOGETHER,
        M=choice.rows,
        C=choice.columns,
        K=choice.inner,
        num_warps=choice.num_warps,
        num_stages=choice.num_stages,
    )


def by_row(x: Tensor) -> Tensor:
    """Contiguous along the last axis; copied if it is not."""
    return x if x.stride(1) == 1 else x.contiguous()


def operand_bits(*matrices: Tensor) -> int:
    """32 if dtypes differ or one is float32."""
    dtypes = {x.dtype for x in matrices}
    return 8 * dtypes.pop().itemsize if len(dtypes) == 1 else 32


def loads_of(choice: launch.GemmChoice, *matrices: Tensor) -> str:
    """The fastest way to load that all of them allow."""
    if choice.descriptors and all(takes_descriptor(x) for x in matrices):
        return "descriptors"
    return "aligned" if all(x.stride(0) % 16 == 0 and x.shape[1] % 16 == 0 for x in matrices) else "any"


def takes_descriptor(x: Tensor) -> bool:
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return aligned and x.stride(0) >= x.shape[1]


def source_of(x: Tensor | None, block: tuple[int, int], loads: str) -> Tensor | TensorDescriptor | None:
    if x is None or loads != "descriptors":
        return x
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], list(block))
