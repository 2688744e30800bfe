"""A trained policy at KLs of one's choice: `safe-train eval --kl`, and what `export --kl` writes.

The policy moves on the line from its reference, at scale 0, to what was trained, at scale 1. Its KL is that of
completions which it samples itself, of the prompts of an evaluation and with its random numbers.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from safe_train import parallel
from safe_train.commands.subject import Subject, for_evaluation, own_tokenizer
from safe_train.config import ConfigError
from safe_train.engines.projection import to_reference, walk_to
from safe_train.paper import make_trainer
from safe_train.run.checkpoint import policy_weights, restore_policy, restore_start, write_policy
from safe_train.run.evaluation import Evaluation, Judge
from safe_train.trainer import SafeTrainer

TOLERANCE = 0.05  # of a KL that was asked for
LEAST = 1e-6  # nats a token; what is less is rounding


class Place(NamedTuple):
    """Where a policy was moved."""

    asked: float
    kl: float
    scale: float
    moves: int

    def __str__(self) -> str:
        found = f"KL {self.kl:.4g} nats a token at {self.scale:.4g} of the way from the reference"
        if abs(self.kl - self.asked) <= max(LEAST, TOLERANCE * self.asked):
            return found
        return f"{found}: {self.moves} moves did not bring it within {TOLERANCE:.0%} of {self.asked:g}"


class Mover:
    """Moves the policy of a trainer. KLs come in falling order: from the reference there is no way back."""

    def __init__(self, trainer: SafeTrainer, reached: float | None = None):
        self.judge = Judge(trainer.policy, trainer.complete, trainer.rewards, trainer.args, trainer.device)
        self.trainer, self.line, self.scale = trainer, to_reference(trainer.engine, "--kl"), 1.0
        self.reached = self.measure() if reached is None else parallel.from_main(reached)

    def measure(self) -> float:
        assert self.trainer.eval_prompts is not None
        return self.judge.kl(self.trainer.eval_prompts)

    def require(self, kls: Sequence[float]) -> None:
        if kls and not max(kls) <= self.reached * (1 + TOLERANCE):
            raise ConfigError(
                f"--kl {max(kls):g} is above the KL of the policy, {self.reached:.4g} nats a token on these prompts: "
                "it can be moved toward its reference, not away from it"
            )

    def move(self, kl: float) -> Place:
        self.require([kl])
        self.line.shrink(1 / self.scale)
        walk = walk_to(self.line.shrink, self.measure, self.reached, kl, TOLERANCE)
        self.scale = walk.scale
        return Place(kl, walk.kl, walk.scale, walk.forwards)


def kls_of(text: str | None) -> list[float]:
    """The KLs of `--kl 0.05,0.1`, from the largest to the smallest, each once."""
    if text is None:
        return []
    try:
        found = {float(word) for word in text.split(",")}
    except ValueError:
        raise ConfigError(f"--kl must be numbers with commas between them, such as 0.05,0.1, got {text!r}") from None
    for kl in found:
        if not (kl == 0 or LEAST <= kl < math.inf):
            raise ConfigError(f"--kl must be 0, the reference, or at least {LEAST:g} nats a token, got {kl:g}")
    return sorted((abs(kl) for kl in found), reverse=True)


def suffix(kls: Sequence[float]) -> str:
    """Of the folder that an evaluation goes to, so that it replaces none at other KLs."""
    return "".join(f"-kl-{kl:g}" for kl in reversed(kls))


def one_kl(text: str | None) -> float | None:
    kls = kls_of(text)
    if len(kls) > 1:
        raise ConfigError(f"--kl must be one number for an export, got {text}")
    return kls[0] if kls else None


def evaluate(found: Subject, trainer: SafeTrainer, kls: Sequence[float]) -> tuple[dict[str, Evaluation], list[Place]]:
    """The policy that a run began with, that of its checkpoint, and this moved to some KLs; of no run only the policy.

    Of an adapter that began trained, beside the base as the reference, no copy is kept: the first is then the base, and
    called so. `trainer.step` is then the checkpoint's.
    """
    if kls:
        to_reference(trainer.engine, "--kl")  # what cannot be moved is refused at once
    before, now = {}, "now"
    if found.run is not None:
        now, (path, contents) = "after", found.contents(trainer.policy)
        if contents.handed_over:
            restore_start(trainer, path, contents)
        is_base = trainer.args.reference == "base" and contents.state.get("began_trained", False)
        before = {"base" if is_base else "before": trainer.evaluate()}
        restore_policy(trainer, path, contents)
        trainer.step = contents.state["step"]  # which rewards are told
    trained = trainer.evaluate()
    if not kls:
        return before | {now: trained}, []
    mover, moved, places = Mover(trainer, trained.kl), {}, []
    mover.require(kls)
    for kl in kls:
        places.append(mover.move(kl))
        moved[f"kl {kl}".removesuffix(".0")] = dataclasses.replace(trainer.evaluate(), scale=mover.scale)
    before = {name: dataclasses.replace(each, scale=0.0) for name, each in before.items()}
    ordered = dict(reversed(moved.items()))
    return before | ordered | {now: dataclasses.replace(trained, scale=1.0)}, places[::-1]


def unrewarded(completions: list[str], **columns: object) -> list[float]:
    return [0.0] * len(completions)


def moved_checkpoint(found: Subject, checkpoint: Path, kl: float, folder: Path) -> Place:
    """Writes what an export reads of a checkpoint, with the policy moved to a KL."""
    found = found._replace(checkpoint=checkpoint)
    args = for_evaluation(found, str(folder / "run"))
    rewards = [unrewarded] * len(args.reward)
    trainer = make_trainer(args, reward_funcs=rewards, eval_dataset=args.eval_dataset, **found.objects())
    try:
        if parallel.size() > 1:
            raise ConfigError("export --kl runs in one process: start it without accelerate launch or torchrun")
        to_reference(trainer.engine, "--kl")
        path, contents = found.contents(trainer.policy)
        restore_policy(trainer, path, contents)
        place = Mover(trainer).move(kl)
        tokenizer = own_tokenizer(checkpoint / "policy", found.args)
        write_policy(folder / "policy", trainer.policy, tokenizer, policy_weights(trainer.engine))
    finally:
        trainer.folder_lock.release()
    if (checkpoint / "reference.json").is_file():
        shutil.copy(checkpoint / "reference.json", folder)
    return place
