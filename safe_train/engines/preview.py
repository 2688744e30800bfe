"""Look at the KL that an optimizer step reached, and walk back part of the step if it went too far."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from safe_kernels import linear_token_stats
from safe_train import parallel
from safe_train.data.batches import MicroBatch
from safe_train.engines import sharding
from safe_train.models.policy import Policy


class Preview:
    """theta <- theta_old + s (theta_new - theta_old), with s from a linear model of the KL along the step.

    The optimizer's moments stay as they are.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], max_kl: float, min_scale: float):
        self.parameters, self.max_kl, self.min_scale = parameters, max_kl, min_scale
        self.before: list[Tensor] = []

    def remember(self) -> None:
        self.before = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def apply(self, kl_old: float, kl_new: float) -> float:
        """Scales the step taken since `remember`, if one was taken, and returns the scale; 1 leaves it alone."""
        scale = step_scale(kl_old, kl_new, self.max_kl, self.min_scale) if self.before else 1.0
        if scale < 1:
            for old, parameter in zip(self.before, self.parameters, strict=True):
                parameter.copy_(old.lerp(parameter, scale))
        self.before = []
        return scale


def step_scale(kl_old: float, kl_new: float, max_kl: float, min_scale: float) -> float:
    """The part of a step from kl_old to kl_new that ends at max_kl, at least min_scale; 1 if the step need not shrink.

    (Scaling by max_kl / kl_new instead would miss the bound, and would slow the way back from above it.)
    """
    if kl_new <= max(kl_old, max_kl):
        return 1.0
    return min(1.0, max(min_scale, (max_kl - kl_old) / (kl_new - kl_old)))


@torch.no_grad()
def mean_kl(policy: Policy, minibatch: Sequence[MicroBatch]) -> float:
    """Exact KL to the reference, nats per token, of the policy as it is now."""
    total, tokens = 0.0, 0
    for micro in minibatch:
        hidden_LH, targets_L, ref_LH = policy(micro.batch), micro.batch.targets_L, micro.ref_hidden_LH
        kl_L = linear_token_stats(hidden_LH, tokens=targets_L, ref_hidden=ref_LH, **policy.head()).kl
        assert kl_L is not None
        total, tokens = total + kl_L.sum().item(), tokens + len(kl_L)
    sharding.reshard(policy)
    return parallel.total_number(total) / parallel.total_number(tokens)
