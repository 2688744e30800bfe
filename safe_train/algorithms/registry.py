"""The algorithms by name, in the order in which `safe-train config` lists them."""

from __future__ import annotations

from typing import Any

from safe_train.algorithms.algorithm import Algorithm
from safe_train.algorithms.cispo import CISPO
from safe_train.algorithms.distill import DISTILL
from safe_train.algorithms.grpo import GRPO
from safe_train.algorithms.ppo import PPO, PPO_TWO_HEADS
from safe_train.algorithms.safe import ASYMMETRIC_PAPER, PPO_PAPER, SAFE, SAFE_PAPER

PUBLISHED = {"safe_paper": SAFE_PAPER, "asymmetric_paper": ASYMMETRIC_PAPER, "ppo_paper": PPO_PAPER}

ALGORITHMS: dict[str, Algorithm] = {
    "safe": SAFE,
    "ppo": PPO,
    "ppo_two_heads": PPO_TWO_HEADS,
    "grpo": GRPO,
    "cispo": CISPO,
    "distill": DISTILL,
    **PUBLISHED,
}


def preset_of(name: str) -> dict[str, Any]:
    return ALGORITHMS[name].preset if name in ALGORITHMS else {}
