"""Rewards of the three runs in docs/trainer.md."""

import re

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def brief(prompts, completions, **columns):
    """Highest, 0, for twenty words."""
    return [-abs(len(words(completion)) - 20) / 20 for completion in completions]


def correct(completions, answer, **columns):
    """1 if the last number of the completion is the one behind #### in the data set's answer."""
    return [
        float(last_number(" ".join(words(completion))) == last_number(expected.rpartition("####")[2]))
        for completion, expected in zip(completions, answer, strict=True)
    ]


def words(completion):
    return (completion if isinstance(completion, str) else completion[-1]["content"]).split()


def last_number(text):
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
