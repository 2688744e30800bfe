"""Settings as TRL, verl and Axolotl name them, and what they are here. docs/trainer.md shows the table."""

from __future__ import annotations

from typing import Any, NamedTuple

ROLLOUTS = "total_steps, in rollouts: an epoch has rows / prompts_per_step of them"
LAUNCH = "by `accelerate launch`: docs/scaling.md"
QUANTISED = "load_in_4bit=true is QLoRA; 8 bits are not offered"
ALONE = "not offered: the policy is sampled as it is scored; temperature is the one setting of both"
LOSSES = {
    "dapo": "loss_aggregation=token_mean",
    "grpo": "loss_aggregation=sequence_mean",
    "dr_grpo": "loss_aggregation=constant_length",
    "cispo": "algorithm=cispo completions_per_prompt=8",
}
AGGREGATIONS = {
    "token-mean": "loss_aggregation=token_mean",
    "seq-mean-token-mean": "loss_aggregation=sequence_mean",
    "seq-mean-token-sum-norm": "loss_aggregation=constant_length",
}


class Row(NamedTuple):
    theirs: str  # names, the first with an example value
    ours: str | dict[str, str] = ""  # key=value pairs, {} for the value; or by value
    note: str = ""


TABLE = (
    # What is trained, on what
    Row("model_name_or_path=org/model base_model actor_rollout_ref.model.path", "model={}"),
    Row("model_revision=v1 revision_of_model", "revision={}"),
    Row("dataset_name=org/rows data.train_files train_files", "dataset={}"),
    Row("data.val_files=rows.jsonl val_files", "eval_dataset={}"),
    Row("dataset_train_split=train dataset_test_split dataset_config datasets", note="dataset=NAME:SPLIT"),
    Row("val_set_size=0.1 test_datasets", note="eval_dataset, such as org/rows:train[-5%:]"),
    Row("reward_funcs=rewards.py:mine reward_model_path reward_model", "reward={}"),
    Row("adv_estimator=grpo", {"grpo": "algorithm=grpo completions_per_prompt=8", "gae": "algorithm=ppo"}),
    Row("rl=grpo", {"grpo": "algorithm=grpo completions_per_prompt=8"}, "safe, ppo, grpo and cispo are trained here"),
    Row("default_local_dir=runs/a run_name", "output_dir={}"),
    Row("data_seed=1", "seed={}"),
    Row("max_steps=500 total_training_steps", "total_steps={}", "in rollouts"),
    Row("num_train_epochs=1 num_epochs total_epochs total_episodes", note=ROLLOUTS),
    Row("teacher_model_name_or_path=org/model teacher_model", "algorithm=distill teacher={}"),
    # Rollout
    Row("train_batch_size=64 gen_batch_size", "prompts_per_step={}"),
    Row("num_generations=8 rollout.n num_return_sequences rloo_k", "completions_per_prompt={}"),
    Row("max_completion_length=256 response_length max_response_length max_tokens", "max_new_tokens={}"),
    Row("max_prompt_length=512 sequence_len", "max_prompt_tokens={}", "of the prompt alone"),
    Row("use_vllm=true", {"true": "generation=vllm", "false": "generation=hf"}),
    Row("vllm_mode=colocate", note="generation=vllm runs beside the trainer, on its device"),
    Row("gpu_memory_utilization=0.3", "vllm_gpu_memory_utilization={}"),
    Row("vllm_importance_sampling_cap=2 vllm_importance_sampling_clip_max", "importance_cap={}"),
    Row("typical_p=0.9 epsilon_cutoff eta_cutoff top_h", note="not offered: top_k, top_p and min_p are"),
    Row("repetition_penalty=1.1 no_repeat_ngram_size presence_penalty frequency_penalty generation_kwargs", note=ALONE),
    Row("mask_truncated_completions=true", note="missing_eos_penalty charges them; they stay in the loss"),
    # Optimisation
    Row(
        "per_device_train_batch_size=8 micro_batch_size",
        "minibatch_size={}",
        "completions an optimizer step, over all processes: multiply. max_tokens_per_microbatch bounds the memory",
    ),
    Row(
        "gradient_accumulation_steps=4 ppo_micro_batch_size_per_gpu",
        note="not needed: max_tokens_per_microbatch cuts a minibatch into forwards that fit",
    ),
    Row("ppo_max_token_len_per_gpu=8192", "max_tokens_per_microbatch={}"),
    Row("ppo_mini_batch_size=16 num_mini_batches", note="minibatch_size, which counts completions"),
    Row("per_device_eval_batch_size=8", note="eval_completions, and generation_batch_size"),
    Row("num_iterations=2 num_ppo_epochs ppo_epochs", "inner_epochs={}"),
    Row("actor.optim.lr=1e-6 lr", "learning_rate={}"),
    Row("critic.optim.lr=1e-5", "critic_learning_rate={}"),
    Row("grad_clip=1", "max_grad_norm={}"),
    Row("warmup_ratio=0.1", note="warmup_steps, in rollouts"),
    Row("lr_scheduler=cosine", "lr_scheduler_type={}"),
    Row("optim=adamw_torch optimizer adam_epsilon", note="AdamW, with PyTorch's epsilon"),
    Row("enable_gradient_checkpointing=true", "gradient_checkpointing={}"),
    Row("bf16=true", {"true": "dtype=bfloat16", "false": "dtype=float32", "auto": "dtype=auto"}),
    Row("fp16=true", note="dtype=bfloat16 or float32; there is no loss scaling for float16"),
    Row("torch_dtype=bfloat16", "dtype={}"),
    Row("tf32=true", note="on by itself beside bfloat16 weights on a GPU"),
    Row("flash_attention=true use_flash_attention_2", {"true": "attn_implementation=flash_attention_2"}),
    # Adapters
    Row("use_peft=true", {"true": "lora_r=16", "false": "lora_r=0"}),
    Row("adapter=lora", {"lora": "lora_r=16", "qlora": "lora_r=16 load_in_4bit=true"}),
    Row("lora_rank=16", "lora_r={}"),
    Row("target_modules=[q_proj,v_proj]", "lora_target_modules={}"),
    Row("lora_target_linear=true", note="the default; lora_target_modules names some of them"),
    Row("lora_dropout=0.05", note="refused: the policy that is scored would not be the one that was sampled"),
    Row("use_dora=true use_rslora", note="peft_config=LoraConfig(...) in Python"),
    Row("load_in_8bit=true bnb_4bit_quant_type use_bnb_nested_quant", note=QUANTISED),
    # Loss
    Row("kl_coef=0.05 init_kl_coef kl_loss_coef", "beta={}"),
    Row("use_kl_in_reward=true", {"true": "kl_gradient=return", "false": "kl_gradient=token"}, "the exact KL"),
    Row(
        "kl_loss_type=low_var_kl kl_penalty",
        {"low_var_kl": "kl_estimator=k3", "k3": "kl_estimator=k3", "mse": "kl_estimator=k2", "k2": "kl_estimator=k2"},
        "the default is the exact KL",
    ),
    Row("cliprange=0.2 epsilon clip_ratio", "clip_low={} clip_high={}"),
    Row("epsilon_high=0.28 clip_ratio_high", "clip_high={}"),
    Row("clip_ratio_low=0.2", "clip_low={}"),
    Row("entropy_coeff=0.001", "entropy_coef={}"),
    Row("vf_coef=0.1", "value_coef={}"),
    Row("cliprange_value=0.2", "value_clip={}", "in units of normalised rewards"),
    Row("lam=0.95", "gae_lambda={}"),
    Row("whiten_rewards=true", "normalize_rewards={}", "by running moments"),
    Row("target_kl=0.5", "stop_kl={}"),
    Row("loss_type=dapo", LOSSES, "dapo, grpo, dr_grpo and cispo are offered"),
    Row("loss_agg_mode=token-mean", AGGREGATIONS),
    Row("filter_groups.enable=true", note="dynamic_sampling=3, with algorithm=grpo or cispo"),
    Row("max_num_gen_batches=4 filter_groups.max_num_gen_batches", note="dynamic_sampling, which is one less"),
    Row("disable_dropout=true", note="dropout is always off"),
    Row("sync_ref_model=true ref_model", note="the reference stays as it is; see reference"),
    # Bookkeeping
    Row("save_steps=100 save_freq", "save_every={}"),
    Row("save_total_limit=2 max_ckpt_to_keep", "keep_checkpoints={}"),
    Row("eval_steps=100 test_freq", "eval_every={}"),
    Row("save_strategy=steps eval_strategy saves_per_epoch evals_per_epoch", note="save_every, eval_every"),
    Row("load_best_model_at_end=true", "save_best={}", "in best/"),
    Row("logging_steps=10 logging_strategy", note="metrics.jsonl has every step"),
    Row("log_completions=true", note="samples.jsonl has them, every samples_every steps"),
    Row("wandb_project=mine", "report_to=[wandb]"),
    Row("remove_unused_columns=false", note="all columns reach the rewards"),
    Row("shuffle_dataset=true", note="always, anew in each epoch, by the seed"),
    Row("resume_from_checkpoint=true auto_resume_from_checkpoints", note="--resume, or in train()"),
    Row("overwrite_output_dir=true", note="--overwrite"),
    Row("push_to_hub=true hub_model_id", note="`safe-train export`, then `hf upload`"),
    Row("fsdp=full_shard deepspeed fsdp_config n_gpus_per_node nnodes", note=LAUNCH),
)  # fmt: skip


