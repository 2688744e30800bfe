"""How rewards are called: what each is given, what it may log, how long it may take, and what it must answer.

Scores are float64 until their differences are taken: 1e8 and 1e8 + 1 are one number in float32.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import json
import math
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, TimeoutError
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Thread
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safe_train.config import ConfigError
from safe_train.rewards.server import RewardServer

RewardFunction = Callable[..., Any]

LARGEST = torch.finfo(torch.float32).max  # what is trained on a reward is float32

KEYWORDS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")  # as in TRL
KEPT_BACK = ("prompt", "completion", "completion_ids")  # columns that TRL does not pass on either

GRACE = 5.0  # seconds that the event loop has to say that a limit has passed


Outcome = tuple[Any, BaseException | None]  # what came back, or what was raised


class NotANumber(ValueError):
    """What a reward returned for one completion; for another it may be a number."""


class Answer(NamedTuple):
    scores: Tensor  # [B] in float64, nan where the reward does not apply
    extra: dict[str, list[Any]]  # columns of `log_extra`
    metrics: dict[str, list[float]]  # values of `log_metric`
    seconds: float


@dataclass(frozen=True)
class Batch:
    """What rewards are asked about."""

    prompts: list[Any]
    completions: list[Any]
    columns: Mapping[str, list[Any]]
    completion_ids: list[list[int]] = field(default_factory=list)
    trainer_state: Any = None

    def arguments(self, function: RewardFunction, **log: Callable[..., None]) -> dict[str, Any]:
        """Copies of what the function takes: what it does to them stays with it."""
        check_columns(self.columns)
        given = {
            **{name: values for name, values in self.columns.items() if name not in KEPT_BACK},
            "prompts": self.prompts,
            "completions": self.completions,
            "completion_ids": self.completion_ids,
        }
        found = {name: copies(given[name]) for name in taken(function, given) if name != "completion_ids"}
        if taken(function, ("completion_ids",)):  # of numbers, which are not copied one by one
            found["completion_ids"] = [[*ids] for ids in self.completion_ids]
        services = {"trainer_state": own_copy(self.trainer_state), **log}
        return found | {name: services[name] for name in taken(function, services)}


def own_copy(state: Any) -> Any:
    """Of a `TrainerState`, whose history may be long."""
    found = copy.copy(state)
    if found is not None:
        found.log_history = list(state.log_history)
    return found


def ask(functions: Mapping[str, RewardFunction], batch: Batch, limit: float) -> dict[str, Answer]:
    """The answers of all rewards.

    Servers are asked in threads of their own meanwhile; functions run one after another, since they share the random
    numbers of this process; then all async ones together, each for at most `limit` seconds.

    Raises:
        RuntimeError: a reward raised something, or took too long.
        ValueError: it did not answer with one number or None a completion.
    """
    calls = [Call(name, function, batch) for name, function in functions.items()]
    try:
        for call in calls:
            call.start_if_server()
        for call in calls:
            call.run_if_function()
        for call in calls:
            call.start_if_async(limit)
        return {call.name: call.finished(limit) for call in calls}
    finally:
        for call in calls:
            call.give_up()


class Call:
    """One reward, asked once about a batch."""

    def __init__(self, name: str, function: RewardFunction, batch: Batch):
        self.name, self.function, self.batch = name, function, batch
        self.extra: dict[str, list[Any]] = defaultdict(list)
        self.metrics: dict[str, list[float]] = defaultdict(list)
        self.answer: Any = None  # of an async function, what is to be awaited
        self.future: Future[Outcome] | None = None
        self.seconds = 0.0

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        self.extra[column] += [as_json(value) for value in values]

    def log_metric(self, name: str, value: Any) -> None:
        self.metrics[name].append(float(value))

    def start_if_server(self) -> None:
        if not isinstance(self.function, RewardServer):
            return
        future: Future[Outcome] = Future()
        future.set_running_or_notify_cancel()  # from here on it cannot be cancelled
        self.future = future

        def run() -> None:
            try:
                future.set_result((self.call(), None))
            except BaseException as error:
                future.set_result((None, error))

        Thread(target=run, daemon=True).start()  # the process may end while a server is still silent

    def run_if_function(self) -> None:
        if self.future is None:
            with self.naming_errors():
                self.answer = self.call()

    def start_if_async(self, limit: float) -> None:
        if inspect.isawaitable(self.answer):
            answer, self.answer = self.answer, None
            self.future = asyncio.run_coroutine_threadsafe(self.awaited(answer, limit), event_loop())

    def call(self) -> Any:
        with self.timed():
            arguments = self.batch.arguments(self.function, log_extra=self.log_extra, log_metric=self.log_metric)
            return self.function(**arguments)

    async def awaited(self, answer: Awaitable[Any], limit: float) -> Outcome:
        with self.timed():
            task = asyncio.ensure_future(outcome(answer))
            try:
                await asyncio.wait({task}, timeout=limit)
            finally:
                is_done = task.done()
                task.cancel()
        if is_done:
            return task.result()
        return None, TooSlow(
            f"reward {self.name!r} gave no answer within {limit:g} s: raise async_reward_timeout, or give what it "
            "waits for a limit of its own; then continue the run with --resume"
        )

    def finished(self, limit: float) -> Answer:
        if self.future is not None:
            is_server = isinstance(self.function, RewardServer)  # which has limits of its own
            try:
                self.answer, error = self.future.result(None if is_server else limit + GRACE)
            except TimeoutError:
                raise TooSlow(
                    f"reward {self.name!r} gave no answer within {limit:g} s, and could not be stopped: an async "
                    "reward waits for something without `await`, which holds up the others as well"
                ) from None
            with self.naming_errors():
                if error is not None:
                    raise error
        scores = checked(self.name, self.answer, self.batch.completions)
        for column, values in self.extra.items():
            if len(values) != len(scores):
                raise ValueError(
                    f"reward {self.name!r} logged {len(values)} values in the column {column!r} by log_extra, for "
                    f"{len(scores)} completions"
                )
        return Answer(scores, dict(self.extra), dict(self.metrics), self.seconds)

    def give_up(self) -> None:
        """Stops what still waits, as it does when another reward failed."""
        if self.future is not None:
            self.future.cancel()
        if inspect.iscoroutine(self.answer):
            self.answer.close()

    @contextmanager
    def timed(self) -> Iterator[None]:
        started = perf_counter()
        try:
            yield
        finally:
            self.seconds += perf_counter() - started

    @contextmanager
    def naming_errors(self) -> Iterator[None]:
        try:
            yield
        except (ConfigError, TooSlow):
            raise
        except (Exception, SystemExit) as error:  # sys.exit in a reward would end the run as if it were done
            raise RuntimeError(f"reward {self.name!r} raised {type(error).__name__}: {error}") from error


class TooSlow(RuntimeError):
    """An async reward passed its limit."""


async def outcome(answer: Awaitable[Any]) -> Outcome:
    """SystemExit, were it raised here, would end the event loop."""
    try:
        return await answer, None
    except (Exception, SystemExit) as error:
        return None, error


@functools.cache
def event_loop() -> asyncio.AbstractEventLoop:
    """One for all calls, in a thread of its own: an HTTP client that a reward keeps belongs to the loop it began in."""
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, daemon=True).start()
    return loop


def taken(function: RewardFunction, names: Iterable[str]) -> list[str]:
    """Those of the names that the function has parameters for: all with `**columns`, else those that it lists."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin, which has none to read
        return list(names)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return list(names)
    own = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return [name for name in names if name in own]


