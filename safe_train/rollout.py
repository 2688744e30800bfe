"""Sampling: prompts in, completions out. Padding exists here, on the left, and nowhere after."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StaticCache, StoppingCriteriaList

from safe_train.chat import turn_end
from safe_train.config import SafeConfig
from safe_train.data import Messages, Prompt, through_first_eos
from safe_train.models import Policy
from safe_train.stopping import StopStrings, stop_tokens


@dataclass(frozen=True)
class Rollout:
    prompts: list[Prompt]  # one for each completion
    completions: list[list[int]]  # tokens through the first end token
    texts: list[str]
    ended: list[bool]  # False: cut off at max_new_tokens
    sampler_logprobs: list[list[float]]  # as the sampler saw them

    @classmethod
    def build(
        cls,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        tokens: Sequence[Sequence[int]],
        logprobs: Sequence[Sequence[float]],
        eos_ids: list[int],
        stops: StopStrings | None = None,
    ) -> Rollout:
        """A rollout from sampled tokens and their log-probs, both of which may go on after an end."""
        trimmed = [through_first_eos(row, eos_ids) for row in tokens]
        if stops is not None:
            stopped = [(*stops.through_first(row), ended) for row, ended in trimmed]
            trimmed = [(row, has_stop or ended) for row, has_stop, ended in stopped]
        completions = [row for row, _ in trimmed]
        return cls(
            prompts=list(prompts),
            completions=completions,
            texts=tokenizer.batch_decode(completions, skip_special_tokens=True),
            ended=[ended for _, ended in trimmed],
            sampler_logprobs=[list(row[: len(kept)]) for row, kept in zip(logprobs, completions, strict=True)],
        )

    def for_rewards(self) -> tuple[list[str | Messages], list[str | Messages], dict[str, list[Any]]]:
        """Prompts, completions (chat messages where the prompt is chat) and the data set's other columns.

        A row without one of the others' columns has None there.
        """
        completions: list[str | Messages] = [
            text if isinstance(prompt.text, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(self.prompts, self.texts, strict=True)
        ]
        names = dict.fromkeys(name for prompt in self.prompts for name in prompt.columns)
        columns = {name: [prompt.columns.get(name) for prompt in self.prompts] for name in names}
        return [prompt.text for prompt in self.prompts], completions, columns


Sampler = Callable[[Sequence[Prompt]], Rollout]


def make_sampler(policy: Policy, tokenizer: Any, args: SafeConfig) -> Sampler:
    """One completion for each prompt, from the policy as it is when called, by the engine that `generation` names."""
    if args.generation == "vllm":
        from safe_train.vllm import VLLMSampler

        return VLLMSampler(policy, tokenizer, args)
    return functools.partial(sample, policy, tokenizer, args=args, caches={})


@torch.no_grad()
def sample(
    policy: Policy,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    args: SafeConfig,
    caches: dict[int, StaticCache | None] | None = None,
) -> Rollout:
    """One completion for each prompt, sampled from the policy itself: temperature 1, nothing cut off.

    `caches` keeps the KV caches from call to call, by their number of rows.
    """
    eos_ids = end_tokens(policy, tokenizer, args)
    stops = None if args.stop_strings is None else StopStrings(tokenizer, args.stop_strings)
    settings = GenerationConfig(
        do_sample=True,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        max_new_tokens=args.max_new_tokens,
        eos_token_id=eos_ids or None,
        pad_token_id=tokenizer.pad_token_id or 0,  # any id: masked before a prompt, cut off after a completion
    )
    tokens: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    groups = chunks([len(prompt.ids) for prompt in prompts], args.generation_batch_size or len(prompts))
    caches, rows = {} if caches is None else caches, len(groups[0])
    if rows not in caches:
        caches[rows] = static_cache(policy, args)
    cache = caches[rows]
    with policy.sampling() as model:
        for chunk in groups:
            if cache is not None:
                cache.reset()
            drawn = generate(model, [prompts[i].ids for i in chunk], settings, cache, stops)
            # The last chunk repeats a prompt to be as wide as the others; the first draw counts.
            for i, row, row_logprobs in reversed(list(zip(chunk, *drawn, strict=True))):
                tokens[i], logprobs[i] = row, row_logprobs
    return Rollout.build(tokenizer, prompts, tokens, logprobs, eos_ids, stops)


def chunks(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in the fewest chunks of at most `size`, prompts of like length together, the longest first.

    All chunks are equally wide, the last one by repeating its last index, so that the compiled model sees one shape.
    """
    count = -(-len(lengths) // size)
    if count == 1:
        return [list(range(len(lengths)))]
    width = -(-len(lengths) // count)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    order += order[-1:] * (count * width - len(order))
    return [order[start : start + width] for start in range(0, len(order), width)]


def static_cache(policy: Policy, args: SafeConfig) -> StaticCache | None:
    """A KV cache of one shape for the whole run, where it pays: transformers then compiles decoding into CUDA graphs.

    They are bound to the cache's addresses: with a new cache for each rollout they would be recorded anew, and pile up.
    """
    model = policy.causal_lm
    compiles = model.device.type == "cuda" and model._can_compile_fullgraph
    if args.cache_implementation == "dynamic" or (args.cache_implementation == "auto" and not compiles):
        return None
    return StaticCache(model.config, max_cache_len=args.max_prompt_tokens + args.max_new_tokens)


class SamplerLogprobs(LogitsProcessor):
    """Records log-probs of sampled tokens one step late, from the scores that `generate` itself still holds."""

    def __init__(self) -> None:
        self.columns: list[Tensor] = []
        self.last: Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        self.record(input_ids[:, -1])
        self.last = scores
        return scores

    def record(self, tokens: Tensor) -> None:
        if self.last is not None:
            self.columns.append(self.last.gather(-1, tokens[:, None])[:, 0] - self.last.logsumexp(-1))


def generate(
    model: Any,
    prompts: list[list[int]],
    settings: GenerationConfig,
    cache: StaticCache | None,
    stops: StopStrings | None = None,
) -> tuple[list[list[int]], list[list[float]]]:
    """Sampled tokens and their log-probs, one row a prompt."""
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), settings.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        attention_mask[row, width - len(ids) :] = 1
    recorder = SamplerLogprobs()
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=settings,
        logits_processor=LogitsProcessorList([recorder]),
        stopping_criteria=StoppingCriteriaList([] if stops is None else [stops.behind(width)]),
        past_key_values=cache,
    )
    recorder.record(output[:, -1])
    return output[:, width:].tolist(), torch.stack(recorder.columns, dim=1).tolist()


def end_tokens(policy: Policy, tokenizer: Any, args: SafeConfig | None = None) -> list[int]:
    """`stop_tokens`; else the model's end tokens, the tokenizer's, and the one that ends a turn of the chat template.

    A base model's own are those that end a text: without the template's, it would write the user's next turn as well.
    """
    if args is not None and args.stop_tokens is not None:
        return stop_tokens(tokenizer, args.stop_tokens)
    kwargs = None if args is None else args.chat_template_kwargs
    eos = policy.model.generation_config.eos_token_id
    ends = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id, *turn_end(tokenizer, kwargs)]
    return [token for token in dict.fromkeys(ends) if token is not None]
