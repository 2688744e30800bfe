"""Which numbers of a run stand in one panel: the table that the picture and the live page both draw from."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

LONG, PARTS = 200, 60  # a curve of so many steps is drawn as means over one of so many parts, with the steps behind

Settings = Mapping[str, Any]  # of config.yaml; empty where a run has none


class Curve(NamedTuple):
    name: str  # of metrics.jsonl; of a bound the setting
    label: str
    kind: str = "line"  # line | thin | limit: dashed | bound: a setting, dashed | points: of evaluations, steps apart
    spread: str | None = None  # the metric that is drawn to both sides, as a band or as error bars
    floor: float | None = None  # lower values are drawn here


class Panel(NamedTuple):
    key: str
    title: str
    curves: tuple[Curve, ...]
    is_stacked: bool = False
    has_phases: bool = False  # as its background
    is_detail: bool = False  # not in the picture

    def compared(self) -> Panel:
        """What several runs in one panel are compared by: the first curve, named in the title, and its limits."""
        first = Curve("time/step_s", "step") if self.is_stacked else self.curves[0]._replace(spread=None)
        limits = [curve for curve in self.curves if curve.kind in ("limit", "bound")]
        is_one_of_many = not self.is_stacked and sum(curve.kind == "line" for curve in self.curves) > 1
        title = f"{self.title}: {first.label}" if is_one_of_many else self.title
        return self._replace(title=title, curves=(first, *limits), is_stacked=False, has_phases=False)


def panels_of(names: Iterable[str], settings: Settings) -> list[Panel]:
    """The panels of a run that has metrics of these names: without those of mechanisms that it does not have.

    A run without settings has whatever it has numbers for.
    """
    found = set(names)
    panels = [*outcome(found, settings), *mechanisms(settings), *health(settings)]
    shown = [panel._replace(curves=tuple(c for c in panel.curves if is_there(c, found, settings))) for panel in panels]
    return [panel for panel in shown if any(curve.kind != "bound" for curve in panel.curves)]


def is_there(curve: Curve, names: Container[str], settings: Settings) -> bool:
    return settings.get(curve.name) is not None if curve.kind == "bound" else curve.name in names


def union(of_runs: Iterable[Mapping[str, Panel]]) -> list[Panel]:
    """The panels that any of the runs has, by their keys, each once."""
    found: dict[str, Panel] = {}
    for panels in of_runs:
        found |= {key: panel for key, panel in panels.items() if key not in found}
    return list(found.values())


def outcome(names: Iterable[str], settings: Settings) -> list[Panel]:
    """What the policy earned, and what it paid."""
    own = sorted(name for name in names if re.fullmatch(r"rewards/.+/mean", name))
    each = [Curve(name, name[len("rewards/") : -len("/mean")]) for name in own]
    threshold = "target" if is_held(settings) else "threshold"
    held_out = Curve("eval/reward", "held out", "points", spread="eval/reward_error")
    return [
        Panel("reward", "reward", (Curve("reward", "reward", spread="reward_std"), held_out)),
        Panel("rewards", "each reward", tuple(each) if len(each) > 1 else ()),
        Panel(
            "kl",
            "exact KL to the reference, nats per token",
            (
                Curve("kl", "KL"),
                *([Curve("kl_short", "short average", "thin")] if is_safe(settings) else []),
                *([Curve("kl_threshold", threshold, "limit")] if is_steered(settings) else []),
                Curve("kl_budget", "budget", "bound"),
                Curve("eval/kl", "held out", "points"),
            ),
        ),
        Panel(
            "entropy",
            "entropy, nats per token",
            (
                Curve("entropy", "entropy"),
                *([Curve("entropy_floor", "floor", "limit")] if is_safe(settings) else []),
                Curve("eval/entropy", "held out", "points"),
            ),
        ),
    ]


def mechanisms(settings: Settings) -> list[Panel]:
    """What acted on the way."""
    gate = [Curve("entropy_gate", "entropy gate")] if is_safe(settings) else []
    control = Curve("kl_coef", "KL coefficient"), *gate
    gap = [] if settings.get("critic") == "single" else [Curve("value_gap", "|V1 - V2|")]
    critic = (
        Curve("value_loss", "value loss"),
        *gap,
        Curve("explained_variance", "explained variance", floor=-1.0),
    )
    budget = (
        Curve("budget/scale", "left of an update"),
        Curve("budget/projected_fraction", "updates moved back"),
        Curve("budget/margin", "margin"),
    )
    clip = Curve("clip_fraction", "tokens clipped"), Curve("approx_kl", "KL to the rollout's policy")
    distils = settings.get("algorithm") == "distill"
    loss = "distillation loss" if distils else "policy loss"
    return [
        Panel("critic", "critic", critic if settings.get("critic") != "none" else ()),
        Panel("control", "controller", control if is_steered(settings) else (), has_phases=is_safe(settings)),
        Panel("budget", "KL budget, as parts of 1", budget),
        Panel("loss", loss, (Curve("policy_loss", loss),), is_detail=not distils),
        Panel("clip", "update", () if distils else clip, is_detail=True),
    ]


def health(settings: Settings) -> list[Panel]:
    """Whether the run is well, and what it costs."""
    critic = [Curve("critic_grad_norm", "critic")] if settings.get("critic") != "none" else []
    shares = (
        Curve("completions/clipped_fraction", "completions that never ended"),
        Curve("prompts/cut_fraction", "prompts cut"),
        Curve("rewards/none_fraction", "without a reward"),
        Curve("bad_steps", "optimizer steps left out"),
    )
    parts = tuple(Curve(f"time/{part}_s", part) for part in ("rollout", "reward", "score", "update", "budget"))
    return [
        Panel("length", "tokens a completion, mean", (Curve("completions/mean_length", "length"),)),
        Panel("shares", "shares", shares),
        Panel("norms", "gradient norm, before the clip", (Curve("grad_norm", "policy"), *critic)),
        Panel("sampler", "sampler's gap, nats per token", (Curve("sampler_gap", "mean"),)),
        Panel("time", "seconds per step", parts, is_stacked=True),
        Panel("speed", "tokens per second", (Curve("tokens_per_second", "tokens per second"),), is_detail=True),
        Panel("memory", "memory at the peak, GB", (Curve("memory/peak_gb", "memory"),), is_detail=True),
    ]


def is_safe(settings: Settings) -> bool:
    return settings.get("controller", "safe") == "safe"


def is_steered(settings: Settings) -> bool:
    """Whether a controller sets the KL coefficient: SAFE's, or a budget's."""
    return is_safe(settings) or is_held(settings)


def is_held(settings: Settings) -> bool:
    """Whether a budget's controller does."""
    return settings.get("kl_budget") is not None and bool(settings.get("kl_budget_control", True))


def values(curve: Curve, columns: Mapping[str, list[float]], settings: Settings, count: int) -> list[float]:
    """A curve's numbers, one a step; nan where a step has none."""
    if curve.kind == "bound":
        return [float(settings[curve.name])] * count
    found = columns.get(curve.name, [float("nan")] * count)
    return found if curve.floor is None else [curve.floor if value < curve.floor else value for value in found]


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
