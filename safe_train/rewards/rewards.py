"""Rewards: asked together, combined into what is trained on, and loaded by their names."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safe_train import parallel
from safe_train.config import ConfigError, SafeConfig, require_name
from safe_train.rewards.calls import LARGEST, Answer, Batch, NotANumber, RewardFunction, ask, fits_float32, text_of
from safe_train.rewards.classifier import RewardModel
from safe_train.rewards.server import RewardServer

__all__ = ["LARGEST", "NotANumber", "RewardFunction", "Rewards", "Scores", "load_reward", "text_of"]


@dataclass(frozen=True, eq=False)
class Scores(Mapping[str, Tensor]):
    """Scores [B] of each reward by name, and of all together under "reward", in float64; nan: does not apply."""

    by_name: dict[str, Tensor]
    weights: dict[str, float] = field(default_factory=dict)  # of each reward
    extra: dict[tuple[str, str], list[Any]] = field(default_factory=dict)  # of log_extra, by reward and column
    metrics: dict[str, list[float]] = field(default_factory=dict)  # values of log_metric, one a call
    seconds: dict[str, float] = field(default_factory=dict)
    prefix_BK: Tensor | None = None  # of "reward", for what the completions begin with; nan from their ends on

    def __getitem__(self, name: str) -> Tensor:
        return self.by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_name)

    def __len__(self) -> int:
        return len(self.by_name)

    def gathered(self) -> Scores:
        """Those of all processes, by rank; the seconds are this process's."""
        stacked = parallel.gather(torch.stack(list(self.by_name.values())))
        found = parallel.gather_objects((len(self["reward"]), self.extra, self.metrics))
        logged = {key for _, extra, _ in found for key in extra}
        keys = [(name, column) for name in self.by_name for _, column in sorted(x for x in logged if x[0] == name)]
        extra = {key: [x for count, own, _ in found for x in own.get(key, [None] * count)] for key in keys}
        metrics: dict[str, list[float]] = defaultdict(list)
        for _, _, own in found:
            for name, values in own.items():
                metrics[name] += values
        by_name = dict(zip(self.by_name, stacked, strict=True))
        prefix_BK = None if self.prefix_BK is None else parallel.gather(self.prefix_BK.T).T
        return Scores(by_name, self.weights, extra, metrics, self.seconds, prefix_BK)

    def joined(self, more: Scores) -> Scores:
        """Those of two rollouts, one behind the other."""
        counts = len(self["reward"]), len(more["reward"])
        pairs = [(x, more.extra.get(key, [None] * counts[1])) for key, x in self.extra.items()]
        extra = {key: [*x, *y] for key, (x, y) in zip(self.extra, pairs, strict=True)}
        extra |= {key: [None] * counts[0] + y for key, y in more.extra.items() if key not in extra}
        return Scores(
            {name: torch.cat([x_B, more[name]]) for name, x_B in self.by_name.items()},
            self.weights,
            extra,
            {
                name: self.metrics.get(name, []) + more.metrics.get(name, [])
                for name in {**self.metrics, **more.metrics}
            },
            {name: seconds + more.seconds.get(name, 0.0) for name, seconds in self.seconds.items()},
            None if self.prefix_BK is None or more.prefix_BK is None else torch.cat([self.prefix_BK, more.prefix_BK]),
        )

    def take(self, order: Sequence[int]) -> Scores:
        by_name = {name: x_B[list(order)] for name, x_B in self.by_name.items()}
        extra = {key: [x[i] for i in order] for key, x in self.extra.items()}
        prefix_BK = None if self.prefix_BK is None else self.prefix_BK[list(order)]
        return replace(self, by_name=by_name, extra=extra, prefix_BK=prefix_BK)

    def columns(self, taken: Iterable[str]) -> dict[str, list[Any]]:
        """What rewards logged of each completion, under other names where those are taken."""
        names = distinct((column for _, column in self.extra), taken)
        return dict(zip(names, self.extra.values(), strict=True))


class Rewards:
    """Reward functions, and how their scores become one.

    Args:
        functions: rewards. Two of one name become `name` and `name_2`.
        weights: one a reward (default: all 1); each score is multiplied by its own first.
        aggregation, variance_coef: `multi_objective_aggregation` and `reward_variance_coef`.
        limit: seconds that an async function has.
        state: the run's `transformers.TrainerState`, which is kept up to date.

    Raises:
        RuntimeError: a function raised something, or took too long.
        ValueError: it did not return one number or None a completion, or a number or the total is not finite in
            float32.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        weights: Sequence[float] | None = None,
        *,
        aggregation: str = "sum_then_normalize",
        variance_coef: float = 0.1,
        limit: float = 600.0,
        state: Any = None,
    ):
        is_alone = len(functions) == 1 and weights is None  # else "reward" is what all come to
        names = distinct(map(reward_name, functions), taken=() if is_alone else ["reward"])
        self.functions = dict(zip(names, functions, strict=True))
        given = [1.0] * len(functions) if weights is None else list(weights)
        self.aggregation, self.variance_coef, self.limit, self.state = aggregation, variance_coef, limit, state
        if len(given) != len(functions):
            raise ConfigError(f"reward_weights must be one number for each reward, got {weights} for {len(functions)}")
        if not all(map(fits_float32, given)):
            raise ConfigError(f"reward_weights must be finite numbers, got {weights}")
        self.weights = dict(zip(names, given, strict=True))

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        columns: Mapping[str, list[Any]],
        completion_ids: list[list[int]] | None = None,
    ) -> Scores:
        batch = Batch(prompts, completions, columns, completion_ids or [[] for _ in completions], self.state)
        answers = ask(self.functions, batch, self.limit)
        scores = {name: answer.scores for name, answer in answers.items()}
        total = aggregated(weighted(scores, self.weights), self.aggregation, self.variance_coef)
        for row, value in enumerate(total.tolist()):
            if value == value and not fits_float32(value):
                parts = {name: values[row].item() for name, values in scores.items()}
                raise ValueError(
                    f"the weighted sum of the rewards is {value!r} for the completion "
                    f"{text_of(completions[row])!r:.200} (row {row}), which float32 does not hold: the rewards are "
                    f"{parts}, their weights {[*self.weights.values()]}"
                )
        seconds = {name: answer.seconds for name, answer in answers.items()}
        extra = {(name, column): x for name, answer in answers.items() for column, x in answer.extra.items()}
        return Scores({**scores, "reward": total}, self.weights, extra, metrics_of(answers), seconds)


def weighted(scores: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The scores of each reward times its weight [K, B]."""
    return torch.stack([weight * scores[name] for name, weight in weights.items()])


