"""Kernels that LOAD logits: a program takes a few rows (on the GPU mostly one) and streams over their columns.

The same two kernels serve logits that the caller has (one tile, the whole vocabulary) and the float32 tiles that
`linear.py` computes (part of the vocabulary: the state is carried from tile to tile, the backward writes over it).

Shapes: N rows, R of them in a program; W columns of a tile, V vocabulary, C columns at a time.
"""

import triton
import triton.language as tl

from .online_softmax import (
    Forward,
    Policy,
    Reference,
    constant_slope,
    empty_forward,
    empty_policy,
    empty_reference,
    finish_forward,
    finish_policy,
    finish_reference,
    log2_probabilities,
    logit_gradient,
    merge,
    merge_forward,
    merge_policy,
    union,
    union_forward,
    union_policy,
    update,
    update_forward,
    update_policy,
)

# Rows of `carry`, the state between two tiles; those of `stats` are the fields of `RowStats`.
CARRY = ("m", "s", "b", "a_token", "n", "r", "c", "outside", "a_ref_token", "d", "policy_outside")
CARRIED = {4: CARRY.index("n"), 8: CARRY.index("d"), 9: len(CARRY)}  # how many, by the number of statistics

NOT_SPECIALIZED = ["N", "stride_stats", "W", "first_column", "vocabulary", "temperature", "logit_scale"]
NOT_SPECIALIZED += ["rows_inner", "stride_outer", "stride_inner"]
NOT_SPECIALIZED += ["ref_rows_inner", "ref_stride_outer", "ref_stride_inner"]


@triton.jit
def tanh(x):
    """To float32 precision everywhere: (1 - t) / (1 + t) loses its digits near 0."""
    t = tl.exp2(tl.abs(x) * -2.8853900817779268)  # e^(-2 |x|)
    far = (1.0 - t) / (1.0 + t)
    q = x * x
    near = x * (1.0 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835)))))
    return tl.where(q < 0.0625, near, tl.where(x < 0, -far, far))


@triton.jit
def load(pointer, inside):
    """Load as float32, 0 where not `inside`; `inside` None loads everything."""
    if inside is None:
        value = tl.load(pointer)
    else:
        value = tl.load(pointer, mask=inside, other=0.0)
    return value.to(tl.float32)


@triton.jit
def load_logits(pointer, columns, inside, bias, first_column, logit_scale, softcap):
    """Logits of some columns of a tile, -inf where not `inside`. `pointer` points at the row and has as many axes."""
    return logits_of(load(pointer + columns, inside), first_column + columns, inside, bias, logit_scale, softcap)


@triton.jit
def logits_of(u, columns, inside, bias, logit_scale, softcap):
    """softcap tanh(logit_scale (u + bias) / softcap), -inf where not `inside`. None: no bias, scale, softcap."""
    a = u
    if bias is not None:
        a += load(bias + columns, inside)
    if logit_scale is not None:
        a *= logit_scale
    if softcap is not None:
        a = softcap * tanh(a * (1.0 / softcap))
    if inside is not None:
        a = tl.where(inside, a, -float("inf"))
    return a


@triton.jit
def lane_columns(L: tl.constexpr, K: tl.constexpr, ALIGNED: tl.constexpr):
    """[1, L, K] columns: K of a lane side by side where those are loaded at once, else L of different lanes."""
    lane, at = tl.arange(0, L)[None, :, None], tl.arange(0, K)[None, None, :]
    if ALIGNED:
        columns = lane * K + at
    else:
        columns = at * L + lane
    return columns


@triton.jit
def row_pointers(base, row_R, rows_inner, stride_outer, stride_inner, ALIGNED: tl.constexpr):
    """Rows have two levels of strides, so that a slice such as logits[:, :-1] is read without a copy."""
    outer_R, inner_R = row_R // rows_inner, row_R % rows_inner
    offset_R = outer_R * stride_outer.to(tl.int64) + inner_R * stride_inner.to(tl.int64)
    if ALIGNED:
        offset_R = offset_R // 16 * 16  # the same value, but now the compiler sees that it can load 16 bytes at a time
    return base + offset_R


@triton.jit
def load_rows(pointer, default, row_R, inside_R):
    """A vector's entries as float32, or the default if the vector is None."""
    value_R = tl.zeros_like(row_R).to(tl.float32) + default
    if pointer is not None:
        value_R = tl.load(pointer + row_R, mask=inside_R, other=0).to(tl.float32)
    return value_R


