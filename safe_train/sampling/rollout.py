"""Sampling: prompts in, completions out. Padding exists here, on the left, and nowhere after."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    StaticCache,
    StoppingCriteriaList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from safe_kernels import KeptIds
from safe_kernels.integrations.transformers import text_config
from safe_train import parallel
from safe_train.config import ConfigError, SafeConfig
from safe_train.data.batches import TokenBatch, through_first_eos
from safe_train.data.chat import Messages, turn_end
from safe_train.data.prompts import Prompt
from safe_train.models import scoring
from safe_train.models.layout import largest_gap
from safe_train.models.policy import Policy
from safe_train.randomness import seeded
from safe_train.sampling.stopping import StopStrings, stop_tokens
from safe_train.screen import bar
from safe_train.settings.limits import PAPER

# What `generate` calls the cache: since transformers 5.24 by the second name.
CACHE = next(
    name
    for name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    if name in ("past_key_values", "cache")
)


@dataclass(frozen=True)
class Rollout:
    prompts: list[Prompt]  # one for each completion
    completions: list[list[int]]  # tokens through the first end token
    texts: list[str]
    ended: list[bool]  # False: cut off at max_new_tokens
    sampler_logprobs: list[list[float]]  # as the sampler saw them
    kept: list[KeptIds] = field(default_factory=list)  # the ids that each token was drawn from; empty: from all

    def take(self, order: Sequence[int]) -> Rollout:
        columns = (getattr(self, f.name) for f in fields(Rollout))
        return Rollout(*([column[i] for i in order] if column else [] for column in columns))

    @classmethod
    def build(
        cls,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        tokens: Sequence[Sequence[int]],
        logprobs: Sequence[Sequence[float]],
        eos_ids: list[int],
        stops: StopStrings | None = None,
        skip_special_tokens: bool = True,
        kept: Sequence[KeptIds] = (),
    ) -> Rollout:
        """A rollout from sampled tokens, their log-probs and sets, all of which may go on after an end.

        The texts are without special tokens, or with all but the end token that a completion ends with.
        """
        trimmed = [through_first_eos(row, eos_ids) for row in tokens]
        if stops is not None:
            stopped = [(*stops.through_first(row), ended) for row, ended in trimmed]
            trimmed = [(row, has_stop or ended) for row, has_stop, ended in stopped]
        completions = [row for row, _ in trimmed]
        shown = completions
        if not skip_special_tokens:
            shown = [row[:-1] if row and row[-1] in eos_ids else row for row in completions]
        return cls(
            prompts=list(prompts),
            completions=completions,
            texts=tokenizer.batch_decode(shown, skip_special_tokens=skip_special_tokens),
            ended=[ended for _, ended in trimmed],
            sampler_logprobs=[list(row[: len(tokens)]) for row, tokens in zip(logprobs, completions, strict=True)],
            kept=[first_sets(sets, len(row)) for sets, row in zip(kept, completions, strict=True)] if kept else [],
        )

    def for_rewards(self) -> tuple[list[str | Messages], list[str | Messages], dict[str, list[Any]], list[list[int]]]:
        """Prompts, completions (chat messages where the prompt is chat), the data set's other columns, and tokens.

        A row without one of the others' columns has None there.
        """
        completions: list[str | Messages] = [
            text if isinstance(prompt.text, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(self.prompts, self.texts, strict=True)
        ]
        names = dict.fromkeys(name for prompt in self.prompts for name in prompt.columns)
        columns = {name: [prompt.columns.get(name) for prompt in self.prompts] for name in names}
        return [prompt.text for prompt in self.prompts], completions, columns, self.completions


def first_sets(kept: KeptIds, count: int) -> KeptIds:
    return KeptIds(kept.ids[: int(kept.offsets[count])].clone(), kept.offsets[: count + 1].clone())


def joined(rollouts: Sequence[Rollout]) -> Rollout:
    return Rollout(*(sum((getattr(rollout, f.name) for rollout in rollouts), []) for f in fields(Rollout)))


Sampler = Callable[..., Rollout]  # of prompts; greedy=True takes the likeliest token each time


class Mode(NamedTuple):
    """How prompts of different lengths are sampled together."""

    padded: bool  # on the left; else in groups of equal length
    cached: bool  # with a KV cache, or a state; else each token costs a forward of all before it

    def __str__(self) -> str:
        return ("padded" if self.padded else "in groups of equal length") + ("" if self.cached else " without a cache")


MODES = (Mode(True, True), Mode(False, True), Mode(False, False))  # the fastest first


def choose_mode(policy: Policy, args: SafeConfig, prompts: Sequence[list[int]]) -> Mode:
    """The fastest mode in which the sampler's log-probs are those of the policy, for a few tokens of these prompts.

    vLLM has its own ways.

    Raises:
        ConfigError: there is none, as where a model's code for generation does something else than its forward.
    """
    if args.generation == "vllm":
        return MODES[0]
    found: list[str] = []
    for mode in MODES:
        gap, failure = math.inf, ""
        try:
            gap = sampler_gap(policy, args, mode, prompts)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 (some models cannot generate in a mode, each with an error of its own)
            failure = f"{mode}, it fails with {type(error).__name__}: {str(error):.200}"
        gap = parallel.maxima({"gap": math.inf if math.isnan(gap) else gap})["gap"]  # all processes take one mode
        if gap <= largest_gap(policy.compute_dtype):
            if found:
                parallel.say(f"sampling {mode}: " + "; ".join(found))
            return mode
        found.append(failure or f"{mode}, log-probs differ by {gap:.2g} nats on average from the policy's")
    raise ConfigError(
        f"{type(policy.causal_lm).__name__} cannot be sampled from: " + "; ".join(found) + f" (at most "
        f"{largest_gap(policy.compute_dtype)} is rounding); take another model, or generation vllm"
    )


UNFILTERED: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


@torch.no_grad()
def sampler_gap(policy: Policy, args: SafeConfig, mode: Mode, prompts: Sequence[list[int]]) -> float:
    """How far the sampler's log-probs of a few tokens are from the policy's: the mean of |difference|, in nats.

    The random numbers of the run are left alone.
    """
    changes: dict[str, Any] = {"max_new_tokens": 3, "generation_batch_size": None, "cache_implementation": "dynamic"}
    args = dataclasses.replace(args, **changes | UNFILTERED)
    device = policy.causal_lm.device
    with seeded(0):
        tokens, logprobs, _ = draw(policy, prompts, settings(args, [], 0, mode), args, {}, mode)
        batch = TokenBatch.pack(prompts, tokens).to(device)
        own_L = scoring.logprobs(policy(batch), policy.head(), batch.targets_L)
    return (own_L - torch.tensor(sum(logprobs, []), device=device)).abs().mean().item()


@torch.no_grad()
def sample(
    policy: Policy,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    args: SafeConfig,
    caches: dict[int, StaticCache | None] | None = None,
    mode: Mode = MODES[0],
    greedy: bool = False,
) -> Rollout:
    """One completion for each prompt, sampled from the policy at its temperature, within `top_k`, `top_p` and `min_p`.

    With `greedy` the likeliest token each time. `caches` keeps KV caches from call to call, by their number of rows.
    """
    eos_ids = end_tokens(policy, tokenizer, args)
    stops = None if args.stop_strings is None else StopStrings(tokenizer, args.stop_strings)
    given = settings(args, eos_ids, tokenizer.pad_token_id or 0, mode)
    ids, caches = [prompt.ids for prompt in prompts], {} if caches is None else caches
    tokens, logprobs, kept = draw(policy, ids, given, args, caches, mode, stops, greedy)
    return Rollout.build(tokenizer, prompts, tokens, logprobs, eos_ids, stops, args.reward_skip_special_tokens, kept)


def settings(args: SafeConfig, eos_ids: list[int], pad_id: int, mode: Mode) -> GenerationConfig:
    return GenerationConfig(
        do_sample=False,  # `Draw` does
        max_new_tokens=args.max_new_tokens,
        eos_token_id=eos_ids or None,
        pad_token_id=pad_id,  # any id: masked before a prompt, cut off after a completion
        use_cache=mode.cached,
    )


def draw(
    policy: Policy,
    prompts: Sequence[list[int]],
    given: GenerationConfig,
    args: SafeConfig,
    caches: dict[int, StaticCache | None],
    mode: Mode,
    stops: StopStrings | None = None,
    greedy: bool = False,
) -> tuple[list[list[int]], list[list[float]], list[KeptIds]]:
    """Sampled tokens and their log-probs, one row a prompt, and the ids that they were drawn from, if not from all."""
    drawn: list[Any] = [None] * len(prompts)
    size = args.generation_batch_size or len(prompts)
    lengths = [len(ids) for ids in prompts]
    parts = (chunks if mode.padded else equal_chunks)(lengths, size)
    with policy.sampling() as model, bar("sampling", len(parts) * args.max_new_tokens, "token") as progress:
        for at, chunk in enumerate(parts, 1):
            if len(chunk) not in caches:
                caches[len(chunk)] = static_cache(policy, args) if mode.cached else None
            cache = caches[len(chunk)]
            if cache is not None:
                cache.reset()
            drawing = Draw(policy.temperature, filters(args), args.algorithm not in PAPER, greedy, progress)
            rows = generate(model, [prompts[i] for i in chunk], given, drawing, cache, stops)
            # The last chunk repeats a prompt to be as wide as the others; the first draw counts.
            for i, row in reversed(list(zip(chunk, rows, strict=True))):
                drawn[i] = row
            progress.update(at * args.max_new_tokens - progress.n)  # of one that ended early
    tokens, logprobs, kept = ([row[column] for row in drawn] for column in range(3))
    return tokens, logprobs, [sets for sets in kept if sets is not None]


def filters_of(args: SafeConfig) -> dict[str, Any]:
    """Those that are on, by their names in transformers and vLLM."""
    return {name: getattr(args, name) for name, off in UNFILTERED.items() if getattr(args, name) != off}


def filters(args: SafeConfig) -> LogitsProcessorList:
    """In the order of transformers' `generate`."""
    found = [TopKLogitsWarper(args.top_k)] if args.top_k else []
    found += [TopPLogitsWarper(args.top_p)] if args.top_p < 1 else []
    return LogitsProcessorList(found + ([MinPLogitsWarper(args.min_p)] if args.min_p else []))


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


