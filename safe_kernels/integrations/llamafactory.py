"""LLaMA-Factory on these kernels: `python -m safe_kernels.integrations.llamafactory train config.yaml` instead of
`llamafactory-cli train config.yaml`, or `apply()` in a script of your own.

Its DPO (with ORPO, SimPO and IPO) and KTO trainers get their log-probs from one function of logits, which is replaced.
"""

from __future__ import annotations

import importlib
import os
import sys

import torch
from torch import Tensor

from safe_kernels import token_stats
from safe_kernels.integrations.patch import Patch, Replacement


def get_batch_logps(
    logits: Tensor, labels: Tensor, label_pad_token_id: int = -100, ld_alpha: float | None = None
) -> tuple[Tensor, Tensor]:
    """The log-probs of the labels summed over each sequence, float32, and their number; both [B].

    `token_stats` of logits [B, T, V], whose positions predict the label after them. With `ld_alpha` the labels beyond
    the shorter one of a pair (b and b + B / 2) count by this factor.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}, labels {tuple(labels.shape)}; they must be (B, T, V) and (B, T)"
        )
    next_BT = labels.roll(-1, dims=1)  # not logits[:, :-1]: the gradient of a slice is one more tensor of their size
    live_BT = next_BT != label_pad_token_id
    live_BT[:, -1:] = False
    logprob_BT = token_stats(logits, next_BT, mask=live_BT).logprob
    count_B = live_BT.sum(-1)
    if ld_alpha is not None:
        shorter_B = torch.minimum(*count_B.chunk(2)).repeat(2)
        end_B = live_BT.int().argmax(-1) + shorter_B
        is_rear_BT = torch.arange(labels.shape[1], device=labels.device) >= end_B[:, None]
        logprob_BT = torch.where(is_rear_BT, ld_alpha * logprob_BT, logprob_BT)
    return logprob_BT.sum(-1), count_B


PATCH = Patch(
    "llamafactory",
    [
        Replacement(
            "llamafactory.train.trainer_utils",
            "get_batch_logps",
            [("logits", "labels", "label_pad_token_id", "ld_alpha")],
            lambda original: get_batch_logps,
        )
    ],
)
PATCHES, apply, revert = (PATCH,), PATCH.apply, PATCH.revert


def main() -> None:
    """Apply the patch in this process, then do what `llamafactory-cli train` does in one process."""
    if sys.argv[1:2] != ["train"]:
        sys.exit("usage: python -m safe_kernels.integrations.llamafactory train [arguments of llamafactory-cli train]")
    if "LOCAL_RANK" not in os.environ and (torch.cuda.device_count() > 1 or os.environ.get("FORCE_TORCHRUN")):
        sys.exit(
            "llamafactory-cli would start processes without this patch. Use torchrun --nproc-per-node N -m "
            "safe_kernels.integrations.llamafactory train ..., or CUDA_VISIBLE_DEVICES with one GPU"
        )
    integrations = importlib.import_module("safe_kernels.integrations")
    importlib.import_module("safe_kernels.integrations.llamafactory").apply()  # as a script, this module is __main__
    integrations.report()
    sys.argv.pop(1)
    importlib.import_module("llamafactory.train.tuner").run_exp()


if __name__ == "__main__":
    main()
