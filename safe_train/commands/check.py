"""`safe-train check`: all that a run does before its first step, and what it would do; then it stops.

The order is the run's, everything cheap before everything slow, since it is the run's own code.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from safe_kernels.integrations.transformers import plain_ids, text_config
from safe_train import parallel
from safe_train.config import ConfigError
from safe_train.data.batches import TokenBatch
from safe_train.engines.engine import learning_rate
from safe_train.engines.launched import cuts_weights
from safe_train.models.policy import Policy
from safe_train.models.reference import stored
from safe_train.models.teacher import Teacher
from safe_train.randomness import guest, seeded
from safe_train.run.self_check import self_check
from safe_train.run.start import needed_bytes
from safe_train.trainer import SafeTrainer

PROBE_TOKENS = {"cpu": 64, "cuda": 1024}  # of the sequence whose activations are counted


class Memory(NamedTuple):
    """Estimated bytes of one process; None for what is not estimated."""

    weights: int  # of the policy, its reference and a teacher in memory
    training: int  # gradients, Adam's moments, the critic
    rollout: int | None  # KV cache and logits, when the longest prompts and completions come together
    update: int | None  # what a micro-batch keeps for its backward

    @property
    def peak(self) -> int:
        return self.weights + self.training + max(self.rollout or 0, self.update or 0)


def check(trainer: SafeTrainer) -> str:
    """Runs the self-check, samples and judges one completion, and returns what the run would do."""
    self_check(trainer)
    lines = [*described(trainer), *needs(trainer, memory(trainer)), sampled(trainer)]
    return "\n".join([*lines, "checked; nothing was trained or written"])


def described(trainer: SafeTrainer) -> list[str]:
    args, policy, rows = trainer.args, trainer.policy, trainer.prompts.known_length
    model, completions = policy.causal_lm, args.completions_per_step
    trained = f"{count(trainer.trainable):,} of them" + (", an adapter" if policy.is_lora else "")
    new, longest = args.max_new_tokens, longest_sequence(trainer)
    steps = -(-completions // (args.minibatch_size or completions)) * args.inner_epochs
    epochs = f" ({args.total_steps * args.prompts_per_step / rows:.3g} epochs)" if rows else ""
    return [
        f"model: {args.model}, a {type(model).__name__} of {count(model.parameters()):,} weights in "
        f"{str(model.dtype).removeprefix('torch.')} on {trainer.device}; trained: {trained}",
        f"layout: {policy.layout}; attention: {model.config._attn_implementation}; generation: {args.generation}, "
        f"{trainer.mode}; processes: {parallel.size()}",
        f"algorithm: {args.algorithm}; critic {args.critic}, controller {args.controller}, beta {args.beta:g}, "
        f"learning rate {learning_rate(policy, args):g}",
        *([] if args.teacher is None else [f"teacher: {args.teacher}; divergence {args.divergence}"]),
        f"a step: {args.prompts_per_step} prompts x {args.completions_per_prompt} completions, {steps} optimizer "
        f"steps; at most {completions * longest:,} tokens ({longest - new} + {new} each)",
        f"the run: {args.total_steps} steps{epochs} on {args.dataset}, in {args.output_dir}",
    ]


def longest_sequence(trainer: SafeTrainer) -> int:
    """Tokens of the longest prompt that was rendered, or that may come in a stream, and of its completion."""
    return (trainer.prompts.seen.longest or trainer.args.max_prompt_tokens) + trainer.args.max_new_tokens


def count(parameters: Iterable[Tensor]) -> int:
    """Weights, also of parameters that are stored in parts (ZeRO-3) or two in a byte (bitsandbytes)."""

    def weights(p: Any) -> int:
        quantised = getattr(p, "quant_state", None)
        return quantised.shape.numel() if quantised is not None else getattr(p, "ds_numel", p.numel())

    return sum(map(weights, parameters))


def needs(trainer: SafeTrainer, found: Memory) -> list[str]:
    """Memory and disk, beside what there is."""
    names = ("weights", "gradients and optimizers", "rollout", "micro-batch")
    parts = ", ".join(f"{name} {size(value)}" for name, value in zip(names, found, strict=True))
    has = total_memory(trainer.device)
    args, lines = trainer.args, [f"memory, estimated: {size(found.peak)} of {size(has)} ({parts})"]
    if found.peak > has:
        lines.append(
            "warning: that is more than there is; see max_tokens_per_microbatch, gradient_checkpointing, "
            "generation_batch_size and lora_r"
        )
    written = needed_bytes([*trainer.trainable, *(trainer.critic.parameters() if trainer.critic is not None else ())])
    free = shutil.disk_usage(args.output_dir).free
    kept = args.keep_checkpoints + args.save_best
    lines.append(f"disk: {size(written)} a checkpoint, {kept} are kept; {size(free)} free")
    return lines


def size(number: int | None) -> str:
    if number is None:
        return "not estimated"
    return f"{number / 1e9:.3g} GB" if number >= 1e8 else f"{number / 1e6:.3g} MB"


def total_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def memory(trainer: SafeTrainer) -> Memory:
    policy, critic = trainer.policy, trainer.critic
    models: list[nn.Module] = [policy, *policy.frozen_copies]
    if isinstance(trainer.teacher, Teacher):  # which a server is not
        models.append(trainer.teacher)
    weights = {id(p): stored(p) for model in models for p in model.parameters()}.values()
    kept = policy.handed_over.values if policy.handed_over is not None else []
    # A gradient as wide as its weight, and two moments in float32.
    training = needed_bytes(map(stored, trainer.trainable))
    if critic is not None:
        training += 5 * sum(p.nbytes for p in critic.heads.parameters())  # with the lagged copy
    return Memory(
        weights=sum(x.nbytes for x in (*weights, *kept)),
        training=training,
        rollout=rollout_bytes(trainer),
        update=None if cuts_weights() else update_bytes(trainer),
    )


def rollout_bytes(trainer: SafeTrainer) -> int | None:
    """Keys and values of each token and layer, and the last token's logits with their log-probs in float32."""
    args, config = trainer.args, text_config(trainer.policy.causal_lm)
    if args.generation == "vllm":
        return int(args.vllm_gpu_memory_utilization * total_memory(trainer.device))
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)
    if not width or hasattr(config, "kv_lora_rank"):  # a state, or keys in another form
        return None
    rows = -(-args.completions_per_step // parallel.size())
    rows = min(rows, args.generation_batch_size or rows)
    values = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * width
    cache = values * longest_sequence(trainer) if trainer.mode.cached else 0
    return rows * (cache * trainer.policy.compute_dtype.itemsize + 2 * 4 * config.vocab_size)


def update_bytes(trainer: SafeTrainer) -> int:
    """What autograd keeps of a sequence, counted, times the tokens of the largest micro-batch over its own.

    With gradient checkpointing, what a layer keeps comes back when its turn is in the backward.
    """
    args, policy = trainer.args, trainer.policy
    longest = longest_sequence(trainer)
    ids = plain_ids(policy.causal_lm, PROBE_TOKENS["cpu"])
    length = min(longest, PROBE_TOKENS.get(trainer.device.type, PROBE_TOKENS["cpu"]))
    sequence = [ids[i % len(ids)] for i in range(length)]
    batch = TokenBatch.pack([sequence[:1]], [sequence[1:]]).to(trainer.device)
    kept = saved_bytes(policy, batch)
    if args.gradient_checkpointing:
        policy.eval()
        kept += (saved_bytes(policy, batch) - kept) // text_config(policy.causal_lm).num_hidden_layers
        policy.train()
    share = -(-(args.minibatch_size or args.completions_per_step) // parallel.size()) * longest
    return kept * max(longest, min(args.max_tokens_per_microbatch, share)) // length


def saved_bytes(policy: Policy, batch: TokenBatch) -> int:
    """Of the tensors that a forward leaves for its backward, but for the weights."""
    weights = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    seen: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        hidden_LH = policy(batch)  # while it lives, no address is used twice
    del hidden_LH
    return sum(seen.values())


def sampled(trainer: SafeTrainer) -> str:
    """A completion of the first prompt, and what the rewards say of it."""
    with seeded(trainer.args.seed):
        rollout = trainer.complete(trainer.prompts.at(0, 1))
    try:
        with parallel.together("the rewards of the check"), guest(trainer.args.seed):
            scores = trainer.rewards(*rollout.for_rewards())
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"{error}, for a completion that the model sampled: {rollout.texts[0]!r:.500}") from error
    judged = ", ".join(f"{name} {x.item():.4g}" for name, x in scores.items())
    return f"a completion of the first prompt: {rollout.texts[0]!r}\nits reward: {judged}"
