"""What an evaluation keeps of its completions, held against the model's own forward; and `safe-train eval`."""

import json
import math

import peft
import processes
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from safe_train import SafeTrainer
from safe_train.cli import main
from safe_train.data.prompts import Prompt
from safe_train.run.checkpoints import Checkpoints
from safe_train.run.evaluation import standard_error
from safe_train.run.report import read_rows


def logprobs(model, prompt, completion):
    with torch.no_grad():
        return model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def test_each_completion_has_its_log_probs_kl_and_rewards(tmp_path):
    def length(completions, **columns):
        return [float(len(text.split())) for text in completions]

    trainer = tiny.trainer(tmp_path, reward=[tiny.good_words, length], learning_rate=0.1, eval_completions=7)
    trainer.train()
    found = trainer.evaluate()
    rows = [row for row in found.completions if row["how"] == "sampled"]
    assert len(rows) == len(found.rollout.texts) == 7
    for i, row in enumerate(rows):
        prompt, tokens = found.rollout.prompts[i], found.rollout.completions[i]
        own = logprobs(trainer.policy.model, prompt.ids, tokens)
        with trainer.policy.model.disable_adapter():
            reference = logprobs(trainer.policy.model, prompt.ids, tokens)
        chosen = torch.tensor(tokens)[:, None]
        assert row["logprob"] == pytest.approx(own.gather(1, chosen).sum().item(), abs=1e-4)
        assert row["reference_logprob"] == pytest.approx(reference.gather(1, chosen).sum().item(), abs=1e-4)
        kl = (own.exp() * (own - reference)).sum(-1).mean().item()
        assert row["kl"] == pytest.approx(kl, abs=1e-5) and kl > 1e-3
        assert (row["prompt"], row["completion"]) == (prompt.text, found.rollout.texts[i])
        scores = tiny.good_words([], [row["completion"]])[0], float(len(row["completion"].split()))
        assert (row["rewards/good_words"], row["rewards/length"], row["reward"]) == (*scores, sum(scores))
        assert row["tokens"] == len(tokens) and row["ended"] == (tokens[-1] == 1)


def likeliest(model, ids, count):
    """By hand: the token with the largest logit, until the end token."""
    found = []
    while len(found) < count and found[-1:] != [1]:
        with torch.no_grad():
            found.append(model(torch.tensor([ids + found])).logits[0, -1].argmax().item())
    return found


def test_the_greedy_completions_are_the_likeliest_tokens_one_a_prompt(tmp_path):
    trainer = tiny.trainer(tmp_path, eval_completions=9)
    found = trainer.evaluate()
    rows = [row for row in found.completions if row["how"] == "greedy"]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in tiny.PROMPTS]
    tokenizer = trainer.tokenizer
    for row in rows:
        tokens = likeliest(trainer.policy.model, tokenizer(row["prompt"])["input_ids"], 6)
        assert row["completion"] == tokenizer.decode(tokens, skip_special_tokens=True) and row["tokens"] == len(tokens)
    assert found.greedy_reward == pytest.approx(sum(row["reward"] for row in rows) / 5)


def test_a_run_keeps_the_completions_of_its_evaluations_and_drops_those_that_come_again(tmp_path):
    settings = {"eval_every": 1, "save_every": 2, "total_steps": 3}

    def dies(trainer, metrics):
        if trainer.step == 3:
            raise KeyboardInterrupt

    tiny.trainer(tmp_path / "whole", **settings).train()
    cut = tiny.trainer(tmp_path / "cut", **settings)
    cut.callbacks = [dies]
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    newest = Checkpoints(tmp_path / "cut", 2).complete()[-1]
    tiny.trainer(tmp_path / "cut", **settings).train(resume_from_checkpoint=newest.with_name("step-2"))
    whole, resumed = (read_rows(tmp_path / name / "evaluation.jsonl") for name in ("whole", "cut"))
    assert whole == resumed and [row["step"] for row in whole] == [step for step in (1, 2, 3) for _ in range(8)]


def evaluated(folder):
    found = tiny.trainer(folder, eval_completions=6).evaluate()
    return found.completions, found.rollout.texts


def test_two_processes_keep_the_completions_of_both_in_order(tmp_path):
    alone, _ = evaluated(tmp_path / "alone")
    first, second = processes.run(evaluated, 2, tmp_path / "two")
    assert first.error == second.error == ""
    rows, texts = first.result
    assert rows == second.result[0]
    assert [row["completion"] for row in rows if row["how"] == "sampled"] == texts
    greedy, own = ([row for row in each if row["how"] == "greedy"] for each in (rows, alone))
    for row, one in zip(greedy[:5], own, strict=True):  # the sixth is the first again, as each has equally many
        assert {k: pytest.approx(v, abs=1e-4) if isinstance(v, float) else v for k, v in one.items()} == row


def files(folder, **changes):
    tiny.model().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.PROMPTS))
    (folder / "rewards.py").write_text(
        "def length(prompts, completions, **columns):\n    return [float(len(text)) for text in completions]\n"
    )
    small = "use_cpu=true prompts_per_step=2 max_new_tokens=4 max_prompt_tokens=32 lora_r=4 eval_completions=4".split()
    return [*small, f"eval_dataset={folder}/rows.jsonl", f"reward={folder}/rewards.py:length"]


def run(folder, *more):
    given = [*files(folder), f"dataset={folder}/rows.jsonl", f"model={folder}/model", f"output_dir={folder}/run", *more]
    assert main(["run", *given, "total_steps=2", "save_every=1", "learning_rate=0.1"]) == 0
    return folder / "run"


