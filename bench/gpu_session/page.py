"""summary.md of bench/gpu.py, from the parts' files: which promise held, which did not, what to do next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.measurement import OURS

Record = dict[str, Any]
Parts = dict[str, list[Record]]
MEMORY = {("hidden", True): 400e6, ("loss", True): 1.2e9}  # bytes with a frozen head, beyond inputs and gradients
PACKAGES = ("install", "beside", "versions")  # parts that --parts cannot name
VERSIONS = "versions"  # the item that finds what a machine lacks
NEAR_THE_ROOF = 0.9  # share of a plain copy's or product's rate
GOOD = ("done", "green", "passed", "skipped", "ok", "left out")


def summary(parts: Parts) -> str:
    """One screen of Markdown."""
    lines = ["# Summary", "", *head(parts), "", "| part | state | seconds | items |", "|---|---|---|---|"]
    lines += [part_line(name, records) for name, records in parts.items()]
    lines += ["", "| promise | held | what was found |", "|---|---|---|"]
    lines += [f"| {name} | {held} | {text} |" for name, held, text in promises(parts)]
    lines += ["", *listed("Wrong or broken", [text for records in parts.values() for text in problems(records)])]
    lines += listed("Not finished", [text for name, records in parts.items() for text in cuts(name, records)])
    lines += listed("Slower than another", slower(parts))
    lines += listed("For launch.py", of_kind(parts, "line", "text"))
    lines += listed("A training step", [step_line(r) for r in records_of(parts, "step")])
    lines += listed("This machine", of_kind(parts, "adjusted", "text"))
    lines += listed("Next", following(parts))
    return "\n".join(lines).rstrip() + "\n"


def head(parts: Parts) -> list[str]:
    starts = records_of(parts, "start")
    if not starts:
        return ["Nothing has started."]
    gpu = starts[-1]["gpu"]
    commits = dict.fromkeys(f"{r['commit']}{' with changes' if r['dirty'] else ''}" for r in starts)
    device = f"{gpu['name']}, driver {gpu['driver_version']}, {gpu['memory.total']}" if gpu else "no nvidia-smi"
    found = of_kind(parts, "versions", "versions")[-1:]
    packages = ", ".join(f"{name} {x}" for versions in found for name, x in versions.items() if name != "system")
    rehearsed = [r["part"] for r in starts if r["rehearsal"]]
    which = "A rehearsal" if len(rehearsed) == len(starts) else f"{', '.join(rehearsed)}: a rehearsal"
    warning = [f"**{which} on a CPU: nothing there is a measurement.**", ""] if rehearsed else []
    return [*warning, f"{device}; commit {', '.join(commits)}; {starts[-1]['time']}.", f"{packages}." * bool(packages)]


def part_line(name: str, records: list[Record]) -> str:
    if not records:
        return f"| {name} | not started | | |"
    ends, states = [r for r in records if r["record"] == "end"], list(items(records).values())
    state = ends[-1]["status"] if ends else "started, and did not end"
    seconds = (f"{ends[-1]['seconds']:.0f} " if ends else "") + f"of {records[0]['limit_s']:.0f}"
    others = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states) if s != "done")
    return f"| {name} | {state} | {seconds} | {states.count('done')} done{', ' * bool(others)}{others} |"


def items(records: list[Record]) -> dict[str, str]:
    """The last status of each item."""
    return {r["item"]: r["status"] for r in records if r["record"] == "item"}


def problems(records: list[Record]) -> list[str]:
    """What is wrong in a part: red or failed, crashed or hung."""
    found = []
    for r in records:
        if r["record"] in ("check", "test") and r["status"] not in GOOD:
            worst = max(r.get("errors", {}).items(), key=lambda e: e[1]["error"] / e[1]["allowed"], default=None)
            detail = f"{worst[0]} {worst[1]['error']:.3g}, allowed {worst[1]['allowed']:.3g}" if worst else r["reason"]
            found.append(f"{r['status']}: {r['name']}: {detail}")
        elif r["record"] == "row" and is_wrong(r):
            found.append(f"{r['status']}: {r['provider']}, {title(r)}: {r['reason']}")
    latest = {r["item"]: r for r in records if r["record"] == "item"}
    bad = {name: r for name, r in latest.items() if r["status"] not in (*GOOD, "started")}
    found += [f"{name}: {r['status']}: {r['reason']}" for name, r in bad.items()]
    for r in records:
        if r["record"] == "end" and r["status"] == "failed":
            found.append(f"the part failed: {''.join(r['output'].strip().splitlines()[-1:])[:200]}")
    return [" ".join(text.split()) for text in found]


def is_wrong(row: Record) -> bool:
    """Of this project, or the inputs: a peer may be unable to run here, and a candidate of a sweep not to fit."""
    return row["suite"] == "gpu" and row["provider"].startswith((OURS, "all")) and row["status"] != "ok"


def cuts(name: str, records: list[Record]) -> list[str]:
    """What did not come to its end."""
    if not records:
        return []
    ends = [r for r in records if r["record"] == "end"]
    running = [item for item, status in items(records).items() if status == "started"]
    state = ends[-1]["status"] if ends else "running, or killed"
    return [] if state in ("done", "failed") else [f"{name}: {state}{' in ' * bool(running)}{', '.join(running)}"]


def is_unusable(records: list[Record]) -> bool:
    """Nothing can run here: the check of versions failed."""
    return items(records).get(VERSIONS) == "failed"


def unfinished(parts: Parts, *names: str) -> bool:
    """Whether something that these parts planned, or one of them, is not there."""
    for name in names:
        planned = [x for r in parts.get(name, []) if r["record"] == "planned" for x in r["items"]]
        states = items(parts.get(name, []))
        if not planned or any(states.get(x) != "done" for x in planned):
            return True
    return False


def promises(parts: Parts) -> Iterator[tuple[str, str, str]]:
    judged = [r for r in (*records_of(parts, "check"), *records_of(parts, "test")) if r["status"] != "skipped"]
    bad = [r for r in judged if r["status"] not in GOOD] + [r for r in records_of(parts, "row") if is_wrong(r)]
    good = sum(r["status"] in GOOD for r in judged)
    text = f"{good} of {len(judged)} checks and tests"
    yield "exact", verdict(judged, bad, unfinished(parts, "smoke", "correctness")), text
    compared, behind = comparisons(parts), slower(parts)
    untimed = {r["provider"] for r in records_of(parts, "row") if r["seconds"] is None}
    absent = [name for name in sorted(untimed) if not name.startswith(OURS)]
    text = f"{len(compared) - len(behind)} of {len(compared)} comparisons"
    text += f"; without a time: {', '.join(absent)}" * bool(absent)
    yield "faster than each other", verdict(compared, behind, unfinished(parts, "rows")), text
    rates = roof_shares(parts)
    low = [name for name, share in rates.items() if share < NEAR_THE_ROOF]
    least = {r["name"]: max(r["seconds"].values()) for r in records_of(parts, "least")}
    taken = {r["name"]: r["seconds"] for r in records_of(parts, "kernel")}
    beside = {x: f" ({1e3 * taken[x]:.2f} ms, at least {1e3 * least[x]:.2f})" for x in least.keys() & taken.keys()}
    text = ", ".join(f"{name} {share:.0%}{beside.get(name, '')}" for name, share in rates.items())
    yield "at the roof", verdict(rates, low, unfinished(parts, "roof")), text
    memory = [(r, extra_bytes(r), MEMORY[r["entrance"], r["kl"]]) for r in timed(parts) if counted(r)]
    over = [r for r, found, most in memory if found > most]
    texts = [f"{r['entrance']} {found / 1e6:.0f} MB of {most / 1e6:.0f}" for r, found, most in memory]
    yield "memory", verdict(memory, over, len(memory) < len(MEMORY)), ", ".join(dict.fromkeys(texts))


def verdict(measured: Any, bad: Any, unfinished: bool) -> str:
    return "no" if bad else "not measured" if not measured else "so far, not all ran" if unfinished else "yes"


def records_of(parts: Parts, kind: str) -> list[Record]:
    return [r for records in parts.values() for r in records if r["record"] == kind]


def of_kind(parts: Parts, kind: str, name: str) -> list[Any]:
    return [r[name] for r in records_of(parts, kind)]


def timed(parts: Parts) -> list[Record]:
    return [r for r in records_of(parts, "row") if r["suite"] == "gpu" and r["seconds"] is not None]


def title(r: Record) -> str:
    return f"{r['entrance']}{' with KL' * r['kl']} {r['N']} x {r['V']} {r['dtype']}, {r['part']}"


def comparisons(parts: Parts) -> list[tuple[Record, Record]]:
    """The fastest of ours, and each other provider, in the same pass of the same item."""
    found = []
    for r in timed(parts):
        if not r["provider"].startswith(OURS):
            same = [x for x in timed(parts) if (x["item"], x["part"]) == (r["item"], r["part"])]
            own = [x for x in same if x["provider"].startswith(OURS)]
            if own:
                found.append((min(own, key=lambda x: x["seconds"]), r))
    return found


def slower(parts: Parts) -> list[str]:
    return [
        f"{title(own)}: {own['provider']} {1e3 * own['seconds']:.2f} ms, {r['provider']} {1e3 * r['seconds']:.2f} ms"
        + f" (lacks {', '.join(r['lacks'])})" * bool(r["lacks"])
        for own, r in comparisons(parts)
        if own["seconds"] > r["seconds"]
    ]


def roof_shares(parts: Parts) -> dict[str, float]:
    """The rate of each kernel over that of the plain copy or product of the same part."""
    kernels = {r["name"]: r for r in records_of(parts, "kernel")}
    copy, product = kernels.pop("plain copy of the logits", None), kernels.pop("plain product of the head", None)
    found = {}
    for name, r in kernels.items():
        unit, plain = ("flops", product) if r["flops"] else ("bytes", copy)
        if plain is not None:
            found[name] = (r[unit] / r["seconds"]) / (plain[unit] / plain["seconds"])
    return found


def counted(r: Record) -> bool:
    frozen = r["part"] == "forward+backward, head frozen"
    return r["provider"] == "safe-kernels triton" and frozen and (r["entrance"], r["kl"]) in MEMORY


def extra_bytes(r: Record) -> float:
    return float(r["peak_bytes"] - (r["gradient_bytes"] or 0))


def step_line(r: Record) -> str:
    seconds = ", ".join(f"{k[5:-2]} {v:.2f} s" for k, v in r.items() if k.startswith("time/"))
    return (
        f"{r['model']}, {r['attention']}: {seconds}; peak {r['memory/peak_gb']:.1f} GB, "
        f"{r['tokens_per_second']:.0f} tokens/s, sampler gap {r['sampler_gap']:.2g}"
    )


def following(parts: Parts) -> list[str]:
    """Whole commands, in the order in which to run them."""
    starts = records_of(parts, "start")
    options = f"--out DIR --commit {starts[-1]['commit']}" if starts else "--out DIR"
    wrong = [name for name, records in parts.items() if problems(records)]
    if wrong:
        return [f"Fix what is wrong or broken first: {', '.join(wrong)}. Each file has errors and output."]
    found = []
    left = [name for name, records in parts.items() if name not in PACKAGES and is_left(records)]
    if left:
        found.append(f"Not all was run: `python3 bench/gpu.py --parts {' '.join(left)} --minutes 4 {options}`")
    low = [name for name, share in roof_shares(parts).items() if share < NEAR_THE_ROOF]
    if low or slower(parts):
        tune = "python3 bench/tune.py --minutes 4 --only 'ROWS|GEMMS|PLAIN' " + options.replace("--out", "--results")
        found.append(f"Slow kernels: `{tune}`, then launch.py.")
    if records_of(parts, "row") and not any(r["rehearsal"] for r in starts):
        found.append("Commit the files under bench/results/, and bring the README's table up to date.")
    return found


def is_left(records: list[Record]) -> bool:
    ends = [r for r in records if r["record"] == "end"]
    return not ends or ends[-1]["status"] != "done" or "left out" in items(records).values()


def listed(heading: str, texts: list[str], most: int = 8) -> list[str]:
    if not texts:
        return []
    more = [f"- and {len(texts) - most} more, in the files"] if len(texts) > most else []
    return [f"{heading}:", "", *(f"- {text}" for text in texts[:most]), *more, ""]
