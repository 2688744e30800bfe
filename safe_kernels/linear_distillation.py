"""`linear_distillation_loss`: the same from hidden states and heads, its gradient taken in the forward. The public
function, its op and gradient.

Shapes: N tokens, V vocabulary, H hidden width, which is the teacher's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import checks, reference
from .dispatch import (
    backend_of,
    choose_backend,
    differentiable,
    exact,
    first_derivative_only,
    keep,
    kept,
    register,
)
from .distillation import ROWS, Goal, goal_of, require_clean, require_one_rank, require_vocabulary
from .formulas import DistillationObjective
from .inputs import Divergence, Head, LinearInputs, compute_dtype
from .linear import flat_inputs
from .policy_loss import may_require_grad, scaled_op
from .results import DistillationLoss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def linear_distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_bias: Tensor | None = None,
    teacher_temperature: float | Tensor | None = None,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    tokens: Tensor | None = None,
    cross_entropy_coef: float = 0.0,
    shared_vocabulary: int | None = None,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> DistillationLoss:
    """`distillation_loss` from hidden states and the heads of both models, without materialising logits. Equivalent to

        logits = logit_scale * (hidden.float() @ weight.float().T + bias)
        logits = softcap * tanh(logits / softcap)
        distillation_loss(logits, the same of the teacher, divergence=divergence, ...)

    The gradient is taken in the forward, while a chunk's logits are in memory: one product of each model's head, and
    one for the gradient of hidden; one more if the head is trained. The backward only scales.

    Args:
        hidden, weight, bias: [..., H], [V, H] and [V] of the student. Gradients go to those that require them.
        teacher_hidden, teacher_weight, teacher_bias: [..., H'], [V, H'] and [V] of the teacher, which is frozen: it
            never receives a gradient, not even through a head that both share.
        softcap, logit_scale, teacher_softcap, teacher_logit_scale: as in `linear_token_stats`; each is its model's own.
        reduction: with "none", an incoming gradient of its own for each token scales its row of hidden's gradient. The
            head's gradient is a sum over tokens, which no factor turns into another: for a head or bias that requires a
            gradient, "none" computes the logits again in the backward (one product more of each model).
        shared_vocabulary: both heads are cut to their first so many rows.

    The other arguments and the results are those of `distillation_loss`.
    """
    student = Model.of("", hidden, weight, bias, softcap, logit_scale, process_group)
    teacher = Model.of(
        *("teacher_", teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale, process_group)
    )
    shape, why = (*hidden.shape[:-1], teacher_hidden.shape[-1]), "with the leading shape of hidden"
    checks.require_place("teacher_hidden", teacher_hidden, shape, why, hidden.device)
    require_vocabulary("weight", len(student.weight), len(teacher.weight), shared_vocabulary)
    student, teacher = student.cut(shared_vocabulary), teacher.cut(shared_vocabulary)
    goal = goal_of(
        hidden, divergence, beta, temperature, teacher_temperature, weights, mask, reduction, tokens, cross_entropy_coef
    )
    if checks.debugging():
        require_clean(goal, len(student.weight), hidden=hidden, teacher_hidden=teacher_hidden)
    backend = choose_backend(
        *(backend, *student[:3], *teacher[:3], goal.temperature, goal.teacher_temperature, goal.weights)
    )
    if backend == "reference":
        options = student._asdict() | {f"teacher_{name}": x for name, x in teacher._asdict().items()}
        with exact(hidden):
            return reference.linear_distillation_loss(**options, **goal.options(tokens))
    inputs = student.inputs(goal, goal.temperature)
    ref_inputs = teacher.inputs(goal, goal.teacher_temperature)
    needed = [torch.is_grad_enabled() and x is not None and may_require_grad(x) for x in inputs[:3]]
    if reduction == "none" and (needed[1] or needed[2]):
        needed = [False, False, False]
    loss, divergence_N, entropy_N, logprob_N, *_ = loss_and_gradients(inputs, ref_inputs, goal, needed, backend)
    loss = loss.view_as(goal.tokens) if reduction == "none" else loss
    return goal.results(loss, divergence_N, entropy_N, logprob_N, with_tokens=tokens is not None)


def loss_and_gradients(
    inputs: LinearInputs, ref_inputs: LinearInputs, goal: Goal, needed: Sequence[bool], backend: str
) -> tuple[Tensor, ...]:
    """What `linear_distillation_op` returns."""
    return linear_distillation_op(
        *(*inputs[:3], *(None if x is None else x.detach() for x in ref_inputs[:3]), inputs.tokens_N, inputs.mask_N),
        *(inputs.temperature, inputs.temperatures_N, inputs.softcap, inputs.logit_scale),
        *(ref_inputs.temperature, ref_inputs.temperatures_N, ref_inputs.softcap, ref_inputs.logit_scale),
        *(*goal.divergence, *goal.objective(compute_dtype(inputs.hidden_NH))),
        *(goal.reduction != "none", *needed, backend),
    )


class Model(NamedTuple):
    """Hidden states and how they become logits, of the student or the teacher; checked."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float

    @classmethod
    def of(
        cls,
        prefix: str,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        logit_scale: float,
        process_group: ProcessGroup | None,
    ) -> Model:
        """`prefix` is that of the arguments' names."""
        named: dict[str, Any] = {f"{prefix}weight": weight, f"{prefix}bias": bias}
        weight, bias, group = checks.local_parts(process_group, **named)
        require_one_rank(group)
        if checks.require_floating(f"{prefix}hidden", hidden).dim() == 0:
            raise ValueError(f"{prefix}hidden has no axes; it must be (..., H)")
        checks.require_weight(prefix, hidden, weight, bias)
        softcap = None if softcap is None else checks.require_number(f"{prefix}softcap", softcap, above=0)
        return cls(hidden, weight, bias, softcap, checks.require_number(f"{prefix}logit_scale", logit_scale))

    def cut(self, vocabulary: int | None) -> Model:
        if vocabulary is None:
            return self
        bias = None if self.bias is None else self.bias[:vocabulary]
        return self._replace(weight=self.weight[:vocabulary], bias=bias)

    def inputs(self, goal: Goal, temperature: float | Tensor) -> LinearInputs:
        own, none = (self.hidden, self.weight, goal.tokens, self.bias), (None, None, None)
        return flat_inputs(Head(*own, *none, temperature, self.softcap, self.logit_scale, goal.mask))


