"""The likeliest mistakes: exit status 2 and what to do, without a traceback, before the model is loaded."""

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest
import requests
import tiny
import torch
from safetensors import SafetensorError

from safe_train.cli import main
from safe_train.config import ConfigError, SafeConfig
from safe_train.data import prompts
from safe_train.data.prompts import Prompt
from safe_train.models.pretrained import loading
from safe_train.run import folder_lock, start, versions
from safe_train.run.start import try_reward

REWARDS = """
import math

def good(prompts, completions, **columns):
    return [float(len(text)) for text in completions]

def environmental(completions, environments):
    return [0.0 for _ in completions]

def wants_more(prompts, completions, solution, **columns):
    return [0.0 for _ in completions]

def misspelt(completions, **columns):
    return [maht.sqrt(2) for _ in completions]

def imports(completions, **columns):
    import no_such_package_anywhere

def one_number(completions, **columns):
    return 1.0
"""


class Place:
    """A model, prompts, rewards and a YAML file on disk, and what a mistake is made in."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        tiny.model().save_pretrained(folder / "model")
        tiny.tokenizer().save_pretrained(folder / "model")
        self.write("rows.jsonl", "".join(json.dumps({**row, "answer": "x"}) + "\n" for row in tiny.PROMPTS))
        self.write("rewards.py", REWARDS)

    def write(self, name, text):
        (self.folder / name).write_text(text)

    def pairs(self, **changes):
        values = {
            "model": f"{self.folder}/model",
            "dataset": f"{self.folder}/rows.jsonl",
            "reward": f"{self.folder}/rewards.py:good",
            "output_dir": f"{self.folder}/run",
            "use_cpu": "true",
            "total_steps": "1",
            "prompts_per_step": "2",
            "max_new_tokens": "4",
            "max_prompt_tokens": "32",
            "lora_r": "4",
        }
        return [f"{name}={value}" for name, value in (values | changes).items()]


@pytest.fixture
def here(tmp_path, monkeypatch):
    return Place(tmp_path, monkeypatch)


def reward(name):
    return lambda here: here.pairs(reward=f"{here.folder}/rewards.py:{name}")


def yaml(text):
    def arguments(here):
        here.write("run.yaml", text)
        return ["--config", f"{here.folder}/run.yaml", *here.pairs()]

    return arguments


def raising(error, **changes):
    """The tokenizer's download ends so."""

    def arguments(here):
        def fails(*names, **options):
            raise error

        here.monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fails)
        return here.pairs(model="org/model", **changes)

    return arguments


def wrong_split(here):
    def load_dataset(name, *_, **options):
        raise ValueError(f"Unknown split \"{options['split']}\". Should be one of ['train', 'test'].")

    here.monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return here.pairs(dataset="org/rows:trian")


def file(name, text, **changes):
    def arguments(here):
        here.write(name, text)
        return here.pairs(**{key: f"{here.folder}/{name}" for key in changes})

    return arguments


def no_disk(here):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    here.monkeypatch.setattr(folder_lock, "sign", full)
    return here.pairs()


def in_use(here):
    (here.folder / "run").mkdir()
    here.owner = (here.folder / "run" / folder_lock.NAME).open("w")  # until the end of the test
    fcntl.flock(here.owner, fcntl.LOCK_EX)
    return here.pairs()


def missing_extra(here):
    here.monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    return here.pairs(reward="vader")


def old_transformers(here):
    found = metadata.version
    versions.check_versions.cache_clear()
    here.monkeypatch.setattr(
        versions.metadata, "version", lambda name: "4.57.1" if name == "transformers" else found(name)
    )
    return here.pairs()


def eval_set_without_rows(here):
    here.write("empty.jsonl", "\n")
    return here.pairs(eval_dataset=f"{here.folder}/empty.jsonl", eval_every="1")


def server_down(here):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return here.pairs(reward=f"http://127.0.0.1:{port}/score", reward_retries="0")


def offline(here):
    here.monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return here.pairs(model="org/no-such-model")


GATED = OSError(
    "You are trying to access a gated repo. Make sure to have access to it at https://huggingface.co/org/model"
)