def check_columns(names: Iterable[str]) -> None:
    for name in names:
        if name in KEYWORDS and name not in KEPT_BACK:
            raise ConfigError(
                f"the data set has a column {name!r}, and rewards are given something else under that name: rename "
                "it, or leave it out by naming the others in columns"
            )


def check_signature(name: str, function: RewardFunction, columns: Iterable[str]) -> None:
    """Refuses a reward with parameters that nothing is given for."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    given = [*KEYWORDS, *(column for column in columns if column not in KEYWORDS + KEPT_BACK)]
    try:
        signature.bind(**dict.fromkeys(taken(function, given)))
    except TypeError as error:
        needs = signature.parameters.get("environments")
        if needs is not None and needs.default is needs.empty:
            raise ConfigError(
                f"the reward {name!r} asks for environments, which are TRL's environment_factory and are not offered "
                "here; give the parameter a default, or take what it needs from the columns"
            ) from None
        raise ConfigError(
            f"the reward {name!r} cannot be called with the keywords {', '.join(given)}: {error}; each parameter must "
            "be one of them or have a default"
        ) from None


def checked(name: str, values: Any, completions: Sequence[Any]) -> Tensor:
    """The scores [B] of what a reward returned; nan for None."""
    values = values.tolist() if hasattr(values, "tolist") else values  # an array, or a tensor
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"reward {name!r} must return a list of one number a completion, got {values!r:.200}")
    if len(values) != len(completions):
        raise ValueError(f"reward {name!r} returned {len(values)} values for {len(completions)} completions")
    for row, (value, completion) in enumerate(zip(values, completions, strict=True)):
        if value is not None and not fits_float32(value):
            raise NotANumber(
                f"reward {name!r} returned {value!r:.200} for the completion {text_of(completion)!r:.200} (row {row}); "
                f"it must be a finite number of at most {LARGEST:.3g}, which is what float32 holds, or None where the "
                "reward does not apply"
            )
    numbers = [math.nan if value is None else float(value) for value in values]
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def fits_float32(value: Any) -> bool:
    try:
        return math.isfinite(value) and abs(float(value)) <= LARGEST
    except (TypeError, ValueError, RuntimeError, OverflowError):  # no number, several, or one beyond float
        return False


def text_of(completion: str | list[dict[str, str]]) -> str:
    """The words of a completion, which is text, or chat messages when the prompt is."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def copies(values: list[Any]) -> list[Any]:
    """A copy of each: the completions of a prompt share its messages, and would share one copy of them, too."""
    return [copied(value) for value in values]


def copied(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:  # an open file, a lock: there can be no second one
        return value


def as_json(value: Any) -> Any:
    """The value as samples.jsonl can hold it, and as it is now."""
    value = value.tolist() if hasattr(value, "tolist") else value
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return str(value)
