"""What settings may be, each alone and all together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from safe_train.algorithms.registry import ALGORITHMS, PUBLISHED

if TYPE_CHECKING:
    from safe_train.config import SafeConfig

PAPER = tuple(PUBLISHED)  # as published: see paper.py

# Fastest first; transformers' names, and `varlen`: torch.nn.attention.varlen.
ATTENTION = ("flash_attention_3", "flash_attention_2", "varlen", "sdpa", "flex_attention", "eager")

CHOICES = {
    "algorithm": tuple(ALGORITHMS),
    "critic": ("auto", "soft_min", "mean", "single", "none"),
    "controller": ("auto", "safe", "fixed", *PAPER),
    "value_level": ("token", "sequence"),
    "kl_estimator": ("exact", "k2", "k3"),
    "kl_gradient": ("token", "return"),
    "loss_aggregation": ("token_mean", "sequence_mean", "constant_length"),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none"),
    "prompt_as": ("text", "user"),
    "on_bad_row": ("error", "skip"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum", "min", "mean_minus_variance"),
    "reward_dtype": ("auto", "float32", "bfloat16"),
    "lr_scheduler_type": ("constant", "linear", "cosine"),
    "reference": ("initial", "base"),
    "generation": ("hf", "vllm"),
    "cache_implementation": ("auto", "dynamic", "static"),
    "dtype": ("auto", "float32", "bfloat16"),
    "attn_implementation": ("auto", *ATTENTION),
    "layout": ("auto", "packed", "rows"),
    "trust_region_level": ("token", "sequence"),
    "divergence": ("reverse_kl", "forward_kl", "jsd", "tv"),
    "liger_kernel": ("auto", "true", "false"),
}

# What the published algorithms fix, or do not have.
NOT_IN_PAPER = """
beta kl_estimator kl_gradient kl_penalty_coef kl_excess_coef kl_momentum_coef kl_integral_coef entropy_gate gate_min
gate_max phases window value_level gamma gae_lambda minibatch_size importance_cap warmup_steps lr_scheduler_type
loss_aggregation importance_sampling_level top_p min_p
trust_region_kl trust_region_tv trust_region_level prefix_rewards
""".split()

# What acts through a reward or a ratio, and distill has neither in its loss.
NOT_IN_DISTILL = "clip_low clip_high importance_cap missing_eos_penalty prefix_rewards shuffle_advantages".split()

# Of the mean over a rollout, in nats: 3e-6 was measured in float32, and 0.04 in bfloat16. vLLM rounds in its own way.
LARGEST_SAMPLER_GAP = {"float32": 0.01, "bfloat16": 0.15, "vllm": 0.3}

Require = Callable[[bool, str, str], None]  # that it holds, of which setting, what is needed


class ConfigError(ValueError):
    """A setting that is unknown, of the wrong type, or impossible together with another."""


BOUNDS = (
    (
        "at least 1",
        lambda x: x >= 1,
        "total_steps prompts_per_step completions_per_prompt max_prompt_tokens max_new_tokens inner_epochs "
        "minibatch_size max_tokens_per_microbatch max_bad_steps window lora_alpha lora_last_layers save_every "
        "keep_checkpoints eval_completions eval_completions_per_prompt reward_batch_size samples_every "
        "generation_batch_size importance_cap teacher_top_k",
    ),
    (
        "positive",
        lambda x: x > 0,
        "alpha learning_rate critic_learning_rate huber_delta max_grad_norm critic_max_grad_norm value_clip "
        "max_preview_kl kl_budget trust_region_kl max_sampler_gap reward_timeout async_reward_timeout ddp_timeout",
    ),
    (
        "at least 0",
        lambda x: x >= 0,
        "entropy_coef beta kl_penalty_coef kl_excess_coef kl_momentum_coef kl_integral_coef lora_r eval_every "
        "weight_decay value_coef clip_low clip_high pid_kp pid_ki pid_kd missing_eos_penalty gate_min entropy_floor "
        "kl_threshold kl_threshold_min dynamic_sampling reward_retries reward_variance_coef top_k warmup_steps stop_kl "
        "prefix_rewards",
    ),
    (f"from 0 to {2**32 - 1}, as NumPy's seeds are", lambda x: 0 <= x < 2**32, "seed"),
    (
        "a finite number",
        math.isfinite,
        "learning_rate critic_learning_rate beta kl_excess_coef kl_momentum_coef kl_integral_coef kl_penalty_coef "
        "entropy_coef value_coef weight_decay alpha pid_kp pid_ki pid_kd missing_eos_penalty reward_timeout "
        "ddp_timeout async_reward_timeout reward_variance_coef pass_reward kl_budget",
    ),
    ("in (0, 1]", lambda x: 0 < x <= 1, "gamma polyak preview_min_scale vllm_gpu_memory_utilization top_p"),
    ("in [0, 1]", lambda x: 0 <= x <= 1, "gae_lambda jsd_beta"),
    ("in (0, 1)", lambda x: 0 < x < 1, "trust_region_tv"),
    ("in [0, 1)", lambda x: 0 <= x < 1, "ema_short adam_beta1 adam_beta2 min_p"),
    ("a finite number of at least 0.01", lambda x: 0.01 <= x < math.inf, "temperature"),
)


def check(c: SafeConfig) -> None:
    def require(condition: bool, name: str, needed: str) -> None:
        if not condition:
            raise ConfigError(f"{name} must be {needed}, got {getattr(c, name)!r}")

    if c.kl_estimator == "k1":
        raise ConfigError("kl_estimator k1 has zero gradient in expectation; use exact, k2 or k3")
    for name, allowed in CHOICES.items():
        require(getattr(c, name) in allowed, name, "one of " + ", ".join(allowed))
    for needed, holds, names in BOUNDS:
        for name in names.split():
            value = getattr(c, name)
            require(value is None or holds(value), name, needed)
    check_adapter(c, require)
    words = c.max_kept_bytes in ("default", "auto")
    require(words or c.max_kept_bytes.isdecimal(), "max_kept_bytes", "a number of bytes, auto or default")
    require(not c.save_best or c.eval_every > 0, "save_best", "false without eval_every: evaluations say what is best")
    low, high = c.kl_threshold_min, c.kl_threshold_max
    require(low <= c.kl_threshold <= high, "kl_threshold", f"from kl_threshold_min {low} to kl_threshold_max {high}")
    is_steered = c.kl_budget_control and c.kl_budget is not None and c.controller == "safe"
    for name in ("kl_threshold", "kl_threshold_min"):
        require(getattr(c, name) > 0 or not is_steered, name, "positive with kl_budget, whose target it scales")
    if c.kl_budget_control and c.kl_budget is not None:
        require(c.kl_integral_coef == 0, "kl_integral_coef", "0 with kl_budget, whose controller has its own integral")
    require(c.gate_min <= c.gate_max, "gate_min", "at most gate_max")
    require(
        c.stop_strings is None or c.generation == "hf", "stop_strings", "null with generation vllm; set stop_tokens"
    )
    require(c.stop_strings is None or all(c.stop_strings), "stop_strings", "texts that are not empty")
    per_prompt = c.eval_completions_per_prompt
    require(
        all(1 <= k <= per_prompt for k in c.eval_pass_at),
        "eval_pass_at",
        f"numbers from 1 to eval_completions_per_prompt {per_prompt}",
    )
    distils = c.algorithm == "distill"
    compares = ALGORITHMS[c.algorithm].advantages is not None and not distils  # the completions of a prompt
    require(
        c.multi_objective_aggregation != "normalize_then_sum" or compares,
        "multi_objective_aggregation",
        "sum_then_normalize, min or mean_minus_variance without the groups of grpo or cispo",
    )
    require(c.scale_rewards == "group" or compares, "scale_rewards", f"group for {c.algorithm}, which has no groups")
    require(c.dynamic_sampling == 0 or compares, "dynamic_sampling", f"0 for {c.algorithm}, which has no groups")
    require(
        c.importance_sampling_level == "token" or compares,
        "importance_sampling_level",
        f"token for {c.algorithm}, whose advantages differ within a completion",
    )
    require(
        c.scale_rewards == "group" or c.multi_objective_aggregation != "normalize_then_sum",
        "scale_rewards",
        "group with normalize_then_sum, which scales each reward within its group",
    )
    if c.prefix_rewards > 0:
        require(c.gamma == 1, "gamma", "1 with prefix_rewards, whose sum is then the reward")
        require(
            c.multi_objective_aggregation != "normalize_then_sum",
            "multi_objective_aggregation",
            "sum_then_normalize, min or mean_minus_variance with prefix_rewards",
        )
        require(
            c.importance_sampling_level == "token",
            "importance_sampling_level",
            "token with prefix_rewards, whose advantages differ within a completion",
        )
    size = c.completions_per_step
    require(c.minibatch_size is None or c.minibatch_size <= size, "minibatch_size", f"at most the {size} of a rollout")
    if compares:
        require(c.critic == "none", "critic", f"none for {c.algorithm}, which has no critic")
        require(c.completions_per_prompt >= 2, "completions_per_prompt", f"at least 2 for {c.algorithm}")
    elif distils:
        require(c.critic == "none", "critic", "none for distill, which has no critic")
        require(c.kl_estimator == "exact", "kl_estimator", "exact for distill")
        require(c.kl_gradient == "token", "kl_gradient", "token for distill, which has no advantages")
        check_left_alone(c, require, NOT_IN_DISTILL, "whose loss has neither rewards nor a ratio")
        for name, off in (("top_k", 0), ("top_p", 1), ("min_p", 0)):
            require(getattr(c, name) == off, name, f"{off} for distill, whose teacher has a say on every token")
    else:
        require(c.critic != "none", "critic", f"soft_min, mean or single for {c.algorithm}")
    is_served = c.teacher is not None and c.teacher.startswith(("http://", "https://"))
    require(c.temperature == 1 or not is_served, "temperature", "1 with a served teacher, whose log-probs are at 1")
    require(c.teacher is None or distils, "teacher", f"null for {c.algorithm}; algorithm distill has one")
    bounds = (c.trust_region_kl, c.trust_region_tv)
    require(None in bounds, "trust_region_tv", "null with trust_region_kl: one of them")
    if bounds != (None, None):
        require(not distils, "algorithm", "one with advantages for a trust region")
        for name, off in (("top_k", 0), ("top_p", 1), ("min_p", 0)):
            require(getattr(c, name) == off, name, f"{off} with a trust region, whose divergence is over all tokens")
    if c.algorithm in PAPER:
        check_paper(c, require)
    else:
        require(c.controller not in PAPER, "controller", f"safe or fixed for {c.algorithm}")
    if c.generation == "vllm" and c.top_k:
        if c.algorithm in PAPER:
            require(c.temperature == 1, "temperature", "1 with generation vllm and top_k, whose log-probs vLLM lacks")
    elif c.generation == "vllm":
        reason = "with generation vllm, which returns what it drew from only with top_k"
        require(c.top_p == 1, "top_k", f"above 0 with top_p {c.top_p:g} {reason}")
        require(c.min_p == 0, "top_k", f"above 0 with min_p {c.min_p:g} {reason}")
    exact = c.kl_estimator == "exact"
    require(exact or c.kl_penalty_coef == 0, "kl_estimator", "exact when kl_penalty_coef is set")
    of_tokens = c.importance_sampling_level == "token"
    require(exact or c.kl_gradient == "token", "kl_estimator", "exact with kl_gradient return")
    require(of_tokens or c.kl_gradient == "token", "kl_gradient", "token with importance_sampling_level sequence")


def check_adapter(c: SafeConfig, require: Require) -> None:
    for name in ("lora_alpha", "lora_last_layers", "lora_target_modules"):
        require(c.lora_r > 0 or getattr(c, name) is None, name, "null with lora_r 0, which trains all parameters")
    require(not c.load_in_4bit or c.lora_r > 0, "load_in_4bit", "false with lora_r 0, which trains the weights")
    require(
        not c.load_in_4bit or c.generation == "hf",
        "load_in_4bit",
        "false with generation vllm, which takes whole weights",
    )
    require(c.lora_target_modules != [], "lora_target_modules", "null for all linear layers, or some of their names")


def check_left_alone(c: SafeConfig, require: Require, names: Sequence[str], reason: str) -> None:
    preset = ALGORITHMS[c.algorithm].preset
    for field in dataclasses.fields(c):
        if field.name in names:
            default = preset.get(field.name, field.default)
            require(getattr(c, field.name) == default, field.name, f"left alone for {c.algorithm}, {reason}")


def check_paper(c: SafeConfig, require: Require) -> None:
    preset = ALGORITHMS[c.algorithm].preset
    for name in ("critic", "controller"):
        require(getattr(c, name) == preset[name], name, f"{preset[name]} for {c.algorithm}")
    check_left_alone(c, require, NOT_IN_PAPER, "which fixes it")
    if c.algorithm == "ppo_paper":
        require(not c.normalize_rewards, "normalize_rewards", "false for ppo_paper")
        require(c.entropy_coef == 0, "entropy_coef", "0 for ppo_paper")
        require(c.critic_max_grad_norm == float("inf"), "critic_max_grad_norm", ".inf for ppo_paper")
