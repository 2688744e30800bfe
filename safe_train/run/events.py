"""What a run calls of the user's: functions after each step, and the events of transformers' `TrainerCallback`.

Both have random numbers of their own, decided by the seed, the step and the event, and may end the run, by
`trainer.control` or the `control` that an event is given: what one process decides holds for all.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from safe_train import parallel
from safe_train.config import ConfigError, SafeConfig
from safe_train.randomness import guest
from safe_train.run.report import read_rows

if TYPE_CHECKING:
    from safe_train.trainer import SafeTrainer

CALLBACKS = 1  # whose random numbers, beside those of the rewards
EVENTS = tuple("on_init_end on_train_begin on_step_begin on_step_end on_evaluate on_log on_save on_train_end".split())
FLAGS = ("should_evaluate", "should_save", "should_log")


def instances(given: Any) -> list[Any]:
    """The callbacks; of a class of `TrainerCallback` one object, as in transformers."""
    return [each() if isinstance(each, type) and issubclass(each, TrainerCallback) else each for each in given]


def objects(trainer: SafeTrainer) -> list[TrainerCallback]:
    return [each for each in trainer.callbacks if isinstance(each, TrainerCallback)]


def new_state(args: SafeConfig) -> TrainerState:
    """What callbacks and rewards are told of a run's progress: its steps are rollouts."""
    return TrainerState(
        max_steps=args.total_steps,
        logging_steps=1,
        eval_steps=args.eval_every,
        save_steps=args.save_every,
        train_batch_size=args.completions_per_step,
        is_local_process_zero=parallel.is_main(),
        is_world_process_zero=parallel.is_main(),
    )


def arguments(args: SafeConfig) -> SimpleNamespace:
    """The settings, also under the names of transformers' `TrainingArguments` that callbacks read."""
    theirs = {
        "max_steps": args.total_steps,
        "logging_steps": 1,
        "logging_first_step": False,
        "logging_strategy": "steps",
        "save_steps": args.save_every,
        "save_strategy": "steps",
        "save_total_limit": args.keep_checkpoints,
        "eval_steps": args.eval_every or None,
        "eval_strategy": "steps" if args.eval_every else "no",
        "eval_delay": 0,
        "load_best_model_at_end": args.save_best,
        "metric_for_best_model": "reward",
        "greater_is_better": True,
        "per_device_train_batch_size": args.minibatch_size or args.completions_per_step,
        "num_train_epochs": 0,
        "disable_tqdm": False,
    }
    return SimpleNamespace(**dict(args.items()), **theirs)


def begin(trainer: SafeTrainer) -> None:
    """The events before the first step; a resumed run's history is that of its folder."""
    trainer.control.should_training_stop = False
    if not objects(trainer):
        return
    metrics = Path(trainer.args.output_dir) / "metrics.jsonl"
    rows = read_rows(metrics) if trainer.step and metrics.exists() else []
    trainer.state.log_history = [row for row in rows if row["step"] <= trainer.step]
    for each in objects(trainer):
        if absent := never_called(each):
            parallel.say(f"callback {type(each).__name__}: {', '.join(absent)} is never called here")
    early = [each for each in objects(trainer) if isinstance(each, EarlyStoppingCallback)]
    if early and not trainer.args.eval_every:
        raise ConfigError("EarlyStoppingCallback stops by evaluations, and there are none: set eval_every")
    call(trainer, "on_init_end")
    call(trainer, "on_train_begin")


def never_called(callback: TrainerCallback) -> list[str]:
    """The events that a callback has something for, and that a run here does not have."""
    known = [name for name in dir(TrainerCallback) if name.startswith("on_") and name not in EVENTS]
    return [name for name in known if getattr(type(callback), name) is not getattr(TrainerCallback, name)]


def begin_step(trainer: SafeTrainer) -> None:
    for flag in FLAGS:
        setattr(trainer.control, flag, False)
    call(trainer, "on_step_begin")


def log(trainer: SafeTrainer, metrics: dict[str, Any]) -> None:
    """The event of a step's metrics, before its checkpoint: what callbacks make of them is in it."""
    trainer.state.log_history.append({"step": trainer.step, **metrics})
    call(trainer, "on_log", logs=metrics)


def end_step(trainer: SafeTrainer, metrics: dict[str, Any], is_saved: bool) -> None:
    """The event behind a step's checkpoint, and the functions, each with metrics of its own."""
    if is_saved:
        call(trainer, "on_save")
    functions = [each for each in trainer.callbacks if not isinstance(each, TrainerCallback)]
    place = f"the callbacks of step {trainer.step}"
    with parallel.together(place), guest(trainer.args.seed, trainer.step, CALLBACKS):
        for function in functions:
            function(trainer, dict(metrics))
    agree(trainer)


def call(trainer: SafeTrainer, event: str, **found: dict[str, Any]) -> None:
    """An event of all callbacks that have events, as transformers calls it."""
    called = objects(trainer)
    if not called:
        return
    update(trainer)
    place, number = f"{event} of step {trainer.step}", EVENTS.index(event)
    with parallel.together(place), guest(trainer.args.seed, trainer.step, CALLBACKS, number):
        for each in called:
            control = getattr(each, event)(
                arguments(trainer.args),
                trainer.state,
                trainer.control,
                model=trainer.policy.model,
                processing_class=trainer.tokenizer,
                optimizer=trainer.engine.optimizer,
                lr_scheduler=None,
                train_dataloader=None,
                eval_dataloader=None,
                **{name: dict(values) for name, values in found.items()},
            )
            trainer.control = control or trainer.control
    agree(trainer)


def update(trainer: SafeTrainer) -> None:
    """What `trainer.state` says, from the trainer."""
    state, rows = trainer.state, trainer.prompts.known_length
    state.global_step, state.best_metric = trainer.step, trainer.best_reward
    state.epoch = trainer.position(trainer.step) / rows if rows else None


def agree(trainer: SafeTrainer) -> None:
    """What a callback of one process asked for, all processes do."""
    if parallel.size() == 1:
        return
    asked = parallel.gather_objects(dataclasses.asdict(trainer.control))
    for name in asked[0]:
        setattr(trainer.control, name, any(each[name] for each in asked))


def state_dict(trainer: SafeTrainer) -> dict[str, list[dict[str, Any]]]:
    """What callbacks with a state of their own want to have again, such as how long they have waited, by class."""
    states: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for each in objects(trainer):
        if isinstance(each, ExportableState):
            states[type(each).__name__].append(each.state())
    return dict(states)


def load_state_dict(trainer: SafeTrainer, saved: dict[str, list[dict[str, Any]]]) -> None:
    left = {name: iter(states) for name, states in saved.items()}
    for each in objects(trainer):
        state = next(left.get(type(each).__name__, iter(())), None)
        for name, value in state["attributes"].items() if state else ():
            setattr(each, name, value)