def linear_distillation_fake(*arguments: Any) -> tuple[Tensor, ...]:
    leaves, tokens_N, is_sum, needed = arguments[:3], arguments[6], arguments[20], arguments[21:24]
    N, dtype = tokens_N.shape[0], compute_dtype(arguments[0])
    shapes = [x.shape if need else (0,) for x, need in zip(leaves, needed, strict=True)]
    sizes = [() if is_sum else (N,), (N,), (N,), (N,), *shapes]
    return tuple(arguments[0].new_empty(size, dtype=dtype) for size in sizes)


@register(linear_distillation_fake)
def linear_distillation_op(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    teacher_hidden_NH: Tensor,
    teacher_weight_VH: Tensor,
    teacher_bias_V: Tensor | None,
    tokens_N: Tensor,
    mask_N: Tensor | None,
    temperature: float,
    temperatures_N: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    teacher_temperature: float,
    teacher_temperatures_N: Tensor | None,
    teacher_softcap: float | None,
    teacher_logit_scale: float,
    divergence: str,
    beta: float,
    weight_N: Tensor,
    cross_entropy_coef: float,
    is_sum: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, of all tokens or [N]; divergence, entropy and logprob [N]; and the gradients of (hidden, weight, bias)
    for an incoming gradient of 1, empty where not needed.
    """
    head, teacher_head = (hidden_NH, weight_VH, bias_V), (teacher_hidden_NH, teacher_weight_VH, teacher_bias_V)
    none, own, teachers = (None, None, None), (softcap, logit_scale), (teacher_softcap, teacher_logit_scale)
    student = LinearInputs(*head, *none, tokens_N, temperature, temperatures_N, mask_N, *own, False, ROWS)
    temperatures = (teacher_temperature, teacher_temperatures_N)
    teacher = LinearInputs(*teacher_head, *none, tokens_N, *temperatures, mask_N, *teachers, False, ROWS)
    objective, needed = DistillationObjective(weight_N, cross_entropy_coef), (need_hidden, need_weight, need_bias)
    goal = (Divergence(divergence, beta), objective, needed)
    stats, gradients = backend_of(backend).linear_divergence(student, teacher, *goal)
    loss_N = objective.evaluate(stats[0], stats[2])
    empty = (stats.new_empty(0) if x is None else x for x in gradients)
    return loss_N.sum() if is_sum else loss_N, *(x.clone() for x in stats[:3]), *empty  # type: ignore[return-value]


def save_for_the_gradient(ctx: Any, arguments: tuple[Any, ...], found: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*found[1:])
    ctx.dtypes = [None if x is None else x.dtype for x in arguments[:3]]
    ctx.is_sum, ctx.is_taken = arguments[20], any(arguments[21:24])
    if ctx.is_taken:
        ctx.save_for_backward(*found[-3:])
    else:
        keep(ctx, arguments)


def linear_distillation_gradient(ctx: Any, grad_loss: Tensor | None, *_: None) -> list[Tensor | None]:
    needed = ctx.needs_input_grad[1:4]
    if grad_loss is None:
        return [None, None, None]
    first_derivative_only("linear_distillation_loss")
    if ctx.is_taken:
        factor = grad_loss if ctx.is_sum else grad_loss[:, None]
        found = zip(ctx.saved_tensors, ctx.dtypes, needed, strict=True)
        return [scaled_op(x, factor, dtype) if need else None for x, dtype, need in found]
    *inputs, weight_N, cross_entropy_coef, _, _, _, _, backend = kept(ctx)
    goal = (weight_N * grad_loss, cross_entropy_coef, True, *needed)
    *_, hidden, weight, bias = linear_distillation_op(*inputs, *goal, backend)
    found = zip((hidden, weight, bias), ctx.dtypes, needed, strict=True)
    return [x.to(dtype) if need else None for x, dtype, need in found]


differentiable(linear_distillation_op, 3, save_for_the_gradient, linear_distillation_gradient)
