"""The README's first figure, light and dark: memory and time of two losses on one GPU, from the rows of bench/results.

    python bench/headline.py

The rows are those of 8,192 tokens and 151,936 words in bfloat16, forward and backward, head frozen, that passed the
gate. `torch.compile` was not measured with the KL, and at an older commit without.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for a checkout that is not installed

from bench.measurement.machine import RESULTS

MACHINE, COMMIT, COMPILED_AT = "nvidia-h200-gpu", "43528aeec9", "25a89440d6"
TOKENS, PART = 8192, "forward+backward, head frozen"
# title, of the rows: entrance and whether with KL, and the bars: provider and commit
GROUPS = (
    (
        "log-prob, entropy and exact KL",
        ("hidden", True),
        {"plain PyTorch": ("pytorch", COMMIT), "TRL": ("trl", COMMIT), "safe_kernels": ("safe-kernels triton", COMMIT)},
    ),
    (
        "log-prob and entropy",
        ("hidden", False),
        {
            "plain PyTorch": ("pytorch", COMMIT),
            "torch.compile": ("torch.compile", COMPILED_AT),
            "TRL": ("trl", COMMIT),
            "safe_kernels": ("safe-kernels triton", COMMIT),
        },
    ),
)
THEMES = {"light": ("#1f2328", "#8c959f", "#0969da"), "dark": ("#e6edf3", "#6e7681", "#4493f8")}  # text, others, ours


def rows_at(commit: str) -> list[dict[str, Any]]:
    lines = (RESULTS / MACHINE / commit / "rows.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["record"] == "row"]


def measured(entrance: str, kl: bool, provider: str, commit: str, part: str = PART) -> dict[str, Any]:
    """The last such row: ms, and GB beyond the inputs, gradients included."""

    def is_it(row: dict[str, Any]) -> bool:
        wanted = {"entrance": entrance, "kl": kl, "provider": provider, "part": part, "N": TOKENS, "masked": 0.0}
        return row["seconds"] is not None and all(row[name] == value for name, value in wanted.items())

    row = [row for row in rows_at(commit) if is_it(row)][-1]
    assert row["gate"] in ("green", "rounds"), row["gate"]
    return {"ms": 1e3 * row["seconds"], "GB": row["peak_bytes"] / 1e9}


def draw(target: Path, text: str, others: str, ours: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heights = [len(bars) for *_, bars in GROUPS]
    with plt.rc_context({"text.color": text, "axes.labelcolor": text, "ytick.color": text, "font.size": 11}):
        figure, axes = plt.subplots(
            len(GROUPS), 2, figsize=(9, 3.6), layout="constrained", height_ratios=heights, sharex="col", squeeze=False
        )
        for line, (title, (entrance, kl), bars) in zip(axes, GROUPS, strict=True):
            found = {name: measured(entrance, kl, *row) for name, row in bars.items()}
            for axis, unit in zip(line, ("GB", "ms"), strict=True):
                draw_bars(axis, {name: each[unit] for name, each in found.items()}, unit, text, others, ours)
            line[0].set_title(f"{title}: memory", loc="left", fontsize=12)
            line[1].set_title("time", loc="left", fontsize=12)
            line[1].set_yticklabels([])
        figure.savefig(target, dpi=160, transparent=True)
        plt.close(figure)


def draw_bars(axis: Any, values: dict[str, float], unit: str, text: str, others: str, ours: str) -> None:
    names = list(values)
    bars = axis.barh(names, list(values.values()), height=0.7)
    for bar, name in zip(bars, names, strict=True):
        bar.set_color(ours if name == "safe_kernels" else others)
    labels = [f"{value:#.2g} {unit}" if value < 10 else f"{value:.0f} {unit}" for value in values.values()]
    axis.bar_label(bars, labels, padding=4, color=text)
    axis.margins(x=0.18)
    axis.invert_yaxis()
    axis.tick_params(length=0, labelbottom=False)
    axis.spines[:].set_visible(False)


def main() -> None:
    for theme, colors in THEMES.items():
        draw(RESULTS / f"headline-{theme}.png", *colors)


if __name__ == "__main__":
    main()
