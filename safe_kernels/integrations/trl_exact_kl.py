"""The exact KL to the reference in TRL's GRPO and RLOO: what `apply(kl="exact")` of `trl.py` adds.

TRL scores policy and reference one after the other, and estimates the KL from the log-probs of the sampled tokens. Here
the reference's backbone runs right before the policy's, on the same tokens, and its head never: the policy's head call
gives log-prob, entropy and KL(policy || reference) over the vocabulary from one pass. What TRL does with the KL stays
TRL's code.

    GRPO    beta * KL of each token in the loss, differentiable, aggregated and logged as TRL does its estimate
    RLOO    -beta * the sum of a completion's KLs in its reward, and beta * the same sum, differentiable, in the loss

The gradient of a completion's KL has two parts: which prefixes the policy makes likely, and the distribution after each
of them. RLOO's log-ratio in the reward covers both in expectation. Of the exact KL the reward covers the first, and
the loss the second.

Shapes: B completions of C tokens.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from .patch import Replacement

SCORE = "_get_per_token_logps_and_entropies"  # the trainers' method: (model, ...) -> (logprob [B, C], entropy, aux)


class HeadCall:
    """Takes the place of TRL's chunked log-prob; `inside`, where it is set, answers instead."""

    inside: ClassVar[Callable[..., tuple[Tensor | None, ...]] | None] = None

    def __init__(self, linear_logprob: Callable[..., tuple[Tensor | None, ...]]):
        self.linear_logprob = linear_logprob

    def apply(self, *arguments: Any) -> tuple[Tensor | None, ...]:
        if HeadCall.inside is None:
            return self.linear_logprob(*arguments)
        return HeadCall.inside(self.linear_logprob, *arguments)


@contextmanager
def temporarily(owner: Any, **values: Any) -> Iterator[None]:
    own = {name: vars(owner)[name] for name in values if name in vars(owner)}  # not those of its class
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in own:
                setattr(owner, name, own[name])
            else:
                delattr(owner, name)


