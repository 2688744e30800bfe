"""The picture of a run: what the policy earned, what it paid in KL and entropy, and which mechanism acted."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safe_train.config import ConfigError, read_yaml
from safe_train.run.frontier import Evaluated, draw_frontier, draw_path
from safe_train.run.panels import LONG, PARTS, Curve, Panel, is_held, panels_of, smoothed, union, values
from safe_train.settings.written import plain

COLORS = ("#2a6fb0", "#d1622b", "#3a8f5c", "#8a5aa8", "#b03a5b", "#6b6b6b")
PHASE_COLORS = {"warmup": "#d9d9d9", "climbing": "#cfe8d5", "plateau": "#f6e3c5", "converged": "#cfdff2"}

STYLES: dict[str, dict[str, Any]] = {
    "line": {},
    "thin": {"linewidth": 1, "alpha": 0.7},
    "limit": {"linestyle": "--", "linewidth": 1},
    "bound": {"linestyle": "-.", "linewidth": 1},
    "points": {"fmt": "o", "capsize": 2, "markersize": 4},
}
LIMITS = ("limit", "bound")
BEHIND: dict[str, Any] = {"linewidth": 0.6, "alpha": 0.25}
APART = ("seed", "output_dir")  # settings in which repetitions of one run may differ
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # Student's t for 1, 2, ... degrees of freedom

SAME_EVALUATION = ("eval_completions=", "eval_completions_per_prompt=", "eval_pass_at=", "use_cpu=", "model=")

Rows = list[dict[str, Any]]


def read_metrics(run: Path) -> Rows:
    """The metrics of each step; null in the file is a number that was not finite."""
    path = run / "metrics.jsonl"
    rows = read_rows(path) if path.is_file() else []
    if not rows:
        raise ConfigError(f"{run} has no metrics yet (no rows in {path})")
    return [numbers(row) for row in rows]


def numbers(row: dict[str, Any]) -> dict[str, Any]:
    """The row with NaN for null, also in lists."""

    def number(value: Any) -> Any:
        return [number(each) for each in value] if isinstance(value, list) else math.nan if value is None else value

    return {name: number(value) for name, value in row.items()}


def read_rows(path: Path) -> Rows:
    """The rows of a .jsonl file, without one that a crash cut short."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            pass
    return rows


def read_evaluations(run: Path, last_step: int) -> list[Evaluated]:
    """What `safe-train eval` left in a run up to a step, where its prompts, rewards and sampling were the run's own."""
    found = []
    for path in sorted((run / "eval").glob("*/evaluation.json")):
        try:
            numbers = json.loads(path.read_text())
        except json.JSONDecodeError:  # cut short
            continue
        rows, overrides = path.with_suffix(".jsonl"), numbers.get("overrides", [])
        is_own = all(pair.startswith(SAME_EVALUATION) for pair in overrides)
        if is_own and numbers["step"] <= last_step and rows.is_file():
            found.append(Evaluated(numbers, read_rows(rows)))
    return found


def settings_of(run: Path) -> dict[str, Any]:
    config = run / "config.yaml"
    return plain(read_yaml(config)) if config.is_file() else {}


def strict_json(value: Any, **options: Any) -> str:
    """JSON without NaN and Infinity, which it has no words for: they are null."""
    return json.dumps(finite(value), allow_nan=False, **options)


def finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_report(runs: Sequence[Path], target: Path) -> None:
    """One picture of one run, or of several overlaid."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    short = [run.resolve().name for run in runs]
    names = short if len(set(short)) == len(runs) else [str(run) for run in runs]
    histories = {name: read_metrics(run) for name, run in zip(names, runs, strict=True)}
    settings = {name: settings_of(run) for name, run in zip(names, runs, strict=True)}
    own = {name: picture_of(rows, settings[name]) for name, rows in histories.items()}
    shown = union(own.values())
    figure, frontier, axes = grid_of(plt, len(shown))
    groups = repetitions(settings)
    for color, (title, members) in zip(COLORS * len(runs), groups.items(), strict=False):
        for name in members:
            rows, run = histories[name], runs[names.index(name)]
            evaluations = read_evaluations(run, rows[-1]["step"])
            if len(runs) == 1:
                draw_frontier(frontier, rows, evaluations, color, settings[name].get("kl_budget"))
            else:
                draw_path(frontier, rows, evaluations, color, title if name == members[0] else None)
        for axis, panel in zip(axes, shown, strict=True):
            having = [name for name in members if panel.key in own[name]]
            if len(runs) == 1:
                draw(axis, panel, histories[title], settings[title])
            elif len(having) == 1:
                (name,) = having
                draw_compared(axis, own[name][panel.key], histories[name], settings[name], color, title)
            elif having:
                first, *limits = own[having[0]][panel.key].compared().curves
                curves = [numbers_of(histories[name], first, settings[name]) for name in having]
                draw_repeated(axis, [steps(histories[name]) for name in having], curves, color, title)
                for limit in limits:
                    draw_curve(axis, limit, histories[having[0]], settings[having[0]], color, None)
    frontier.set_title("reward against KL", loc="left")
    frontier.set_xlabel("exact KL to the reference, nats per token")
    for axis, panel in zip(axes, shown, strict=True):
        axis.set_title((panel if len(runs) == 1 else panel.compared()).title, loc="left")
        axis.set_xlabel("step")
    for axis in (frontier, *axes):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, framealpha=0.8, edgecolor="none")
    idle = {name: idle_mechanisms(run, histories[name]) for name, run in zip(names, runs, strict=True)}
    notes = [f"{name}: {note}" for name, note in idle.items() if note]
    figure.suptitle(" · ".join(histories), fontsize=13)
    figure.supxlabel("\n".join(notes), fontsize=9, color="#555555")
    figure.savefig(target, dpi=110)
    plt.close(figure)


def repetitions(settings: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Runs that differ in their seeds alone, under one title; each by itself where settings are not known."""
    groups: dict[str, list[str]] = {}
    for name, own in settings.items():
        what = {key: value for key, value in own.items() if key not in APART}
        groups.setdefault(json.dumps(what or name, sort_keys=True, default=str), []).append(name)
    found: dict[str, list[str]] = {}
    for members in groups.values():
        are_repetitions = len({settings[name].get("seed") for name in members}) == len(members) > 1
        found |= (
            {f"{members[0]}, {len(members)} seeds": members} if are_repetitions else {name: [name] for name in members}
        )
    return found


