"""Curves of any length as at most a thousand points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

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


def smoothed(y: Sequence[float], width: int) -> list[float]:
    """The mean over the `width` numbers around each, fewer at the ends; nan is left out."""
    if width <= 1:
        return list(y)
    known = [not math.isnan(value) for value in y]
    sums = [0.0, *accumulate(value if is_known else 0.0 for value, is_known in zip(y, known, strict=True))]
    counts = [0, *accumulate(known)]
    before = width // 2
    found = []
    for i in range(len(y)):
        low, high = max(0, i - before), min(len(y), i - before + width)
        count = counts[high] - counts[low]
        found.append((sums[high] - sums[low]) / count if count else math.nan)
    return found