@triton.jit
def load_policy(state, stride, inside):
    """(state, the token's logit), as `store_policy` left them."""
    m = tl.load(state, mask=inside, other=0.0)
    s = tl.load(state + stride, mask=inside, other=0.0)
    b = tl.load(state + 2 * stride, mask=inside, other=0.0)
    return Policy(m, s, b), tl.load(state + 3 * stride, mask=inside, other=0.0)


@triton.jit
def store_policy(state, stride, policy, a_token, inside):
    tl.store(state, policy.m, mask=inside)
    tl.store(state + stride, policy.s, mask=inside)
    tl.store(state + 2 * stride, policy.b, mask=inside)
    tl.store(state + 3 * stride, a_token, mask=inside)


@triton.jit
def load_reference(state, stride, inside):
    n = tl.load(state + 4 * stride, mask=inside, other=0.0)
    r = tl.load(state + 5 * stride, mask=inside, other=0.0)
    c = tl.load(state + 6 * stride, mask=inside, other=0.0)
    outside = tl.load(state + 7 * stride, mask=inside, other=0.0)
    return Reference(n, r, c, outside), tl.load(state + 8 * stride, mask=inside, other=0.0)


@triton.jit
def store_reference(state, stride, reference, a_ref_token, inside):
    tl.store(state + 4 * stride, reference.n, mask=inside)
    tl.store(state + 5 * stride, reference.r, mask=inside)
    tl.store(state + 6 * stride, reference.c, mask=inside)
    tl.store(state + 7 * stride, reference.outside, mask=inside)
    tl.store(state + 8 * stride, a_ref_token, mask=inside)


@triton.jit
def load_forward(state, stride, inside):
    d = tl.load(state + 9 * stride, mask=inside, other=0.0)
    return Forward(d, tl.load(state + 10 * stride, mask=inside, other=0.0))


@triton.jit
def store_forward(state, stride, forward, inside):
    tl.store(state + 9 * stride, forward.d, mask=inside)
    tl.store(state + 10 * stride, forward.outside, mask=inside)


@triton.jit
def store_policy_stats(out, stride, policy, a_token, inverse, known, live, inside):
    """A masked row gets zeros; an id outside the vocabulary gets a NaN logprob."""
    logprob, entropy, log_s = finish_policy(policy, a_token, inverse)
    tl.store(out, tl.where(live, tl.where(known, logprob, float("nan")), 0.0), mask=inside)
    tl.store(out + stride, tl.where(live, entropy, 0.0), mask=inside)
    tl.store(out + 2 * stride, tl.where(live, policy.m, 0.0), mask=inside)
    tl.store(out + 3 * stride, tl.where(live, log_s, 0.0), mask=inside)


@triton.jit
def store_reference_stats(out, stride, policy, reference, a_ref_token, inverse, known, live, inside):
    ref_logprob, kl, log_r = finish_reference(policy, reference, a_ref_token, inverse)
    tl.store(out + 4 * stride, tl.where(live, tl.where(known, ref_logprob, float("nan")), 0.0), mask=inside)
    tl.store(out + 5 * stride, tl.where(live, kl, 0.0), mask=inside)
    tl.store(out + 6 * stride, tl.where(live, reference.n, 0.0), mask=inside)
    tl.store(out + 7 * stride, tl.where(live, log_r, 0.0), mask=inside)


