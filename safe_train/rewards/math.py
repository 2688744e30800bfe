r"""Verifiable rewards for questions with one right answer, such as GSM8K's.

    reward=safe_train.rewards.math:final_answer    numbers, fractions and short texts; needs no other library
    reward=safe_train.rewards.math:math_answer     mathematics, by Hugging Face's math-verify

The right answer stands in the column `answer` or `solution`: `... #### 42`, `\boxed{42}`, or the answer alone.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from safe_train.config import ConfigError
from safe_train.rewards.calls import text_of

Log = Callable[[str, list[Any]], None]

BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
HASHES = re.compile(r"####[ \t]*([^\n]+)")
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"  # 1,234.5 or 12 or .5
SIGN = r"[-+\N{MINUS SIGN}]"
IN_TEXT = re.compile(rf"(?:(?<![\w)}}\].]){SIGN})?(?:{DIGITS})")  # the last number of 5-3 is 3, that of 5 - -3 is -3
NUMBER = rf"{SIGN}?(?:{DIGITS})"
VALUE = re.compile(rf"(?:[a-z] ?= ?)?({NUMBER})(?: ?/ ?({NUMBER}))?(?: ?[a-z]{{2}}[a-z .]*)?")  # x = 1/2; 42 km
DECORATION = re.compile(r"\\(?:left|right|displaystyle)(?![a-z])|\\[,;!: ()\[\]]|\\?[$%]|~|\*\*")
TEX_COMMA = re.compile(r"\{,\}(?=\d{3})")
TEX_FRACTION = re.compile(r"(?<!\d)(?<!\d )\\[dt]?frac ?\{([^{}]+)\} ?\{([^{}]+)\}")  # 3\frac{1}{2} is no quotient
TEX_TEXT = re.compile(r"\\(?:text|mathrm|mbox|textbf|mathbf)\s*\{([^{}]*)\}")
LONGEST = 200  # characters of a number: Python reads no longer ones than 4,300 digits

MATH_SECONDS = 5  # for math-verify to read an answer, and to compare two


def final_answer(
    completions: list[Any],
    answer: Sequence[Any] | None = None,
    solution: Sequence[Any] | None = None,
    log_extra: Log | None = None,
) -> list[float | None]:
    """1 where a completion's final answer is the right one, else 0; None where the row has no right answer.

    A completion's answer is what its last `#### ` or `\\boxed{}` holds, or else its last number. Numbers are compared
    by value (1,234.50 = 1234.5, 1/2 = 0.5; $ and % are left out), anything else as text.
    """
    right = right_answers(completions, answer, solution)
    found = [extracted(text_of(completion)) for completion in completions]
    if log_extra is not None:
        log_extra("answer_found", found)
    return [
        None if expected is None else float(mine is not None and same(mine, expected))
        for mine, expected in zip(found, right, strict=True)
    ]


def math_answer(
    completions: list[Any],
    answer: Sequence[Any] | None = None,
    solution: Sequence[Any] | None = None,
    log_extra: Log | None = None,
) -> list[float | None]:
    """The same for expressions, sets and matrices, compared by math-verify, which the extra `math` brings."""
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError("math_answer needs math-verify: pip install 'safe-kernels[math]'") from error

    # Its limits are alarms of the main thread.
    limit = MATH_SECONDS if threading.current_thread() is threading.main_thread() else None

    def parsed(text: str) -> list[Any]:
        return parse(text, parsing_timeout=limit)

    right = [
        None if expected is None else parsed(f"${expected}$") or parsed(expected)
        for expected in right_answers(completions, answer, solution)
    ]
    found = [parsed(text_of(completion)) for completion in completions]
    if log_extra is not None:
        log_extra("answer_found", [str(each[-1]) if each else None for each in found])
    return [
        float(verify(expected, mine, timeout_seconds=limit)) if expected else None
        for mine, expected in zip(found, right, strict=True)
    ]


def right_answers(
    completions: list[Any], answer: Sequence[Any] | None, solution: Sequence[Any] | None
) -> list[str | None]:
    """Those of the rows; None where there is none."""
    if answer is None and solution is None:
        raise ConfigError("the right answers must be in a column 'answer' or 'solution', and the rows have neither")
    rows = zip(answer or [None] * len(completions), solution or [None] * len(completions), strict=True)
    texts = [str(first if first is not None else second).strip() for first, second in rows]
    return [marked(text) or text if text not in ("", "None") else None for text in texts]


def extracted(text: str) -> str | None:
    """The final answer of a text: what is marked as one, or the last number."""
    if (found := marked(text)) is not None:
        return found
    numbers = IN_TEXT.findall(undecorated(text))
    return numbers[-1] if numbers else None


def marked(text: str) -> str | None:
    r"""What the last `#### ` or `\boxed{}` of a text holds."""
    places = [(match.start(), match[1].strip()) for match in HASHES.finditer(text)]
    for match in BOXED.finditer(text):
        if (content := inside(text, match.end())) is not None:
            places.append((match.start(), content.strip()))
    return max(places)[1] if places else None


def inside(text: str, start: int) -> str | None:
    """From `start` to the brace that closes the one before it; None if it is never closed."""
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return None


def same(mine: str, expected: str) -> bool:
    first, second = value_of(mine), value_of(expected)
    if first is not None and second is not None:
        return first == second
    return normal(mine) == normal(expected)


def value_of(answer: str) -> Fraction | None:
    """The number that an answer is, units aside; None if it is something else."""
    match = VALUE.fullmatch(TEX_FRACTION.sub(r"\1/\2", normal(answer))) if len(answer) <= LONGEST else None
    if match is None:
        return None
    top, bottom = (Fraction(re.sub("\N{MINUS SIGN}", "-", number or "1").replace(",", "")) for number in match.groups())
    return top / bottom if bottom else None


def normal(answer: str) -> str:
    r"""Without what only decorates it: $, %, \text{}, spaces, a full stop, capitals."""
    return " ".join(undecorated(TEX_TEXT.sub(r" \1", answer)).split()).rstrip(" .").lower()


def undecorated(text: str) -> str:
    return DECORATION.sub("", TEX_COMMA.sub(",", text))
