"""Soft-min of two critics and its advantages: one program walks one sequence from its end, a block of time at a time.

Shapes: S sequences, T the time axis (of one sequence, or of all when packed), B tokens a block. Inside a sequence a
token has a place, counted from the end: place 0 is the last token, and time runs towards smaller places.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..results import ValueTargets
from .launch import SCAN


@triton.jit
def soft_min(v1, v2, alpha):
    """-alpha log((e^(-v1 / alpha) + e^(-v2 / alpha)) / 2), for any gap."""
    return tl.minimum(v1, v2) - alpha * tl.log(0.5 + 0.5 * tl.exp(-tl.abs(v1 - v2) / alpha))


@triton.jit
def load_value(v1, v2, at, wanted, alpha):
    """The value of tokens that are wanted, 0 elsewhere; what is not wanted is not read."""
    low = tl.load(v1 + at, mask=wanted, other=0.0).to(tl.float32)
    return soft_min(low, tl.load(v2 + at, mask=wanted, other=0.0).to(tl.float32), alpha)


@triton.jit
def load_live(mask, at, inside):
    live = inside
    if mask is not None:
        live = tl.load(mask + at, mask=inside, other=0) != 0
    return live


@triton.jit
def larger(earlier, later):
    return tl.maximum(earlier, later)


@triton.jit
def then(decay, total, next_decay, next_total):
    """Two maps A -> total + decay A, the second after the first, as one."""
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
    if cu_seqlens is not None:  # wrong bounds reach nothing outside the tensors
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


@torch.no_grad()
def soft_min_gae(
    v1: Tensor,
    v2: Tensor,
    rewards: Tensor,
    mask: Tensor | None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    alpha: float = 0.3,
    cu_seqlens: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> ValueTargets:
    for name, x in (("v1", v1), ("v2", v2), ("rewards", rewards)):
        if x.dtype == torch.float64:
            raise ValueError(f'{name} is torch.float64; backend="triton" computes in float32, backend="torch" takes it')
    found = ValueTargets._make(v1.new_empty(v1.shape, dtype=torch.float32) for _ in ValueTargets._fields)
    if v1.numel() > 0:
        gae_kernel[(v1.shape[:-1].numel() if cu_seqlens is None else len(cu_seqlens) - 1,)](
            v1=v1.contiguous(),
            v2=v2.contiguous(),
            rewards=rewards.contiguous(),
            mask=None if mask is None else mask.contiguous().view(torch.uint8),
            cu_seqlens=None if cu_seqlens is None else cu_seqlens.contiguous(),
            bootstrap=None if bootstrap is None else bootstrap.contiguous(),
            value=found.value,
            advantage=found.advantage,
            returns=found.returns,
            T=v1.shape[-1],
            gamma=gamma,
            decay=gamma * lam,
            alpha=alpha,
            B=SCAN.tokens,
            num_warps=SCAN.num_warps,
        )
    return found