@triton.jit
def store_forward_stats(out, stride, forward, policy, reference, live, inside):
    tl.store(out + 8 * stride, tl.where(live, finish_forward(forward, policy, reference), 0.0), mask=inside)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def statistics_kernel(
    logits,  # rows at outer * stride_outer + inner * stride_inner, columns of stride 1
    ref_logits,  # the same, or None
    tokens,  # [N]
    temperatures,  # [N], or None: temperature
    mask,  # [N], or None
    bias,  # [V], or None
    ref_bias,  # [V], or None
    carry,  # rows of CARRY, a stride_stats apart, or None where FIRST and LAST
    stats,  # rows of RowStats
    rows_inner,
    stride_outer,
    stride_inner,
    ref_rows_inner,
    ref_stride_outer,
    ref_stride_inner,
    N,
    stride_stats,
    W,
    first_column,  # of this tile in the vocabulary
    vocabulary,
    temperature,
    logit_scale,  # or None
    softcap,  # or None
    REF_KL: tl.constexpr,  # asked for
    FIRST: tl.constexpr,  # no state to carry in
    LAST: tl.constexpr,  # no state to carry out
    ALIGNED: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = row < N
    live = (load_rows(mask, 1.0, row, inside) != 0) & inside
    inverse = 1.0 / tl.where(live, load_rows(temperatures, temperature, row, inside), 1.0)
    width = tl.where(tl.max(live.to(tl.int32), axis=0) > 0, W, 0)  # rows that are all masked cost nothing
    if ALIGNED:
        width = width // 16 * 16
    token = tl.load(tokens + row, mask=inside, other=0)
    known = (token >= 0) & (token < vocabulary)
    local = token - first_column
    is_here = (local >= 0) & (local < W) & live
    row_read = tl.minimum(row, N - 1)
    pointer = row_pointers(logits, row_read, rows_inner, stride_outer, stride_inner, ALIGNED)
    a_token = load_logits(pointer, local, is_here, bias, first_column, logit_scale, softcap)
    out = stats + row
    state = out
    if carry is not None:
        state = carry + row
    if not FIRST:
        carried_policy, carried = load_policy(state, stride_stats, inside)
        a_token = tl.where(is_here, a_token, carried)
    if ref_logits is not None:
        ref_pointer = row_pointers(ref_logits, row_read, ref_rows_inner, ref_stride_outer, ref_stride_inner, ALIGNED)
        a_ref_token = load_logits(ref_pointer, local, is_here, ref_bias, first_column, logit_scale, softcap)
        if not FIRST:
            carried_reference, ref_carried = load_reference(state, stride_stats, inside)
            a_ref_token = tl.where(is_here, a_ref_token, ref_carried)
            if REF_KL:
                carried_forward = load_forward(state, stride_stats, inside)

    K: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth  # 16 bytes
    zero = tl.zeros([R, C // K], tl.float32)
    policy, reference, forward = empty_policy(zero), empty_reference(zero), empty_forward(zero)
    inverse_R1 = inverse[:, None]
    tiles = width // C
    for REST in tl.static_range(2):  # without masks as far as tiles are whole, then at most one with
        for tile in range(tiles if REST else 0, tiles + (width % C > 0) if REST else tiles):
            columns, seen = tile * C + lane_columns(C // K, K, ALIGNED), None
            if REST:
                seen = (columns < width) & live[:, None, None]
            a = load_logits(pointer[:, None, None], columns, seen, bias, first_column, logit_scale, softcap)
            if ref_logits is None:
                policy = update_policy(policy, a, inverse_R1)
            else:
                a_ref = load_logits(
                    ref_pointer[:, None, None], columns, seen, ref_bias, first_column, logit_scale, softcap
                )
                before, ref_before = policy, reference
                policy, reference = update(policy, reference, a, a_ref, inverse_R1)
                if REF_KL:
                    forward = update_forward(forward, before, ref_before, policy, reference, a, a_ref, inverse_R1)

    if ref_logits is None:
        policy = union_policy(policy, inverse_R1)
        if not FIRST:
            policy = merge_policy(carried_policy, policy, inverse)
    else:
        if REF_KL:
            forward = union_forward(forward, policy, reference, inverse_R1)
        policy, reference = union(policy, reference, inverse_R1)
        if not FIRST:
            if REF_KL:
                forward = merge_forward(
                    carried_forward, carried_policy, carried_reference, forward, policy, reference, inverse
                )
            policy, reference = merge(carried_policy, carried_reference, policy, reference, inverse)
        if LAST:
            store_reference_stats(out, stride_stats, policy, reference, a_ref_token, inverse, known, live, inside)
        else:
            store_reference(state, stride_stats, reference, a_ref_token, inside)
        if REF_KL:
            if LAST:
                store_forward_stats(out, stride_stats, forward, policy, reference, live, inside)
            else:
                store_forward(state, stride_stats, forward, inside)

    if LAST:
        store_policy_stats(out, stride_stats, policy, a_token, inverse, known, live, inside)
    else:
        store_policy(state, stride_stats, policy, a_token, inside)


@triton.jit(do_not_specialize=[*NOT_SPECIALIZED, "grad_rows_inner", "grad_stride_outer", "grad_stride_inner"])
def gradient_kernel(
    logits,
    ref_logits,  # or None: no gradient of a KL is asked for
    tokens,  # [N]
    temperatures,  # [N], or None: temperature
    mask,  # [N], or None
    bias,  # [V], or None
    ref_bias,  # [V], or None
    stats,  # rows of RowStats
    grad_logprob,  # [N], or None
    grad_entropy,  # [N], or None
    grad_kl,  # [N], or None
    grad_ref_kl,  # [N], or None
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
    first_column,
    temperature,
    logit_scale,  # or None
    softcap,  # or None
    ALIGNED: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """d loss / d (logits as they were loaded), of a tile. A masked row gets zeros."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = row < N
    live = (load_rows(mask, 1.0, row, inside) != 0) & inside
    inverse = 1.0 / tl.where(live, load_rows(temperatures, temperature, row, inside), 1.0)
    token = tl.load(tokens + row, mask=inside, other=0)  # matches no column if another rank's part holds it
    saved = stats + row
    entropy, peak = tl.load(saved + stride_stats, mask=inside), tl.load(saved + 2 * stride_stats, mask=inside)
    log_total = tl.load(saved + 3 * stride_stats, mask=inside)
    scale = inverse  # the factor of u in a / T
    if logit_scale is not None:
        scale *= logit_scale
    g_logprob, g_entropy, g_kl, g_ref_kl, kl = grad_logprob, grad_entropy, grad_kl, grad_ref_kl, entropy
    if grad_logprob is not None:
        logprob = tl.load(saved, mask=inside)
        g_logprob = tl.where(logprob == logprob, scale * load_rows(grad_logprob, 0.0, row, inside), float("nan"))
    if grad_entropy is not None:
        g_entropy = scale * load_rows(grad_entropy, 0.0, row, inside)
    row_read = tl.minimum(row, N - 1)
    pointer = row_pointers(logits, row_read, rows_inner, stride_outer, stride_inner, ALIGNED)
    grad_pointer = row_pointers(grad_logits, row_read, grad_rows_inner, grad_stride_outer, grad_stride_inner, ALIGNED)
    if ref_logits is not None:
        ref_pointer = row_pointers(ref_logits, row_read, ref_rows_inner, ref_stride_outer, ref_stride_inner, ALIGNED)
        if grad_kl is not None:
            g_kl, kl = scale * load_rows(grad_kl, 0.0, row, inside), tl.load(saved + 5 * stride_stats, mask=inside)
        if grad_ref_kl is not None:
            g_ref_kl = scale * load_rows(grad_ref_kl, 0.0, row, inside)
        ref_peak = tl.load(saved + 6 * stride_stats, mask=inside)
        ref_log_total = tl.load(saved + 7 * stride_stats, mask=inside)
    constant = constant_slope(entropy, kl, g_logprob, g_entropy, g_kl, g_ref_kl)
    width = W
    if ALIGNED:
        width = W // 16 * 16
    is_here = (token >= first_column) & (token < first_column + W)
    local = tl.where(is_here, token - first_column, -1).to(tl.int32)
    whole = tl.where(tl.min(live.to(tl.int32), axis=0) > 0, width // C * C, 0)
    for REST in tl.static_range(2):  # without masks as far as tiles are whole
        for start in range(whole if REST else 0, width if REST else whole, C):
            columns, seen = start + tl.arange(0, C)[None, :], None
            if REST:
                seen = (columns < width) & live[:, None]
            a = load_logits(pointer[:, None], columns, seen, bias, first_column, logit_scale, softcap)
            log2_p = log2_probabilities(a, peak[:, None], log_total[:, None], inverse[:, None])
            log2_q = None
            if ref_logits is not None:
                a_ref = load_logits(ref_pointer[:, None], columns, seen, ref_bias, first_column, logit_scale, softcap)
                log2_q = log2_probabilities(a_ref, ref_peak[:, None], ref_log_total[:, None], inverse[:, None])
            is_token = tl.arange(0, C)[None, :] == (local - start)[:, None]  # in 32 bits
            du = logit_gradient(log2_p, log2_q, is_token, constant, g_logprob, g_entropy, g_kl, g_ref_kl)
            if softcap is not None:
                share = a * (1.0 / softcap)
                du *= 1.0 - share * share
            if REST:
                stored = (columns < width) & inside[:, None]
                tl.store(grad_pointer[:, None] + columns, tl.where(seen, du, 0.0), mask=stored)
            else:
                tl.store(grad_pointer[:, None] + columns, du)
