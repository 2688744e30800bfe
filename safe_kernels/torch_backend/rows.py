"""Statistics of full rows of logits, and their gradient: each written once, for logits and for hidden states.

A tile holds R full rows in the compute dtype (float32, or float64 for float64 inputs), few enough for the cache:

    load             x = a, the logits after scale, bias and softcap;  y = a_ref, the same of the reference
    row_statistics   x = (a - peak) / T;  e = exp(x);  y = x - (a_ref - ref_peak) / T
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
        logprob, entropy, kl = (None if x is None else self.live(x.to(self.known_N.dtype)) for x in grads)
        return StatsGrad(None if logprob is None else logprob.masked_fill(logprob_N.isnan(), math.nan), entropy, kl)

    def new_stats(self, with_reference: bool) -> Tensor:
        return self.known_N.new_empty(8 if with_reference else 4, len(self.known_N))


class Slopes(NamedTuple):
    """Of each row: d loss / d a = e^x (constant + of_x x + of_y y), and at_token more at the token."""

    constant_N1: Tensor
    of_x_N1: Tensor | None
    of_y_N1: Tensor | None
    at_token_N1: Tensor | None


class Tile(NamedTuple):
    x: Tensor
    e: Tensor
    scratch: Tensor
    y: Tensor | None


def tiles(
    per_row: RowInputs, vocabulary: int, load: Callable[[slice], tuple[Tensor, Tensor | None]]
) -> Iterator[tuple[slice, RowInputs, Tile]]:
    """Yield (rows, their inputs, a tile). `load` gives logits, and the reference's, that may be overwritten."""
    count, like = len(per_row.index_N), per_row.known_N
    height = tile_height(vocabulary, like)
    e, scratch = like.new_empty(2, min(height, count), vocabulary)
    for start in range(0, count, height):
        rows = slice(start, min(start + height, count))
        x, y = load(rows)
        yield rows, take(per_row, rows), Tile(x, e[: len(x)], scratch[: len(x)], y)


def tile_height(vocabulary: int, like: Tensor) -> int:
    """Independent of N, so that functions given the same rows see them in the same tiles."""
    size = TILE_BYTES if is_on_host(like) else GPU_TILE_BYTES
    return max(2, size // (vocabulary * like.dtype.itemsize))


def row_statistics(tile: Tile, per_row: RowInputs) -> RowStats:
    """Statistics of a loaded tile, which is left centred: 0 where masked, NaN log-probs of unknown ids.

    With s = sum e^x:  logprob = x_token - log s,  entropy = log s - sum(e^x x) / s,
    kl = sum(e^x y) / s - log s + log r,  where y = x - x_ref and r = sum e^x_ref.
    """
    index_R1, temperature = per_row.index_N[:, None], per_row.temperature_N1
    a_token_R1, peak_R1 = tile.x.gather(1, index_R1), tile.x.amax(1, keepdim=True)
    _centre_policy(tile, peak_R1, temperature)
    total = _row_sum(tile.e)
    log_total = total.log()
    logprob = per_row.known(((a_token_R1 - peak_R1) / temperature).squeeze(1) - log_total)
    entropy = per_row.live(log_total - _row_sum(torch.mul(tile.e, tile.x, out=tile.scratch)) / total)
    if tile.y is None:
        return RowStats(logprob, entropy, *_saved(peak_R1, log_total))

    a_token_R1, ref_peak_R1 = tile.y.gather(1, index_R1), tile.y.amax(1, keepdim=True)
    _centre(tile.y, ref_peak_R1, temperature)
    ref_total = _row_sum(torch.exp(tile.y, out=tile.scratch))
    ref_log_total = ref_total.log()
    ref_logprob = per_row.known(((a_token_R1 - ref_peak_R1) / temperature).squeeze(1) - ref_log_total)
    _log_ratio(tile.x, tile.y)
    kl = _row_sum(torch.mul(tile.e, tile.y, out=tile.scratch)) / total - log_total + ref_log_total
    # With finite inputs, only a probability that underflowed times an infinite ratio is NaN.
    kl = kl.masked_fill(kl.isnan() & ~(total + ref_total).isnan(), math.inf)
    policy = (logprob, entropy, *_saved(peak_R1, log_total))
    return RowStats(*policy, ref_logprob, per_row.live(kl), *_saved(ref_peak_R1, ref_log_total))


def restore(tile: Tile, per_row: RowInputs, stats: RowStats, is_centred: bool = False) -> None:
    """Centre a loaded tile as `row_statistics` did, from the statistics that it returned, or one that it left."""
    if is_centred:
        torch.exp(tile.x, out=tile.e)
        return
    _centre_policy(tile, stats.peak[:, None], per_row.temperature_N1)
    if tile.y is not None and stats.ref_peak is not None:
        _centre(tile.y, stats.ref_peak[:, None], per_row.temperature_N1)
        _log_ratio(tile.x, tile.y)


def slopes_of(per_row: RowInputs, stats: RowStats, grads: StatsGrad) -> Slopes:
    """Of g_l (onehot - p) - g_H p (log p + H) + g_K p (log p - log q - KL), over T. An infinite KL has NaN slopes."""
    grads = per_row.prepared(grads, stats.logprob)
    per_temperature, of_y_N1, at_token_N1 = 1 / per_row.temperature_N1, None, None
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
        of_y_N1 = grads.kl[:, None] * per_total_N1
    of_x_N1 = None if grads.entropy is None else -grads.entropy[:, None] * per_total_N1
    return Slopes(constant[:, None] * per_total_N1, of_x_N1, of_y_N1, at_token_N1)


def logit_gradient(tile: Tile, per_row: RowInputs, slopes: Slopes, out: Tensor) -> Tensor:
    """d loss / d a of a centred tile, in `out`, which may be of the tile."""
    factor = slopes.constant_N1
    if slopes.of_x_N1 is not None:
        factor = torch.mul(tile.x, slopes.of_x_N1, out=tile.scratch).add_(factor)
    if slopes.of_y_N1 is not None and tile.y is not None:
        factor = torch.add(tile.y.mul_(slopes.of_y_N1), factor, out=tile.scratch)
    torch.mul(tile.e, factor, out=out)
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


def _centre(a_RV: Tensor, peak_R1: Tensor, temperature: float | Tensor) -> Tensor:
    a_RV.sub_(peak_R1)
    return a_RV if isinstance(temperature, float) and temperature == 1.0 else a_RV.div_(temperature)


def _centre_policy(tile: Tile, peak_R1: Tensor, temperature: float | Tensor) -> None:
    torch.exp(_centre(tile.x, peak_R1, temperature).clamp_(min=FLOOR), out=tile.e)


def _log_ratio(x_RV: Tensor, y_RV: Tensor) -> None:
    """y = x - y, but 0 where both are -inf; inf where only the reference is."""
    torch.sub(x_RV, y_RV, out=y_RV)
    if is_on_host(y_RV) and y_RV.amax() < math.inf:  # no -inf in the reference: a tenth of the time of a selection
        return
    y_RV.masked_fill_(x_RV <= FLOOR, 0)


def _row_sum(x_RV: Tensor) -> Tensor:
    """Row sums in an order that does not depend on R: PyTorch splits a single row over its threads, but not two."""
    return x_RV.sum(1) if len(x_RV) > 1 else x_RV.expand(2, -1).sum(1)[:1]
