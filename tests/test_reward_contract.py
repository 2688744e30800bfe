"""TRL's contract for rewards: keywords, async functions, None, what is logged; and how several rewards become one."""

import asyncio
import dataclasses
import functools
import gc
import json
import math
import os
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from transformers import TrainerState

from safe_train.algorithms.advantages import credit
from safe_train.algorithms.grpo import group_advantages
from safe_train.algorithms.losses import value_loss
from safe_train.config import ConfigError, SafeConfig
from safe_train.rewards.groups import learned_from
from safe_train.rewards.rewards import Rewards, load_reward
from safe_train.rewards.server import RewardServer
from safe_train.run.report import read_rows
from safe_train.run.start import load_rewards
from safe_train.sampling.experience import Experience
from safe_train.settings.limits import PAPER

NAN = math.nan

TRL_REWARDS = '''
"""As one writes it for TRL's GRPOTrainer."""

import asyncio
import functools


async def judged(prompts, completions, completion_ids, answer, log_extra, log_metric, trainer_state, **kwargs):
    """Only questions with an answer are judged."""
    await asyncio.sleep(0.001)
    log_extra("tokens", [len(ids) for ids in completion_ids])
    log_metric("judged/progress", trainer_state.global_step / trainer_state.max_steps)
    found = [None if a is None else float(a in c.split()) for c, a in zip(completions, answer, strict=True)]
    log_metric("judged/share", sum(x is not None for x in found) / len(found))
    return found


def long(completions, completion_ids, target, **kwargs):
    return [-abs(len(ids) - target) / 10 for ids in completion_ids]


class Short:
    async def __call__(self, completions, **kwargs):
        return [float(len(c) < 12) for c in completions]


short = Short()
near = functools.partial(long, target=3)
'''
ROWS = [{**row, "answer": "good" if i % 2 else None} for i, row in enumerate(tiny.PROMPTS)]


def from_trl_file(folder):
    (folder / "trl_rewards.py").write_text(TRL_REWARDS)
    return [f"{folder}/trl_rewards.py:{name}" for name in ("judged", "near", "short")]


def test_a_reward_file_for_trl_runs_unchanged(tmp_path):
    names = from_trl_file(tmp_path)
    changes = {"algorithm": "grpo", "total_steps": 2, "reward_weights": [1.0, 0.5, 1.0]}
    history = tiny.trainer(tmp_path / "run", names, prompts=ROWS, **changes).train()
    assert [row["judged/progress"] for row in history] == [0.0, 0.5]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    answers = {row["prompt"]: row["answer"] for row in ROWS}
    for row in samples:
        answer, words = answers[row["prompt"]], row["completion"].split()
        assert row["rewards/judged"] == (None if answer is None else float(answer in words))
        parts = [row["rewards/judged"] or 0.0, 0.5 * row["rewards/long"], row["rewards/Short"]]
        assert row["reward"] == pytest.approx(sum(parts)) and row["rewards/long"] == -abs(row["tokens"] - 3) / 10
    for step, row in enumerate(history, start=1):
        judged = [r["rewards/judged"] for r in samples if r["step"] == step and r["rewards/judged"] is not None]
        assert row["rewards/judged/mean"] == pytest.approx(sum(judged) / len(judged)) and len(judged) < 8
        assert row["judged/share"] == len(judged) / 8 and row["rewards/none_fraction"] == 0
        assert all(row[f"time/reward/{name}_s"] > 0 for name in ("judged", "long", "Short"))


def test_the_same_file_runs_in_trl(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    functions = [load_reward(name) for name in from_trl_file(tmp_path)]
    settings = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 6, "max_steps": 1}
    more = {"report_to": "none", "logging_steps": 1, "save_strategy": "no", "gradient_checkpointing": False}
    args = trl.GRPOConfig(output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, **settings, **more)
    trainer = trl.GRPOTrainer(
        tiny.model(), functions, args, train_dataset=Dataset.from_list(ROWS), processing_class=tiny.tokenizer()
    )
    trainer.train()
    logged = trainer.state.log_history[0]
    assert {"rewards/judged/mean", "rewards/long/mean", "rewards/Short/mean", "judged/share"} <= logged.keys()