class RefLogprob:
    """Stands for the reference's log-probs in TRL's code, whose expression for the KL, `estimate`, then gives the
    exact KL. Any other use raises. `kls` may be filled later, but before the expression is complete.
    """

    K3 = "exp(ref - x) - (ref - x) - 1"  # in GRPO's loss
    K1 = "x - ref"  # in RLOO's reward
    PARTS = ("ref - x", "exp(ref - x)", "exp(ref - x) - (ref - x)")

    def __init__(self, kls: list[Tensor], estimate: str, form: str = "ref"):
        self.kls, self.estimate, self.form = kls, estimate, form

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Of `torch.exp(self)`, and of `x - self` with a tensor x."""
        name, (first, *rest) = function.__name__, args
        if name in ("sub", "__sub__") and not isinstance(first, cls):
            return rest[0]._next(f"x - {rest[0].form}")
        return first._next(f"{name}({first.form})") if isinstance(first, cls) else rest[0]._next(f"x.{name}(ref)")

    def __sub__(self, other: Any) -> Any:
        term = f"({other.form})" if isinstance(other, RefLogprob) else "x" if isinstance(other, Tensor) else f"{other}"
        return self._next(f"{self.form} - {term}")

    def _next(self, form: str) -> Any:
        if form == self.estimate:
            return only(self.kls)
        if form not in self.PARTS:
            raise RuntimeError(
                f"this version of TRL computes the KL as {form}..., which apply(kl='exact') does not know: use "
                "apply(), with TRL's own estimate"
            )
        return RefLogprob(self.kls, self.estimate, form)


def only(kls: list[Tensor]) -> Tensor:
    if len(kls) != 1:
        raise RuntimeError(f"apply(kl='exact'): TRL scored the policy {len(kls)} times where it does so once")
    return kls[0]


def score_both(trainer: Any, score: Any, model: Any, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], Tensor]:
    """What TRL's `score` gives for the policy `model`, and the exact KL [B, C], differentiable like its log-probs."""
    heads: list[tuple[Tensor, Tensor, Tensor | None]] = []
    outputs: list[Any] = []

    def keep(_: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> tuple[Tensor | None, ...]:
        heads.append((hidden, weight, bias))
        return hidden.new_zeros(len(hidden)), None, None, None, None

    def pair(linear_logprob: Any, hidden: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
        ref_hidden, ref_weight, ref_bias = heads.pop(0)
        if len(ref_hidden) != len(hidden):
            raise RuntimeError(
                f"apply(kl='exact'): the policy has {len(hidden)} tokens, the reference {len(ref_hidden)}"
            )
        own = (None, None) if ref_weight is weight else (ref_weight, ref_bias)
        *found, kl = linear_logprob(hidden, weight, *arguments, ref_hidden, *own)
        found[2] = kl  # travels as `log_sum_sq_probs`, which these trainers do not ask for
        return tuple(found)

    unused = kwargs.keys() & {"compute_entropy", "compute_aux_loss"}
    with torch.no_grad(), reference_of(trainer) as reference, temporarily(HeadCall, inside=keep):
        score(reference, *args, **kwargs | dict.fromkeys(unused, False))
    noted = model.register_forward_hook(lambda module, given, output: outputs.append(output))
    with noted, temporarily(HeadCall, inside=pair):
        found = score(model, *args, **kwargs)
    kls: list[Any] = [getattr(output, "log_sum_sq_probs", None) for output in outputs]
    if heads or not kls or any(x is None for x in kls):
        raise RuntimeError("apply(kl='exact'): TRL did not compute its log-probs by the function that is replaced")
    return found, torch.cat(kls)[:, -found[0].shape[1] :]


@contextmanager
def reference_of(trainer: Any) -> Iterator[Any]:
    """Its reference model, or the policy with its adapter disabled, or with the adapter that TRL keeps as "ref"."""
    if trainer.ref_model is not None:
        yield trainer.ref_model
        return
    policy = trainer.accelerator.unwrap_model(trainer.model)
    name = "ref" if "ref" in policy.peft_config else None
    with sys.modules["trl.trainer.utils"].use_adapter(policy, name):
        yield trainer.model


def is_reference(trainer: Any, model: Any) -> bool:
    if trainer.ref_model is not None:
        return model is trainer.ref_model
    policy = trainer.accelerator.unwrap_model(model)
    if policy.active_peft_config.is_prompt_learning:
        raise ValueError("apply(kl='exact') does not work with prompt learning: the reference has fewer tokens")
    status = policy.get_model_status()
    return not status.enabled or "ref" in status.active_adapters


@contextmanager
def scored_together(trainer: Any) -> Iterator[list[Tensor]]:
    """Inside, each time that the trainer scores the policy appends the exact KL [B, C] to the list. When it scores the
    reference, that has happened already.
    """
    kls: list[Tensor] = []
    score = getattr(trainer, SCORE)

    def scored(model: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        if is_reference(trainer, model):
            return RefLogprob(kls, RefLogprob.K1), None, None
        found, kl = score_both(trainer, score, model, *args, **kwargs)
        kls.append(kl)
        return found

    with temporarily(trainer, **{SCORE: scored}):
        yield kls


def _grpo_completions(original: Any) -> Any:
    @functools.wraps(original)
    def generate_and_score_completions(self: Any, inputs: Any) -> Any:
        """Without the reference, which the loss scores."""
        with temporarily(self, beta=0.0):
            return original(self, inputs)

    return generate_and_score_completions


def _grpo_loss(original: Any) -> Any:
    @functools.wraps(original)
    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.beta == 0:
            return original(self, model, inputs, *args, **kwargs)
        with scored_together(self) as kls, temporarily(self.args, use_bias_correction_kl=False):  # of a sampled KL
            inputs = {**inputs, "ref_per_token_logps": RefLogprob(kls, RefLogprob.K3)}
            return original(self, model, inputs, *args, **kwargs)

    return compute_loss


def _rloo_completions(original: Any) -> Any:
    @functools.wraps(original)
    def generate_and_score_completions(self: Any, inputs: Any) -> Any:
        if self.beta == 0:
            return original(self, inputs)
        if self.normalize_advantages:
            raise ValueError(
                "apply(kl='exact') does not work with normalize_advantages=True in RLOO: it divides the KL in the "
                "reward by a number that the KL in the loss does not get"
            )
        with scored_together(self):
            return original(self, inputs)

    return generate_and_score_completions


def _rloo_loss(original: Any) -> Any:
    @functools.wraps(original)
    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.beta == 0:
            return original(self, model, inputs, *args, **kwargs)
        with scored_together(self) as kls:
            loss = original(self, model, inputs, *args, **kwargs)
        return loss + self.beta * (only(kls) * inputs["completion_mask"]).sum(1).mean()

    return compute_loss


METHODS = [
    Replacement(f"trl.trainer.{kind}_trainer", f"{kind.upper()}Trainer.{name}", [parameters], make)
    for kind, completions, loss in (
        ("grpo", _grpo_completions, _grpo_loss),
        ("rloo", _rloo_completions, _rloo_loss),
    )
    for name, parameters, make in (
        ("_generate_and_score_completions", ("inputs",), completions),
        ("compute_loss", ("model", "inputs", "return_outputs", "num_items_in_batch"), loss),
    )
]
