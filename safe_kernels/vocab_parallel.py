"""Statistics of a vocabulary whose consecutive parts lie on the ranks of a process group, in their order.

Every rank has some columns of the logits (rows of the head) and the same tokens, hidden states, masks and temperature.
It computes the statistics of its part as if that were all there is; then each rank gets those of the others, a few
numbers a token, and merges them with the chain rule. A rank r with the maximum m_r and the sum s_r holds the share w_r
of the policy's mass, and v_r of the reference's:

    M = max m_r,   log S = log sum e^l_r,   log w_r = l_r - log S        l_r = log s_r + (m_r - M) / T

    logprob = logprob_r + log w_r  of the rank that has the token        entropy = sum w_r (entropy_r - log w_r)
    kl      = sum w_r (kl_r + log w_r - log v_r)

Backwards each rank needs nothing of the others: its kernels get the statistics of the whole, from which the gradient of
its own logits follows. Only the gradient of the hidden states, which all ranks share, is a sum over them.

Sums over ranks are taken in the order of the ranks, with the same bits on each of them and for each row.

Shapes: K ranks, N tokens, H hidden width, S = 4 statistics of a token, 8 with a reference.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, distributed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Shard(NamedTuple):
    """Which part of the vocabulary this rank holds."""

    group: str  # its name
    rank: int
    bounds: Tensor  # [K + 1] int64: rank r holds the ids from bounds[r] to bounds[r + 1]

    def local(self, tokens_N: Tensor) -> Tensor:
        """Ids within the part; those of other ranks fall outside of it."""
        return tokens_N.long() - self.bounds[self.rank]

    def holders(self, local_N: Tensor) -> Tensor:
        """bool [K, N]: whether rank k holds the token; nobody does if its id is outside the whole vocabulary."""
        tokens_N = local_N + self.bounds[self.rank]
        return (tokens_N >= self.bounds[:-1, None]) & (tokens_N < self.bounds[1:, None])


def group_of(name: str) -> ProcessGroup:
    return distributed.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def bounds_of(like: Tensor, width: int, group: ProcessGroup) -> Tensor:
    """`Shard.bounds`, on the device of `like`, from the `width` of every rank's part; the host does not wait for it."""
    widths_K = gathered(torch.full((1,), width, dtype=torch.int64, device=like.device), group).flatten()
    return torch.nn.functional.pad(widths_K.cumsum(0), (1, 0))


def gathered(x: Tensor, group: ProcessGroup) -> Tensor:
    """x of every rank, [K, ...]; one shape on all of them."""
    x_K = x.new_empty(group.size(), *x.shape)
    if x.numel() > 0:
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


def whole_statistics(
    local: Tensor, shard: Shard, tokens_N: Tensor, temperature: float | Tensor, mask_N: Tensor | None, logs: bool
) -> Tensor:
    """`stats` [S, N] of the whole vocabulary from a backend's of this rank's part, by local ids.

    `logs`: whether the backend keeps totals as their logarithms.
    """
    stats_KSN = gathered(local if logs else log_totals(local), group_of(shard.group))
    stats = merged(stats_KSN, shard.holders(tokens_N), temperature)
    if mask_N is not None:
        stats = stats.where(mask_N, 0)
    if not logs:
        stats.unflatten(0, (-1, 4))[:, 3].exp_()
    return stats


def log_totals(stats: Tensor) -> Tensor:
    """The same with the logarithms of the totals: -inf for a row of -inf alone, whose total may be NaN."""
    stats = stats.clone()
    peak, total = stats.unflatten(0, (-1, 4))[:, 2:].unbind(1)
    total.log_().masked_fill_(peak == -math.inf, -math.inf)
    return stats


def merged(stats_KSN: Tensor, holders_KN: Tensor, temperature: float | Tensor) -> Tensor:
    """Statistics [S, N] of the whole vocabulary from those of its parts: (logprob, entropy, peak, log total) and,
    with a reference, (ref_logprob, kl, ref_peak, ref log total).

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

    ref_logprob, kl, ref_peak, ref_log_total = stats_KSN[:, 4:].unbind(1)
    ref_whole_peak, ref_whole_log_total, ref_log_share = _masses(ref_peak, ref_log_total, temperature)
    outside = (kl == math.inf) | ((ref_log_total == -math.inf) & (log_total > -math.inf))
    is_infinite = outside.any(0) & ~(whole_log_total + ref_whole_log_total).isnan()
    reference = (
        _at_token(ref_logprob, ref_log_total, ref_log_share, holders_KN),
        _mean(share, kl + log_share - ref_log_share).masked_fill(is_infinite, math.inf),
        ref_whole_peak,
        ref_whole_log_total,
    )
    return torch.stack(policy + reference)


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
