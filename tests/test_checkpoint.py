"""A run that was stopped at any instant continues as if it had not been."""

import errno
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import tiny
import torch
from processes import Command
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from safe_train import SafeTrainer
from safe_train.cli import main
from safe_train.config import ConfigError, SafeConfig
from safe_train.data.prompts import PromptDataset
from safe_train.randomness import python_generators, restore_generators, torch_generators
from safe_train.run.checkpoints import Checkpoints, discard
from safe_train.run.run_folder import commit, keep_rows
from safe_train.run.signals import Stopped

REWARD = """
import time

def slow_reward(completions, **columns):
    time.sleep({seconds})
    return [float(sum(word in ("good", "happy") for word in text.split())) for text in completions]
"""


def metrics(run: Path) -> list[dict]:
    """The rows of a run without what the clock decides."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("time/", "memory/", "tokens_per_second")
    return [{k: v for k, v in row.items() if not k.startswith(clock)} for row in rows]


def prepare(folder: Path, seconds: float = 0.0, **changes) -> list[str]:
    """A tiny model, prompts and a reward on disk, and the `key=value` arguments of a run on them."""
    tiny.model().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.PROMPTS))
    (folder / "reward.py").write_text(REWARD.format(seconds=seconds))
    names = {
        "model": f"{folder}/model",
        "dataset": f"{folder}/prompts.jsonl",
        "reward": f"{folder}/reward.py:slow_reward",
    }
    sizes = {"prompts_per_step": 4, "completions_per_prompt": 2, "max_new_tokens": 6, "lora_r": 4, "minibatch_size": 4}
    values = (
        {"use_cpu": "true", "learning_rate": 1e-2, "window": 2, "save_every": 2, "samples_every": 1}
        | names
        | sizes
        | changes
    )
    return [f"{key}={value}" for key, value in values.items()]


def safe_train(*arguments: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "safe_train.cli", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def rows_written(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.integration
def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    settings = prepare(tmp_path, seconds=0.3, total_steps=8)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    uninterrupted = Command(main, ["run", *settings, f"output_dir={whole}"], tmp_path / "whole.txt")
    victim = Command(main, ["run", *settings, f"output_dir={cut}"], tmp_path / "victim.txt")
    deadline = time.monotonic() + 240
    while rows_written(cut) < 5 and victim.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert 5 <= rows_written(cut) < 8, "the run was to be killed in its middle"
    resumed = Command(main, ["run", *settings, f"output_dir={cut}", "--resume"], tmp_path / "resumed.txt")
    for process in (uninterrupted, resumed):
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    assert metrics(cut) == metrics(whole)
    assert [row["step"] for row in metrics(cut)] == list(range(1, 9))
    for name in ("samples.jsonl", "tokens.jsonl"):
        assert (cut / name).read_text() == (whole / name).read_text() != ""


@pytest.mark.integration
def test_a_terminated_run_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path):
    run = tmp_path / "run"
    settings = prepare(tmp_path, seconds=0.2, total_steps=50, save_every=50)
    victim = safe_train("run", *settings, f"output_dir={run}")
    deadline = time.monotonic() + 240
    while rows_written(run) < 2 and victim.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    victim.send_signal(signal.SIGTERM)
    output, _ = victim.communicate(timeout=60)
    step = rows_written(run)
    assert victim.returncode == 143 and 2 <= step < 50, output
    command = f"safe-train run --resume output_dir={run}"
    assert f"SIGTERM: stopped after step {step}, with a checkpoint; continue with {command}" in output
    assert (run / "checkpoints" / f"step-{step}" / "state.json").exists()


@pytest.fixture
def ctrl_c():
    """Python's own handling of it, also where the tests run in the background and ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted_by(*signals):
    """A callback that sends them after the first step."""

    def interrupt(trainer, row):
        if trainer.step == 1:
            for number in signals:
                os.kill(os.getpid(), number)

    return interrupt


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_its_step_and_the_run_resumes(number, code, tmp_path, ctrl_c):
    values = {"total_steps": 4, "save_every": 4, "window": 2}
    tiny.trainer(tmp_path / "whole", **values).train()
    trainer, handlers = tiny.trainer(tmp_path / "cut", **values), [signal.getsignal(s) for s in (2, 15)]
    trainer.callbacks = [interrupted_by(number)]
    with pytest.raises(Stopped) as stopped:
        trainer.train()
    assert stopped.value.code == code and rows_written(tmp_path / "cut") == 2
    assert [signal.getsignal(s) for s in (2, 15)] == handlers
    tiny.trainer(tmp_path / "cut", **values).train(resume_from_checkpoint=True)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_a_second_ctrl_c_interrupts_at_once(tmp_path, ctrl_c):
    trainer = tiny.trainer(tmp_path)
    trainer.callbacks = [interrupted_by(signal.SIGINT, signal.SIGINT)]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()


