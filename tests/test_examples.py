"""The scripts of examples/, as they are but for a tiny model and fewer steps."""

import importlib.util
import math
from pathlib import Path

import pytest
import tiny

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.model(num_hidden_layers=3).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def test_own_reward(model, tmp_path, pictures):
    history = example("own_reward").main(model, str(tmp_path), steps=2)
    assert len(history) == 2 and all(-6 < row["reward"] < 0 for row in history)
    assert history[1]["kl"] <= 0.2 and (tmp_path / "report.png").is_file()


def test_plain_loop(model):
    means = example("plain_loop").main(model, steps=2)
    assert len(means) == 2 and all(0 <= mean < 12 for mean in means)


def test_distillation(model):
    losses = example("distillation").main(model, steps=12)
    assert losses[0] > 0 and sum(losses[-4:]) < sum(losses[:4])


def test_trl_grpo(model, tmp_path):
    pytest.importorskip("trl")
    history = example("trl_grpo").main(model, str(tmp_path), steps=2)
    assert len([row for row in history if math.isfinite(row.get("kl", math.nan))]) == 2


def test_each_script_has_a_test_and_says_how_it_is_run():
    for path in EXAMPLES.glob("*.py"):
        assert f"test_{path.stem}" in globals() and f"python examples/{path.name}" in path.read_text()
