"""Tables and pictures of the study's part two, from its rows alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from bench.study.design import FACTORS, HELD
from bench.study.report import CRASH_KL, Row, ran_away, read_rows, smoothed

OVER, FAR_OVER = 1.1, 1.3  # times the budget
START, END = 3, 5  # rollouts whose mean reward stands for the start and the end of a run in the grid
LONG_PART = 100  # the same of a long run
TITLES = {
    "budget": "`kl_budget`",
    "fixed": "fixed beta 0.1",
    "trl": "TRL's controller",
    "verl": "verl's controller",
    "published": "SAFE as published",
}
VARIANTS = {"return": "whole gradient", "moments": "moments moved back"}
COLORS = {0.0002: "#6b6b6b", 0.0005: "#2a6fb0", 0.001: "#8a5aa8", 0.002: "#3a8f5c", 0.005: "#d1622b"}


def factors_of(row: Row) -> Row:
    """The levels of a run; a baseline's budget is its controller's target."""
    own = row["settings"]
    return own | {"reward": row["reward"], "kl_budget": own.get("kl_budget") or own["kl_threshold"]}


def ratios(row: Row) -> list[float]:
    """KL over budget of each rollout but the first, which the reference itself sampled; infinite where not finite."""
    budget = factors_of(row)["kl_budget"]
    return [kl / budget if math.isfinite(kl) else math.inf for kl in row["curves"]["kl"][1:]]


def above(rows: Iterable[Row], times: float) -> float:
    every = [ratio for row in rows for ratio in ratios(row)]
    return sum(ratio > times for ratio in every) / max(1, len(every))


def used(rows: Sequence[Row]) -> float:
    """Mean KL over budget in the last third of the rollouts."""
    return statistics.fmean(r for row in rows for r in ratios(row)[-(len(row["curves"]["kl"]) // 3) :])


def known(rows: Iterable[Row], name: str) -> list[float]:
    return [value for row in rows for value in row["curves"][name] if not math.isnan(value)]


def moved(rows: Sequence[Row]) -> float:
    """The share of updates after which the projection moved the policy back."""
    return sum(scale < 1 for scale in known(rows, "budget/scale")) / sum(len(row["curves"]["kl"]) for row in rows)


def forwards(rows: Sequence[Row]) -> float:
    return statistics.fmean(known(rows, "budget/forwards"))


def cost(rows: Sequence[Row]) -> float:
    curves = [row["curves"] for row in rows]
    times = [pair for own in curves for pair in zip(own["time/budget_s"], own["time/step_s"], strict=True)]
    return statistics.median(budget / step for budget, step in times)


def reward_part(rows: Sequence[Row], part: slice) -> float:
    return statistics.fmean(value for row in rows for value in row["curves"]["reward"][part])


Measure = tuple[str, Callable[[Sequence[Row]], float], str]
HOLDS: tuple[Measure, ...] = (
    ("runs", lambda rows: len(rows), ".0f"),
    (f"rollouts above {OVER} x", lambda rows: above(rows, OVER), ".1%"),
    (f"above {FAR_OVER} x", lambda rows: above(rows, FAR_OVER), ".1%"),
    ("largest KL / budget", lambda rows: max(ratio for row in rows for ratio in ratios(row)), ".2f"),
    ("KL / budget in the last third", used, ".2f"),
)
COSTS: tuple[Measure, ...] = (
    ("updates moved back", moved, ".0%"),
    ("forwards a rollout", forwards, ".2f"),
    ("time of a step", cost, ".0%"),
)
REWARDS: tuple[Measure, ...] = (
    ("reward, first three rollouts", lambda rows: reward_part(rows, slice(START)), ".2f"),
    ("last five", lambda rows: reward_part(rows, slice(-END, None)), ".2f"),
)
EACH: tuple[Measure, ...] = (*HOLDS[1:], *COSTS[:2], *REWARDS)


def table(groups: Mapping[str, Sequence[Row]], measures: Sequence[Measure], first: str = "") -> str:
    lines = ["| " + " | ".join([first, *(name for name, *_ in measures)]) + " |", "|---" * (len(measures) + 1) + "|"]
    for name, rows in groups.items():
        lines.append("| " + " | ".join([name, *(f"{value(rows):{form}}" for _, value, form in measures)]) + " |")
    return "\n".join(lines)


def place(row: Row) -> tuple[object, ...]:
    """What the arms' runs have in common where they were made from the same line of the plan."""
    own = factors_of(row)
    return row["seed"], row["steps"], own["reward"], own["kl_budget"], own["learning_rate"]


