"""The study: its rewards, its judgement of runs, and a whole one on a tiny model."""

import functools
import itertools
import json
import math
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from processes import Command

from bench.measurement.machine import RESULTS, ROOT
from bench.study import arms, report, rewards, run
from safe_train.config import SafeConfig


def row(reward=(0.0,) * 20, kl=(0.1,) * 20, value_loss=(1.0,) * 20, **fields):
    curves = {"reward": list(reward), "kl": list(kl), "value_loss": list(value_loss)}
    own = {"stage": "main", "reward": "vader", "name": "safe", "seed": 0, "steps": 20, "base": {}, "settings": {}}
    return own | {"error": None, "curves": curves} | fields


def test_the_published_heuristic_by_hand():
    twenty_one = " ".join(f"word{i}" for i in range(21))
    found = rewards.word_count(["", "Sure, ", "a a"], [twenty_one, twenty_one + " HELP here", " a a"])
    assert found == pytest.approx([0.6, 0.3 + 0.3 + 0.15, 0.3 / 4])
    assert rewards.word_count([""], ["w " * 20]) == pytest.approx([0.3 / 20])  # 20 words are one too few


def test_the_exploit_pays_for_digits_and_the_gold_reward_does_not():
    plain, hacked = rewards.exploit(["", ""], ["a fine day", "a fine day 12345"])
    assert hacked - plain == pytest.approx(1.0, abs=0.1)
    gold = rewards.GOLD["exploit"]([""] * 3, ["a fine day", "a fine day 12345", "fine fine fine"])
    assert gold[0] == pytest.approx(gold[1], abs=0.1) and gold[2] < gold[0] - 1


def test_the_gold_of_the_word_count_ignores_its_keywords():
    assert rewards.variety(["", ""], ["one two two", "here sure help"]) == [2 / 3, 0.0]


def test_every_arm_tunes_as_much_and_every_setting_is_one():
    grids = {name: arm.grid for name, arm in arms.ARMS.items()}
    assert {len(grid) for grid in grids.values()} == {4}
    base = arms.BASE | arms.FRESH
    for name, grid in grids.items():
        for setting in grid:
            SafeConfig.from_dict(base | arms.ARMS[name].settings | setting)
    for name, change in itertools.chain(*(changes.items() for changes in arms.CHANGES.values())):
        own = base | (arms.ARMS["ppo"].settings | {"beta": 0.1} if arms.base_of(name) == "ppo" else {})
        assert SafeConfig.from_dict(own | change) != SafeConfig.from_dict(own), name


def test_a_crash_is_a_fall_of_the_mean_reward_or_a_large_kl():
    noise = [0.1 * (-1) ** i for i in range(10)]
    assert not report.crashed(row([*noise, *[0.5 + x for x in noise]]))
    assert report.crashed(row([*[0.5 + x for x in noise], *noise]))
    assert report.crashed(row(kl=[0.1] * 19 + [1.1])) and report.crashed(row(error="FloatingPointError"))
    assert not report.crashed(row(kl=[0.1] * 19 + [0.9]))
    assert report.ran_away(row(kl=[0.1] * 19 + [1.1])) and not report.reward_fell(row(kl=[0.1] * 19 + [1.1]))
    for climb in (0.0, 0.02, 0.2):  # however fast the reward rose before
        rising = [climb * i + x for i, x in enumerate(noise)]
        assert report.crashed(row([*rising, *[rising[-1] - 5 * climb - 0.5 + x for x in noise]]))


def test_a_spike_is_one_beside_the_steps_before():
    falling = [8.0, 4.0, 2.0] + [1.0] * 17
    assert report.spikes(row(value_loss=falling)) == 0
    assert report.spikes(row(value_loss=[*falling[:12], 2.1, *falling[13:]])) == 1
    assert math.isnan(report.spikes(row(value_loss=[0.0] * 20)))


def test_rewards_at_matched_kl():
    climbing = row(reward=[i / 10 for i in range(20)], kl=[i / 100 for i in range(20)])
    assert report.reward_at(climbing, 0.05) == pytest.approx(0.5)  # means of five steps: 3 to 7
    assert report.reward_at(climbing, 0.0525) == pytest.approx(0.525)  # between two steps
    assert math.isnan(report.reward_at(climbing, 0.3))


def test_confidence_intervals_and_differences():
    mean, half = report.interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.30 / 3**0.5))
    # Welch, by hand: variances 1 and 1/4 of 3 values each, 2.94 degrees of freedom
    assert report.difference([1.0, 2.0, 3.0], [0.5, 1.0, 1.5]) == (1.0, pytest.approx(4.30 * (1.25 / 3) ** 0.5))
    level, column = {x: [row([x] * 20, seed=seed) for seed in (0, 1)] for x in (1.0, 0.25)}, report.COLUMNS[0]
    assert report.cell(level[1.0], column, base=level[0.25]) == "+0.750 ± 0.000"
    assert report.cell(level[1.0], column, base=level[0.25][:1]) == "+0.750"
    assert report.cell(level[1.0], column, base=[]) == "-" and report.cell([], column, base=level[1.0]) == "-"
    sometimes = ("", lambda r: math.nan if r["seed"] else 1.0, ".1f")
    assert report.cell(level[1.0], sometimes) == "1.0 (1 of 2)"
    assert report.cell(level[1.0][:1], sometimes, base=level[1.0]) == "+0.0 (less 1 of 2)"


def test_crashes_are_counted():
    assert report.cell([row(), row(error="FloatingPointError")], report.COLUMNS[2]) == "1 of 2"