def test_a_function_gets_what_it_names(tmp_path):
    seen = {}

    def narrow(completions, level=0, missing="default"):
        seen["narrow"] = (completions, level, missing)
        return [0.0] * len(completions)

    def wide(**given):
        seen["wide"] = given
        return [0.0] * len(given["completions"])

    columns = {"level": [1, 2], "prompt": ["x", "y"], "completion": ["x", "y"], "completion_ids": [[0], [0]]}
    state = TrainerState(global_step=3, log_history=[{"step": 3}])
    rewards = Rewards([narrow, wide, lambda completions: np.zeros(2)], state=state)
    rewards(["p", "q"], ["a", "b"], columns, [[5], [6, 7]])
    assert seen["narrow"] == (["a", "b"], [1, 2], "default")
    given = seen["wide"]
    assert given["completion_ids"] == [[5], [6, 7]] and given["trainer_state"] == state
    assert given.keys() == {
        "prompts", "completions", "completion_ids", "level", "trainer_state", "log_extra", "log_metric"
    }  # fmt: skip
    given["trainer_state"].global_step = 9
    given["trainer_state"].log_history.clear()
    assert state.global_step == 3 and state.log_history


@pytest.mark.parametrize("column", ["prompts", "completions", "trainer_state", "log_extra", "log_metric"])
def test_a_column_with_a_keywords_name_is_refused_before_the_run(column, tmp_path):
    rows = [{**row, column: "x"} for row in tiny.PROMPTS]
    with pytest.raises(ConfigError, match=f"the data set has a column {column!r}.* naming the others in columns"):
        tiny.trainer(tmp_path / "run", prompts=rows)
    tiny.trainer(tmp_path / "run", prompts=rows, columns=[])


def test_a_function_that_nothing_is_given_for_is_refused_before_the_run(tmp_path):
    def environmental(completions, environments, **columns):
        return [0.0] * len(completions)

    def wants(completions, solution):
        return [0.0] * len(completions)

    for reward, message in (
        (environmental, "'environmental' asks for environments, .* not offered"),
        (wants, "'wants' cannot be called .*: missing a required argument: 'solution'"),
        (tiny.model(), "got the model LlamaForCausalLM: pass its name or folder"),
        (3.0, "must be a function or a name, got 3.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny.trainer(tmp_path / "run", reward)


def test_a_data_frame_brings_its_columns(tmp_path):
    pandas = pytest.importorskip("pandas")
    seen = []

    def judge(completions, level):
        seen.extend(level)
        return [0.0] * len(completions)

    frame = pandas.DataFrame({"prompt": ["the cat", "a dog"], "level": [1, 2]})
    tiny.trainer(tmp_path, judge, prompts=frame, total_steps=1).train()
    assert sorted(seen) == [1, 1, 1, 1, 2, 2, 2, 2]


def scored(functions, columns=None, count=2, **options):
    texts = [str(i) for i in range(count)]
    return Rewards(functions, **options)(["p"] * count, texts, columns or {})


def test_async_functions_of_every_shape_are_awaited_on_one_loop():
    loops = set()

    async def plain(completions):
        loops.add(asyncio.get_running_loop())
        return [1.0, None]

    async def adding(completions, *, more):
        return [more, more]

    class Judge:
        async def __call__(self, completions, **columns):
            loops.add(asyncio.get_running_loop())
            return np.array([3.0, 4.0])

    functions = [plain, functools.partial(adding, more=2.0), Judge(), lambda completions: adding(completions, more=9)]
    for _ in range(2):
        scores = scored(functions)
        assert scores["reward"].tolist() == [15.0, 15.0] and scores["plain"].isnan().tolist() == [False, True]
    assert len(loops) == 1, "a client that is kept from call to call belongs to its loop"


def test_async_functions_run_where_a_loop_runs_already():
    async def judge(completions):
        await asyncio.sleep(0)
        return [1.0, 2.0]

    async def notebook():
        return scored([judge])["reward"].tolist()

    assert asyncio.run(notebook()) == [1.0, 2.0]


def test_async_functions_and_servers_overlap(monkeypatch):
    """Each waits until all are under way, which they never are one after another."""
    waiting, everyone = [], threading.Event()

    def arrive(name):
        waiting.append(name)
        if len(waiting) == 4:
            everyone.set()

    async def judge(completions, name):
        arrive(name)
        while not everyone.is_set():
            await asyncio.sleep(0.001)
        return [1.0, 2.0]

    def score(server, prompts, completions, columns):
        arrive(server.url)
        assert everyone.wait(20)
        return [3.0, 4.0]

    monkeypatch.setattr(RewardServer, "score", score)
    servers = [RewardServer(f"http://{host}/score", SafeConfig()) for host in ("a", "b")]
    judges = [functools.partial(judge, name=name) for name in ("x", "y")]
    scores = scored([servers[0], judges[0], tiny_plain, servers[1], judges[1]], limit=20.0)
    assert list(scores) == ["a/score", "judge", "tiny_plain", "b/score", "judge_2", "reward"]
    assert scores["reward"].tolist() == [8.0, 12.0] and all(s >= 0 for s in scores.seconds.values())


def tiny_plain(completions):
    return [0.0] * len(completions)


def test_an_async_function_that_takes_too_long_is_named():
    stopped = []

    async def sleeps(completions):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            stopped.append(True)
            raise

    async def own(completions):
        raise TimeoutError("the API's")

    with pytest.raises(RuntimeError, match=r"reward 'sleeps' gave no answer within 0.05 s: raise async_reward_timeout"):
        scored([sleeps], limit=0.05)
    with pytest.raises(RuntimeError, match="reward 'own' raised TimeoutError: the API's"):
        scored([own])
    assert stopped == [True]


def test_an_async_function_that_blocks_the_loop_is_told(monkeypatch):
    monkeypatch.setattr("safe_train.rewards.calls.GRACE", 0.1)
    over = threading.Event()

    async def blocks(completions):
        over.wait(20)
        return [1.0, 1.0]

    try:
        with pytest.raises(RuntimeError, match="reward 'blocks' .* waits for something without `await`"):
            scored([blocks], limit=0.1)
    finally:
        over.set()


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), SystemExit(0)])
def test_an_async_function_that_fails_is_named_and_the_next_one_works(error):
    async def fails(completions):
        raise error

    async def waits(completions):
        await asyncio.sleep(60)

    async def works(completions):
        return [1.0, 1.0]

    started = time.perf_counter()
    with pytest.raises(RuntimeError, match=f"reward 'fails' raised {type(error).__name__}"):
        scored([fails, waits])
    assert scored([works])["reward"].tolist() == [1.0, 1.0] and time.perf_counter() - started < 30