def write_report(results: Path) -> None:
    """`budget.md` beside `budget.jsonl`, and its pictures."""
    rows = read_rows(results)
    parts = ["# The tables of part two", f"Written by `python bench/study/budget.py --report` from {results.name}."]
    for stage, section in SECTIONS.items():
        names = dict.fromkeys([*HELD, *(row["name"] for row in rows if row["stage"] == stage)])
        arms = {name: [row for row in rows if (row["stage"], row["name"]) == (stage, name)] for name in names}
        arms = {name: own for name, own in arms.items() if own}
        if arms:
            parts += section(arms, rows)
        if arms and stage in DRAWN:
            draw(arms, results.with_name(f"{results.stem}-{stage}.png"), stage)
    results.with_suffix(".md").write_text("\n\n".join(parts) + "\n")


def made(arms: Mapping[str, Sequence[Row]]) -> str:
    rows = [row for own in arms.values() for row in own]
    found = {(row["device_name"], (row["commit"] or "?")[:7], row["packages"]["torch"]) for row in rows}
    return "; ".join(f"{device}, commit {commit}, torch {torch}" for device, commit, torch in sorted(found)) + "."


def grid_section(arms: dict[str, list[Row]], _: Sequence[Row]) -> list[str]:
    parts = ["## Does the budget hold?", made(arms)]
    parts += [table({TITLES[name]: rows for name, rows in arms.items()}, HOLDS, "all runs")]
    budget = arms.get("budget", [])
    same: dict[str, list[Row]] = {}
    for name, rows in arms.items():
        shared = {place(row) for row in rows} & {place(row) for row in budget}
        if name != "budget" and shared:
            same[TITLES[name]] = [row for row in rows if place(row) in shared]
            same[f"`kl_budget`, on the runs of {TITLES[name]}"] = [row for row in budget if place(row) in shared]
    if same:
        parts += ["Each arm, and the budget on the same runs:", table(same, (*HOLDS, *REWARDS), "same runs")]
    if budget:
        parts += ["The budget's runs, by the levels of each factor:"]
        parts += [table(levels(budget, factor), (*HOLDS, *COSTS), factor) for factor in FACTORS]
        parts += ["Each run:", table(each(budget), EACH, "reward, budget, algorithm, rate")]
    return parts


def outside_section(arms: dict[str, list[Row]], _: Sequence[Row]) -> list[str]:
    shown = table(each(arms["budget"]), EACH, "reward, budget, algorithm, rate")
    return ["## Outside the grid", made(arms), shown]


def variants_section(arms: dict[str, list[Row]], rows: Sequence[Row]) -> list[str]:
    plain = {place(row): row for row in rows if (row["stage"], row["name"]) == ("grid", "budget")}
    shown: dict[str, list[Row]] = {}
    for name, own in arms.items():
        for row in own:
            shown |= {title(row): [plain[place(row)]], f"{title(row)}, {VARIANTS[name]}": [row]}
    return ["## What might help", made(arms), table(shown, EACH, "reward, budget, algorithm, rate")]


def levels(rows: Sequence[Row], factor: str) -> dict[str, list[Row]]:
    groups = {f"{level:g}" if isinstance(level, float) else level: level for level in FACTORS[factor]}
    found = {name: [row for row in rows if factors_of(row)[factor] == level] for name, level in groups.items()}
    return {name: own for name, own in found.items() if own}


def title(row: Row) -> str:
    own = factors_of(row)
    beta = f", beta {own['beta']:g}" if "beta" in own else ""
    return f"{own['reward']}, {own['kl_budget']:g}, {own['algorithm']}, {own['learning_rate']:g}{beta}"


def each(rows: Sequence[Row]) -> dict[str, list[Row]]:
    return {title(row) + (f" (stopped at {len(row['curves']['kl'])})" if row["error"] else ""): [row] for row in rows}


def part_of(name: str, part: slice) -> Callable[[Sequence[Row]], float]:
    return lambda rows: statistics.fmean(rows[0]["curves"][name][part])


