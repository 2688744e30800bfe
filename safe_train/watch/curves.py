"""Curves of any length as at most a thousand points."""

from __future__ import annotations

import math
from collections.abc import Sequence

MOST = 1000


def thinned(y: Sequence[float], most: int = MOST) -> list[int]:
    """The places of at most `most` points that stand for all.

    They are the first, the last, and in each of equal buckets between them the lowest and the highest; nothing that
    sticks out is lost. A bucket without a number leaves a gap.
    """
    if len(y) <= most:
        return list(range(len(y)))
    buckets = (most - 2) // 2
    edges = [1 + (len(y) - 2) * i // buckets for i in range(buckets + 1)]
    chosen = [0]
    for low, high in zip(edges, edges[1:], strict=False):
        known = [i for i in range(low, high) if not math.isnan(y[i])]
        chosen += sorted({min(known, key=y.__getitem__), max(known, key=y.__getitem__)}) if known else [low]
    return [*chosen, len(y) - 1]
