"""AReaL on these kernels, in each process that holds its training engine:

    from safe_kernels.integrations import areal as areal_patch
    areal_patch.apply()

Its FSDP, Megatron and Archon engines and its tree attention get log-probs and entropy from two functions of logits,
whose vocabulary may be sharded over a tensor-parallel group. Both are replaced, with and without such a group.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from safe_kernels import TokenStats, token_stats
from safe_kernels.integrations.patch import Patch, Replacement


def gather_logprobs(
    logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    chunk_size: int = 1024,
) -> Tensor:
    """Log-probs [...] of labels [...], float32, from logits [..., V], or [..., V of this rank] with `tp_group`.

    `chunk_size` is unused: the kernels need no chunks.
    """
    return _stats(logits, labels, temperature, tp_group).logprob


def gather_logprobs_entropy(
    logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    chunk_size: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [...], in one pass; see `gather_logprobs`. Both are those at the temperature."""
    stats = _stats(logits, labels, temperature, tp_group)
    return stats.logprob, stats.entropy


def _stats(logits: Tensor, labels: Tensor, temperature: float, group: dist.ProcessGroup | None) -> TokenStats:
    sharded = group is not None and dist.get_world_size(group) > 1
    return token_stats(logits, labels, temperature=temperature, process_group=group if sharded else None)


MODULE = "areal.utils.functional.vocab_parallel"
ARGUMENTS = ("logits", "labels", "temperature", "tp_group", "chunk_size")
PATCH = Patch(
    "areal",
    [
        Replacement(MODULE, "gather_logprobs", [ARGUMENTS], lambda original: gather_logprobs),
        Replacement(MODULE, "gather_logprobs_entropy", [ARGUMENTS], lambda original: gather_logprobs_entropy),
    ],
)
PATCHES, apply, revert = (PATCH,), PATCH.apply, PATCH.revert