def grid_of(plt: Any, count: int) -> tuple[Any, Any, list[Any]]:
    """A figure four panels wide; reward against KL takes the place of four, in its corner."""
    lines = 2 + max(0, -(-(count - 4) // 4))
    figure = plt.figure(figsize=(20, 4 * lines), layout="constrained")
    grid = figure.add_gridspec(lines, 4)
    places = [(line, column) for line in range(lines) for column in range(4) if line > 1 or column > 1]
    return figure, figure.add_subplot(grid[:2, :2]), [figure.add_subplot(grid[place]) for place in places[:count]]


def steps(rows: Rows) -> list[int]:
    return [row["step"] for row in rows]


def series(rows: Rows, name: str) -> list[float]:
    return [row.get(name, math.nan) for row in rows]


def picture_of(rows: Rows, settings: dict[str, Any]) -> dict[str, Panel]:
    names = {name for row in rows for name in row}
    return {panel.key: panel for panel in panels_of(names, settings) if not panel.is_detail}


def numbers_of(rows: Rows, curve: Curve, settings: dict[str, Any]) -> list[float]:
    return values(curve, {curve.name: series(rows, curve.name)}, settings, len(rows))


def draw(axis: Any, panel: Panel, rows: Rows, settings: dict[str, Any]) -> None:
    """A panel of one run."""
    if panel.is_stacked:
        heights = [numbers_of(rows, curve, settings) for curve in panel.curves]
        labels = [curve.label for curve in panel.curves]
        axis.stackplot(steps(rows), heights, labels=labels, colors=COLORS, alpha=0.7)
        axis.set_ylim(0, top_of([math.fsum(each) for each in zip(*heights, strict=True)]))
        return
    for color, curve in zip(COLORS, panel.curves, strict=False):
        draw_curve(axis, curve, rows, settings, COLORS[0] if curve.kind in LIMITS else color, curve.label)
    if panel.has_phases:
        draw_phases(axis, rows)


def top_of(totals: Sequence[float]) -> float | None:
    """Where an axis ends: above all but a hundredth, if the rest is far beyond, such as a step that slept."""
    known = sorted(x for x in totals if math.isfinite(x))
    usual = known[int(0.99 * (len(known) - 1))] if known else 0.0
    return 1.2 * usual if known and known[-1] > 5 * usual > 0 else None


def draw_compared(axis: Any, panel: Panel, rows: Rows, settings: dict[str, Any], color: str, name: str) -> None:
    """A panel of a run that is one of several, in its color."""
    first, *limits = panel.compared().curves
    draw_curve(axis, first, rows, settings, color, name)
    for limit in limits:
        draw_curve(axis, limit, rows, settings, color, None)


def draw_curve(axis: Any, curve: Curve, rows: Rows, settings: dict[str, Any], color: str, label: str | None) -> None:
    height, style = numbers_of(rows, curve, settings), STYLES[curve.kind]
    spread = series(rows, curve.spread) if curve.spread else None
    if curve.kind == "points":
        axis.errorbar(steps(rows), height, spread, color=color, label=label, **style)
        return
    if curve.kind in ("line", "thin") and len(rows) >= LONG:
        axis.plot(steps(rows), height, color=color, **BEHIND)
        height, spread = smooth(height), None if spread is None else smooth(spread)
    axis.plot(steps(rows), height, color=color, label=label, **style)
    if spread is not None:
        low, high = ([y + sign * s for y, s in zip(height, spread, strict=True)] for sign in (-1, 1))
        axis.fill_between(steps(rows), low, high, color=color, alpha=0.15, linewidth=0, label="± std of completions")


def draw_repeated(axis: Any, at: Sequence[list[int]], curves: Sequence[list[float]], color: str, label: str) -> None:
    """The mean over seeds with its 95 % confidence interval, at the steps that all have, and each seed behind."""
    for own, curve in zip(at, curves, strict=True):
        axis.plot(own, curve, color=color, **BEHIND)
    known = [dict(zip(own, smooth(curve), strict=True)) for own, curve in zip(at, curves, strict=True)]
    common = sorted(set.intersection(*map(set, known)))
    means = [statistics.fmean(each[step] for each in known) for step in common]
    quantile = student(len(known) - 1) / len(known) ** 0.5
    widths = [quantile * statistics.stdev(each[step] for each in known) for step in common]
    low, high = ([m + sign * w for m, w in zip(means, widths, strict=True)] for sign in (-1, 1))
    axis.plot(common, means, color=color, label=label)
    axis.fill_between(common, low, high, color=color, alpha=0.15, linewidth=0)


def smooth(height: list[float]) -> list[float]:
    """Of a long curve the mean around each step; a short one as it is."""
    return height if len(height) < LONG else smoothed(height, len(height) // PARTS)


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t."""
    return T_95[min(freedom, len(T_95)) - 1]


def draw_phases(axis: Any, rows: Rows) -> None:
    shown = set()
    for phase, stretch in itertools.groupby(rows, key=lambda row: row["phase"]):
        at = steps(list(stretch))
        label = None if phase in shown else phase
        axis.axvspan(at[0] - 0.5, at[-1] + 0.5, color=PHASE_COLORS[phase], linewidth=0, label=label)
        shown.add(phase)


def idle_mechanisms(run: Path, rows: Rows) -> str:
    """The mechanisms that were switched on and never acted in this run; they cannot have made a difference."""
    settings = settings_of(run)
    # name: whether it is switched on, whether it acted
    mechanisms = {
        "clip": (settings.get("algorithm") != "distill", any(row.get("clip_fraction", 0) > 0 for row in rows))
    }
    if settings.get("controller") == "safe":
        excess, rise, gate = (settings[name] for name in ("kl_excess_coef", "kl_momentum_coef", "entropy_gate"))
        gains = any(settings[name] for name in ("pid_kp", "pid_ki", "pid_kd"))
        mechanisms |= {
            "KL threshold": (
                excess > 0 and not is_held(settings),
                any(row["kl_short"] > row["kl_threshold"] for row in rows),
            ),
            "KL momentum": (rise > 0, any(row["kl_momentum"] > 0 for row in rows)),
            "KL integral": (
                settings.get("kl_integral_coef", 0) > 0,
                any(row.get("kl_integral", 0) > 0 for row in rows),
            ),
            "entropy gate (nothing to scale)": (gate, any(row["kl_penalty"] > 0 for row in rows)),
            "PID": (gains, any(row["pid"] != 0 for row in rows)),
            "phases": (settings["phases"], len({row["phase"] for row in rows}) > 1),
        }
    if settings.get("kl_gradient") == "return":
        mechanisms["KL's return"] = (True, any(row.get("kl_return", 0) > 0 for row in rows))
    if settings.get("max_preview_kl") is not None:
        mechanisms["preview"] = (True, any(row.get("preview_scale", 1) < 1 for row in rows))
    if settings.get("kl_budget") is not None:
        mechanisms["KL budget"] = (True, any(row.get("budget/scale", 1) < 1 for row in rows))
    idle = [name for name, (is_on, has_acted) in mechanisms.items() if is_on and not has_acted]
    return "never acted: " + ", ".join(idle) if idle else ""
