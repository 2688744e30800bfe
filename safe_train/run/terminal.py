"""What a person sees of a run: in a terminal a bar and tables of the last steps, anywhere else a plain line a step."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from safe_train.data.prompts import Prompt
from safe_train.rewards.rewards import Scores
from safe_train.sampling.rollout import Rollout
from safe_train.screen import is_live, is_quiet

TABLE_STEPS, TABLE_SECONDS, LEAST_SECONDS = 10, 300.0, 5.0  # a table after so many steps or so long; not more often
SAMPLE_SECONDS = 60.0
PARTS = ("rollout", "reward", "score", "update", "budget")
COMPARED, CHARACTERS = 5, 200  # completions side by side, and what is shown of each
ENDS = 5  # steps whose mean stands for the start and the end of a run

Row = Mapping[str, Any]


def show(*parts: RenderableType) -> None:
    """Prints tables and text above the bar, if there is one; plain where colours are not wanted or not known."""
    console = Console()
    with console.capture() as captured:
        console.print(*parts, sep="\n")
    tqdm.write(captured.get().rstrip("\n"))


class Column(NamedTuple):
    title: str
    cell: Callable[[Row], str | None]
    is_extra: bool = False  # for wide screens


def formatted(name: str, form: str) -> Callable[[Row], str | None]:
    return lambda row: f"{row[name]:{form}}" if name in row else None


def slowest(row: Row) -> str:
    """The part of the step that took longest, and its share."""
    times = {part: row.get(f"time/{part}_s", 0.0) for part in PARTS}
    part = max(times, key=times.__getitem__)
    return f"{part} {times[part] / max(row['time/step_s'], 1e-9):.0%}"


def limited(args: Any) -> str:
    """What bounds the KL of a run: "budget", SAFE's "threshold", or nothing."""
    return "budget" if args.kl_budget is not None else "threshold" if args.controller == "safe" else ""


def kl_of(row: Row, args: Any) -> str:
    """A step's KL beside its bound."""
    bound = {"budget": args.kl_budget, "threshold": row["kl_threshold"], "": None}[limited(args)]
    return f"{row['kl']:.3f}" + ("" if bound is None else f" / {bound:.2f}")


def columns(args: Any) -> list[Column]:
    """Of the table of steps."""
    return [
        Column("step", formatted("step", "d")),
        Column("reward", formatted("reward", ".3f")),
        Column("± std", formatted("reward_std", ".3f")),
        Column(f"KL / {limited(args)}".rstrip(" /"), lambda row: kl_of(row, args)),
        Column("entropy", formatted("entropy", ".2f")),
        Column("tokens/s", formatted("tokens_per_second", ".0f")),
        Column("memory", lambda row: f"{row['memory/peak_gb']:.1f} GB"),
        Column("slowest", slowest),
        Column("KL coefficient", formatted("kl_coef", ".3f"), True),
        Column("phase", lambda row: row["phase"] if args.controller == "safe" else None, True),
        Column("length", formatted("completions/mean_length", ".0f"), True),
        Column("cut off", formatted("completions/clipped_fraction", ".0%"), True),
        Column("gradient norm", formatted("grad_norm", ".2f"), True),
        Column("held-out reward", formatted("eval/reward", ".3f"), True),
    ]


def table_of(rows: Sequence[Row], args: Any, width: int) -> Table:
    """The rows, with the columns that the run has and that the screen has room for."""
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False)
    given = [(column, [column.cell(row) for row in rows]) for column in columns(args)]
    shown: list[list[str]] = []
    used = 0
    for column, cells in given:
        used += 2 + max(len(column.title), *(len(cell or "") for cell in cells))
        if any(cells) and (used <= width or not column.is_extra):
            table.add_column(column.title, justify="right", no_wrap=True)
            shown.append([cell or "" for cell in cells])
    for row in zip(*shown, strict=True):
        table.add_row(*row)
    return table


def line_of(row: Row, args: Any) -> str:
    """A step as a plain line, for a file."""
    parts = [
        f"step {row['step']:4d}",
        f"reward {row['reward']:7.3f} ± {row['reward_std']:.3f}",
        f"KL {kl_of(row, args)}",
        f"entropy {row['entropy']:5.2f}",
        f"KL coefficient {row['kl_coef']:.3f}" + (f" ({row['phase']})" if args.controller == "safe" else ""),
        f"{row['tokens_per_second']:.0f} tokens/s",
        f"{row['time/step_s']:5.1f} s ({slowest(row)})",
    ]
    return "  ".join(parts)


