"""Ways to differentiate that the ops of the fast backends do not have, told from a call's arguments."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad


def refuse_transforms(backend: str, arguments: Iterable[object], *, has_gradient: bool) -> None:
    """Refuse the ways to differentiate that an op does not have: in forward mode its derivative would be 0.

    vmap alone is PyTorch's loop over the samples. `has_gradient`: else the results are constants for a gradient.
    """
    is_transformed = torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling()
    if forward_ad._current_level < 0 and not is_transformed:  # compiled, a gradient by torch.func fails in PyTorch
        return
    tensors = (x for x in arguments if isinstance(x, Tensor) and x.is_floating_point())
    ways: set[str] = set().union(*map(_transforms, tensors))
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


def _transforms(x: Tensor) -> set[str]:
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
