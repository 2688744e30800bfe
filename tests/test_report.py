"""Reward against KL in a run's picture: the best of n by brute force, and which points are drawn."""

import itertools
import json
import math
import random
import shutil
import statistics
from types import SimpleNamespace

import pytest
import yaml
from matplotlib.figure import Figure
from test_evaluation import run

from safe_train.cli import main
from safe_train.run import report
from safe_train.run.frontier import Evaluated, best_of, draw_frontier, draw_path, held_out, longest_ruler, moved, ruler
from safe_train.run.panels import Curve, panels_of, union, values
from safe_train.run.report import read_evaluations, read_metrics, write_report


@pytest.mark.parametrize(
    "rewards", [[3.0], [0.0, 1.0], [2.0, -1.0, 2.0, 0.5, 7.0], [random.Random(i).random() for i in range(9)]]
)
def test_the_best_of_n_is_the_mean_over_all_subsets(rewards):
    expected = [statistics.fmean(map(max, itertools.combinations(rewards, n))) for n in range(1, len(rewards) + 1)]
    assert best_of(rewards) == pytest.approx(expected)


def test_the_best_of_n_of_many_samples_is_a_number():
    best = best_of([i / 2000 for i in range(2000)])  # binomials of 2000 are beyond a float
    assert (
        best[0] == pytest.approx(1999 / 4000) and best[1] == pytest.approx(2 / 3, abs=1e-3) and best[-1] == 1999 / 2000
    )
    assert best == sorted(best)


def row(prompt, reward, tokens=10, **more):
    return {"step": 0, "how": "sampled", "prompt": prompt, "reward": reward, "tokens": tokens} | more


def test_the_ruler_is_the_mean_over_prompts_at_the_kl_of_the_best_of_n():
    chat = [{"role": "user", "content": "b"}]
    rows = [row("a", x) for x in (0.0, 1.0, 4.0)] + [row(chat, x, tokens=20) for x in (2.0, 3.0)] + [row("c", None)]
    first, second = ruler(rows)  # one prompt has two alone, and one none
    tokens = (4 * 10 + 2 * 20) / 6
    assert first[:2] == pytest.approx((0.0, (5 / 3 + 5 / 2) / 2))
    assert second[:2] == pytest.approx(((math.log(2) - 0.5) / tokens, ((1 + 4 + 4) / 3 + 3) / 2))
    assert second.error == pytest.approx(0.0) and first.error == pytest.approx((5 / 2 - 5 / 3) / 2)


@pytest.mark.parametrize(
    "rows",
    [[], [row("a", 1.0), row("b", 2.0)], [row("a", 1.0), row("a", 2.0), row("b", 1.0)], [row("a", 1.0, tokens=0)] * 2],
)
def test_there_is_no_ruler_where_a_prompt_was_completed_once(rows):
    assert ruler(rows) == []


def test_the_ruler_is_of_the_reference_alone():
    rows = [row("a", 0.0), row("a", 1.0)]
    greedy, later = [x | {"how": "greedy"} for x in rows], [x | {"step": 2, "reward": 5.0} for x in rows]
    (_, best) = longest_ruler([Evaluated({}, [*rows, *greedy, *later]), Evaluated({}, greedy)])
    assert best.reward == 1.0


NUMBERS = {
    "step": 4,
    "before": {"kl": 0.0, "reward": 0.1, "reward_error": 0.01, "scale": 0.0},
    "kl 0.1": {"kl": 0.1, "reward": 0.3, "reward_error": None, "scale": 0.5},
    "after": {"kl": 0.4, "reward": 0.5, "reward_error": 0.02, "scale": 1.0},
}


def test_points_are_those_of_evaluations_and_of_moved_policies():
    plain = {name: {k: v for k, v in x.items() if k != "scale"} for name, x in NUMBERS.items() if name != "step"}
    steps = [{"kl": 1.0, "reward": 9.0}, {"eval/kl": 0.2, "eval/reward": 0.4, "eval/reward_error": 0.03}]
    found = held_out(steps, [Evaluated(NUMBERS, [])])
    assert found == [(0.2, 0.4, 0.03), (0.0, 0.1, 0.01), (0.4, 0.5, 0.02)]
    assert [p.kl for p in moved(Evaluated(NUMBERS, []))] == [0.0, 0.1, 0.4]
    assert moved(Evaluated(plain, [])) == []


def labels(rows, evaluations, budget=None):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots()
    draw_frontier(axis, rows, evaluations, "#000000", budget)
    figure.canvas.draw()
    found = axis.get_legend_handles_labels()[1]
    plt.close(figure)
    return found


def test_the_panel_names_what_it_has():
    steps = [{"kl": 0.0, "reward": 1.0}, {"kl": math.nan, "reward": 1.0}]
    once, twice = [row("a", 1.0)], [row("a", 1.0), row("a", 2.0)]
    assert labels(steps, []) == ["rollouts"]
    assert labels(steps, [Evaluated({"before": NUMBERS["before"]}, once)]) == ["rollouts", "held out"]
    found = labels(steps, [Evaluated(NUMBERS, twice)], budget=0.2)
    best = "best of n of the reference (KL: at most)"
    assert sorted(found) == sorted(["rollouts", "held out", "KL budget", "moved toward the reference", best])


