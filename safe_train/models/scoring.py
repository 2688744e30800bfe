"""Log-probs, entropy and KL of tokens whose hidden states are given. `head` is `Policy.head()`.

Shape legend: L response tokens, H hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from safe_kernels import KeptIds, PolicyLoss, TokenStats, linear_policy_loss, linear_token_stats
from safe_train.data.batches import TokenBatch


def statistics(
    hidden_LH: Tensor, head: dict[str, Any], batch: TokenBatch, ref_hidden_LH: Tensor
) -> PolicyLoss | TokenStats:
    """Log-prob, entropy and KL by the function that the update calls: its log-probs will have the same bits."""
    inputs: dict[str, Any] = {"tokens": batch.targets_L, "ref_hidden": ref_hidden_LH, **head}
    if batch.kept is not None:
        return linear_token_stats(hidden_LH, kept=batch.kept, **inputs)
    nothing = torch.zeros(len(batch.targets_L), device=hidden_LH.device)
    return linear_policy_loss(hidden_LH, old_logprob=nothing, advantage=nothing, **inputs)


def logprobs(
    hidden_LH: Tensor,
    head: dict[str, Any],
    targets_L: Tensor,
    max_kept_bytes: int | None = None,
    kept: KeptIds | None = None,
) -> Tensor:
    """Log-probs of the targets under the policy alone, differentiable; within the sets that they were drawn from."""
    own = {name: value for name, value in head.items() if not name.startswith("ref_")}
    return linear_token_stats(hidden_LH, tokens=targets_L, max_kept_bytes=max_kept_bytes, kept=kept, **own).logprob
