"""How many bytes of logits a loss may keep between its forward and its backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from safe_train.config import SafeConfig


class KeptLogits:
    """`bytes` is the argument `max_kept_bytes` of `safe_kernels.linear_token_stats`.

    By `auto` it is, on a GPU, 0 until the first update has shown what the run needs, and then half of what was free at
    the highest point.
    """

    def __init__(self, args: SafeConfig, device: torch.device) -> None:
        self.device, self.bytes = device, int(args.max_kept_bytes) if args.max_kept_bytes.isdecimal() else None
        self.is_to_measure = args.max_kept_bytes == "auto" and device.type == "cuda"
        if self.is_to_measure:
            self.bytes = 0

    def measure(self) -> None:
        """After an update."""
        if self.is_to_measure:
            free, _ = torch.cuda.mem_get_info(self.device)
            cached = torch.cuda.memory_reserved(self.device) - torch.cuda.max_memory_allocated(self.device)
            self.bytes, self.is_to_measure = (free + cached) // 2, False
