"""Statistics of rows of logits from one pass over tiles, and the gradient back: each written once, for every kernel.

A tile is [R, C]: R rows, C columns of the vocabulary, float32 logits `a` of the policy and `a_ref` of the reference.
Columns past the vocabulary are -inf. With T the temperature, a row's state after any set of its columns is

    policy     m = max a,      s = sum e^x,    b = sum e^x x           x = (a - m) / T
    reference  n = max a_ref,  r = sum e^y                             y = (a_ref - n) / T
    both       c = sum e^x (x - y)

and at the end logprob = x_token - log s, entropy = log s - b / s, kl = c / s - log s + log r. Maxima are kept on `a`,
and 1/T acts on differences: a large common offset costs no precision. A term whose weight e^x is 0 adds 0, whatever it
is multiplied with. A NaN logit makes every statistic of its row NaN, and a row of -inf alone too.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Policy(NamedTuple):
    m: tl.tensor  # [R] float32, all of them
    s: tl.tensor
    b: tl.tensor


class Reference(NamedTuple):
    n: tl.tensor
    r: tl.tensor
    c: tl.tensor
    outside: tl.tensor  # > 0 where the reference is -inf and the policy is not: then kl is inf


@triton.jit
def empty_policy(R: tl.constexpr):
    zero = tl.zeros([R], tl.float32)
    return Policy(zero - float("inf"), zero, zero)


@triton.jit
def empty_reference(R: tl.constexpr):
    zero = tl.zeros([R], tl.float32)
    return Reference(zero - float("inf"), zero, zero, zero)


@triton.jit
def centred(a, peak, inverse_temperature):
    """(a - peak) / T for rows of a tile; -inf where a is, even while the peak itself is."""
    finite_peak = tl.where(peak == -float("inf"), 0.0, peak)
    return (a - finite_peak[:, None]) * inverse_temperature[:, None]


@triton.jit
def moved(old, new, total, inverse_temperature):
    """What a moved maximum adds to every exponent so far; 0 as long as there is none."""
    return tl.where(total > 0, (old - new) * inverse_temperature, 0.0)


@triton.jit
def update_policy(state, a, inverse_temperature):
    m = tl.maximum(state.m, tl.max(a, axis=1))
    x = centred(a, m, inverse_temperature)
    e = tl.exp(x)
    before = moved_policy(state, m, inverse_temperature)
    return Policy(m, before.s + tl.sum(e, axis=1), before.b + tl.sum(tl.where(e > 0, e * x, 0.0), axis=1))


@triton.jit
def update(policy, reference, a, a_ref, inverse_temperature):
    """Both states after a tile."""
    after = update_policy(policy, a, inverse_temperature)
    n = tl.maximum(reference.n, tl.max(a_ref, axis=1))
    x, y = centred(a, after.m, inverse_temperature), centred(a_ref, n, inverse_temperature)
    e = tl.exp(x)
    is_outside = (a_ref == -float("inf")) & (a > -float("inf"))
    terms = tl.where((e > 0) & (is_outside == 0), e * (x - y), 0.0)
    outside = tl.maximum(reference.outside, tl.max(is_outside.to(tl.float32), axis=1))
    before = moved_reference(policy, reference, after.m, n, inverse_temperature)
    return after, Reference(n, before.r + tl.sum(tl.exp(y), axis=1), before.c + tl.sum(terms, axis=1), outside)


@triton.jit
def merge_policy(state, other, inverse_temperature):
    """The states of two disjoint sets of columns, as the state of their union."""
    m = tl.maximum(state.m, other.m)
    left, right = moved_policy(state, m, inverse_temperature), moved_policy(other, m, inverse_temperature)
    return Policy(m, left.s + right.s, left.b + right.b)


@triton.jit
def merge(policy, reference, other_policy, other_reference, inverse_temperature):
    """Both states of two disjoint sets of columns, as those of their union."""
    merged = merge_policy(policy, other_policy, inverse_temperature)
    n = tl.maximum(reference.n, other_reference.n)
    left = moved_reference(policy, reference, merged.m, n, inverse_temperature)
    right = moved_reference(other_policy, other_reference, merged.m, n, inverse_temperature)
    outside = tl.maximum(reference.outside, other_reference.outside)
    return merged, Reference(n, left.r + right.r, left.c + right.c, outside)


@triton.jit
def moved_policy(state, m, inverse_temperature):
    """The same columns under a maximum that is no smaller."""
    shift = moved(state.m, m, state.s, inverse_temperature)
    scale = tl.exp(shift)
    return Policy(m, state.s * scale, (state.b + shift * state.s) * scale)


@triton.jit
def moved_reference(policy, reference, m, n, inverse_temperature):
    shift = moved(policy.m, m, policy.s, inverse_temperature)
    ref_shift = moved(reference.n, n, reference.r, inverse_temperature)
    c = (reference.c + (shift - ref_shift) * policy.s) * tl.exp(shift)
    return Reference(n, reference.r * tl.exp(ref_shift), c, reference.outside)


@triton.jit
def finish_policy(policy, a_token, inverse_temperature):
    """(logprob, entropy, log s)."""
    log_s = tl.log(policy.s)
    return (a_token - policy.m) * inverse_temperature - log_s, log_s - policy.b / policy.s, log_s


@triton.jit
def finish_reference(policy, reference, a_ref_token, inverse_temperature):
    """(ref_logprob, kl, log r)."""
    log_r = tl.log(reference.r)
    kl = reference.c / policy.s - tl.log(policy.s) + log_r
    infinity = tl.where(reference.r > 0, float("inf"), float("nan"))  # a reference that is -inf alone has no KL
    kl = tl.where((reference.outside > 0) & (kl == kl), infinity, kl)
    return (a_ref_token - reference.n) * inverse_temperature - log_r, kl, log_r


@triton.jit
def log_probabilities(a, peak, log_total, inverse_temperature):
    """log p of a tile from its row's maximum and log of its sum; their sum, the usual log-sum-exp, would cancel."""
    return centred(a, peak, inverse_temperature) - log_total[:, None]


@triton.jit
def logit_gradient(log_p, is_token, entropy, grad_logprob, grad_entropy):
    """d loss / d (a / T) of logprob and entropy: g_l (onehot - p) - g_H p (log p + H). None is no gradient."""
    p = tl.exp(log_p)
    gradient = tl.zeros_like(p)
    if grad_logprob is not None:
        gradient += grad_logprob[:, None] * (is_token.to(tl.float32) - p)
    if grad_entropy is not None:
        gradient -= grad_entropy[:, None] * p * tl.where(p > 0, log_p + entropy[:, None], 0.0)
    return gradient


@triton.jit
def kl_gradient(log_p, log_q, kl, grad_kl):
    """d loss / d (a / T) of the KL: g_K p (log p - log q - KL). NaN where the KL is infinite."""
    p = tl.exp(log_p)
    finite_kl = tl.where(kl == float("inf"), float("nan"), kl)[:, None]
    return grad_kl[:, None] * p * (tl.where(p > 0, log_p - log_q, 0.0) - finite_kl)