def test_an_ignored_ctrl_c_stays_ignored(tmp_path, ctrl_c):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer = tiny.trainer(tmp_path)
    trainer.callbacks = [interrupted_by(signal.SIGINT, signal.SIGINT)]
    assert len(trainer.train()) == 3 and signal.getsignal(signal.SIGINT) == signal.SIG_IGN


DECAYED = {"warmup_steps": 1, "lr_scheduler_type": "cosine"}


@pytest.mark.parametrize(
    "settings", [{}, {"lora_r": 0}, {"algorithm": "grpo"}, {"max_preview_kl": 0.01}, DECAYED], ids=str
)
def test_resumed_from_any_checkpoint_equals_uninterrupted(settings, tmp_path):
    values = {"total_steps": 5, "save_every": 1, "keep_checkpoints": 9, "window": 2} | settings
    tiny.trainer(tmp_path, **values).train()
    whole = metrics(tmp_path)
    tiny.trainer(tmp_path, **values).train(resume_from_checkpoint=tmp_path / "checkpoints" / "step-3")
    assert metrics(tmp_path) == whole


def test_a_checkpoint_loads_with_peft_and_transformers(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = torch.tensor([[3, 4, 5]])
    for lora_r, load in (
        (4, lambda folder: PeftModel.from_pretrained(tiny.model(), folder)),
        (0, AutoModelForCausalLM.from_pretrained),
    ):
        trainer = tiny.trainer(tmp_path / str(lora_r), lora_r=lora_r)
        trainer.train()
        folder = tmp_path / str(lora_r) / "checkpoints" / "step-3" / "policy"
        assert torch.equal(load(folder)(ids).logits, trainer.policy.model(ids).logits)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert (
            tokenizer("a dog sat").input_ids == trainer.tokenizer("a dog sat").input_ids and tokenizer.eos_token_id == 1
        )


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path):
    tiny.trainer(tmp_path / "whole").train()

    def dies_at_step_2(trainer, row):
        if trainer.step == 2:
            raise KeyboardInterrupt

    trainer = tiny.trainer(tmp_path / "cut", save_every=3)
    trainer.callbacks = [dies_at_step_2]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert rows_written(tmp_path / "cut") == 2 and not Checkpoints(tmp_path / "cut", 2).complete()
    tiny.trainer(tmp_path / "cut").train(resume_from_checkpoint=True)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_a_run_whose_checkpoints_are_gone_is_not_erased(tmp_path):
    tiny.trainer(tmp_path, total_steps=3, save_every=2).train()
    before = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "checkpoints").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="has 3 steps, and .*checkpoints no checkpoint to continue from"):
        tiny.trainer(tmp_path, save_every=9).train(resume_from_checkpoint=True)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert SafeConfig.load(tmp_path / "config.yaml").save_every == 2


def test_a_run_that_is_wound_back_keeps_its_new_checkpoints(tmp_path):
    tiny.trainer(tmp_path, total_steps=4, save_every=1, keep_checkpoints=4).train()
    rewound = tiny.trainer(tmp_path, total_steps=2, save_every=1, keep_checkpoints=1)
    rewound.train(resume_from_checkpoint=tmp_path / "checkpoints" / "step-1")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]


