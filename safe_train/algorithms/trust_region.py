"""A trust region on the true divergence: tokens that have left it no longer pull the policy further away.

The divergence of the policy of now from the one that sampled is taken over the whole vocabulary. The sampled token's
ratio, which PPO clips, is one noisy number of it: a rare token's ratio leaves the clip where the distribution hardly
moved, and a likely one's stays within where it did. As in DPPO (arXiv 2602.04879) a token beyond the bound loses its
gradient if that would move its ratio further from 1. With `trust_region_level` sequence all tokens of a completion with
a token beyond do, as in TRM (arXiv 2512.23075).

Shape legend: L response tokens of a micro-batch, B its sequences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from safe_train.config import SafeConfig
    from safe_train.data.batches import MicroBatch


def kind_of(args: SafeConfig) -> tuple[str, float] | None:
    """(divergence, bound), by its name in `linear_distillation_loss`; None without a trust region."""
    if args.trust_region_kl is not None:
        return "reverse_kl", args.trust_region_kl
    return None if args.trust_region_tv is None else ("tv", args.trust_region_tv)


def masked(divergence_L: Tensor, ratio_L: Tensor, micro: MicroBatch, args: SafeConfig) -> Tensor:
    """bool [L]: the tokens that lose their gradient."""
    kind = kind_of(args)
    assert kind is not None
    is_beyond_L = ~(divergence_L <= kind[1])  # a divergence that is NaN is beyond
    if args.trust_region_level == "token":
        return is_beyond_L & ((ratio_L.detach() - 1) * micro.advantage_L > 0)
    lengths_B = micro.batch.response_cu_seqlens.diff().long()
    count_B = torch.segment_reduce(is_beyond_L.float(), "sum", lengths=lengths_B, initial=0)
    return (count_B > 0).repeat_interleave(lengths_B)