MISTAKES = {
    "wrong path": (lambda here: here.pairs(dataset="rowz.jsonl"), "'rowz.jsonl'"),
    "wrong split": (wrong_split, "cannot load the data set 'org/rows:trian' .*Should be one of"),
    "wrong column": (file("other.jsonl", '{"why": "x"}\n', dataset=1), "dataset /.*jsonl: .*'prompt' field .*'why'"),
    "reward of TRL's environments": (reward("environmental"), "asks for environments, .* not offered"),
    "reward that wants a column": (reward("wants_more"), "missing a required argument: 'solution'"),
    "reward with a wrong name": (reward("misspelt"), r"NameError: name 'maht' .*rewards\.py, line 14"),
    "reward with a wrong import": (reward("imports"), "ModuleNotFoundError: No module named 'no_such_package_any"),
    "reward that returns no list": (reward("one_number"), "must return a list of one number a completion, got 1.0"),
    "reward that is not there": (reward("best"), "cannot load the reward .*has no attribute 'best'"),
    "wrong model": (offline, "cannot load the model 'org/no-such-model'"),
    "gated model": (raising(GATED), "accept its terms on its page, then run `hf auth login`"),
    "interrupted download": (raising(requests.ConnectionError("reset by peer")), "start again, what has come is kept"),
    "cut file": (raising(SafetensorError("incomplete metadata")), "cut short or damaged: delete it"),
    "no disk": (no_disk, "cannot write in output_dir .*No space left on device"),
    "misspelt key": (lambda here: here.pairs(lerning_rate=1), "'lerning_rate'; did you mean 'learning_rate'"),
    "TRL's key": (lambda here: here.pairs(num_generations=4), "here it is completions_per_prompt=4"),
    "string for a number": (lambda here: here.pairs(total_steps="many"), "total_steps must be int, got 'many'"),
    "YAML indentation": (yaml("beta: 1\n  gamma: 1\n"), "run.yaml is not YAML: .*line 2.*starts at the margin"),
    "run folder in use": (in_use, "belongs to a run that is going on"),
    "missing extra": (missing_extra, r"'vader' needs a package: pip install 'safe-kernels\[demo\]'"),
    "missing tracker": (lambda here: here.pairs(report_to="[clearml]"), "report_to clearml needs a package"),
    "too old transformers": (old_transformers, r"transformers 4.57.1 is installed, .* --upgrade 'transformers>=5'"),
    "eval set without rows": (eval_set_without_rows, "eval_dataset /.*empty.jsonl: the prompt data set is empty"),
    "reward server down": (server_down, r"http://127.0.0.1:\d+/score gave no answer in 1 attempts.*Connection refused"),
    "4 bits without a GPU": (lambda here: here.pairs(load_in_4bit="true"), "load_in_4bit needs a GPU, the device is"),
    "4 bits of all weights": (lambda here: here.pairs(load_in_4bit="true", lora_r=0), "must be false with lora_r 0"),
    "seed too large": (lambda here: here.pairs(seed=2**32), "seed must be from 0 to 4294967295"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_before_the_model_is_loaded(mistake, here, capsys):
    arguments, message = MISTAKES[mistake]
    here.monkeypatch.setattr("safe_train.run.start.load_model", lambda *_: pytest.fail("the model was loaded"))
    assert main(["run", *arguments(here)]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said, re.S) and "Traceback" not in said, said
    left = [path.name for path in here.folder.glob("run/*")]
    assert left == ([folder_lock.NAME] if mistake == "run folder in use" else [])


def test_a_port_in_use_is_named(here):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, "-m", "safe_train.cli", "run", *here.pairs()]
        found = subprocess.run(command, env=os.environ | ranks | environment, capture_output=True, text=True)
    assert found.returncode == 2 and f"cannot meet at port {port}: " in found.stderr, found.stderr
    assert "give another: accelerate launch --main_process_port" in found.stderr and "Traceback" not in found.stderr


TOO_LITTLE = {
    "positions of the config": ({"max_position_embeddings": 34}, "max_new_tokens must be at most 34"),
    "a RoPE that changes": (
        {
            "max_position_embeddings": 99,
            "rope_parameters": {
                "rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 20
            },
        },
        "must be at most 20 for LlamaForCausalLM: its rope_type dynamic",
    ),
    "rows for the tokens": ({"vocab_size": 20}, "the tokenizer has 22 tokens, LlamaForCausalLM has rows for 20"),
}  # fmt: skip


@pytest.mark.parametrize("what", TOO_LITTLE)
def test_what_the_config_says_is_too_little_is_named_before_the_weights_are_loaded(what, here, capsys):
    changes, message = TOO_LITTLE[what]
    tiny.model(**changes).save_pretrained(here.folder / "model")
    here.monkeypatch.setattr("safe_train.run.start.load_model", lambda *_: pytest.fail("the model was loaded"))
    assert main(["run", *here.pairs()]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_model_without_an_outline_is_loaded_all_the_same(here):
    def reads_weights(*_, **options):
        raise NotImplementedError("aten::item on meta")

    here.monkeypatch.setattr("transformers.AutoModelForCausalLM.from_config", reads_weights)
    assert main(["run", *here.pairs()]) == 0


def test_a_disk_without_room_for_a_checkpoint_is_named(here, capsys):
    room = SimpleNamespace(free=0)
    here.monkeypatch.setattr(shutil, "disk_usage", lambda folder: room)
    assert main(["run", *here.pairs()]) == 2
    found = re.search(r"has 0.00 GB free, and a checkpoint takes (\S+) GB: make room", capsys.readouterr().err)
    assert found
    with here.monkeypatch.context() as patch:  # of all weights it is known before they are loaded
        patch.setattr("safe_train.run.start.load_model", lambda *_: pytest.fail("the model was loaded"))
        assert main(["run", *here.pairs(lora_r=0)]) == 2
    assert "a checkpoint takes 0.00 GB: make room" in capsys.readouterr().err
    room.free = 10**9
    assert main(["run", *here.pairs()]) == 0
    written = sum(path.stat().st_size for path in (here.folder / "run" / "checkpoints").rglob("*") if path.is_file())
    assert start.needed_bytes([torch.zeros(5), torch.zeros(3, dtype=torch.bfloat16)]) == 5 * 12 + 3 * 10
    assert written > 0


def test_a_tokenizer_without_a_pad_token_trains(here):
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    shutil.rmtree(here.folder / "model")
    tiny.model().save_pretrained(here.folder / "model")
    tokenizer.save_pretrained(here.folder / "model")
    assert main(["run", *here.pairs()]) == 0


ROWS = [Prompt("the cat", [3, 4], {"answer": "a"}), Prompt([{"role": "user", "content": "hi"}], [3], {"answer": "b"})]


def test_what_invented_completions_cannot_tell_is_a_warning(capsys):
    def parses(prompts, completions, answer, **columns):
        return [float(text) for text in completions]

    def undefined(completions, **columns):
        return [float("nan")] * len(completions)

    for function, said in ((parses, "raised "), (undefined, "returned nan")):
        try_reward("file.py:function", function, ROWS)
        printed = capsys.readouterr().out
        assert printed.startswith("warning: reward") and said in printed and "may fare better" in printed


def test_a_reward_is_tried_with_what_a_run_gives_it_and_leaves_no_trace(tmp_path):
    seen = []

    def judge(prompts, completions, answer):
        seen.append((prompts, completions, answer))
        answer.clear()
        return [1.0] * len(completions)

    try_reward("file.py:judge", judge, ROWS)
    prompts, completions, _ = seen[0]
    assert prompts == ["the cat", [{"role": "user", "content": "hi"}]] and isinstance(completions[0], str)
    assert completions[1] == [{"role": "assistant", "content": completions[0]}] and ROWS[0].columns == {"answer": "a"}
    tiny.trainer(tmp_path, reward=judge, prompts=[{"prompt": "the", "answer": "a"}])
    assert len(seen) == 1  # a function that was handed over is not called before its run


def test_everything_cheap_comes_before_everything_slow(here):
    order = []

    def noting(module, name):
        found = getattr(module, name)
        here.monkeypatch.setattr(module, name, lambda *a, **o: order.append(name) or found(*a, **o))

    noting(folder_lock, "locked")
    noting(prompts, "read")
    for name in ("load_tokenizer", "load_rewards", "try_reward", "load_model", "make_policy"):
        noting(start, name)
    assert main(["run", *here.pairs()]) == 0
    assert order == ["locked", "load_tokenizer", "read", "load_rewards", "try_reward", "load_model", "make_policy"]


def test_classifiers_are_loaded_after_functions_and_keep_their_place(monkeypatch):
    loaded = []
    monkeypatch.setattr(start, "load_reward", lambda name, *_: loaded.append(name) or name)
    monkeypatch.setattr(start, "try_reward", lambda *_: None)
    given = ["org/classifier", "a.py:f", "vader", "http://host/path"]
    assert start.load_rewards(given, SafeConfig(), torch.device("cpu"), ROWS) == given
    assert loaded == [*given[1:], "org/classifier"]


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), loading("org/model"):
        1 / 0  # noqa: B018
    with (
        pytest.raises(ConfigError, match="cannot load the model 'org/model': OSError"),
        loading("org/model"),
    ):
        raise OSError
