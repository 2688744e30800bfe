r"""Verifiable rewards: which answer a text gives, and whether it is the right one."""

import pytest

from safe_train.config import ConfigError
from safe_train.math_rewards import extracted, final_answer, math_answer

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
