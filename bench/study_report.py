"""Tables and pictures of the study, from its rows alone."""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # for a checkout that is not installed

from study_arms import MAIN, PUBLISHED  # noqa: E402

from safe_train.report import read_rows as read_json_lines  # noqa: E402

Row = dict[str, Any]

MATCHED_KLS = (0.05, 0.1, 0.2, 0.3)  # nats per token
SMOOTH = 5  # steps
CRASH_WINDOW, CRASH_KL = 10, 1.0
SWEEP_KL = 0.7  # nats per token; a setting that passes it in the sweep would pass CRASH_KL in a run twice as long
SPIKE = 2.0  # times the value loss of the steps before
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t for 2, 3, ... 10 runs
PAPER = {"safe_paper": 0.725, "ppo_paper": 0.689}  # training-average rewards it reports, of 3B models


def read_rows(path: Path) -> list[Row]:
    return read_json_lines(path) if path.is_file() else []


def current(rows: Sequence[Row]) -> list[Row]:
    """Rows of their reward's newest scale (the sweep has its own), and with the newest settings of their name."""
    newest = {(row["reward"], row["stage"] == "sweep"): row for row in rows}
    own = {(row["reward"], row["stage"], row["name"]): row for row in rows}

    def is_current(row: Row) -> bool:
        scale, last = newest[row["reward"], row["stage"] == "sweep"], own[row["reward"], row["stage"], row["name"]]
        same = row["steps"] == scale["steps"] and row["base"] == scale["base"]
        return same and (row["stage"] == "sweep" or row["settings"] == last["settings"])

    return list({row["key"]: row for row in rows if is_current(row)}.values())


def best(rows: Sequence[Row]) -> int:
    """Which has the highest held-out reward among those that neither crashed nor were on their way to it, if any."""

    def order(row: Row) -> tuple[bool, float]:
        return crashed(row) or max(*row["curves"]["kl"], row["after"]["kl"]) > SWEEP_KL, -row["after"]["reward"]

    return min(range(len(rows)), key=lambda i: order(rows[i]))


