"""SkyRL on these kernels, in each process that runs its model, before a `HFModelWrapper` is built:

    from safe_kernels.integrations import skyrl as skyrl_patch
    skyrl_patch.apply()

The wrapper of its FSDP workers gets log-probs and entropy from two functions of logits, which are replaced. Results
are float32; SkyRL's own have the dtype of the logits, which in bfloat16 rounds a log-prob by up to 0.03.
"""

from __future__ import annotations

import torch
from torch import Tensor

from safe_kernels import token_stats
from safe_kernels.integrations.patch import Patch, Replacement


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """[...], float32, of logits [..., V]. `inplace_backward` is unused, as in `integrations.verl`: logits stay."""
    return token_stats(logits, labels).logprob


def chunked_entropy_from_logits(
    logits: Tensor, requires_grad: bool = False, attention_mask: Tensor | None = None, chunk_size: int = 1024
) -> Tensor:
    """Entropy [B, T], float32, of logits [B, T, V], 0 where the mask [B, T] is 0. `chunk_size` is unused."""
    logits = logits if requires_grad else logits.detach()
    any_token = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    mask = None if attention_mask is None else attention_mask != 0
    return token_stats(logits, any_token, mask=mask).entropy


MODULE = "skyrl.backends.skyrl_train.utils.torch_utils"
PATCH = Patch(
    "skyrl",
    [
        Replacement(
            MODULE,
            "logprobs_from_logits",
            [("logits", "labels", "inplace_backward")],
            lambda original: logprobs_from_logits,
        ),
        Replacement(
            MODULE,
            "chunked_entropy_from_logits",
            [("logits", "requires_grad", "attention_mask", "chunk_size")],
            lambda original: chunked_entropy_from_logits,
        ),
    ],
)
PATCHES, apply, revert = (PATCH,), PATCH.apply, PATCH.revert