def test_a_plain_function_that_fails_leaves_no_coroutine_behind():
    async def never(completions):
        return [0.0, 0.0]

    def fails(completions):
        raise KeyError("x")

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(RuntimeError, match="reward 'fails' raised KeyError"):
            scored([never, fails])
        gc.collect()
    assert not said, "coroutine was never awaited"


def test_a_server_that_answers_after_the_run_has_failed_disturbs_nobody(monkeypatch):
    threads, over, said = [], threading.Event(), []

    def score(server, prompts, completions, columns):
        threads.append(threading.current_thread())
        over.wait(20)
        return [1.0, 2.0]

    def fails(completions):
        raise KeyError("x")

    monkeypatch.setattr(RewardServer, "score", score)
    monkeypatch.setattr(threading, "excepthook", said.append)
    with pytest.raises(RuntimeError, match="reward 'fails' raised KeyError"):
        scored([RewardServer("http://a/score", SafeConfig()), fails])
    over.set()
    while not threads:
        time.sleep(0.001)
    threads[0].join(20)
    assert not said and not threads[0].is_alive()


def test_what_is_logged():
    def first(completions, log_extra, log_metric):
        log_extra("note", ["a"])
        log_extra("note", (np.float32(x) for x in [0.5]))
        log_extra("reward", torch.tensor([1, 2]))
        log_metric("share", torch.tensor(0.25))
        log_metric("share", 0.75)
        return [1.0, 2.0]

    def second(completions, log_extra, log_metric):
        log_extra("note", [{"set": {1}}, None])
        log_metric("share", 2)
        return [1.0, 2.0]

    scores = scored([first, second])
    columns = {"note": ["a", 0.5], "reward_2": [1, 2], "note_2": ["{'set': {1}}", None]}
    assert scores.columns(taken=["reward"]) == columns
    assert scores.metrics == {"share": [0.25, 0.75, 2.0]}