def fall(row: Row) -> float:
    """How far the smoothed reward fell below its best. A crash by ten-step means would be noise in so many steps."""
    means = smoothed(row["curves"]["reward"], LONG_PART)[LONG_PART - 1 :]
    return max((best - mean for best, mean in zip(accumulate(means, max), means, strict=True)), default=math.nan)


LAST, FIRST = slice(-LONG_PART, None), slice(LONG_PART)
LONG: tuple[Measure, ...] = (
    ("rollouts", lambda rows: len(rows[0]["curves"]["kl"]), ".0f"),
    ("stopped by an error", lambda rows: bool(rows[0]["error"]), ".0f"),
    (f"KL above {CRASH_KL:g}", lambda rows: ran_away(rows[0]), ".0f"),
    *HOLDS[1:4],
    (f"KL, last {LONG_PART}", part_of("kl", LAST), ".3f"),
    ("updates moved back", moved, ".0%"),
    (f"reward, first {LONG_PART}", part_of("reward", FIRST), ".2f"),
    ("last", part_of("reward", LAST), ".2f"),
    (f"largest fall of its mean of {LONG_PART}", lambda rows: fall(rows[0]), ".2f"),
    (f"entropy, first {LONG_PART}", part_of("entropy", FIRST), ".2f"),
    ("entropy, last", part_of("entropy", LAST), ".2f"),
    ("gold before", lambda rows: rows[0]["before"]["gold"], ".2f"),
    ("gold", lambda rows: rows[0]["after"]["gold"], ".2f"),
    ("distinct words", lambda rows: rows[0]["after"]["distinct_words"], ".2f"),
    ("drift of NLL", lambda r: abs(r[0]["after"]["reference_logprob"] - r[0]["before"]["reference_logprob"]), ".2f"),
)


def long_section(arms: dict[str, list[Row]], _: Sequence[Row]) -> list[str]:
    rows = [row for own in arms.values() for row in own]
    shown = {f"{TITLES[row['name']]}: {title(row)}": [row] for row in sorted(rows, key=lambda row: row["reward"])}
    return ["## The long run", made(arms), table(shown, LONG, "arm: reward, budget, algorithm, rate")]


def ensembles_section(arms: dict[str, list[Row]], _: Sequence[Row]) -> list[str]:
    own = ("rollouts", f"reward, first {LONG_PART}", "last", "gold before", "gold", "distinct words")
    measures = [measure for measure in LONG if measure[0] in own or measure[0].startswith("KL, last")]
    shown = {f"{name}: {rows[0]['reward']}": rows for name, rows in arms.items()}
    return ["## Ensembles against a planted fault", made(arms), table(shown, measures, "rewards put together, held by")]


SECTIONS: dict[str, Callable[[dict[str, list[Row]], Sequence[Row]], list[str]]] = {
    "grid": grid_section,
    "outside": outside_section,
    "variants": variants_section,
    "long": long_section,
    "ensembles": ensembles_section,
}
DRAWN = ("grid", "long")


def draw(arms: dict[str, list[Row]], target: Path, stage: str) -> None:
    """KL over budget by rollout, a panel for each arm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = max(6.4, 3.2 * len(arms)), 3.6
    figure, axes = plt.subplots(1, len(arms), figsize=size, layout="constrained", squeeze=False)
    for axis, (name, rows) in zip(axes[0], arms.items(), strict=True):
        for row in rows:
            rate = factors_of(row)["learning_rate"]
            axis.plot(range(2, len(ratios(row)) + 2), ratios(row), color=COLORS.get(rate, "gray"), linewidth=0.9)
        for height, style in ((1.0, "-"), (OVER, "--"), (FAR_OVER, ":")):
            axis.axhline(height, color="black", linewidth=0.8, linestyle=style)
        axis.set(title=f"{TITLES[name].strip('`')}: {len(rows)} runs", xlabel="rollout")
        axis.grid(alpha=0.25)
    axes[0, 0].set_ylabel("KL / budget")
    for rate in sorted({factors_of(row)["learning_rate"] for rows in arms.values() for row in rows}):
        axes[0, -1].plot([], [], color=COLORS.get(rate, "gray"), label=f"learning rate {rate:g}")
    axes[0, -1].legend(fontsize=7, loc="upper left")
    figure.suptitle(f"{stage}: KL of each rollout over the budget; lines at 1, {OVER} and {FAR_OVER}", fontsize=10)
    figure.savefig(target, dpi=110)
    plt.close(figure)
