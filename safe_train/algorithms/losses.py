"""The loss of an update. Every function is one of tensors and numbers; none keeps state.

Shape legend: L response tokens of a micro-batch, B its sequences, K value heads, H hidden width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from safe_kernels import (
    PolicyLoss,
    linear_distillation_loss,
    linear_policy_loss,
    linear_token_stats,
    truncated_divergence,
)
from safe_train.algorithms import trust_region
from safe_train.algorithms.advantages import per_token
from safe_train.algorithms.algorithm import TokenLoss
from safe_train.algorithms.critic import reward_heads
from safe_train.algorithms.ppo import clipped
from safe_train.algorithms.registry import ALGORITHMS
from safe_train.algorithms.returns import kl_cost

if TYPE_CHECKING:
    from safe_train.algorithms.controller import Control
    from safe_train.config import SafeConfig
    from safe_train.data.batches import MicroBatch


class Totals(NamedTuple):
    """Of a minibatch, over its micro-batches on all processes."""

    tokens: float
    completions: float


def token_weights(micro: MicroBatch, totals: Totals, args: SafeConfig) -> Tensor:
    """[L]: how much each response token counts in the sum that is the loss; see `loss_aggregation`."""
    if args.loss_aggregation == "sequence_mean":
        boundaries = micro.batch.response_cu_seqlens
        return per_token(1 / (totals.completions * boundaries.diff().clamp(min=1)), boundaries)
    if args.loss_aggregation == "constant_length":
        return torch.full_like(micro.logprob_L, 1 / (totals.completions * args.max_new_tokens))
    return torch.full_like(micro.logprob_L, 1 / totals.tokens)


def policy_loss(
    hidden_LH: Tensor,
    head: dict[str, Any],
    micro: MicroBatch,
    weight_L: Tensor,
    control: Control,
    args: SafeConfig,
    max_kept_bytes: int | None = None,
) -> PolicyLoss:
    """The algorithm's loss, entropy bonus, KL and one-sided KL penalty, summed over the tokens with their weights.

    The controller's `kl_coef` multiplies the live KL, so what it decides has a gradient. Only `loss` carries one.
    """
    if args.algorithm == "distill":
        return distillation_loss(hidden_LH, head, micro, weight_L, control, args)
    if micro.batch.kept is not None or not is_built_in(args):
        return composed_loss(hidden_LH, head, micro, weight_L, control, args, max_kept_bytes)
    return linear_policy_loss(
        hidden_LH,
        tokens=micro.batch.targets_L,
        old_logprob=micro.logprob_L,
        advantage=importance_corrected(micro.advantage_L, micro, args),  # a weight >= 0 passes through the minimum
        loss_weight=weight_L,
        ref_hidden=micro.ref_hidden_LH,
        clip_low=args.clip_low,
        clip_high=args.clip_high,
        entropy_coef=args.entropy_coef,
        kl_coef=control.kl_coef,
        kl_penalty_coef=args.kl_penalty_coef,
        kl_threshold=control.kl_threshold,
        **head,
    )


def is_built_in(args: SafeConfig) -> bool:
    """Whether `linear_policy_loss` has the whole loss, which it then takes in one sweep over the vocabulary."""
    is_of_tokens = args.kl_estimator == "exact" and args.importance_sampling_level == "token"
    is_clipped = ALGORITHMS[args.algorithm].loss is clipped and math.isfinite(args.clip_low + args.clip_high)
    return is_clipped and is_of_tokens and trust_region.kind_of(args) is None


def composed_loss(
    hidden_LH: Tensor,
    head: dict[str, Any],
    micro: MicroBatch,
    weight_L: Tensor,
    control: Control,
    args: SafeConfig,
    max_kept_bytes: int | None,
) -> PolicyLoss:
    """The same of any algorithm: its loss is a function of log-probs, which `linear_token_stats` differentiates."""
    inputs: dict[str, Any] = {"tokens": micro.batch.targets_L, "ref_hidden": micro.ref_hidden_LH, **head}
    stats = linear_token_stats(hidden_LH, kept=micro.batch.kept, max_kept_bytes=max_kept_bytes, **inputs)
    assert stats.kl is not None
    divergence_L = divergence_from_rollout(hidden_LH, head, micro, args)
    loss_L, is_clipped_L = token_losses(stats.logprob, micro, control.kl_coef, args, divergence_L)
    loss_L = loss_L - args.entropy_coef * stats.entropy
    if args.kl_estimator == "exact":
        loss_L = loss_L + kl_cost(stats.kl, control, args)
    clip_fraction = is_clipped_L.float().sum() / max(1, len(weight_L))
    assert stats.ref_logprob is not None
    seen = [x.detach() for x in (stats.logprob, stats.entropy, stats.ref_logprob, stats.kl, clip_fraction)]
    return PolicyLoss((weight_L * loss_L).sum(), *seen)


def distillation_loss(
    hidden_LH: Tensor, head: dict[str, Any], micro: MicroBatch, weight_L: Tensor, control: Control, args: SafeConfig
) -> PolicyLoss:
    """The divergence of the policy and its teacher, with entropy bonus and KL to the reference where they count.

    Entropy and log-prob are those of now, and so is the KL if it is charged or bounded; else it is the rollout's.
    """
    if "teacher_hidden" not in micro.teacher:
        return served_distillation_loss(hidden_LH, head, micro, weight_L, control, args)
    own = {name: x for name, x in head.items() if not name.startswith("ref_")}
    divergence: dict[str, Any] = {"divergence": args.divergence, "beta": args.jsd_beta}
    found = linear_distillation_loss(
        hidden_LH,
        tokens=micro.batch.targets_L,
        weights=weight_L,
        reduction="sum",
        **own,
        **micro.teacher,
        **divergence,
    )
    loss, kl_L = found.loss, micro.kl_L
    costs = (control.kl_coef, args.kl_penalty_coef, args.entropy_coef)
    if any(costs) or args.max_preview_kl is not None:
        stats = linear_token_stats(hidden_LH, tokens=micro.batch.targets_L, ref_hidden=micro.ref_hidden_LH, **head)
        assert stats.kl is not None
        kl_L = stats.kl.detach()
        cost_L = kl_cost(stats.kl, control, args) - args.entropy_coef * stats.entropy
        loss = loss + (weight_L * cost_L).sum()
    assert found.logprob is not None
    return PolicyLoss(loss, found.logprob, found.entropy, micro.ref_logprob_L, kl_L, loss.new_zeros(()))


def served_distillation_loss(
    hidden_LH: Tensor, head: dict[str, Any], micro: MicroBatch, weight_L: Tensor, control: Control, args: SafeConfig
) -> PolicyLoss:
    """The same from a teacher's best K ids of each token: a lower bound of the divergence (`truncated_divergence`)."""
    targets_L1, served_LK = micro.batch.targets_L[:, None], micro.teacher["tokens"]
    tokens = torch.cat([targets_L1, served_LK], 1)
    stats = linear_token_stats(hidden_LH, tokens=tokens, ref_hidden=micro.ref_hidden_LH, **head)
    assert stats.kl is not None and stats.ref_logprob is not None
    loss_L = truncated_divergence(
        stats.logprob[:, 1:],
        micro.teacher["logprobs"],
        served_LK,
        micro.teacher["vocabulary"],
        divergence=args.divergence,
        beta=args.jsd_beta,
    )
    loss_L = loss_L + kl_cost(stats.kl, control, args) - args.entropy_coef * stats.entropy
    logprob_L, ref_logprob_L = stats.logprob[:, 0].detach(), stats.ref_logprob[:, 0]
    seen = (logprob_L, stats.entropy.detach(), ref_logprob_L, stats.kl.detach())
    return PolicyLoss((weight_L * loss_L).sum(), *seen, clip_fraction=loss_L.new_zeros(()))