def results(folder):
    return json.loads((folder / "evaluation.json").read_text()), read_rows(folder / "evaluation.jsonl")


@pytest.mark.parametrize("more", [[], ["lora_r=0"]], ids=str)
def test_a_checkpoint_is_the_same_with_its_run_and_without(more, tmp_path, monkeypatch, capsys):
    folder = run(tmp_path, *more)
    monkeypatch.chdir(tmp_path)
    settings = files(tmp_path)
    assert main(["eval", str(folder)]) == 0
    assert main(["eval", str(folder), "--checkpoint", "1", "--output", "first"]) == 0
    assert main(["eval", str(folder / "checkpoints" / "step-1"), "--output", "again"]) == 0
    assert "before     after" in capsys.readouterr().out
    newest, rows = results(folder / "eval" / "step-2")
    first, again = results(tmp_path / "first"), results(tmp_path / "again")
    assert first == again and first[0]["step"] == 1 and first[0]["after"] != newest["after"]
    assert {row["step"] for row in rows} == {0, 2} and newest["before"]["kl"] == pytest.approx(0, abs=1e-6)
    (folder / "checkpoints" / "step-2").rename(tmp_path / "taken-out")
    assert main(["eval", "taken-out", *settings]) == 0
    alone, own_rows = results(tmp_path / "eval" / "taken-out")
    assert alone["now"]["reward"] == newest["after"]["reward"]
    assert [row["completion"] for row in own_rows] == [row["completion"] for row in rows if row["step"] == 2]
    # An adapter's KL is to the model that it is for; a whole model is its own reference.
    assert alone["now"]["kl"] == pytest.approx(0 if more else newest["after"]["kl"], abs=1e-5)


def test_rewards_are_told_the_step_of_what_is_evaluated(tmp_path):
    folder = run(tmp_path)
    (tmp_path / "rewards.py").write_text(
        "def step(completions, trainer_state):\n    return [float(trainer_state.global_step)] * len(completions)\n"
    )
    assert main(["eval", str(folder), f"reward={tmp_path}/rewards.py:step"]) == 0
    assert {row["reward"] for row in results(folder / "eval" / "step-2")[1] if row["step"] == 2} == {2.0}


def test_an_adapter_of_another_kind_is_evaluated_as_what_it_is(tmp_path):
    settings = dict(pair.split("=", 1) for pair in files(tmp_path))
    kind = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=True, task_type="CAUSAL_LM")
    args = tiny.settings(tmp_path / "run", learning_rate=0.1, total_steps=2, eval_dataset=settings["eval_dataset"])
    trainer = SafeTrainer(f"{tmp_path}/model", settings["reward"], args, tiny.PROMPTS, peft_config=kind)
    trainer.train()
    right = trainer.evaluate().numbers()
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert results(tmp_path / "run" / "eval" / "step-2")[0]["after"] == pytest.approx(right, abs=1e-5)


def test_any_model_is_evaluated_without_a_run(tmp_path, monkeypatch, capsys):
    settings = files(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "model", *settings]) == 0
    numbers, rows = results(tmp_path / "eval" / "model")
    assert numbers["now"]["kl"] == pytest.approx(0, abs=1e-6) and len(rows) == 4 + 4
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapter = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapter.save_pretrained(tmp_path / "adapter")  # without a tokenizer
    assert main(["eval", "adapter", *settings]) == 0
    assert results(tmp_path / "eval" / "adapter")[0]["now"]["kl"] > 1e-4


def test_what_cannot_be_evaluated_is_named(tmp_path, capsys):
    folder, settings = run(tmp_path), files(tmp_path)
    for arguments, message in (
        ([str(tmp_path / "nothing")], "is not a run folder (no config.yaml), not a checkpoint"),
        ([str(tmp_path)], "is not a run folder"),
        ([str(tmp_path / "model")], "an evaluation needs held-out prompts: set eval_dataset"),
        ([str(tmp_path / "model"), settings[-2]], "a run needs reward"),
        ([str(tmp_path / "model"), *settings, "--checkpoint", "1"], "--checkpoint is of a run"),
        ([str(folder), "--config", "demo.yaml"], "has settings of its own"),
        ([str(folder), "--checkpoint", "7"], "has no checkpoint 7, but checkpoints/step-1, checkpoints/step-2"),
        ([str(folder), "--checkpoint", "best"], "has no checkpoint best"),
    ):
        assert main(["eval", *arguments]) == 2
        assert message in capsys.readouterr().err, arguments


def test_the_error_of_the_reward_counts_a_prompt_that_comes_again_once():
    def error(rewards, ids):
        prompts = [Prompt("", [number], {}) for number in ids]
        return standard_error(torch.tensor(rewards, dtype=torch.float64), prompts)

    means = torch.tensor([0.5, 2.0, 6.0], dtype=torch.float64)
    expected = means.std().item() / 3**0.5
    assert error([0.0, 1.0, 1.0, 3.0, 5.0, 7.0], [1, 1, 2, 2, 3, 3]) == pytest.approx(expected)
    assert error([0.0, 1.0, 5.0, 1.0, 3.0, 7.0], [1, 2, 3, 1, 2, 3]) == pytest.approx(expected)
    assert error([0.0, 1.0, 5.0, 1.0, 3.0, 7.0], range(6)) != pytest.approx(expected)
    assert error([0.0, 1.0, 1.0, math.nan, 1.0], [1, 2, 2, 3, 1]) == pytest.approx((2 * 0.5) ** 0.5 / 4)
    assert math.isnan(error([1.0, 2.0], [5, 5])) and math.isnan(error([1.0, math.nan], [1, 2]))
