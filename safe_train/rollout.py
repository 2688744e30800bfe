"""Sampling: prompts in, completions out. Padding exists here, on the left, and nowhere after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from safe_train.config import SafeConfig
from safe_train.data import Messages, Prompt, through_first_eos
from safe_train.models import Policy


@dataclass(frozen=True)
class Rollout:
    prompts: list[Prompt]  # one for each completion
    completions: list[list[int]]  # tokens through the first end token
    texts: list[str]
    ended: list[bool]  # False: cut off at max_new_tokens
    sampler_logprobs: list[list[float]]  # as the sampler saw them

    def for_rewards(self) -> tuple[list[str | Messages], list[str | Messages], dict[str, list[Any]]]:
        """Prompts, completions (chat messages where the prompt is chat) and the data set's other columns."""
        completions: list[str | Messages] = [
            text if isinstance(prompt.text, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(self.prompts, self.texts, strict=True)
        ]
        columns = {key: [prompt.columns.get(key) for prompt in self.prompts] for key in self.prompts[0].columns}
        return [prompt.text for prompt in self.prompts], completions, columns


class SamplerLogprobs(LogitsProcessor):
    """Records log-probs of sampled tokens one step late, so that one [B, V] tensor is alive at a time."""

    def __init__(self) -> None:
        self.columns: list[Tensor] = []
        self.last: Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.record(input_ids[:, -1])
        self.last = scores.float().log_softmax(-1)
        return scores

    def record(self, tokens: Tensor) -> None:
        if self.last is not None:
            self.columns.append(self.last.gather(-1, tokens[:, None])[:, 0])


@torch.no_grad()
def sample(policy: Policy, tokenizer: Any, prompts: Sequence[Prompt], args: SafeConfig) -> Rollout:
    """One completion for each prompt, sampled from the policy itself: temperature 1, nothing cut off."""
    device = policy.model.device
    width = max(len(prompt.ids) for prompt in prompts)
    pad_id = tokenizer.pad_token_id or 0  # any id will do: it is masked before a prompt and cut off after a completion
    input_ids = torch.full((len(prompts), width), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
        attention_mask[row, width - len(prompt.ids) :] = 1
    eos_ids = end_tokens(policy.model.generation_config)
    settings = GenerationConfig(
        do_sample=True,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        max_new_tokens=args.max_new_tokens,
        eos_token_id=eos_ids or None,
        pad_token_id=pad_id,
    )
    recorder = SamplerLogprobs()
    with policy.sampling() as model:
        output = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([recorder]),
        )
    recorder.record(output[:, -1])
    logprobs = torch.stack(recorder.columns, dim=1).tolist()
    trimmed = [through_first_eos(row, eos_ids) for row in output[:, width:].tolist()]
    completions = [tokens for tokens, _ in trimmed]
    return Rollout(
        prompts=list(prompts),
        completions=completions,
        texts=tokenizer.batch_decode(completions, skip_special_tokens=True),
        ended=[ended for _, ended in trimmed],
        sampler_logprobs=[row[: len(tokens)] for row, tokens in zip(logprobs, completions, strict=True)],
    )


def end_tokens(generation_config: GenerationConfig) -> list[int]:
    eos = generation_config.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
