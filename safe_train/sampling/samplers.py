"""The sampler of a run: transformers' `generate`, or vLLM."""

from __future__ import annotations

import functools
from typing import Any

from transformers import GenerationConfig

from safe_train import parallel
from safe_train.config import SafeConfig
from safe_train.models.policy import Policy
from safe_train.sampling.rollout import MODES, Mode, Sampler, sample
from safe_train.sampling.vllm import VLLMSampler

# Settings of `generate` with which the policy would not be sampled as it is scored, unless they are 0 or 1.
CHANGING = (
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "no_repeat_ngram_size", "num_beams", "min_new_tokens", "suppress_tokens"),
)


def make_sampler(policy: Policy, tokenizer: Any, args: SafeConfig, mode: Mode = MODES[0]) -> Sampler:
    """One completion for each prompt, from the policy as it is when called, by the engine that `generation` names."""
    parallel.say(left_out(policy))
    if args.generation == "vllm":
        return VLLMSampler(policy, tokenizer, args)
    return functools.partial(sample, policy, tokenizer, args=args, caches={}, mode=mode)


def left_out(policy: Policy) -> str:
    """The settings of the model's own generation config that would change the distribution, or nothing."""
    if not (found := changing(policy.model.generation_config)):
        return ""
    return (
        f"sampling at temperature {policy.temperature:g}, without the model's own settings for generation: "
        + ", ".join(found)
    )


def changing(config: GenerationConfig) -> list[str]:
    """The settings, with their values, with which a policy is not sampled as it is scored."""
    return [f"{x} {getattr(config, x)!s:.20}" for x in CHANGING if getattr(config, x, None) not in (None, 0, 1)]
