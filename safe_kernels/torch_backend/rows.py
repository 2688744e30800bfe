"""Statistics of full rows of logits, and their gradient: each written once, for logits and for hidden states.

A tile holds R full rows in the compute dtype (float32, or float64 for float64 inputs), few enough for the cache:

    load             x = a, the logits after scale, bias and softcap;  y = a_ref, the same of the reference
    row_statistics   x = (a - peak) / T;  e = exp(x);  y = (a_ref - ref_peak) / T;  ratio = x - y, in the place of y
                     unless KL(reference || policy), whose gradient reads y, is asked for
    logit_gradient   d loss / d a

Maxima are kept on `a` and 1/T acts on differences, so that a large common offset costs no precision.

Shapes: N tokens, R rows of a tile, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..inputs import LinearInputs, LogitsInputs, RowStats, StatsGrad, take, without_masked

TILE_BYTES = 2 << 20  # one buffer; a tile's three (four with a reference) stay in the caches of two cores
GPU_TILE_BYTES = 64 << 20  # every operation of a tile is a launch there; not measured yet
FLOOR = -2e20  # replaces -inf, which would give NaN times a probability of 0; a slope over T may be as large as 1e18


class RowInputs(NamedTuple):
    """The inputs of each row."""

    index_N: Tensor  # int64, inside the vocabulary
    known_N: Tensor  # 1, or NaN where the id was outside the vocabulary, or in another rank's part of it
    temperature_N1: float | Tensor
    mask_N: Tensor | None

    @classmethod
    def of(cls, inputs: LogitsInputs | LinearInputs, vocabulary: int, dtype: torch.dtype) -> "RowInputs":
        """`dtype` is the compute dtype."""
        temperature: float | Tensor = inputs.temperature
        mask_N = inputs.mask_N
        index = inputs.tokens_N.long().clamp(0, vocabulary - 1)
        known = torch.where(index == inputs.tokens_N, 1.0, math.nan).to(dtype)
        if inputs.temperatures_N is not None:
            temperatures = inputs.temperatures_N if mask_N is None else inputs.temperatures_N.where(mask_N, 1)
            temperature = temperatures.to(dtype)[:, None]
        return cls(index, known, temperature, mask_N)

    def live(self, x_N: Tensor) -> Tensor:
        return without_masked(x_N, self.mask_N)

    def known(self, x_N: Tensor) -> Tensor:
        return self.live(x_N * self.known_N)

    def prepared(self, grads: StatsGrad, logprob_N: Tensor) -> StatsGrad:
        """In the compute dtype, 0 where masked, NaN where the log-prob is."""
        logprob, *others = (None if x is None else self.live(x.to(self.known_N.dtype)) for x in grads)
        return StatsGrad(None if logprob is None else logprob.masked_fill(logprob_N.isnan(), math.nan), *others)

    def new_stats(self, stats_rows: int) -> Tensor:
        return self.known_N.new_empty(stats_rows, len(self.known_N))


class Slopes(NamedTuple):
    """Of each row: d loss / d a = e^x (constant + of_x x + of_ratio ratio) + of_q e^y, at_token more at the token."""

    constant_N1: Tensor
    of_x_N1: Tensor | None
    of_ratio_N1: Tensor | None
    of_q_N1: Tensor | None
    at_token_N1: Tensor | None


class Tile(NamedTuple):
    x: Tensor
    e: Tensor
    scratch: Tensor
    y: Tensor | None
    ratio: Tensor | None  # the memory of y, or its own

    @property
    def keeps_y(self) -> bool:
        return self.ratio is not self.y


def tiles(
    per_row: RowInputs, vocabulary: int, load: Callable[[slice], tuple[Tensor, Tensor | None]], keep_y: bool
) -> Iterator[tuple[slice, RowInputs, Tile]]:
    """Yield (rows, their inputs, a tile). `load` gives logits, and the reference's, that may be overwritten."""
    count, like = len(per_row.index_N), per_row.known_N
    height = tile_height(vocabulary, like)
    e, scratch, *ratio = like.new_empty(3 if keep_y else 2, min(height, count), vocabulary)
    for start in range(0, count, height):
        rows = slice(start, min(start + height, count))
        x, y = load(rows)
        own = ratio[0][: len(x)] if ratio and y is not None else y
        yield rows, take(per_row, rows), Tile(x, e[: len(x)], scratch[: len(x)], y, own)


