"""Divergences of a student from a teacher: kernels that load rows of both models' logits, and their launches.

One kernel walks a row twice: for the sums of both softmaxes, then for the divergence. Another walks it once more and
writes the gradient, over the student's float32 tile where hidden states are given.

An entry adds p f + extra to the divergence, and p (f - sum p f) is its gradient, in nats (ln 2 comes last):

    reverse_kl    f = log p - log q
    forward_kl    extra = q (log q - log p), and the gradient is p - q
    jsd           f = (1 - beta) (log p - log m),  extra = beta q (log q - log m),  m = beta q + (1 - beta) p
    tv            f = sign(p - q) / 2,  extra = -q f

Shapes: N rows, R of them in a program; W columns, all of the vocabulary, C at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formulas import DistillationObjective
from ..inputs import Divergence, DivergenceGrad, LinearInputs, LogitsInputs, take
from . import launch
from .linear import GradientSums, Sweep
from .logits import RowInputs, Rows
from .online_softmax import LEAST, LN_2, empty_policy, finish_policy, log2_probabilities, union_policy, update_policy
from .rows import NOT_SPECIALIZED, lane_columns, load_logits, load_rows, row_pointers

NUMBERS = [*NOT_SPECIALIZED, "ref_temperature", "ref_logit_scale", "beta"]
GRADIENT_STRIDES = ["grad_rows_inner", "grad_stride_outer", "grad_stride_inner"]


@triton.jit
def entry(log2_p, log2_q, beta, DIVERGENCE: tl.constexpr):
    """(p, q, f, extra), logarithms to base 2."""
    p, q = tl.exp2(log2_p), tl.exp2(log2_q)
    finite_p, finite_q = tl.maximum(log2_p, LEAST), tl.maximum(log2_q, LEAST)
    f, extra = tl.zeros_like(p), tl.zeros_like(p)
    if DIVERGENCE == "reverse_kl":
        f = finite_p - finite_q
    elif DIVERGENCE == "forward_kl":
        extra = q * (finite_q - finite_p)
    elif DIVERGENCE == "jsd":
        log2_m = tl.maximum(tl.log2(beta * q + (1.0 - beta) * p), LEAST)
        f = (1.0 - beta) * (finite_p - log2_m)
        extra = beta * q * (finite_q - log2_m)
    else:
        f = tl.where(p > q, 0.5, tl.where(p < q, -0.5, 0.0))
        extra = -q * f
    return p, q, f, extra


@triton.jit
def nats(x, DIVERGENCE: tl.constexpr):
    """tv has no logarithms."""
    if DIVERGENCE != "tv":
        x = x * LN_2
    return x


@triton.jit(do_not_specialize=NUMBERS)
def divergence_kernel(
    logits,  # rows at outer * stride_outer + inner * stride_inner, columns of stride 1
    ref_logits,  # the same of the teacher
    tokens,  # [N]
    temperatures,  # [N], or None: temperature
    ref_temperatures,  # [N], or None: ref_temperature
    mask,  # [N], or None
    bias,  # [V], or None
    ref_bias,  # [V], or None
    stats,  # rows of DivergenceStats
    rows_inner,
    stride_outer,
    stride_inner,
    ref_rows_inner,
    ref_stride_outer,
    ref_stride_inner,
    N,
    stride_stats,
    W,
    temperature,
    ref_temperature,
    logit_scale,  # or None
    ref_logit_scale,  # or None
    softcap,  # or None
    ref_softcap,  # or None
    beta,
    DIVERGENCE: tl.constexpr,
    ALIGNED: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = row < N
    live = (load_rows(mask, 1.0, row, inside) != 0) & inside
    inverse = 1.0 / tl.where(live, load_rows(temperatures, temperature, row, inside), 1.0)
    ref_inverse = 1.0 / tl.where(live, load_rows(ref_temperatures, ref_temperature, row, inside), 1.0)
    width = tl.where(tl.max(live.to(tl.int32), axis=0) > 0, W, 0)  # rows that are all masked cost nothing
    if ALIGNED:
        width = width // 16 * 16
    token = tl.load(tokens + row, mask=inside, other=0)
    known = (token >= 0) & (token < W)
    row_read = tl.minimum(row, N - 1)
    pointer = row_pointers(logits, row_read, rows_inner, stride_outer, stride_inner, ALIGNED)
    ref_pointer = row_pointers(ref_logits, row_read, ref_rows_inner, ref_stride_outer, ref_stride_inner, ALIGNED)
    a_token = load_logits(pointer, token, known & live, bias, 0, logit_scale, softcap)

    K: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth  # 16 bytes
    zero = tl.zeros([R, C // K], tl.float32)
    student, teacher = empty_policy(zero), empty_policy(zero)
    tiles = width // C
    for REST in tl.static_range(2):  # without masks as far as tiles are whole, then at most one with
        for tile in range(tiles if REST else 0, tiles + (width % C > 0) if REST else tiles):
            columns, seen = tile * C + lane_columns(C // K, K, ALIGNED), None
            if REST:
                seen = (columns < width) & live[:, None, None]
            a = load_logits(pointer[:, None, None], columns, seen, bias, 0, logit_scale, softcap)
            a_ref = load_logits(ref_pointer[:, None, None], columns, seen, ref_bias, 0, ref_logit_scale, ref_softcap)
            student = update_policy(student, a, inverse[:, None])
            teacher = update_policy(teacher, a_ref, ref_inverse[:, None])
    student, teacher = union_policy(student, inverse[:, None]), union_policy(teacher, ref_inverse[:, None])
    logprob, entropy, log_s = finish_policy(student, a_token, inverse)
    log_r = tl.log(teacher.s)

    slope, rest, outside = zero, zero, zero
    for REST in tl.static_range(2):
        for tile in range(tiles if REST else 0, tiles + (width % C > 0) if REST else tiles):
            columns, seen = tile * C + lane_columns(C // K, K, ALIGNED), None
            if REST:
                seen = (columns < width) & live[:, None, None]
            a = load_logits(pointer[:, None, None], columns, seen, bias, 0, logit_scale, softcap)
            a_ref = load_logits(ref_pointer[:, None, None], columns, seen, ref_bias, 0, ref_logit_scale, ref_softcap)
            log2_p = log2_probabilities(a, student.m[:, None, None], log_s[:, None, None], inverse[:, None, None])
            log2_q = log2_probabilities(
                a_ref, teacher.m[:, None, None], log_r[:, None, None], ref_inverse[:, None, None]
            )
            p, q, f, extra = entry(log2_p, log2_q, beta, DIVERGENCE)
            slope += tl.sum(p * f, axis=-1)
            rest += tl.sum(extra, axis=-1)
            # inf where one alone is -inf; where both are it is NaN, which the maximum ignores.
            if DIVERGENCE == "reverse_kl":
                outside = tl.maximum(outside, tl.max(a - a_ref, axis=-1))
            if DIVERGENCE == "forward_kl":
                outside = tl.maximum(outside, tl.max(a_ref - a, axis=-1))
    nan = (log_s + log_r) * 0.0  # or 0: maxima forget the NaN of a row
    slope, rest = nats(tl.sum(slope, axis=-1), DIVERGENCE) + nan, nats(tl.sum(rest, axis=-1), DIVERGENCE)
    divergence = slope + rest
    is_infinite = (tl.max(outside, axis=-1) == float("inf")) & (nan == 0.0)
    divergence = tl.where(is_infinite, float("inf"), divergence)
    slope = tl.where(is_infinite, float("nan"), slope)

    out = stats + row
    tl.store(out, tl.where(live, divergence, 0.0), mask=inside)
    tl.store(out + stride_stats, tl.where(live, entropy, 0.0), mask=inside)
    tl.store(out + 2 * stride_stats, tl.where(live, tl.where(known, logprob, float("nan")), 0.0), mask=inside)
    tl.store(out + 3 * stride_stats, tl.where(live, slope, 0.0), mask=inside)
    tl.store(out + 4 * stride_stats, tl.where(live, student.m, 0.0), mask=inside)
    tl.store(out + 5 * stride_stats, tl.where(live, log_s, 0.0), mask=inside)
    tl.store(out + 6 * stride_stats, tl.where(live, teacher.m, 0.0), mask=inside)
    tl.store(out + 7 * stride_stats, tl.where(live, log_r, 0.0), mask=inside)


@triton.jit(do_not_specialize=[*NUMBERS, *GRADIENT_STRIDES])
def divergence_gradient_kernel(
    logits,
    ref_logits,
    tokens,  # [N]
    temperatures,  # [N], or None: temperature
    ref_temperatures,  # [N], or None: ref_temperature
    mask,  # [N], or None
    bias,  # [V], or None
    ref_bias,  # [V], or None
    stats,  # rows of DivergenceStats
    grad_divergence,  # [N]
    grad_logprob,  # [N], or None
    grad_logits,  # rows like those of logits, with their own strides; may be the logits
    rows_inner,
    stride_outer,
    stride_inner,
    ref_rows_inner,
    ref_stride_outer,
    ref_stride_inner,
    grad_rows_inner,
    grad_stride_outer,
    grad_stride_inner,
    N,
    stride_stats,
    W,
    temperature,
    ref_temperature,
    logit_scale,  # or None
    ref_logit_scale,  # or None
    softcap,  # or None
    ref_softcap,  # or None
    beta,
    DIVERGENCE: tl.constexpr,
    ALIGNED: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """d loss / d (logits as they were loaded). A masked row gets zeros."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = row < N
    live = (load_rows(mask, 1.0, row, inside) != 0) & inside
    inverse = 1.0 / tl.where(live, load_rows(temperatures, temperature, row, inside), 1.0)
    ref_inverse = 1.0 / tl.where(live, load_rows(ref_temperatures, ref_temperature, row, inside), 1.0)
    token = tl.load(tokens + row, mask=inside, other=0)
    saved = stats + row
    slope = tl.load(saved + 3 * stride_stats, mask=inside)
    peak, log_s = tl.load(saved + 4 * stride_stats, mask=inside), tl.load(saved + 5 * stride_stats, mask=inside)
    ref_peak, log_r = tl.load(saved + 6 * stride_stats, mask=inside), tl.load(saved + 7 * stride_stats, mask=inside)
    scale = inverse  # the factor of u in a / T
    if logit_scale is not None:
        scale *= logit_scale
    g = scale * load_rows(grad_divergence, 0.0, row, inside)
    g_logprob = g
    if grad_logprob is not None:
        logprob = tl.load(saved + 2 * stride_stats, mask=inside)
        g_logprob = tl.where(logprob == logprob, scale * load_rows(grad_logprob, 0.0, row, inside), float("nan"))
    row_read = tl.minimum(row, N - 1)
    pointer = row_pointers(logits, row_read, rows_inner, stride_outer, stride_inner, ALIGNED)
    ref_pointer = row_pointers(ref_logits, row_read, ref_rows_inner, ref_stride_outer, ref_stride_inner, ALIGNED)
    grad_pointer = row_pointers(grad_logits, row_read, grad_rows_inner, grad_stride_outer, grad_stride_inner, ALIGNED)
    width = W
    if ALIGNED:
        width = W // 16 * 16
    local = tl.where((token >= 0) & (token < W), token, -1).to(tl.int32)
    whole = tl.where(tl.min(live.to(tl.int32), axis=0) > 0, width // C * C, 0)
    for REST in tl.static_range(2):  # without masks as far as tiles are whole
        for start in range(whole if REST else 0, width if REST else whole, C):
            columns, seen = start + tl.arange(0, C)[None, :], None
            if REST:
                seen = (columns < width) & live[:, None]
            a = load_logits(pointer[:, None], columns, seen, bias, 0, logit_scale, softcap)
            a_ref = load_logits(ref_pointer[:, None], columns, seen, ref_bias, 0, ref_logit_scale, ref_softcap)
            log2_p = log2_probabilities(a, peak[:, None], log_s[:, None], inverse[:, None])
            log2_q = log2_probabilities(a_ref, ref_peak[:, None], log_r[:, None], ref_inverse[:, None])
            p, q, f, _ = entry(log2_p, log2_q, beta, DIVERGENCE)
            if DIVERGENCE == "forward_kl":
                du = g[:, None] * (p - q)
            else:
                du = g[:, None] * (p * (nats(f, DIVERGENCE) - slope[:, None]))
            if grad_logprob is not None:
                is_token = tl.arange(0, C)[None, :] == (local - start)[:, None]  # in 32 bits
                du -= g_logprob[:, None] * p
                du = tl.where(is_token, du + g_logprob[:, None], du)
            if softcap is not None:
                share = a * (1.0 / softcap)
                du *= 1.0 - share * share
            if REST:
                stored = (columns < width) & inside[:, None]
                tl.store(grad_pointer[:, None] + columns, tl.where(seen, du, 0.0), mask=stored)
            else:
                tl.store(grad_pointer[:, None] + columns, du)


def logits_divergence(student: LogitsInputs, teacher: LogitsInputs, divergence: Divergence) -> Tensor:
    per_row = RowInputs.of(student)
    stats = new_stats(student)
    statistics(student.logits, teacher.logits, arguments_of(per_row, RowInputs.of(teacher), divergence), stats)
    return stats


def logits_divergence_gradient(
    student: LogitsInputs,
    teacher: LogitsInputs,
    divergence: Divergence,
    stats: Tensor,
    grads: DivergenceGrad,
    out: Tensor,
) -> None:
    arguments = arguments_of(RowInputs.of(student), RowInputs.of(teacher), divergence)
    gradient(student.logits, teacher.logits, arguments, stats, grads, out)


def linear_divergence(
    student: LinearInputs,
    teacher: LinearInputs,
    divergence: Divergence,
    objective: DistillationObjective,
    needed: Sequence[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """One product forward of each model, one back: whole rows become their gradient while still in memory."""
    per_row, teacher_rows = RowInputs.of(student), RowInputs.of(teacher)
    stats, sums, slopes = new_stats(student), GradientSums(student, needed), objective.slopes()
    sweep = Sweep(slice(0, per_row.N), launch.SWEEP_BYTES // (4 * len(student.weight_VH)), whole_rows=True)
    both = zip(sweep.tiles(student, per_row, False), sweep.tiles(teacher, teacher_rows, False), strict=True)
    for tile, ref_tile in both:
        part, arguments = stats[:, tile.rows], arguments_of(tile.per_row, ref_tile.per_row, divergence)
        statistics(tile.logits_RW, ref_tile.logits_RW, arguments, part)
        if any(needed):
            out, grads, scale_R = tile.prepared(student, take(slopes, tile.rows))
            gradient(tile.logits_RW, ref_tile.logits_RW, arguments, part, grads, out)
            sums.add(tile, out, scale_R)
    return stats, sums.sums


def new_stats(inputs: LogitsInputs | LinearInputs) -> Tensor:
    size = (inputs.stats_rows, inputs.tokens_N.shape[0])
    return torch.empty(size, dtype=torch.float32, device=inputs.tokens_N.device)


def arguments_of(student: RowInputs, teacher: RowInputs, divergence: Divergence) -> dict[str, Any]:
    """Of each row, under the kernels' argument names."""
    names = ("temperature", "temperatures", "bias", "logit_scale", "softcap")
    given = student._asdict() | {f"ref_{name}": getattr(teacher, name) for name in names}
    return given | {"DIVERGENCE": divergence.name, "beta": divergence.beta}


def statistics(logits: Tensor, ref_logits: Tensor, arguments: dict[str, Any], stats: Tensor) -> None:
    launched(divergence_kernel, {"logits": Rows.of(logits), "ref_logits": Rows.of(ref_logits)}, arguments, stats)


def gradient(
    logits: Tensor, ref_logits: Tensor, arguments: dict[str, Any], stats: Tensor, grads: DivergenceGrad, out: Tensor
) -> None:
    """Write d loss / d logits to `out`, which may be the logits."""
    written, zeros = Rows.of(out), torch.zeros_like(stats[0])
    operands = {"logits": Rows.of(logits), "ref_logits": Rows.of(ref_logits), "grad_logits": written}
    slopes = {
        "grad_divergence": zeros if grads.divergence is None else grads.divergence.contiguous(),
        "grad_logprob": None if grads.logprob is None else grads.logprob.contiguous(),
    }
    launched(divergence_gradient_kernel, operands, arguments | slopes, stats)
    if written.tensor is not out:  # its strides allow no view as rows
        out.copy_(written.tensor)


def launched(kernel: Any, operands: dict[str, Rows], arguments: dict[str, Any], stats: Tensor) -> None:
    choice, strides = launch.ROWS, dict[str, Any]()
    for name, x in operands.items():
        prefix = name.removesuffix("logits")
        strides |= {name: x.tensor, f"{prefix}rows_inner": x.inner}
        strides |= {f"{prefix}stride_outer": x.stride_outer, f"{prefix}stride_inner": x.stride_inner}
    kernel[(-(-arguments["N"] // choice.rows),)](
        **strides,
        stats=stats,
        stride_stats=stats.stride(0),
        W=operands["logits"].tensor.shape[-1],
        ALIGNED=all(x.is_aligned for x in operands.values()),
        R=choice.rows,
        C=choice.columns,
        num_warps=choice.num_warps,
        **arguments,
    )
