"""Which backend computes a call, and how a typed function becomes an op that autograd and torch.compile know."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import torch_backend
from .formulas import DistillationObjective, Objective
from .inputs import Divergence, DivergenceGrad, LinearInputs, LogitsInputs, ScanInputs, StatsGrad, TermsInputs

BACKENDS = ("reference", "torch", "triton")
GPUS = ("cuda", "xpu")  # where Triton is the best, if it is installed
HAS_TRITON = importlib.util.find_spec("triton") is not None
LIBRARY = torch.library.Library(__name__.rpartition(".")[0].replace(".", "_"), "DEF")  # its own in each copy


class Backend(Protocol):
    """What `torch_backend` and `triton_backend` have. `stats` has the rows of `RowStats`.

    A row whose log-prob is NaN has a NaN gradient: so a gradient knows an id outside the vocabulary. Of a part of the
    vocabulary a backend computes the statistics of the part, and is given those of the whole for the gradient.
    """

    def logits_statistics(self, inputs: LogitsInputs) -> Tensor: ...

    def logits_gradient(self, inputs: LogitsInputs, stats: Tensor, grads: StatsGrad, out: Tensor) -> None:
        """d loss / d logits, written to `out`, which may be the logits."""

    def kept_rows(self, inputs: LinearInputs, max_bytes: int | None) -> int:
        """How many rows of logits, those of the first tokens, `max_bytes` hold: a reference's as well. None is as many
        as cost nothing.
        """

    def linear_statistics(self, inputs: LinearInputs, logits: Tensor | None = None) -> Tensor:
        """It leaves in `logits` [1 or 2, K, V] those of the first K tokens, and of their reference."""

    def linear_gradients(
        self,
        inputs: LinearInputs,
        stats: Tensor,
        grads: StatsGrad,
        needed: Sequence[bool],
        logits: Tensor | None = None,
    ) -> list[Tensor | None]:
        """Of (hidden, weight, bias), in the compute dtype; None where not needed. `logits` are those that
        `linear_statistics` left; they may be written over.
        """

    def linear_loss(
        self, inputs: LinearInputs, objective: Objective, needed: Sequence[bool]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Statistics, and gradients of the loss, while the logits of a row are there."""

    def matrix_product(self, x: Tensor, y: Tensor, out: Tensor) -> None:
        """out = x @ y, summed in the dtype of `out`, which may also be that of x alone."""

    def logits_divergence(self, student: LogitsInputs, teacher: LogitsInputs, divergence: Divergence) -> Tensor:
        """The rows of `DivergenceStats`. The teacher has a temperature of its own; the rest is the student's."""

    def logits_divergence_gradient(
        self,
        student: LogitsInputs,
        teacher: LogitsInputs,
        divergence: Divergence,
        stats: Tensor,
        grads: DivergenceGrad,
        out: Tensor,
    ) -> None:
        """d loss / d logits, written to `out`."""

    def linear_divergence(
        self,
        student: LinearInputs,
        teacher: LinearInputs,
        divergence: Divergence,
        objective: DistillationObjective,
        needed: Sequence[bool],
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The rows of `DivergenceStats`, and gradients of the loss, while the logits of a row are there."""

    def value_terms(self, kl_N: Tensor, inputs: TermsInputs) -> Tensor:
        """(kl_penalty, value, value_target) [3, N]."""

    def soft_min_gae(self, inputs: ScanInputs) -> tuple[Tensor, Tensor, Tensor]:
        """(value, advantage, returns)."""


@functools.cache
def backend_of(name: str) -> Backend:
    if name == "triton":
        from . import triton_backend  # Triton may be absent, and reads TRITON_INTERPRET when it is imported

        return triton_backend
    return torch_backend


def choose_backend(
    name: str | None, like: Tensor, *others: object, group: object = None, has_gradient: bool | None = True
) -> str:
    """The one asked for, or the best for these arguments; a way to differentiate that it does not have is refused.

    `has_gradient`: False for constants, None for plain PyTorch, which has every derivative.
    """
    is_wide = any(isinstance(x, Tensor) and x.dtype == torch.float64 and x.dim() > 0 for x in (like, *others))
    asked = name or os.environ.get("SAFE_KERNELS_BACKEND")
    is_on_gpu = HAS_TRITON and like.device.type in GPUS
    chosen = asked or ("triton" if is_on_gpu and not is_wide else "torch")
    if chosen not in BACKENDS:
        origin = "backend" if name else "the environment variable SAFE_KERNELS_BACKEND"
        raise ValueError(f"{origin} is {chosen!r}; it must be one of {', '.join(map(repr, BACKENDS))}")
    if chosen == "triton" and like.device.type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        raise ValueError(
            "backend 'triton' needs tensors on a GPU, got CPU tensors; use backend 'torch', or set TRITON_INTERPRET=1 "
            "before Triton is imported to run the kernels in its interpreter"
        )
    if chosen == "triton" and is_wide:
        raise ValueError("backend 'triton' computes in float32; float64 inputs need backend 'torch' or 'reference'")
    is_transformed = torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()
    if forward_ad._current_level >= 0 or is_transformed:  # compiled, a gradient by torch.func fails in PyTorch
        if has_gradient is not None and (chosen != "reference" or group is not None):
            refuse_transforms(chosen, (like, *others), has_gradient)
    return chosen


def exact(like: Tensor) -> torch.autocast:
    """Without autocast, which would round logits on their way to the exponent."""
    return torch.autocast(like.device.type, enabled=False)


def refuse_transforms(backend: str, arguments: Sequence[object], has_gradient: bool) -> None:
    """Refuse the ways to differentiate that an op does not have: in forward mode its derivative would be 0.

    vmap alone is PyTorch's loop over the samples. `has_gradient`: else the results are constants for a gradient.
    """
    tensors = (x for x in arguments if isinstance(x, Tensor) and x.is_floating_point())
    ways: set[str] = set().union(*map(transforms_of, tensors))
    if "forward" in ways:
        raise NotImplementedError(
            f"backend {backend!r} has no forward-mode derivative (torch.func.jvp, jacfwd, torch.autograd.forward_ad); "
            "differentiate by backward, or use backend='reference' without process_group"
        )
    if has_gradient and "reverse" in ways and torch.is_grad_enabled():
        raise NotImplementedError(
            f"backend {backend!r} has no derivative by torch.func (grad, vjp, jacrev, per-sample gradients); "
            "differentiate by backward or torch.autograd.grad, or use backend='reference' without process_group"
        )


def transforms_of(x: Tensor) -> set[str]:
    """How torch.func and forward mode differentiate by x; each transform around the call has wrapped it once more."""
    functorch, ways = torch._C._functorch, set()
    stack = functorch.get_interpreter_stack() or []
    forward = [transform.level() for transform in stack if transform.key() == functorch.TransformType.Jvp]
    while functorch.is_functorch_wrapped_tensor(x):
        level = functorch.maybe_get_level(x)
        if level in forward:  # what is not the innermost transform does not tell its tangents here
            if level != stack[-1].level() or forward_ad.unpack_dual(x).tangent is not None:
                ways.add("forward")
        elif functorch.is_gradtrackingtensor(x) and x.requires_grad:
            ways.add("reverse")
        x = functorch.get_unwrapped(x)
    with torch._C._DisableFuncTorch():  # a transform around the call would hide the tangent of a level outside of it
        return ways | {"forward"} if forward_ad.unpack_dual(x).tangent is not None else ways


def register(fake: Callable[..., Any], *, mutates: str = "") -> Callable[[Callable[..., Any]], Any]:
    """Make an op of a typed function: it runs on its tensors' device, and autocast is off.

    `name_op` becomes `safe_kernels::name`. `fake` says what it returns for tensors without memory; `mutates` names the
    first argument where the op writes over it.
    """

    def decorate(body: Callable[..., Any]) -> Any:
        def run(*arguments: Any) -> Any:
            device = arguments[0].device
            if torch.is_autocast_enabled(device.type):
                with exact(arguments[0]):
                    return run(*arguments)
            with torch.accelerator.device_index(device.index):
                return body(*arguments)

        name = body.__name__.removesuffix("_op")
        schema = torch.library.infer_schema(body, mutates_args=(mutates,) if mutates else ())
        LIBRARY.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        op = getattr(getattr(torch.ops, LIBRARY.ns), name).default
        torch.library.register_fake(op.name(), fake, lib=LIBRARY)
        if mutates:
            LIBRARY.impl(name, tell_autograd_of_the_write(op), "ADInplaceOrView", with_keyset=True)
        return op

    return decorate


def tell_autograd_of_the_write(op: Any) -> Callable[..., Any]:
    def run(keyset: Any, *arguments: Any) -> Any:
        torch.autograd.graph.increment_version(arguments[0])
        return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *arguments)

    return run


def differentiable(op: Any, leaves: int, save: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Give an op its backward: what `torch.library.register_autograd` does, without its time quadratic in the number
    of arguments. Only the first `leaves` arguments may want a gradient; `save(ctx, arguments, found)` keeps what
    `backward(ctx, *grads)` needs, which returns the gradients of the leaves.
    """

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, others: tuple[Any, ...], *wanted: Any) -> Any:  # of fewer arguments autograd asks less
            keyset, *constants = others
            arguments = (*wanted, *constants)
            found = below(keyset, arguments)
            ctx.set_materialize_grads(False)
            save(ctx, arguments, found)
            return found

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            return None, *backward(ctx, *grads)

    def below(keyset: Any, arguments: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    def run(keyset: Any, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments[:leaves]):
            return Differentiable.apply((keyset, *arguments[leaves:]), *arguments[:leaves])
        return below(keyset, arguments)

    LIBRARY.impl(op.name().partition("::")[2], run, "Autograd", with_keyset=True)


def without_second_derivative(op: Any, leaves: int) -> None:
    """Refuse it in the words of ours; without, PyTorch names an op that no caller knows."""
    name = op.name().removesuffix("_backward").replace("::", ".")

    def backward(ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(f"{name} has no second derivative: use backend='reference'")

    differentiable(op, leaves, lambda *_: None, backward)


def first_derivative_only(what: str) -> None:
    """With create_graph=True, a gradient that nothing connects to the inputs would pass for a constant."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{what} has no second derivative: take its gradient without create_graph=True")


def keep(ctx: Any, arguments: tuple[Any, ...], *found: Tensor) -> None:
    """Keep tensors where autograd watches their versions, the other arguments beside them.

    Those of torch.inference_mode, as a reference's may be, have no versions.
    """
    ctx.places = [i for i, x in enumerate(arguments) if isinstance(x, Tensor) and not x.is_inference()]
    ctx.constants = [*arguments]
    for i in ctx.places:
        ctx.constants[i] = None
    ctx.save_for_backward(*[arguments[i] for i in ctx.places], *found)


def kept(ctx: Any) -> list[Any]:
    """The arguments and what was found, as `keep` was given them."""
    tensors, arguments = ctx.saved_tensors, [*ctx.constants]
    for i, x in zip(ctx.places, tensors, strict=False):
        arguments[i] = x
    return [*arguments, *tensors[len(ctx.places) :]]