def equal_chunks(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in chunks of at most `size`, each of prompts of one length, the longest first."""
    groups = [[i for i, length in enumerate(lengths) if length == each] for each in sorted(set(lengths), reverse=True)]
    return [group[start : start + size] for group in groups for start in range(0, len(group), size)]


def static_cache(policy: Policy, args: SafeConfig) -> StaticCache | None:
    """A KV cache of one shape for the whole run, where it pays: transformers then compiles decoding into CUDA graphs.

    They are bound to the cache's addresses: with a new cache for each rollout they would be recorded anew, and pile up.
    """
    model = policy.causal_lm
    compiles = model.device.type == "cuda" and model._can_compile_fullgraph
    if args.cache_implementation == "dynamic" or (args.cache_implementation == "auto" and not compiles):
        return None
    return StaticCache(model.config, max_cache_len=args.max_prompt_tokens + args.max_new_tokens)


class Draw(LogitsProcessor):
    """Draws the tokens, and records their log-probs at the temperature, from the scores that it was given.

    With `greedy` the likeliest. It comes last, and `generate` is left one token to take. So what is recorded is what
    was drawn from, with all that the model or its settings did to the scores: the gap to the policy's own log-probs
    shows it. What `filters` leave is recorded, too, unless not `renormalise`: the published algorithms draw from the
    top k, and their log-probs are those of the whole policy.
    """

    def __init__(
        self, temperature: float, filters: LogitsProcessorList, renormalise: bool, greedy: bool, progress: Any
    ):
        self.temperature, self.filters, self.greedy, self.progress = temperature, filters, greedy, progress
        self.renormalise = renormalise and len(filters) > 0
        self.logprobs: list[Tensor] = []  # of each step, one a row
        self.kept: list[tuple[Tensor, Tensor]] = []  # of each step, the ids of all rows, and how many each has

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores_BV: Any = scores / self.temperature
        kept_BV = self.filters(input_ids, scores_BV)
        token_B1 = kept_BV.argmax(-1, keepdim=True) if self.greedy else torch.multinomial(kept_BV.softmax(-1), 1)
        if self.renormalise:
            is_kept_BV, scores_BV = kept_BV > -torch.inf, kept_BV
            self.kept.append((is_kept_BV.nonzero()[:, 1].cpu(), is_kept_BV.sum(-1).cpu()))
        self.progress.update()
        self.logprobs.append(scores_BV.gather(-1, token_B1)[:, 0] - scores_BV.logsumexp(-1))
        return torch.full_like(scores_BV, -torch.inf).scatter_(-1, token_B1, 0.0)  # type: ignore[return-value]

    def sets(self, rows: int) -> list[KeptIds | None]:
        """Of each row, the ids that its tokens were drawn from."""
        if not self.renormalise:
            return [None] * rows
        counts_TB = torch.stack([counts for _, counts in self.kept])
        parts_TB = [ids.split(counts.tolist()) for ids, counts in self.kept]
        offsets_BT = torch.nn.functional.pad(counts_TB.T.cumsum(1), (1, 0))
        return [KeptIds(torch.cat([parts[row] for parts in parts_TB]), offsets_BT[row]) for row in range(rows)]


def generate(
    model: Any,
    prompts: list[list[int]],
    settings: GenerationConfig,
    drawing: Draw,
    cache: StaticCache | None,
    stops: StopStrings | None = None,
) -> list[tuple[list[int], list[float], KeptIds | None]]:
    """Sampled tokens, their log-probs and what they were drawn from, one row a prompt."""
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), settings.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, width - len(ids) :] = torch.tensor(ids)
        attention_mask[row, width - len(ids) :] = 1
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=settings,
        logits_processor=LogitsProcessorList([drawing]),
        stopping_criteria=StoppingCriteriaList([] if stops is None else [stops.behind(width)]),
        **({} if cache is None else {CACHE: cache}),
    )
    tokens_BT = output[:, width:]
    # On GPUs `generate` may notice an end one step late, and takes that step back.
    logprobs_BT = torch.stack(drawing.logprobs, dim=1)[:, : tokens_BT.shape[1]]
    return list(zip(tokens_BT.tolist(), logprobs_BT.tolist(), drawing.sets(len(prompts)), strict=True))


def end_tokens(policy: Policy, tokenizer: Any, args: SafeConfig | None = None) -> list[int]:
    """`stop_tokens`; else the model's end tokens, the tokenizer's, and the one that ends a turn of the chat template.

    A base model's own are those that end a text: without the template's, it would write the user's next turn as well.
    """
    if args is not None and args.stop_tokens is not None:
        return stop_tokens(tokenizer, args.stop_tokens)
    kwargs = None if args is None else args.chat_template_kwargs
    eos = policy.model.generation_config.eos_token_id
    if eos is None:
        eos = getattr(text_config(policy.causal_lm), "eos_token_id", None)
    ends = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id, *turn_end(tokenizer, kwargs)]
    return [token for token in dict.fromkeys(ends) if token is not None]