@torch.no_grad()
def divergence_from_rollout(
    hidden_LH: Tensor, head: dict[str, Any], micro: MicroBatch, args: SafeConfig
) -> Tensor | None:
    """[L]: that of the trust region between the policy of now and the one that sampled; None without a bound."""
    if (kind := trust_region.kind_of(args)) is None:
        return None
    own = {name: x for name, x in head.items() if not name.startswith("ref_")}
    old = {f"teacher_{name}": x for name, x in own.items()} | micro.sampled_from
    return linear_distillation_loss(hidden_LH, divergence=kind[0], **own, **old).divergence


def token_losses(
    logprob_L: Tensor, micro: MicroBatch, kl_coef: float, args: SafeConfig, divergence_L: Tensor | None = None
) -> TokenLoss:
    """The part of the loss that depends on the sampled token's log-prob alone: the algorithm's, and k2 or k3.

    A token that left the trust region counts as clipped.
    """
    ratio_L = importance_ratio(logprob_L, micro, args)
    loss_L, is_clipped_L = ALGORITHMS[args.algorithm].loss(ratio_L, logprob_L, micro.advantage_L, args)
    if divergence_L is not None:
        is_masked_L = trust_region.masked(divergence_L, ratio_L, micro, args)
        loss_L, is_clipped_L = loss_L.masked_fill(is_masked_L, 0.0), is_clipped_L | is_masked_L
    if args.kl_estimator in SAMPLED_KL:
        loss_L = loss_L + kl_coef * SAMPLED_KL[args.kl_estimator](logprob_L, micro.ref_logprob_L)
    return TokenLoss(importance_corrected(loss_L, micro, args), is_clipped_L)


