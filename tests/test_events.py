"""Callbacks: functions, and transformers' own kind with its events, state and control."""

import json
import os
import random

import numpy as np
import processes
import pytest
import tiny
import torch
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback, ExportableState, ProgressCallback

from safe_train.config import ConfigError
from safe_train.run import events
from safe_train.run.checkpoints import Checkpoints
from safe_train.run.report import read_rows
from safe_train.trainer import SafeTrainer


class Recorder(TrainerCallback):
    """Notes every event that transformers knows."""

    def __init__(self):
        self.seen, self.given = [], {}


def noting(name):
    def event(self, args, state, control, **found):
        self.seen.append((name.removeprefix("on_"), state.global_step))
        self.given[name] = {"args": args, "state": state, "control": control, **found}

    return event


for each in dir(TrainerCallback):
    if each.startswith("on_"):
        setattr(Recorder, each, noting(each))


def run(folder, *callbacks, resume=False, **settings):
    trainer = tiny.trainer(folder, **settings)
    trainer.callbacks = events.instances(callbacks)
    return trainer, trainer.train(resume_from_checkpoint=resume)


def test_the_events_come_in_transformers_order_with_what_it_gives(tmp_path):
    recorder = Recorder()
    trainer, history = run(tmp_path, recorder, total_steps=3, eval_every=2, save_every=2)
    assert recorder.seen == [
        ("init_end", 0), ("train_begin", 0),
        ("step_begin", 0), ("step_end", 1), ("log", 1),
        ("step_begin", 1), ("step_end", 2), ("evaluate", 2), ("log", 2), ("save", 2),
        ("step_begin", 2), ("step_end", 3), ("log", 3), ("save", 3), ("train_end", 3),
    ]  # fmt: skip
    found = recorder.given["on_evaluate"]
    assert found["metrics"]["eval_reward"] == history[1]["eval/reward"]
    assert recorder.given["on_log"]["logs"] == history[2]
    assert found["model"] is trainer.policy.model and found["processing_class"] is trainer.tokenizer
    assert found["optimizer"] is trainer.engine.optimizer and found["args"].output_dir == str(tmp_path)
    state = recorder.given["on_train_end"]["state"]
    assert (state.max_steps, state.epoch, state.is_world_process_zero) == (3, 12 / 5, True)
    assert [row["step"] for row in state.log_history] == [1, 2, 3] and state.best_metric == history[1]["eval/reward"]


class Stopping(TrainerCallback):
    """Ends the run from one of its events."""

    def __init__(self, event, step):
        def stop(args, state, control, **found):
            if state.global_step == step:
                control.should_training_stop = True
                return control
            return None

        setattr(self, event, stop)


def stopping_function(trainer, metrics):
    trainer.control.should_training_stop = trainer.step == 3


@pytest.mark.parametrize("event", ["on_step_end", "on_evaluate", "on_log", "function"])
def test_a_callback_that_stops_the_run_leaves_it_saved_reported_and_resumable(event, tmp_path, monkeypatch, capsys):
    reported = []
    monkeypatch.setattr("safe_train.run.run_folder.write_report", lambda runs, target: reported.append(target))
    settings = {"total_steps": 5, "save_every": 2, "eval_every": 1}
    _, whole = run(tmp_path / "whole", **settings)
    callback = stopping_function if event == "function" else Stopping(event, 3)
    _, first = run(tmp_path / "run", callback, **settings)
    assert len(first) == 3 and reported[-1] == tmp_path / "run" / "report.png"
    assert "stopped after step 3, with a checkpoint: a callback asked for it" in capsys.readouterr().out
    assert Checkpoints(tmp_path / "run", 2).complete()[-1].name == "step-3"
    _, rest = run(tmp_path / "run", resume=True, **settings)
    assert [row["policy_loss"] for row in first + rest] == [row["policy_loss"] for row in whole]


class Asking(TrainerCallback):
    def on_step_end(self, args, state, control, **found):
        control.should_save = state.global_step == 1
        control.should_evaluate = state.global_step == 2


def test_a_callback_asks_for_a_checkpoint_and_an_evaluation(tmp_path):
    _, history = run(tmp_path, Asking, total_steps=3, save_every=3)
    assert [path.name for path in Checkpoints(tmp_path, 2).complete()] == ["step-1", "step-3"]
    assert ["eval/reward" in row for row in history] == [False, True, False]


def falling(monkeypatch, rewards):
    """Evaluations with these rewards, by step."""
    own = SafeTrainer.evaluate

    def evaluate(self):
        found = own(self)
        object.__setattr__(found, "reward", rewards[self.step - 1])
        return found

    monkeypatch.setattr(SafeTrainer, "evaluate", evaluate)


