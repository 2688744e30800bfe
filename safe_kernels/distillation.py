"""`distillation_loss`: a divergence of a student's logits from a teacher's. The public function, its op and gradient.

Shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import checks, reference
from .dispatch import (
    backend_of,
    choose_backend,
    differentiable,
    exact,
    keep,
    kept,
    register,
    without_second_derivative,
)
from .formulas import DistillationObjective
from .inputs import (
    DIVERGENCES,
    Divergence,
    DivergenceGrad,
    DivergenceStats,
    LogitsInputs,
    compute_dtype,
    without_masked,
)
from .logits import flat_inputs
from .results import DistillationLoss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ROWS = len(DivergenceStats._fields)


def distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    tokens: Tensor | None = None,
    cross_entropy_coef: float = 0.0,
    shared_vocabulary: int | None = None,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> DistillationLoss:
    """The divergence of a student from a frozen teacher over the whole vocabulary, from logits. Equivalent to

        p, q = softmax(logits / temperature), softmax(teacher_logits / teacher_temperature)
        d = {
            "reverse_kl": (p * (p / q).log()).sum(-1),
            "forward_kl": (q * (q / p).log()).sum(-1),
            "jsd": beta * (q * (q / m).log()).sum(-1) + (1 - beta) * (p * (p / m).log()).sum(-1),
            "tv": (p - q).abs().sum(-1) / 2,
        }[divergence]                                        where m = beta * q + (1 - beta) * p
        l = weights * (d - cross_entropy_coef * log(p).gather(-1, tokens[..., None])[..., 0])
        loss = {"none": l, "sum": l.sum(), "mean": l.sum() / number of live tokens}[reduction]

    Args:
        logits, teacher_logits: [..., V], any floating dtype and strides. The teacher never receives a gradient.
        divergence: see docs/divergences.md for which one when. A probability of 0 adds 0; where only the teacher's is
            0, reverse_kl is inf and its gradient NaN; where only the student's is, forward_kl is inf and its gradient
            finite. jsd and tv have no such cases.
        beta: of jsd, in [0, 1], by TRL's convention: 0 is forward_kl, 1 is reverse_kl, and 0.5 the symmetric one. In
            between jsd is at most the entropy of (beta, 1 - beta), and vanishes as beta tends to 0 or 1: divided by
            beta (by 1 - beta) it tends to the forward (reverse) KL.
        temperature, teacher_temperature: > 0, numbers or [...]; the teacher's is the student's unless given. No factor
            temperature**2 is applied.
        weights: [...], >= 0, without gradient. A weight of 0 is not a mask: where a divergence is inf, it gives NaN.
        mask: [...] bool. Live tokens are counted, not their weights, so that losses of several teachers add up.
        tokens: [...] of any integer dtype, for `logprob` and the cross entropy. An id outside 0..V-1 that is not masked
            has a NaN log-prob.
        cross_entropy_coef: a number; other than 0 it needs `tokens`.
        shared_vocabulary: how many ids, the first ones, both models share; the probabilities are those among them.
            Without it vocabularies of two sizes are refused.
        process_group: of one rank, or None. More are refused: every rank needs the logits of the whole vocabulary.

    Returns:
        DistillationLoss; only `loss` carries a gradient, to the logits.
    """
    logits, teacher_logits, group = checks.local_parts(process_group, -1, logits=logits, teacher_logits=teacher_logits)
    require_one_rank(group)
    checks.require_floating("logits", logits)
    checks.require_floating("teacher_logits", teacher_logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; it must be (..., V) with V >= 1")
    require_vocabulary("logits", logits.shape[-1], teacher_logits.shape[-1:].numel(), shared_vocabulary)
    shape, why = (*logits.shape[:-1], *teacher_logits.shape[-1:]), "with the leading shape of logits"
    checks.require_place("teacher_logits", teacher_logits, shape, why, logits.device)
    if shared_vocabulary is not None:
        logits, teacher_logits = logits[..., :shared_vocabulary], teacher_logits[..., :shared_vocabulary]
    teacher_logits = teacher_logits.detach()
    goal = goal_of(
        logits, divergence, beta, temperature, teacher_temperature, weights, mask, reduction, tokens, cross_entropy_coef
    )
    if checks.debugging():
        require_clean(goal, logits.shape[-1], logits=logits, teacher_logits=teacher_logits)
    given = (logits, teacher_logits, goal.temperature, goal.teacher_temperature, goal.weights)
    backend = choose_backend(backend, *given)
    if backend == "reference":
        with exact(logits):
            return reference.distillation_loss(logits, teacher_logits, **goal.options(tokens))
    student = flat_inputs(logits, goal.tokens, None, goal.temperature, mask)
    teacher = flat_inputs(teacher_logits, goal.tokens, None, goal.teacher_temperature, mask)
    found = divergence_op(
        *(logits, teacher_logits, student.tokens_N, student.temperature, student.temperatures_N),
        *(teacher.temperature, teacher.temperatures_N, student.mask_N, *goal.divergence, backend),
    )
    loss_N = goal.objective(compute_dtype(logits)).evaluate(found[0], found[2])
    loss = loss_N.view_as(goal.tokens) if reduction == "none" else loss_N.sum()
    divergence_N, entropy_N, logprob_N = (x.detach() for x in found[:3])
    return goal.results(loss, divergence_N, entropy_N, logprob_N, with_tokens=tokens is not None)


class Goal(NamedTuple):
    """What is asked for beside the two models, checked."""

    divergence: Divergence
    tokens: Tensor  # zeros where none are given
    temperature: float | Tensor
    teacher_temperature: float | Tensor
    weights: Tensor | None
    mask: Tensor | None
    reduction: str
    cross_entropy_coef: float

    def options(self, tokens: Tensor | None) -> dict[str, Any]:
        """Those of the reference."""
        name, beta = self.divergence
        return self._asdict() | {"divergence": name, "beta": beta, "tokens": tokens}

    def objective(self, dtype: torch.dtype) -> DistillationObjective:
        """With the reduction in the weights, constants in the compute dtype."""
        mask = None if self.mask is None else self.mask.reshape(-1)
        ones = torch.ones_like(self.tokens, dtype=dtype).reshape(-1)
        weights = ones if self.weights is None else self.weights.detach().reshape(-1).to(dtype)
        weights = without_masked(weights, mask)
        if self.reduction == "mean":
            weights = weights / without_masked(ones, mask).sum().clamp(min=1)
        return DistillationObjective(weights, self.cross_entropy_coef)

    def results(
        self, loss: Tensor, divergence_N: Tensor, entropy_N: Tensor, logprob_N: Tensor, with_tokens: bool
    ) -> DistillationLoss:
        divergence, entropy, logprob = (x.view_as(self.tokens) for x in (divergence_N, entropy_N, logprob_N))
        return DistillationLoss(loss, divergence, entropy, logprob if with_tokens else None)


def goal_of(
    like: Tensor,
    divergence: str,
    beta: float,
    temperature: float | Tensor,
    teacher_temperature: float | Tensor | None,
    weights: Tensor | None,
    mask: Tensor | None,
    reduction: str,
    tokens: Tensor | None,
    cross_entropy_coef: float,
) -> Goal:
    """For `like` [..., V] or [..., H]."""
    checks.require_one_of("divergence", divergence, DIVERGENCES)
    checks.require_one_of("reduction", reduction, ("mean", "sum", "none"))
    beta = checks.require_number("beta", beta, 0, 1)
    if divergence == "jsd" and beta in (0, 1):
        divergence = "reverse_kl" if beta else "forward_kl"
    cross_entropy_coef = checks.require_number("cross_entropy_coef", cross_entropy_coef)
    if tokens is None and cross_entropy_coef != 0:
        raise ValueError(f"cross_entropy_coef is {cross_entropy_coef} without tokens; it must be 0, or tokens given")
    if tokens is None:
        tokens = torch.zeros(like.shape[:-1], dtype=torch.long, device=like.device)
    checks.require_tokens(tokens, like.shape[:-1], like.device, "the student")
    if mask is not None:
        checks.require_mask(mask, tokens)
    if weights is not None:
        weights = checks.require_per_token("weights", weights, like, tokens).detach()
    temperature = checks.require_temperature("temperature", temperature, tokens, mask, like)
    if teacher_temperature is None:
        teacher_temperature = temperature
    else:
        teacher_temperature = checks.require_temperature("teacher_temperature", teacher_temperature, tokens, mask, like)
    return Goal(
        *(Divergence(divergence, beta), tokens, temperature, teacher_temperature),
        *(weights, mask, reduction, cross_entropy_coef),
    )


def require_one_rank(group: ProcessGroup | None) -> None:
    if group is not None:
        raise ValueError(
            f"process_group has {group.size()} ranks; a distillation loss needs the whole vocabulary on each: gather "
            "the heads or logits and leave process_group out. The KLs of a sharded vocabulary are `kl` and `ref_kl` of "
            "linear_token_stats, or of token_stats, with process_group"
        )


def require_vocabulary(name: str, own: int, teachers: int, shared: int | None) -> None:
    if shared is None and own != teachers:
        raise ValueError(
            f"teacher_{name} has a vocabulary of {teachers} and {name} one of {own}; they must be the same ids. If the "
            f"first ids are, and the rest is padding, say how many: shared_vocabulary=..., at most {min(own, teachers)}"
        )
    if shared is not None and (not isinstance(shared, int) or not 1 <= shared <= min(own, teachers)):
        raise ValueError(f"shared_vocabulary is {shared}; it must be an integer in [1, {min(own, teachers)}]")


def require_clean(goal: Goal, vocabulary: int, **tensors: Tensor) -> None:
    checks.require_clean_values(goal.tokens, vocabulary, goal.mask, **tensors)
    if goal.weights is not None:
        live = goal.weights if goal.mask is None else goal.weights[goal.mask]
        if not bool((live >= 0).all()):
            raise ValueError(f"weights has a minimum of {live.min().item()}; it must be >= 0 for every live token")


def divergence_fake(logits: Tensor, teacher_logits: Tensor, tokens_N: Tensor, *_: Any) -> tuple[Tensor, ...]:
    stats = logits.new_empty(ROWS, tokens_N.shape[0], dtype=compute_dtype(logits))
    return *(torch.empty_like(stats[0]) for _ in range(3)), stats


@register(divergence_fake)
def divergence_op(
    logits: Tensor,
    teacher_logits: Tensor,
    tokens_N: Tensor,
    temperature: float,
    temperatures_N: Tensor | None,
    teacher_temperature: float,
    teacher_temperatures_N: Tensor | None,
    mask_N: Tensor | None,
    divergence: str,
    beta: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(divergence, entropy, logprob) [N], and the rows of `DivergenceStats`."""
    student = LogitsInputs(logits, None, tokens_N, temperature, temperatures_N, mask_N, ROWS)
    teacher = LogitsInputs(teacher_logits, None, tokens_N, teacher_temperature, teacher_temperatures_N, mask_N, ROWS)
    stats = backend_of(backend).logits_divergence(student, teacher, Divergence(divergence, beta))
    return stats[0].clone(), stats[1].clone(), stats[2].clone(), stats


