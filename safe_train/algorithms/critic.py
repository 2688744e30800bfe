"""The value function: heads over detached hidden states, in float32, with lagged target copies.

Shape legend: L response tokens, H hidden width.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from safe_train.algorithms.advantages import per_token

if TYPE_CHECKING:
    from safe_train.config import SafeConfig
    from safe_train.data.batches import TokenBatch


class Head(nn.Sequential):
    def __init__(self, hidden_size: int):
        width = max(1, hidden_size // 4)
        super().__init__(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, width), nn.GELU(), nn.Linear(width, 1))


class Critic(nn.Module):
    """Value heads of the reward, and their Polyak-averaged targets.

    How two heads are read is `args.critic`: "soft_min" leaves both to the soft-min, "mean" replaces each by their mean,
    and "single" is one head read twice; soft_min(v, v) = v, so the same value code serves all three.

    With `kl_gradient: return` one head more, the last, values the cost of later KL. It starts from 0.
    """

    def __init__(self, hidden_size: int, args: SafeConfig):
        super().__init__()
        self.args = args
        self.heads = nn.ModuleList(Head(hidden_size) for _ in range(reward_heads(args)))
        if args.kl_gradient == "return":
            of_kl = Head(hidden_size)
            for parameter in of_kl[-1].parameters():
                nn.init.zeros_(parameter)
            self.heads.append(of_kl)
        self.target_heads = copy.deepcopy(self.heads).requires_grad_(False)

    def forward(self, hidden_LH: Tensor) -> Tensor:
        """Values [heads, L] of the online heads. No gradient reaches the policy."""
        return self.read(self.heads, hidden_LH)

    @torch.no_grad()
    def target(self, hidden_LH: Tensor) -> Tensor:
        """Values [heads, L] of the target heads."""
        return self.read(self.target_heads, hidden_LH)

    def read(self, heads: nn.ModuleList, hidden_LH: Tensor) -> Tensor:
        hidden_LH = hidden_LH.detach().float()
        return torch.stack([head(hidden_LH).squeeze(-1) for head in heads])

    def pair(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The two values of the reward that the soft-min reads, from values [heads, L]."""
        if self.args.critic == "soft_min":
            return values[0], values[1]
        mean = values[: reward_heads(self.args)].mean(0)
        return mean, mean

    @torch.no_grad()
    def polyak(self, rate: float) -> None:
        """target <- target + rate (online - target)."""
        for target, online in zip(self.target_heads.parameters(), self.heads.parameters(), strict=True):
            target.lerp_(online, rate)


def reward_heads(args: SafeConfig) -> int:
    return 1 if args.critic == "single" else 2


def value_states(hidden_LH: Tensor, batch: TokenBatch, args: SafeConfig) -> Tensor:
    """The states that V reads: each token's own prediction, or its sequence's first one, which is the prompt's end."""
    if args.value_level == "token":
        return hidden_LH
    return hidden_LH[per_token(batch.response_cu_seqlens[:-1].long(), batch.response_cu_seqlens)]
