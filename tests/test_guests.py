"""Functions of the user's are guests of a run: what they draw, seed, change or fail at is not the run's."""

import json
import math
import random

import numpy as np
import pytest
import tiny
import torch

from safe_train import parallel
from safe_train.algorithms.grpo import group_advantages
from safe_train.randomness import guest
from safe_train.rewards.rewards import load_reward
from safe_train.run.checkpoints import Checkpoints
from safe_train.run.report import read_metrics
from safe_train.run.run_folder import append, keep_rows, strict_json


def parameters(trainer):
    return [p.detach().clone() for p in trainer.policy.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(parameters(one), parameters(other), strict=True))


def nothing(*_):
    pass


DISTURBANCES = {
    "torch": lambda *_: torch.manual_seed(42),
    "numpy": lambda *_: np.random.seed(42),
    "python": lambda *_: random.seed(42),
    "draws": lambda *_: (torch.rand(3), np.random.rand(3), random.random(), torch.randperm(5)),
    "dtype": lambda *_: torch.set_default_dtype(torch.float64),
    "gradients": lambda *_: torch.set_grad_enabled(False),
    "device": lambda *_: torch.set_default_device("meta"),
    "autocast": lambda *_: (torch.set_autocast_enabled("cpu", True), torch.set_autocast_cache_enabled(False)),
    "evaluates": lambda trainer, _: trainer.evaluate() if trainer is not None else None,
}


def run_with_guest(folder, place, act):
    def good_words(prompts, completions, **columns):
        if place == "reward":
            act(None, None)
        return tiny.good_words(prompts, completions)

    trainer = tiny.trainer(folder, reward=good_words)
    if place == "callback":
        trainer.callbacks = [act]
    trainer.train()
    return trainer


@pytest.fixture(scope="module", params=["reward", "callback"])
def quiet(request, tmp_path_factory):
    """A place for a guest, and the run in which it does nothing there."""
    return request.param, run_with_guest(tmp_path_factory.mktemp("quiet"), request.param, nothing)


@pytest.mark.parametrize("disturbance", DISTURBANCES)
def test_a_run_is_the_same_whatever_a_guest_does(disturbance, quiet, tmp_path):
    place, run = quiet
    assert same(run, run_with_guest(tmp_path, place, DISTURBANCES[disturbance]))
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert torch.get_default_device().type == "cpu" and not torch.is_autocast_enabled("cpu")


def test_autocast_is_as_it_was_and_keeps_no_copy_of_a_weight():
    weight, x = torch.nn.Parameter(torch.ones(4, 4)), torch.ones(4, 4)
    before = {kind: torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda")}
    with torch.autocast("cpu"), guest(0):
        torch.mm(x, weight)  # caches the weight in bfloat16
        with torch.no_grad():
            weight.fill_(3.0)
        for kind, dtype in before.items():
            torch.set_autocast_dtype(kind, torch.float16 if dtype == torch.bfloat16 else torch.bfloat16)
        torch.autocast("cpu").__enter__()
    torch.autocast_decrement_nesting()  # as leaving it would have done
    with torch.autocast("cpu"):
        assert torch.mm(x, weight)[0, 0] == 12
    assert {kind: torch.get_autocast_dtype(kind) for kind in before} == before
    assert not torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()


def test_a_file_that_seeds_when_it_is_imported_does_not_seed_the_run(tmp_path):
    words = "def f(prompts, completions, **columns):\n    return [float(len(text)) for text in completions]\n"
    texts = []
    for name, code in (("quiet", words), ("loud", f"import torch\ntorch.manual_seed(7)\n{words}")):
        (tmp_path / f"{name}.py").write_text(code)
        texts.append(tiny.trainer(tmp_path / "run", f"{tmp_path}/{name}.py:f").sample(0).texts)
    assert texts[0] == texts[1]


def test_the_random_numbers_of_a_reward_differ_from_step_to_step_and_repeat_with_the_seed(tmp_path):
    def run(name, **settings):
        drawn = []

        def noisy(completions, **columns):
            drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
            return [random.random() for _ in completions]

        tiny.trainer(tmp_path / name, reward=noisy, **settings).train()
        return drawn

    one, again, other = run("one"), run("again"), run("other", seed=1)
    assert one == again and len(set(one)) == 3 and not set(one) & set(other)


def test_generators_of_all_devices_go_on_as_before(monkeypatch):
    states = {"cuda": [torch.tensor([1]), torch.tensor([2])]}
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.get_rng_state", lambda: states["cuda"][0])
    monkeypatch.setattr("torch.cuda.set_rng_state", lambda state: states["cuda"].__setitem__(0, state))
    monkeypatch.setattr("torch.cuda.get_rng_state_all", lambda: list(states["cuda"]))
    monkeypatch.setattr("torch.cuda.set_rng_state_all", lambda new: states.update(cuda=new))
    with guest(0):
        states["cuda"] = [torch.tensor([8]), torch.tensor([9])]
    assert [state.item() for state in states["cuda"]] == [1, 2]


def test_a_device_that_a_guest_uses_first_starts_from_the_seed_of_the_run(monkeypatch):
    seeds = []
    monkeypatch.setattr("torch.cuda.manual_seed_all", seeds.append)
    torch.manual_seed(5)
    with guest(0):
        torch.manual_seed(7)
    assert seeds[-1] == 5


def draws_all(trainer, metrics):
    torch.rand(3), np.random.rand(), random.random()
    metrics.clear()


def seeds_all(trainer, metrics):
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    trainer.evaluate()


@pytest.mark.parametrize("callback", [draws_all, seeds_all])
def test_a_resumed_run_equals_an_uninterrupted_one_whatever_a_callback_draws(callback, tmp_path):
    settings = {"total_steps": 5, "save_every": 2, "keep_checkpoints": 9}

    def make(name, *callbacks):
        trainer = tiny.trainer(tmp_path / name, **settings)
        trainer.callbacks = callbacks
        return trainer

    def killed(trainer, metrics):
        if trainer.step == 3:
            raise KeyboardInterrupt

    whole = make("whole", callback)
    assert all("reward" in row for row in whole.train()), "a callback has metrics of its own"
    with pytest.raises(KeyboardInterrupt):
        make("cut", callback, killed).train()
    torch.manual_seed(99)
    resumed = make("cut", callback)
    resumed.train(resume_from_checkpoint=True)
    assert same(whole, resumed)


def test_the_random_numbers_of_a_callback_differ_from_step_to_step_and_are_those_of_the_resumed_run(tmp_path):
    def run(total_steps, **options):
        trainer, drawn = tiny.trainer(tmp_path, total_steps=total_steps, save_every=1, keep_checkpoints=9), []
        trainer.callbacks = [lambda *_: drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))]
        trainer.train(**options)
        return drawn

    first = run(3)
    again = run(3, resume_from_checkpoint=tmp_path / "checkpoints" / "step-1")
    assert len(set(first)) == 3 and again == first[1:]