GONE = {  # old defaults, and why
    "ema_long": (0.99, "it decided nothing but a logged average"),
    "kl_in_reward": (False, "kl_gradient=return charges a token with the exact KL of later ones, not the sampled KL"),
}


def without_gone(values: dict[str, Any]) -> dict[str, Any]:
    """Settings of an older file: those that there were, at their defaults, mean nothing."""
    return {name: x for name, x in values.items() if name not in GONE or written(x) != written(GONE[name][0])}


def answer(name: str, value: Any) -> str | None:
    """What `name=value` of another trainer is here; None for a name that the table does not have.

    verl's dotted names are also known by their last part, or two.
    """
    if name in GONE:
        return f"it is gone: {GONE[name][1]}"
    parts = name.split(".")
    endings = [".".join(parts[start:]) for start in range(len(parts))]
    for ending in endings:
        for row in TABLE:
            if ending in names(row):
                return sentence(row, written(value))
    return None


def names(row: Row) -> list[str]:
    return [word.partition("=")[0] for word in row.theirs.split()]


def example(row: Row) -> str:
    return row.theirs.split()[0].partition("=")[2]


def settings(row: Row, value: str) -> str:
    """Our key=value pairs, or nothing where there are none for this value."""
    ours = row.ours.get(value.lower(), "") if isinstance(row.ours, dict) else row.ours
    return ours.replace("{}", value) if value else ""


def sentence(row: Row, value: str) -> str:
    if found := settings(row, value):
        return f"here it is {found}" + (f" ({row.note})" if row.note else "")
    return f"here: {row.note}" if row.note else "here there is no such choice"


def written(value: Any) -> str:
    """A value as it stands in YAML or on the command line."""
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(written, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def markdown() -> list[str]:
    """The lines of the table in docs/trainer.md."""
    lines = ["| TRL, verl, Axolotl | here |", "|---|---|"]
    for row in TABLE:
        first, *others = row.theirs.split()
        ours = settings(row, example(row))
        parts = [f"`{ours}`" if ours else "", row.note]
        lines.append(f"| {', '.join(f'`{name}`' for name in (first, *others))} | {': '.join(filter(None, parts))} |")
    return lines
