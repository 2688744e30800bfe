r"""Verifiable rewards: which answer a text gives, and whether it is the right one."""

import dataclasses
import itertools
import json
import math

import pytest
import tiny
import torch
from tokenizers import models

from safe_train import SafeTrainer
from safe_train.config import ConfigError, SafeConfig
from safe_train.rewards.math import extracted, final_answer, math_answer
from safe_train.run.evaluation import pass_at

RIGHT = [
    ("so 40 + 2 = 42", "42"),
    ("#### 42", "9 + 33 = 42\n#### 42"),
    ("The answer is \\boxed{42}.", "#### 42.0"),
    ("It costs $1,234.50 in all.", "1234.5"),
    ("\\boxed{1{,}234}", "1,234"),
    ("\\boxed{\\$1\\,234}", "1234"),
    ("\\boxed{\\frac{1}{2}}", "0.5"),
    ("\\boxed{-\\dfrac{1}{2}}", "-1/2"),
    ("\\boxed{50\\%}", "50"),
    ("\\boxed{42 \\text{ km}}", "42"),
    ("#### 42 dollars", "42"),
    ("#### **42**", "42"),
    ("\\boxed{x = 5}", "5"),
    ("\\boxed{\\text{Monday}}", "monday"),
    ("\\boxed{x^{2}+1}", "\\boxed{x^{2}+1}"),
    ("first \\boxed{7}, no: \\boxed{8}", "8"),
    ("\\boxed{7}\n#### 8", "8"),
    ("#### 7\nso \\boxed{8}", "8"),
    ("5-3", "3"),
    ("it is 5 - -3", "-3"),
    ("it fell to \N{MINUS SIGN}4 degrees", "-4"),
    ("from 1 to 3, 4, 5", "5"),
    (".5", "1/2"),
    ("007", "7"),
    ("\\(12\\)", "12"),
]
WRONG = [
    ("so 40 + 2 = 43", "42"),
    ("42 it is, or 43", "42"),
    ("\\boxed{2x}", "2"),
    ("\\boxed{3\\frac{1}{2}}", "31/2"),
    ("\\boxed{4.2}", "42"),
    ("\\boxed{x+1}", "x+2"),
    ("no number", "0"),
    ("", "0"),
    ("\\boxed{42", "7"),
    ("\\boxed{1/0}", "0"),
    ("\\boxed{" + "9" * 5000 + "}", "9"),
    ("9" * 5000, "9"),
]


@pytest.mark.parametrize(("completion", "answer", "score"), [(*x, 1.0) for x in RIGHT] + [(*x, 0.0) for x in WRONG])
def test_the_final_answer_of_a_completion_is_the_right_one_or_not(completion, answer, score):
    assert final_answer([completion], answer=[answer]) == [score]
    assert final_answer([[{"role": "assistant", "content": completion}]], solution=[answer]) == [score]


def test_a_row_without_a_right_answer_is_not_judged():
    assert final_answer(["1", "2", "3"], answer=[None, " ", "3"], solution=["1", None, "4"]) == [1.0, None, 1.0]
    with pytest.raises(ConfigError, match="'answer' or 'solution'"):
        final_answer(["1"])


def test_what_was_found_is_logged():
    logged = {}
    final_answer(["so 7", "none"], answer=["7", "8"], log_extra=logged.__setitem__)
    assert logged == {"answer_found": ["7", None]} and extracted("1 \\boxed{\\frac{1}{2}}") == "\\frac{1}{2}"


def test_math_verify_compares_what_is_no_number():
    pytest.importorskip("math_verify")
    completions = ["\\boxed{(x+1)^2}", "so $\\frac{2}{4}$", "\\boxed{(1,2)}", "\\boxed{\\sqrt{8}}", "I think it is 12"]
    answers = ["x^2+2x+1", "1/2", "(1,3)", "2\\sqrt{2}", "#### 12"]
    logged = {}
    found = math_answer([*completions, "1"], answer=[*answers, None], log_extra=logged.__setitem__)
    assert found == [1.0, 1.0, 0.0, 1.0, 1.0, None] and len(logged["answer_found"]) == 6


def test_math_verify_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    with pytest.raises(ImportError, match=r"pip install 'safe-kernels\[math\]'"):
        math_answer(["1"], answer=["1"])