def crashed(row: Row) -> bool:
    """A mean of ten steps fell below the best one by twice the noise of a step at the start, or the KL passed 1 nat.

    The noise is taken from the differences of neighbours, so that a fast climb does not widen it.
    """
    reward, window = row["curves"]["reward"], CRASH_WINDOW
    means = smoothed(reward, window)[window - 1 :]
    jumps = [b - a for a, b in itertools.pairwise(reward[:window])]
    noise = statistics.pstdev(jumps) / math.sqrt(2) if jumps else math.inf
    fell = any(mean < max(means[: i + 1]) - 2 * noise for i, mean in enumerate(means))
    return bool(row["error"]) or fell or max(row["curves"]["kl"]) > CRASH_KL


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
    ("crashes", crashed, COUNT),
    ("KL mean", lambda r: statistics.fmean(r["curves"]["kl"]), ".3f"),
    ("KL std", lambda r: statistics.pstdev(r["curves"]["kl"]), ".3f"),
    ("KL max", lambda r: max(r["curves"]["kl"]), ".3f"),
    ("value-loss spikes", spikes, ".1f"),
    ("entropy at the end", lambda r: statistics.fmean(r["curves"]["entropy"][-SMOOTH:]), ".2f"),
    ("seconds a step", lambda r: statistics.median(r["curves"]["time/step_s"]), ".1f"),
)
HELD_OUT: tuple[Column, ...] = (
    ("reward before", lambda r: r["before"]["reward"], ".3f"),
    ("reward", lambda r: r["after"]["reward"], ".3f"),
    ("gold before", lambda r: r["before"]["gold"], ".3f"),
    ("gold", lambda r: r["after"]["gold"], ".3f"),
    ("KL", lambda r: r["after"]["kl"], ".3f"),
    ("distinct words", lambda r: r["after"]["distinct_words"], ".3f"),
    ("drift of NLL", lambda r: abs(r["after"]["reference_logprob"] - r["before"]["reference_logprob"]), ".3f"),
)
SUMMARY: tuple[Column, ...] = (COLUMNS[0], *COLUMNS[2:4], COLUMNS[5], HELD_OUT[1], HELD_OUT[3], HELD_OUT[6])
PAIRED: tuple[Column, ...] = (COLUMNS[0], COLUMNS[3], COLUMNS[-1], HELD_OUT[1], *HELD_OUT[3:])
CHANGED: tuple[Column, ...] = (COLUMNS[0], *COLUMNS[2:4], COLUMNS[5], HELD_OUT[1], *HELD_OUT[3:])
MATCHED: tuple[Column, ...] = tuple((f"at KL {kl}", lambda r, kl=kl: reward_at(r, kl), ".3f") for kl in MATCHED_KLS)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % confidence interval; NaN for one value."""
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return mean, math.nan
    return mean, T_95[min(count, len(T_95) + 1) - 2] * statistics.stdev(values) / math.sqrt(count)


def cell(rows: Sequence[Row], column: Column) -> str:
    values = [float(column[1](row)) for row in rows]
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    if column[2] == COUNT:
        return f"{sum(known):.0f} of {len(known)}"
    mean, half = interval(known)
    text = f"{mean:{column[2]}}" + ("" if math.isnan(half) else f" ± {half:{column[2].lstrip('+')}}")
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)})"


def table(groups: dict[str, list[Row]], columns: Sequence[Column], first: str = "") -> str:
    lines = ["| " + " | ".join([first, *(column[0] for column in columns)]) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, rows in groups.items():
        lines.append("| " + " | ".join([name, *(cell(rows, column) for column in columns)]) + " |")
    return "\n".join(lines)


def less(column: Column, base: Sequence[Row]) -> Column:
    """The column less what the run of `base` with the same seed has in it; NaN where there is no such run."""
    name, value, style = column
    of_seed = {row["seed"]: value(row) for row in base}
    return name, lambda row: value(row) - of_seed.get(row["seed"], math.nan), f"+{style}"


def grouped(rows: Iterable[Row], *stages: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["stage"] in stages:
            groups.setdefault(row["name"], []).append(row)
    return groups


def write_report(results: Path) -> None:
    """`study.md` beside `study.jsonl`, and a picture for each reward."""
    rows = current(read_rows(results))
    parts = [
        f"Written by `python bench/study.py --report` from {results.name}; ± is a 95 % confidence interval over seeds."
    ]
    for reward in dict.fromkeys(row["reward"] for row in rows):
        of_reward = [row for row in rows if row["reward"] == reward]
        parts += section(reward, of_reward)
        if grouped(of_reward, "main"):
            draw(grouped(of_reward, "main"), results.with_name(f"{results.stem}-{reward}.png"), reward)
    results.with_suffix(".md").write_text("\n\n".join(parts) + "\n")


def section(reward: str, rows: list[Row]) -> list[str]:
    main, parts = grouped(rows, "main", "published"), [f"## {reward}"]
    made = {
        f"{row['device_name']}, commit {(row['commit'] or '?')[:7]}, torch {row['packages']['torch']}" for row in rows
    }
    parts.append(f"{'; '.join(sorted(made))}.")
    if main:
        parts += [
            "In short:",
            table(main, SUMMARY, reward),
            "Settings, as the sweep chose them: "
            + "; ".join(f"`{name}` {settings_of(own[0])}" for name, own in main.items())
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
    for base in [name for name in ("ppo", "ppo_paper") if name in main]:
        arms = {"ppo": MAIN, "ppo_paper": PUBLISHED}[base]
        others = {name: main[name] for name in arms if name in main and name != base}
        columns = [less(column, main[base]) for column in (*PAIRED, *MATCHED)]
        parts += [f"Less `{base}`, seed by seed:", table(others, columns)] if others else []
    for stage in ("ablation", "sensitivity"):
        changed = grouped(rows, stage)
        if changed:
            compared = {"safe": main["safe"], **changed} if "safe" in main else changed
            parts += [f"{stage.capitalize()}:", table(compared, CHANGED)]
            if "safe" in main:
                parts += ["Less `safe`, seed by seed:", table(changed, [less(c, main["safe"]) for c in PAIRED])]
    sweep = [row for row in rows if row["stage"] == "sweep"]
    if sweep:
        parts += ["Sweep, on development prompts:", sweep_table(sweep)]
    return parts


def sweep_table(rows: list[Row]) -> str:
    shown = {f"{row['name']}: {settings_of(row)}": [row] for row in rows}
    return table(shown, (HELD_OUT[1], *HELD_OUT[3:5], COLUMNS[2]))


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
        for color, (name, rows) in zip(plt.get_cmap("tab10").colors, groups.items(), strict=False):
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
