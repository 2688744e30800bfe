"""Reward against KL: where a run went, and how far the best of n samples of its reference would get."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from safe_train.run.panels import LONG, PARTS, smoothed

MOVED, RULER = "#d1622b", "#6b6b6b"

Rows = Sequence[Mapping[str, Any]]


class Point(NamedTuple):
    kl: float  # nats per token
    reward: float
    error: float  # standard error of the reward


class Evaluated(NamedTuple):
    """What `safe-train eval` wrote of a step: its numbers by name, and its completions."""

    numbers: Mapping[str, Any]
    rows: Rows


def best_of(rewards: Sequence[float]) -> list[float]:
    """Unbiased estimates of E[max of n] for n = 1 to m, from m rewards.

    The mean of the largest over all subsets of n: sum_i C(i - 1, n - 1) / C(m, n) x_i, with x_i the i-th smallest.
    """
    return [best_of_n(sorted(rewards), n) for n in range(1, len(rewards) + 1)]


def best_of_n(ordered: Sequence[float], n: int) -> float:
    weight, total = n / len(ordered), 0.0
    for i in range(len(ordered), n - 1, -1):
        total += weight * ordered[i - 1]
        weight *= (i - n) / max(1, i - 1)  # of C(i - 2, n - 1) to C(i - 1, n - 1)
    return total


def ruler(rows: Rows) -> list[Point]:
    """The best of n samples of the reference, for n from 1 to what each prompt has; none where that is 1.

    Its KL is at most log n - (n - 1) / n nats a sequence (arXiv 2401.01879), here per token of the samples.

    Args:
        rows: of evaluation.jsonl, sampled from the reference.
    """
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row["reward"] is not None and math.isfinite(row["reward"]):
            by_prompt[json.dumps(row["prompt"])].append(row["reward"])
    most = min(map(len, by_prompt.values()), default=0)
    tokens = statistics.fmean(row["tokens"] for row in rows) if rows else 0.0
    if most < 2 or tokens == 0:
        return []
    estimates_PN = [best_of(rewards)[:most] for rewards in by_prompt.values()]
    return [
        Point((math.log(n) - (n - 1) / n) / tokens, statistics.fmean(estimates_P), standard_error(estimates_P))
        for n, estimates_P in enumerate(zip(*estimates_PN, strict=True), 1)
    ]


def standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan


def longest_ruler(evaluations: Iterable[Evaluated]) -> list[Point]:
    """That of the evaluation with the most samples of each prompt."""
    samples = ([row for row in each.rows if row["step"] == 0 and row["how"] == "sampled"] for each in evaluations)
    return max(map(ruler, samples), key=len, default=[])


def held_out(rows: Rows, evaluations: Iterable[Evaluated]) -> list[Point]:
    """The evaluations of the run, and those before and after it."""
    own = [
        Point(row["eval/kl"], row["eval/reward"], row.get("eval/reward_error", math.nan))
        for row in rows
        if "eval/kl" in row and "eval/reward" in row
    ]
    named = (each.numbers[name] for each in evaluations for name in ("before", "base", "after") if name in each.numbers)
    return [*own, *map(point, named)]


def moved(evaluation: Evaluated) -> list[Point]:
    """The trained policy at other KLs, from the reference to where it was trained; nothing where none was asked for."""
    found = [x for x in evaluation.numbers.values() if isinstance(x, Mapping) and x.get("scale") is not None]
    points = [point(x) for x in sorted(found, key=lambda x: x["scale"])]
    return points if any(0 < x["scale"] < 1 for x in found) else []


def point(numbers: Mapping[str, Any]) -> Point:
    kl, reward, error = (numbers.get(name) for name in ("kl", "reward", "reward_error"))
    return Point(*(math.nan if x is None else x for x in (kl, reward, error)))


def draw_frontier(axis: Any, rows: Rows, evaluations: Sequence[Evaluated], color: str, budget: float | None) -> None:
    """One run alone."""
    draw_path(axis, rows, evaluations, color, "rollouts", "held out")
    if budget is not None:
        axis.axvline(budget, color=color, linestyle="--", linewidth=1, label="KL budget")
    for i, points in enumerate(filter(None, map(moved, evaluations))):
        draw_points(axis, points, MOVED, "s-", "moved toward the reference" if i == 0 else None)
    draw_ruler(axis, longest_ruler(evaluations))


def draw_path(
    axis: Any,
    rows: Rows,
    evaluations: Sequence[Evaluated],
    color: str,
    name: str | None,
    held_out_name: str | None = None,
) -> None:
    kls, rewards = ([row.get(name, math.nan) for row in rows] for name in ("kl", "reward"))
    if len(rows) >= LONG:  # means of some rollouts each, on top of all
        axis.plot(kls, rewards, ".", color=color, alpha=0.1, markersize=3)
        width = len(rows) // PARTS
        kls, rewards = (smoothed(each, width)[width // 2 :: width] for each in (kls, rewards))
    axis.plot(kls, rewards, color=color, alpha=0.4, linewidth=0.7, marker=".", label=name)
    draw_points(axis, held_out(rows, evaluations), color, "o", held_out_name)


def draw_ruler(axis: Any, best: Sequence[Point]) -> None:
    if not best:
        return
    kls, rewards, errors = zip(*best, strict=True)
    low, high = ([r + sign * e for r, e in zip(rewards, errors, strict=True)] for sign in (-1, 1))
    axis.plot(kls, rewards, color=RULER, marker=".", label="best of n of the reference (KL: at most)")
    axis.fill_between(kls, low, high, color=RULER, alpha=0.15, linewidth=0)
    for n in (2**i for i in range(1, len(best).bit_length())):
        axis.annotate(
            f"n = {n}", best[n - 1][:2], (-4, 5), textcoords="offset points", ha="right", color=RULER, fontsize=8
        )


def draw_points(axis: Any, points: Sequence[Point], color: str, fmt: str, label: str | None) -> None:
    if points:
        kls, rewards, errors = zip(*points, strict=True)
        axis.errorbar(kls, rewards, errors, fmt=fmt, color=color, label=label, capsize=2, markersize=5)
