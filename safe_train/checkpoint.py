"""Checkpoints that hold everything a run needs to continue as if it had never stopped.

A checkpoint is written to a temporary folder and renamed when complete, so a kill at any instant leaves either all of
it or none. The `policy` folder inside it loads with transformers or peft. Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safe_train.config import ConfigError
from safe_train.controller import Moments
from safe_train.models import Policy

if TYPE_CHECKING:
    from safe_train.trainer import SafeTrainer


class Checkpoints:
    def __init__(self, output_dir: str | Path, keep: int):
        self.folder, self.keep = Path(output_dir) / "checkpoints", keep

    def complete(self) -> list[Path]:
        """The complete checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))

    def save(self, trainer: SafeTrainer) -> Path:
        final = self.folder / f"step-{trainer.step}"
        unfinished = self.folder / f"unfinished-{trainer.step}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        save_policy(trainer.policy, unfinished / "policy")
        torch.save(optimizers(trainer), unfinished / "optimizers.pt")
        if trainer.critic is not None:
            save_file(trainer.critic.state_dict(), unfinished / "critic.safetensors")
        save_file(random_states(), unfinished / "random.safetensors")
        (unfinished / "state.json").write_text(json.dumps(state(trainer), indent=2))
        for path in (unfinished, *unfinished.rglob("*")):
            flush(path)
        if final.exists():
            discard(final)
        unfinished.rename(final)
        flush(self.folder)
        self.prune(final)
        return final

    def prune(self, newest: Path) -> None:
        """Leaves `keep` checkpoints; later ones are of a run that was wound back to before them, and go, too."""
        complete = self.complete()
        end = complete.index(newest) + 1
        for other in complete[: max(0, end - self.keep)] + complete[end:]:
            discard(other)

    def load(self, trainer: SafeTrainer, path: Path | None = None) -> None:
        """Restores the given checkpoint, or the newest complete one; a run that has none yet starts at step 0."""
        complete = self.complete()
        if path is None and not complete:
            print(f"no checkpoint in {self.folder} yet: starting at step 0")
            return
        path = path or complete[-1]
        if not (path / "state.json").is_file():
            raise ConfigError(f"{path} is not a checkpoint: it has no state.json")
        try:
            load_weights(trainer, path)
        except (RuntimeError, ValueError, KeyError, AttributeError, OSError) as error:
            raise ConfigError(f"{path} does not fit this run's settings: {error}") from error
        values = json.loads((path / "state.json").read_text())
        trainer.step, trainer.bad_steps = values["step"], values["bad_steps"]
        trainer.reward_moments = Moments(**values["reward_moments"])
        trainer.controller.load_state_dict(values["controller"])
        restore_random_states(load_file(path / "random.safetensors"), values["random"])


def load_weights(trainer: SafeTrainer, path: Path) -> None:
    load_policy(trainer.policy, path / "policy")
    if trainer.critic is not None:
        trainer.critic.load_state_dict(load_file(path / "critic.safetensors", device=str(trainer.device)))
    saved = torch.load(path / "optimizers.pt", map_location="cpu", weights_only=True)
    for name, optimizer_state in saved.items():
        getattr(trainer, name).load_state_dict(optimizer_state)


def state(trainer: SafeTrainer) -> dict[str, Any]:
    return {
        "step": trainer.step,
        "bad_steps": trainer.bad_steps,
        "reward_moments": asdict(trainer.reward_moments),
        "controller": trainer.controller.state_dict(),
        "random": random_numbers(),
    }


def optimizers(trainer: SafeTrainer) -> dict[str, Any]:
    names = ["optimizer"] if trainer.critic_optimizer is None else ["optimizer", "critic_optimizer"]
    return {name: getattr(trainer, name).state_dict() for name in names}


def save_policy(policy: Policy, folder: Path) -> None:
    extra = {"save_embedding_layers": False} if policy.is_lora else {}
    policy.model.save_pretrained(folder, **extra)


def load_policy(policy: Policy, folder: Path) -> None:
    """Adapters, or all weights when there are none, from a folder that `save_policy` wrote."""
    if policy.is_lora:
        import peft

        weights = peft.load_peft_weights(str(folder), device="cpu")
        result = peft.set_peft_model_state_dict(policy.model, weights)
        if result.unexpected_keys:
            raise ConfigError(f"{folder} holds adapters of another model or rank: {result.unexpected_keys[:3]} ...")
        return
    loaded = type(policy.model).from_pretrained(folder, dtype=policy.model.dtype)
    policy.model.load_state_dict(loaded.state_dict())


def random_numbers() -> dict[str, Any]:
    """The states of Python's and NumPy's generators, which rewards may use."""
    numpy: Any = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    return {"python": random.getstate(), "numpy": numpy}


def random_states() -> dict[str, Tensor]:
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    np.random.set_state(numbers["numpy"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    version, internal, gauss = numbers["python"]
    random.setstate((version, tuple(internal), gauss))


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
