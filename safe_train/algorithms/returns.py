"""Returns: what follows on a token, by GAE on a critic, and the cost of the KL that follows on it.

The gradient of an expected sum of costs c_t, which depend on the state that predicts token t, has two parts:

    grad E[sum_t c_t] = E[ sum_t grad c_t + sum_t grad log p(token t) sum_{s > t} c_s ]

The loss has the first. With `kl_gradient: return` the second is here: a token is charged for the later costs, which are
exact. docs/algorithm.md says what that means for scales and baselines.

Shape legend: L response tokens of a micro-batch, B completions of a rollout, T positions in a response.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safe_kernels import ValueTargets, soft_min_gae

if TYPE_CHECKING:
    from safe_train.algorithms.controller import Control
    from safe_train.config import SafeConfig
    from safe_train.data.batches import MicroBatch
    from safe_train.sampling.experience import Experience


def gae(v1_L: Tensor, v2_L: Tensor, rewards_L: Tensor, micro: MicroBatch, args: SafeConfig) -> ValueTargets:
    """Advantages and returns of rewards under the soft-min of two values.

    Without a critic lambda is 1 unless it is set: less would discount what a whole completion earns by its length.
    """
    default = 1.0 if args.critic == "none" else 1 - 1 / args.max_new_tokens
    lam = default if args.gae_lambda is None else args.gae_lambda
    boundaries = micro.batch.response_cu_seqlens
    return soft_min_gae(v1_L, v2_L, rewards_L, None, gamma=args.gamma, lam=lam, alpha=args.alpha, cu_seqlens=boundaries)


def kl_cost(kl_L: Tensor, control: Control, args: SafeConfig) -> Tensor:
    """What the loss charges for the exact KL of a token: kl_coef KL + kl_penalty_coef relu(KL - tau)^2."""
    cost_L = torch.zeros_like(kl_L)
    if control.kl_coef != 0:
        cost_L = cost_L + control.kl_coef * kl_L
    if args.kl_penalty_coef != 0:
        cost_L = cost_L + args.kl_penalty_coef * (kl_L - control.kl_threshold).relu().square()
    return cost_L


def charge_later_kl(experience: Experience, control: Control, args: SafeConfig) -> None:
    """Charges each token's advantage with the cost of later states' KL, less what the other completions paid there.

    A critic has a head for what these do not explain, and the charge is that of GAE on both together.
    """
    micros = [micro for micro in experience if micro.indices]
    costs = [args.gamma * following(kl_cost(m.kl_L, control, args), m.batch.response_cu_seqlens) for m in micros]
    for micro, cost_L in zip(micros, costs, strict=True):
        none_L, boundaries = torch.zeros_like(cost_L), micro.batch.response_cu_seqlens
        found = soft_min_gae(none_L, none_L, cost_L, None, gamma=args.gamma, lam=1.0, cu_seqlens=boundaries)
        micro.later_cost_L = found.returns
    others_BT = mean_of_others(experience.table("later_cost_L"))
    for micro, cost_L in zip(micros, costs, strict=True):
        others_L = others_BT[tuple(micro.place_L)].to(cost_L.dtype)
        charge_L = micro.later_cost_L - others_L
        if experience.critic is not None:
            value_L, target_L = others_L + micro.values_KL[-1], others_L + micro.target_values_KL[-1]
            charge_L = gae(value_L, value_L, cost_L, micro, args).advantage
            micro.unusual_cost_L = gae(target_L, target_L, cost_L, micro, args).returns - others_L
        micro.kl_charge_L, micro.advantage_L = charge_L, micro.advantage_L - charge_L


def following(x_L: Tensor, response_cu_seqlens: Tensor) -> Tensor:
    """The next token's value in the same response, and 0 for the last token."""
    lives = response_cu_seqlens.diff() > 0
    last = response_cu_seqlens[1:][lives].long() - 1
    return x_L.roll(-1).index_fill(0, last, 0.0)


def mean_of_others(x_BT: Tensor) -> Tensor:
    """For each completion the mean at each position over the others that have one there, nan elsewhere in `x_BT`.

    0 where there is no other. The others are drawn independently, so that this baseline has no bias.
    """
    is_there_BT = ~x_BT.isnan()
    others_BT = x_BT.nansum(0) - x_BT.nan_to_num()
    return others_BT / (is_there_BT.sum(0) - 1).clamp(min=1)
