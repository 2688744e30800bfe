"""`safe-train check`: it says what the run would do, in the order of the cost, and leaves nothing behind."""

import json
import re
from types import SimpleNamespace

import memory
import pytest
import tiny
import torch
from test_mistakes import MISTAKES, Place

from safe_train.cli import main
from safe_train.commands import check as dry_run
from safe_train.data.batches import TokenBatch


@pytest.fixture
def here(tmp_path, monkeypatch):
    return Place(tmp_path, monkeypatch)


def test_it_says_what_the_run_would_do_and_leaves_nothing(here, capsys):
    place = here.folder / "new" / "run"
    pairs = here.pairs(
        output_dir=place, total_steps="5", completions_per_prompt="3", eval_dataset=f"{here.folder}/rows.jsonl"
    )
    before = files_of(here.folder)
    assert main(["check", *pairs]) == 0
    said = capsys.readouterr().out
    lora = 2 * (4 * (4 * 32 + 16 * 2 + 32 * 2) + 4 * 3 * (32 + 48))  # q, k, v, o, and three of the MLP, of two layers
    base = sum(p.numel() for p in tiny.model().parameters())
    for line in (
        rf"model: {here.folder}/model, a LlamaForCausalLM of {base + lora:,} weights in float32 on cpu",
        rf"trained: {lora:,} of them, an adapter",
        "layout: rows; attention: sdpa; generation: hf, padded; processes: 1",
        "algorithm: safe; critic soft_min, controller safe, beta 0.01, learning rate 0.0001",
        r"a step: 2 prompts x 3 completions, 2 optimizer steps; at most 60 tokens \(6 \+ 4 each\)\n",
        rf"the run: 5 steps \(2 epochs\) on {here.folder}/rows.jsonl, in {place}",
        r"memory, estimated: .* MB of .* GB \(weights .*, gradients and optimizers .*, rollout .*, micro-batch .*\)",
        r"disk: .* MB a checkpoint, 2 are kept; .* GB free",
        r"a completion of the first prompt: '.*'\nits reward: good \d+, reward \d+\n",
        "eval_dataset: 5 rows",
        "dataset: the first prompt as the model sees it:\n",
    ):
        assert re.search(line, said), (line, said)
    assert files_of(here.folder) == before
    assert main(["run", *pairs]) == 0


def files_of(folder):
    """Without what Python keeps of a module that it imports, as of the file of a reward."""
    return sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_before_the_model_is_loaded(mistake, here, capsys):
    arguments, message = MISTAKES[mistake]
    here.monkeypatch.setattr("safe_train.run.start.load_model", lambda *_: pytest.fail("the model was loaded"))
    assert main(["check", *arguments(here)]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said, re.S) and "Traceback" not in said, said


def test_a_config_is_a_file_a_shipped_name_or_an_option_as_of_run(here, capsys):
    here.write("mine.yaml", "total_steps: 7\n")
    pairs = [pair for pair in here.pairs() if not pair.startswith("total_steps")]
    for arguments in ([f"{here.folder}/mine.yaml", *pairs], ["--config", f"{here.folder}/mine.yaml", *pairs]):
        assert main(["check", *arguments]) == 0
        assert "the run: 7 steps" in capsys.readouterr().out
    assert main(["check", "no.yaml", *pairs]) == 2 and "no config file 'no.yaml'" in capsys.readouterr().err


def test_what_only_a_sampled_completion_shows_is_named(here, capsys):
    here.write(
        "picky.py",
        "def picky(completions, **columns):\n    return [1 / (text == 'The answer is 42.') for text in completions]\n",
    )
    assert main(["check", *here.pairs(reward=f"{here.folder}/picky.py:picky")]) == 2
    said = capsys.readouterr().err
    assert "raised ZeroDivisionError: division by zero, for a completion that the model sampled: " in said


def test_a_folder_with_a_run_needs_overwrite(here, capsys):
    assert main(["run", *here.pairs()]) == 0
    written = {path: path.read_bytes() for path in (here.folder / "run").rglob("*") if path.is_file()}
    assert main(["check", *here.pairs()]) == 2 and "already holds a run" in capsys.readouterr().err
    assert main(["check", "--overwrite", *here.pairs()]) == 0
    assert written == {path: path.read_bytes() for path in (here.folder / "run").rglob("*") if path.is_file()}


def test_a_failing_self_check_is_exit_2(here, capsys):
    here.monkeypatch.setattr("safe_train.run.self_check.LARGEST_HEAD_GAP", -1.0)
    assert main(["check", *here.pairs()]) == 2
    assert "the head of LlamaForCausalLM: on the same hidden states" in capsys.readouterr().err
    assert not (here.folder / "run").exists()


WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}


@pytest.mark.parametrize("settings", [{}, {"lora_r": 0}, {"gradient_checkpointing": True}], ids=str)
def test_the_memory_of_an_update_is_near_what_it_allocates(settings, tmp_path):
    """On a batch as large as the estimate is for."""
    values = {"max_new_tokens": 58, "max_tokens_per_microbatch": 512, "minibatch_size": None, "prompts_per_step": 8}
    trainer = tiny.trainer(tmp_path, policy=tiny.model(**WIDE), completions_per_prompt=1, **values | settings)
    found = dry_run.memory(trainer)
    longest = dry_run.longest_sequence(trainer)
    sequence = [2 + i % 20 for i in range(longest)]
    batch = TokenBatch.pack([sequence[:6]] * (512 // longest), [sequence[6:]] * (512 // longest))
    with memory.Allocations() as allocations:
        trainer.policy(batch).sum().backward()
    gradients = sum(p.nbytes for p in trainer.trainable)
    assert 0.5 * found.update < allocations.peak - gradients < 2 * found.update
    assert found.weights == sum(
        p.nbytes for m in (trainer.policy, *trainer.policy.frozen_copies) for p in m.parameters()
    )


def test_the_memory_of_a_rollout_is_that_of_its_cache(tmp_path):
    trainer = tiny.trainer(tmp_path)
    width = 6 + 6  # the longest prompt, and a completion
    cache = 8 * width * 2 * 2 * 2 * 8 * 4  # completions, tokens, keys and values, layers, heads, their width, float32
    assert dry_run.memory(trainer).rollout == cache + 8 * len(tiny.WORDS) * 8
    assert (
        dry_run.memory(tiny.trainer(tmp_path, generation_batch_size=4)).rollout == cache // 2 + 4 * len(tiny.WORDS) * 8
    )


def test_more_memory_than_there_is_is_a_warning(tmp_path, monkeypatch):
    trainer = tiny.trainer(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=10))
    assert not any(line.startswith("warning") for line in dry_run.needs(trainer, dry_run.memory(trainer)))
    trainer.device = torch.device("cuda")
    found = dry_run.Memory(weights=8, training=1, rollout=None, update=2)
    lines = dry_run.needs(trainer, found)
    assert lines[1].startswith("warning: that is more than there is") and "rollout not estimated" in lines[0]


def test_a_run_that_was_checked_is_the_run_that_was_not(here):
    rows = []
    for name in ("checked", "plain"):
        pairs = here.pairs(output_dir=f"{here.folder}/{name}", total_steps="2")
        if name == "checked":
            assert main(["check", *pairs]) == 0
        assert main(["run", *pairs]) == 0
        lines = (here.folder / name / "metrics.jsonl").read_text().splitlines()
        rows.append([json.loads(line)["policy_loss"] for line in lines])
    assert rows[0] == rows[1]
