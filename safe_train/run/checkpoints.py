"""The checkpoints of a run: which there are, which one is resumed, and how many are kept.

A checkpoint is written to a temporary folder and renamed when complete, so a kill at any instant leaves either all of
it or none.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import Tensor

from safe_train import parallel
from safe_train.config import ConfigError
from safe_train.engines import sharding
from safe_train.models.policy import Policy
from safe_train.run.checkpoint import (
    Contents,
    Damaged,
    flush,
    named,
    optimizers,
    policy_weights,
    read,
    restore,
    state_text,
    write_files,
)

if TYPE_CHECKING:
    from safe_train.trainer import SafeTrainer


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

    @parallel.main_only
    def save_state(self, trainer: SafeTrainer) -> None:
        """Brings the `state.json` of the step's checkpoint up to date."""
        path, text = self.folder / f"step-{trainer.step}" / "state.json", state_text(trainer)
        if path.is_file() and path.read_text() != text:
            replace_text(path, text)

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
            parallel.say(f"no checkpoint in {self.folder} yet: starting at step 0")
            return
        restore(trainer, *found)
        self.step = trainer.step
        parallel.say(f"continuing from {found[0]}")

    def newest(self, policy: Policy) -> tuple[Path, Contents] | None:
        """The newest checkpoint that can be read; None where there is none at all."""
        damaged: list[str] = []
        for candidate in self.candidates():
            try:
                contents = read(candidate, policy)
            except Damaged as error:
                damaged.append(str(error))
                continue
            parallel.say(*damaged)
            return candidate, contents
        if damaged:
            raise ConfigError("no checkpoint can be read: " + "; ".join(damaged))
        return None

    @parallel.main_only
    def wind_back(self, path: Path) -> None:
        """Records where the run went back to: if it is killed before its next checkpoint, it must not resume later."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = path.name if path.resolve().parent == self.folder.resolve() else str(path.resolve())
        replace_text(self.wound_back_to, json.dumps({"checkpoint": name}))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def discard(checkpoint: Path) -> None:
    """Deletes a checkpoint; a kill meanwhile leaves nothing under its name that looks complete."""
    doomed = checkpoint.with_name(f"unfinished-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)


def replace_text(path: Path, text: str) -> None:
    """Writes a file anew; a kill at any instant leaves the old text or the new one."""
    unfinished = path.with_name(f"unfinished-{path.stem}")
    unfinished.write_text(text)
    flush(unfinished)
    unfinished.replace(path)
