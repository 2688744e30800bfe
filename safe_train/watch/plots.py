"""What a panel of the page draws: curves as lists of numbers, of one run or of several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from safe_train.run.frontier import Point, held_out, longest_ruler, moved
from safe_train.run.panels import Curve, Panel, smoothed, union, values
from safe_train.watch.curves import MOST, thinned
from safe_train.watch.runs import WatchedRun

FRONTIER = Panel("frontier", "reward against KL", (Curve("reward", "rollouts"),))
FRONTIER_X = "exact KL to the reference, nats per token"
OTHER = "metric:"  # the keys of panels for what no other panel has

Runs = dict[int, WatchedRun]  # by their index
Drawn = dict[str, Any]


def panels(runs: Runs) -> list[Panel]:
    """Those of the table, then one for each number that it does not have."""
    shown = union({panel.key: panel for panel in run.panels} for run in runs.values())
    if len(runs) > 1:
        shown = [panel.compared() for panel in shown]
    taken = {name for run in runs.values() for panel in run.panels for c in panel.curves for name in (c.name, c.spread)}
    others = sorted({name for run in runs.values() for name in run.metrics.columns} - taken)
    return [FRONTIER, *shown, *(Panel(OTHER + name, name, (Curve(name, name),), is_detail=True) for name in others)]


def described(runs: Runs) -> list[dict[str, Any]]:
    return [
        {"key": panel.key, "title": panel.title, "is_other": panel.key.startswith(OTHER)}
        for panel in (panels(runs) if runs else [])
    ]


def plot(key: str, runs: Runs, width: int) -> dict[str, Any] | None:
    """The curves of a panel, smoothed over `width` steps with the raw behind; None where no run has it."""
    if key == FRONTIER.key:
        return {"x_title": FRONTIER_X, "curves": frontier(runs)}
    found = [panel for panel in panels(runs) if panel.key == key]
    if not found:
        return None
    curves: list[Drawn] = []
    for index, run in runs.items():
        panel = found[0] if key.startswith(OTHER) else {p.key: p for p in run.panels}.get(key)
        if panel is not None:
            panel = panel.compared() if len(runs) > 1 and not key.startswith(OTHER) else panel
            curves += drawn(panel, index, run, width)
    return {"x_title": "step", "is_stacked": found[0].is_stacked and len(runs) == 1, "curves": curves}


def drawn(panel: Panel, index: int, run: WatchedRun, width: int) -> list[Drawn]:
    columns, steps, found = run.metrics.columns, run.metrics.steps, []
    numbers = {curve: values(curve, columns, run.settings, len(steps)) for curve in panel.curves}
    if panel.is_stacked:
        places = thinned([sum(x for x in step if not math.isnan(x)) for step in zip(*numbers.values(), strict=True)])
        return [line(index, c.label, c.kind, steps, y, places) for c, y in numbers.items()]
    for curve, y in numbers.items():
        if curve.kind == "points":
            found.append(points(index, curve, run, y))
            continue
        is_smoothed = width > 1 and curve.kind in ("line", "thin")
        smooth = smoothed(y, width) if is_smoothed else y
        if is_smoothed:
            found.append(line(index, "", "raw", steps, y, thinned(y)))
        found.append(line(index, curve.label, curve.kind, steps, smooth, thinned(smooth)))
        if curve.spread in columns:
            spread = smoothed(columns[curve.spread], width)
            found[-1]["band"] = band(steps, smooth, spread)
    return found


def line(index: int, label: str, kind: str, x: Sequence[float], y: Sequence[float], places: Sequence[int]) -> Drawn:
    return {"run": index, "label": label, "kind": kind, "x": [x[i] for i in places], "y": [y[i] for i in places]}


def band(x: Sequence[float], y: Sequence[float], spread: Sequence[float]) -> list[Drawn]:
    """Its lower and its upper edge, thinned each by itself."""
    edges = [[a + sign * b for a, b in zip(y, spread, strict=True)] for sign in (-1, 1)]
    places = map(thinned, edges)
    return [{"x": [x[i] for i in at], "y": [edge[i] for i in at]} for edge, at in zip(edges, places, strict=True)]


def points(index: int, curve: Curve, run: WatchedRun, y: Sequence[float]) -> Drawn:
    """The steps that were evaluated."""
    known = [i for i, value in enumerate(y) if not math.isnan(value)][-MOST:]
    errors = run.metrics.columns.get(curve.spread or "")
    found = line(index, curve.label, "points", run.metrics.steps, y, known)
    return found | ({"error": [errors[i] for i in known]} if errors else {})


def frontier(runs: Runs) -> list[Drawn]:
    """Reward against KL: rollouts and evaluations; of one run also its budget, moved policies and best of n."""
    found = []
    for index, run in runs.items():
        columns, evaluations = run.metrics.columns, run.evaluations()
        kl, reward = (columns.get(name, []) for name in ("kl", "reward"))
        places = sorted({*thinned(reward, MOST // 2), *thinned(kl, MOST // 2)}) if len(kl) == len(reward) else []
        found.append(line(index, "rollouts", "path", kl, reward, places))
        rows = [{name: x[i] for name, x in columns.items() if name.startswith("eval/")} for i in evaluated(columns)]
        found += marked(index, "held out", "points", held_out(rows, evaluations))
        if len(runs) == 1:
            for each in evaluations:
                found += marked(index, "moved toward the reference", "moved", moved(each))
            found += marked(index, "best of n of the reference (KL: at most)", "ruler", longest_ruler(evaluations))
            if (budget := run.settings.get("kl_budget")) is not None:
                found.append({"run": index, "label": "KL budget", "kind": "vertical", "x": [budget], "y": []})
    return found


def evaluated(columns: dict[str, list[float]]) -> list[int]:
    kls = columns.get("eval/kl", [])
    return [i for i, kl in enumerate(kls) if not math.isnan(kl)][-MOST:]


def marked(index: int, label: str, kind: str, found: Sequence[Point]) -> list[Drawn]:
    if not found:
        return []
    kl, reward, error = map(list, zip(*found, strict=True))
    return [{"run": index, "label": label, "kind": kind, "x": kl, "y": reward, "error": error}]
