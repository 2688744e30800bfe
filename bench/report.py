"""What a person sees of the rows: a table of each workload, ratios to another revision, a picture of a results file."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from bench.measurement.rows import ALL_PASSES, BASELINES, Row
from bench.measurement.workloads import Workload

Record = dict[str, Any]
ENTRANCES = ("logits", "hidden", "loss")
FIXED_COLORS = {"pytorch": "0.4", "safe-kernels torch": "tab:blue", "safe-kernels triton": "tab:red"}
OTHER_COLORS = [i for i in range(20) if i not in (0, 6, 14)]  # of tab20, without those above


def table(workload: Workload, rows: list[Row]) -> str:
    """A line a provider; times as many times faster than plain PyTorch, memory beyond inputs and gradients."""
    parts = [part for part in dict.fromkeys(row.part for row in rows) if part != ALL_PASSES]
    width = max(28, *(len(row.provider) for row in rows))
    lines = [str(workload), f"  {'':{width}}  {'gate':6}" + "".join(f"  {part:>37}" for part in parts)]
    base = {row.part: row.seconds for row in rows if row.provider in BASELINES}
    for name in dict.fromkeys(row.provider for row in rows):
        of_name = {row.part: row for row in rows if row.provider == name}
        first = next(iter(of_name.values()))
        line = f"  {name:{width}}  {first.gate or '-':6}"
        if first.part == ALL_PASSES:
            line += f"  {first.status}: {first.reason}"
        line += "".join(f"  {_cell(of_name[part], base.get(part)):>37}" for part in parts if part in of_name)
        if first.status == "ok" and first.lacks:
            line += f"  lacks {', '.join(first.lacks)}"
        lines.append(line)
    return "\n".join(lines)


def _cell(row: Row, base: float | None) -> str:
    if row.seconds is None:
        return row.status
    if row.units is not None:
        return f"{1e6 * row.seconds:.1f} us{row.units:7.1f} units"
    ratio = f"{base / row.seconds:6.2f}x" if base else " " * 7
    memory = "" if row.peak_bytes is None else f"{(row.peak_bytes - (row.gradient_bytes or 0)) / 2**20:8.1f} MiB"
    share = "" if row.roof_share is None else f"{row.roof_share:5.0%}"
    return f"{1e3 * row.seconds:.2f} ms{ratio}{memory}{share}"


def ratios(rows: list[Row]) -> str:
    """This tree's time over the revision's, of each provider that both have."""
    found = {(row.provider, row.part): row.seconds for row in rows if row.seconds is not None}
    lines = []
    for (name, part), seconds in found.items():
        before, _, revision = name.partition(" @")
        if revision and (before, part) in found:
            lines.append(f"  {before}, {part}: {found[before, part] / seconds:.3f} of its time at {revision}")
    return "\n".join(lines)


def draw_picture(path: Path) -> Path:
    """<machine>.png beside <machine>.jsonl: time and memory against N, with the measured roofs, newest row of each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

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
    """The last row of each provider, workload and pass that has a time, and a peak of memory beside it."""
    keys = ("entrance", "kl", "model", "N", "dtype", "masked", "inputs", "part", "provider", "device")
    timed = [r for r in records if r["seconds"] is not None and r["suite"] != "host" and r["choice"] is None]
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
