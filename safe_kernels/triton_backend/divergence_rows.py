"""Kernels of the divergences of a student from a teacher, that load rows of both models' logits.

One kernel walks a row for the sums of both softmaxes, and for a KL in the same walk: with x and y as in
`online_softmax.py`, the reverse one is ln 2 c / s - ln s + ln r of c = sum 2^x (x - y), the forward one the same with
the roles exchanged. The others need the sums first, and a second walk. Another kernel walks the row once more and
writes the gradient, over the student's float32 tile where hidden states are given: p (f - sum p f), where

    reverse_kl    f = log p - log q
    forward_kl    is an exception: p - q
    jsd           f = (1 - beta) (log p - log m),  m = beta q + (1 - beta) p;  it is sum (p f + beta q (log q - log m))
    tv            f = sign(p - q) / 2;  it is sum (p f - q f)

Shapes: N rows, R of them in a program; W columns, all of the vocabulary, C at a time.
"""

import triton
import triton.language as tl

from .online_softmax import (
    LEAST,
    LN_2,
    centred,
    empty_policy,
    finish_policy,
    log2_probabilities,
    moved,
    union_policy,
    update_policy,
)
from .rows import NOT_SPECIALIZED, lane_columns, load_logits, load_rows, row_pointers

NUMBERS = [*NOT_SPECIALIZED, "ref_temperature", "ref_logit_scale", "beta"]
GRADIENT_STRIDES = ["grad_rows_inner", "grad_stride_outer", "grad_stride_inner"]


@triton.jit
def moved_difference(c, first, second, m, n, inverse, other_inverse):
    """sum 2^x (x - y) of the same columns under larger maxima m and n of the states `first`, whose exponents are x, and
    `second`, whose are y: each has a temperature of its own.
    """
    shift, other_shift = moved(first.m, m, inverse), moved(second.m, n, other_inverse)
    return (c + (shift - other_shift) * first.s) * tl.exp2(shift)


@triton.jit
def update_difference(c, first, second, first_after, second_after, a, a_other, inverse, other_inverse):
    """The same after the tile that took the two states to those after it."""
    x = centred(a, tl.expand_dims(first_after.m, -1), tl.expand_dims(inverse, -1))
    y = centred(a_other, tl.expand_dims(second_after.m, -1), tl.expand_dims(other_inverse, -1))
    terms = tl.exp2(x) * (tl.maximum(x, LEAST) - tl.maximum(y, LEAST))
    before = moved_difference(c, first, second, first_after.m, second_after.m, inverse, other_inverse)
    return before + tl.sum(terms, axis=-1)


@triton.jit
def entry(log2_p, log2_q, beta, DIVERGENCE: tl.constexpr):
    """(p, q, f, what an entry adds to the divergence beside p f), logarithms to base 2."""
    p, q = tl.exp2(log2_p), tl.exp2(log2_q)
    finite_p, finite_q = tl.maximum(log2_p, LEAST), tl.maximum(log2_q, LEAST)
    f, extra = finite_p - finite_q, tl.zeros_like(p)
    if DIVERGENCE == "jsd":
        log2_m = tl.maximum(tl.log2(beta * q + (1.0 - beta) * p), LEAST)
        f, extra = (1.0 - beta) * (finite_p - log2_m), beta * q * (finite_q - log2_m)
    if DIVERGENCE == "tv":
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
    zero, inverse_R1, ref_inverse_R1 = tl.zeros([R, C // K], tl.float32), inverse[:, None], ref_inverse[:, None]
    student, teacher, difference, outside = empty_policy(zero), empty_policy(zero), zero, zero
    tiles = width // C
    for REST in tl.static_range(2):  # without masks as far as tiles are whole, then at most one with
        for tile in range(tiles if REST else 0, tiles + (width % C > 0) if REST else tiles):
            columns, seen = tile * C + lane_columns(C // K, K, ALIGNED), None
            if REST:
                seen = (columns < width) & live[:, None, None]
            a = load_logits(pointer[:, None, None], columns, seen, bias, 0, logit_scale, softcap)
            a_ref = load_logits(ref_pointer[:, None, None], columns, seen, ref_bias, 0, ref_logit_scale, ref_softcap)
            p_after, q_after = update_policy(student, a, inverse_R1), update_policy(teacher, a_ref, ref_inverse_R1)
            # `outside` is inf where one alone is -inf; where both are it is NaN, which the maximum ignores.
            if DIVERGENCE == "reverse_kl":
                difference = update_difference(
                    difference, student, teacher, p_after, q_after, a, a_ref, inverse_R1, ref_inverse_R1
                )
                outside = tl.maximum(outside, tl.max(a - a_ref, axis=-1))
            if DIVERGENCE == "forward_kl":
                difference = update_difference(
                    difference, teacher, student, q_after, p_after, a_ref, a, ref_inverse_R1, inverse_R1
                )
                outside = tl.maximum(outside, tl.max(a_ref - a, axis=-1))
            student, teacher = p_after, q_after
    p_lanes, q_lanes = student, teacher
    student, teacher = union_policy(p_lanes, inverse_R1), union_policy(q_lanes, ref_inverse_R1)
    logprob, entropy, log_s = finish_policy(student, a_token, inverse)
    log_r = tl.log(teacher.s)
    m_R1, n_R1 = student.m[:, None], teacher.m[:, None]

    if DIVERGENCE == "reverse_kl":
        parts = moved_difference(difference, p_lanes, q_lanes, m_R1, n_R1, inverse_R1, ref_inverse_R1)
        divergence = (tl.sum(parts, axis=-1) / student.s) * LN_2 - log_s + log_r
        slope = divergence
    elif DIVERGENCE == "forward_kl":
        parts = moved_difference(difference, q_lanes, p_lanes, n_R1, m_R1, ref_inverse_R1, inverse_R1)
        divergence = (tl.sum(parts, axis=-1) / teacher.s) * LN_2 - log_r + log_s
        slope = divergence  # not read
    else:
        of_student, rest = zero, zero
        for REST in tl.static_range(2):
            for tile in range(tiles if REST else 0, tiles + (width % C > 0) if REST else tiles):
                columns, seen = tile * C + lane_columns(C // K, K, ALIGNED), None
                if REST:
                    seen = (columns < width) & live[:, None, None]
                a = load_logits(pointer[:, None, None], columns, seen, bias, 0, logit_scale, softcap)
                a_ref = load_logits(
                    ref_pointer[:, None, None], columns, seen, ref_bias, 0, ref_logit_scale, ref_softcap
                )
                log2_p = log2_probabilities(a, m_R1[:, None], log_s[:, None, None], inverse_R1[:, None])
                log2_q = log2_probabilities(a_ref, n_R1[:, None], log_r[:, None, None], ref_inverse_R1[:, None])
                p, q, f, extra = entry(log2_p, log2_q, beta, DIVERGENCE)
                of_student += tl.sum(p * f, axis=-1)
                rest += tl.sum(extra, axis=-1)
        slope = nats(tl.sum(of_student, axis=-1), DIVERGENCE)
        divergence = slope + nats(tl.sum(rest, axis=-1), DIVERGENCE)
    nan = (log_s + log_r) * 0.0  # or 0: maxima forget the NaN of a row, and a row that is all -inf has no distribution
    is_infinite = tl.max(outside, axis=-1) == float("inf")
    divergence = tl.where(is_infinite, float("inf"), divergence) + nan
    slope = tl.where(is_infinite, float("nan"), slope) + nan

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
