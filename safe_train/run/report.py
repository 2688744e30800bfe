"""The picture of a run: what the policy earned, what it paid in KL and entropy, and which mechanism acted."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safe_train.config import ConfigError, read_yaml
from safe_train.run.frontier import Evaluated, draw_frontier, draw_path
from safe_train.settings.written import plain

COLORS = ("#2a6fb0", "#d1622b", "#3a8f5c", "#8a5aa8", "#b03a5b", "#6b6b6b")
PHASE_COLORS = {"warmup": "#d9d9d9", "climbing": "#cfe8d5", "plateau": "#f6e3c5", "converged": "#cfdff2"}

# Of the panels in a grid of two rows: reward against KL takes the first column.
PLACES = [(slice(None), 0), *((row, column) for row in (0, 1) for column in (1, 2, 3))]
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
    panels = (draw_reward, draw_kl, draw_entropy, draw_value, draw_control, draw_time)
    figure = plt.figure(figsize=(20, 8), layout="constrained")
    grid = figure.add_gridspec(2, 4, width_ratios=(1.5, 1, 1, 1))
    frontier, *axes = [figure.add_subplot(grid[place]) for place in PLACES]
    for color, (name, rows), run in zip(COLORS * len(runs), histories.items(), runs, strict=False):
        evaluations = read_evaluations(run, rows[-1]["step"])
        if len(runs) == 1:
            draw_frontier(frontier, rows, evaluations, color, settings_of(run).get("kl_budget"))
        else:
            draw_path(frontier, rows, evaluations, color, name)
        for axis, draw in zip(axes, panels, strict=True):
            draw(axis, rows, color, name, alone=len(runs) == 1)
            axis.set_xlabel("step")
    frontier.set_title("reward against KL", loc="left")
    frontier.set_xlabel("exact KL to the reference, nats per token")
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


def steps(rows: Rows) -> list[int]:
    return [row["step"] for row in rows]


def series(rows: Rows, name: str) -> list[float]:
    return [row.get(name, float("nan")) for row in rows]


def draw_reward(axis: Any, rows: Rows, color: str, name: str, alone: bool) -> None:
    reward, spread = series(rows, "reward"), series(rows, "reward_std")
    axis.plot(steps(rows), reward, color=color, label=None if alone else name)
    if alone:
        low, high = ([r + sign * s for r, s in zip(reward, spread, strict=True)] for sign in (-1, 1))
        axis.fill_between(steps(rows), low, high, color=color, alpha=0.15, linewidth=0, label="± std of completions")
    axis.set_title("reward", loc="left")


def draw_kl(axis: Any, rows: Rows, color: str, name: str, alone: bool) -> None:
    axis.plot(steps(rows), series(rows, "kl"), color=color, label="KL" if alone else name)
    if alone:
        axis.plot(steps(rows), series(rows, "kl_short"), color=color, alpha=0.5, linestyle=":", label="short average")
    draw_limit(axis, rows, "kl_threshold", color, "threshold" if alone else None)
    axis.set_title("exact KL to the reference, nats per token", loc="left")


def draw_entropy(axis: Any, rows: Rows, color: str, name: str, alone: bool) -> None:
    axis.plot(steps(rows), series(rows, "entropy"), color=color, label="entropy" if alone else name)
    draw_limit(axis, rows, "entropy_floor", color, "floor" if alone else None)
    axis.set_title("entropy, nats per token", loc="left")


def draw_limit(axis: Any, rows: Rows, name: str, color: str, label: str | None) -> None:
    axis.plot(steps(rows), series(rows, name), color=color, linestyle="--", linewidth=1, label=label)


def draw_value(axis: Any, rows: Rows, color: str, name: str, alone: bool) -> None:
    axis.plot(steps(rows), series(rows, "value_loss"), color=color, label="value loss" if alone else name)
    if alone and "value_gap" in rows[-1]:
        axis.plot(steps(rows), series(rows, "value_gap"), color=COLORS[1], label="|V1 - V2|")
        explained = [max(-1.0, value) for value in series(rows, "explained_variance")]
        axis.plot(steps(rows), explained, color=COLORS[2], label="explained variance")
    axis.set_title("critic", loc="left")


def draw_control(axis: Any, rows: Rows, color: str, name: str, alone: bool) -> None:
    axis.plot(steps(rows), series(rows, "kl_coef"), color=color, label="KL coefficient" if alone else name)
    if alone:
        axis.plot(steps(rows), series(rows, "entropy_gate"), color=COLORS[1], linewidth=1, label="entropy gate")
        shown = set()
        for row in rows:
            phase = row["phase"]
            label = None if phase in shown else phase
            axis.axvspan(row["step"] - 0.5, row["step"] + 0.5, color=PHASE_COLORS[phase], linewidth=0, label=label)
            shown.add(phase)
    axis.set_title("controller", loc="left")


def draw_time(axis: Any, rows: Rows, color: str, name: str, alone: bool) -> None:
    if alone:
        parts = ("rollout", "reward", "score", "update")
        heights = [series(rows, f"time/{part}_s") for part in parts]
        axis.stackplot(steps(rows), heights, labels=parts, colors=COLORS, alpha=0.7)
    else:
        axis.plot(steps(rows), series(rows, "time/step_s"), color=color, label=name)
    axis.set_title("seconds per step", loc="left")
    axis.set_ylim(bottom=0)


def idle_mechanisms(run: Path, rows: Rows) -> str:
    """The mechanisms that were switched on and never acted in this run; they cannot have made a difference."""
    settings = settings_of(run)
    # name: whether it is switched on, whether it acted
    mechanisms = {"clip": (True, any(row.get("clip_fraction", 0) > 0 for row in rows))}
    if settings.get("controller") == "safe":
        excess, rise, gate = (settings[name] for name in ("kl_excess_coef", "kl_momentum_coef", "entropy_gate"))
        gains = any(settings[name] for name in ("pid_kp", "pid_ki", "pid_kd"))
        mechanisms |= {
            "KL threshold": (excess > 0, any(row["kl_short"] > row["kl_threshold"] for row in rows)),
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
