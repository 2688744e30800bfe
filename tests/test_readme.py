"""The README: its numbers are those of the rows, its example runs, its links lead somewhere, and it stays short."""

import json
import re
from pathlib import Path

import pytest

from bench import headline

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ROWS = {
    "log-prob and entropy of logits": ("logits", False),
    "the same with exact KL": ("logits", True),
    "log-prob and entropy from hidden states": ("hidden", False),
    "the same with exact KL, from hidden states": ("hidden", True),
    "PPO loss with exact KL": ("loss", True),
}
PROVIDERS = ("pytorch", "torch.compile", "trl", "safe-kernels triton")
UNITS = {"ms": 1e3, "GB": 1e-9}


def cells(table_after: str) -> list[list[str]]:
    lines = README[README.index(table_after) :].split("\n\n")[1].splitlines()[2:]
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]


def row(entrance: str, kl: bool, provider: str, part: str) -> dict | None:
    """The last such row of the README's commit; of `torch.compile` from hidden states, of an older one."""
    for commit in (headline.COMMIT, *([headline.COMPILED_AT] if provider == "torch.compile" else [])):
        wanted = {"entrance": entrance, "kl": kl, "provider": provider, "N": headline.TOKENS, "masked": 0.0}
        found = [r for r in headline.rows_at(commit) if all(r[name] == value for name, value in wanted.items())]
        found = [
            r for r in found if r["part"].startswith(part) and r["part"].count("backward") == part.count("backward")
        ]
        if found and found[-1]["seconds"] is not None:
            return found[-1]
    return None


def as_shown(value: float, text: str) -> str:
    digits = len(text.partition(".")[2])
    return f"{value:.{digits}f}"


@pytest.mark.parametrize("line", range(len(ROWS)))
@pytest.mark.parametrize("column", range(len(PROVIDERS)))
def test_the_table_of_the_gpu_has_the_numbers_of_the_rows(line, column):
    entrance, kl = list(ROWS.values())[line]
    cell, provider = cells("The cells are the time of the forward")[line][column + 1], PROVIDERS[column]
    shown = re.findall(r"([\d.]+) (ms|GB)", cell)
    both = row(entrance, kl, provider, "forward+backward")
    if not shown:
        assert both is None and cell in ("not measured", "has no KL there")
        return
    assert both is not None and both["gate"] in ("green", "rounds")
    forward = row(entrance, kl, provider, "forward")
    times = [r["seconds"] for r in (forward, both) if r is not None]
    values = [*times[-sum(unit == "ms" for _, unit in shown) :], both["peak_bytes"]]
    for (text, unit), value in zip(shown, values, strict=True):
        assert text == as_shown(value * UNITS[unit], text), (cell, value)


def test_what_the_first_screen_claims_is_in_the_rows():
    first = "\n".join(README.splitlines()[:40])
    providers = ("safe-kernels triton", "trl", "pytorch")
    expected = [headline.measured("hidden", True, name, headline.COMMIT)[unit] for name in providers for unit in UNITS]
    claim = first[first.index("on one H200:") : first.index("The float32 logits")]
    texts = [text for pair in re.findall(r"(\d+) ms and ([\d.]+) GB", claim) for text in pair]
    assert texts == [as_shown(value, text) for text, value in zip(texts, expected, strict=True)]
    assert "over 151,936 ids are 5 GB" in first and round(8192 * 151_936 * 4 / 1e9) == 5
    described = re.search(r'alt="([^"]+)"', first).group(1)
    texts = [text for pair in re.findall(r"([\d.]+) GB and ([\d.]+) ms", described) for text in pair]
    bars = [headline.measured(*of, *bar) for _, of, bars in headline.GROUPS for bar in bars.values()]
    drawn = [bar[unit] for bar in bars for unit in ("GB", "ms")]
    assert texts == [as_shown(value, text) for text, value in zip(texts, drawn, strict=True)]


def test_the_note_on_liger_has_the_numbers_of_the_rows():
    said = re.search(
        r"at commit (\w+), where Liger [\d.]+ took ([\d.]+) ms and ([\d.]+) ms, ([\d.]+) GB", README
    ).groups()
    parts = ("forward", headline.PART)
    forward, both = (headline.measured("hidden", False, "liger", headline.COMPILED_AT, part) for part in parts)
    assert headline.COMPILED_AT.startswith(said[0])
    assert said[1:] == tuple(map(as_shown, (forward["ms"], both["ms"], both["GB"]), said[1:]))


def test_the_figure_is_drawn_from_the_rows_in_both_themes(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(headline, "draw_bars", lambda axis, values, *rest: drawn.append(values))
    headline.draw(tmp_path / "figure.png", *headline.THEMES["dark"])
    assert [list(values) for values in drawn] == [list(bars) for *_, bars in headline.GROUPS for _ in range(2)]
    assert drawn[0]["plain PyTorch"] == pytest.approx(42.3, abs=0.1)
    assert drawn[1]["safe_kernels"] == pytest.approx(42.7, abs=0.1)
    for theme in headline.THEMES:
        assert (
            f"bench/results/headline-{theme}.png" in README and (headline.RESULTS / f"headline-{theme}.png").is_file()
        )


def test_the_budget_claims_are_in_the_rows_of_the_study():
    words = {6: "six", 7: "seven", 9: "nine", 10: "ten", 12: "twelve", 15: "fifteen", 16: "sixteen"}
    runs: dict[tuple[str, str], list[list[float]]] = {}
    for row in map(json.loads, (headline.RESULTS / "budget.jsonl").read_text().splitlines()):
        limit = row["settings"].get("kl_budget") or row["settings"].get("kl_threshold")
        runs.setdefault((row["stage"], row["name"]), []).append([kl / limit for kl in row["curves"]["kl"][1:]])
    grid = runs["grid", "budget"]
    assert f"In {len(grid)} runs of 20 steps" in README and max(map(max, grid)) < 1.1 and {len(r) for r in grid} == {19}
    beside = [runs["grid", name] for name in ("trl", "verl", "published")]
    six, seven, nine = (words[sum(max(run) > 1.1 for run in arm)] for arm in beside)
    text = README.replace("\n", " ")
    assert {words[len(arm)] for arm in beside} == {"ten"} and "budget; on ten of them the KL controllers of TRL" in text
    assert f"verl and the published SAFE left it in {six}, {seven} and {nine}" in text
    held, free = runs["long", "budget"], runs["long", "fixed"] + runs["long", "published"]
    assert f"All {words[len(held)]} runs of 1,500 steps ended inside" in text
    assert all(run[-1] < 1 and len(run) == 1499 for run in held)
    passed = sum(max(run) > 10 for run in free)  # the budget of each was 0.1
    assert f"of {words[len(free)]} without it, {words[passed]} passed 1 nat a token" in text


def test_the_example_runs():
    code = re.search(r"```python\n(import torch\n.*?)```", README, re.DOTALL).group(1)
    names: dict = {}
    exec(code.replace("49152", "512"), names)
    assert names["hidden"].grad.abs().sum() > 0


def test_it_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 150
    assert README.index("<picture>") < README.index("## Two commands") < README.index("## In the trainer you have")
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    assert f"[![version {version}](https://img.shields.io/badge/version-{version}-blue)]" in README
    for target in re.findall(r"\]\(([^)#]+)", README) + re.findall(r'(?:src|srcset)="([^"]+)"', README):
        workflow = target.removeprefix("../../actions/workflows/").removesuffix("/badge.svg")
        path = f".github/workflows/{workflow}" if workflow.endswith(".yml") else target
        assert "://" in target or (ROOT / path).exists(), target
