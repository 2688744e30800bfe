"""Per-token statistics of a language-model policy and pessimistic value targets, forward and backward.

Shapes: `...` is any leading shape, V the vocabulary, H the hidden width. Statistics are in nats, float32 (float64 where
logits or hidden states are), with the leading shape. A token that `mask` (torch.bool, True where a token counts) leaves
out has results of exactly 0 and gradients of exactly 0. NaNs in masked rows do not propagate.

Every function takes `backend`: "triton", "torch", "reference", or None, which is the environment variable
SAFE_KERNELS_BACKEND or else Triton on GPUs, and PyTorch elsewhere and for float64. Wrong arguments raise ValueError or
TypeError at the call. SAFE_KERNELS_DEBUG=1 also checks what needs a synchronisation with the device: ids, NaN, the
values of tensors; and what needs an exchange between ranks: that they agree.

With `process_group` its ranks share the vocabulary, as tensor-parallel ranks do. Tensors with an axis V are sharded:
each rank passes its own slice, of at least one id, in the order of the ranks; slices need not be equal. Everything else
(hidden states, tokens as ids of the whole vocabulary, masks, temperature) must be identical on all ranks. An FSDP group
does not qualify: its ranks hold different tokens. Every rank gets the results of the whole vocabulary, with the same
bits, and must compute the same loss from them, as incoming gradients are taken to be the same on all ranks; none may
leave out a call or a backward. The gradient of a slice stays with its rank, that of the hidden states is complete on
each. The ranks exchange the sizes of the slices, 4 numbers a token, 8 with a reference, and the hidden gradient in
float32; never logits, except in the reference backend, which gathers them. A DTensor that is sharded along V over the
group stands for its slice, and its gradient is such a DTensor. Distillation losses refuse a group of several ranks.
"""

from .distillation import distillation_loss
from .inputs import KeptIds
from .linear import linear_token_stats
from .linear_distillation import linear_distillation_loss
from .logits import token_stats
from .policy_loss import linear_policy_loss
from .results import DistillationLoss, PolicyLoss, SafeTerms, TokenStats, ValueTargets
from .safe_terms import linear_safe_terms, safe_terms
from .truncated import truncated_divergence
from .values import soft_min, soft_min_gae

__all__ = [
    "DistillationLoss",
    "KeptIds",
    "PolicyLoss",
    "SafeTerms",
    "TokenStats",
    "ValueTargets",
    "distillation_loss",
    "linear_distillation_loss",
    "linear_policy_loss",
    "linear_safe_terms",
    "linear_token_stats",
    "safe_terms",
    "soft_min",
    "soft_min_gae",
    "token_stats",
    "truncated_divergence",
]
