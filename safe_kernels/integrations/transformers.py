"""Causal language models of transformers, in the form the kernels take: the states their head receives, and the head.

    stats = token_stats_of(model, ids, labels, attention_mask=mask)       # of the labels after the first: [B, T - 1]

or, in parts,

    hidden_BTH = head_inputs(model, input_ids=ids, attention_mask=mask)   # no logits are made
    stats = linear_token_stats(hidden_BTH, tokens=labels, **output_head(model), **logit_transform(model))

What a model does before its head (a norm, a projection, a scale) is in the states. What it does after it (a scale, a
softcap) is measured on the model's own code, not guessed from its config.

Shape legend: B sequences, T positions, H hidden width, V vocabulary.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from safe_kernels import TokenStats, linear_token_stats

IGNORED = -100  # the label of transformers for what is no target
TOLERANCE = 1e-3  # nats
PROBE_TOKENS = 4
LARGEST_LOGIT = 30.0  # of those that are put in place of the head's: above it a softcap shows


_checked: WeakKeyDictionary[nn.Module, tuple[list[dict[str, Any]], dict[str, Any]]] = WeakKeyDictionary()


def token_stats_of(
    model: Any,
    input_ids: Tensor,
    labels: Tensor,
    *,
    ref_model: Any = None,
    temperature: float | Tensor = 1.0,
    backend: str | None = None,
    **inputs: Any,
) -> TokenStats:
    """Log-prob and entropy of a causal model at each label but the first of a row, without its logits. Equivalent to

        logits = model(input_ids, **inputs).logits[:, :-1]
        token_stats(logits, labels[:, 1:], ref_logits=..., temperature=temperature, mask=labels[:, 1:] != -100)

    with the product of the head in float32. The first call for a model runs it twice over a few tokens, to measure what
    it does to its logits after the head and to compare log-probs with those of its own code.

    Args:
        input_ids, labels: [B, T]; as in transformers a label stands at the place of its own token, and -100 is none.
        ref_model: another one, with the same vocabulary, which runs without gradient: `kl` is the exact KL to it.
        temperature: > 0, a number or [B, T - 1].
        inputs: other arguments of the models' forward, such as attention_mask and position_ids.

    Returns:
        TokenStats of shape [B, T - 1], 0 where the label is -100; differentiable in the weights of the model.

    Raises:
        ValueError: the head or what follows it is nothing that the kernels compute, or `ref_model` follows its head by
            something else than the model does.
    """
    if labels.shape != input_ids.shape or input_ids.dim() != 2:
        shapes = f"{tuple(input_ids.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"input_ids and labels must have one shape (batch, time); they have {shapes}")
    options, reference = checked_transform(model), {}
    if ref_model is not None:
        if checked_transform(ref_model) != options:
            raise ValueError(
                f"ref_model has {checked_transform(ref_model)} after its head, and the model {options}; both must agree"
            )
        with torch.no_grad():
            reference["ref_hidden"] = head_inputs(ref_model, input_ids=input_ids, **inputs)[:, :-1]
        reference |= {f"ref_{name}": x for name, x in output_head(ref_model).items()}
    hidden_BTH = head_inputs(model, input_ids=input_ids, **inputs)[:, :-1]
    targets = labels[:, 1:]
    given = {**output_head(model), **options, **reference, "temperature": temperature, "backend": backend}
    return linear_token_stats(hidden_BTH, tokens=targets, mask=targets != IGNORED, **given)


def checked_transform(model: Any) -> dict[str, Any]:
    """`logit_transform`, measured once for a model and its config, after which log-probs were compared.

    Raises:
        ValueError: as `logit_transform`, or the log-probs are not those of the model's own code within 1e-3 nats.
    """
    candidates = readings(text_config(model))
    if model in _checked and _checked[model][0] == candidates:
        return _checked[model][1]
    with in_eval_mode(model), torch.no_grad():
        found = logit_transform(model)
        ids = torch.tensor([plain_ids(model, PROBE_TOKENS)], device=model.device)
        states, logits = own_logits(model, input_ids=ids)
        stats = linear_token_stats(states, tokens=ids, **output_head(model), **found)
        own = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    gap = (stats.logprob - own).abs().max().nan_to_num(torch.inf).item()
    if gap > TOLERANCE:
        raise ValueError(
            f"{type(model).__name__}: with {found} after the head the kernels' log-probs differ by {gap:.2g} nats from "
            f"those of the model's own code, on the same hidden states; at most {TOLERANCE} is rounding"
        )
    _checked[model] = (candidates, found)
    return found


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Without dropout; after it each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def text_config(model: Any) -> Any:
    """The settings of the language model: those of a composite model (text and vision) are a part of its config."""
    config = model.config
    # get_text_config(decoder=True) would copy the config of an encoder-decoder model, such as BART's.
    return config if config.is_encoder_decoder else config.get_text_config(decoder=True)


def head_module(model: Any) -> nn.Linear:
    """The layer that makes logits of hidden states.

    Raises:
        ValueError: the model has none, or one that is not a plain linear layer.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        found = "none" if head is None else f"a {type(head).__name__}"
        raise ValueError(
            f"the output head must be a plain Linear layer (no LoRA on it), {type(model).__name__} has {found}"
        )
    return head