def test_a_deletion_that_is_cut_short_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    tiny.trainer(tmp_path, total_steps=1, save_every=1).train()
    (checkpoint,) = Checkpoints(tmp_path, 1).complete()
    monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors=False: ignore_errors or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        discard(checkpoint)
    assert Checkpoints(tmp_path, 1).complete() == []


def test_only_the_newest_are_kept_and_unfinished_ones_are_ignored(tmp_path):
    trainer = tiny.trainer(tmp_path, total_steps=5, save_every=1, keep_checkpoints=2)
    trainer.train()
    checkpoints = Checkpoints(tmp_path, 2)
    assert [path.name for path in checkpoints.complete()] == ["step-4", "step-5"]
    (tmp_path / "checkpoints" / "unfinished-6").mkdir()
    (tmp_path / "checkpoints" / "step-5-best").mkdir()  # a copy that the user made
    fresh = tiny.trainer(tmp_path, total_steps=5)
    checkpoints.load(fresh)
    assert fresh.step == 5
    checkpoints.save(fresh)
    assert (tmp_path / "checkpoints" / "step-5-best").exists()


def test_a_crash_while_saving_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    trainer = tiny.trainer(tmp_path, total_steps=2, save_every=1)
    checkpoints = Checkpoints(tmp_path, 2)
    trainer.train()
    trainer.step = 3
    monkeypatch.setattr("safe_train.run.checkpoint.flush", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoints.save(trainer)
    assert [path.name for path in checkpoints.complete()] == ["step-1", "step-2"]


FULL = os.strerror(errno.ENOSPC)


@pytest.mark.parametrize(
    ("writer", "error"),
    [
        ("flush", OSError(errno.ENOSPC, FULL)),
        ("torch.save", RuntimeError(f"PytorchStreamWriter failed writing file: {FULL}")),
        ("save_file", SafetensorError(f"I/O error: {FULL} (os error 28)")),
    ],
    ids=["flush", "torch", "safetensors"],
)
def test_a_full_disk_while_saving_stops_the_run_and_leaves_the_checkpoint_before(writer, error, tmp_path, monkeypatch):
    def fails(*arguments, **options):
        raise error

    trainer = tiny.trainer(tmp_path, total_steps=3, save_every=1)
    trainer.callbacks = [lambda *_: monkeypatch.setattr(f"safe_train.run.checkpoint.{writer}", fails)]
    with pytest.raises(OSError, match=rf"cannot write .*step-2: .*{FULL}.*step-1 is whole: continue from it"):
        trainer.train()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]
    monkeypatch.undo()
    tiny.trainer(tmp_path, total_steps=3, save_every=1).train(resume_from_checkpoint=True)
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_while_logging_stops_the_run(tmp_path):
    def fill_up(trainer, row):
        (tmp_path / "metrics.jsonl").unlink()
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")

    trainer = tiny.trainer(tmp_path, save_every=1)
    trainer.callbacks = [fill_up]
    with pytest.raises(OSError, match=rf"cannot write .*metrics.jsonl: .*{FULL}.*from its last checkpoint with"):
        trainer.train()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("file", "settings"),
    [
        ("state.json", {}),
        ("optimizers.pt", {}),
        ("critic.safetensors", {}),
        ("random.safetensors", {}),
        ("policy/adapter_model.safetensors", {}),
        ("policy/model.safetensors", {"lora_r": 0}),
    ],
)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(file, settings, tmp_path, capsys):
    values = {"total_steps": 3, "save_every": 1} | settings
    tiny.trainer(tmp_path, **values).train()
    whole = metrics(tmp_path)
    cut_short(tmp_path / "checkpoints" / "step-3" / file)
    tiny.trainer(tmp_path, **values).train(resume_from_checkpoint=True)
    printed = capsys.readouterr().out
    assert "step-3 is damaged" in printed and re.search("continuing from .*step-2", printed)
    assert metrics(tmp_path) == whole
    for step in (2, 3):
        cut_short(tmp_path / "checkpoints" / f"step-{step}" / file)
    with pytest.raises(ConfigError, match="no checkpoint can be read: .*step-3 is damaged.*step-2 is damaged"):
        tiny.trainer(tmp_path, **values).train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="step-2 is damaged.*--resume takes the newest"):
        tiny.trainer(tmp_path, **values).train(resume_from_checkpoint=tmp_path / "checkpoints" / "step-2")


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_run_that_was_wound_back_and_killed_does_not_jump_forward_again(elsewhere, tmp_path):
    run, source = tmp_path / "run", tmp_path / ("source" if elsewhere else "run")
    values = {"total_steps": 5, "save_every": 1, "keep_checkpoints": 9, "window": 2}
    for folder in {run, source}:
        tiny.trainer(folder, **values).train()
    expected = metrics(source)

    def dies(trainer, row):
        raise KeyboardInterrupt

    wound_back = tiny.trainer(run, **values | {"save_every": 9})
    wound_back.callbacks = [dies]
    with pytest.raises(KeyboardInterrupt):
        wound_back.train(resume_from_checkpoint=source / "checkpoints" / "step-2")
    again = tiny.trainer(run, **values)
    again.callbacks = [lambda trainer, row: started.append(trainer.step)]
    started = []
    again.train(resume_from_checkpoint=True)
    assert started == [3, 4, 5] and metrics(run) == expected
    assert not Checkpoints(run, 9).wound_back_to.exists()