def fails_at(call, what):
    """`good_words`, which in its `call`-th call returns what is no reward, or raises."""
    calls = []

    def judge(prompts, completions, **columns):
        calls.append(1)
        values = tiny.good_words(prompts, completions)
        return values if len(calls) != call else what(values)

    return judge


FAILURES = {
    "raises": lambda values: 1 / 0,
    "nan": lambda values: [float("nan"), *values[1:]],
    "too large": lambda values: [*values[1:], 1e39],
    "too few": lambda values: values[1:],
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_reward_that_fails_stops_the_run_and_no_finished_step_is_lost(failure, tmp_path, capsys):
    settings = {"total_steps": 5, "save_every": 10, "keep_checkpoints": 9}
    whole = tiny.trainer(tmp_path / "whole", **settings)
    expected = whole.train()
    with pytest.raises((RuntimeError, ValueError), match="reward 'judge' r"):
        tiny.trainer(tmp_path / "cut", reward=fails_at(4, FAILURES[failure]), **settings).train()
    assert "stopped after step 3, with a checkpoint" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()] == ["step-3"]
    resumed = tiny.trainer(tmp_path / "cut", **settings)
    found = resumed.train(resume_from_checkpoint=True)
    assert same(whole, resumed) and [row["reward"] for row in found] == [row["reward"] for row in expected[3:]]


def test_a_reward_that_fails_at_once_leaves_nothing_to_keep(tmp_path):
    with pytest.raises(RuntimeError, match="reward 'judge' raised ZeroDivisionError"):
        tiny.trainer(tmp_path, reward=fails_at(1, FAILURES["raises"])).train()
    assert not (tmp_path / "checkpoints").exists()


def test_a_checkpoint_of_the_timeline_before_does_not_stand_for_the_last_finished_step(tmp_path):
    """A run that was wound back to step 1 and fails in step 3 has a step 2 of its own."""
    settings = {"total_steps": 4, "save_every": 1, "keep_checkpoints": 9}
    tiny.trainer(tmp_path, **settings).train()
    again = tiny.trainer(tmp_path, reward=fails_at(2, FAILURES["raises"]), **settings | {"save_every": 9})
    again.callbacks = [lambda trainer, _: trainer.reward_moments.update([100.0])]
    with pytest.raises(RuntimeError, match="raised ZeroDivisionError"):
        again.train(resume_from_checkpoint=tmp_path / "checkpoints" / "step-1")
    found = Checkpoints(tmp_path, 9)
    assert [path.name for path in found.complete()] == ["step-1", "step-2"]
    state = json.loads((found.complete()[-1] / "state.json").read_text())
    assert state["reward_moments"]["count"] == again.reward_moments.count == 17


