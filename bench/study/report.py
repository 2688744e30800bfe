"""Tables and pictures of the study, from its rows alone."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench.study.arms import CHANGES, MAIN, PUBLISHED, REPLAYED, Settings, base_of
from safe_train.algorithms.controller import Controller, Moments
from safe_train.config import SafeConfig
from safe_train.run.report import numbers, student
from safe_train.run.report import read_rows as read_json_lines

Row = dict[str, Any]

MATCHED_KLS = (0.05, 0.1, 0.2, 0.3)  # nats per token
SMOOTH = 5  # steps
CRASH_WINDOW, CRASH_KL = 10, 1.0
SWEEP_KL = 0.7  # nats per token; a setting that passes it in the sweep may well pass CRASH_KL in a run twice as long
SPIKE = 2.0  # times the value loss of the steps before
PAPER = {"safe_paper": 0.725, "ppo_paper": 0.689}  # training-average rewards it reports, of 3B models


def read_rows(path: Path) -> list[Row]:
    rows = read_json_lines(path) if path.is_file() else []
    return [row | {name: numbers(row[name]) for name in ("before", "after", "curves") if name in row} for row in rows]


def current(rows: Sequence[Row]) -> list[Row]:
    """Rows of their reward's newest scale (the sweep has its own), each key once.

    An arm's runs with other settings than its newest are named after what differs; of a change of an arm those count
    that changed its newest settings.
    """
    newest = {(row["reward"], row["stage"] == "sweep"): row for row in rows}
    chosen = {(row["reward"], row["name"]): row["settings"] for row in rows if row["stage"] in ("main", "published")}

    def of_the_newest_scale(row: Row) -> bool:
        scale = newest[row["reward"], row["stage"] == "sweep"]
        return row["steps"] == scale["steps"] and row["base"] == scale["base"]

    def named(row: Row) -> Row | None:
        if row["stage"] == "sweep":
            return row
        if row["stage"] in CHANGES:
            arm, change = chosen.get((row["reward"], base_of(row["name"]))), CHANGES[row["stage"]].get(row["name"])
            counts = arm is not None and change is not None and row["settings"] == {**arm, **change}
            return row if counts else None
        own = chosen[row["reward"], row["name"]]
        has = row["settings"]
        others = [f"{key} {has.get(key)}" for key in own | has if own.get(key) != has.get(key)]
        return row | {"name": ", ".join([row["name"], *others])}

    kept = {row["key"]: named(row) for row in rows if of_the_newest_scale(row)}
    return [row for row in kept.values() if row is not None]


def best(rows: Sequence[Row]) -> int:
    """Which has the highest held-out reward among those that neither crashed nor were on their way to it, if any."""

    def order(row: Row) -> tuple[bool, float]:
        return crashed(row) or max(*row["curves"]["kl"], row["after"]["kl"]) > SWEEP_KL, -row["after"]["reward"]

    return min(range(len(rows)), key=lambda i: order(rows[i]))


def crashed(row: Row) -> bool:
    return reward_fell(row) or ran_away(row)


def reward_fell(row: Row) -> bool:
    """A mean of ten steps fell below the best one by twice the noise of a step at the start, or the run broke off.

    The noise is taken from the differences of neighbours, so that a fast climb does not widen it.
    """
    reward, window = row["curves"]["reward"], CRASH_WINDOW
    means = smoothed(reward, window)[window - 1 :]
    jumps = [b - a for a, b in itertools.pairwise(reward[:window])]
    noise = statistics.pstdev(jumps) / math.sqrt(2) if jumps else math.inf
    return bool(row["error"]) or any(mean < max(means[: i + 1]) - 2 * noise for i, mean in enumerate(means))


def ran_away(row: Row) -> bool:
    return max(row["curves"]["kl"]) > CRASH_KL


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Means of each value and up to `window` - 1 before it."""
    return [statistics.fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def reward_at(row: Row, kl: float) -> float:
    """The smoothed training reward where the smoothed KL first reaches `kl`, between steps on a line; NaN if never."""
    points = zip(*(smoothed(row["curves"][name], SMOOTH) for name in ("kl", "reward")), strict=True)
    for (low, before), (high, after) in itertools.pairwise(points):
        if low < kl <= high:
            return before + (after - before) * (kl - low) / (high - low)
    return math.nan


def spikes(row: Row) -> float:
    """How often the value loss is more than twice the median of the ten steps before; NaN without a critic."""
    losses = row["curves"]["value_loss"]
    if not any(losses):
        return math.nan
    before = {i: losses[max(0, i - 10) : i] for i in range(3, len(losses))}
    return sum(losses[i] > SPIKE * statistics.median(some) for i, some in before.items())


Column = tuple[str, Callable[[Row], float], str]
COUNT = ""  # in place of a format: so many of the runs
COLUMNS: tuple[Column, ...] = (
    ("training-average reward", lambda r: statistics.fmean(r["curves"]["reward"]), ".3f"),
    ("reward std", lambda r: statistics.fmean(r["curves"]["reward_std"]), ".3f"),
    ("reward crashed", reward_fell, COUNT),
    (f"KL above {CRASH_KL:g}", ran_away, COUNT),
    ("KL mean", lambda r: statistics.fmean(r["curves"]["kl"]), ".3f"),
    ("KL std", lambda r: statistics.pstdev(r["curves"]["kl"]), ".3f"),
    ("KL max", lambda r: max(r["curves"]["kl"]), ".3f"),
    ("value-loss spikes", spikes, ".1f"),
    ("entropy at the end", lambda r: statistics.fmean(r["curves"]["entropy"][-SMOOTH:]), ".2f"),
    ("seconds a step", lambda r: statistics.median(r["curves"]["time/step_s"]), ".1f"),
)
HELD_OUT: tuple[Column, ...] = (
    ("held-out reward before", lambda r: r["before"]["reward"], ".3f"),
    ("held-out reward", lambda r: r["after"]["reward"], ".3f"),
    ("gold before", lambda r: r["before"]["gold"], ".3f"),
    ("gold", lambda r: r["after"]["gold"], ".3f"),
    ("held-out KL", lambda r: r["after"]["kl"], ".3f"),
    ("distinct words", lambda r: r["after"]["distinct_words"], ".3f"),
    ("drift of NLL", lambda r: abs(r["after"]["reference_logprob"] - r["before"]["reference_logprob"]), ".3f"),
)


def columns(*titles: str) -> tuple[Column, ...]:
    by_title = {column[0]: column for column in (*COLUMNS, *HELD_OUT)}
    return tuple(by_title[title] for title in titles)


TRAINING = ("training-average reward", "reward crashed", f"KL above {CRASH_KL:g}", "KL mean", "KL max")
LANGUAGE = ("held-out KL", "distinct words", "drift of NLL")
SUMMARY = columns(*TRAINING, "held-out reward", "gold", "drift of NLL")
CHANGED = columns(*TRAINING, "held-out reward", "gold", *LANGUAGE)
DIFFERENCES = columns("training-average reward", "KL mean", "held-out reward", "gold", *LANGUAGE)
MATCHED: tuple[Column, ...] = tuple((f"at KL {kl}", partial(reward_at, kl=kl), ".3f") for kl in MATCHED_KLS)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % confidence interval; NaN for one value."""
    mean, count = statistics.fmean(values), len(values)
    return mean, student(count - 1) * statistics.stdev(values) / math.sqrt(count) if count > 1 else math.nan


def difference(values: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """Difference of the means, by Welch: the seeds do not pair, as runs of one seed share only their prompts."""
    mean = statistics.fmean(values) - statistics.fmean(base)
    if min(len(values), len(base)) < 2:
        return mean, math.nan
    squares = [(statistics.variance(each) / len(each), len(each) - 1) for each in (values, base)]
    total = sum(square for square, _ in squares)
    freedom = total**2 / sum(square**2 / count for square, count in squares) if total else 1
    return mean, student(int(freedom)) * math.sqrt(total)


def cell(rows: Sequence[Row], column: Column, base: Sequence[Row] | None = None) -> str:
    """The column's mean over the rows, less that over `base`."""
    known, less = known_values(rows, column), known_values(base or (), column)
    if not known or (base is not None and not less):
        return "-"
    if column[2] == COUNT:
        return f"{sum(known):.0f} of {len(known)}"
    mean, half = interval(known) if base is None else difference(known, less)
    text = f"{mean:{'' if base is None else '+'}{column[2]}}" + ("" if math.isnan(half) else f" ± {half:{column[2]}}")
    if len(known) < len(rows):
        text += f" ({len(known)} of {len(rows)})"
    return text + (f" (less {len(less)} of {len(base)})" if base and len(less) < len(base) else "")


def known_values(rows: Sequence[Row], column: Column) -> list[float]:
    values = [float(column[1](row)) for row in rows]
    return [value for value in values if not math.isnan(value)]


def table(
    groups: Mapping[str, Sequence[Row]], columns: Sequence[Column], first: str = "", base: Sequence[Row] | None = None
) -> str:
    lines = ["| " + " | ".join([first, *(column[0] for column in columns)]) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, rows in groups.items():
        lines.append("| " + " | ".join([name, *(cell(rows, column, base) for column in columns)]) + " |")
    return "\n".join(lines)


def replayed(rows: Sequence[Row]) -> str:
    """What the controller would have decided with other settings, from the KLs, entropies and rewards of these runs.

    The runs themselves would have gone differently: a change that moves little here can do little there.
    """
    groups = {"safe": rows} | {name: [replay(row, change) for row in rows] for name, change in REPLAYED.items()}
    measured = {row["key"]: row["curves"]["kl_coef"] for row in rows}

    def moved(row: Row) -> float:
        return max(abs(a - b) for a, b in zip(row["curves"]["kl_coef"], measured[row["key"]], strict=True))

    half = rows[0]["steps"] // 2
    columns: tuple[Column, ...] = (
        ("mean coefficient", lambda r: statistics.fmean(r["curves"]["kl_coef"]), ".3f"),
        ("in the second half", lambda r: statistics.fmean(r["curves"]["kl_coef"][half:]), ".3f"),
        ("mean threshold", lambda r: statistics.fmean(r["curves"]["kl_threshold"]), ".3f"),
        ("largest change of a coefficient", moved, ".3f"),
    )
    return table(groups, columns)


def replay(row: Row, change: Settings) -> Row:
    args = SafeConfig.from_dict(row["base"] | row["settings"] | {"total_steps": row["steps"]} | change)
    controller, moments, curves = Controller(args), Moments(), row["curves"]
    controls = []
    signals = (curves[name] for name in ("kl", "entropy", "reward", "reward_std"))
    for kl, entropy, mean, std in zip(*signals, strict=True):
        moments.update([mean - std, mean + std])  # which have the mean and the spread of the step's rewards
        controls.append(controller.update(kl, entropy, mean, moments.std))
    return row | {"curves": {name: [getattr(c, name) for c in controls] for name in ("kl_coef", "kl_threshold")}}


def grouped(rows: Iterable[Row], *stages: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["stage"] in stages:
            groups.setdefault(row["name"], []).append(row)
    return groups


def write_report(results: Path) -> None:
    """`study.md` beside `study.jsonl`, and a picture for each reward."""
    rows = current(read_rows(results))
    written = f"Written by `python bench/study/run.py --report` from {results.name}"
    parts = ["# The study's tables", f"{written}; ± is a 95 % confidence interval over seeds."]
    for reward in dict.fromkeys(row["reward"] for row in rows):
        of_reward = [row for row in rows if row["reward"] == reward]
        parts += section(reward, of_reward)
        if grouped(of_reward, "main"):
            draw(grouped(of_reward, "main"), results.with_name(f"{results.stem}-{reward}.png"), reward)
    results.with_suffix(".md").write_text("\n\n".join(parts) + "\n")


def section(reward: str, rows: list[Row]) -> list[str]:
    main, parts = grouped(rows, "main", "published"), [f"## {reward}"]
    made = [(row["device_name"], (row["commit"] or "?")[:7], row["packages"]["torch"]) for row in rows]
    texts = {f"{device}, commit {commit}, torch {torch}" for device, commit, torch in made}
    parts.append(f"{'; '.join(sorted(texts))}.")
    if main:
        parts += [
            "In short:",
            table(main, SUMMARY, reward),
            "Settings, as the sweep chose them: "
            + "; ".join(f"`{name}` {settings_of(main[name][0])}" for name in (*MAIN, *PUBLISHED) if name in main)
            + ".",
            "During training:",
            table(main, COLUMNS),
            "On held-out prompts, after training:",
            table(main, HELD_OUT),
            "Training reward where the KL first reaches a value:",
            table(main, MATCHED),
        ]
        paper = [f"{name} {value}" for name, value in PAPER.items() if name in main]
        parts += [f"The paper's training-average rewards, of a 3B model: {', '.join(paper)}."] if paper else []
    for base, arms in (("ppo", MAIN), ("ppo_paper", PUBLISHED)):
        others = {name: main[name] for name in arms if name in main and name != base}
        if base in main and others:
            parts += [f"Less `{base}`:", table(others, (*DIFFERENCES, *MATCHED), base=main[base])]
    for stage in CHANGES:
        for arm in ("safe", "ppo"):
            changed = {name: own for name, own in grouped(rows, stage).items() if base_of(name) == arm}
            if changed and arm in main:
                parts += [f"{stage.capitalize()} of `{arm}`:", table({arm: main[arm], **changed}, CHANGED)]
                parts += [f"Less `{arm}`:", table(changed, DIFFERENCES, base=main[arm])]
    if "safe" in main:
        parts += ["The controller with other settings, replayed on the runs of `safe`:", replayed(main["safe"])]
    sweep = [row for row in rows if row["stage"] == "sweep"]
    if sweep:
        parts += ["Sweep, on development prompts:", sweep_table(sweep)]
    return parts


def sweep_table(rows: list[Row]) -> str:
    shown = {f"{row['name']}: {settings_of(row)}": [row] for row in rows}
    return table(shown, (HELD_OUT[1], *HELD_OUT[3:5], *COLUMNS[2:4]))


def settings_of(row: Row) -> str:
    shown = {k: v for k, v in row["settings"].items() if k not in ("algorithm", "normalize_rewards")}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def draw(groups: dict[str, list[Row]], target: Path, title: str) -> None:
    """Means over seeds and the seeds themselves: reward, KL and entropy by step, and reward by KL."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    panels = (("step", "reward"), ("step", "kl"), ("step", "entropy"), ("kl", "reward"))
    for axis, (x, y) in zip(axes.flat, panels, strict=True):
        for color, (name, rows) in zip(map(plt.get_cmap("tab10"), range(10)), groups.items(), strict=False):
            lines = [curve(row, x, y) for row in rows]
            for xs, ys in lines:
                axis.plot(xs, ys, color=color, alpha=0.25, linewidth=0.8)
            shortest = min(len(ys) for _, ys in lines)
            mean = [[statistics.fmean(line[k][i] for line in lines) for i in range(shortest)] for k in (0, 1)]
            axis.plot(*mean, color=color, label=name, linewidth=2)
        axis.set(xlabel=x, ylabel=y)
        axis.grid(alpha=0.25)
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(f"{title}: means over seeds of {SMOOTH}-step means")
    figure.savefig(target, dpi=110)
    plt.close(figure)


def curve(row: Row, x: str, y: str) -> tuple[list[float], list[float]]:
    ys = smoothed(row["curves"][y], SMOOTH)
    return (list(range(1, len(ys) + 1)) if x == "step" else smoothed(row["curves"][x], SMOOTH)), ys
