"""Statistics of rows of logits from one pass over tiles, and the gradient back: each written once, for every kernel.

A tile is [R, C]: R rows, C columns of the vocabulary, float32 logits `a` of the policy and `a_ref` of the reference.
Columns past the vocabulary are -inf. A tile may be [R, L, C], with L lanes a row: each has a state of its own until
their `union`. With T the temperature, a row's state after any set of its columns is

    policy     m = max a,      s = sum 2^x,    b = sum 2^x x           x = (a - m) / (T ln 2)
    reference  n = max a_ref,  r = sum 2^y                             y = (a_ref - n) / (T ln 2)
    both       c = sum 2^x (x - y),   and if asked for   d = sum 2^y (y - x)

and at the end logprob = (a_token - m) / T - ln s, entropy = ln s - ln 2 b / s, kl = ln 2 c / s - ln s + ln r and ref_kl
= ln 2 d / r - ln r + ln s. The hardware has only powers of two. Maxima are kept on `a`, and 1/T acts on differences: a
large common offset costs no precision. Exponents are clamped at LEAST before they are multiplied, so a weight 2^x of 0
adds 0. A NaN logit makes every statistic of its row NaN; so does a row that is all -inf.
"""

from typing import NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the lowest finite float32
LEAST = tl.constexpr(-1e20)  # clamp of an exponent before it is multiplied: with a weight of 0 the product is 0


class Policy(NamedTuple):
    m: tl.tensor  # all fields are float32 [R] or [R, L]
    s: tl.tensor
    b: tl.tensor


class Reference(NamedTuple):
    n: tl.tensor
    r: tl.tensor
    c: tl.tensor
    outside: tl.tensor  # inf where the reference is -inf and the policy is not: then kl is inf


class Forward(NamedTuple):
    """Of KL(reference || policy), beside the other two states: a call that does not ask for it has none."""

    d: tl.tensor
    outside: tl.tensor  # -inf where the policy is -inf and the reference is not: then ref_kl is inf


@triton.jit
def empty_policy(zero):
    """`zero`: zeros of the state's shape."""
    return Policy(zero + LOWEST, zero, zero)


@triton.jit
def empty_reference(zero):
    return Reference(zero + LOWEST, zero, zero, zero)


@triton.jit
def empty_forward(zero):
    return Forward(zero, zero)


@triton.jit
def centred(a, peak, inverse_temperature):
    """(a - peak) / (T ln 2)."""
    return (a - peak) * (inverse_temperature * LOG2_E)


@triton.jit
def moved(old, new, inverse_temperature):
    """What a new maximum adds to every exponent so far, clamped at LEAST."""
    return tl.maximum((old - new) * (inverse_temperature * LOG2_E), LEAST)


@triton.jit
def update_policy(state, a, inverse_temperature):
    m = tl.maximum(state.m, tl.max(a, axis=-1))
    x = centred(a, tl.expand_dims(m, -1), tl.expand_dims(inverse_temperature, -1))
    e = tl.exp2(x)
    before = moved_policy(state, m, inverse_temperature)
    return Policy(m, before.s + tl.sum(e, axis=-1), before.b + tl.sum(e * tl.maximum(x, LEAST), axis=-1))


@triton.jit
def update(policy, reference, a, a_ref, inverse_temperature):
    """Both states after a tile."""
    after = update_policy(policy, a, inverse_temperature)
    n = tl.maximum(reference.n, tl.max(a_ref, axis=-1))
    inverse = tl.expand_dims(inverse_temperature, -1)
    x, y = centred(a, tl.expand_dims(after.m, -1), inverse), centred(a_ref, tl.expand_dims(n, -1), inverse)
    terms = tl.exp2(x) * (tl.maximum(x, LEAST) - tl.maximum(y, LEAST))
    # inf where only the reference is -inf; where both are it is NaN, which the maximum ignores.
    outside = tl.maximum(reference.outside, tl.max(a - a_ref, axis=-1))
    before = moved_reference(policy, reference, after.m, n, inverse_temperature)
    return after, Reference(n, before.r + tl.sum(tl.exp2(y), axis=-1), before.c + tl.sum(terms, axis=-1), outside)


