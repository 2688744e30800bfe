"""What must hold of a model before the first rollout. What does not is a ConfigError that says what to set."""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from safe_kernels.integrations.transformers import (
    PROBE_TOKENS,
    head_replaced,
    logit_transform,
    own_logits,
    plain_ids,
    text_config,
)
from safe_train import parallel
from safe_train.config import ConfigError, SafeConfig
from safe_train.models import scoring
from safe_train.models.attention import as_published
from safe_train.models.layout import check_causal, probes
from safe_train.randomness import seeded

if TYPE_CHECKING:
    from safe_train.models.policy import Policy

LARGEST_HEAD_GAP = 1e-3  # nats


# The names that configs have for the number of positions, in transformers and in models that bring their own code.
POSITIONS = (
    *("max_position_embeddings", "n_positions", "max_target_positions", "max_sequence_length", "max_seq_len"),
    *("max_seq_length", "n_ctx", "model_max_length"),
)


def check_positions(config: Any, args: SafeConfig, name: str) -> None:
    """Sequences must fit the positions, and be shorter than what a RoPE that depends on the whole batch changes at.

    `config` is that of the model `name`, which need not be loaded.
    """
    config, total = text_config(SimpleNamespace(config=config)), args.max_prompt_tokens + args.max_new_tokens
    given = f"got {args.max_prompt_tokens} + {args.max_new_tokens}; lower max_prompt_tokens"
    found = ((setting, getattr(config, setting, None)) for setting in POSITIONS)
    setting, longest = next(((each, n) for each, n in found if isinstance(n, int)), ("", -1))
    if 0 < longest < total:  # XLNet's -1 is no limit
        raise ConfigError(
            f"max_prompt_tokens + max_new_tokens must be at most {longest}, the positions that {name} has "
            f"({setting}), {given}"
        )
    kind, limit = changing_rope(config)
    if limit is not None and total > limit:
        raise ConfigError(
            f"max_prompt_tokens + max_new_tokens must be at most {limit} for {name}: its rope_type {kind} turns a "
            f"token otherwise when any sequence of its batch is longer, {given}"
        )


FORWARD = ("input_ids", "attention_mask", "use_cache")  # as `model.generate` calls it


def check_forward(model: Any) -> None:
    """Refuses a forward that cannot be called as transformers' generation calls it."""
    parameters = inspect.signature(model.forward).parameters
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    absent = [each for each in FORWARD if each not in parameters and not takes_all]
    if absent:
        raise ConfigError(
            f"{type(model).__name__} cannot be trained: its forward must take {', '.join(FORWARD)}, and does not take "
            f"{', '.join(absent)}; add what is missing to its forward, or **kwargs where it makes no difference"
        )


@torch.no_grad()
def check_output(model: Any) -> None:
    """Refuses a forward that fails on text, or returns something else than what generation and the checks read."""
    name, advice = type(model).__name__, "change its forward, or set model.config.return_dict = True if that is off"
    ids = torch.tensor([plain_ids(model, PROBE_TOKENS)], device=model.device)
    with head_replaced(model, lambda x: x.new_zeros(*x.shape[:-1], 1)):
        try:
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the code of the model raises
            raise ConfigError(
                f"{name} cannot be trained: its forward must run on {', '.join(FORWARD)} alone, and fails with "
                f"{type(error).__name__}: {str(error):.200}; {advice}"
            ) from error
    if not isinstance(output, ModelOutput) or not isinstance(getattr(output, "logits", None), Tensor):
        raise ConfigError(
            f"{name} cannot be trained: its forward must return a ModelOutput with logits, such as "
            f"CausalLMOutputWithPast, and returned a {type(output).__name__}; {advice}"
        )


