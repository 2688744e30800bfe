"""Rewards: any callable `(prompts, completions, **columns) -> list[float]`, checked before it reaches the trainer."""

from __future__ import annotations

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
from safe_train.models import load_weights
from safe_train.reward_server import RewardServer

RewardFunction = Callable[..., Sequence[float]]


class Rewards:
    """A weighted sum of reward functions."""

    def __init__(self, functions: Sequence[RewardFunction], weights: Sequence[float] | None = None):
        self.functions = {reward_name(f): f for f in functions}
        if len(self.functions) != len(functions):
            raise ConfigError(f"two rewards share a name: {[reward_name(f) for f in functions]}")
        self.weights = [1.0] * len(functions) if weights is None else list(weights)
        if len(self.weights) != len(functions):
            raise ConfigError(f"reward_weights must be one number for each reward, got {weights} for {len(functions)}")
        if "reward" in self.functions and (len(functions) > 1 or weights is not None):
            raise ConfigError("a reward that is weighted or one of several cannot be called 'reward', as their sum is")

    def __call__(self, prompts: list[Any], completions: list[Any], columns: dict[str, list[Any]]) -> dict[str, Tensor]:
        """Scores [B] of each reward by name, and their weighted sum under "reward"."""
        scores = {name: score(name, f, prompts, completions, columns) for name, f in self.functions.items()}
        total = sum((w * s for w, s in zip(self.weights, scores.values(), strict=True)), torch.zeros(len(completions)))
        return {**scores, "reward": total}


def score(name: str, function: RewardFunction, prompts: list, completions: list, columns: dict[str, list]) -> Tensor:
    try:
        values: Any = function(prompts=prompts, completions=completions, **columns)
    except Exception as error:
        raise RuntimeError(f"reward {name!r} raised {type(error).__name__}: {error}") from error
    values = values.tolist() if hasattr(values, "tolist") else values  # an array, or a tensor
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ValueError(f"reward {name!r} must return a list of one number a completion, got {values!r:.200}")
    if len(values) != len(completions):
        raise ValueError(f"reward {name!r} returned {len(values)} values for {len(completions)} completions")
    for value, completion in zip(values, completions, strict=True):
        if not is_finite(value):
            raise ValueError(f"reward {name!r} returned {value!r} for the completion {text_of(completion)!r}")
    return torch.tensor([float(value) for value in values])


def is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # no number, several, or one beyond float
        return False


def reward_name(function: RewardFunction) -> str:
    return getattr(function, "__name__", type(function).__name__)


def text_of(completion: str | list[dict[str, str]]) -> str:
    """The words of a completion, which is text, or chat messages when the prompt is."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def load_reward(
    reward: str | RewardFunction, device: torch.device | str = "cpu", args: SafeConfig | None = None
) -> RewardFunction:
    """The reward named in a config: `vader`, `file.py:function`, `package.module:function`, URL or classifier model."""
    if not isinstance(reward, str):
        return reward
    require_name("reward", reward)
    if reward == "vader":
        return vader()
    if reward.startswith(("http://", "https://")):
        return RewardServer(reward, args or SafeConfig())
    source, separator, attribute = reward.partition(":")
    if not separator:
        return RewardModel(reward, device)
    try:
        function = getattr(import_source(source), attribute)
    except (ImportError, OSError, AttributeError) as error:
        raise ConfigError(f"cannot load the reward {reward!r}: {error}") from error
    if not callable(function):
        raise ConfigError(f"the reward {reward!r} is a {type(function).__name__}, not a function")
    return function


def import_source(source: str) -> Any:
    if not source.endswith(".py"):
        return importlib.import_module(source)
    spec = importlib.util.spec_from_file_location(Path(source).stem, source)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
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


class RewardModel:
    """A sequence-classification model with one output, applied to prompt and completion."""

    def __init__(self, name: str, device: torch.device | str = "cpu", batch_size: int = 16):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            self.model = load_weights(AutoModelForSequenceClassification, name).to(device).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot load the reward model {name!r}: {error}") from error
        if self.model.config.num_labels != 1:
            raise ConfigError(f"the reward model {name!r} has {self.model.config.num_labels} outputs, it must have 1")
        if self.model.config.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
            self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.tokenizer.truncation_side = "left"  # the completion is at the end
        self.__name__ = Path(name).name
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float]:
        texts = [self.render(*pair) for pair in zip(prompts, completions, strict=True)]
        # A chat template writes its own special tokens.
        options = {"add_special_tokens": isinstance(prompts[0], str), "padding": True, "truncation": True}
        scores: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            batch = texts[start : start + self.batch_size]
            inputs = self.tokenizer(batch, return_tensors="pt", **options).to(self.model.device)
            scores += self.model(**inputs).logits.squeeze(-1).float().tolist()
        return scores

    def render(self, prompt: str | list[dict[str, str]], completion: str | list[dict[str, str]]) -> str:
        if isinstance(prompt, str):
            return prompt + text_of(completion)
        return self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
