"""Terms of the loss and the targets they regress; no function keeps state.

Shape legend: L response tokens, B sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from safe_kernels import PolicyLoss, linear_policy_loss
from safe_train.algorithms.controller import Control
from safe_train.config import SafeConfig
from safe_train.data.batches import MicroBatch
from safe_train.models.scoring import logprobs


def policy_loss(
    hidden_LH: Tensor, head: dict[str, Any], micro: MicroBatch, weight_L: Tensor, control: Control, args: SafeConfig
) -> PolicyLoss:
    """PPO's clipped surrogate, entropy bonus, KL and one-sided KL penalty, summed over the tokens with their weights.

    The controller's `kl_coef` multiplies the live KL, so what it decides has a gradient. `importance_cap` weights what
    is estimated from the sampled token, the surrogate and k2 or k3. Entropy and exact KL are sums over the vocabulary.
    """

    def corrected(x_L: Tensor) -> Tensor:
        return importance_corrected(x_L, micro.logprob_L, micro.sampler_logprob_L, args)

    targets_L = micro.batch.targets_L
    kl_coef = 0.0 if args.kl_in_reward else control.kl_coef
    exact = args.kl_estimator == "exact"
    result = linear_policy_loss(
        hidden_LH,
        tokens=targets_L,
        old_logprob=micro.logprob_L,
        advantage=corrected(micro.advantage_L),  # a weight >= 0 passes through the minimum of both surrogates
        loss_weight=weight_L,
        ref_hidden=micro.ref_hidden_LH,
        clip_low=args.clip_low,
        clip_high=args.clip_high,
        entropy_coef=args.entropy_coef,
        kl_coef=kl_coef if exact else 0.0,
        kl_penalty_coef=args.kl_penalty_coef,
        kl_threshold=control.kl_threshold,
        **head,
    )
    if exact:
        return result
    estimate_L = SAMPLED_KL[args.kl_estimator](logprobs(hidden_LH, head, targets_L), micro.ref_logprob_L)
    return result._replace(loss=result.loss + kl_coef * (corrected(weight_L) * estimate_L).sum())


def k2(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """(logprob - ref_logprob)^2 / 2, whose gradient is that of the KL in expectation under the policy."""
    return (logprob - ref_logprob).square() / 2


def k3(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """e^d - d - 1 with d = ref_logprob - logprob: unbiased for the KL, never negative."""
    difference = ref_logprob - logprob
    return difference.expm1() - difference


SAMPLED_KL = {"k2": k2, "k3": k3}


def importance_corrected(x_L: Tensor, logprob_L: Tensor, sampler_logprob_L: Tensor, args: SafeConfig) -> Tensor:
    """`x_L` of tokens that the sampler drew, whose kernels and rounding are not quite the trainer's.

    As it is, or with `importance_cap` times min(p(trainer) / p(sampler), cap), where `logprob_L` is the trainer's
    before the first update of the rollout: a mean under the sampler becomes one under the policy. The cap bounds the
    variance, at the price of some bias.
    Source: https://fengyao.notion.site/off-policy-rl (truncated importance sampling for mismatched engines).
    """
    if args.importance_cap is None:
        return x_L
    return x_L * (logprob_L - sampler_logprob_L).exp().clamp(max=args.importance_cap)


def value_loss(values_KL: Tensor, micro: MicroBatch, weight_L: Tensor, args: SafeConfig) -> Tensor:
    """Mean over the K heads of the clipped Huber loss, summed over the tokens with their weights.

    Each head regresses the returns by itself; moving further than `value_clip` from the rollout's value gains nothing.
    A completion that no reward applies to has no returns.
    """
    clipped_KL = micro.values_KL + (values_KL - micro.values_KL).clamp(-args.value_clip, args.value_clip)
    target_KL = micro.returns_L.expand_as(values_KL)
    plain = huber_loss(values_KL, target_KL, reduction="none", delta=args.huber_delta)
    clipped = huber_loss(clipped_KL, target_KL, reduction="none", delta=args.huber_delta)
    return (torch.maximum(plain, clipped).mean(0) * weight_L * micro.is_scored_L).sum()


def means(policy: PolicyLoss, value_loss: Tensor, micro: MicroBatch, weight_L: Tensor) -> dict[str, Tensor]:
    """What is logged of a loss, as sums over the tokens with their weights."""
    assert policy.kl is not None
    return {
        "policy_loss": policy.loss.detach(),
        "value_loss": value_loss.detach(),
        "clip_fraction": policy.clip_fraction * weight_L.sum(),
        "ratio_mean": (weight_L * (policy.logprob - micro.logprob_L).exp()).sum(),
        "approx_kl": (weight_L * k3(micro.logprob_L, policy.logprob)).sum(),
        "kl_before_step": (weight_L * policy.kl).sum(),
    }


def token_rewards(reward_B: Tensor, response_cu_seqlens: Tensor, kl_charge_L: Tensor) -> Tensor:
    """Minus the charge on every token, plus the sequence's reward on its last one. Empty responses get nothing."""
    lives = response_cu_seqlens.diff() > 0
    last = response_cu_seqlens[1:][lives].long() - 1
    return (-kl_charge_L).index_add(0, last, reward_B[lives])


def per_token(values_B: Tensor, response_cu_seqlens: Tensor) -> Tensor:
    """A number a sequence, repeated for each of its response tokens."""
    return values_B.repeat_interleave(response_cu_seqlens.diff().long())


def group_advantages(reward_B: Tensor, group_size: int) -> Tensor:
    """GRPO: rewards standardised within the completions of a prompt; 0 where they are all equal.

    A reward that is nan is left out of its group's mean and standard deviation, and gets 0. The first of a group is
    subtracted before the mean is taken, which would be rounded: equal rewards give exactly 0.
    """
    groups = reward_B.view(-1, group_size)
    known = ~groups.isnan()
    groups = groups - groups.gather(1, known.int().argmax(1, keepdim=True))
    centred = (groups - groups.nanmean(1, keepdim=True)).nan_to_num()
    degrees = (known.sum(1, keepdim=True) - 1).clamp(min=1)
    return (centred / ((centred.square().sum(1, keepdim=True) / degrees).sqrt() + 1e-4)).view(-1)


def whiten(values: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Zero mean and unit variance; centred only where the standard deviation is below 1e-6."""
    std = variance.sqrt()
    return torch.where(std < 1e-6, values - mean, (values - mean) / std.clamp(min=1e-6))