def test_random_states_survive_a_file(tmp_path):
    from safetensors.torch import load_file, save_file

    def draw():
        return torch.rand(3).tolist(), np.random.randn(2).tolist(), random.gauss(0, 1)

    np.random.randn(), random.gauss(0, 1)  # each leaves a second number for the next call
    save_file(torch_generators(), tmp_path / "random.safetensors")
    numbers = json.loads(json.dumps(python_generators()))
    expected = draw()
    restore_generators(load_file(tmp_path / "random.safetensors"), numbers)
    assert draw() == expected


def test_a_row_that_a_crash_cut_short_is_dropped(tmp_path):
    tiny.trainer(tmp_path, total_steps=2, save_every=1).train()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    tiny.trainer(tmp_path, total_steps=3, save_every=1).train(resume_from_checkpoint=True)
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2, 3]


def test_a_kill_while_rows_are_dropped_loses_none(tmp_path, monkeypatch):
    rows = tmp_path / "metrics.jsonl"
    rows.write_text('{"step": 1}\n{"step": 2}\n')
    monkeypatch.setattr(Path, "replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        keep_rows(rows, 1)
    assert rows.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_machine_without_git_runs(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert commit() is None


def test_resuming_keeps_the_settings_of_the_run(tmp_path):
    run = f"output_dir={tmp_path / 'run'}"
    assert main(["run", *prepare(tmp_path, total_steps=1, beta=0.5), run]) == 0
    assert main(["run", run, "--resume", "total_steps=2"]) == 0
    settings = SafeConfig.load(tmp_path / "run" / "config.yaml")
    assert (settings.beta, settings.total_steps, rows_written(tmp_path / "run")) == (0.5, 2, 2)


def test_a_run_from_python_is_never_continued_with_the_demos_model_prompts_or_reward(tmp_path, capsys):
    args = tiny.settings(tmp_path / "run", total_steps=1)
    names = prepare(tmp_path)
    options = {"args": args, "processing_class": tiny.tokenizer()}
    SafeTrainer(tiny.model(), [tiny.good_words, "vader"], train_dataset=tiny.PROMPTS, **options).train()
    assert args.reward == []
    saved = SafeConfig.load(tmp_path / "run" / "config.yaml")
    assert saved.model == "<python object LlamaForCausalLM>" and saved.dataset == "<python object list>"
    assert saved.reward == ["<python object good_words>", "vader"] and saved.eval_dataset is None
    given = [f"output_dir={tmp_path / 'run'}", "total_steps=2"]
    evaluates = ["eval", str(tmp_path / "run"), f"eval_dataset={tmp_path / 'prompts.jsonl'}"]
    for kind in ("model", "reward", "dataset"):
        for command in (["run", "--resume"], evaluates)[: 1 if kind == "dataset" else 2]:
            assert main([*command, *given]) == 2
            assert f"{kind} is <python object" in capsys.readouterr().err
        given += [pair for pair in names if pair.startswith(kind + "=")]
    assert main(["run", "--resume", *given]) == 0 and rows_written(tmp_path / "run") == 2


def test_names_given_in_python_are_saved_as_given(tmp_path):
    names = dict(pair.split("=") for pair in prepare(tmp_path))
    args = tiny.settings(tmp_path / "run", total_steps=1)
    prompts = {"train_dataset": names["dataset"], "eval_dataset": names["dataset"]}
    trainer = SafeTrainer(names["model"], names["reward"], args, **prompts)
    assert (trainer.args.model, trainer.args.reward) == (names["model"], [names["reward"]])
    assert trainer.args.dataset == trainer.args.eval_dataset == names["dataset"]
    assert len(trainer.eval_prompts) == len(tiny.PROMPTS)


@pytest.mark.parametrize("absent", [("model",), ("dataset",), ("reward",), ("dataset", "reward")])
def test_a_run_that_was_not_told_what_it_needs_lists_it(absent, tmp_path, capsys):
    given = [pair for pair in prepare(tmp_path) if not pair.startswith(tuple(f"{name}=" for name in absent))]
    assert main(["run", *given, f"output_dir={tmp_path / 'run'}"]) == 2
    assert f"a run needs {', '.join(absent)}: name" in capsys.readouterr().err and not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="a run needs dataset: name it .* in Python as model, train_dataset"):
        SafeTrainer(tiny.model(), tiny.good_words, tiny.settings(tmp_path), processing_class=tiny.tokenizer())


def test_an_evaluation_needs_no_training_prompts(tmp_path):
    names = dict(pair.split("=") for pair in prepare(tmp_path))
    args = tiny.settings(tmp_path / "run", total_steps=1, eval_dataset=names["dataset"])
    SafeTrainer(names["model"], names["reward"], args, train_dataset=tiny.PROMPTS).train()
    assert main(["eval", str(tmp_path / "run")]) == 0


def test_adapters_of_another_scale_are_refused(tmp_path):
    tiny.trainer(tmp_path, lora_r=4, lora_alpha=8, total_steps=1).train()
    with pytest.raises(ConfigError, match="its adapters have lora_alpha 8, not 4"):
        tiny.trainer(tmp_path, lora_r=4, lora_alpha=4, total_steps=2).train(resume_from_checkpoint=True)


def test_a_resumed_run_takes_the_learning_rates_it_is_given(tmp_path):
    tiny.trainer(tmp_path, total_steps=1).train()
    changed = tiny.trainer(tmp_path, total_steps=2, learning_rate=1e-6, critic_learning_rate=1e-5, weight_decay=0.1)
    changed.train(resume_from_checkpoint=True)
    policy, critic = (x.param_groups[0] for x in (changed.engine.optimizer, changed.critic_optimizer))
    assert (policy["lr"], policy["weight_decay"], critic["lr"]) == (1e-6, 0.1, 1e-5)


def test_resuming_needs_a_run_or_a_config(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = [*prepare(tmp_path, total_steps=2, save_every=1), "output_dir=run"]
    typo = [*settings[:-1], "output_dir=rum"]
    for command in (["--resume"], ["--resume-from", "rum/checkpoints/step-1"]):
        assert main(["run", *typo, *command]) == 2
        assert "rum holds no run to resume (no config.yaml)" in capsys.readouterr().err
    (tmp_path / "mine.yaml").write_text("\n".join(pair.replace("=", ": ", 1) for pair in settings))
    assert main(["run", "--config", "mine.yaml", "--resume"]) == 0
    assert "starting at step 0" in capsys.readouterr().out
    before = metrics(tmp_path / "run")
    assert main(["run", "--resume-from", "run/checkpoints/step-1"]) == 0
    assert "continuing" not in capsys.readouterr().out and metrics(tmp_path / "run") == before
    assert not (tmp_path / "rum").exists() and not (tmp_path / "runs").exists()


def test_an_existing_run_is_not_touched_by_accident(tmp_path, capsys):
    settings = [*prepare(tmp_path, total_steps=1), f"output_dir={tmp_path / 'run'}"]
    assert main(["run", *settings]) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert main(["run", *settings]) == 2
    assert "already holds a run; continue it with --resume (in Python train(resume_" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert main(["run", *settings, "--overwrite", f"model={tmp_path / 'typo'}"]) == 2
    assert main(["demo", *settings]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert main(["run", *settings, "--overwrite", "seed=5"]) == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_text() != before
    assert main(["run", *settings[:-1], f"output_dir={tmp_path / 'model'}", "--overwrite"]) == 2
    assert "is not a run folder" in capsys.readouterr().err and (tmp_path / "model" / "config.json").exists()


def test_evaluating_and_drawing_a_finished_run(tmp_path, capsys):
    run = tmp_path / "run"
    settings = [*prepare(tmp_path, total_steps=2), f"output_dir={run}", f"eval_dataset={tmp_path / 'prompts.jsonl'}"]
    assert main(["run", *settings, "eval_completions=4"]) == 0
    assert main(["eval", str(run)]) == 0
    assert "held-out completions" in capsys.readouterr().out
    result = json.loads((run / "eval" / "step-2" / "evaluation.json").read_text())
    assert result["step"] == 2 and result["before"]["kl"] == pytest.approx(0, abs=1e-6) and result["after"]["kl"] > 0
    assert main(["report", str(run), "--output", str(tmp_path / "picture.png")]) == 0
    assert (tmp_path / "picture.png").exists()
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert main(["eval", str(tmp_path / "nothing")]) == 2
    assert "is not a run folder" in capsys.readouterr().err


GENERATION = {
    "as a chat model has it": {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 4]},
    "odd": {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05},  # transformers would not save it
}


@pytest.mark.parametrize("own", GENERATION)
def test_a_model_is_saved_with_its_own_settings_for_generation(own, tmp_path):
    model = tiny.model()
    model.generation_config.update(**GENERATION[own])
    before = model.generation_config.to_diff_dict()
    trainer = tiny.trainer(tmp_path, policy=model, lora_r=0, total_steps=1)
    trainer.train()
    saved = tmp_path / "checkpoints" / "step-1" / "policy"
    assert AutoModelForCausalLM.from_pretrained(saved).generation_config.to_diff_dict() == before
    assert trainer.policy.model.generation_config.to_diff_dict() == before
    resumed = tiny.trainer(tmp_path, policy=AutoModelForCausalLM.from_pretrained(saved), lora_r=0, total_steps=2)
    with pytest.raises(ConfigError, match="not those of the run's beginning"):  # the reference is not the policy
        resumed.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("changes", [{"lora_r": 2}, {"critic": "single"}, {"lora_r": 0}], ids=str)
def test_a_checkpoint_of_other_settings_is_refused(changes, tmp_path):
    tiny.trainer(tmp_path).train()
    with pytest.raises(ConfigError, match="does not fit this run's settings"):
        tiny.trainer(tmp_path, **changes).train(resume_from_checkpoint=True)


def test_wrong_checkpoints_are_named(tmp_path):
    with pytest.raises(ConfigError, match="is not a checkpoint"):
        tiny.trainer(tmp_path).train(resume_from_checkpoint=tmp_path / "nothing")


def test_a_run_ends_saved_at_the_first_step_whose_kl_is_above_stop_kl(tmp_path, capsys):
    rows = tiny.trainer(tmp_path / "free", total_steps=6, learning_rate=0.1).train()
    kls = [row["kl"] for row in rows]
    limit = kls[2] * 0.99
    expected = next(step for step, kl in enumerate(kls, 1) if kl > limit)
    assert 1 < expected < 6
    ended = tiny.trainer(tmp_path / "run", total_steps=6, learning_rate=0.1, save_every=9, stop_kl=limit).train()
    assert [row["kl"] for row in ended] == kls[:expected]
    assert f"stopped after step {expected}, with a checkpoint: its KL" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{expected}"]
    values = {"total_steps": 6, "learning_rate": 0.1}
    tiny.trainer(tmp_path / "run", **values).train(resume_from_checkpoint=True)
    assert [row["kl"] for row in metrics(tmp_path / "run")] == kls


def test_the_best_evaluation_keeps_its_checkpoint_also_through_a_resume(tmp_path, monkeypatch):
    rewards = {1: 0.2, 2: 0.5, 3: 0.4, 4: 0.5, 5: 0.1, 6: 0.6}  # by step; the first of two equal ones stays

    def run(total_steps, **resume):
        trainer = tiny.trainer(
            tmp_path, total_steps=total_steps, save_best=True, eval_every=1, save_every=1, keep_checkpoints=1
        )
        trainer.evaluate = lambda: SimpleNamespace(numbers=lambda: {"reward": rewards[trainer.step]}, rows=lambda _: [])
        trainer.train(**resume)
        return [path.name for path in (tmp_path / "best").iterdir()]

    assert run(3) == ["step-2"]
    assert run(5, resume_from_checkpoint=True) == ["step-2"]
    assert run(6, resume_from_checkpoint=True) == ["step-6"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-6"]
    best = tiny.trainer(tmp_path / "elsewhere", total_steps=7)
    assert len(best.train(resume_from_checkpoint=tmp_path / "best" / "step-6")) == 1


def test_the_best_of_an_abandoned_branch_goes_with_it(tmp_path):
    rewards = {1: 0.2, 2: 0.3, 3: 0.9, 4: 0.1}

    def run(total_steps, **resume):
        trainer = tiny.trainer(tmp_path, total_steps=total_steps, save_best=True, eval_every=1, save_every=1)
        trainer.evaluate = lambda: SimpleNamespace(numbers=lambda: {"reward": rewards[trainer.step]}, rows=lambda _: [])
        trainer.train(**resume)
        return [path.name for path in (tmp_path / "best").iterdir()]

    assert run(3) == ["step-3"]
    rewards[3] = 0.1
    assert run(4, resume_from_checkpoint=tmp_path / "checkpoints" / "step-2") == ["step-3"]  # the best there is


def test_adams_betas_are_those_of_the_settings_also_on_resume(tmp_path):
    tiny.trainer(tmp_path, total_steps=1, adam_beta1=0.8).train()
    changed = tiny.trainer(tmp_path, total_steps=2, adam_beta1=0.7, adam_beta2=0.95)
    assert changed.engine.optimizer.param_groups[0]["betas"] == (0.7, 0.95)
    changed.train(resume_from_checkpoint=True)
    assert changed.engine.optimizer.param_groups[0]["betas"] == (0.7, 0.95)


SIXTEEN = [{"prompt": word} for word in "the a cat dog sat ran on under mat tree good bad happy sad very not".split()]


def seen_by(folder, resume, rows=SIXTEEN, **settings) -> list[str]:
    """The prompts that a run, or the rest of one, is given; of a step each once, however many completions it has."""
    seen = []

    def judge(prompts, completions, **columns):
        seen.extend(dict.fromkeys(prompts))
        return [0.0] * len(completions)

    values = {"minibatch_size": None, "completions_per_prompt": 1, "save_every": 1, "keep_checkpoints": 9}
    tiny.trainer(folder, reward=judge, prompts=rows, **values | settings).train(resume_from_checkpoint=resume)
    return seen


def test_another_number_of_prompts_a_step_goes_on_where_the_run_was(tmp_path):
    whole = seen_by(tmp_path / "whole", False, total_steps=8, prompts_per_step=4)
    cut = seen_by(tmp_path / "cut", False, total_steps=3, prompts_per_step=2)
    cut += seen_by(tmp_path / "cut", True, total_steps=5, prompts_per_step=5)
    cut += seen_by(tmp_path / "cut", True, total_steps=9, prompts_per_step=4)
    assert cut == whole and len(set(cut[:16])) == 16
    again = seen_by(tmp_path / "cut", tmp_path / "cut" / "checkpoints" / "step-4", total_steps=5, prompts_per_step=5)
    assert again == whole[11:16]


def test_another_data_set_begins_at_its_beginning(tmp_path, capsys):
    seen_by(tmp_path, False, total_steps=3, prompts_per_step=2)
    rows = SIXTEEN[:8]
    assert set(seen_by(tmp_path, True, rows, total_steps=5, prompts_per_step=4)) == {row["prompt"] for row in rows}
    assert "the data set has 8 rows, and had 16" in capsys.readouterr().out
    assert seen_by(tmp_path, True, rows, total_steps=6) and "rows, and had" not in capsys.readouterr().out


OTHER_PROMPTS = "has other prompts than before, or has them in another order: it starts from its beginning"


@pytest.mark.parametrize("kind", ["list", "stream"])
def test_other_prompts_of_the_same_number_begin_at_their_beginning(kind, tmp_path, capsys):
    def rows(given):
        table = datasets.Dataset.from_list(given)
        return given if kind == "list" else table.to_iterable_dataset()

    settings = {"total_steps": 3, "prompts_per_step": 2}
    whole = seen_by(tmp_path / "whole", False, rows(SIXTEEN), **settings | {"total_steps": 5})
    seen_by(tmp_path / "run", False, rows(SIXTEEN), **settings)
    others = [{"prompt": f"{row['prompt']} very"} for row in SIXTEEN]
    resumed = seen_by(tmp_path / "run", True, rows(others), **settings | {"total_steps": 5})
    assert OTHER_PROMPTS in capsys.readouterr().out
    assert resumed == [f"{text} very" for text in whole[:4]]


def test_the_same_prompts_in_another_file_or_with_other_columns_or_settings_go_on(tmp_path, capsys):
    whole = seen_by(tmp_path / "whole", False, total_steps=7, prompts_per_step=2)
    seen_by(tmp_path / "run", False, total_steps=3, prompts_per_step=2)
    table = datasets.Dataset.from_list([{**row, "tools": None, "answer": "x"} for row in SIXTEEN])
    table.to_parquet(str(tmp_path / "rows.parquet"))
    changed = {"total_steps": 7, "prompts_per_step": 2, "max_prompt_tokens": 9}
    again = seen_by(tmp_path / "run", True, str(tmp_path / "rows.parquet"), **changed)
    assert again == whole[6:] and OTHER_PROMPTS not in capsys.readouterr().out


def test_a_longer_run_that_finds_a_row_to_leave_out_goes_on(tmp_path, capsys):
    last = PromptDataset(SIXTEEN, tiny.tokenizer(), 16).order(0)[-1]
    rows = [{"prompt": ""} if i == last else row for i, row in enumerate(SIXTEEN)]
    settings = {"prompts_per_step": 2, "on_bad_row": "skip"}
    whole = seen_by(tmp_path / "whole", False, rows, total_steps=9, **settings)
    seen_by(tmp_path / "run", False, rows, total_steps=3, **settings)
    assert seen_by(tmp_path / "run", True, rows, total_steps=9, **settings) == whole[6:]
    assert "starts from its beginning" not in capsys.readouterr().out


def test_another_seed_is_refused_on_resume(tmp_path):
    tiny.trainer(tmp_path, total_steps=1).train()
    with pytest.raises(ConfigError, match="seed must be 0, with which the run of .*step-1 began, got 1: another order"):
        tiny.trainer(tmp_path, total_steps=2, seed=1).train(resume_from_checkpoint=True)


def test_a_checkpoint_that_does_not_say_where_its_prompts_were_goes_on_by_its_step(tmp_path):
    whole = seen_by(tmp_path, False, total_steps=4, prompts_per_step=2)
    state = tmp_path / "checkpoints" / "step-3" / "state.json"
    values = json.loads(state.read_text())
    del values["prompts"], values["seed"]
    state.write_text(json.dumps(values))
    assert seen_by(tmp_path, state.parent, total_steps=4, prompts_per_step=2) == whole[6:]