def importance_ratio(logprob_L: Tensor, micro: MicroBatch, args: SafeConfig) -> Tensor:
    """p(policy) / p(policy that sampled), of each token, or the geometric mean over the tokens of its sequence.

    Source of the latter: GSPO (arXiv 2507.18071).
    """
    difference_L = logprob_L - micro.logprob_L
    if args.importance_sampling_level == "sequence":
        boundaries = micro.batch.response_cu_seqlens
        lengths_B = boundaries.diff().long()
        sum_B = torch.segment_reduce(difference_L, "sum", lengths=lengths_B, initial=0)
        difference_L = per_token(sum_B / lengths_B.clamp(min=1), boundaries)
    return difference_L.exp()


def k2(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """(logprob - ref_logprob)^2 / 2, whose gradient is that of the KL in expectation under the policy."""
    return (logprob - ref_logprob).square() / 2


def k3(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """e^d - d - 1 with d = ref_logprob - logprob: unbiased for the KL, never negative."""
    difference = ref_logprob - logprob
    return difference.expm1() - difference


SAMPLED_KL = {"k2": k2, "k3": k3}


def importance_corrected(x_L: Tensor, micro: MicroBatch, args: SafeConfig) -> Tensor:
    """`x_L`, estimated from tokens that the sampler drew, whose kernels and rounding are not quite the trainer's.

    As it is, or with `importance_cap` times min(p(trainer) / p(sampler), cap), where `logprob_L` is the trainer's
    before the first update of the rollout: a mean under the sampler becomes one under the policy. The cap bounds the
    variance, at the price of some bias. Entropy and exact KL need no weight: they are sums over the vocabulary.
    Source: https://fengyao.notion.site/off-policy-rl (truncated importance sampling for mismatched engines).
    """
    if args.importance_cap is None:
        return x_L
    return x_L * (micro.logprob_L - micro.sampler_logprob_L).exp().clamp(max=args.importance_cap)


def value_loss(values_KL: Tensor, micro: MicroBatch, weight_L: Tensor, args: SafeConfig) -> Tensor:
    """Mean over the reward's heads of the clipped Huber loss, summed over the tokens with their weights; and the KL's.

    Each head regresses the returns by itself; moving further than `value_clip` from the rollout's value gains nothing.
    A completion that no reward applies to has no returns. The KL's head, the last, has a target at every token.
    """
    count = reward_heads(args)
    loss_L = clipped_errors(values_KL[:count], micro.values_KL[:count], micro.returns_L, args) * micro.is_scored_L
    if args.kl_gradient == "return":
        loss_L = loss_L + clipped_errors(values_KL[count:], micro.values_KL[count:], micro.unusual_cost_L, args)
    return (loss_L * weight_L).sum()


def clipped_errors(values_KL: Tensor, old_values_KL: Tensor, target_L: Tensor, args: SafeConfig) -> Tensor:
    """[L]: mean over the heads of the clipped Huber loss of a token."""
    clipped_KL = old_values_KL + (values_KL - old_values_KL).clamp(-args.value_clip, args.value_clip)
    target_KL = target_L.expand_as(values_KL)
    plain = huber_loss(values_KL, target_KL, reduction="none", delta=args.huber_delta)
    bounded = huber_loss(clipped_KL, target_KL, reduction="none", delta=args.huber_delta)
    return torch.maximum(plain, bounded).mean(0)


def means(policy: PolicyLoss, value_loss: Tensor, micro: MicroBatch, totals: Totals) -> dict[str, Tensor]:
    """What is logged of a loss: a micro-batch's share of the minibatch's losses, and of means over its tokens."""
    assert policy.kl is not None
    share_L = torch.full_like(micro.logprob_L, 1 / totals.tokens)
    return {
        "policy_loss": policy.loss.detach(),
        "value_loss": value_loss.detach(),
        "clip_fraction": policy.clip_fraction * share_L.sum(),
        "ratio_mean": (share_L * (policy.logprob - micro.logprob_L).exp()).sum(),
        "approx_kl": (share_L * k3(micro.logprob_L, policy.logprob)).sum(),
        "kl_before_step": (share_L * policy.kl).sum(),
    }
