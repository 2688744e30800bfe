"""The picture of a results file: time and memory against N, with the measured roofs, newest row of each point."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

Record = dict[str, Any]
ENTRANCES = ("logits", "hidden", "loss")
FIXED_COLORS = {"pytorch": "0.4", "safe-kernels torch": "tab:blue", "safe-kernels triton": "tab:red"}
OTHER_COLORS = [i for i in range(20) if i not in (0, 6, 14)]  # of tab20, without those above


def draw_picture(path: Path) -> Path:
    """Write <machine>.png beside <machine>.jsonl."""
    records = newest([json.loads(line) for line in path.read_text().splitlines()])
    names = sorted({r["provider"] for r in records})
    colors = {name: plt.get_cmap("tab20")(OTHER_COLORS[i % 17]) for i, name in enumerate(names)} | FIXED_COLORS
    panels = [(e, kl) for e in ENTRANCES for kl in (False, True) if any(is_of(r, e, kl) for r in records)]
    figure, axes = plt.subplots(2, max(1, len(panels)), figsize=(4.2 * max(1, len(panels)), 7.5), squeeze=False)
    for column, (entrance, kl) in enumerate(panels):
        draw_panel(axes[:, column], [r for r in records if is_of(r, entrance, kl)], colors)
    lines = {text: line for axis in axes.flat for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncols=5, fontsize=8, frameon=False)
    machines = sorted({f"{r['machine']['processor']}, commit {r['commit']}" for r in records})
    figure.suptitle("; ".join(machines), fontsize=9)
    figure.tight_layout(rect=(0, 0.08, 1, 0.98))
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=130)
    plt.close(figure)
    return target


def newest(records: list[Record]) -> list[Record]:
    """The last row of each provider, workload and pass that has a time, of the kernels on random or real inputs."""
    keys = ("entrance", "kl", "model", "N", "dtype", "masked", "inputs", "part", "provider", "device")
    timed = [r for r in records if r["seconds"] is not None and r["choice"] is None]
    return list({tuple(r[k] for k in keys): r for r in timed}.values())


def is_of(record: Record, entrance: str, kl: bool) -> bool:
    return record["entrance"] == entrance and record["kl"] == kl and record["masked"] == 0


def draw_panel(axes: Any, records: list[Record], colors: dict[str, Any]) -> None:
    """The model, dtype and inputs with most rows; the backward with a frozen head where there is one."""
    shape, _ = Counter((r["model"], r["dtype"], r["inputs"]) for r in records).most_common(1)[0]
    records = [r for r in records if (r["model"], r["dtype"], r["inputs"]) == shape]
    parts = sorted({r["part"] for r in records}, key=lambda part: ("frozen" not in part, "backward" not in part))
    records = sorted((r for r in records if r["part"] == parts[0]), key=lambda r: r["N"])
    first = records[0]
    axes[0].set_title(f"{first['entrance']}{' with KL' * first['kl']}: {shape[0]}, {shape[1]}\n{parts[0]}", fontsize=9)
    for name in dict.fromkeys(r["provider"] for r in records):
        of_name = [r for r in records if r["provider"] == name]
        style = {"marker": "o", "linewidth": 2.2 if name.startswith("safe") else 1, "markersize": 3, "label": name}
        tokens = [r["N"] for r in of_name]
        axes[0].plot(tokens, [1e3 * r["seconds"] for r in of_name], color=colors[name], **style)
        extra = [max(r["peak_bytes"] - r["gradient_bytes"], 1) / 2**20 for r in of_name]
        axes[1].plot(tokens, extra, color=colors[name], **style)
    floors = {r["N"]: 1e3 * r["roof_share"] * r["seconds"] for r in records}
    axes[0].plot(floors.keys(), floors.values(), "k--", marker="_", linewidth=1, label="measured roof")
    axes[0].set_ylabel("milliseconds")
    axes[1].set_ylabel("MiB beyond inputs and gradients")
    axes[1].set_xlabel("tokens N")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
