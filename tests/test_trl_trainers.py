"""TRL's trainers with and without the patch train the same; its scripts, and the recipes of docs/integrations.md."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from cases import some_mask

import safe_kernels
from safe_kernels import linear

pytest.importorskip("trl", reason="TRL is not installed; it needs Python 3.11: pip install 'safe-kernels[test]'")

import trl  # noqa: E402

from safe_kernels.integrations import trl as patch  # noqa: E402

ROWS = {  # of the data sets of TRL's formats
    "preference": [{**row, "chosen": " good happy", "rejected": " bad sad not"} for row in tiny.PROMPTS],
    "unpaired": [{**row, "completion": " good happy", "label": i % 2 == 0} for i, row in enumerate(tiny.PROMPTS)],
    "text": [{"text": row["prompt"] + " is good and happy"} for row in tiny.PROMPTS],
    "prompts": tiny.PROMPTS,
}
SAMPLED = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1, "temperature": 0.9, "num_iterations": 2}
TRAINERS = {
    "GRPO": ("prompts", {**SAMPLED, "top_entropy_quantile": 0.8, "loss_type": "dapo"}),
    "GRPO, float32 head": ("prompts", {**SAMPLED, "cast_lm_head_to_fp32": True}),
    "RLOO": ("prompts", SAMPLED),
    "DPO": ("preference", {"beta": 0.5}),
    "DPO, weighted": ("preference", {"beta": 0.5, "use_weighting": True}),
    "KTO": ("unpaired", {}),
    "SFT": ("text", {}),
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def trained(name, model, output_dir):
    """What the trainer logged in each step, and the weights it ended with."""
    from datasets import Dataset

    rows, options = TRAINERS[name]
    kind = name.partition(",")[0]
    settings = getattr(trl, f"{kind}Config")(
        output_dir=str(output_dir),
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        seed=1,
        **{"max_steps": 3, "learning_rate": 1e-3, **options},
    )
    reward = {"reward_funcs": tiny.good_words} if rows == "prompts" else {}
    data = {"train_dataset": Dataset.from_list(ROWS[rows]), "processing_class": tiny.tokenizer()}
    trainer = getattr(trl, f"{kind}Trainer")(model, args=settings, **reward, **data)
    trainer.train()
    return trainer.state.log_history[:-1], trainer.model.state_dict()


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", TRAINERS)
def test_a_trainer_trains_as_before(name, model_folder, tmp_path, monkeypatch):
    """Losses, gradient norms, KL, entropy, accuracy and every other number that it logs."""
    calls, original = [], linear.linear_gradients
    monkeypatch.setattr(linear, "linear_gradients", lambda *a: calls.append(a[2]) or original(*a))
    expected, weights = trained(name, model_folder, tmp_path)
    assert not calls
    with patch.apply():
        actual, actual_weights = trained(name, model_folder, tmp_path)
    assert len(calls) == len(expected) == 3 and all(slopes[0] is not None for slopes in calls)
    for step, wanted in zip(actual, expected, strict=True):
        numbers = [key for key in wanted if "time" not in key]
        assert {"loss", "grad_norm", "entropy"} <= set(numbers) and step.keys() == wanted.keys()
        for key in numbers:
            assert step[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-5), key
    if name.startswith("GRPO"):
        assert expected[-1]["kl"] > 0
    for key, x in weights.items():
        torch.testing.assert_close(actual_weights[key], x, rtol=1e-3, atol=1e-4)


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize("option", [[], ["--kl=exact"]])
def test_trl_s_own_script_runs_patched(option, model_folder, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS["text"])))
    command = [sys.executable, "-m", "safe_kernels.integrations.trl", *option, "sft"]
    options = {
        "model_name_or_path": model_folder,
        "dataset_name": tmp_path / "data",
        "output_dir": tmp_path / "out",
        "max_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
    }
    command += [str(text) for name, value in options.items() for text in (f"--{name}", value)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "safe_kernels replaces trl.trainer.utils._ChunkedLogProbFunction, " in done.stderr
    assert ("GRPOTrainer.compute_loss, " in done.stderr) == bool(option)
    assert "mean_token_accuracy" in done.stdout


def test_a_script_that_trl_does_not_have_is_an_error(monkeypatch):
    for arguments in ([], ["ppo"], ["vllm_serve"], ["utils"], ["--kl=exact"], ["--kl=k3", "grpo"]):
        monkeypatch.setattr(sys, "argv", ["trl.py", *arguments])
        with pytest.raises(SystemExit, match="SCRIPT is one of distillation, dpo, grpo, kto, reward, rloo, sft$"):
            patch.main()
    assert not patch.PATCH.replaced


def code_of(heading):
    text = (Path(__file__).parents[1] / "docs" / "integrations.md").read_text()
    return text.partition(f"{heading}\n")[2].partition("```python\n")[2].partition("```")[0]


def test_the_recipe_for_any_other_trainer():
    """As it stands in docs/integrations.md: its loss against plain PyTorch on whole logits."""
    model, reference = tiny.model(), tiny.model(seed=1)
    draw = torch.Generator().manual_seed(4)
    ids, mask = torch.randint(2, 20, (3, 8), generator=draw), some_mask((3, 8))
    old_logprob, advantage = torch.randn(2, 3, 7, generator=draw).unbind()
    old_logprob -= 3
    given = {"model": model, "reference": reference, "ids": ids, "mask": mask, "attention_mask": torch.ones_like(ids)}
    given |= {"temperature": 0.7, "old_logprob": old_logprob, "advantage": advantage}
    exec(code_of("## Any other trainer"), {"torch": torch, "safe_kernels": safe_kernels}, given)
    logp, logq = ((x(ids).logits[:, :-1] / 0.7).log_softmax(-1) for x in (model, reference))
    ratio = (logp.gather(-1, ids[:, 1:, None])[..., 0] - old_logprob).exp()
    terms = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    terms = terms + (logp.exp() * (0.01 * logp + 0.05 * (logp - logq))).sum(-1)
    live = mask[:, 1:]
    weight = model.lm_head.weight
    gradients = [torch.autograd.grad(loss, [weight])[0] for loss in (given["loss"], terms[live].sum() / live.sum())]
    torch.testing.assert_close(*gradients)
