"""Soft-min of two critics, its one-step targets and its advantages, without a loop over time.

Every layout is flattened to M tokens of packed sequences, so that one code serves [..., T] and cu_seqlens.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..results import SafeTerms, TokenStats, ValueTargets


def soft_min(v1, v2, alpha) -> Tensor:
    v1, v2 = _compute(v1), _compute(v2)
    gap = (v1 - v2).abs() / alpha
    return torch.minimum(v1, v2) + alpha * (math.log(2) - torch.log1p(torch.exp(-gap)))


@torch.no_grad()
def soft_min_gae(
    v1, v2, rewards, mask, *, gamma=1.0, lam=0.95, alpha=0.3, cu_seqlens=None, bootstrap=None
) -> ValueTargets:
    """A scan by pointer jumping: after k rounds a token's sum spans the 2^k live tokens that follow it."""
    order = _TimeOrder.of(v1, mask, cu_seqlens)
    value, reward = soft_min(v1, v2, alpha).flatten(), _compute(rewards).flatten()
    delta = reward + gamma * order.following(value, bootstrap) - value
    advantage, follower, decay = torch.cat([order.live(delta), delta.new_zeros(1)]), order.follower, gamma * lam
    for _ in range(max(order.longest - 1, 0).bit_length()):
        advantage, follower, decay = advantage + decay * advantage[follower], follower[follower], decay * decay
    advantage = advantage[:-1]
    return ValueTargets(*(order.live(x).view(v1.shape) for x in (value, advantage, advantage + value)))


def terms_of(statistics: Callable[..., TokenStats]) -> Callable[..., SafeTerms]:
    """`safe_terms`, given the function for `token_stats` from logits or hidden states."""

    def safe_terms(*inputs, kl_threshold, alpha, gamma, target_v1, target_v2, cu_seqlens, mask, **options) -> SafeTerms:
        *inputs, v1, v2, rewards = inputs
        stats = statistics(*inputs, mask=mask, **options)
        order = _TimeOrder.of(v1, mask, cu_seqlens)
        penalty = (stats.kl - kl_threshold).relu() ** 2
        value = soft_min(*(v if mask is None else v.where(mask, 0) for v in (v1, v2)), alpha)
        with torch.no_grad():
            target = soft_min(v1 if target_v1 is None else target_v1, v2 if target_v2 is None else target_v2, alpha)
            value_target = _compute(rewards).flatten() + gamma * order.following(target.flatten())
        return SafeTerms(*stats, *(order.live(x.flatten()).view(v1.shape) for x in (penalty, value, value_target)))

    return safe_terms


class _TimeOrder(NamedTuple):
    """Who follows whom among M tokens: nothing crosses a sequence's end, masked tokens are skipped."""

    mask: Tensor | None  # [M]
    sequence: Tensor  # [M] which sequence a token is in
    follower: Tensor  # [M + 1] index of the next live token of the sequence, or M where there is none
    longest: int  # an upper bound of the sequences' lengths

    @classmethod
    def of(cls, like: Tensor, mask, cu_seqlens) -> "_TimeOrder":
        count, device = like.numel(), like.device
        position = torch.arange(count, device=device)
        if cu_seqlens is None:
            longest = like.shape[-1]
            sequence = position // max(longest, 1)
            end = (sequence + 1) * longest
        else:
            longest = count
            bounds = cu_seqlens.long()
            sequence = (torch.searchsorted(bounds, position, right=True) - 1).clamp(0, max(len(bounds) - 2, 0))
            end = bounds[sequence + 1]
        mask = None if mask is None else mask.flatten()
        nobody = position.new_full((2,), count)
        index = position if mask is None else position.where(mask, count)
        nearest = torch.cat([index, nobody]).flip(0).cummin(0).values.flip(0)[1:]
        follower = torch.cat([nearest[:-1].where(nearest[:-1] < end, count), nobody[:1]])
        return cls(mask, sequence, follower, longest)

    def live(self, x_M: Tensor) -> Tensor:
        return x_M if self.mask is None else x_M.where(self.mask, 0)

    def following(self, x_M: Tensor, bootstrap: Tensor | None = None) -> Tensor:
        """x of the next live token; past the last one `bootstrap` of the sequence, or 0."""
        follower = self.follower[:-1]
        last = x_M.new_zeros(()) if bootstrap is None else bootstrap.flatten().to(x_M.dtype)[self.sequence]
        return torch.cat([x_M, x_M.new_zeros(1)])[follower].where(follower < len(x_M), last)


def _compute(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
