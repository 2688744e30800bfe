"""The arguments of the `linear_*` functions, flattened: what every backend with kernels of its own starts from.

Shapes: N tokens, V vocabulary, H hidden width.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class LiveTokens(NamedTuple):
    """Flattens what has the leading shape, and gives results that shape back.

    On a CPU masked tokens are left out, which costs no synchronisation there; elsewhere `mask` says whose rows to zero.
    """

    shape: torch.Size
    kept: Tensor | None  # indices of the tokens that stay, or None for all
    mask: Tensor | None

    @classmethod
    def of(cls, shape: torch.Size, mask: Tensor | None) -> "LiveTokens":
        if mask is None:
            return cls(shape, None, None)
        mask = mask.reshape(-1)
        return cls(shape, mask.nonzero().squeeze(1), None) if mask.device.type == "cpu" else cls(shape, None, mask)

    def gather(self, x: Tensor) -> Tensor:
        x = x.reshape(self.shape.numel(), *x.shape[len(self.shape) :])
        return x if self.kept is None else x.index_select(0, self.kept)

    def zeroed(self, x: Tensor) -> Tensor:
        """0 where masked, as far as the masked tokens are still there."""
        return x if self.mask is None else x.where(self.mask, 0)

    def scatter(self, x: Tensor) -> Tensor:
        if self.kept is not None:
            x = x.new_zeros(self.shape.numel()).index_copy(0, self.kept, x)
        return x.view(self.shape)


class LinearInputs(NamedTuple):
    """The flattened arguments of a `linear_*` function, in the order of its autograd.Function."""

    hidden_NH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    ref_hidden_NH: Tensor | None
    ref_weight_VH: Tensor | None  # None: the reference shares the policy's head
    ref_bias_V: Tensor | None
    tokens_N: Tensor
    temperature: float | Tensor
    mask_N: Tensor | None
    softcap: float | None
    logit_scale: float
    batch_invariant: bool

    @classmethod
    def of(
        cls,
        live: LiveTokens,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        *,
        bias: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        temperature: float | Tensor = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        batch_invariant: bool = False,
    ) -> "LinearInputs":
        return cls(
            live.gather(hidden),
            weight,
            bias,
            None if ref_hidden is None else live.gather(ref_hidden.detach()),
            None if ref_weight is None else ref_weight.detach(),
            None if ref_bias is None else ref_bias.detach(),
            live.gather(tokens),
            live.gather(temperature) if isinstance(temperature, Tensor) else temperature,
            live.mask,
            softcap,
            logit_scale,
            batch_invariant,
        )
