"""One checkpoint: everything that a run needs to continue as if it had never stopped.

The `policy` folder inside it loads with transformers or peft, tokenizer included. Only tensors and plain values are
unpickled. It is the same whatever the number of processes that wrote it, and resumes on any other; they must all see
the folder.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor.experimental import implicit_replication

from safe_train import parallel
from safe_train.config import ConfigError
from safe_train.engines import sharding
from safe_train.engines.engine import Engine, options
from safe_train.models import adapters
from safe_train.models.policy import Policy, plain_generation
from safe_train.models.pretrained import load_weights
from safe_train.models.reference import HandedOver, Identity, check_identity
from safe_train.randomness import python_generators, restore_generators, torch_generators
from safe_train.run import events

if TYPE_CHECKING:
    from safe_train.trainer import SafeTrainer

# What an adapter's config says beside what the adapter computes.
NOT_COMPARED = {"auto_mapping", "base_model_name_or_path", "inference_mode", "lora_dropout", "peft_version", "revision"}
UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, EOFError, SafetensorError, pickle.UnpicklingError)

UNFITTING = (RuntimeError, ValueError, KeyError, AttributeError)  # weights and states of another shape


class Damaged(Exception):
    """A checkpoint that cannot be read: cut short, or overwritten."""


class Contents(NamedTuple):
    state: dict[str, Any]
    policy: Mapping[str, Tensor]
    critic: Mapping[str, Tensor]
    optimizers: dict[str, Any]
    random: dict[str, Tensor]
    handed_over: Mapping[str, Tensor]  # the adapter that the reference is; empty for a reference without one
    identity: Identity  # of the model, the reference and the tokenizer


def write_files(folder: Path, trainer: SafeTrainer, policy: dict[str, Tensor], optimizers: dict[str, Any]) -> None:
    handed_over = trainer.policy.handed_over
    write_policy(folder / "policy", trainer.policy, trainer.tokenizer, policy)
    torch.save(optimizers, folder / "optimizers.pt")
    if trainer.critic is not None:
        save_file(trainer.critic.state_dict(), folder / "critic.safetensors")
    if handed_over is not None:
        save_file(handed_over.adapter, folder / "reference.safetensors")
    (folder / "reference.json").write_text(json.dumps(trainer.identity))
    save_file(torch_generators(), folder / "random.safetensors")
    (folder / "state.json").write_text(state_text(trainer))
    for path in (folder, *folder.rglob("*")):
        flush(path)


def write_policy(folder: Path, policy: Policy, tokenizer: Any, weights: dict[str, Tensor]) -> None:
    if policy.is_lora:
        adapters.save(policy.model, folder, weights, policy.resized_vocabulary)
    else:
        save_whole(policy.model, folder, weights)
    tokenizer.save_pretrained(folder)


def save_whole(model: Any, folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Writes the model with its own settings for generation, which transformers would refuse if it finds them odd."""
    with plain_generation(model):
        model.save_pretrained(folder, state_dict=weights)
    model.generation_config.to_json_file(folder / "generation_config.json", use_diff=True)


def read(path: Path, policy: Policy) -> Contents:
    """All of a checkpoint, before any of it is put to use."""
    if not (path / "state.json").is_file():
        raise ConfigError(f"{path} is not a checkpoint: it has no state.json")
    if (path / "policy" / "adapter_config.json").exists() != policy.is_lora:
        kind = "full weights" if policy.is_lora else "LoRA adapters"
        raise ConfigError(f"{path} does not fit this run's settings: it holds {kind}")
    critic, reference = path / "critic.safetensors", path / "reference.safetensors"
    try:
        settings = json.loads((path / "policy" / "adapter_config.json").read_text()) if policy.is_lora else {}
        contents = Contents(
            state=json.loads((path / "state.json").read_text()),
            policy=read_policy(policy, path / "policy"),
            critic=load_file(critic) if critic.exists() else {},
            optimizers=torch.load(path / "optimizers.pt", map_location="cpu", weights_only=True),
            random=load_file(path / "random.safetensors"),
            handed_over=load_file(reference) if reference.exists() else {},
            identity=identity_of(path),
        )
    except UNREADABLE as error:
        raise Damaged(f"{path} is damaged: {type(error).__name__}: {error}") from error
    check_adapters(policy, settings, path)
    return contents


