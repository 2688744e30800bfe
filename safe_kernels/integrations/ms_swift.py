"""ms-swift on these kernels:

    swift rlhf --external_plugins $(python -m safe_kernels.integrations.ms_swift) ...

This module prints the path of a plugin, and ms-swift runs the plugin in each of its processes while it reads its
arguments. `apply()` does the same in a script of your own.

GRPO, DPO, KTO, CPO and ORPO of ms-swift take log-probs and entropy from TRL's functions of logits, which the patch of
TRL replaces; here is the loss of GKD, which is ms-swift's own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safe_kernels import distillation_loss
from safe_kernels.integrations import trl
from safe_kernels.integrations.patch import Patch, Replacement

GKD = "swift.rlhf_trainers.gkd_loss"
PLUGIN = Path(__file__).with_name("ms_swift_plugin") / "safe_kernels_plugin.py"


def _jsd_loss(original: Any) -> Callable[..., Tensor]:
    own = importlib.import_module(GKD)
    plain = (own.default_log_softmax, own.default_kl_div)

    def jsd_loss(
        s_logits: Tensor,
        t_logits: Tensor,
        beta: float,
        log_softmax_fn: Callable[..., Tensor] = plain[0],
        kl_div_fn: Callable[..., Tensor] = plain[1],
        chunk_size: int = 512,
    ) -> Tensor:
        """`distillation_loss` of logits [N, V] that the temperature has divided, summed over N; 0-dim, float32.

        ms-swift still computes it with functions of the caller's (a vocabulary sharded by Megatron), for no tokens, and
        for a teacher with a gradient.
        """
        has_gradient = torch.is_grad_enabled() and t_logits.requires_grad
        if (log_softmax_fn, kl_div_fn) != plain or len(s_logits) == 0 or has_gradient:
            return original(s_logits, t_logits, beta, log_softmax_fn, kl_div_fn, chunk_size)
        return distillation_loss(s_logits, t_logits, divergence="jsd", beta=beta, reduction="sum").loss

    return jsd_loss


PATCH = Patch(
    "swift",
    [
        Replacement(
            GKD,
            "jsd_loss",
            [("s_logits", "t_logits", "beta", "log_softmax_fn", "kl_div_fn", "chunk_size")],
            _jsd_loss,
        )
    ],
)
PATCHES = (*trl.PATCHES, PATCH)


def apply() -> None:
    """Replace what this version of ms-swift, and the TRL beside it, has of these functions; see `Patch`."""
    trl.apply()
    PATCH.apply()


def revert() -> None:
    """ms-swift and TRL as they were."""
    PATCH.revert()
    trl.revert()


if __name__ == "__main__":
    print(PLUGIN)