def test_what_cannot_be_logged_is_named():
    def short(completions, log_extra):
        log_extra("note", ["a"])
        return [1.0, 2.0]

    def word(completions, log_metric):
        log_metric("share", "much")
        return [1.0, 2.0]

    with pytest.raises(ValueError, match="'short' logged 1 values in the column 'note' by log_extra, for 2 completion"):
        scored([short])
    with pytest.raises(RuntimeError, match="reward 'word' raised ValueError: could not convert string"):
        scored([word])


def test_a_metric_takes_the_place_of_none_of_the_trainers(tmp_path):
    def judge(completions, log_metric):
        log_metric("kl", 77.0)
        return tiny.good_words(None, completions)

    row = tiny.trainer(tmp_path, judge, total_steps=1, eval_every=1).train()[0]
    assert row["kl"] != 77.0 and row["kl_2"] == 77.0 == row["eval/kl_2"] and row["eval/kl"] != 77.0


def test_a_metric_is_no_evaluation(tmp_path):
    """Else `save_best` would take it for one."""

    def judge(completions, log_metric):
        log_metric("eval/reward", 77.0)
        log_metric("layout", 3.0)
        return tiny.good_words(None, completions)

    trainer = tiny.trainer(tmp_path, judge, total_steps=2, eval_every=2, save_best=True)
    first, second = trainer.train()
    assert "eval/reward" not in first and (first["logged/eval/reward"], first["layout_2"]) == (77.0, 3.0)
    assert trainer.best_reward == second["eval/reward"] < 77.0


def test_an_extra_column_takes_the_place_of_no_other(tmp_path):
    names = ("rewards/judge", "how", "tokens", "kl", "note")

    def judge(completions, log_extra):
        for name in names:
            log_extra(name, ["mine"] * len(completions))
        return tiny.good_words(None, completions)

    tiny.trainer(tmp_path, judge, total_steps=1, eval_every=1).train()
    for name, expected in (("samples.jsonl", {}), ("evaluation.jsonl", {"how": "sampled"})):
        row = read_rows(tmp_path / name)[0]
        assert row["rewards/judge"] == row["reward"] and row["note"] == "mine" and expected.items() <= row.items()
        renamed = names[:-1] if expected else names[:1]
        assert all(row[f"{each}_2"] == "mine" for each in renamed)


def test_a_step_to_which_no_reward_applies_is_said(tmp_path, capsys):
    def some(completions, trainer_state):
        return [None if trainer_state.global_step == 0 else 1.0] * len(completions)

    tiny.trainer(tmp_path, some, total_steps=2).train()
    out = capsys.readouterr().out
    assert "step 1: every reward is None, so this step learns from KL and entropy alone" in out
    assert "step 2: every reward" not in out


def test_a_published_algorithm_that_meets_none_keeps_its_last_step(tmp_path):
    def late(completions, trainer_state):
        return [None if trainer_state.global_step == 2 else 1.0] * len(completions)

    changes = {"algorithm": "safe_paper", "minibatch_size": None, "save_every": 50, "total_steps": 4}
    with pytest.raises(ConfigError, match="has no meaning for"):
        tiny.trainer(tmp_path, late, **changes).train()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]


def returning(*columns):
    """Rewards that return these, one list each."""
    return [functools.partial(lambda completions, values: values, values=list(values)) for values in columns]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("sum_then_normalize", [1 + 2 * 3, 4, 2 * 5, NAN]),
        ("min", [1, 4, 10, NAN]),
        ("mean_minus_variance", [3.5 - 0.1 * 2.5**2, 4, 10, NAN]),
    ],
)
def test_several_rewards_become_one_and_none_is_left_out(aggregation, expected):
    functions = returning([1.0, 4.0, None, None], [3.0, None, 5.0, None])
    scores = scored(functions, count=4, weights=[1.0, 2.0], aggregation=aggregation)
    torch.testing.assert_close(scores["reward"], torch.tensor(expected).double(), equal_nan=True)
    assert scores["<lambda>_2"].isnan().tolist() == [False, True, False, True]


def test_nan_is_refused_where_none_is_meant():
    with pytest.raises(ValueError, match="returned nan .* or None where the reward does not apply"):
        scored(returning([1.0, NAN]))