def identity_of(path: Path) -> Identity:
    """Of the run that a checkpoint is of; earlier versions did not write it."""
    identity = path / "reference.json"
    return json.loads(identity.read_text()) if identity.is_file() else {}


def named(path: Path, policy: Policy) -> Contents:
    """The contents of the one checkpoint that was asked for."""
    try:
        return read(path, policy)
    except Damaged as error:
        raise ConfigError(
            f"{error}; --resume takes the newest that can be read, as does eval without a name"
        ) from error


def check_adapters(policy: Policy, saved: Mapping[str, Any], path: Path) -> None:
    """Adapters of another scale would fit by their shapes."""
    if not policy.is_lora:
        return
    own = policy.model.peft_config[adapters.active(policy.model)].to_dict()
    own = json.loads(json.dumps(own, default=lambda x: list(x) if isinstance(x, set) else str(x)))
    for name in sorted((saved.keys() & own.keys()) - NOT_COMPARED):
        there, here = (sorted(x, key=str) if isinstance(x, list) else x for x in (saved[name], own[name]))
        if there != here:
            raise ConfigError(f"{path} does not fit this run's settings: its adapters have {name} {there}, not {here}")


def read_policy(policy: Policy, folder: Path) -> Mapping[str, Tensor]:
    if policy.is_lora:
        import peft

        return peft.load_peft_weights(str(folder), device="cpu")
    return load_weights(type(policy.model), folder, dtype=policy.model.dtype).state_dict()


def check_seed(trainer: SafeTrainer, saved: Mapping[str, Any], path: Path) -> None:
    seed = saved.get("seed", trainer.args.seed)
    if seed != trainer.args.seed:
        raise ConfigError(
            f"seed must be {seed}, with which the run of {path} began, got {trainer.args.seed}: another order "
            "would skip some prompts of the epoch and repeat others; start a new run for another seed"
        )


def position(trainer: SafeTrainer, saved: Mapping[str, Any]) -> int:
    """Where the stream of prompts goes on; another data set begins at its beginning."""
    prompts = trainer.prompts
    before = saved.get("prompts") or {"position": trainer.position(saved["step"]), "rows": prompts.total}
    if before["rows"] != prompts.total:
        now, then = (rows or "an unknown number of" for rows in (prompts.total, before["rows"]))
        parallel.say(f"the data set has {now} rows, and had {then}: it starts from its beginning")
        return 0
    visited = before.get("visited")
    if visited is not None and before["fingerprint"] != prompts.fingerprint(visited):
        parallel.say(
            "the data set has other prompts than before, or has them in another order: it starts from its beginning"
        )
        return 0
    return before["position"]


def prompts_state(trainer: SafeTrainer) -> dict[str, Any]:
    """Where the stream of prompts is, and what tells it from another."""
    prompts = trainer.prompts
    return {
        "position": trainer.position(trainer.step),
        "rows": prompts.total,
        "visited": prompts.visited,
        "fingerprint": prompts.fingerprint(prompts.visited),
    }


def restore(trainer: SafeTrainer, path: Path, contents: Contents) -> None:
    check_seed(trainer, contents.state, path)
    restore_policy(trainer, path, contents)
    with fitting(path):
        if trainer.critic is not None:
            trainer.critic.load_state_dict(contents.critic)
        # A run that goes on with another learning rate than before has to get it.
        own = {"optimizer": options(trainer.policy, trainer.device, trainer.args)}
        own["critic_optimizer"] = {"lr": trainer.args.critic_learning_rate}
        for name, saved in contents.optimizers.items():
            saved["param_groups"] = [group | own[name] for group in saved["param_groups"]]
            optimizers(trainer)[name].load_state_dict(saved)
    values = contents.state
    trainer.known_position = values["step"], position(trainer, values)
    trainer.step, trainer.bad_steps = values["step"], values["bad_steps"]
    trainer.best_reward = values.get("best_reward")
    trainer.policy.began_trained = values.get("began_trained", trainer.policy.began_trained)
    events.load_state_dict(trainer, values.get("callbacks", {}))
    trainer.reward_moments = trainer.make_moments(**values["reward_moments"])
    trainer.controller.load_state_dict(values["controller"])
    if trainer.budget is not None:
        trainer.budget.law.load_state_dict(values.get("budget") or {})
    restore_generators(contents.random, values["random"])


