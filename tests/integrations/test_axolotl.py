"""Axolotl's own command trains the same with and without the plugin, and its asynchronous GRPO finds our functions."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest
import tiny
import yaml

if importlib.util.find_spec("axolotl") is None:
    pytest.skip("Axolotl is not installed: python tests/integrations/run.py axolotl", allow_module_level=True)

PLUGIN = "safe_kernels.integrations.axolotl.SafeKernelsPlugin"
OPTIONS = {
    "base_model": "model",
    "rl": "dpo",
    "datasets": [{"path": "rows.jsonl", "ds_type": "json", "split": "train", "type": "chatml.intel"}],
    "sequence_len": 64,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_steps": 2,
    "learning_rate": 1e-3,
    "lr_scheduler": "constant",
    "optimizer": "adamw_torch",
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "attn_implementation": "eager",
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "dataset_num_proc": 1,
    "seed": 1,
}
COUNTED = """
import atexit, sys
from safe_kernels.integrations import trl

calls, original = [], trl.token_stats
trl.token_stats = lambda *a, **k: calls.append(0) or original(*a, **k)
atexit.register(lambda: print("calls of ours:", len(calls)))
from axolotl.cli.main import main
main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("axolotl")
    tiny.model().save_pretrained(folder / "model")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder / "model")
    rows = [{"system": "", "question": row["prompt"], "chosen": "good happy", "rejected": "bad sad not"}
            for row in tiny.PROMPTS]  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def trained(folder, **options):
    """What `axolotl train` logged in each step, and what it printed."""
    name = "patched" if "plugins" in options else "stock"
    paths = {"output_dir": str(folder / name), "dataset_prepared_path": str(folder / f"{name}-rows")}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**OPTIONS, **paths, **options}))
    command = [sys.executable, "-c", COUNTED, "train", f"{name}.yaml", "--launcher", "python"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-4000:]
    steps = [dict(re.findall(r"'([^']+)': '?([-\d.e]+)'?", line)) for line in re.findall(r"\{'loss'.*?\}", printed)]
    return [{key: float(value) for key, value in step.items()} for step in steps], printed


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_its_own_command_trains_as_before(folder):
    """DPO: losses, gradient norms, rewards, and every other number that it logs, to the four digits that it prints."""
    expected, printed = trained(folder)
    assert "calls of ours: 0" in printed
    actual, printed = trained(folder, plugins=[PLUGIN])
    assert "calls of ours: 4" in printed and "safe_kernels in trl" in printed
    assert len(actual) == len(expected) == 2
    for step, wanted in zip(actual, expected, strict=True):
        numbers = {key for key in wanted if not re.search("time|second|memory|tokens/", key)}
        assert {"loss", "grad_norm"} <= numbers
        for key in numbers:
            assert step[key] == pytest.approx(wanted[key], rel=1e-3, abs=1e-4), key


def test_asynchronous_grpo_finds_ours_whenever_it_was_imported():
    from axolotl.core.trainers.grpo import async_trainer

    from safe_kernels.integrations import axolotl, trl

    names = ("selective_log_softmax", "entropy_from_logits")
    own = [getattr(async_trainer, name) for name in names]
    with axolotl.apply() as patch:
        assert [getattr(async_trainer, name) for name in names] == [getattr(trl, name) for name in names]
        assert "axolotl.core.trainers.grpo.async_trainer.selective_log_softmax" in patch.status()
    assert [getattr(async_trainer, name) for name in names] == own