def printable(text: str) -> str:
    """On one line, without what a terminal would obey."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))


def shortened(text: str, length: int, at_start: bool = False) -> str:
    """At most `length` characters of a text on one line, from its end or its start."""
    text = printable(text)
    if len(text) <= length:
        return text
    return "…" + text[len(text) - length + 1 :] if at_start else text[: length - 1] + "…"


def last_text(prompt: Prompt) -> str:
    """What a completion answers: the prompt, or of a chat its last message."""
    return prompt.text if isinstance(prompt.text, str) else str(prompt.text[-1].get("content", ""))


def sample_of(rollout: Rollout, scores: Scores, width: int) -> Text | None:
    """The step's best completion."""
    rewards = scores["reward"].nan_to_num(-float("inf"))
    best = int(rewards.argmax())
    if scores["reward"][best].isnan():
        return None
    found = Text(f"best completion, reward {rewards[best]:.3f}: ", style="dim")
    found.append(shortened(last_text(rollout.prompts[best]), width, at_start=True) + " ", style="dim")
    return found.append(shortened(rollout.texts[best], 3 * width), style="bold")


class Progress:
    """Of one call of `train()`. The first process alone shows something."""

    def __init__(self, args: Any):
        self.args, self.is_live = args, is_live()
        self.bar: Any = None
        self.rows: list[Row] = []  # that no table has shown yet
        self.table_at = self.sample_at = -float("inf")

    def steps(self, first: int) -> Iterator[int]:
        total = self.args.total_steps
        try:
            with tqdm(initial=first, total=total, unit="step", disable=not self.is_live) as self.bar:
                yield from range(first, total)
        finally:  # also when the run ends early
            self.print_table()

    def step(self, row: Row, rollout: Rollout, scores: Scores) -> None:
        """Shows a finished step."""
        if is_quiet():
            return
        if not self.is_live:
            print(line_of(row, self.args), flush=True)
            return
        self.bar.set_postfix_str(f"reward {row['reward']:.3f}, KL {kl_of(row, self.args)}")
        self.bar.update()
        self.rows.append(row)
        since = monotonic() - self.table_at
        if since >= (LEAST_SECONDS if len(self.rows) >= TABLE_STEPS else TABLE_SECONDS):
            self.print_table()
            self.print_sample(rollout, scores)

    def print_table(self) -> None:
        if self.rows:
            show(table_of(self.rows[-TABLE_STEPS:], self.args, Console().width))
        self.rows, self.table_at = [], monotonic()

    def print_sample(self, rollout: Rollout, scores: Scores) -> None:
        if monotonic() - self.sample_at < SAMPLE_SECONDS:
            return
        self.sample_at = monotonic()
        if (sample := sample_of(rollout, scores, Console().width)) is not None:
            show(sample)


def summary(history: Sequence[Row]) -> RenderableType | None:
    """The first steps of a run beside its last, as means."""
    if len(history) < 2:
        return None
    count = min(ENDS, len(history) // 2)
    first, last = history[:count], history[-count:]
    names = {"reward": "reward", "kl": "KL, nats per token", "entropy": "entropy, nats per token"}
    names |= {"completions/mean_length": "tokens of a completion", "eval/reward": "held-out reward"}
    of = f"{count} steps" if count > 1 else "step"
    table = Table("mean", f"first {of}", f"last {of}", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, title in names.items():
        known = [[row[name] for row in rows if name in row] for rows in (first, last)]
        if name.startswith("eval/"):
            every = [row[name] for row in history if name in row]
            known = [every[:1], every[-1:]]
        if all(known):
            table.add_row(title, *(f"{statistics.fmean(values):.3f}" for values in known))
    return table


def side_by_side(before: Rollout, after: Rollout) -> Table:
    """Completions of the same prompts, before a run and after it."""
    table = Table("prompt", "before", "after", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    prompts = (last_text(prompt) for prompt in before.prompts)
    for row in list(zip(prompts, before.texts, after.texts, strict=True))[:COMPARED]:
        table.add_row(*(Text(shortened(text, CHARACTERS)) for text in row), end_section=True)
    return table


def finished(history: Sequence[Row], folder: Path) -> None:
    """What a run came to, where its picture is, and what can be done with it."""
    if (table := summary(history)) is not None:
        show(table)
    show_next(
        f"the picture: {folder / 'report.png'}",
        {
            f"safe-train eval {folder}": "judges it on held-out prompts (eval_dataset=...)",
            f"safe-train export {folder} OUT": "writes the policy for transformers and vLLM",
            f"safe-train run --resume output_dir={folder} total_steps=N": "goes on to step N",
        },
    )


def show_next(result: str, commands: Mapping[str, str]) -> None:
    lines = (line for name, what in commands.items() for line in (f"  {name}", f"      {what}"))
    print("", result, "next:", *lines, sep="\n", flush=True)