@pytest.mark.parametrize("where", ["evaluation", "callback"])
def test_a_failure_behind_the_update_keeps_that_step(where, tmp_path):
    settings = {"total_steps": 4, "save_every": 9}
    reward = fails_at(3, FAILURES["nan"]) if where == "evaluation" else tiny.good_words
    trainer = tiny.trainer(tmp_path, reward=reward, **settings, eval_every=2 if where == "evaluation" else 0)

    def fails(trainer, metrics):
        if trainer.step == 2:
            raise ValueError("no more")

    trainer.callbacks = [fails] if where == "callback" else []
    with pytest.raises(ValueError, match="no more|reward 'judge' returned nan"):
        trainer.train()
    assert (tmp_path / "checkpoints" / "step-2" / "state.json").exists()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("normalize", [False, True])
def test_differences_that_float32_would_lose_are_trained_on(normalize, tmp_path):
    """Group advantages of 1e8 + [0, 1, 0, 1, ...] beside a group at 0: those of [0, 1, 0, 1, ...]."""
    trainer = tiny.trainer(
        tmp_path, algorithm="grpo", normalize_rewards=normalize, completions_per_prompt=4, prompts_per_step=2
    )
    rollout, offset = trainer.sample(0), torch.tensor([1e8] * 4 + [0.0] * 4, dtype=torch.float64)
    reward_B = torch.tensor([0.0, 1.0, 0.0, 1.0] * 2, dtype=torch.float64) + offset
    trainer.reward_moments.update(reward_B.tolist())
    found = group_advantages(trainer.training_rewards(reward_B, rollout), 4)
    scale = trainer.reward_moments.std if normalize else 1.0
    spread = math.sqrt(1 / 3) / scale  # the sample standard deviation of [0, 1, 0, 1]
    expected = torch.tensor([-0.5, 0.5, -0.5, 0.5] * 2).double() / scale / (spread + 1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert found.abs().min() > 0


def test_normalised_differences_reach_a_critic(tmp_path):
    trainer = tiny.trainer(tmp_path)
    rollout, reward_B = trainer.sample(0), torch.tensor([0.0, 1.0] * 4, dtype=torch.float64) + 1e8
    trainer.reward_moments.update(reward_B.tolist())
    assert trainer.training_rewards(reward_B, rollout).tolist() == [-1.0, 1.0] * 4


@pytest.mark.parametrize("value", [0.1, 1e8 + 0.3, 1e30])
def test_equal_rewards_are_no_advantage_however_large(value):
    assert group_advantages(torch.full((9,), value, dtype=torch.float64), 3).tolist() == [0.0] * 9


def test_metrics_hold_null_where_a_number_is_not_finite_and_are_read_as_nan(tmp_path):
    rows = [{"step": 1, "reward": math.nan, "kl": -math.inf, "phase": "warmup", "curve": [1.0, math.nan]}, {"step": 2}]
    append(tmp_path / "metrics.jsonl", rows)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()][0] == {
        "step": 1, "reward": None, "kl": None, "phase": "warmup", "curve": [1.0, None]
    }  # fmt: skip
    row = read_metrics(tmp_path)[0]
    assert math.isnan(row["reward"]) and math.isnan(row["kl"]) and math.isnan(row["curve"][1])
    keep_rows(tmp_path / "metrics.jsonl", 1)
    assert (tmp_path / "metrics.jsonl").read_text() == text.splitlines(keepends=True)[0]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": NaN}\n')  # of an older version
    keep_rows(tmp_path / "metrics.jsonl", 1)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "reward": null}\n'
    assert strict_json((math.inf, 1)) == "[null, 1]"


def test_a_run_with_numbers_that_are_not_finite_is_logged_drawn_and_resumed(tmp_path, monkeypatch):
    from safe_train.run.report import write_report

    trainer = tiny.trainer(tmp_path, total_steps=2)
    step, calls = trainer.optimizer_step, []

    def overflows(loss):
        calls.append(1)
        return step(loss) | ({"grad_norm": math.inf} if len(calls) == 1 else {})

    trainer.optimizer_step = overflows
    trainer.train()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[0], parse_constant=pytest.fail)["grad_norm"] is None
    assert len(tiny.trainer(tmp_path, total_steps=3).train(resume_from_checkpoint=True)) == 1
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (tmp_path / "metrics.jsonl").unlink()
    append(tmp_path / "metrics.jsonl", [row | {"kl": None, "reward": None, "value_gap": None} for row in rows])
    write_report([tmp_path], tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_processes_at_different_places_are_told(monkeypatch):
    monkeypatch.setattr(parallel, "gather_objects", lambda own: [own, ("the callbacks of step 3", None)])
    with pytest.raises(parallel.Apart, match=r"process 0 is in evaluate\(\); process 1 is in the callbacks of step 3"):
        parallel.meet("evaluate()")


def test_a_package_is_still_imported_by_its_name():
    assert load_reward("tiny:good_words") is tiny.good_words