def by_hand(rewards, size):
    """Advantages within the groups of what is not None, by plain Python."""
    found = []
    for start in range(0, len(rewards), size):
        known = [x for x in rewards[start : start + size] if x is not None]
        mean = sum(known) / max(len(known), 1)
        std = (sum((x - mean) ** 2 for x in known) / max(len(known) - 1, 1)) ** 0.5
        found += [0.0 if x is None else (x - mean) / (std + 1e-4) for x in rewards[start : start + size]]
    return found


def test_advantages_are_made_without_those_that_no_reward_applies_to():
    rewards = [1.0, None, 2.0, 4.0, None, None, None, None, 5.0, None, None, None, 3.0, 3.0, 3.0, None]
    known = torch.tensor([NAN if x is None else x for x in rewards], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(known, 4), torch.tensor(by_hand(rewards, 4)).double())


def test_normalize_then_sum_is_that_of_trl(tmp_path):
    """Each reward within its group, their weighted sum over the rollout: GRPOTrainer's lines, in float64.

    What a completion without an end is charged is in units of that sum.
    """
    a, b = [0.0, 1.0, 2.0, None, 5.0, 5.0, 5.0, 9.0], [100.0, 300.0, None, None, 0.0, 100.0, 0.0, 50.0]
    trainer = tiny.trainer(
        tmp_path,
        returning(a, b),
        algorithm="grpo",
        multi_objective_aggregation="normalize_then_sum",
        reward_weights=[1.0, 0.5],
        missing_eos_penalty=2.0,
        max_new_tokens=3,
        prompts_per_step=2,
        completions_per_prompt=4,
    )
    rollout, scores = trainer.collect(0)
    rollout = dataclasses.replace(rollout, ended=[True, False] * 4)
    trainer.reward_moments.update([3.0, 40.0])
    learned_from_B = learned_from(scores, trainer.args)
    experience = Experience(trainer.policy, None, rollout, trainer.args, trainer.device)
    credit(experience, trainer.training_rewards(learned_from_B, rollout), trainer.controller.last, trainer.args)

    normal = [
        None if x is None and y is None else u + 0.5 * v - 2.0 * (i % 2)
        for i, (x, y, u, v) in enumerate(zip(a, b, by_hand(a, 4), by_hand(b, 4), strict=True))
    ]
    expected = by_hand(normal, 8)
    for micro in experience:
        lengths = micro.batch.response_cu_seqlens.diff().tolist()
        for i, own_L in zip(micro.indices, micro.advantage_L.split(lengths), strict=True):
            torch.testing.assert_close(own_L, torch.full_like(own_L, expected[i]))
    assert scores["reward"][0] == 50.0 and scores["reward"][3].isnan()


def test_normalize_then_sum_needs_groups():
    with pytest.raises(ConfigError, match="multi_objective_aggregation must be sum_then_normalize, min or"):
        SafeConfig(multi_objective_aggregation="normalize_then_sum")