def test_the_sweep_takes_the_best_setting_that_did_not_crash_and_was_not_about_to():
    found = zip((0.1, 0.9, 0.8, 0.7, 0.5), (0.1, 2.0, 0.8, 0.1, 0.1), (0.1, 0.1, 0.1, 0.8, 0.1), strict=True)
    rows = [row(after={"reward": reward, "kl": after}, kl=[kl] * 20) for reward, kl, after in found]
    assert report.best(rows) == 4 and report.best(rows[1:4]) == 0


def test_the_report_mixes_no_scales_no_settings_and_no_repeats():
    old = [row(key="a", steps=10), row(key="b", settings={"beta": 1}), row(key="c", base={"model": "other"})]
    new = [row(key="d"), row(key="e", seed=1), row(key="d", error="again")]
    assert report.current([*old, *new]) == [old[1] | {"name": "safe, beta 1"}, new[2], new[1]]
    more = row(key="f", seed=2, settings={"ema_short": 0.5})
    renamed = [f"safe, {difference}" for difference in ("ema_short None, beta 1", "ema_short None", "ema_short None")]
    assert [r["name"] for r in report.current([old[1], *new[:2], more])] == [*renamed, "safe"]
    longer = row(key="g", steps=300)
    assert report.current([*old, *new, longer]) == [longer]


def test_a_change_counts_beside_the_arm_that_it_changed():
    def changed(key, settings, name="without phases"):
        return row(key=key, stage="ablation", name=name, settings=settings)

    arms_rows = [row(key="a", settings={"beta": 1}), row(key="b", name="ppo", settings={"beta": 2})]
    kept = [
        changed("c", {"beta": 1, "phases": False}),
        changed("d", {"beta": 0.3}, "ppo, beta 0.3") | {"stage": "sensitivity"},
    ]
    left = [changed("e", {"beta": 9, "phases": False}), changed("f", {"beta": 1}), changed("g", {"beta": 1}, "former")]
    assert report.current([*arms_rows, *kept, *left]) == [*arms_rows, *kept]
    assert [arms.base_of(name) for name in ("without phases", "ppo, beta 0.3")] == ["safe", "ppo"]


def test_the_controller_replayed_decides_what_it_decided():
    rows = report.current(report.read_rows(RESULTS / "study.jsonl"))
    of_safe = [row for row in rows if row["stage"] == "main" and row["name"] == "safe"]
    for measured in of_safe:
        again = report.replay(measured, {})["curves"]
        for name in again:
            assert again[name] == pytest.approx(measured["curves"][name], abs=1e-6)
    assert of_safe and report.replay(of_safe[0], {"beta": 0.5})["curves"]["kl_coef"][0] == 0.5


def tables(path):
    blocks = itertools.groupby(path.read_text().splitlines(), key=lambda line: line.startswith("|"))
    return [list(lines) for is_table, lines in blocks if is_table]


def test_the_report_and_the_page_have_the_tables_of_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda *_: None)
    rows = shutil.copy(RESULTS / "study.jsonl", tmp_path)
    report.write_report(Path(rows))
    committed = RESULTS / "study.md"
    assert (tmp_path / "study.md").read_text() == committed.read_text()
    written = tables(committed)
    shown = [table for table in tables(ROOT / "docs/study.md") if "training-average reward" in table[0]]
    assert shown and all(table in written for table in shown)


@pytest.mark.slow
@pytest.mark.integration
def test_a_study_from_the_sweep_to_the_tables_and_once_more(tmp_path, capsys, monkeypatch):
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    results = tmp_path / "study.jsonl"
    command = ["--rewards", "vader", "--arms", "ppo", "--seeds", "2", "--steps", "2", "--sweep-steps", "1"]
    command += ["--runs", str(tmp_path / "runs"), "--results", str(results)]
    command += ["--set", f"model={tmp_path / 'model'}", "use_cpu=true", "eval_completions=4", "max_new_tokens=3"]
    started = []

    def popen(command, **options):
        """The first run is started as its command says, the others are forked."""
        forked = functools.partial(Command, run.main, command[2:], Path(options["stdout"].name))
        started.append(forked() if started else subprocess.Popen(command, **options))
        return started[-1]

    monkeypatch.setattr(run, "subprocess", SimpleNamespace(Popen=popen))
    assert run.main(command) == 0 and len(started) == 6
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(r["stage"], len(r["curves"]["reward"])) for r in rows] == [("sweep", 1)] * 4 + [("main", 2)] * 2
    assert {r["seed"] for r in rows[4:]} == {0, 1} and rows[4]["settings"] == rows[5]["settings"]
    assert "gold" in rows[4]["after"] and rows[4]["before"]["kl"] == 0
    assert "| ppo |" in results.with_suffix(".md").read_text() and (tmp_path / "study-vader.png").exists()
    capsys.readouterr()
    monkeypatch.setattr(report, "draw", lambda *_: None)
    assert run.main(command) == 0 and "main: 0 runs to make" in capsys.readouterr().out
    assert results.read_text().count("\n") == 6


def test_a_number_that_is_null_in_the_rows_is_one_that_was_not_finite(tmp_path):
    from safe_train.run.run_folder import append

    lines = [row(kl=(0.1,) * 19 + (math.nan,), after={"kl": math.inf}, before={"kl": 0.0})]
    append(tmp_path / "study.jsonl", lines)
    assert "NaN" not in (tmp_path / "study.jsonl").read_text()
    (found,) = report.read_rows(tmp_path / "study.jsonl")
    assert math.isnan(found["curves"]["kl"][-1]) and math.isnan(found["after"]["kl"]) and found["error"] is None
    assert report.known_values([found], ("KL", lambda r: r["after"]["kl"], ".3f")) == []