def output_head(model: Any) -> dict[str, Any]:
    """The head's weight [V, H] and bias [V] or None, as keyword arguments of the `safe_kernels.linear_*` functions."""
    head = head_module(model)
    return {"weight": head.weight, "bias": head.bias}


def head_inputs(model: Any, **inputs: Any) -> Tensor:
    """The hidden states [B, T, H] that the head receives when `model(**inputs)` runs. No logits are made.

    Differentiable, as the model's own forward is.

    Raises:
        ValueError: the model does not call its head once on one state a token.
    """
    states: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        states.append(hidden)
        return hidden.new_zeros(*hidden.shape[:-1], 1)  # where logits would be: the model may go on with them

    with head_replaced(model, keep):
        model(**text_only(model, inputs["input_ids"]) | inputs, use_cache=False)
    check_states(model, states, inputs["input_ids"])
    return states[0]


def text_only(model: Any, input_ids: Tensor) -> dict[str, Tensor]:
    """What a composite model requires in training, unless it is given: that no token belongs to an image."""
    if not model.training or text_config(model) is model.config:
        return {}
    names = inspect.signature(model.forward).parameters.keys() & {"token_type_ids", "mm_token_type_ids"}
    return dict.fromkeys(names, torch.zeros_like(input_ids))


@contextmanager
def head_replaced(model: Any, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, the head calls `forward`. Its module stays in place, with the hooks of FSDP and DeepSpeed."""
    head = head_module(model)
    own = head.__dict__.get("forward")  # accelerate puts one there
    head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own  # type: ignore[method-assign]


def check_states(model: Any, states: list[Tensor], input_ids: Tensor) -> None:
    if len(states) != 1 or states[0].shape[:-1] != input_ids.shape:
        shapes = [tuple(x.shape) for x in states]
        raise ValueError(
            f"{type(model).__name__} must call its output head once, with one hidden state a token; for input_ids of "
            f"shape {tuple(input_ids.shape)} it was called with {shapes or 'nothing'}"
        )


@torch.no_grad()
def own_logits(model: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
    """The states that the head receives, and the model's own logits of them [B, T, V], their product in float32.

    Bfloat16 rounds logits by 0.02 to 0.03, which would hide a scale that is wrong by 1 %.
    """
    states: list[Tensor] = []
    head = head_module(model)

    def in_float32(hidden: Tensor) -> Tensor:
        states.append(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return linear(hidden.float(), head.weight.float(), None if head.bias is None else head.bias.float())

    with head_replaced(model, in_float32):
        logits = model(**text_only(model, inputs["input_ids"]) | inputs, use_cache=False).logits
    check_states(model, states, inputs["input_ids"])
    return states[0], logits.float()


@torch.no_grad()
def logit_transform(model: Any) -> dict[str, Any]:
    """What the model does to its logits after the head: `logit_scale` and `softcap` of the `linear_*` functions.

    The model runs over a few tokens with known logits in place of its head's. The config's numbers are candidates only:
    `logits_scaling` divides in Granite and multiplies in HyperCLOVA X. The one that gives the model's own result wins.

    Raises:
        ValueError: no reading of the config gives the model's own log-probs within 1e-3 nats.
    """
    ids = torch.tensor([plain_ids(model, PROBE_TOKENS)], device=model.device)
    rows = head_module(model).weight.shape[0]
    known_V = torch.linspace(-LARGEST_LOGIT, LARGEST_LOGIT, rows, device=ids.device)
    with head_replaced(model, lambda hidden: known_V.expand(*hidden.shape[:-1], rows)):
        logits_V = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1].float()
    if len(logits_V) != rows:
        raise ValueError(
            f"{type(model).__name__} makes {len(logits_V)} logits of a head of {rows} rows; it must be one a row"
        )
    own_V = logits_V.log_softmax(-1)

    def error(reading: dict[str, Any]) -> float:
        difference = (transformed(known_V, **reading).log_softmax(-1) - own_V).abs().max()
        return difference.nan_to_num(torch.inf).item()

    best = min(readings(text_config(model)), key=error)
    if error(best) > TOLERANCE:
        ends = [0, rows // 4, -1]
        raise ValueError(
            f"{type(model).__name__} does something to its logits that is no scale or softcap of its config: of "
            f"{numbers(known_V[ends])} it makes {numbers(logits_V[ends])}, and the nearest reading of its config, "
            f"{best}, {numbers(transformed(known_V, **best)[ends])}"
        )
    return best


def numbers(values: Tensor) -> str:
    return ", ".join(f"{x:.4g}" for x in values.tolist())


def transformed(logits: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    scaled = logit_scale * logits
    return scaled if softcap is None else softcap * torch.tanh(scaled / softcap)


def readings(config: Any) -> list[dict[str, Any]]:
    """What the config's numbers may mean: each scale multiplies or divides or is not used, a softcap is on or off."""
    about = {k: v for k, v in config.to_dict().items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    about = {k: v for k, v in about.items() if v > 0 and re.search("logit|lm_head|output_mult", k) and "attn" not in k}
    scales = [scale for k, v in about.items() if re.search("scal|mult", k) for scale in (v, 1 / v)]
    caps = [v for k, v in about.items() if "cap" in k]
    return [
        {"logit_scale": float(scale), "softcap": cap}
        for scale, cap in itertools.product(dict.fromkeys([1.0, *scales]), dict.fromkeys([None, *caps]))
    ]


def plain_ids(model: Any, count: int) -> list[int]:
    """`count` tokens that the config gives no special meaning, or as many as there are."""
    configs = (model.config, text_config(model))
    special = [v for c in configs for k, v in c.to_dict().items() if re.search("token_ids?$|token_index$", k)]
    special += [v for each in special if isinstance(each, list) for v in each]  # several end tokens
    rows = min(head_module(model).weight.shape[0], model.get_input_embeddings().weight.shape[0])
    return [token for token in range(min(rows, 1000)) if token not in special][-count:]


@torch.no_grad()
def silent_modules(model: Any) -> dict[str, nn.Module]:
    """The names of the parts that text does not use: in a composite model, the vision tower and its projector.

    Found by running the model over a few tokens. An expert that received no token does not count as unused.
    """
    if not model.config.sub_configs:
        return {}
    called: set[nn.Module] = set()
    hooks = [m.register_forward_hook(lambda module, *_: called.add(module)) for m in model.modules()]
    try:
        head_inputs(model, input_ids=torch.tensor([plain_ids(model, PROBE_TOKENS)], device=model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: module for name, module in outermost(model, called) if any(True for _ in module.parameters())}


def outermost(module: nn.Module, called: set[nn.Module], prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The largest parts in which nothing was called."""
    for name, child in module.named_children():
        if called.isdisjoint(child.modules()):
            if not isinstance(module, nn.ModuleList):  # of experts
                yield prefix + name, child
        else:
            yield from outermost(child, called, f"{prefix}{name}.")