GSM8K = [
    {"question": "the cat sat", "answer": "it is <<1+1=2>>2\n#### 2"},
    {"question": "a dog ran", "answer": "1,000 more\n#### 1,000"},
    {"question": "the tree", "answer": "#### 3"},
]


def test_the_shipped_config_trains_on_rows_like_those_of_gsm8k(tmp_path):
    """With a model that answers at random among a few numbers."""
    words = tiny.tokenizer()
    names = dict(zip(("cat", "dog", "sat"), ("2", "1000", "3"), strict=True))
    vocabulary = {names.get(word, word): i for word, i in words.get_vocab().items()}
    words.backend_tokenizer.model = models.WordLevel(vocabulary, unk_token="<pad>")
    words.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    args = SafeConfig.load("gsm8k-grpo.yaml")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GSM8K))
    rows = {"dataset": f"{tmp_path}/rows.jsonl", "eval_dataset": f"{tmp_path}/rows.jsonl"}
    small = {"total_steps": 2, "prompts_per_step": 3, "minibatch_size": None, "max_new_tokens": 6, "use_cpu": True}
    more = {"eval_every": 1, "eval_completions": 96, "samples_every": 1, "output_dir": str(tmp_path / "run")}
    args = dataclasses.replace(args, **rows, **small, **more)
    history = SafeTrainer(tiny.model(), args=args, processing_class=words).train()
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    right = {row["question"]: row["answer"].rpartition("#### ")[2].replace(",", "") for row in GSM8K}
    for row in samples:
        assert row["prompt"][0]["role"] == "system" and "\\boxed{}" in row["prompt"][0]["content"]
        numbers = [word for word in row["completion"].split() if word.isdigit()]
        assert row["reward"] == float(bool(numbers) and numbers[-1] == right[row["prompt"][1]["content"]])
        assert row["answer_found"] == (numbers[-1] if numbers else None)
    assert len(samples) == 48 and 0 < sum(row["reward"] for row in samples) < 48
    for row in history:
        assert row["eval/pass@1"] == pytest.approx(row["eval/reward"]) and row["eval/pass@1"] <= row["eval/pass@4"]
    assert all(row["eval/pass@4"] > row["eval/pass@1"] for row in history)


def test_rows_without_an_answer_are_refused_before_the_run(tmp_path):
    with pytest.raises(ConfigError, match="a column 'answer' or 'solution', and the rows have neither"):
        tiny.trainer(tmp_path / "run", "safe_train.rewards.math:final_answer")


def test_pass_at_k_is_the_share_of_draws_of_k_that_hold_one_that_passes():
    """Against all draws of k of the n completions, counted one by one."""
    rewards = torch.tensor([[1.0, 0.0, 0.5, 2.0, 0.0], [0.0, 0.9, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0, 0.0]])
    for k in range(1, 6):
        each = []
        for row in rewards.tolist():
            draws = list(itertools.combinations(row, k))
            each.append(sum(max(draw) >= 1.0 for draw in draws) / len(draws))
        assert pass_at(k, rewards, 1.0) == pytest.approx(sum(each) / 3)
    assert pass_at(2, torch.tensor([[1.0, 0.0, math.nan], [1.0, math.nan, math.nan]]), 1.0) == 1.0
    assert math.isnan(pass_at(2, torch.tensor([[1.0, math.nan]]), 1.0))


def test_an_evaluation_draws_several_completions_of_each_prompt(tmp_path):
    settings = {"eval_completions": 7, "eval_completions_per_prompt": 3, "eval_pass_at": [1, 3], "pass_reward": 0.25}
    evaluation = tiny.trainer(tmp_path, **settings).evaluate()
    prompts = [prompt.text for prompt in evaluation.rollout.prompts]
    assert prompts == [row["prompt"] for row in tiny.PROMPTS[:3] for _ in range(3)]
    scores = torch.tensor(tiny.good_words(None, evaluation.rollout.texts)).view(3, 3)
    numbers = evaluation.numbers()
    assert numbers["pass@3"] == pytest.approx((scores.max(1).values >= 0.25).double().mean().item())
    assert numbers["pass@1"] == pytest.approx((scores >= 0.25).double().mean().item())
    assert numbers["reward_error"] == pytest.approx(scores.mean(1).std().item() / 3**0.5)
    with pytest.raises(ConfigError, match="eval_pass_at must be numbers from 1 to eval_completions_per_prompt 3"):
        SafeConfig(eval_completions_per_prompt=3, eval_pass_at=[1, 4])
