"""SAFE (arXiv 2602.04651): PPO with a pessimistic critic of two heads (`critic`) and a KL coefficient that the
controller sets (`controller`). `safe_train.paper` runs the three algorithms of its paper as published.
"""

from __future__ import annotations

from safe_train.algorithms.algorithm import Algorithm
from safe_train.algorithms.ppo import clipped

SAFE = Algorithm(clipped, advantages=None, critic="soft_min", controller="safe", beta=0.01)

SAFE_PAPER = Algorithm(clipped, advantages=None, critic="soft_min", controller="safe_paper", beta=0.01)
ASYMMETRIC_PAPER = Algorithm(clipped, advantages=None, critic="soft_min", controller="asymmetric_paper", beta=0.01)
PPO_PAPER = Algorithm(clipped, advantages=None, critic="single", controller="ppo_paper", beta=0.01)
