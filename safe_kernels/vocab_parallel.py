"""Statistics of a vocabulary whose consecutive parts lie on the ranks of a process group, in their order.

Every rank has some columns of the logits (rows of the head) and the same tokens, hidden states, masks and temperature.
It computes the statistics of its part as if that were all there is; then each rank gets those of the others, a few
numbers a token, and merges them with the chain rule. A rank r with the maximum m_r and the sum s_r holds the share w_r
of the policy's mass, and v_r of the reference's:

    M = max m_r,   log S = log sum e^l_r,   log w_r = l_r - log S        l_r = log s_r + (m_r - M) / T

    logprob = logprob_r + log w_r  of the rank that has the token        entropy = sum w_r (entropy_r - log w_r)
    kl      = sum w_r (kl_r + log w_r - log v_r)         ref_kl  = sum v_r (ref_kl_r + log v_r - log w_r)

Backwards each rank needs nothing of the others: its kernels get the statistics of the whole, from which the gradient of
its own logits follows. Only the gradient of the hidden states, which all ranks share, is a sum over them.

Sums over ranks are taken in the order of the ranks, with the same bits on each of them and for each row.

Shapes: K ranks, N tokens, H hidden width, S rows of `RowStats`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, distributed

from .dispatch import Backend, register
from .formulas import Objective
from .inputs import ALL_ROWS, LinearInputs, LogitsInputs, RowStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Inputs = TypeVar("Inputs", LogitsInputs, LinearInputs)


def sharded(inputs: Inputs, width: int, group: ProcessGroup) -> tuple[Inputs, str, Tensor]:
    """The inputs with ids counted from this rank's first one, the group's name, and the bounds of all parts."""
    bounds = vocabulary_bounds_op(inputs.tokens_N, width, group.group_name)
    local_N = inputs.tokens_N.long() - bounds[group.rank()]
    return inputs._replace(tokens_N=local_N), group.group_name, bounds


def vocabulary_bounds_fake(like: Tensor, width: int, group: str) -> Tensor:
    return like.new_empty(group_of(group).size() + 1, dtype=torch.int64)


@register(vocabulary_bounds_fake)
def vocabulary_bounds_op(like: Tensor, width: int, group: str) -> Tensor:
    """[K + 1] int64: rank r holds the ids from bounds[r] to bounds[r + 1]."""
    return bounds_of(like, width, group_of(group))


def merged_stats(stats: Tensor, inputs: LogitsInputs | LinearInputs, group: str, bounds: Tensor) -> Tensor:
    """The rows of `RowStats` of the whole vocabulary from those of this rank's part, and of the other ranks'."""
    ranks = group_of(group)
    tokens_N = inputs.tokens_N + bounds[ranks.rank()]
    holders_KN = (tokens_N >= bounds[:-1, None]) & (tokens_N < bounds[1:, None])
    temperature = inputs.temperature if inputs.temperatures_N is None else inputs.temperatures_N
    whole = merged(gathered(stats, ranks), holders_KN, temperature)
    return whole if inputs.mask_N is None else whole.where(inputs.mask_N, 0)


def linear_loss(
    backend: Backend, inputs: LinearInputs, objective: Objective, needed: Sequence[bool], group: str, bounds: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """`Backend.linear_loss` in two sweeps: no slope is known before the other ranks have given their statistics."""
    stats = merged_stats(backend.linear_statistics(inputs), inputs, group, bounds)
    if not any(needed):
        return stats, [None] * len(needed)
    *_, grads = objective.evaluate(RowStats(*stats.unbind()))
    hidden, *head = backend.linear_gradients(inputs, stats, grads, needed)
    return stats, [None if hidden is None else summed(hidden, group_of(group)), *head]


def group_of(name: str) -> ProcessGroup:
    return distributed.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def bounds_of(like: Tensor, width: int, group: ProcessGroup) -> Tensor:
    """The bounds of all parts, on the device of `like`, from the `width` of each; the host does not wait for them."""
    widths_K = gathered(torch.full((1,), width, dtype=torch.int64, device=like.device), group).flatten()
    return torch.nn.functional.pad(widths_K.cumsum(0), (1, 0))


def gathered(x: Tensor, group: ProcessGroup) -> Tensor:
    """x of every rank, [K, ...]; one shape on all of them."""
    x_K = x.new_empty(group.size(), *x.shape)
    if x.numel() > 0:
        # The gather into one tensor has a deprecated name from PyTorch 2.13 on, and the new one not before.
        distributed.all_gather(list(x_K.unbind()), x.contiguous(), group=group)
    return x_K


def summed(x_NH: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over the ranks: each sums some rows of all of them, in their order, and gives them to the others."""
    if x_NH.numel() == 0:
        return x_NH
    count, ranks = len(x_NH), group.size()
    x_NH = torch.nn.functional.pad(x_NH, (0, 0, 0, -count % ranks)).contiguous()
    parts = torch.empty_like(x_NH)
    distributed.all_to_all_single(parts, x_NH, group=group)
    own = _sum(parts.unflatten(0, (ranks, -1)))
    return gathered(own, group).flatten(0, 1)[:count]


