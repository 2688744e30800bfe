"""How long the page of `safe-train watch` takes to open, in Chromium: a run of 10,000 steps with 60 numbers a step.

    python bench/watch.py                    # needs chromium, playwright and the extra [watch]; under a minute
    python bench/watch.py --steps 1000 --repeats 3

A repeat is a new server and a new browser, so everything is read and loaded anew. The row that goes to
bench/results/watch.jsonl has the medians, after every panel in view was found to show the last number of its run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for a checkout that is not installed

from bench.measurement.machine import RESULTS, commit, identity
from bench.measurement.rows import now

VIEW: Any = {"width": 1400, "height": 1000}
MILLISECONDS = 300_000  # that anything may take


def write_run(folder: Path, steps: int) -> dict[str, float]:
    """A run whose curves are noise on a trend; returns its last row."""
    draw, rest = random.Random(0), [f"logged/number_{i}" for i in range(48)]
    row: dict[str, float] = {}
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            part, noise = step / steps, draw.gauss
            row = {"step": step, "reward": 1 - math.exp(-3 * part) + noise(0, 0.1), "reward_std": 0.2}
            row |= {"kl": 0.3 * part + abs(noise(0, 0.02)), "kl_threshold": 0.3, "entropy": 3 - part + noise(0, 0.05)}
            row |= {"value_loss": abs(noise(0, 1)), "kl_coef": 0.1, "grad_norm": abs(noise(0, 1)), "time/step_s": 1.0}
            row |= {"completions/mean_length": 200 + noise(0, 20), "sampler_gap": 1e-6, "tokens_per_second": 1000.0}
            row |= {name: noise(0, 1) for name in rest}
            file.write(json.dumps(row) + "\n")
    (folder / "config.yaml").write_text(f"algorithm: safe\ncontroller: safe\ntotal_steps: {steps}\n")
    return row


def opened(folder: Path, browser: str, last: dict[str, float]) -> dict[str, float]:
    """Seconds from the request to the first curve and to all panels in view, and the server's CPU seconds by then."""
    from playwright.sync_api import expect, sync_playwright  # type: ignore[import-not-found]

    command = [sys.executable, "-m", "safe_train.cli", "watch", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as playwright:
        assert server.stdout is not None
        address = server.stdout.readline().split()[1]
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport=VIEW)
        page.set_default_timeout(MILLISECONDS)
        expect.set_options(timeout=MILLISECONDS)
        started = time.perf_counter()
        page.goto(address, wait_until="commit")
        page.locator(".js-line").first.wait_for(state="attached")
        first = time.perf_counter() - started
        for name in ("reward", "kl", "entropy"):
            expect(page.locator(f'.panel[data-key="{name}"] output')).to_have_text(shown(last[name]))
        found = {"first_curve_s": first, "panels_in_view_s": time.perf_counter() - started}
        times = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()
        found["server_cpu_s"] = (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
        chromium.close()
        server.terminate()
    return found


def shown(x: float) -> str:
    """As the page writes a number: three digits."""
    return f"{float(f'{x:.3g}'):g}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="of a tree without git")
    args = parser.parse_args(arguments)
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("Chromium is needed: apt-get install --no-install-recommends chromium")
    head, dirty = commit(args.commit)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        folder.mkdir()
        last = write_run(folder, args.steps)
        repeats = [opened(folder, browser, last) for _ in range(args.repeats)]
    row: dict[str, Any] = {
        "time": now(),
        "machine": identity("cpu"),
        "commit": head,
        "dirty": dirty,
        "steps": args.steps,
    }
    row |= {"repeats": args.repeats} | {name: statistics.median(x[name] for x in repeats) for name in repeats[0]}
    with (args.results / "watch.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps({name: value for name, value in row.items() if name != "machine"}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