def restore_policy(trainer: SafeTrainer, path: Path, contents: Contents) -> None:
    """The policy and its reference, which is all that an evaluation needs."""
    restore_start(trainer, path, contents)
    with fitting(path), trainer.engine.writable():
        load_policy(trainer.policy, contents.policy)


def restore_start(trainer: SafeTrainer, path: Path, contents: Contents) -> None:
    """The policy as it was handed over when the run began, where that was more than the model."""
    sharding.reshard(trainer.policy)
    if "weights" in contents.identity:
        check_identity(contents.identity, trainer.identity, path)
    else:
        parallel.say(
            f"{path} is of an earlier version: whether the model is that of the run's beginning is not checked"
        )
    with fitting(path):
        restore_reference(trainer, contents.handed_over)


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Says what it means when weights cannot be loaded."""
    try:
        yield
    except UNFITTING as error:
        raise ConfigError(f"{path} does not fit this run's settings: {error}") from error


def restore_reference(trainer: SafeTrainer, adapter: Mapping[str, Tensor]) -> None:
    """The adapter that was handed over when the run began, whatever was handed over now."""
    policy = trainer.policy
    if not policy.is_lora or trainer.args.reference == "base":
        return
    policy.handed_over = None
    if adapter:
        with trainer.engine.writable():
            load_policy(policy, adapter)
        policy.handed_over = HandedOver(policy.model, adapter)
        trainer.engine.keep_reference()


def load_policy(policy: Policy, weights: Mapping[str, Tensor]) -> None:
    """Adapters, or all weights when there are none."""
    if not policy.is_lora:
        own = policy.model.state_dict()
        policy.model.load_state_dict({name: sharding.shard_like(x, own.get(name, x)) for name, x in weights.items()})
        return
    with implicit_replication():  # whole adapters into sharded ones
        adapters.load(policy.model, weights)


def state_text(trainer: SafeTrainer) -> str:
    """What `state.json` says: all that is no tensor."""
    state = {
        "step": trainer.step,
        "seed": trainer.args.seed,
        "prompts": prompts_state(trainer),
        "bad_steps": trainer.bad_steps,
        "best_reward": trainer.best_reward,
        "callbacks": events.state_dict(trainer),
        "reward_moments": asdict(trainer.reward_moments),
        "controller": trainer.controller.state_dict(),
        "budget": None if trainer.budget is None else trainer.budget.law.state_dict(),
        "began_trained": trainer.policy.began_trained,
        "random": python_generators(),
    }
    return json.dumps(state, indent=2)


def policy_weights(engine: Engine) -> dict[str, Tensor]:
    """The model's state, with what a checkpoint needs of it gathered; tied weights stay one."""
    policy = engine.policy
    tensors = policy.model.state_dict(keep_vars=True)
    needed: Mapping[str, Tensor] = tensors
    if policy.is_lora:
        needed = adapters.adapter_state(policy.model, tensors, embeddings=policy.resized_vocabulary)
    gathered = {id(tensor): engine.whole(tensor) for tensor in {id(x): x for x in needed.values()}.values()}
    return {name: gathered.get(id(tensor), tensor.detach()) for name, tensor in tensors.items()}


def optimizers(trainer: SafeTrainer) -> dict[str, Any]:
    critic = {} if trainer.critic_optimizer is None else {"critic_optimizer": trainer.critic_optimizer}
    return {"optimizer": trainer.engine, **critic}


def flush(path: Path) -> None:
    """Waits until the file or folder is on the disk, not in a cache that a power cut would empty."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
