"""The start of a run: what it was asked for is checked in the order of its cost, and the model comes last."""

from __future__ import annotations

import importlib.util
import os
import shutil
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safe_train import parallel
from safe_train.config import ConfigError, SafeConfig, recorded, require_name
from safe_train.data.chat import read_text
from safe_train.data.prompts import Prompt
from safe_train.engines import sharding
from safe_train.engines.launched import cuts_weights, place_model
from safe_train.models.adapters import untrained_experts, unwrapped
from safe_train.models.checks import check_positions, check_vocabulary, on_meta
from safe_train.models.policy import Policy, make_policy, use_tensor_cores
from safe_train.models.pretrained import config_of, load_model, load_tokenizer, loading, model_class
from safe_train.models.teacher import Teaches, load_teacher
from safe_train.randomness import guest
from safe_train.rewards.calls import Batch, NotANumber, RewardFunction, ask, check_columns, check_signature
from safe_train.rewards.rewards import NO_REWARD, Rewards, is_classifier, is_server, load_reward, reward_name
from safe_train.rewards.teacher_server import TeacherServer
from safe_train.run.events import new_state
from safe_train.run.versions import check_versions
from safe_train.sampling.rollout import Rollout
from safe_train.sampling.stopping import stop_tokens

INVENTED = "The answer is 42."  # a completion

Reward = RewardFunction | str


def asked_for(
    args: SafeConfig, rewards: Reward | Sequence[Reward] | None, processing_class: Any, **given: Any
) -> tuple[SafeConfig, list[Reward]]:
    """The settings with the names of what was given in Python, and the rewards: checked as far as nothing is loaded."""
    check_versions()
    chosen = args.reward if rewards is None else rewards
    if args.algorithm == "distill" and not chosen:
        chosen = [NO_REWARD]
    functions = list(chosen) if isinstance(chosen, Sequence) and not isinstance(chosen, str) else [chosen]
    folder = os.path.abspath(args.output_dir)  # wherever the user's code goes later
    args = recorded(args, functions, output_dir=folder, **given)
    if missing := args.missing():
        raise ConfigError(
            f"a run needs {', '.join(missing)}: name {'it' if len(missing) == 1 else 'them'} in the config, as "
            "key=value, or in Python as model, train_dataset and reward_funcs; `safe-train demo` brings its own"
        )
    if args.eval_every and args.eval_dataset is None:
        raise ConfigError("eval_dataset must be set when eval_every is")
    if given["model"] is None:
        require_name("model", args.model)
    elif not isinstance(given["model"], str) and processing_class is None:
        raise ConfigError("a model object needs its tokenizer: pass processing_class=")
    named = [name if isinstance(f, str) else f for f, name in zip(functions, args.reward, strict=True)]
    for reward in named:
        if isinstance(reward, str):
            require_name("reward", reward)
    return args, named


