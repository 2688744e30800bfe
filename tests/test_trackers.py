"""What `report_to` gets beside the numbers."""

import json
from types import SimpleNamespace

import pytest
import tiny
import torch

from safe_train.run.trackers import send_samples

ROWS = [{"step": 1, "prompt": [{"role": "user"}], "completion": f"a|b\n<{i}>", "reward": float(i)} for i in range(40)]


def test_a_table_has_completions_from_the_lowest_reward_to_the_highest():
    sent = []
    tracker = SimpleNamespace(name="wandb", log_table=lambda name, **table: sent.append(table))
    send_samples([tracker, SimpleNamespace(name="other")], ROWS, torch.arange(40.0), 1)
    (table,) = sent
    assert table["columns"] == ["prompt", "completion", "reward"] and len(table["data"]) == 32
    assert table["data"][0] == ["[{'role': 'user'}]", "a|b\n<0>", 0.0] and table["data"][-1][2] == 39.0


def test_markdown_of_a_completion_stays_in_its_cell():
    sent = []
    tracker = SimpleNamespace(name="tensorboard", log=lambda values, step: sent.append(values["samples"]))
    send_samples([tracker], ROWS[:1], torch.zeros(1), 1)
    assert sent[0].splitlines()[2] == r"| [{'role': 'user'}] | a\|b &lt;0> | 0.0 |"


def test_tensorboard_has_numbers_completions_and_the_picture(tmp_path, pictures):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tiny.trainer(tmp_path, report_to=["tensorboard"], total_steps=2).train()
    found = EventAccumulator(str(next(tmp_path.rglob("events.out.*")).parent)).Reload()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [x.value for x in found.Scalars("reward")] == pytest.approx([row["reward"] for row in rows])
    tables = found.Tensors("samples/text_summary")
    assert [x.step for x in tables] == [1, 2] and b"completion" in tables[0].tensor_proto.string_val[0]
    (picture,) = found.Images("report")
    assert (picture.step, picture.width, picture.height) == (2, 2200, picture.height) and picture.height > 500


def test_wandb_has_completions_and_the_picture(tmp_path, pictures, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    tiny.trainer(tmp_path / "run", report_to=["wandb"], total_steps=1).train()
    (table,) = (json.loads(path.read_text()) for path in tmp_path.rglob("*.table.json"))
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [row[table["columns"].index("completion")] for row in table["data"]] == [x["completion"] for x in samples]
    assert len(list(tmp_path.rglob("media/images/report_*.png"))) == 1