@pytest.mark.parametrize("algorithm", ["grpo", "safe", "ppo"])
def test_a_completion_that_no_reward_applies_to_teaches_nothing(algorithm, tmp_path):
    """The others' advantages are those of a rollout without it."""
    values = [0.5, None, 1.0, 2.0, None, None, 3.0, 3.5]
    changes = {"algorithm": algorithm, "normalize_rewards": False, "minibatch_size": None}
    trainer = tiny.trainer(tmp_path, returning(values), **changes)
    rollout, scores = trainer.collect(0)
    experience = Experience(trainer.policy, trainer.critic, rollout, trainer.args, trainer.device)
    control = trainer.update_controller(experience, scores["reward"])
    assert trainer.reward_moments.mean == 2.0 and math.isfinite(control.kl_coef)
    credit(experience, trainer.training_rewards(scores["reward"], rollout), control, trainer.args)
    absent = [i for i, value in enumerate(values) if value is None]
    known = []
    for micro in experience:
        lengths = micro.batch.response_cu_seqlens.diff().tolist()
        parts = zip(micro.indices, micro.advantage_L.split(lengths), micro.is_scored_L.split(lengths), strict=True)
        for i, advantage_L, is_scored_L in parts:
            if i in absent:
                assert not advantage_L.any() and (algorithm == "grpo" or not is_scored_L.any())
            else:
                known.append(advantage_L)
                assert is_scored_L.all()
    if algorithm != "grpo":
        torch.testing.assert_close(torch.cat(known).mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
        torch.testing.assert_close(torch.cat(known).var(correction=0), torch.tensor(1.0))
        for micro in experience:
            values_KL = (micro.values_KL + 0.01).requires_grad_()
            weight_L = torch.full_like(micro.returns_L, 0.5)
            (gradient_KL,) = torch.autograd.grad(value_loss(values_KL, micro, weight_L, trainer.args), values_KL)
            assert torch.equal(gradient_KL.eq(0).all(0), ~micro.is_scored_L)
    row = tiny.trainer(tmp_path / "run", returning(values), **changes, total_steps=1).train()[0]
    assert row["reward"] == 2.0 and row["rewards/none_fraction"] == 3 / 8
    assert all(math.isfinite(x) for x in row.values() if isinstance(x, float))


def test_a_rollout_that_no_reward_applies_to_keeps_the_language_only(tmp_path):
    silent = functools.partial(lambda completions: [None] * len(completions))
    row = tiny.trainer(tmp_path, silent, total_steps=1, eval_every=1, save_best=True).train()[0]
    assert math.isnan(row["reward"]) and math.isnan(row["eval/reward"]) and math.isfinite(row["policy_loss"])
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["reward"] is None
    assert not (tmp_path / "best").exists()
    with pytest.raises(ValueError, match="no reward applies to 8 of 8 completions"):
        tiny.trainer(tmp_path / "paper", silent, algorithm=PAPER[0], minibatch_size=None, total_steps=1).train()


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens_reach_the_reward_when_asked_for(skip, tmp_path):
    """A token that opens a tool call is special, and so is the one that ends the turn."""
    from safe_train.sampling.rollout import Rollout

    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["under"]})
    tokens = [[3, 9, 4, 1], [9, 3]]
    rollout = Rollout.build(tokenizer, [None] * 2, tokens, [[0.0] * 4, [0.0] * 2], [1], skip_special_tokens=skip)
    assert rollout.texts == (["a cat", "a"] if skip else ["a under cat", "under a"])
    assert rollout.completions == tokens
    seen = []

    def judge(prompts, completions, completion_ids):
        seen.extend(zip(completions, completion_ids, strict=True))
        return [0.0] * len(completions)

    tiny.trainer(tmp_path, judge, total_steps=1, reward_skip_special_tokens=skip).train()
    plain = tiny.tokenizer()
    for text, ids in seen:
        shown = ids if skip or ids[-1] != plain.eos_token_id else ids[:-1]
        assert text == plain.decode(shown, skip_special_tokens=skip)


def test_a_reward_that_changes_the_directory_does_not_move_the_run(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    seen = []

    def wanders(prompts, completions):
        seen.append(os.getcwd())
        os.chdir(tmp_path / "there")
        return tiny.good_words(prompts, completions)

    trainer = tiny.trainer("run", wanders, total_steps=2)
    os.chdir(tmp_path)  # as user code may between the two
    trainer.train()
    assert os.getcwd() == str(tmp_path) and seen == [str(tmp_path)] * 2
    assert (tmp_path / "here" / "run" / "checkpoints" / "step-2").is_dir()
    assert not list((tmp_path / "there").iterdir()) and not (tmp_path / "run").exists()


def test_what_is_handed_over_is_not_called_before_the_run_and_what_is_named_is(tmp_path):
    (tmp_path / "mine.py").write_text(
        "calls = []\ndef judge(completions):\n    calls.append(1)\n    return [None, 1.0]\n"
    )
    prompts = tiny.trainer(tmp_path / "run").prompts.at(0, 2)
    (judge,) = load_rewards([f"{tmp_path}/mine.py:judge"], SafeConfig(), torch.device("cpu"), prompts)
    assert judge.__globals__["calls"] == [1]
    load_rewards([judge], SafeConfig(), torch.device("cpu"), prompts)
    assert judge.__globals__["calls"] == [1]


def test_the_function_of_the_docs_runs():
    page = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text()
    space = {}
    exec(page.partition("```python\n")[2].partition("```")[0], space)
    scores = Rewards([space["judged"]])(["p", "q"], ["it is 4 here", "5"], {"answer": ["4", None]})
    assert scores["reward"].tolist()[0] == 1.0 and scores["reward"].isnan().tolist() == [False, True]
    assert scores.metrics == {"words": [2.5]}