def agreed_vocabulary(
    group: ProcessGroup, tokens: Tensor, width: int, mask: Tensor | None, **tensors: Tensor | None
) -> int:
    """The size of the whole vocabulary; ranks that do not give the same of all else raise. Waits for the device."""
    numbers = {"the number of tokens": tokens.numel(), "whether mask is given": int(mask is not None)}
    for name, x in tensors.items():
        numbers[f"the width of {name}"] = 0 if x is None else 1 if name.endswith("logits") else x.shape[-1]
    own = torch.tensor([width, *numbers.values()], device=tokens.device)
    widths, *others = gathered(own, group).T.tolist()
    for name, found in zip(numbers, others, strict=True):
        if len(set(found)) > 1:
            raise ValueError(f"{name} is {found} on the ranks of process_group; all must have the same tokens")
    for name, x in (("tokens", tokens.long()), ("mask", mask)):
        if x is not None:
            x_KN = gathered(x.flatten(), group)
            if not torch.equal(x_KN, x_KN[:1].expand_as(x_KN)):
                raise ValueError(f"{name} differs between the ranks of process_group; all must have the same tokens")
    return sum(widths)


def merged(stats_KSN: Tensor, holders_KN: Tensor, temperature: float | Tensor) -> Tensor:
    """Statistics [S, N] of the whole vocabulary from those of its parts, in the order of `RowStats`.

    A part without mass adds nothing, one with a NaN makes its row NaN.
    """
    if isinstance(temperature, Tensor):
        temperature = temperature.to(stats_KSN.dtype)
    logprob, entropy, peak, log_total = stats_KSN[:, :4].unbind(1)
    whole_peak, whole_log_total, log_share = _masses(peak, log_total, temperature)
    share = log_share.exp()
    policy = (
        _at_token(logprob, log_total, log_share, holders_KN),
        _mean(share, entropy - log_share),
        whole_peak,
        whole_log_total,
    )
    if stats_KSN.shape[1] == 4:
        return torch.stack(policy)

    ref_logprob, kl, ref_peak, ref_log_total = stats_KSN[:, 4:8].unbind(1)
    ref_whole_peak, ref_whole_log_total, ref_log_share = _masses(ref_peak, ref_log_total, temperature)
    is_number = ~(whole_log_total + ref_whole_log_total).isnan()
    one, other = (log_share, log_total), (ref_log_share, ref_log_total)
    reference = (
        _at_token(ref_logprob, ref_log_total, ref_log_share, holders_KN),
        _divergence(kl, *one, *other, is_number),
        ref_whole_peak,
        ref_whole_log_total,
    )
    if stats_KSN.shape[1] < ALL_ROWS:
        return torch.stack(policy + reference)
    return torch.stack((*policy, *reference, _divergence(stats_KSN[:, 8], *other, *one, is_number)))


def _divergence(
    kl_KN: Tensor,
    log_share_KN: Tensor,
    log_total_KN: Tensor,
    other_log_share_KN: Tensor,
    other_log_total_KN: Tensor,
    is_number_N: Tensor,
) -> Tensor:
    """KL of the whole from that of the parts, in which the other distribution may have no mass."""
    outside_KN = (kl_KN == math.inf) | ((other_log_total_KN == -math.inf) & (log_total_KN > -math.inf))
    kl_N = _mean(log_share_KN.exp(), kl_KN + log_share_KN - other_log_share_KN)
    return kl_N.masked_fill(outside_KN.any(0) & is_number_N, math.inf)


def _masses(peak_KN: Tensor, log_total_KN: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(M, log S, log of each part's share). M and log S stay apart: in their sum a large offset would cost digits."""
    peak_N = peak_KN.amax(0)
    log_mass_KN = log_total_KN + (peak_KN - peak_N) / temperature
    top_N = log_mass_KN.amax(0)
    log_total_N = top_N + _sum((log_mass_KN - top_N).exp()).log()
    return peak_N, log_total_N, log_mass_KN - log_total_N


def _at_token(logprob_KN: Tensor, log_total_KN: Tensor, log_share_KN: Tensor, holders_KN: Tensor) -> Tensor:
    """The log-prob of a token: -inf in a part without mass, NaN where no part holds it."""
    logprob_KN = logprob_KN.masked_fill(log_total_KN == -math.inf, 0) + log_share_KN
    return _sum(logprob_KN.where(holders_KN, 0)).masked_fill(~holders_KN.any(0), math.nan)


def _mean(share_KN: Tensor, x_KN: Tensor) -> Tensor:
    return _sum((share_KN * x_KN).masked_fill(share_KN == 0, 0))


def _sum(x_K: Tensor) -> Tensor:
    return functools.reduce(torch.add, x_K.unbind())