def check_4bit(args: SafeConfig, device: torch.device, is_named: bool) -> None:
    """Whether the weights can be loaded in 4 bits."""
    if not args.load_in_4bit:
        return
    if not is_named:
        raise ConfigError("load_in_4bit is for a model that is named: pass its name, or the object as you loaded it")
    if device.type != "cuda":
        raise ConfigError(
            f"load_in_4bit needs a GPU, the device is {device.type}: leave it out, or take a smaller model"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("load_in_4bit needs a package: pip install 'bitsandbytes>=0.46'")
    if cuts_weights():
        raise ConfigError("load_in_4bit needs whole weights on each GPU, not FSDP or ZeRO-3: use DDP or one process")


def check_outline(args: SafeConfig, tokenizer: Any, peft_config: Any) -> None:
    """What the config alone says of the model, before its weights are loaded: positions, tokens, the disk's room.

    A model whose code reads weights while it is made has no outline; its weights are checked all the same.
    """
    if (model := outline(args)) is not None:
        check_positions(model.config, args, type(model).__name__)
        check_vocabulary(model, tokenizer)
        if (
            args.lora_r == 0 and peft_config is None
        ):  # what is trained of an adapter is known when it is made, and little
            check_space(Path(args.output_dir), model.parameters())


def outline(args: SafeConfig) -> Any:
    """The model that the config describes, without memory for its weights; None where that cannot be made."""
    with loading(args.model):
        config = config_of(args)
    kind = model_class(config)
    try:
        return on_meta(lambda: kind.from_config(config, trust_remote_code=args.trust_remote_code))
    except Exception:  # code of any model
        return None


def prepare_tokenizer(tokenizer: Any, args: SafeConfig) -> Any:
    """The tokenizer that was handed over, or the model's, with the chat template of the settings."""
    tokenizer = load_tokenizer(args) if tokenizer is None else tokenizer
    if args.chat_template is not None:
        tokenizer.chat_template = read_text("chat_template", args.chat_template)
    if args.stop_tokens is not None:
        stop_tokens(tokenizer, args.stop_tokens)
    return tokenizer


def load_policy(model: Any, tokenizer: Any, args: SafeConfig, device: torch.device, peft_config: Any) -> Policy:
    """The policy and its reference, of the model that was handed over or named, the same on all processes."""
    model = unwrapped(load_model(args, device) if model is None else model)
    dtype = sharding.compute_dtype(device, model.dtype, args)
    use_tensor_cores(device, dtype)
    policy = make_policy(place_model(model, device), args, peft_config, device=device, dtype=dtype)
    parallel.say(check_vocabulary(policy.causal_lm, tokenizer), untrained_experts(policy.causal_lm))
    parallel.broadcast(parameter for each in (policy, *policy.frozen_copies) for parameter in each.parameters())
    return policy


def make_teacher(args: SafeConfig, policy: Policy, tokenizer: Any, device: torch.device) -> Teaches | None:
    if not is_server(args.teacher):
        return load_teacher(args, policy, tokenizer, device)
    return TeacherServer(args, tokenizer, len(policy.head()["weight"]))


def make_rewards(
    rewards: Sequence[Reward], args: SafeConfig, device: torch.device, prompts: Sequence[Prompt], state: Any
) -> Rewards:
    with guest(args.seed):  # a file that seeds when it is imported
        functions = load_rewards(rewards, args, device, prompts)
        return Rewards(
            functions,
            args.reward_weights,
            aggregation=args.multi_objective_aggregation,
            variance_coef=args.reward_variance_coef,
            limit=args.async_reward_timeout,
            state=state,
        )


def load_rewards(
    rewards: Sequence[Reward], args: SafeConfig, device: torch.device, prompts: Sequence[Prompt]
) -> list[RewardFunction]:
    """The rewards in their order, those with a name tried once. Classifiers come last: they take longer."""
    loaded: dict[int, RewardFunction] = {}
    columns = sorted({name for prompt in prompts for name in prompt.columns})
    check_columns(columns)
    for i in sorted(range(len(rewards)), key=lambda i: is_classifier(rewards[i])):
        loaded[i] = load_reward(rewards[i], device, args)
        if isinstance(rewards[i], str):
            try_reward(str(rewards[i]), loaded[i], prompts, args)
        else:
            check_signature(reward_name(loaded[i]), loaded[i], columns)
    return [loaded[i] for i in range(len(rewards))]


def try_reward(name: str, function: RewardFunction, prompts: Sequence[Prompt], args: SafeConfig | None = None) -> None:
    """Calls a reward with invented completions, before anything slow.

    What no other completions would mend is an error; anything else that it raises is a warning.
    """
    args = args or SafeConfig()
    count = len(prompts)
    inputs = Rollout(list(prompts), [[0]] * count, [INVENTED] * count, [True] * count, [[0.0]] * count).for_rewards()
    check_signature(name, function, inputs[2])
    try:
        ask({reward_name(function): function}, Batch(*inputs, new_state(args)), args.async_reward_timeout)
    except NotANumber as error:
        warn(error)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except RuntimeError as error:
        cause = error.__cause__
        if is_server(name) or is_classifier(name):
            raise ConfigError(str(cause)) from error
        if isinstance(cause, (NameError, ImportError, SyntaxError)):
            raise ConfigError(f"{error}{place(cause)}") from error
        warn(f"{error}{place(cause)}")


def place(error: BaseException | None) -> str:
    """Where in the reward's file it was raised."""
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def warn(message: object) -> None:
    parallel.say(f"warning: {message}. The completions were invented; the run's own may fare better")


@parallel.main_only
def check_space(folder: Path, trained: Iterable[Tensor]) -> None:
    """Whether the disk has room for a checkpoint."""
    needed, free = needed_bytes(trained), shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"output_dir {str(folder)!r} has {free / 1e9:.2f} GB free, and a checkpoint takes {needed / 1e9:.2f} GB: "
            "make room, choose another output_dir, or train fewer weights (lora_r)"
        )


def needed_bytes(trained: Iterable[Tensor]) -> int:
    """Of a checkpoint: the trained weights, and for each the two moments of AdamW in float32."""
    return sum(x.numel() * (x.element_size() + 8) for x in trained)