def test_evaluations_of_the_run_alone_are_drawn(tmp_path, pictures):
    folder = run(tmp_path, "eval_completions=10", "eval_completions_per_prompt=2", "kl_budget=2.0")
    assert main(["eval", str(folder), "--kl", "0"]) == 0
    (found,) = read_evaluations(folder, 2)
    assert len(longest_ruler([found])) == 2 and list(found.numbers) == ["step", "before", "kl 0", "after"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["kl_budget"] == 2.0
    assert read_evaluations(folder, 1) == []  # the run went back
    assert main(["eval", str(folder), "eval_completions=4", "use_cpu=true"]) == 0
    assert len(read_evaluations(folder, 2)) == 2  # the one at a KL is kept
    assert main(["eval", str(folder), f"reward={tmp_path}/rewards.py:length"]) == 0
    assert [list(each.numbers) for each in read_evaluations(folder, 2)] == [list(found.numbers)]
    shutil.rmtree(folder / "eval" / "step-2-kl-0")
    path = folder / "eval" / "step-2" / "evaluation.json"
    assert json.loads(path.read_text())["overrides"] == [f"reward={tmp_path}/rewards.py:length"]
    path.write_text(path.read_text()[:40])  # cut short
    assert read_evaluations(folder, 2) == [] and len(read_metrics(folder)) == 2
    write_report([folder, folder], tmp_path / "both.png")
    assert (tmp_path / "both.png").stat().st_size > 10_000


ALL = {"reward", "reward_std", "kl", "kl_short", "kl_threshold", "entropy", "entropy_floor", "kl_coef", "entropy_gate"}
ALL |= {"value_loss", "value_gap", "explained_variance", "grad_norm", "critic_grad_norm", "budget/scale", "time/step_s"}
ALL |= {"rewards/a/mean", "rewards/a/std", "rewards/b/mean"}


def curves(names=ALL, **settings):
    return {panel.key: [curve.name for curve in panel.curves] for panel in panels_of(names, settings)}


def test_panels_are_those_of_what_the_run_has():
    safe = curves(controller="safe", critic="soft_min")
    assert safe["kl"] == ["kl", "kl_short", "kl_threshold"] and safe["entropy"] == ["entropy", "entropy_floor"]
    assert {"critic", "control"} <= safe.keys() and safe["norms"] == ["grad_norm", "critic_grad_norm"]
    assert safe["critic"] == ["value_loss", "value_gap", "explained_variance"]
    assert curves(critic="single")["critic"] == ["value_loss", "explained_variance"]
    grpo = curves(controller="fixed", critic="none")
    assert grpo["kl"] == ["kl"] and grpo["entropy"] == ["entropy"] and grpo["norms"] == ["grad_norm"]
    assert not {"critic", "control"} & grpo.keys()
    budgeted = curves(controller="fixed", critic="none", kl_budget=0.3)
    assert budgeted["kl"] == ["kl", "kl_threshold", "kl_budget"] and budgeted["control"] == ["kl_coef"]
    assert safe["control"] == ["kl_coef", "entropy_gate"]
    pictured = [
        {panel.key for panel in panels_of(ALL | {"policy_loss"}, {"algorithm": name}) if not panel.is_detail}
        for name in ("distill", "grpo")
    ]
    assert "loss" in pictured[0] and "loss" not in pictured[1]
    assert "control" not in curves(controller="fixed", kl_budget=0.3, kl_budget_control=False)
    assert safe["rewards"] == ["rewards/a/mean", "rewards/b/mean"]
    assert "rewards" not in curves(ALL - {"rewards/b/mean"}) and list(curves({"kl"}, kl_budget=0.1)) == ["kl"]
    assert "critic" in curves()  # a run without settings has what it has numbers for


def test_several_runs_have_the_panels_of_each():
    safe, grpo = (
        {panel.key: panel for panel in panels_of(ALL, settings)}
        for settings in ({"controller": "safe", "kl_budget": 0.3}, {"controller": "fixed", "critic": "none"})
    )
    assert [panel.key for panel in union([grpo, safe])] == [*grpo, *(key for key in safe if key not in grpo)]
    assert [curve.name for curve in safe["kl"].compared().curves] == ["kl", "kl_threshold", "kl_budget"]
    assert [curve.name for curve in safe["critic"].compared().curves] == ["value_loss"]
    assert [safe[key].compared().title for key in ("critic", "reward")] == ["critic: value loss", "reward"]


def test_a_curve_is_a_number_a_step():
    low = Curve("explained_variance", "", floor=-1.0)
    found = values(low, {"explained_variance": [-3.0, math.nan, 0.5]}, {}, 3)
    assert found[0] == -1.0 and math.isnan(found[1]) and found[2] == 0.5
    assert values(Curve("kl_budget", "", "bound"), {}, {"kl_budget": 0.3}, 2) == [0.3, 0.3]
    assert all(map(math.isnan, values(low, {}, {}, 2)))


def test_a_long_curve_is_smoothed_and_a_short_one_is_not():
    short, long = [float(i % 2) for i in range(report.LONG - 1)], [float(i % 2) for i in range(6000)]
    assert report.smooth(short) is short
    found = report.smooth(long)
    assert len(found) == 6000 and max(abs(value - 0.5) for value in found) < 0.02
    ramp = report.smooth([float(i) for i in range(6000)])
    width = 6000 // report.PARTS  # from half before a step to half behind it, less one
    assert ramp[3000] == 2999.5 and ramp[0] == (width // 2 - 1) / 2
    assert math.isnan(report.smooth([math.nan] * 300)[7]) and report.smooth([math.nan, *[1.0] * 299])[0] == 1.0


def test_runs_that_differ_in_their_seeds_are_one_band():
    base = {"algorithm": "grpo", "beta": 0.1}
    runs = {
        "a": base | {"seed": 0, "output_dir": "a"},
        "b": base | {"seed": 1, "output_dir": "b"},
        "c": base | {"beta": 0.2},
    }
    assert report.repetitions(runs | {"d": {}, "e": {}}) == {
        "a, 2 seeds": ["a", "b"],
        "c": ["c"],
        "d": ["d"],
        "e": ["e"],
    }


def test_the_band_over_seeds_is_the_confidence_interval_of_the_mean():
    drawn = {}
    axis = SimpleNamespace(
        plot=lambda x, y, label=None, **style: drawn.setdefault(label, []).append((x, y)),
        fill_between=lambda x, low, high, **style: drawn.setdefault("band", (x, low, high)),
    )
    report.draw_repeated(axis, [[1, 2], [1, 2], [1, 2, 3]], [[1.0, 4.0], [2.0, 4.0], [3.0, 4.0, 9.0]], "red", "arm")
    assert drawn["arm"] == [([1, 2], [2.0, 4.0])] and len(drawn[None]) == 3
    at, low, high = drawn["band"]
    width = 4.30 / 3**0.5  # of a standard deviation of 1 over three
    assert at == [1, 2] and low == pytest.approx([2 - width, 4]) and high == pytest.approx([2 + width, 4])


def test_pictures_of_long_runs_and_of_several_seeds_are_drawn(tmp_path, pictures):
    for seed in range(2):
        folder = tmp_path / f"run-{seed}"
        folder.mkdir()
        (folder / "config.yaml").write_text(f"algorithm: safe\ncontroller: fixed\nseed: {seed}\n")
        rows = [{"step": i, "reward": i % 7 + seed, "reward_std": 1, "kl": 0.1, "entropy": 2.0} for i in range(1, 2001)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.write_report([tmp_path / "run-0"], tmp_path / "one.png")
    report.write_report([tmp_path / "run-0", tmp_path / "run-1"], tmp_path / "two.png")
    assert (tmp_path / "one.png").stat().st_size > 10_000 < (tmp_path / "two.png").stat().st_size


def test_a_band_over_seeds_keeps_the_budget(tmp_path, monkeypatch, pictures):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.extend(figure.axes))
    for seed in range(2):
        folder = tmp_path / f"run-{seed}"
        folder.mkdir()
        (folder / "config.yaml").write_text(f"algorithm: grpo\ncontroller: budget\nkl_budget: 0.3\nseed: {seed}\n")
        rows = [{"step": i, "reward": 0.1 * i + seed, "kl": 0.01 * i, "entropy": 2.0} for i in range(1, 9)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.write_report([tmp_path / "run-0", tmp_path / "run-1"], tmp_path / "two.png")
    (panel,) = (axis for axis in drawn if axis.get_title(loc="left").startswith("exact KL"))
    assert [0.3] * 8 in [list(line.get_ydata()) for line in panel.lines]


def test_the_path_of_a_long_run_is_one_of_means():
    drawn = []
    axis = SimpleNamespace(plot=lambda x, y, *form, **style: drawn.append((len(x), form)))
    draw_path(axis, [{"kl": 0.1, "reward": 1.0}] * (report.LONG - 1), [], "blue", "rollouts")
    assert drawn == [(report.LONG - 1, ())]
    draw_path(axis, [{"kl": 0.1, "reward": 1.0}] * 6000, [], "blue", "rollouts")
    assert drawn[1:] == [(6000, (".",)), (report.PARTS, ())]


@pytest.mark.parametrize(
    ("totals", "top"), [([1.0, 2.0, 3.0], None), ([1.0] * 999 + [2700.0], 1.2), ([math.nan] * 3, None), ([0.0], None)]
)
def test_a_step_in_which_the_machine_slept_does_not_flatten_the_others(totals, top):
    assert report.top_of(totals) == top