def tile_height(vocabulary: int, like: Tensor) -> int:
    """Independent of N, so that functions given the same rows see them in the same tiles."""
    size = TILE_BYTES if is_on_host(like) else GPU_TILE_BYTES
    return max(2, size // (vocabulary * like.dtype.itemsize))


def row_statistics(tile: Tile, per_row: RowInputs) -> RowStats:
    """Statistics of a loaded tile, which is left centred: 0 where masked, NaN log-probs of unknown ids.

    With s = sum e^x and r = sum e^y:  logprob = x_token - log s,  entropy = log s - sum(e^x x) / s,
    kl = sum(e^x (x - y)) / s - log s + log r,  ref_kl = sum(e^y (y - x)) / r - log r + log s.
    """
    index_R1, temperature = per_row.index_N[:, None], per_row.temperature_N1
    a_token_R1, peak_R1 = tile.x.gather(1, index_R1), tile.x.amax(1, keepdim=True)
    centre(tile.x, peak_R1, temperature)
    if tile.y is not None:
        a_ref_token_R1, ref_peak_R1 = tile.y.gather(1, index_R1), tile.y.amax(1, keepdim=True)
        centre(tile.y, ref_peak_R1, temperature)
        policy_lacks_R = lacks(tile.x, tile.y) if tile.keeps_y else None
    torch.exp(tile.x.clamp_(min=FLOOR), out=tile.e)
    total = row_sum(tile.e)
    log_total = total.log()
    logprob = per_row.known(((a_token_R1 - peak_R1) / temperature).squeeze(1) - log_total)
    entropy = per_row.live(log_total - row_sum(torch.mul(tile.e, tile.x, out=tile.scratch)) / total)
    if tile.y is None or tile.ratio is None:
        return RowStats(logprob, entropy, *_saved(peak_R1, log_total))

    ref_total = row_sum(torch.exp(tile.y, out=tile.scratch))
    ref_log_total = ref_total.log()
    ref_logprob = per_row.known(((a_ref_token_R1 - ref_peak_R1) / temperature).squeeze(1) - ref_log_total)
    may_be_infinite, is_number, ref_kl = _log_ratio(tile), ~(total + ref_total).isnan(), None
    if policy_lacks_R is not None:
        tile.scratch.mul_(tile.ratio)
        if may_be_infinite:
            tile.scratch.masked_fill_(tile.ratio == math.inf, 0)
        ref_kl = log_total - ref_log_total - row_sum(tile.scratch) / ref_total
        ref_kl = per_row.live(ref_kl.masked_fill(policy_lacks_R & is_number, math.inf))
    kl = row_sum(torch.mul(tile.e, tile.ratio, out=tile.scratch)) / total - log_total + ref_log_total
    # With finite inputs, only a probability that underflowed times an infinite ratio is NaN.
    kl = kl.masked_fill(kl.isnan() & is_number, math.inf)
    policy = (logprob, entropy, *_saved(peak_R1, log_total))
    return RowStats(*policy, ref_logprob, per_row.live(kl), *_saved(ref_peak_R1, ref_log_total), ref_kl)


def restore(tile: Tile, per_row: RowInputs, stats: RowStats, is_centred: bool = False) -> None:
    """Centre a loaded tile as `row_statistics` did, from the statistics that it returned, or one that it left."""
    if not is_centred:
        centre(tile.x, stats.peak[:, None], per_row.temperature_N1).clamp_(min=FLOOR)
        if tile.y is not None and stats.ref_peak is not None:
            centre(tile.y, stats.ref_peak[:, None], per_row.temperature_N1)
    torch.exp(tile.x, out=tile.e)
    if tile.keeps_y or not is_centred:
        _log_ratio(tile)


def slopes_of(per_row: RowInputs, stats: RowStats, grads: StatsGrad) -> Slopes:
    """Of g_l (onehot - p) - g_H p (log p + H) + g_K p (log p - log q - KL) + g_R (p - q), over T. An infinite KL has
    NaN slopes; those of an infinite KL(reference || policy) are finite.
    """
    grads = per_row.prepared(grads, stats.logprob)
    per_temperature, of_ratio_N1, of_q_N1, at_token_N1 = 1 / per_row.temperature_N1, None, None, None
    per_total_N1 = per_temperature * (-stats.log_total).exp()[:, None]
    constant = torch.zeros_like(stats.log_total)
    if grads.logprob is not None:
        constant = constant - grads.logprob
        at_token = grads.logprob.masked_fill(per_row.known_N.isnan(), 0)  # another rank holds the id, or none does
        at_token_N1 = at_token[:, None] * per_temperature
    if grads.entropy is not None:
        constant = constant + grads.entropy * (stats.log_total - stats.entropy)
    if grads.kl is not None and stats.kl is not None and stats.ref_log_total is not None:
        finite_kl = stats.kl.masked_fill(stats.kl == math.inf, math.nan)
        constant = constant + grads.kl * (stats.ref_log_total - stats.log_total - finite_kl)
        of_ratio_N1 = grads.kl[:, None] * per_total_N1
    if grads.ref_kl is not None and stats.ref_log_total is not None:
        constant = constant + grads.ref_kl
        of_q_N1 = -grads.ref_kl[:, None] * per_temperature * (-stats.ref_log_total).exp()[:, None]
    of_x_N1 = None if grads.entropy is None else -grads.entropy[:, None] * per_total_N1
    return Slopes(constant[:, None] * per_total_N1, of_x_N1, of_ratio_N1, of_q_N1, at_token_N1)


def logit_gradient(tile: Tile, per_row: RowInputs, slopes: Slopes, out: Tensor) -> Tensor:
    """d loss / d a of a centred tile, in `out`, which may be of the tile."""
    factor = slopes.constant_N1
    if slopes.of_x_N1 is not None:
        factor = torch.mul(tile.x, slopes.of_x_N1, out=tile.scratch).add_(factor)
    if slopes.of_ratio_N1 is not None and tile.ratio is not None:
        factor = torch.add(tile.ratio.mul_(slopes.of_ratio_N1), factor, out=tile.scratch)
    torch.mul(tile.e, factor, out=out)
    if slopes.of_q_N1 is not None and tile.y is not None:
        out.addcmul_(torch.exp(tile.y, out=tile.scratch), slopes.of_q_N1)
    if slopes.at_token_N1 is not None:
        out.scatter_add_(1, per_row.index_N[:, None], slopes.at_token_N1)
    return out


def is_on_host(x: Tensor) -> bool:
    """Whether it is on a CPU, where asking for its values waits for no device."""
    return x.device.type == "cpu"


def write(stats_R: RowStats, stats: Tensor, rows: slice) -> None:
    """Write to the rows of `RowStats`."""
    stats[:, rows] = torch.stack([x for x in stats_R if x is not None])


def _saved(peak_R1: Tensor, log_total_R: Tensor) -> tuple[Tensor, Tensor]:
    """(peak, log total); both -inf for a part of the vocabulary that is all -inf, which has no mass."""
    peak_R = peak_R1.squeeze(1)
    return peak_R, log_total_R.masked_fill(peak_R == -math.inf, -math.inf)


def centre(a_RV: Tensor, peak_R1: Tensor, temperature: float | Tensor) -> Tensor:
    a_RV.sub_(peak_R1)
    return a_RV if isinstance(temperature, float) and temperature == 1.0 else a_RV.div_(temperature)


def lacks(x_RV: Tensor, y_RV: Tensor) -> Tensor:
    """Which rows have an id where x is -inf and y is not."""
    if is_on_host(x_RV) and x_RV.amin() > -math.inf:
        return x_RV.new_zeros(len(x_RV), dtype=torch.bool)
    return ((x_RV == -math.inf) & (y_RV > -math.inf)).any(1)


def _log_ratio(tile: Tile) -> bool:
    """x - y, but 0 where both are -inf; inf where only the reference is. Whether there may be such an id."""
    if tile.y is None or tile.ratio is None:
        return False
    torch.sub(tile.x, tile.y, out=tile.ratio)
    if is_on_host(tile.x) and tile.ratio.amax() < math.inf:  # no -inf in the reference: a tenth of a selection's time
        return False
    is_nowhere = tile.x <= FLOOR
    if tile.keeps_y:  # what the reference has there counts
        is_nowhere &= tile.ratio == math.inf
    tile.ratio.masked_fill_(is_nowhere, 0)
    return True


def row_sum(x_RV: Tensor) -> Tensor:
    """Row sums in an order that does not depend on R: PyTorch splits a single row over its threads, but not two."""
    return x_RV.sum(1) if len(x_RV) > 1 else x_RV.expand(2, -1).sum(1)[:1]
