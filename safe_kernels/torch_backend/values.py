"""Soft-min of two critics, its one-step targets and its advantages, without a loop over time.

Every layout is flattened to M tokens of packed sequences, so that the same code serves [..., T] and cu_seqlens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..formulas import soft_min
from ..inputs import ScanInputs, TermsInputs, without_masked


def soft_min_gae(inputs: ScanInputs) -> tuple[Tensor, Tensor, Tensor]:
    """A scan by pointer jumping: after k rounds a token's sum spans the 2^k live tokens that follow it."""
    v1, v2, rewards, mask, gamma, lam, alpha, cu_seqlens, bootstrap = inputs
    value, mask_M = soft_min(v1, v2, alpha).flatten(), None if mask is None else mask.flatten()
    order = TimeOrder.of(value, v1.shape[-1], mask_M, cu_seqlens)
    delta = rewards.to(value.dtype).flatten() + gamma * order.following(value, bootstrap) - value
    advantage = torch.cat([without_masked(delta, mask_M), delta.new_zeros(1)])
    follower, decay = order.follower, gamma * lam
    for _ in range(max(order.longest - 1, 0).bit_length()):
        advantage, follower, decay = advantage + decay * advantage[follower], follower[follower], decay * decay
    advantage = advantage[:-1]
    value, advantage, returns = (
        without_masked(x, mask_M).view(v1.shape) for x in (value, advantage, advantage + value)
    )
    return value, advantage, returns


def value_terms(kl_N: Tensor, inputs: TermsInputs) -> Tensor:
    v1, v2, rewards, target_v1, target_v2 = (x.to(kl_N.dtype) for x in inputs[:5])
    order = TimeOrder.of(v1, inputs.length, inputs.mask_N, inputs.cu_seqlens)
    threshold = inputs.kl_threshold if inputs.kl_threshold_tensor is None else inputs.kl_threshold_tensor
    penalty = (kl_N - threshold).relu() ** 2
    value_target = rewards + inputs.gamma * order.following(soft_min(target_v1, target_v2, inputs.alpha))
    return torch.stack(
        [without_masked(x, inputs.mask_N) for x in (penalty, soft_min(v1, v2, inputs.alpha), value_target)]
    )


class TimeOrder(NamedTuple):
    """Who follows whom among M tokens: nothing crosses a sequence's end, masked tokens are skipped."""

    sequence: Tensor  # [M] which sequence a token is in
    follower: Tensor  # [M + 1] index of the next live token of the sequence, or M where there is none
    longest: int  # an upper bound of the sequences' lengths

    @classmethod
    def of(cls, like: Tensor, length: int, mask_M: Tensor | None, cu_seqlens: Tensor | None) -> "TimeOrder":
        """The links among the tokens of `like`, in sequences of `length` unless they are packed."""
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
        nobody = position.new_full((2,), count)
        index = position if mask_M is None else position.where(mask_M, count)
        nearest = torch.cat([index, nobody]).flip(0).cummin(0).values.flip(0)[1:]
        follower = torch.cat([nearest[:-1].where(nearest[:-1] < end, count), nobody[:1]])
        return cls(sequence, follower, longest)

    def following(self, x_M: Tensor, bootstrap: Tensor | None = None) -> Tensor:
        """x of the next live token; past the last one `bootstrap` of the sequence, or 0."""
        follower = self.follower[:-1]
        last = x_M.new_zeros(()) if bootstrap is None else bootstrap.flatten().to(x_M.dtype)[self.sequence]
        return torch.cat([x_M, x_M.new_zeros(1)])[follower].where(follower < len(x_M), last)
