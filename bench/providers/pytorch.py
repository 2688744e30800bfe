"""Plain PyTorch, which is the baseline of every ratio, and the same under torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import safe_kernels
from bench.measurement.workloads import OUTPUTS, POLICY, WITH_KL
from bench.providers.provider import OPERATIONS, Case, Compute, Provider, Results, by_name, from_best
from safe_kernels import reference


def plain(entrance: str) -> Compute:
    if entrance == "best":
        return from_best(operation(entrance), divergence_of_best)
    return lambda case: by_name(operation(entrance)(**with_sets(case)))


def with_sets(case: Case) -> Case:
    """The kept ids [N, K] as the reference takes them, which then masks whole rows of logits."""
    if "kept" not in case:
        return case
    ids = case["kept"]
    starts = torch.arange(len(ids) + 1, device=ids.device) * ids.shape[1]
    return case | {"kept": safe_kernels.KeptIds(ids.reshape(-1), starts)}


def operation(entrance: str) -> Callable[..., Any]:
    return gae_loop if entrance == "gae" else getattr(reference, OPERATIONS[entrance])


def compiled(entrance: str) -> Compute:
    def run(case: Case) -> Results:
        if entrance == "gae":
            return by_name(gae_loop(**case, step=_compiled(gae_step)))
        if entrance == "best":
            return from_best(_compiled(operation(entrance)), _compiled(divergence_of_best))(case)
        return by_name(_compiled(operation(entrance))(**with_sets(case)))

    return run


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def gae_step(next_value: Tensor, next_advantage: Tensor, value: Tensor, reward: Tensor, live: Tensor,
             gamma: float, lam: float) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One step back in time for all sequences: (value, advantage) of the next live token."""
    advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
    return torch.where(live, value, next_value), torch.where(live, advantage, next_advantage)


def gae_loop(v1: Tensor, v2: Tensor, rewards: Tensor, mask: Tensor | None, *, gamma: float = 1.0, lam: float = 0.95,
             alpha: float = 0.3, step: Callable[..., Any] = gae_step) -> safe_kernels.ValueTargets:  # fmt: skip
    """The loop over time that trainers have, all sequences [S] of a time step at once."""
    value = reference.soft_min(v1, v2, alpha)
    live = torch.ones_like(v1, dtype=torch.bool) if mask is None else mask
    next_value = next_advantage = torch.zeros_like(value[:, 0])
    advantage = torch.empty_like(value)
    for t in reversed(range(value.shape[1])):
        now = value[:, t], rewards[:, t].to(value.dtype), live[:, t]
        next_value, next_advantage = step(next_value, next_advantage, *now, gamma, lam)
        advantage[:, t] = next_advantage
    zeroed = (x.where(live, 0) for x in (value, advantage, advantage + value))
    return safe_kernels.ValueTargets(*zeroed)


def divergence_of_best(
    logprob_NK: Tensor, teacher_logprob_NK: Tensor, tokens_NK: Tensor, vocabulary: int, *, divergence: str
) -> Tensor:
    """[N]: over K ids and the rest as one outcome, as its formula is written."""
    p, q = (torch.cat([x.exp(), 1 - x.exp().sum(-1, keepdim=True)], -1) for x in (logprob_NK, teacher_logprob_NK))
    m = (p + q) / 2
    terms = {
        "reverse_kl": lambda: p * (p / q).log(),
        "forward_kl": lambda: q * (q / p).log(),
        "jsd": lambda: (q * (q / m).log() + p * (p / m).log()) / 2,
        "tv": lambda: (p - q).abs() / 2,
    }
    return terms[divergence]().sum(-1)


def rounded_logits(case: Case) -> Results:
    """What most trainers do: the head in the dtype of the model, then float32."""
    logits = case["hidden"] @ case["weight"].T
    reference_logits = {}
    if "ref_hidden" in case:
        with torch.no_grad():
            reference_logits["ref_logits"] = case["ref_hidden"] @ case["weight"].T
    return by_name(reference.token_stats(logits, case["tokens"], mask=case["mask"], **reference_logits))


def with_policy_loss(stats: Compute) -> Compute:
    """The loss of `linear_policy_loss` on the statistics of another provider, as its users write it."""

    def run(case: Case) -> Results:
        found = stats(case)
        ratio = (found["logprob"] - case["old_logprob"]).exp()
        clipped = ratio.clamp(0.8, 1.2) * case["advantage"]
        loss = -torch.minimum(ratio * case["advantage"], clipped) - case["entropy_coef"] * found["entropy"]
        if "kl" in found:
            penalty = (found["kl"] - case["kl_threshold"]).relu() ** 2
            loss = loss + case["kl_coef"] * found["kl"] + case["kl_penalty_coef"] * penalty
        total = (case["loss_weight"] * loss).sum()
        return {"loss": total, **{name: x.detach() for name, x in found.items()}}

    return run


def pytorch_providers() -> list[Provider]:
    rounded = "pytorch, low-precision logits"
    return [
        *(Provider("pytorch", entrance, outputs, plain(entrance)) for entrance, outputs in OUTPUTS.items()),
        *(Provider("torch.compile", e, outputs, compiled(e), slow=True) for e, outputs in OUTPUTS.items()),
        Provider(rounded, "hidden", WITH_KL, rounded_logits, low_precision_only=True),
        Provider(rounded, "loss", POLICY, with_policy_loss(rounded_logits), low_precision_only=True),
    ]
