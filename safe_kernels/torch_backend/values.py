"""Soft-min of two critics, its one-step targets and its advantages, without a loop over time.

Every layout is flattened to M tokens of packed sequences, so that one code serves [..., T] and cu_seqlens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..inputs import Terms
from ..reference import soft_min


def soft_min_gae(
    v1: Tensor,
    v2: Tensor,
    rewards: Tensor,
    mask: Tensor | None,
    gamma: float,
    lam: float,
    alpha: float,
    cu_seqlens: Tensor | None,
    bootstrap: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A scan by pointer jumping: after k rounds a token's sum spans the 2^k live tokens that follow it."""
    value = soft_min(v1, v2, alpha).flatten()
    order = _TimeOrder.of(value, v1.shape[-1], mask, cu_seqlens)
    delta = rewards.to(value.dtype).flatten() + gamma * order.following(value, bootstrap) - value
    advantage, follower, decay = torch.cat([order.live(delta), delta.new_zeros(1)]), order.follower, gamma * lam
    for _ in range(max(order.longest - 1, 0).bit_length()):
        advantage, follower, decay = advantage + decay * advantage[follower], follower[follower], decay * decay
    advantage = advantage[:-1]
    value, advantage, returns = (order.live(x).view(v1.shape) for x in (value, advantage, advantage + value))
    return value, advantage, returns


def terms_of(terms: Terms | None, stats: Tensor, mask_N: Tensor | None) -> Tensor | None:
    """(kl_penalty, value, value_target) [3, N] of tokens with statistics [8, N]."""
    if terms is None:
        return None
    v1, v2, rewards, target_v1, target_v2 = (x.to(stats.dtype) for x in terms[:5])
    order = _TimeOrder.of(v1, terms.length, mask_N, terms.cu_seqlens)
    penalty = (stats[5] - terms.kl_threshold).relu() ** 2
    value_target = rewards + terms.gamma * order.following(soft_min(target_v1, target_v2, terms.alpha))
    return torch.stack([order.live(x) for x in (penalty, soft_min(v1, v2, terms.alpha), value_target)])


class _TimeOrder(NamedTuple):
    """Who follows whom among M tokens: nothing crosses a sequence's end, masked tokens are skipped."""

    mask: Tensor | None  # [M]
    sequence: Tensor  # [M] which sequence a token is in
    follower: Tensor  # [M + 1] index of the next live token of the sequence, or M where there is none
    longest: int  # an upper bound of the sequences' lengths

    @classmethod
    def of(cls, like: Tensor, length: int, mask: Tensor | None, cu_seqlens: Tensor | None) -> "_TimeOrder":
        """Of tokens as many as `like` has, in sequences of `length` unless they are packed."""
        count = like.numel()
        position = torch.arange(count, device=like.device)
        if cu_seqlens is None:
            longest = length
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