@pytest.mark.parametrize("stops", [(), (2,), (1, 3)], ids=str)
def test_transformers_early_stopping_waits_as_long_whether_resumed_or_not(stops, tmp_path, monkeypatch):
    falling(monkeypatch, [0.1, 0.5, 0.4, 0.3, 0.2, 0.9, 0.9])
    settings = {"eval_every": 1, "save_every": 1}
    for step in stops:
        run(tmp_path, EarlyStoppingCallback(3), resume=step > stops[0], total_steps=step, **settings)
    trainer, _ = run(tmp_path, EarlyStoppingCallback(3), resume=bool(stops), total_steps=7, **settings)
    assert trainer.step == 5  # three evaluations after that of step 2 were no better
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in trainer.state.log_history] == [1, 2, 3, 4, 5]


class Drawing(TrainerCallback):
    """Uses up random numbers in every event."""


def draw(self, args, state, control, **found):
    random.random(), np.random.rand(), torch.rand(3)


for each in events.EVENTS:
    setattr(Drawing, each, draw)


def test_events_have_random_numbers_of_their_own(tmp_path):
    _, plain = run(tmp_path / "a", eval_every=2)
    _, drawn = run(tmp_path / "b", Drawing, eval_every=2)
    assert [row["policy_loss"] for row in plain] == [row["policy_loss"] for row in drawn]


class Failing(TrainerCallback):
    def on_step_end(self, args, state, control, **found):
        if state.global_step == 2:
            raise KeyError("mine")


def test_an_event_that_fails_stops_the_run_with_its_step_saved_and_logged(tmp_path):
    with pytest.raises(KeyError, match="mine"):
        run(tmp_path, Failing(), total_steps=4, save_every=4)
    assert Checkpoints(tmp_path, 2).complete()[-1].name == "step-2"
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]


def test_transformers_own_callbacks_run_and_what_is_never_called_is_said(tmp_path, capsys):
    run(tmp_path, ProgressCallback, PrinterCallback(), DefaultFlowCallback, eval_every=2)
    said = capsys.readouterr().out
    assert "callback ProgressCallback: on_predict, on_prediction_step is never called here" in said
    assert "callback DefaultFlowCallback: on_epoch_end is never called here" in said
    assert "callback PrinterCallback" not in said and "'eval/reward'" in said


def test_early_stopping_without_evaluations_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="EarlyStoppingCallback stops by evaluations, .* set eval_every"):
        run(tmp_path, EarlyStoppingCallback(3), total_steps=1)


def test_a_resumed_run_may_have_other_callbacks(tmp_path):
    run(tmp_path, EarlyStoppingCallback(3), total_steps=2, eval_every=1)
    state = json.loads((tmp_path / "checkpoints" / "step-2" / "state.json").read_text())
    assert state["callbacks"]["EarlyStoppingCallback"][0]["args"]["early_stopping_patience"] == 3
    _, rest = run(tmp_path, Recorder(), resume=True, total_steps=3, eval_every=1)
    assert len(rest) == 1


def stopped_by_the_second_process(folder):
    chosen = [Stopping("on_step_end", 2)] if os.environ["RANK"] == "1" else [Recorder()]
    trainer, history = run(folder, *chosen, total_steps=4)
    return trainer.step, len(history), trainer.control.should_training_stop


def test_a_callback_of_one_process_stops_all(tmp_path):
    for outcome in processes.run(stopped_by_the_second_process, 2, tmp_path):
        assert outcome.result == (2, 2, True), outcome.error


class Counting(TrainerCallback, ExportableState):
    """Has a state of its own: how often each event behind a step came."""

    def __init__(self, logs=0, saves=0):
        self.logs, self.saves = logs, saves

    def on_log(self, args, state, control, **found):
        self.logs += 1

    def on_save(self, args, state, control, **found):
        self.saves += 1

    def state(self):
        return {"args": {}, "attributes": {"logs": self.logs, "saves": self.saves}}


def test_a_resumed_run_knows_what_callbacks_counted_in_the_events_of_the_saved_step(tmp_path):
    run(tmp_path, Counting(), total_steps=2, save_every=1)
    callback = Counting()
    run(tmp_path, callback, resume=True, total_steps=3, save_every=1)
    assert (callback.logs, callback.saves) == (3, 3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-2", "step-3"]
    assert not list((tmp_path / "checkpoints" / "step-3").glob("unfinished*"))
