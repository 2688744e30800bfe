"""The states of the recurrence: two parts of a vocabulary, merged, are the whole."""

import math

import cases
import pytest
import torch
import triton
import triton.language as tl

from safe_kernels.triton_backend.online_softmax import (
    empty_forward,
    empty_policy,
    empty_reference,
    finish_forward,
    finish_policy,
    finish_reference,
    merge,
    merge_forward,
    merge_policy,
    update,
    update_forward,
    update_policy,
)

R, C = 4, 16


@triton.jit
def merged_kernel(left, left_ref, right, right_ref, out, R: tl.constexpr, C: tl.constexpr):
    rows, inverse = tl.arange(0, R), tl.full([R], 1.0 / 0.7, tl.float32)
    at = rows[:, None] * C + tl.arange(0, C)[None, :]
    zero = tl.zeros([R], tl.float32)
    policy, reference = empty_policy(zero), empty_reference(zero)
    empty, a, a_ref = empty_forward(zero), tl.load(left + at), tl.load(left_ref + at)
    first = update(policy, reference, a, a_ref, inverse)
    forward = update_forward(empty, policy, reference, first[0], first[1], a, a_ref, inverse)
    a, a_ref = tl.load(right + at), tl.load(right_ref + at)
    second = update(policy, reference, a, a_ref, inverse)
    other = update_forward(empty, policy, reference, second[0], second[1], a, a_ref, inverse)
    forward = merge_forward(forward, first[0], first[1], other, second[0], second[1], inverse)
    policy, reference = merge(first[0], first[1], second[0], second[1], inverse)
    logprob, entropy, _ = finish_policy(policy, zero, inverse)
    ref_logprob, kl, _ = finish_reference(policy, reference, zero, inverse)
    tl.store(out + rows, logprob)
    tl.store(out + R + rows, entropy)
    tl.store(out + 2 * R + rows, ref_logprob)
    tl.store(out + 3 * R + rows, kl)
    tl.store(out + 4 * R + rows, finish_forward(forward, policy, reference))


@triton.jit
def merged_policy_kernel(left, right, out, R: tl.constexpr, C: tl.constexpr):
    rows, inverse = tl.arange(0, R), tl.full([R], 1.0 / 0.7, tl.float32)
    at = rows[:, None] * C + tl.arange(0, C)[None, :]
    zero = tl.zeros([R], tl.float32)
    empty = empty_policy(zero)
    first, second = (
        update_policy(empty, tl.load(left + at), inverse),
        update_policy(empty, tl.load(right + at), inverse),
    )
    logprob, entropy, _ = finish_policy(merge_policy(first, second, inverse), zero, inverse)
    tl.store(out + rows, logprob)
    tl.store(out + R + rows, entropy)


def statistics(a, a_ref, dtype):
    """(log-prob of a logit of 0, entropy, the same log-prob under the reference, KL, KL of the reference to it)."""
    logp, logq = (x.to(dtype).div(0.7).log_softmax(-1) for x in (a, a_ref))
    totals = [x.to(dtype).div(0.7).logsumexp(-1) for x in (a, a_ref)]
    p, known = logp.exp(), logp > -math.inf
    entropy = -(p * logp.where(known, 0)).sum(-1)
    kls = [(x.exp() * (x - y).where(x > -math.inf, 0)).sum(-1) for x, y in ((logp, logq), (logq, logp))]
    return torch.stack([-totals[0], entropy, -totals[1], *kls])


@pytest.mark.parametrize("case", ["plain", "far apart", "an empty part", "reference outside", "policy outside"])
def test_merged_parts_are_the_whole(case):
    draw = torch.Generator().manual_seed(0)
    a, a_ref = 3 * torch.randn(2, R, 2 * C, generator=draw)
    if case == "far apart":
        a[:, C:] += 200
        a_ref[:, :C] += 150
    if case == "an empty part":
        a[:, C:] = a_ref[:, C:] = -math.inf
    if case == "reference outside":
        a_ref[:, 3] = -math.inf
    if case == "policy outside":
        a[:, 3] = -math.inf
    parts = [x.contiguous() for x in (a[:, :C], a_ref[:, :C], a[:, C:], a_ref[:, C:])]
    out = torch.full((5, R), math.nan)
    merged_kernel[(1,)](*parts, out, R=R, C=C)
    plain, exact = (statistics(a, a_ref, dtype) for dtype in (torch.float32, torch.float64))
    cases.hold(case, out.cpu(), plain, exact, 2 * C)
    alone = torch.full((2, R), math.nan)
    merged_policy_kernel[(1,)](left=parts[0], right=parts[2], out=alone, R=R, C=C)
    assert torch.equal(alone, out[:2])
