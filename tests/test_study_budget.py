"""Part two of the study: its plan, the controllers beside it, and its judgement of runs."""

import itertools
import math
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch

from bench.measurement.machine import RESULTS, ROOT
from bench.study import budget_report, design, rewards
from bench.study.budget import BudgetWithMoments
from safe_train.config import SafeConfig
from safe_train.engines.projection import Budget


def test_every_pair_of_levels_occurs_and_every_part_of_the_plan_is_balanced():
    plan, factors = design.cover(design.FACTORS, 30), design.FACTORS
    assert len({tuple(run.values()) for run in plan}) == 30
    for a, b in itertools.combinations(factors, 2):
        seen = {(run[a], run[b]) for run in plan[:20]}
        assert seen == set(itertools.product(factors[a], factors[b])), (a, b)
    for length, name in itertools.product(range(1, 31), factors):
        counts = Counter(run[name] for run in plan[:length])
        levels = [counts[level] for level in factors[name]]
        assert max(levels) - min(levels) <= 2, (length, name)


def test_arms_share_their_runs_and_every_setting_is_one():
    specs = design.grid(30, 10, 20, {})
    others = [*design.long(1500, {}), *design.outside(20, {}), *design.variants(30, 20, {}), *design.ensembles({})]
    assert len({spec.key for spec in [*specs, *others]}) == 30 + 4 * 10 + 2 * 2 * 7 + 8 + 8 + 8
    for spec in [*specs, *others]:
        asked = [f"{rewards.__file__}:{name}" for name in spec.reward.split("+")]
        own = {"seed": spec.seed, "total_steps": spec.steps, "reward": asked}
        args = SafeConfig.from_dict(spec.base | spec.settings | own)
        assert (args.kl_budget is not None) == any(name in spec.name for name in ("budget", "return", "moments"))
        assert all(callable(getattr(rewards, name)) for name in spec.reward.split("+"))
        assert spec.stage not in ("long", "ensembles") or spec.reward in rewards.GOLD
    budgets = [spec for spec in specs if spec.name == "budget"]
    for spec in specs:
        twin = budgets[spec.seed]
        assert spec.reward == twin.reward
        assert spec.settings["learning_rate"] == twin.settings["learning_rate"]
        assert spec.settings.get("kl_threshold", twin.settings["kl_budget"]) == twin.settings["kl_budget"]


def test_the_adaptive_controllers_by_hand():
    args = SafeConfig.from_dict({"prompts_per_step": 4, "completions_per_prompt": 4} | design.held(0.1, "ppo")["trl"])
    controller = design.AdaptiveController(args)
    steps = [controller.update(kl, 3.0, 0.0, 1.0).kl_coef for kl in (0.0, 0.11, 5.0, 0.0)]
    low, near, high = (1 + error * 16 / 10_000 for error in (-0.2, 0.1, 0.2))
    assert steps == pytest.approx([0.2, 0.2 * low, 0.2 * low * near, 0.2 * low * near * high], rel=1e-12)
    other = design.AdaptiveController(args)
    other.load_state_dict(controller.state_dict())
    assert other.update(0.0, 3.0, 0.0, 1.0) == controller.update(0.0, 3.0, 0.0, 1.0)


def test_moments_move_back_with_the_weights(tmp_path, monkeypatch):
    trainer = tiny.trainer(tmp_path, total_steps=1, kl_budget=1.0)
    trainer.train()
    moved = BudgetWithMoments(trainer.engine, trainer.args)
    monkeypatch.setattr(Budget, "hold", lambda *_: {"budget/scale": 0.5})
    states = [dict(state) for state in trainer.engine.optimizer.state.values()]
    before = [(state["exp_avg"].clone(), state["exp_avg_sq"].clone()) for state in states]
    assert moved.hold([], 1e-2) == {"budget/scale": 0.5}
    assert any(first.any() for first, _ in before)
    for state, (first, second) in zip(states, before, strict=True):
        assert torch.equal(state["exp_avg"], first / 2) and torch.equal(state["exp_avg_sq"], second / 4)


def row(name="budget", kl=(0.0, 0.05, 0.12, 0.09, 0.14, 0.1), **changes):
    settings = design.held(0.1, "ppo")[name] | {"learning_rate": 2e-3}
    curves = {"kl": list(kl), "reward": [0.0] * 3 + [1.0] * (len(kl) - 3), "budget/scale": [1.0] * len(kl)}
    return {"stage": "grid", "reward": "vader", "name": name, "seed": 0, "steps": 6, "error": None} | {
        "settings": settings, "curves": curves,
    } | changes  # fmt: skip


def test_rollouts_are_judged_by_their_ratio_to_the_budget_or_the_target():
    for name in ("budget", "trl"):
        assert budget_report.ratios(row(name)) == pytest.approx([0.5, 1.2, 0.9, 1.4, 1.0])
        assert budget_report.above([row(name)], 1.1) == 2 / 5 and budget_report.above([row(name)], 1.3) == 1 / 5
    assert budget_report.used([row()]) == pytest.approx((1.4 + 1.0) / 2)
    assert budget_report.ratios(row(kl=(0.0, math.nan))) == [math.inf]
    assert budget_report.place(row()) == budget_report.place(row("verl"))


def test_a_long_run_falls_by_its_smoothed_reward():
    rewards = [1.0] * 100 + [0.0] * 50 + [0.5] * 100
    assert budget_report.fall({"curves": {"reward": rewards}}) == pytest.approx(0.75)
    assert math.isnan(budget_report.fall({"curves": {"reward": [1.0] * 9}}))


def test_the_updates_that_were_moved_back_count_those_that_were_not_measured():
    measured = row()
    measured["curves"]["budget/scale"] = [1.0, 0.5, math.nan, math.nan, 0.9, 1.0]
    assert budget_report.moved([measured]) == 2 / 6


def test_the_report_and_the_page_have_the_tables_of_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(budget_report, "draw", lambda *_: None)
    budget_report.write_report(Path(shutil.copy(RESULTS / "budget.jsonl", tmp_path)))
    written = (RESULTS / "budget.md").read_text()
    assert (tmp_path / "budget.md").read_text() == written
    tables = re.findall(r"(?:^\|.*\n)+", (ROOT / "docs/study.md").read_text(), re.MULTILINE)
    shown = [table for table in tables if "above 1.1 x" in table]
    assert shown and all(table in written for table in shown)
