"""summary.md of bench/gpu.py, from the parts' files: which promise held, which did not, what to do next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Record = dict[str, Any]
Parts = dict[str, list[Record]]
OURS = "safe-kernels"
MEMORY = {("hidden", True): 400e6, ("loss", True): 1.2e9}  # bytes with a frozen head, beyond inputs and gradients
PACKAGES = ("install", "beside", "versions")  # parts that --parts cannot name
NEAR_THE_ROOF = 0.9  # share of a plain copy's or product's rate
GOOD = ("done", "green", "passed", "skipped", "ok", "lacks", "not installed", "left out")


def page(parts: Parts) -> str:
    """One screen of Markdown."""
    lines = ["# Summary", "", *head(parts), "", "| part | state | seconds | items |", "|---|---|---|---|"]
    lines += [part_line(name, records) for name, records in parts.items()]
    lines += ["", "| promise | held | what was found |", "|---|---|---|"]
    lines += [f"| {name} | {held} | {text} |" for name, held, text in promises(parts)]
    lines += ["", *listed("Wrong or broken", [text for records in parts.values() for text in problems(records)])]
    lines += listed("Slower than another", slower(parts))
    lines += listed("For launch.py", of_kind(parts, "line", "text"))
    lines += listed("A training step", [step_line(r) for r in records_of(parts, "step")])
    lines += listed("This machine", of_kind(parts, "adjusted", "text"))
    lines += listed("Next", following(parts))
    return "\n".join(lines).rstrip() + "\n"


def head(parts: Parts) -> list[str]:
    starts = [r for records in parts.values() for r in records if r["record"] == "start"]
    if not starts:
        return ["Nothing has started."]
    first, gpu = starts[0], starts[0]["gpu"]
    commits = dict.fromkeys(f"{r['commit']}{' with changes' if r['dirty'] else ''}" for r in starts)
    device = ", ".join([gpu["name"], f"driver {gpu['driver_version']}", gpu["memory.total"]]) if gpu else "no GPU"
    found = (of_kind(parts, "versions", "versions") or [{}])[-1]
    packages = ", ".join(f"{name} {version}" for name, version in found.items() if name != "system")
    rehearsal = ["**A rehearsal on a CPU: nothing here is a measurement.**", ""] if first["rehearsal"] else []
    return [*rehearsal, f"{device}; commit {', '.join(commits)}; {first['time']}.", f"{packages}." * bool(packages)]


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
    """What is wrong, or did not come to its end, in a part."""
    found = []
    for r in records:
        if r["record"] in ("check", "test") and r["status"] not in GOOD:
            worst = max(r.get("errors", {}).items(), key=lambda e: e[1]["error"] / e[1]["allowed"], default=None)
            detail = f"{worst[0]} {worst[1]['error']:.3g}, allowed {worst[1]['allowed']:.3g}" if worst else r["reason"]
            found.append(f"{r['status']}: {r['name']}: {detail}")
        elif r["record"] == "row" and r["provider"].startswith(OURS) and r["status"] not in GOOD:
            found.append(f"{r['status']}: {r['provider']}, {title(r)}: {r['reason']}")
    latest = {r["item"]: r for r in records if r["record"] == "item"}
    ended = any(r["record"] == "end" for r in records)
    for name, r in latest.items():
        if r["status"] == "started":
            found.append(f"{name}: was running when the part was cut" if ended else f"{name}: running, or cut")
        elif r["status"] not in GOOD:
            found.append(f"{name}: {r['status']}: {r['reason']}")
    for r in records:
        if r["record"] == "end" and r["status"] != "done":
            last = r["output"].strip().splitlines()[-1:]
            found.append(f"the part was {r['status']}{': ' if last else ''}{''.join(last)[:200]}")
    return [" ".join(text.split()) for text in found]


def promises(parts: Parts) -> Iterator[tuple[str, str, str]]:
    judged = [r for r in records_of(parts, "check")] + [r for r in records_of(parts, "test")]
    bad = [r for r in judged if r["status"] not in GOOD]
    yield "exact", verdict(judged, bad), f"{len(judged) - len(bad)} of {len(judged)} checks and tests"
    compared, behind = comparisons(parts), slower(parts)
    yield (
        "faster than each other",
        verdict(compared, behind),
        f"{len(compared) - len(behind)} of {len(compared)} comparisons",
    )
    rates = roof_shares(parts)
    low = [name for name, share in rates.items() if share < NEAR_THE_ROOF]
    yield "at the roof", verdict(rates, low), ", ".join(f"{name} {share:.0%}" for name, share in rates.items())
    memory = [(r, extra_bytes(r), MEMORY[r["entrance"], r["kl"]]) for r in timed(parts) if counted(r)]
    over = [r for r, found, most in memory if found > most]
    texts = [f"{r['entrance']} {found / 1e6:.0f} MB of {most / 1e6:.0f}" for r, found, most in memory]
    yield "memory", verdict(memory, over), ", ".join(texts)


def verdict(measured: Any, bad: Any) -> str:
    return "not measured" if not measured else "no" if bad else "yes"


def records_of(parts: Parts, kind: str) -> list[Record]:
    return [r for records in parts.values() for r in records if r["record"] == kind]


def of_kind(parts: Parts, kind: str, name: str) -> list[str]:
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
    """In the order in which to do it."""
    found = []
    if any(problems(records) for records in parts.values()):
        found.append("Fix what is wrong or broken before anything else; the part's file has errors and output.")
    named = {name: records for name, records in parts.items() if name not in PACKAGES}
    left = [name for name, records in named.items() if "left out" in items(records).values() or not records]
    if left:
        found.append(f"Not all was run: `python bench/gpu.py --parts {' '.join(left)}` takes it up.")
    low = [name for name, share in roof_shares(parts).items() if share < NEAR_THE_ROOF]
    if low or slower(parts):
        found.append("Search launch choices: `python bench/tune.py --minutes 9`; then copy its lines into launch.py.")
    if records_of(parts, "row") and not any(r["rehearsal"] for r in records_of(parts, "start")):
        found.append("Commit the files under bench/results/, and bring the README's table up to date.")
    return found


def listed(heading: str, texts: list[str], most: int = 8) -> list[str]:
    if not texts:
        return []
    more = [f"- and {len(texts) - most} more, in the files"] if len(texts) > most else []
    return [f"{heading}:", "", *(f"- {text}" for text in texts[:most]), *more, ""]