@triton.jit
def update_forward(state, before, ref_before, after, ref_after, a, a_ref, inverse_temperature):
    """The third state after the tile that took the other two from `before` to `after`."""
    inverse = tl.expand_dims(inverse_temperature, -1)
    x, y = centred(a, tl.expand_dims(after.m, -1), inverse), centred(a_ref, tl.expand_dims(ref_after.n, -1), inverse)
    terms = tl.exp2(y) * (tl.maximum(x, LEAST) - tl.maximum(y, LEAST))
    outside = tl.minimum(state.outside, tl.min(a - a_ref, axis=-1))
    moved = moved_forward(state, before, ref_before, after.m, ref_after.n, inverse_temperature)
    return Forward(moved.d - tl.sum(terms, axis=-1), outside)


@triton.jit
def merge_policy(state, other, inverse_temperature):
    """The state of the union of two disjoint sets of columns."""
    m = tl.maximum(state.m, other.m)
    left, right = moved_policy(state, m, inverse_temperature), moved_policy(other, m, inverse_temperature)
    return Policy(m, left.s + right.s, left.b + right.b)


@triton.jit
def merge(policy, reference, other_policy, other_reference, inverse_temperature):
    """Both states of the union of two disjoint sets of columns."""
    merged = merge_policy(policy, other_policy, inverse_temperature)
    n = tl.maximum(reference.n, other_reference.n)
    left = moved_reference(policy, reference, merged.m, n, inverse_temperature)
    right = moved_reference(other_policy, other_reference, merged.m, n, inverse_temperature)
    outside = tl.maximum(reference.outside, other_reference.outside)
    return merged, Reference(n, left.r + right.r, left.c + right.c, outside)


@triton.jit
def merge_forward(state, policy, reference, other, other_policy, other_reference, inverse_temperature):
    """The third state of the union, of which `policy` and `reference` and the others are the parts' other two."""
    m, n = tl.maximum(policy.m, other_policy.m), tl.maximum(reference.n, other_reference.n)
    left = moved_forward(state, policy, reference, m, n, inverse_temperature)
    right = moved_forward(other, other_policy, other_reference, m, n, inverse_temperature)
    return Forward(left.d + right.d, tl.minimum(left.outside, right.outside))


@triton.jit
def moved_policy(state, m, inverse_temperature):
    """The state of the same columns under a larger maximum, or the same one."""
    shift = moved(state.m, m, inverse_temperature)
    scale = tl.exp2(shift)
    return Policy(m, state.s * scale, (state.b + shift * state.s) * scale)


@triton.jit
def moved_reference(policy, reference, m, n, inverse_temperature):
    shift = moved(policy.m, m, inverse_temperature)
    ref_shift = moved(reference.n, n, inverse_temperature)
    c = (reference.c + (shift - ref_shift) * policy.s) * tl.exp2(shift)
    return Reference(n, reference.r * tl.exp2(ref_shift), c, reference.outside)


@triton.jit
def moved_forward(state, policy, reference, m, n, inverse_temperature):
    shift = moved(policy.m, m, inverse_temperature)
    ref_shift = moved(reference.n, n, inverse_temperature)
    return Forward((state.d + (ref_shift - shift) * reference.r) * tl.exp2(ref_shift), state.outside)


@triton.jit
def union_policy(state, inverse_temperature):
    """Merge the states [R, L] of each row's lanes into states [R] of the rows. `inverse_temperature` is [R, 1]."""
    m = tl.max(state.m, axis=-1)
    parts = moved_policy(state, tl.expand_dims(m, -1), inverse_temperature)
    return Policy(m, tl.sum(parts.s, axis=-1), tl.sum(parts.b, axis=-1))


