"""What surrounds the steps of a run: its folder, checkpoints, callbacks and evaluations, and what ends it."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safe_train import parallel
from safe_train.randomness import python_generators, restore_generators, torch_generators
from safe_train.rewards.rewards import Scores
from safe_train.run import events, terminal
from safe_train.run.checkpoints import Checkpoints
from safe_train.run.run_folder import RunFolder, refuse_existing
from safe_train.run.self_check import self_check
from safe_train.run.signals import Stopped, StopSignals
from safe_train.run.tokens import token_rows
from safe_train.sampling.experience import Experience
from safe_train.sampling.rollout import Rollout

if TYPE_CHECKING:
    from safe_train.trainer import SafeTrainer


class Session:
    """One call of `train()`.

    Args:
        resume_from: True for the newest complete checkpoint of the run folder, or a checkpoint's path.
    """

    def __init__(self, trainer: SafeTrainer, resume_from: bool | str | Path | None):
        args = self.args = trainer.args
        self.trainer, self.signals = trainer, StopSignals()
        self.checkpoints = Checkpoints(args.output_dir, args.keep_checkpoints)
        self.best = Checkpoints(args.output_dir, keep=1, name="best")
        self.history: list[dict[str, Any]] = []
        self.is_over, self.progress = False, terminal.Progress(args)
        self.tokens: list[dict[str, Any]] = []  # rows of the step that is being done
        parallel.meet("train()")
        trainer.folder_lock.acquire()
        self.start_or_resume(resume_from)
        parallel.check_same({"step": trainer.step})
        self_check(trainer)
        self.teacher = trainer.teacher  # made here, before a rollout: an evaluation needs none
        self.folder = RunFolder(args, trainer.accelerator, resume_at=trainer.step, layout=trainer.policy.layout)

    def start_or_resume(self, resume_from: bool | str | Path | None) -> None:
        trainer = self.trainer
        if resume_from:
            self.checkpoints.load(trainer, None if resume_from is True else Path(resume_from))
            self.best.discard_after(trainer.step)
            if self.args.save_best and parallel.from_main(not self.best.complete()):
                trainer.best_reward = None
        elif trainer.step == 0:
            refuse_existing(Path(self.args.output_dir))

    def steps(self) -> Iterator[int]:
        """The steps that are left, with a progress bar on the first process, and the events around them."""
        trainer = self.trainer
        events.begin(trainer)
        for step in self.progress.steps(trainer.step):
            with self.keeping():
                events.begin_step(trainer)
            yield step
            if self.is_over:
                break
        with self.keeping():
            events.call(trainer, "on_train_end")

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """When what is inside fails, the last finished step is saved before the run stops.

        For functions of the user's, and for whatever leaves the weights as they are.
        """
        states = torch_generators(), python_generators()
        # All processes take part in saving.
        failures = Exception if parallel.size() == 1 else parallel.StoppedTogether
        try:
            yield
        except failures:
            step = self.trainer.step
            if step not in (0, self.checkpoints.step):
                restore_generators(*states)
                self.checkpoints.save(self.trainer)
            if step:
                message = f"stopped after step {step}, with a checkpoint: mend the cause, then use --resume"
                parallel.say(message, file=sys.stderr)
            raise

    def note_tokens(self, rollout: Rollout, rewards: Scores, experience: Experience) -> None:
        """Keeps what the policy made of a few completions, when the step's completions will be logged."""
        is_logged = (self.trainer.step + 1) % self.args.samples_every == 0
        reward_B, tokenizer = rewards["reward"], self.trainer.tokenizer
        self.tokens = token_rows(rollout, reward_B, experience, tokenizer) if is_logged else []

    def record(self, rollout: Rollout, rewards: Scores, metrics: dict[str, Any]) -> None:
        """Counts a step, evaluates and logs it, keeps it if it is the best, and decides how the run goes on."""
        trainer = self.trainer
        trainer.known_position = trainer.step + 1, trainer.position(trainer.step) + trainer.drawn
        trainer.step += 1
        metrics["layout"] = trainer.policy.layout
        try:
            with self.keeping():
                events.call(trainer, "on_step_end")
                metrics |= self.evaluated()
        finally:  # the step is done even when its evaluation fails
            if trainer.step % self.args.samples_every == 0:
                self.folder.log_samples(trainer.step, rollout, rewards, self.tokens)
            self.folder.log(trainer.step, metrics)
        self.progress.step({"step": trainer.step, **metrics}, rollout, rewards)
        self.history.append(metrics)
        is_best = self.is_best(metrics)
        with self.keeping():
            events.log(trainer, metrics)
        if is_best:
            self.best.save(trainer)
        self.save_and_go_on(metrics)

    def save_and_go_on(self, metrics: dict[str, Any]) -> None:
        """Saves the step where it is time for that or the last chance, and calls what comes behind a checkpoint."""
        trainer, args = self.trainer, self.args
        ends, signal = self.is_last(metrics["kl"]), self.signals.agreed()
        is_time = trainer.step % args.save_every == 0 or trainer.control.should_save
        is_saved = ends or signal is not None or is_time
        if is_saved:
            self.checkpoints.save(trainer)
        with self.keeping():
            events.end_step(trainer, metrics, is_saved)
        if is_saved:
            self.checkpoints.save_state(trainer)  # callbacks that learned of the checkpoint may have changed
        self.is_over = self.was_stopped() or ends
        if trainer.budget is not None:
            trainer.budget.check()
        if signal and not self.is_over:
            raise Stopped.after(trainer.step, signal, args.output_dir)

    def evaluated(self) -> dict[str, float]:
        """The metrics of an evaluation, if it is time for one or a callback asked for it."""
        trainer, every = self.trainer, self.args.eval_every
        is_time = every and trainer.step % every == 0
        if not (is_time or trainer.control.should_evaluate):
            return {}
        evaluation = trainer.evaluate()
        self.folder.log_evaluation(trainer.step, evaluation)
        numbers = evaluation.numbers()
        events.call(trainer, "on_evaluate", metrics={f"eval_{name}": value for name, value in numbers.items()})
        return {f"eval/{name}": value for name, value in numbers.items()}

    def is_best(self, metrics: Mapping[str, Any]) -> bool:
        """Whether this step was evaluated, was better than all before it, and is to be kept for that."""
        reward, best = metrics.get("eval/reward"), self.trainer.best_reward
        if reward is None or math.isnan(reward) or (best is not None and reward <= best):
            return False
        self.trainer.best_reward = reward
        return self.args.save_best

    def is_last(self, kl: float) -> bool:
        """Whether the run ends with this step: it is the last, a callback asked for it, or the KL passed `stop_kl`."""
        trainer, limit = self.trainer, self.args.stop_kl
        if trainer.step == self.args.total_steps or trainer.control.should_training_stop:
            return True
        if trainer.budget is not None and trainer.budget.failure:
            return True
        if limit is None or not parallel.from_main(kl > limit):
            return False
        parallel.say(
            f"stopped after step {trainer.step}, with a checkpoint: its KL {kl:.3g} is above stop_kl {limit:g}"
        )
        return True

    def was_stopped(self) -> bool:
        """Whether a callback ended the run, which is then saved as if it were done."""
        trainer = self.trainer
        if not trainer.control.should_training_stop:
            return False
        if self.checkpoints.step != trainer.step:
            self.checkpoints.save(trainer)
        parallel.say(f"stopped after step {trainer.step}, with a checkpoint: a callback asked for it")
        return True

    def finished(self) -> list[dict[str, Any]]:
        """Closes the folder, and returns the metrics of the steps."""
        self.folder.finish(self.trainer.step)
        return self.history
