"""Soft-min of two critics: advantages with one program a sequence, one-step targets a few tokens at a time.

Shapes: S sequences, T the time axis (of one sequence, or of all when packed), N tokens, R of them in a program, B
tokens a block. Inside a sequence a token has a place, counted from the end: place 0 is the last token, and time runs
towards smaller places.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..inputs import ScanInputs, TermsInputs
from . import launch


@triton.jit
def soft_min(v1, v2, alpha):
    """-alpha log((e^(-v1 / alpha) + e^(-v2 / alpha)) / 2), for any gap.

    From the minimum; for a small gap, where that loses digits, the mean minus a series of alpha log cosh(gap / 2).
    """
    gap = tl.abs(v1 - v2) / alpha
    far = tl.minimum(v1, v2) - alpha * tl.log(0.5 + 0.5 * tl.exp(-gap))
    q = 0.25 * gap * gap
    near = 0.5 * v1 + 0.5 * v2 - alpha * q * (0.5 - q * (1 / 12 - q * (1 / 45 - q * (17 / 2520))))
    return tl.where(gap < 0.5, near, far)


@triton.jit
def load_value(v1, v2, at, wanted, alpha):
    """The value of the wanted tokens, 0 elsewhere. Other tokens are not read."""
    low = tl.load(v1 + at, mask=wanted, other=0.0).to(tl.float32)
    return soft_min(low, tl.load(v2 + at, mask=wanted, other=0.0).to(tl.float32), alpha)


@triton.jit
def load_live(mask, at, inside):
    live = inside
    if mask is not None:
        live = tl.load(mask + at, mask=inside, other=0) != 0
    return live


@triton.jit
def end_of_sequence(row_R, cu_seqlens, sequences, length, N, B: tl.constexpr):
    """One past the last token of the sequence that a token is in: the first bound after it."""
    end_R = tl.minimum((row_R // length + 1) * length, N)
    if cu_seqlens is not None:
        end_R = tl.zeros_like(row_R) + N
        for start in range(1, sequences + 1, B):
            at = start + tl.arange(0, B)
            bound = tl.load(cu_seqlens + at, mask=at <= sequences, other=0).to(tl.int64)[None, :]
            end_R = tl.minimum(end_R, tl.min(tl.where(bound > row_R[:, None], bound, N), axis=1))
    return end_R


@triton.jit
def follower_of(row_R, live_R, end_R, mask, B: tl.constexpr):
    """The next live token after each live one; at or past `end_R` if the sequence has none."""
    next_R = row_R + 1
    if mask is not None:
        searching_R = live_R & (next_R < end_R)
        while tl.max(searching_R.to(tl.int32), axis=0) > 0:
            at = next_R[:, None] + tl.arange(0, B)[None, :]
            found = load_live(mask, at, (at < end_R[:, None]) & searching_R[:, None])
            nearest_R = tl.min(tl.where(found, at, next_R[:, None] + B), axis=1)
            next_R = tl.where(searching_R, nearest_R, next_R)
            searching_R = searching_R & (tl.max(found.to(tl.int32), axis=1) == 0) & (next_R < end_R)
    return next_R


@triton.jit(do_not_specialize=["threshold", "alpha", "gamma", "sequences", "length", "N"])
def terms_kernel(
    kl,  # [N], like the next five
    v1,
    v2,
    rewards,
    target_v1,
    target_v2,
    mask,  # [N], or None
    cu_seqlens,  # [S + 1], or None: sequences of `length` tokens
    threshold_tensor,  # one number, or None: threshold
    threshold,
    alpha,
    gamma,
    sequences,
    length,
    N,
    terms,  # [3, N]: kl_penalty, value, value_target
    R: tl.constexpr,
):
    """The results of `safe_terms` for tokens whose KL is known."""
    B: tl.constexpr = 32
    row_R = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside_R = row_R < N
    live_R = load_live(mask, row_R, inside_R)
    if threshold_tensor is not None:
        threshold = tl.load(threshold_tensor).to(tl.float32)
    excess_R = tl.load(kl + row_R, mask=live_R, other=0.0) - threshold
    end_R = end_of_sequence(row_R, cu_seqlens, sequences, length, N, B)
    next_R = follower_of(row_R, live_R, end_R, mask, B)
    next_value_R = load_value(target_v1, target_v2, next_R, live_R & (next_R < end_R), alpha)
    next_value_R = tl.where(next_R < end_R, next_value_R, 0.0)
    reward_R = tl.load(rewards + row_R, mask=live_R, other=0.0).to(tl.float32)
    value_R = load_value(v1, v2, row_R, live_R, alpha)
    penalty_R = tl.where(excess_R <= 0, 0.0, excess_R * excess_R)  # a NaN stays one
    tl.store(terms + row_R, tl.where(live_R, penalty_R, 0.0), mask=inside_R)
    tl.store(terms + N.to(tl.int64) + row_R, tl.where(live_R, value_R, 0.0), mask=inside_R)
    target_R = reward_R + gamma * next_value_R
    tl.store(terms + 2 * N.to(tl.int64) + row_R, tl.where(live_R, target_R, 0.0), mask=inside_R)


@triton.jit
def larger(earlier, later):
    return tl.maximum(earlier, later)


@triton.jit
def then(decay, total, next_decay, next_total):
    """The composition of two maps A -> total + decay A, the first one first."""
    return next_decay * decay, next_total + next_decay * total


@triton.jit(do_not_specialize=["T", "gamma", "decay", "alpha"])
def gae_kernel(
    v1,  # [S, T], or [T] packed
    v2,
    rewards,
    mask,  # or None
    cu_seqlens,  # [S + 1], or None: not packed
    bootstrap,  # [S], or None: 0
    value,  # the same shape as v1
    advantage,
    returns,
    T,
    gamma,
    decay,  # gamma * lam
    alpha,
    B: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    first, end = sequence * T, sequence * T + T
    if cu_seqlens is not None:  # clamped: wrong bounds must not read outside the tensors
        first = tl.maximum(tl.load(cu_seqlens + sequence), 0).to(tl.int64)
        end = tl.minimum(tl.load(cu_seqlens + sequence + 1), T).to(tl.int64)
    after_last = 0.0
    if bootstrap is not None:
        after_last = tl.load(bootstrap + sequence).to(tl.float32)

    block = tl.arange(0, B)
    next_place = tl.full([], -1, tl.int32)  # of the live token that comes next after this block in time; -1 is none
    next_advantage = tl.full([], 0.0, tl.float32)
    for start in range(0, (end - first).to(tl.int32), B):
        place = start + block
        at = end - 1 - place
        live = load_live(mask, at, at >= first)
        is_followed = load_live(mask, at + 1, (at + 1 >= first) & (place > 0))
        follower = tl.associative_scan(tl.where(is_followed, place - 1, -1), 0, larger)
        follower = tl.maximum(follower, next_place)
        v = load_value(v1, v2, at, live, alpha)
        next_v = load_value(v1, v2, end - 1 - follower, follower >= 0, alpha)
        reward = tl.load(rewards + at, mask=live, other=0.0).to(tl.float32)
        delta = reward + gamma * tl.where(follower >= 0, next_v, after_last) - v
        decays, sums = tl.associative_scan((tl.where(live, decay, 1.0), tl.where(live, delta, 0.0)), 0, then)
        a = sums + decays * next_advantage
        next_place = tl.max(follower, axis=0)
        next_advantage = tl.sum(tl.where(block == B - 1, a, 0.0), axis=0)
        tl.store(value + at, v, mask=at >= first)
        tl.store(advantage + at, tl.where(live, a, 0.0), mask=at >= first)
        tl.store(returns + at, tl.where(live, a + v, 0.0), mask=at >= first)


def value_terms(kl_N: Tensor, inputs: TermsInputs) -> Tensor:
    terms, cu_seqlens = kl_N.new_empty(3, len(kl_N)), inputs.cu_seqlens
    if len(kl_N) == 0:
        return terms
    values = ("v1", "v2", "rewards", "target_v1", "target_v2")
    terms_kernel[(triton.cdiv(len(kl_N), launch.LOOK_UP.tokens),)](
        kl=kl_N.contiguous(),
        **{name: x.contiguous() for name, x in zip(values, inputs[:5], strict=True)},
        mask=None if inputs.mask_N is None else inputs.mask_N.contiguous().view(torch.uint8),
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(),
        threshold_tensor=inputs.kl_threshold_tensor,
        threshold=inputs.kl_threshold,
        alpha=inputs.alpha,
        gamma=inputs.gamma,
        sequences=0 if cu_seqlens is None else len(cu_seqlens) - 1,
        length=inputs.length,
        N=len(kl_N),
        terms=terms,
        R=launch.LOOK_UP.tokens,
        num_warps=launch.LOOK_UP.num_warps,
    )
    return terms


def soft_min_gae(inputs: ScanInputs) -> tuple[Tensor, Tensor, Tensor]:
    v1, v2, rewards, mask, gamma, lam, alpha, cu_seqlens, bootstrap = inputs
    new = v1.new_empty if cu_seqlens is None else v1.new_zeros  # no program visits tokens outside the bounds
    value, advantage, returns = (new(v1.shape, dtype=torch.float32) for _ in range(3))
    if v1.numel() > 0:
        gae_kernel[(v1.shape[:-1].numel() if cu_seqlens is None else len(cu_seqlens) - 1,)](
            v1=v1.contiguous(),
            v2=v2.contiguous(),
            rewards=rewards.contiguous(),
            mask=None if mask is None else mask.contiguous().view(torch.uint8),
            cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(),
            bootstrap=None if bootstrap is None else bootstrap.contiguous(),
            value=value,
            advantage=advantage,
            returns=returns,
            T=v1.shape[-1],
            gamma=gamma,
            decay=gamma * lam,
            alpha=alpha,
            B=launch.SCAN.tokens,
            num_warps=launch.SCAN.num_warps,
        )
    return value, advantage, returns
