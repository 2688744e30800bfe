"""TRL's distillation on these kernels: the loss of DistillationTrainer from hidden states, and that of GKDTrainer,
GOLDTrainer and IWOPDTrainer from logits.

Shapes: B completions of C tokens, N tokens, V vocabulary, H hidden width, which is the teacher's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..dispatch import first_derivative_only
from ..distillation import distillation_loss, goal_of, require_vocabulary
from ..linear_distillation import Model, loss_and_gradients
from ..policy_loss import scaled_op
from .patch import Replacement
from .trl_calls import autocast_dtype, fast_backend, gathered


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_distillation_loss` of the tokens with a mask other than 0, divided by `num_items_in_batch`, else by how
    many they are.

    Args:
        student_hidden_states, teacher_hidden_states, completion_mask: [B, C, H], [B, C, H'], [B, C].
        beta: 0 is the forward KL, 1 the reverse KL, and what is between them the JSD.

    Returns:
        (loss, the sum of the student's entropies, the number of tokens), 0-dim. The loss alone has a gradient.
    """
    live = completion_mask != 0
    student, teacher = (
        (hidden[live], *_whole_head(hidden, weight, bias))
        for hidden, weight, bias in (
            (student_hidden_states, student_lm_head_weight, student_lm_head_bias),
            (teacher_hidden_states, teacher_lm_head_weight, teacher_lm_head_bias),
        )
    )
    loss, entropy = LinearDivergence.apply(
        *(*student, *teacher, beta, temperature),
        *(student_final_logit_softcapping, student_logit_scale),
        *(teacher_final_logit_softcapping, teacher_logit_scale, torch.is_grad_enabled()),
    )
    tokens = live.sum()
    return loss / _count(num_items_in_batch, tokens.clamp(min=1), loss), entropy, tokens


class LinearDivergence(torch.autograd.Function):
    """`linear_distillation_loss(..., reduction="sum")` with the autocast and the ZeRO-3 of TRL: under autocast hidden
    states and weights are rounded to its dtype and their gradients are float32; weights are gathered for the forward,
    which takes the gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        beta: float,
        temperature: float,
        softcap: float | None,
        logit_scale: float,
        teacher_softcap: float | None,
        teacher_logit_scale: float,
        takes_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        heads = (hidden, weight, teacher_hidden, teacher_weight)
        rounded, backend = autocast_dtype(hidden), fast_backend(*heads)
        needed = [takes_gradient and need for need in ctx.needs_input_grad[:3]]
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        with gathered(weight, bias), gathered(teacher_weight, teacher_bias):
            hidden, weight, teacher_hidden, teacher_weight = (x if rounded is None else x.to(rounded) for x in heads)
            student = Model.of("", hidden, weight, bias, softcap, logit_scale, None)
            teachers = (teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
            teacher = Model.of("teacher_", *teachers, None)
            require_vocabulary("weight", len(weight), len(teacher_weight), None)
            goal = goal_of(hidden, "jsd", beta, temperature, None, None, None, "sum", None, 0.0)
            pair = (student.inputs(goal, temperature), teacher.inputs(goal, temperature))
            loss, _, entropy_N, _, *gradients = loss_and_gradients(*pair, goal, needed, backend)
        entropy = entropy_N.sum()
        ctx.mark_non_differentiable(entropy)
        ctx.save_for_backward(*gradients)
        return loss, entropy

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        first_derivative_only("linear_distillation_loss")
        found = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
        return *(scaled_op(x, grad_loss, dtype) if need else None for x, dtype, need in found), *[None] * 10


def _whole_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Of FSDP2, in the dtype of the hidden states: the shards may be the optimizer's float32."""
    if not checks.is_dtensor(weight):
        return weight, bias
    return weight.full_tensor().to(hidden.dtype), None if bias is None else bias.full_tensor()  # type: ignore[attr-defined]


def _count(given: Tensor | int | None, own: Tensor | int, loss: Tensor) -> Tensor | int:
    count = own if given is None else given
    return count.to(loss.device) if isinstance(count, Tensor) else count


def _from_hidden_states(original: Any) -> Callable[..., Any]:
    if "chunk_size" not in inspect.signature(original).parameters:
        return chunked_divergence_loss

    def with_chunk_size(*given: Any, chunk_size: int | None = None, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
        """As before 1.15. The seventh argument is not used."""
        return chunked_divergence_loss(*given[:6], *given[7:], **named)

    return with_chunk_size


def _from_logits(original: Any) -> Callable[..., Tensor]:
    signature = inspect.signature(original)

    def generalized_jsd_loss(*given: Any, **named: Any) -> Tensor:
        """`distillation_loss` of the tokens whose label is not -100. TRL still computes what this is not: probabilities
        instead of logits, the best K ids alone, one number an id, and a teacher with a gradient.
        """
        call = signature.bind(*given, **named)
        call.apply_defaults()
        if not _is_ours(call.arguments):
            return original(*given, **named)
        student, teacher, labels, beta, temperature, reduction = (call.arguments[name] for name in _LOGITS)
        items = call.arguments.get("num_items_in_batch")
        mask = None if labels is None else labels != -100
        options = {"divergence": "jsd", "beta": beta, "temperature": temperature, "mask": mask}
        loss = distillation_loss(student, teacher, **options, reduction="sum", backend=fast_backend(student)).loss
        if items is None and reduction == "sum":
            return loss
        return loss / _count(items, max(len(student), 1) if mask is None else mask.sum().clamp(min=1), loss)

    return generalized_jsd_loss


def _is_ours(arguments: dict[str, Any]) -> bool:
    is_other = arguments.get("logits_are_probs", False) or arguments.get("top_k", 0) > 0
    is_reduced = arguments.get("num_items_in_batch") is not None or arguments["reduction"] in ("batchmean", "sum")
    return is_reduced and not is_other and not (torch.is_grad_enabled() and arguments["teacher_logits"].requires_grad)


_PAIR = ("student_hidden_states", "teacher_hidden_states", "student_lm_head_weight", "teacher_lm_head_weight")
_GIVEN = (*_PAIR, "completion_mask", "beta")
_OPTIONS = (
    "num_items_in_batch",
    *(f"{model}_lm_head_bias" for model in ("student", "teacher")),
    *(f"{model}_logit_scale" for model in ("student", "teacher")),
    *(f"{model}_final_logit_softcapping" for model in ("student", "teacher")),
    "temperature",
)
_LOGITS = ("student_logits", "teacher_logits", "labels", "beta", "temperature", "reduction")
REPLACEMENTS = [
    Replacement(
        "trl.trainer.distillation_trainer",
        "_chunked_divergence_loss",
        [(*_GIVEN, *_OPTIONS), (*_GIVEN, "chunk_size", *_OPTIONS)],
        _from_hidden_states,
    ),
    *(
        Replacement(
            f"trl.experimental.{folder}.{folder}_trainer",
            f"{trainer}.generalized_jsd_loss",
            [(*_LOGITS, *own, "num_items_in_batch"), (*_LOGITS, *own)],  # without the number: before 1.0
            _from_logits,
        )
        for folder, trainer, own in (
            ("gkd", "GKDTrainer", ()),
            ("gold", "GOLDTrainer", ("logits_are_probs",)),
            ("iw_opd", "IWOPDTrainer", ("top_k", "add_tail")),
        )
    ),
]
