"""verl on these kernels: SAFE_KERNELS_VERL=1 in every process of a run, or `apply()` before its engines are built.

With `use_fused_kernels=True` verl asks for log-probs and entropy from hidden states, and logits are never made,
whatever its `impl_backend` is; without, its functions of logits are ours. A head whose vocabulary is sharded over a
process group (Megatron) stays verl's.

Log-probs and entropy are float32; verl's own entropy has the dtype of the hidden states or logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from safe_kernels import linear_token_stats, token_stats
from safe_kernels.integrations.patch import Patch, Replacement


def fused_linear_for_ppo(
    self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy [...] of hidden_states [..., H], and of input_ids [...] that verl has shifted already.

    0 where an id is -100, as verl gets from Liger.
    """
    live = input_ids.long() != -100  # uint8 would compare with 156
    stats = linear_token_stats(hidden_states, vocab_weights, input_ids, temperature=temperature, mask=live)
    return stats.logprob, stats.entropy


def _linear_cross_entropy(original: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    def linear_cross_entropy(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float = 1.0,
        reduction: str = "none",
        dist_process_group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropy [N], flat whatever the shapes of hidden and labels are, as verl's callers expect."""
        sharded = dist_process_group is not None and dist.get_world_size(dist_process_group) > 1
        if sharded or reduction.lower() != "none":
            return original(hidden, weight, labels, temperature, reduction, dist_process_group)
        hidden = hidden.reshape(-1, hidden.shape[-1])
        stats = linear_token_stats(hidden, weight, labels.reshape(-1), temperature=temperature)
        return stats.logprob, stats.entropy

    return linear_cross_entropy


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """[...] of logits [..., V]; as verl flattens both, labels may have any shape of as many ids, such as [1, N].

    `inplace_backward` permits writing the gradient over the logits. This does not: the backward cannot know whether
    another consumer has yet to read them.
    """
    leading = logits.shape[:-1]
    labels = labels.reshape(leading) if labels.numel() == leading.numel() else labels
    return token_stats(logits, labels).logprob


def entropy_from_logits(logits: Tensor) -> Tensor:
    any_token = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_stats(logits, any_token).entropy


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """The kernels need no chunks."""
    return entropy_from_logits(logits)


def chunked_topk_log_probs(logits: Tensor, topk_ids: Tensor, chunk_size: int = 4096) -> Tensor:
    """[B, T, K], float32, of logits [B, T, V] and the ids of a teacher's best K. The kernels need no chunks."""
    return token_stats(logits, topk_ids).logprob


FUSED, CROSS_ENTROPY = "verl.utils.experimental.torch_functional", "verl.utils.kernel.linear_cross_entropy"
LOGITS, DISTILLATION = "verl.utils.torch_functional", "verl.trainer.distillation.fsdp.losses"

PATCH = Patch(
    "verl",
    [
        Replacement(
            FUSED,
            "FusedLinearForPPO.forward",
            [("hidden_states", "vocab_weights", "input_ids", "temperature")],
            lambda original: fused_linear_for_ppo,
        ),
        Replacement(
            CROSS_ENTROPY,
            "linear_cross_entropy",
            [("hidden", "weight", "labels", "temperature", "reduction", "dist_process_group")],
            _linear_cross_entropy,
        ),
        Replacement(
            LOGITS,
            "logprobs_from_logits",
            [("logits", "labels", "inplace_backward")],
            lambda original: logprobs_from_logits,
        ),
        Replacement(LOGITS, "entropy_from_logits", [("logits",)], lambda original: entropy_from_logits),
        Replacement(
            LOGITS,
            "entropy_from_logits_with_chunking",
            [("logits", "chunk_size")],
            lambda original: entropy_from_logits_with_chunking,
        ),
        Replacement(
            DISTILLATION,
            "_chunked_topk_log_probs",
            [("logits", "topk_ids", "chunk_size")],
            lambda original: chunked_topk_log_probs,
        ),
    ],
)


def apply(kl: str | None = None) -> Patch:
    """Replace these functions in this process; see `Patch`. `kl` must be None: verl's loss cannot have the exact KL."""
    if kl is not None:
        raise ValueError(
            f"kl={kl!r} is not possible in verl: its loss gets only log-probs of sampled tokens of the reference. Use "
            "actor.kl_loss_type=k3+, whose gradient has the same mean as that of the exact KL; the exact KL is in "
            "safe_kernels.integrations.trl.apply(kl='exact') and in safe_train"
        )
    return PATCH.apply()


PATCHES, revert = (PATCH,), PATCH.revert