@triton.jit
def union(policy, reference, inverse_temperature):
    whole, n = union_policy(policy, inverse_temperature), tl.max(reference.n, axis=-1)
    m_R1, n_R1 = tl.expand_dims(whole.m, -1), tl.expand_dims(n, -1)
    parts = moved_reference(policy, reference, m_R1, n_R1, inverse_temperature)
    outside = tl.max(parts.outside, axis=-1)
    return whole, Reference(n, tl.sum(parts.r, axis=-1), tl.sum(parts.c, axis=-1), outside)


@triton.jit
def union_forward(state, policy, reference, inverse_temperature):
    m, n = tl.max(policy.m, axis=-1), tl.max(reference.n, axis=-1)
    m_R1, n_R1 = tl.expand_dims(m, -1), tl.expand_dims(n, -1)
    parts = moved_forward(state, policy, reference, m_R1, n_R1, inverse_temperature)
    return Forward(tl.sum(parts.d, axis=-1), tl.min(parts.outside, axis=-1))


@triton.jit
def finish_policy(policy, a_token, inverse_temperature):
    """(logprob, entropy, log s)."""
    log_s = tl.log(policy.s)
    return (a_token - policy.m) * inverse_temperature - log_s, log_s - (policy.b / policy.s) * LN_2, log_s


@triton.jit
def finish_reference(policy, reference, a_ref_token, inverse_temperature):
    """(ref_logprob, kl, log r)."""
    log_r = tl.log(reference.r)
    kl = (reference.c / policy.s) * LN_2 - tl.log(policy.s) + log_r
    infinity = tl.where(reference.r > 0, float("inf"), float("nan"))  # a reference that is all -inf has no KL
    kl = tl.where((reference.outside == float("inf")) & (kl == kl), infinity, kl)
    return (a_ref_token - reference.n) * inverse_temperature - log_r, kl, log_r


@triton.jit
def finish_forward(state, policy, reference):
    """ref_kl."""
    ref_kl = (state.d / reference.r) * LN_2 - tl.log(reference.r) + tl.log(policy.s)
    infinity = tl.where(policy.s > 0, float("inf"), float("nan"))  # a policy that is all -inf has none
    return tl.where((state.outside == -float("inf")) & (ref_kl == ref_kl), infinity, ref_kl)


@triton.jit
def log2_probabilities(a, peak, log_total, inverse_temperature):
    """log2 p of a row from its maximum and the log of its sum. Adding the two first would lose digits."""
    finite_peak = tl.where(peak == -float("inf"), 0.0, peak)  # no result needs it, but on sm_100 a case spills without
    return centred(a, finite_peak, inverse_temperature) - log_total * LOG2_E


@triton.jit
def constant_slope(entropy, kl, grad_logprob, grad_entropy, grad_kl, grad_ref_kl):
    """The part of gradient / p that is the same for every entry of a row; None is no gradient."""
    constant = tl.zeros_like(entropy)
    if grad_logprob is not None:
        constant -= grad_logprob
    if grad_entropy is not None:
        constant -= grad_entropy * entropy
    if grad_kl is not None:  # NaN where the KL is infinite
        constant -= grad_kl * tl.where(kl == float("inf"), float("nan"), kl)
    if grad_ref_kl is not None:
        constant += grad_ref_kl
    return constant


@triton.jit
def logit_gradient(log2_p, log2_q, is_token, constant, grad_logprob, grad_entropy, grad_kl, grad_ref_kl):
    """d loss / d (a / T) = g_l (onehot - p) - g_H p (log p + H) + g_K p (log p - log q - KL) + g_R (p - q), in one
    product with p and, for g_R, one with q.
    """
    finite = tl.maximum(log2_p, LEAST)
    slope = tl.zeros_like(log2_p) + constant[:, None]
    if grad_entropy is not None:
        slope -= (grad_entropy * LN_2)[:, None] * finite
    if grad_kl is not None:
        slope += (grad_kl * LN_2)[:, None] * (finite - tl.maximum(log2_q, LEAST))
    gradient = tl.exp2(log2_p) * slope
    if grad_ref_kl is not None:
        gradient -= tl.exp2(log2_q) * grad_ref_kl[:, None]
    if grad_logprob is not None:
        gradient = tl.where(is_token, gradient + grad_logprob[:, None], gradient)
    return gradient
