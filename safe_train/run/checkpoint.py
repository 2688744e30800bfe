"""Checkpoints that hold everything a run needs to continue as if it had never stopped.

A checkpoint is written to a temporary folder and renamed when complete, so a kill at any instant leaves either all of
it or none. The `policy` folder inside it loads with transformers or peft, tokenizer included. Only tensors and plain
values are unpickled. It is the same whatever the number of processes that wrote it, and resumes on any other; they must
all see the folder.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import sys
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


class Checkpoints:
    def __init__(self, output_dir: str | Path, keep: int, name: str = "checkpoints"):
        self.folder, self.keep = Path(output_dir) / name, keep
        self.wound_back_to = self.folder / "wound_back_to.json"
        self.step = 0  # of the run's state on disk; at 0 there is nothing to keep

    def complete(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        found = (path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name))
        return sorted(found, key=step_of)

    def candidates(self) -> list[Path]:
        """Where to resume, best first: not later than the checkpoint that the run was last wound back to."""
        complete = self.complete()[::-1]
        if not self.wound_back_to.exists():
            return complete
        target = self.folder / json.loads(self.wound_back_to.read_text())["checkpoint"]
        return [path for path in complete if step_of(path) <= step_of(target)] if target in complete else [target]

    def save(self, trainer: SafeTrainer) -> Path:
        final = self.folder / f"step-{trainer.step}"
        sharding.reshard(trainer.policy)
        # All processes take part in gathering what is sharded; one of them writes.
        states = {name: optimizer.state_dict() for name, optimizer in optimizers(trainer).items()}
        self.write(final, trainer, policy_weights(trainer.engine), states)
        self.step = trainer.step
        return final

    @contextmanager
    def keeping(self, trainer: SafeTrainer) -> Iterator[None]:
        """Around functions of the user's: when one fails, the last finished step is saved before the run stops."""
        states = torch_generators(), python_generators()
        # All processes take part in saving.
        failures = Exception if parallel.size() == 1 else parallel.StoppedTogether
        try:
            yield
        except failures:
            if trainer.step not in (0, self.step):
                restore_generators(*states)
                self.save(trainer)
            if trainer.step and parallel.is_main():
                message = f"stopped after step {trainer.step}, with a checkpoint: mend the cause, then use --resume"
                print(message, file=sys.stderr, flush=True)
            raise

    @parallel.main_only
    def write(self, final: Path, trainer: SafeTrainer, policy: dict[str, Tensor], optimizers: dict[str, Any]) -> None:
        for left_over in self.folder.glob("unfinished-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        unfinished = self.folder / f"unfinished-{trainer.step}"
        try:
            unfinished.mkdir(parents=True)
            write_files(unfinished, trainer, policy, optimizers)
        except (OSError, RuntimeError, SafetensorError) as error:  # what each writer makes of a full disk
            shutil.rmtree(unfinished, ignore_errors=True)
            last = self.complete()[-1:]
            left = f"{last[0]} is whole: continue from it with --resume" if last else "there is no earlier one"
            raise OSError(f"cannot write the checkpoint {final}: {error}. {left}, when there is room") from error
        if final.exists():
            discard(final)
        unfinished.rename(final)
        flush(self.folder)
        self.prune(final)

    def prune(self, newest: Path) -> None:
        """Leaves `keep` checkpoints; later ones are of a run that was wound back to before them, and go, too."""
        complete = self.complete()
        end = complete.index(newest) + 1
        for later in complete[end:]:
            discard(later)
        self.wound_back_to.unlink(missing_ok=True)
        for older in complete[: max(0, end - self.keep)]:
            discard(older)

    @parallel.main_only
    def discard_after(self, step: int) -> None:
        """Deletes the checkpoints of what a run that went back to `step` has left behind."""
        for path in self.complete():
            if step_of(path) > step:
                discard(path)

    def load(self, trainer: SafeTrainer, path: Path | None = None) -> None:
        """Restores the given checkpoint, or the newest that can be read; a run that has none yet starts at step 0."""
        if path is not None:
            restore(trainer, path, named(path, trainer.policy))
            self.step = trainer.step
            self.wind_back(path)
            return
        found = self.newest(trainer.policy)
        if found is None:
            say(f"no checkpoint in {self.folder} yet: starting at step 0")
            return
        restore(trainer, *found)
        self.step = trainer.step
        say(f"continuing from {found[0]}")

    def newest(self, policy: Policy) -> tuple[Path, Contents] | None:
        """The newest checkpoint that can be read; None where there is none at all."""
        damaged: list[str] = []
        for candidate in self.candidates():
            try:
                contents = read(candidate, policy)
            except Damaged as error:
                damaged.append(str(error))
                continue
            say(*damaged)
            return candidate, contents
        if damaged:
            raise ConfigError("no checkpoint can be read: " + "; ".join(damaged))
        return None

    @parallel.main_only
    def wind_back(self, path: Path) -> None:
        """Records where the run went back to: if it is killed before its next checkpoint, it must not resume later."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = path.name if path.resolve().parent == self.folder.resolve() else str(path.resolve())
        unfinished = self.folder / "unfinished-wound-back"
        unfinished.write_text(json.dumps({"checkpoint": name}))
        flush(unfinished)
        unfinished.replace(self.wound_back_to)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def say(*lines: str) -> None:
    if lines and parallel.is_main():
        print(*lines, sep="\n", flush=True)


def write_files(folder: Path, trainer: SafeTrainer, policy: dict[str, Tensor], optimizers: dict[str, Any]) -> None:
    model, handed_over = trainer.policy.model, trainer.policy.handed_over
    if trainer.policy.is_lora:
        adapters.save(model, folder / "policy", policy, trainer.policy.resized_vocabulary)
    else:
        save_whole(model, folder / "policy", policy)
    trainer.tokenizer.save_pretrained(folder / "policy")
    torch.save(optimizers, folder / "optimizers.pt")
    if trainer.critic is not None:
        save_file(trainer.critic.state_dict(), folder / "critic.safetensors")
    if handed_over is not None:
        save_file(handed_over.adapter, folder / "reference.safetensors")
    (folder / "reference.json").write_text(json.dumps(trainer.identity))
    save_file(torch_generators(), folder / "random.safetensors")
    (folder / "state.json").write_text(json.dumps(state(trainer), indent=2))
    for path in (folder, *folder.rglob("*")):
        flush(path)


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
    identity = path / "reference.json"
    try:
        settings = json.loads((path / "policy" / "adapter_config.json").read_text()) if policy.is_lora else {}
        contents = Contents(
            state=json.loads((path / "state.json").read_text()),
            policy=read_policy(policy, path / "policy"),
            critic=load_file(critic) if critic.exists() else {},
            optimizers=torch.load(path / "optimizers.pt", map_location="cpu", weights_only=True),
            random=load_file(path / "random.safetensors"),
            handed_over=load_file(reference) if reference.exists() else {},
            identity=json.loads(identity.read_text()) if identity.exists() else {},
        )
    except UNREADABLE as error:
        raise Damaged(f"{path} is damaged: {type(error).__name__}: {error}") from error
    check_adapters(policy, settings, path)
    return contents


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
        say(f"the data set has {now} rows, and had {then}: it starts from its beginning")
        return 0
    visited = before.get("visited")
    if visited is not None and before["fingerprint"] != prompts.fingerprint(visited):
        say("the data set has other prompts than before, or has them in another order: it starts from its beginning")
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
    try:
        if trainer.critic is not None:
            trainer.critic.load_state_dict(contents.critic)
        # A run that goes on with another learning rate than before has to get it.
        own = {"optimizer": options(trainer.policy, trainer.device, trainer.args)}
        own["critic_optimizer"] = {"lr": trainer.args.critic_learning_rate}
        for name, saved in contents.optimizers.items():
            saved["param_groups"] = [group | own[name] for group in saved["param_groups"]]
            optimizers(trainer)[name].load_state_dict(saved)
    except UNFITTING as error:
        raise ConfigError(f"{path} does not fit this run's settings: {error}") from error
    values = contents.state
    trainer.known_position = values["step"], position(trainer, values)
    trainer.step, trainer.bad_steps = values["step"], values["bad_steps"]
    trainer.best_reward = values.get("best_reward")
    events.load_state_dict(trainer, values.get("callbacks", {}))
    trainer.reward_moments = trainer.make_moments(**values["reward_moments"])
    trainer.controller.load_state_dict(values["controller"])
    restore_generators(contents.random, values["random"])


def restore_policy(trainer: SafeTrainer, path: Path, contents: Contents) -> None:
    """The policy and its reference, which is all that an evaluation needs."""
    sharding.reshard(trainer.policy)
    if "weights" in contents.identity:
        check_identity(contents.identity, trainer.identity, path)
    else:
        say(f"{path} is of an earlier version: whether the model is that of the run's beginning is not checked")
    try:
        restore_reference(trainer, contents.handed_over)
        with trainer.engine.writable():
            load_policy(trainer.policy, contents.policy)
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


def state(trainer: SafeTrainer) -> dict[str, Any]:
    return {
        "step": trainer.step,
        "seed": trainer.args.seed,
        "prompts": prompts_state(trainer),
        "bad_steps": trainer.bad_steps,
        "best_reward": trainer.best_reward,
        "callbacks": events.state_dict(trainer),
        "reward_moments": asdict(trainer.reward_moments),
        "controller": trainer.controller.state_dict(),
        "random": python_generators(),
    }


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


def discard(checkpoint: Path) -> None:
    """Deletes a checkpoint; a kill meanwhile leaves nothing under its name that looks complete."""
    doomed = checkpoint.with_name(f"unfinished-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def flush(path: Path) -> None:
    """Waits until the file or folder is on the disk, not in a cache that a power cut would empty."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