def aggregated(weighted_KB: Tensor, aggregation: str, variance_coef: float = 0.0) -> Tensor:
    """One score a completion [B] of K weighted ones, where nan is left out; nan where there is no other.

    `min` and `mean_minus_variance` are the worst-case and uncertainty-weighted optimisation of arXiv 2310.02743.
    """
    if aggregation == "min":
        total = weighted_KB.nan_to_num(nan=torch.inf).amin(0)
    elif aggregation == "mean_minus_variance":
        mean = weighted_KB.nanmean(0)
        total = mean - variance_coef * (weighted_KB - mean).square().nanmean(0)
    else:
        total = weighted_KB.nansum(0)
    return total.masked_fill(weighted_KB.isnan().all(0), torch.nan)


def metrics_of(answers: Mapping[str, Answer]) -> dict[str, list[float]]:
    metrics: dict[str, list[float]] = defaultdict(list)
    for answer in answers.values():
        for name, values in answer.metrics.items():
            metrics[name] += values
    return dict(metrics)


def distinct(names: Iterable[str], taken: Iterable[str] = ()) -> list[str]:
    """The names, with _2, _3, ... behind those that are taken already."""
    found: list[str] = []
    used = set(taken)
    for name in names:
        choices = (name if i == 1 else f"{name}_{i}" for i in range(1, len(used) + 2))
        found.append(next(choice for choice in choices if choice not in used))
        used.add(found[-1])
    return found


def reward_name(function: RewardFunction) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def is_server(reward: Any) -> bool:
    return isinstance(reward, str) and reward.startswith(("http://", "https://"))


NO_REWARD = "none"  # which algorithm distill does without


def no_reward(prompts: list, completions: list, **columns: Any) -> list[None]:
    return [None] * len(completions)


def is_classifier(reward: Any) -> bool:
    return isinstance(reward, str) and ":" not in reward and reward not in ("vader", NO_REWARD)


def load_reward(
    reward: str | RewardFunction, device: torch.device | str = "cpu", args: SafeConfig | None = None
) -> RewardFunction:
    """The reward named in a config: vader, none, `file.py:function`, `package.module:function`, URL or classifier."""
    if isinstance(reward, nn.Module):
        raise ConfigError(
            f"a reward must be a function or a name, got the model {type(reward).__name__}: pass its name or folder, "
            "which have its tokenizer"
        )
    if not isinstance(reward, str):
        if not callable(reward):
            raise ConfigError(f"a reward must be a function or a name, got {reward!r:.200}")
        return reward
    require_name("reward", reward)
    if reward in ("vader", NO_REWARD):
        return vader() if reward == "vader" else no_reward
    if is_server(reward):
        return RewardServer(reward, args or SafeConfig())
    source, separator, attribute = reward.partition(":")
    if not separator:
        args = args or SafeConfig()
        return RewardModel(reward, device, args.reward_batch_size, args.reward_dtype)
    try:
        function = getattr(import_source(source), attribute)
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        raise ConfigError(f"cannot load the reward {reward!r}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ConfigError(f"the reward {reward!r} is a {type(function).__name__}, not a function")
    return function


def import_source(source: str) -> Any:
    """A module, or a file as a module under a name that no other has, so that a math.py replaces nothing.

    The name is in `sys.modules`, where pickle, dataclasses and typing look for it. As of any module there is one of a
    file, until the file changes.
    """
    if not source.endswith(".py"):
        return importlib.import_module(source)
    path = Path(source).resolve()
    digest = hashlib.sha256(bytes(path) + path.read_bytes()).hexdigest()[:16]
    name = f"safe_train_reward_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def vader() -> RewardFunction:
    """Sentiment of the completion in [-1, 1]: VADER's compound score. Cheap, real and easily hacked."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise ConfigError("the reward 'vader' needs a package: pip install 'safe-kernels[demo]'") from None
    analyzer = SentimentIntensityAnalyzer()

    def vader(prompts: list, completions: list, **columns: Any) -> list[float]:
        return [analyzer.polarity_scores(text_of(completion))["compound"] for completion in completions]

    return vader
