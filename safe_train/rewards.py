"""Rewards: any callable `(prompts, completions, **columns) -> list[float]`, checked before it reaches the trainer.

Scores are float64 until their differences are taken: 1e8 and 1e8 + 1 are one number in float32.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safe_train.config import ConfigError, SafeConfig, require_name
from safe_train.reward_model import RewardModel
from safe_train.reward_server import RewardServer

RewardFunction = Callable[..., Sequence[float]]

LARGEST = torch.finfo(torch.float32).max  # what is trained on a reward is float32


class NotANumber(ValueError):
    """What a reward returned for one completion; for another it may be a number."""


class Rewards:
    """A weighted sum of reward functions.

    Each function gets copies of the prompts, the completions and the columns: what it does to them stays with it.

    Raises:
        RuntimeError: a function raised something.
        ValueError: it did not return one number a completion, or a number or the sum is not finite in float32.
    """

    def __init__(self, functions: Sequence[RewardFunction], weights: Sequence[float] | None = None):
        self.functions = {reward_name(f): f for f in functions}
        if len(self.functions) != len(functions):
            raise ConfigError(f"two rewards share a name: {[reward_name(f) for f in functions]}")
        self.weights = [1.0] * len(functions) if weights is None else list(weights)
        if len(self.weights) != len(functions):
            raise ConfigError(f"reward_weights must be one number for each reward, got {weights} for {len(functions)}")
        if not all(map(fits_float32, self.weights)):
            raise ConfigError(f"reward_weights must be finite numbers, got {weights}")
        if "reward" in self.functions and (len(functions) > 1 or weights is not None):
            raise ConfigError("a reward that is weighted or one of several cannot be called 'reward', as their sum is")

    def __call__(self, prompts: list[Any], completions: list[Any], columns: dict[str, list[Any]]) -> dict[str, Tensor]:
        """Scores [B] of each reward by name, and their weighted sum under "reward", in float64."""
        scores = {name: score(name, f, prompts, completions, columns) for name, f in self.functions.items()}
        total = torch.zeros(len(completions), dtype=torch.float64, device="cpu")
        for weight, values in zip(self.weights, scores.values(), strict=True):
            total = total + weight * values
        for row, value in enumerate(total.tolist()):
            if not fits_float32(value):
                parts = {name: values[row].item() for name, values in scores.items()}
                raise ValueError(
                    f"the weighted sum of the rewards is {value!r} for the completion "
                    f"{text_of(completions[row])!r:.200} (row {row}), which float32 does not hold: the rewards are "
                    f"{parts}, their weights {self.weights}"
                )
        return {**scores, "reward": total}


def score(name: str, function: RewardFunction, prompts: list, completions: list, columns: dict[str, list]) -> Tensor:
    try:
        own = {key: copies(values) for key, values in columns.items()}
        values: Any = function(prompts=copies(prompts), completions=copies(completions), **own)
    except (Exception, SystemExit) as error:  # sys.exit in a reward would end the run as if it were done
        raise RuntimeError(f"reward {name!r} raised {type(error).__name__}: {error}") from error
    values = values.tolist() if hasattr(values, "tolist") else values  # an array, or a tensor
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"reward {name!r} must return a list of one number a completion, got {values!r:.200}")
    if len(values) != len(completions):
        raise ValueError(f"reward {name!r} returned {len(values)} values for {len(completions)} completions")
    for row, (value, completion) in enumerate(zip(values, completions, strict=True)):
        if not fits_float32(value):
            raise NotANumber(
                f"reward {name!r} returned {value!r:.200} for the completion {text_of(completion)!r:.200} (row {row}); "
                f"it must be a finite number of at most {LARGEST:.3g}, which is what float32 holds"
            )
    return torch.tensor([float(value) for value in values], dtype=torch.float64, device="cpu")


def copies(values: list[Any]) -> list[Any]:
    """A copy of each: the completions of a prompt share its messages, and would share one copy of them, too."""
    return [copied(value) for value in values]


def copied(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:  # an open file, a lock: there can be no second one
        return value


def fits_float32(value: Any) -> bool:
    try:
        return math.isfinite(value) and abs(float(value)) <= LARGEST
    except (TypeError, ValueError, RuntimeError, OverflowError):  # no number, several, or one beyond float
        return False


def reward_name(function: RewardFunction) -> str:
    return getattr(function, "__name__", type(function).__name__)


def text_of(completion: str | list[dict[str, str]]) -> str:
    """The words of a completion, which is text, or chat messages when the prompt is."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def is_function_name(reward: Any) -> bool:
    return isinstance(reward, str) and ":" in reward and not is_server(reward)


def is_server(reward: Any) -> bool:
    return isinstance(reward, str) and reward.startswith(("http://", "https://"))


def is_classifier(reward: Any) -> bool:
    return isinstance(reward, str) and ":" not in reward and reward != "vader"


def load_reward(
    reward: str | RewardFunction, device: torch.device | str = "cpu", args: SafeConfig | None = None
) -> RewardFunction:
    """The reward named in a config: `vader`, `file.py:function`, `package.module:function`, URL or classifier model."""
    if not isinstance(reward, str):
        return reward
    require_name("reward", reward)
    if reward == "vader":
        return vader()
    if is_server(reward):
        return RewardServer(reward, args or SafeConfig())
    source, separator, attribute = reward.partition(":")
    if not separator:
        return RewardModel(reward, device)
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
