"""What makes an algorithm: the loss of a token, the advantages, and the settings that come with it.

Each algorithm is one file beside this one and one line in `registry`. docs/write-an-algorithm.md walks through `cispo`.

Shape legend: L response tokens of a micro-batch, B completions of a rollout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from safe_train.config import SafeConfig


class TokenLoss(NamedTuple):
    loss_L: Tensor
    is_clipped_L: Tensor  # logged as clip_fraction


@dataclass(frozen=True)
class Algorithm:
    """An algorithm, with what it sets unless the user does: `critic`, `controller`, `beta`, `entropy_coef`.

    Args:
        loss: `(ratio_L, logprob_L, advantage_L, args) -> TokenLoss`, differentiable in the first two. `ratio_L` is
            p(policy) / p(policy that sampled), of tokens or sequences as `importance_sampling_level` says. Entropy
            bonus, KL and the weights of the tokens are added to every loss.
        advantages: `(reward_B, args) -> advantage_B` of an algorithm that compares the completions of a prompt; the
            completions of a prompt are consecutive, and nan means that no reward applies. None: GAE on a critic.
    """

    loss: Callable[[Tensor, Tensor, Tensor, SafeConfig], TokenLoss]
    advantages: Callable[[Tensor, SafeConfig], Tensor] | None
    critic: str
    controller: str
    beta: float
    entropy_coef: float = 0.01

    @property
    def preset(self) -> dict[str, Any]:
        names = ("critic", "controller", "beta", "entropy_coef")
        return {name: getattr(self, name) for name in names}
