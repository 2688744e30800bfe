"""What the policy made of each token of a few completions: the rows of tokens.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from safe_train.sampling.experience import Experience
from safe_train.sampling.rollout import Rollout

MOST = 8  # completions of a step
LONGEST_CHARACTER = 8  # tokens that are waited for until they are a character
DIGITS = 4
UNFINISHED = "\ufffd"


def token_rows(rollout: Rollout, reward_B: Tensor, experience: Experience, tokenizer: Any) -> list[dict[str, Any]]:
    """Rows with the texts, log-probs, entropies and KL (nats) of the tokens of at most `MOST` completions.

    They are of the policy that sampled. `row` counts the step's rows of samples.jsonl from 0. All processes have to
    call it.
    """
    tables = {name: experience.table(f"{name}_L") for name in ("logprob", "entropy", "kl")}
    rows = []
    for i in spread(reward_B):
        ids = rollout.completions[i]
        numbers = {name: [short(x) for x in table[i, : len(ids)].tolist()] for name, table in tables.items()}
        rows.append({"row": i, "tokens": pieces(tokenizer, ids), **numbers})
    return rows


def spread(reward_B: Tensor, most: int = MOST) -> list[int]:
    """Completions from the lowest reward to the highest, in even steps of their order; those without one come last."""
    order = reward_B.argsort(stable=True).tolist()  # nan is the largest
    if len(order) <= most:
        return sorted(order)
    known = int(reward_B.isfinite().sum()) or len(order)
    places = {round(k * (known - 1) / (most - 1)) for k in range(most)} if known >= most else range(most)
    return sorted(order[place] for place in places)


def short(x: float) -> float:
    return float(f"{x:.{DIGITS}g}")


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token; joined they are the text of all.

    A character of several tokens is the text of its last one. Only a few tokens are decoded at a time.
    """

    def text(first: int, end: int) -> str:
        return tokenizer.decode(ids[first:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    found: list[str] = []
    first, known = 0, 0  # the tokens from `first` to `known` are the context that the next one is read in
    for end in range(1, len(ids) + 1):
        before, now = text(first, known), text(first, end)
        is_open = now.endswith(UNFINISHED) and end < len(ids) and end - known < LONGEST_CHARACTER
        found.append("" if is_open else now[len(before) :])
        if not is_open:
            first, known = known, end
    return found