def changing_rope(config: Any) -> tuple[str, int | None]:
    """The RoPE that depends on the batch, if the model has one, and the length up to which it does not."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [rope, *(each for each in rope.values() if isinstance(each, dict))]  # one for each type of layer
    for each in nested:
        if each.get("rope_type") in ("longrope", "dynamic"):
            limit = each.get("original_max_position_embeddings")
            limit = limit or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
            return each["rope_type"], limit
    return "", None


def check_head(policy: Policy) -> None:
    """Finds what the model does to its logits, and holds the kernels' log-probs against those of the model's own code.

    Raises:
        ConfigError: the model is not causal, or its log-probs are not what the kernels make of its head.
    """
    model = policy.causal_lm
    with as_published(model):
        try:
            check_output(model)
            check_causal(model)
            policy.logit_transform = logit_transform(model)
            gap = head_gap(policy, probes(model)[:1])
        except ValueError as error:
            raise ConfigError(str(error)) from error
    if not gap <= LARGEST_HEAD_GAP:
        raise ConfigError(
            f"the head of {type(model).__name__}: on the same hidden states its own log-probs differ by {gap:.2g} "
            f"nats from those of the kernels with {policy.logit_transform}; at most {LARGEST_HEAD_GAP} is rounding"
        )


def on_meta(make: Callable[[], Any]) -> Any:
    """The model that `make` makes, without memory for its weights; tied, which transformers 5.0 leaves to loading."""
    with seeded(0), torch.device("meta"):
        model = make()
        model.tie_weights()
    return model


def check_saved_class(model: Any) -> None:
    """Refuses weights or ties that a checkpoint of all weights would lose: it loads as the class makes its config.

    Raises:
        ConfigError: the model has weights, or weights that are one tensor, that are not in its class and config.
    """
    kind, config = type(model), copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    try:
        loaded = on_meta(lambda: kind(config))
    except Exception as error:  # code of any model, which may read numbers that a meta device does not have
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        parallel.say(f"not checked that a checkpoint has all weights: no {kind.__name__} on meta ({reason})")
        check_tied_head(model)
        return
    own, made = shapes(model), shapes(loaded)
    differ = sorted(name for name in own.keys() | made.keys() if own.get(name) != made.get(name))
    if differ:
        raise ConfigError(
            f"{differ[0]} is {own.get(differ[0], 'not')} in the model, and {made.get(differ[0], 'not')} in the "
            f"{kind.__name__} of its config, as which a checkpoint loads: change the config, or load the model again"
        )
    check_ties(kind.__name__, ties_of(model), ties_of(loaded))


def check_tied_head(model: Any) -> None:
    """The same for the head alone, by what the config says."""
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    tied = {frozenset({"the head", "the embeddings"})}
    config = model.config if hasattr(model.config, "tie_word_embeddings") else text_config(model)
    is_said = getattr(config, "tie_word_embeddings", False)
    check_ties(type(model).__name__, tied if head is embeddings else set(), tied if is_said else set())


def check_ties(kind: str, own: set[frozenset[str]], made: set[frozenset[str]]) -> None:
    if own == made:
        return
    names = min(own ^ made, key=sorted)
    said = "one tensor in the model, and not" if names in own else "not one tensor in the model, but"
    raise ConfigError(
        f"{' and '.join(sorted(names))} are {said} in the {kind} of its config, as which a checkpoint loads; set "
        "tie_word_embeddings in the config to what the model is"
    )


def shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


def ties_of(model: nn.Module) -> set[frozenset[str]]:
    """The names of weights that are one tensor."""
    names = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].add(name)
    return {frozenset(each) for each in names.values() if len(each) > 1}


@torch.no_grad()
def head_gap(policy: Policy, sequences: list[list[int]] | None = None) -> float:
    """The largest |difference| in nats between the kernels' log-probs and those of the model's own code after the head.

    On the same hidden states, and with the head's product in float32 on both sides: about 2e-5 where all is right,
    even for bfloat16 weights, and 3e-2 for a scale that is wrong by 1 %.
    """
    gaps = []
    for ids in sequences or probes(policy.causal_lm):
        ids_T = torch.tensor(ids, device=policy.causal_lm.device)
        inputs = {"input_ids": ids_T[None], "attention_mask": torch.ones_like(ids_T)[None]}
        with as_published(policy.causal_lm):  # `varlen` runs on packed sequences alone
            hidden_BTH, logits_BTV = own_logits(policy.causal_lm, **inputs)
        own = logits_BTV[0, :-1].log_softmax(-1).gather(-1, ids_T[1:, None])[:, 0]
        head = policy.head() | {"temperature": 1.0}
        gaps.append((scoring.logprobs(hidden_BTH[0, :-1], head, ids_T[1:]) - own).abs().max())
    return torch.stack(gaps).max().item()


def check_vocabulary(model: Any, tokenizer: Any) -> str:
    """What to tell about tokens of the one that the other lacks, or nothing.

    Raises:
        ConfigError: the tokenizer makes tokens that have no row in the model, which would be an index error later.
    """
    rows = min(model.get_input_embeddings().weight.shape[0], model.get_output_embeddings().weight.shape[0])
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= rows:
        raise ConfigError(
            f"the tokenizer has {largest + 1} tokens, {type(model).__name__} has rows for {rows}: {token!r} would be "
            f"row {largest}; take the model's own tokenizer, or call model.resize_token_embeddings({largest + 1})"
        )
    if rows == largest + 1:
        return ""
    return (
        f"{type(model).__name__} has {rows} rows, the tokenizer {largest + 1} tokens: the other {rows - largest - 1} "
        "can be sampled, and are no text for the rewards"
    )
