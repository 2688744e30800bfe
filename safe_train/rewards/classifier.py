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
from safe_train.data.chat import Messages
from safe_train.models.pretrained import load_weights, loading

Row = Mapping[str, list[int]]  # the tokenizer's answer for one text

# The most that padding may change a score, as a share of the largest.
ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}
HALF_PRECISION_ROUNDING = 3e-2


class RewardModel:
    """The score of each text, whatever the model is padded with and whatever other texts its batch has.

    A decoder's score is that of the last real token, an encoder's that of its first. transformers looks for the last
    token that is not `config.pad_token_id`, and passes over a real one where the pad also ends turns, or is missing. So
    each batch is padded on the right with a token that none of its texts has, and the config is told that one.

    An encoder with a decoder (BART, T5) is read at its last end token, and wants equally many in all texts of a batch.
    A text longer than the model loses its beginning, with a warning.

    Args:
        batch_size: texts scored together (default: 32 on a GPU, 16 on a CPU).
        dtype: of the weights; auto is bfloat16 on a GPU, else float32.

    Raises:
        ConfigError: the model does not load, is no classifier with one output, or cannot score a text.
    """

    def __init__(
        self, name: str, device: torch.device | str = "cpu", batch_size: int | None = None, dtype: str = "auto"
    ):
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        is_on_gpu = torch.device(device).type == "cuda"
        chosen = ("bfloat16" if is_on_gpu else "float32") if dtype == "auto" else dtype
        with loading(name, "reward model"):
            check_kind(name, AutoConfig.from_pretrained(name))
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            model = load_weights(AutoModelForSequenceClassification, name, dtype=getattr(torch, chosen))
        self.model = model.to(device).eval()
        self.tokenizer.truncation_side = "left"  # the completion is at the end
        self.__name__ = Path(name).name
        self.positions = positions(self.model)
        self.vocab_size = getattr(self.model.config.get_text_config(), "vocab_size", 0)
        self.batch_size, self.scored, self.cut = batch_size or (32 if is_on_gpu else 16), 0, 0
        self.batch_size = self.safe_batch_size()

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float]:
        rows = [self.tokenize(*self.render(*pair)) for pair in zip(prompts, completions, strict=True)]
        return self.scores(self.shortened(rows))

    def render(self, prompt: str | Messages, completion: str | Messages) -> tuple[str, bool]:
        """The text, and whether the tokenizer adds its special tokens: a chat template writes its own."""
        if isinstance(prompt, str) and isinstance(completion, str):
            return prompt + completion, True
        if self.tokenizer.chat_template is None:
            raise ConfigError(
                f"the prompts are chats, and the tokenizer of the reward model {self.__name__!r} has no chat template: "
                "take a reward model of chats, give its tokenizer a chat_template, or score with a function "
                "(file.py:function) that makes a text of the messages"
            )
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
        scores = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: (self.ends(rows[i]), len(rows[i]["input_ids"])))
        for _, same in itertools.groupby(order, key=lambda i: self.ends(rows[i])):
            group = list(same)
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                for i, score in zip(batch, self.score([rows[i] for i in batch]), strict=True):
                    scores[i] = score
        return scores

    def ends(self, row: Row) -> int:
        """How many end tokens it has, where that has to be the same for all texts of a batch."""
        config = self.model.config
        return row["input_ids"].count(config.eos_token_id) if config.is_encoder_decoder else 0

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
        parallel.say(
            f"the reward model {self.__name__!r} does not score a padded batch as it scores each text alone "
            f"({reason}): its texts are scored one at a time, which is slower"
        )
        return 1


def check_kind(name: str, config: Any) -> None:
    """Refuses what is no sequence classifier with one output before its weights are loaded."""
    kinds = getattr(config, "architectures", None) or []
    advice = "take one that is, or score with a function (file.py:function) or a server that calls it"
    if kinds and not any("ForSequenceClassification" in kind for kind in kinds):
        raise ConfigError(
            f"the reward model {name!r} is a {kinds[0]}, not a sequence classifier (...ForSequenceClassification): "
            f"{advice}"
        )
    if config.num_labels != 1:
        labels = ", ".join(str(label) for label in config.id2label.values())
        raise ConfigError(
            f"the reward model {name!r} has {config.num_labels} outputs ({labels:.100}), it must have 1: {advice} and "
            "returns the output that you mean"
        )


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
