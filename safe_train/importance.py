"""The sampler's probabilities are not quite the trainer's: other kernels, other rounding. How far off, and the remedy.

Shape legend: L response tokens.
"""

from __future__ import annotations

from torch import Tensor

from safe_train.config import SafeConfig
from safe_train.losses import k3


def sampler_metrics(logprob_L: Tensor, sampler_logprob_L: Tensor) -> dict[str, float]:
    """How far the trainer's log-probs of the rollout are from those it was sampled with.

    `sampler_gap` and `sampler_gap_max` are the mean and maximum of |difference|; `sampler_kl` estimates
    KL(sampler || trainer) in nats per token.
    """
    if len(logprob_L) == 0:
        return {"sampler_gap": 0.0, "sampler_gap_max": 0.0, "sampler_kl": 0.0}
    gap_L = (logprob_L - sampler_logprob_L).abs()
    kl_L = k3(sampler_logprob_L, logprob_L)
    return {
        "sampler_gap": gap_L.mean().item(),
        "sampler_gap_max": gap_L.max().item(),
        "sampler_kl": kl_L.mean().item(),
    }


def truncated_importance_weights(logprob_L: Tensor, sampler_logprob_L: Tensor, cap: float) -> Tensor:
    """min(p(trainer) / p(sampler), cap) of each sampled token; the cap bounds the variance, at the price of some bias.

    `logprob_L` is the trainer's before the first update of the rollout: the sampler's policy, in the trainer's kernels.
    Source: https://fengyao.notion.site/off-policy-rl (truncated importance sampling for mismatched engines).
    """
    return (logprob_L - sampler_logprob_L).exp().clamp(max=cap)


def importance_corrected(weight_L: Tensor, logprob_L: Tensor, sampler_logprob_L: Tensor, args: SafeConfig) -> Tensor:
    """Loss weights for tokens of the sampler: as they are, or times importance weights if `importance_cap` is set."""
    if args.importance_cap is None:
        return weight_L
    return weight_L * truncated_importance_weights(logprob_L, sampler_logprob_L, args.importance_cap)
