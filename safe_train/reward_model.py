"""Rewards from a classifier: a sequence-classification model with one output scores prompt and completion."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from safe_train import parallel
from safe_train.config import ConfigError
from safe_train.data import Messages
from safe_train.models import load_weights

Row = Mapping[str, list[int]]  # the tokenizer's answer for one text

# The most that padding may change a score, as a share of the largest.
ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}
HALF_PRECISION_ROUNDING = 3e-2


class RewardModel:
    """The score of each text, whatever the model is padded with and whatever other texts its batch has.

    A decoder's score is that of the last real token, an encoder's that of its first. transformers looks for the last
    token that is not `config.pad_token_id`, and passes over a real one where the pad also ends turns, or is missing. So
    each batch is padded on the right with a token that none of its texts has, and the config is told that one.

    A text longer than the model loses its beginning, with a warning.

    Raises:
        ConfigError: the model does not load, has more than one output, or cannot score a text.
    """

    def __init__(self, name: str, device: torch.device | str = "cpu", batch_size: int = 16):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            self.model = load_weights(AutoModelForSequenceClassification, name).to(device).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot load the reward model {name!r}: {error}") from error
        if self.model.config.num_labels != 1:
            raise ConfigError(f"the reward model {name!r} has {self.model.config.num_labels} outputs, it must have 1")
        self.tokenizer.truncation_side = "left"  # the completion is at the end
        self.__name__ = Path(name).name
        self.positions = positions(self.model)
        self.vocab_size = getattr(self.model.config.get_text_config(), "vocab_size", 0)
        self.batch_size, self.scored, self.cut = batch_size, 0, 0
        self.batch_size = self.safe_batch_size()

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float]:
        rows = [self.tokenize(*self.render(*pair)) for pair in zip(prompts, completions, strict=True)]
        return self.scores(self.shortened(rows))

    def render(self, prompt: str | Messages, completion: str | Messages) -> tuple[str, bool]:
        """The text, and whether the tokenizer adds its special tokens: a chat template writes its own."""
        if isinstance(prompt, str) and isinstance(completion, str):
            return prompt + completion, True
        return self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False), False

    def tokenize(self, text: str, special_tokens: bool) -> tuple[Row, bool]:
        """The text's tokens, without its first ones if it is too long, and whether it is."""
        limit = min(self.positions, self.tokenizer.model_max_length)
        options = {"add_special_tokens": special_tokens, "verbose": False}
        row = self.tokenizer(text, **options)
        if len(row["input_ids"]) <= limit:
            return row, False
        return self.tokenizer(text, truncation=True, max_length=limit, **options), True

    def shortened(self, rows: list[tuple[Row, bool]]) -> list[Row]:
        """The rows, with a warning that counts those that were cut."""
        cut = sum(is_cut for _, is_cut in rows)
        self.scored, self.cut = self.scored + len(rows), self.cut + cut
        if cut:
            limit = min(self.positions, self.tokenizer.model_max_length)
            warnings.warn(
                f"reward model {self.__name__!r}: {cut} of {len(rows)} texts are longer than its {limit} tokens and "
                f"lost their beginning ({self.cut} of {self.scored} in this run so far)",
                stacklevel=2,
            )
        return [row for row, _ in rows]

    def scores(self, rows: list[Row]) -> list[float]:
        for row in rows:
            if not row["input_ids"]:
                raise ValueError("a text has no tokens, so that there is none to read its score from")
            if max(row["input_ids"]) >= self.vocab_size:
                token = max(row["input_ids"])
                raise ValueError(
                    f"the tokenizer writes {self.tokenizer.decode([token])!r} as token {token}, and the model has only "
                    f"{self.vocab_size}: they are not of one model"
                )
        starts = range(0, len(rows), self.batch_size)
        return [score for start in starts for score in self.score(rows[start : start + self.batch_size])]

    @torch.no_grad()
    def score(self, rows: list[Row]) -> list[float]:
        """The scores of one batch."""
        lengths = [len(row["input_ids"]) for row in rows]
        pad = self.pad_for(rows)
        if pad is None and min(lengths) < max(lengths):  # a batch that has all tokens there are
            return [score for row in rows for score in self.score([row])]
        for config in (self.model.config, self.model.config.get_text_config()):
            config.pad_token_id = -1 if pad is None else pad

        def padded(name: str, fill: int) -> torch.Tensor:
            values = [row[name] + [fill] * (max(lengths) - len(row[name])) for row in rows]
            return torch.tensor(values, device=self.model.device)

        inputs = {"input_ids": padded("input_ids", -1 if pad is None else pad)}
        places = torch.arange(max(lengths), device=self.model.device)
        inputs["attention_mask"] = (places < torch.tensor(lengths, device=places.device)[:, None]).long()
        if any(any(row.get("token_type_ids", ())) for row in rows):  # else 0, as without: GPT-2 would embed the 0
            inputs["token_type_ids"] = padded("token_type_ids", 0)
        return self.model(**inputs).logits.reshape(len(rows)).float().tolist()

    def pad_for(self, rows: list[Row]) -> int | None:
        """A token that none of the texts has: the usual pad if it can be."""
        used = {token for row in rows for token in row["input_ids"]}
        usual = self.tokenizer.pad_token_id
        first = () if usual is None or usual >= self.vocab_size else (usual,)
        return next((token for token in itertools.chain(first, range(self.vocab_size)) if token not in used), None)

    def safe_batch_size(self) -> int:
        """`batch_size`, or 1 if the model scores a text differently beside others."""
        special = set(self.tokenizer.all_special_ids)
        words = [i for i in torch.linspace(0, self.vocab_size - 1, 24).long().tolist() if i not in special]
        texts = [self.tokenizer.decode(words[start:end]) for start, end in ((0, 3), (3, 8), (8, len(words)))]
        rows = [row for row, _ in (self.tokenize(text, True) for text in texts) if row["input_ids"]]
        try:
            alone = [self.scores([row])[0] for row in rows]
        except Exception as error:
            raise ConfigError(f"the reward model {self.__name__!r} cannot score a text: {error}") from error
        try:
            gap = max(abs(a - b) for a, b in zip(alone, self.score(rows), strict=True))
        except Exception as error:
            return self.one_at_a_time(f"{type(error).__name__}: {error}")
        bound = ROUNDING.get(self.model.dtype, HALF_PRECISION_ROUNDING) * max(map(abs, alone))
        return self.batch_size if gap <= bound else self.one_at_a_time(f"scores differ by {gap:.3g}")

    def one_at_a_time(self, reason: str) -> int:
        if parallel.is_main():
            print(
                f"the reward model {self.__name__!r} does not score a padded batch as it scores each text alone "
                f"({reason}): its texts are scored one at a time, which is slower",
                flush=True,
            )
        return 1


def positions(model: nn.Module) -> int:
    """The most tokens that the model has positions for."""
    config: Any = model.config
    config = config.get_text_config()
    known = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    limit = min((x for x in known if isinstance(x, int) and x > 0), default=2**31)
    for module in model.modules():  # RoBERTa and its kin count positions from behind the pad's
        first = getattr(module, "padding_idx", None)
        if isinstance(first, int) and getattr(module, "weight", torch.empty(0)).shape[:1] == (limit,):
            return limit - first - 1
    return limit
