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


def _fused_linear_for_ppo(original: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    def forward(
        self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """log-probs and entropy [...], of hidden_states [..., H] and input_ids [...] that are shifted already."""
        stats = linear_token_stats(hidden_states, vocab_weights, input_ids, temperature=temperature)
        return stats.logprob, stats.entropy

    return forward


def _linear_cross_entropy(original: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    def linear_cross_entropy(
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        temperature: float = 1.0,
        reduction: str = "none",
        dist_process_group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, Tensor]:
        """log-probs and entropy [N], flat whatever the shapes of hidden and labels are, as verl's callers expect."""
        sharded = dist_process_group is not None and dist.get_world_size(dist_process_group) > 1
        if sharded or reduction.lower() != "none":
            return original(hidden, weight, labels, temperature, reduction, dist_process_group)
        flat = hidden.reshape(-1, hidden.shape[-1])
        stats = linear_token_stats(flat, weight, labels.reshape(-1), temperature=temperature)
        return stats.logprob, stats.entropy

    return linear_cross_entropy


def _logprobs_from_logits(original: Any) -> Callable[..., Tensor]:
    def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
        inplace_backward = inplace_backward and logits.requires_grad and not logits.is_leaf
        return token_stats(logits, labels, inplace_backward=inplace_backward).logprob

    return logprobs_from_logits


def _entropy_from_logits(original: Any) -> Callable[[Tensor], Tensor]:
    def entropy_from_logits(logits: Tensor) -> Tensor:
        return _entropy(logits)

    return entropy_from_logits


def _entropy_from_logits_with_chunking(original: Any) -> Callable[..., Tensor]:
    def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
        return _entropy(logits)

    return entropy_from_logits_with_chunking


def _entropy(logits: Tensor) -> Tensor:
    any_token = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_stats(logits, any_token).entropy


LOGITS = "verl.utils.torch_functional"
FUSED = ("hidden_states", "vocab_weights", "input_ids", "temperature")
SHARDED = ("hidden", "weight", "labels", "temperature", "reduction", "dist_process_group")

PATCH = Patch(
    "verl",
    [
        Replacement(
            "verl.utils.experimental.torch_functional", "FusedLinearForPPO.forward", [FUSED], _fused_linear_for_ppo
        ),
        Replacement("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy", [SHARDED], _linear_cross_entropy),
        Replacement(LOGITS, "logprobs_from_logits", [("logits", "labels", "inplace_backward")], _logprobs_from_logits),
        Replacement(LOGITS, "entropy_from_logits", [("logits",)], _entropy_from_logits),
        Replacement(
            LOGITS,
            "entropy_from_logits_with_chunking",
            [("logits", "chunk_size")],
            _entropy_from_logits_with_chunking,
        ),
    ],
)
apply, revert = PATCH.apply, PATCH.revert