def save_divergence(ctx: Any, arguments: tuple[Any, ...], found: tuple[Tensor, ...]) -> None:
    _, entropy, _, stats = found
    ctx.mark_non_differentiable(entropy, stats)
    keep(ctx, arguments, stats)


def divergence_gradient(
    ctx: Any, grad_divergence: Tensor | None, _: None, grad_logprob: Tensor | None, *rest: None
) -> tuple[Tensor | None]:
    if grad_divergence is None and grad_logprob is None:
        return (None,)
    *arguments, stats = kept(ctx)
    return (divergence_backward_op(*arguments[:10], stats, grad_divergence, grad_logprob, arguments[10]),)


def divergence_backward_fake(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@register(divergence_backward_fake)
def divergence_backward_op(
    logits: Tensor,
    teacher_logits: Tensor,
    tokens_N: Tensor,
    temperature: float,
    temperatures_N: Tensor | None,
    teacher_temperature: float,
    teacher_temperatures_N: Tensor | None,
    mask_N: Tensor | None,
    divergence: str,
    beta: float,
    stats: Tensor,
    grad_divergence: Tensor | None,
    grad_logprob: Tensor | None,
    backend: str,
) -> Tensor:
    """d loss / d logits."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    student = LogitsInputs(logits, None, tokens_N, temperature, temperatures_N, mask_N, ROWS)
    teacher = LogitsInputs(teacher_logits, None, tokens_N, teacher_temperature, teacher_temperatures_N, mask_N, ROWS)
    grads = DivergenceGrad(grad_divergence, grad_logprob)
    backend_of(backend).logits_divergence_gradient(student, teacher, Divergence(divergence, beta), stats, grads, out)
    return out


differentiable(divergence_op, 1, save_divergence, divergence_gradient)
without_second_derivative(divergence_backward_op, 11)
