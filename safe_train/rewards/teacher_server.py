"""A teacher behind a server of the OpenAI kind that scores prompts, as `vllm serve` does: its best K ids of each token.

A request is POST URL/completions with token ids as the prompt, and `prompt_logprobs: K`. The answer's
`choices[i].prompt_logprobs` has for each position of the prompt {id: {"logprob": ..., "decoded_token": ...}} of the K
likeliest ids and of the one that stands there, and null for the first.
https://docs.vllm.ai/en/stable/serving/openai_compatible_server/

Shape legend: L response tokens, K ids of a token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import urldefrag

import torch

from safe_train.config import ConfigError, SafeConfig
from safe_train.data.batches import TokenBatch
from safe_train.rewards.server import Server

Position = dict[str, dict[str, Any]]
TRIED = "The weather was fine, and we went out for a walk."


class TeacherServer(Server):
    """Gives what `truncated_divergence` takes of a teacher. The URL may name the server's model behind a #.

    It scores one sentence at once, so that a server that cannot be used is known before a rollout.

    Raises:
        ConfigError: the server has no such model, or another tokenizer.
        RuntimeError, ValueError: as for a reward server.
    """

    def __init__(self, args: SafeConfig, tokenizer: Any, vocabulary: int, **how: Any):
        assert args.teacher is not None
        url, self.model = urldefrag(args.teacher.rstrip("/"))
        super().__init__(url, args, **how)
        self.top_k, self.tokenizer, self.vocabulary = args.teacher_top_k, tokenizer, vocabulary
        names = [each.get("id") for each in self.answer("/models", None, "data")]
        if not self.model and len(names) == 1:
            self.model = names[0]
        if self.model not in names:
            raise ConfigError(
                f"the teacher's server {url} has the models {', '.join(map(str, names))}, and teacher names "
                f"{self.model or 'none'}: name one behind a #, such as {url}#{names[0] if names else 'NAME'}"
            )
        self.check_tokenizer(self.scored([tokenizer.encode(TRIED)])[0])

    def teach(self, batch: TokenBatch) -> dict[str, Any]:
        """Ids and log-probs [L, K] for the response tokens of a batch, padded with -1."""
        ids, bounds = batch.input_ids_N.tolist(), batch.cu_seqlens.tolist()
        sequences = [ids[start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
        positions: list[Position] = []
        for first in range(0, len(sequences), self.batch_size):
            for scored in self.scored(sequences[first : first + self.batch_size]):
                positions += scored
        found = [positions[i + 1] for i in batch.predict_L.tolist()]  # what stands at i predicts i + 1
        if not all(found):
            raise ValueError(
                f"{self.url} answered null for a token of a response; only the first of a prompt may be null"
            )
        width = max(map(len, found), default=1)
        rows = [[int(token) for token in each] + [-1] * (width - len(each)) for each in found]
        logprobs = [[x["logprob"] for x in each.values()] + [0.0] * (width - len(each)) for each in found]
        device = batch.input_ids_N.device
        tokens_LK = torch.tensor(rows, dtype=torch.long, device=device).view(-1, width)
        if bool((tokens_LK >= self.vocabulary).any()):
            raise ConfigError(f"{self.url} names ids of {self.vocabulary} and more, which the policy's head has not")
        logprobs_LK = torch.tensor(logprobs, dtype=torch.float32, device=device).view(-1, width)
        return {"tokens": tokens_LK, "logprobs": logprobs_LK, "vocabulary": self.vocabulary}

    def scored(self, sequences: Sequence[list[int]]) -> list[list[Position]]:
        body = {"model": self.model, "prompt": sequences, "max_tokens": 1, "prompt_logprobs": self.top_k}
        choices = self.answer("/completions", json.dumps(body).encode(), "choices")
        by_index = sorted(choices, key=lambda choice: choice.get("index", 0))
        found = [choice.get("prompt_logprobs") for choice in by_index]
        lengths = [len(x) if isinstance(x, list) else None for x in found]
        if lengths != [len(ids) for ids in sequences]:
            raise ValueError(
                f"{self.url} answered prompt_logprobs of {lengths} positions for prompts of "
                f"{[len(ids) for ids in sequences]} tokens; it must score prompts, as vLLM's server does"
            )
        return [[position or {} for position in each] for each in found]

    def check_tokenizer(self, positions: Sequence[Position]) -> None:
        """By the texts of some ids: a server says nothing else of its tokenizer."""
        said = {int(i): x.get("decoded_token") for position in positions[:64] for i, x in position.items()}
        known = {i: text for i, text in said.items() if isinstance(text, str) and "\ufffd" not in text}
        other = [i for i, text in known.items() if text.strip() != self.tokenizer.decode([i]).strip()]
        if len(other) > len(known) / 10:
            raise ConfigError(
                f"the teacher's server {self.url} has another tokenizer than the policy: id {other[0]} is "
                f"{known[other[0]]!r} there and {self.tokenizer.decode([other[0]])!r} here. Serve a model of the "
                "policy's family"
            )

    def answer(self, path: str, body: bytes | None, name: str) -> list[Any]:
        content = self.post(body, path)
        try:
            found = json.loads(content)[name]
        except (ValueError, KeyError, TypeError):
            found = None
        if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
            raise ValueError(f'{self.url}{path} must answer {{"{name}": [...]}}, got {content[:200]!r}')
        return found
