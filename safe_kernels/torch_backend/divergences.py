"""Divergences of a student from a teacher, from whole rows of logits and of hidden states.

    distributions   x = (a - peak) / T;  y = the same of the teacher;  p, q = e^x / sum e^x, e^y / sum e^y
    measured        the divergence, and of an entry f, which is p (f - sum p f) in the gradient
    row_gradient    d loss / d a

Logarithms are clamped at FLOOR, so that a probability of 0 adds 0.

Shapes: N tokens, R rows of a tile, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..formulas import DistillationObjective
from ..inputs import Divergence, DivergenceGrad, DivergenceStats, LinearInputs, LogitsInputs, compute_dtype, take
from .linear import GradientSums, among_masked, float_rows, head_of, per_row_of, products, without_masked_rows
from .logits import loader, store_rows
from .rows import FLOOR, RowInputs, centre, lacks, row_sum, tiles


class Pair(NamedTuple):
    """A loaded tile of both models."""

    rows: slice
    per_row: RowInputs
    ref_temperature_N1: float | Tensor
    x: Tensor  # the student's logits; then centred
    y: Tensor  # the teacher's; then centred, and at last f
    p: Tensor
    q: Tensor
    spare: Tensor


def logits_divergence(student: LogitsInputs, teacher: LogitsInputs, divergence: Divergence) -> Tensor:
    pairs, stats = logits_pairs(student, teacher)
    for pair in pairs:
        stats[:, pair.rows] = torch.stack(measured(pair, divergence))
    return stats


def logits_divergence_gradient(
    student: LogitsInputs,
    teacher: LogitsInputs,
    divergence: Divergence,
    stats: Tensor,
    grads: DivergenceGrad,
    out: Tensor,
) -> None:
    pairs, _ = logits_pairs(student, teacher)
    for pair in pairs:
        found = measured(pair, divergence)
        store_rows(out, pair.rows, row_gradient(pair, divergence, found, take(grads, pair.rows)))


def linear_divergence(
    student: LinearInputs,
    teacher: LinearInputs,
    divergence: Divergence,
    objective: DistillationObjective,
    needed: Sequence[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    count, vocabulary = student.tokens_N.shape[0], len(student.weight_VH)
    live, student = without_masked_rows(student)
    if live is not None:
        teacher, objective = teacher.of_rows(live)._replace(mask_N=None), take(objective, live)
    per_row, head, ref_head = per_row_of(student), head_of(student), head_of(teacher)
    ref_per_row, slopes = RowInputs.of(teacher, vocabulary, per_row.known_N.dtype), objective.slopes()
    stats, sums, ref_logits = per_row.new_stats(student.stats_rows), GradientSums(student, needed), None
    for product in products(student, per_row, with_reference=False):
        logits_RV = product.logits_SRV[0]
        ref_logits = torch.empty_like(logits_RV) if ref_logits is None else ref_logits[: len(logits_RV)]
        ref_head.logits(float_rows(teacher.hidden_NH, product.rows, product.per_row), ref_logits)
        ref_temperature = take(ref_per_row, product.rows).temperature_N1
        stats_here, slopes_here = stats[:, product.rows], take(slopes, product.rows)

        def load(rows: slice, x: Tensor = logits_RV, y: Tensor = ref_logits) -> tuple[Tensor, Tensor]:
            return x[rows], y[rows]

        for pair in pairs_of(product.per_row, ref_temperature, vocabulary, load):
            found = measured(pair, divergence)
            stats_here[:, pair.rows] = torch.stack(found)
            if any(needed):
                gradient_RV = row_gradient(pair, divergence, found, take(slopes_here, pair.rows))
                head.through(gradient_RV, pair.x, pair.per_row, found.peak)
        sums.add(product)
    return among_masked(stats, 1, live, count), sums.among_masked(live, count)


def logits_pairs(student: LogitsInputs, teacher: LogitsInputs) -> tuple[Iterator[Pair], Tensor]:
    """The tiles, and memory for their statistics."""
    vocabulary, dtype = student.logits.shape[-1], compute_dtype(student.logits)
    per_row, ref_per_row = RowInputs.of(student, vocabulary, dtype), RowInputs.of(teacher, vocabulary, dtype)
    load = loader(student, per_row, teacher.logits)
    return pairs_of(per_row, ref_per_row.temperature_N1, vocabulary, load), per_row.new_stats(student.stats_rows)


def pairs_of(
    per_row: RowInputs,
    ref_temperature_N1: float | Tensor,
    vocabulary: int,
    load: Callable[[slice], tuple[Tensor, Tensor | None]],
) -> Iterator[Pair]:
    for rows, per_row_R, (x, p, q, y, spare) in tiles(per_row, vocabulary, load, keep_y=True):
        temperature = ref_temperature_N1 if isinstance(ref_temperature_N1, float) else ref_temperature_N1[rows]
        if y is not None and spare is not None:
            yield Pair(rows, per_row_R, temperature, x, y, p, q, spare)


def measured(pair: Pair, divergence: Divergence) -> DivergenceStats:
    """Statistics of a loaded pair, which is left with p, q, the student's x, and f in the place of y."""
    per_row, index_R1 = pair.per_row, pair.per_row.index_N[:, None]
    a_token_R1 = pair.x.gather(1, index_R1)
    peak_R1, ref_peak_R1 = pair.x.amax(1, keepdim=True), pair.y.amax(1, keepdim=True)
    centre(pair.x, peak_R1, per_row.temperature_N1)
    centre(pair.y, ref_peak_R1, pair.ref_temperature_N1)
    is_infinite = INFINITE.get(divergence.name, lambda *_: None)(pair.x, pair.y)
    log_total_R1, ref_log_total_R1 = distribution(pair.x, pair.p), distribution(pair.y, pair.q)
    log_total, ref_log_total = log_total_R1.squeeze(1), ref_log_total_R1.squeeze(1)
    logprob = per_row.known(((a_token_R1 - peak_R1) / per_row.temperature_N1).squeeze(1) - log_total)
    entropy = log_total - row_sum(torch.mul(pair.p, pair.x, out=pair.spare))
    found, slope = MEASURES[divergence.name](pair, log_total_R1, ref_log_total_R1, divergence.beta)
    if is_infinite is not None:
        found, slope = found.masked_fill(is_infinite, math.inf), slope.masked_fill(is_infinite, math.nan)
    peaks = (peak_R1.squeeze(1), log_total, ref_peak_R1.squeeze(1), ref_log_total)
    return DivergenceStats(per_row.live(found), per_row.live(entropy), logprob, slope, *peaks)


def distribution(x_RV: Tensor, out_RV: Tensor) -> Tensor:
    """Clamp centred logits, and write their probabilities; log total [R, 1]."""
    torch.exp(x_RV.clamp_(min=FLOOR), out=out_RV)
    total_R1 = row_sum(out_RV)[:, None]
    out_RV.div_(total_R1)
    return total_R1.log()


def reverse_kl(pair: Pair, log_total: Tensor, ref_log_total: Tensor, _: float) -> tuple[Tensor, Tensor]:
    """sum p f with f = log p - log q."""
    log_ratio(pair, log_total, ref_log_total)
    kl = row_sum(torch.mul(pair.p, pair.y, out=pair.spare))
    return kl, kl


def forward_kl(pair: Pair, log_total: Tensor, ref_log_total: Tensor, _: float) -> tuple[Tensor, Tensor]:
    """sum q (log q - log p), whose gradient needs no f."""
    log_ratio(pair, log_total, ref_log_total)
    kl = -row_sum(torch.mul(pair.q, pair.y, out=pair.spare))
    return kl, kl


def jsd(pair: Pair, log_total: Tensor, ref_log_total: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """beta sum q (log q - log m) + sum p f with f = (1 - beta) (log p - log m).

    Both models' parts take the same steps, so that at beta 1/2 exchanging the two leaves the bits as they are.
    """
    log_m = torch.mul(pair.q, beta, out=pair.spare).add_(pair.p, alpha=1 - beta).log_().clamp_(min=FLOOR)
    of_teacher = row_sum(pair.y.sub_(ref_log_total).sub_(log_m).mul_(pair.q))
    torch.sub(pair.x, log_total, out=pair.y).sub_(log_m).mul_(1 - beta)
    of_student = row_sum(torch.mul(pair.p, pair.y, out=pair.spare))
    return beta * of_teacher + of_student, of_student


def tv(pair: Pair, *_: object) -> tuple[Tensor, Tensor]:
    """sum |p - q| / 2, and f = sign(p - q) / 2."""
    torch.sub(pair.p, pair.q, out=pair.y)
    distance = row_sum(torch.abs(pair.y, out=pair.spare)) / 2
    pair.y.sign_().mul_(0.5)
    return distance, row_sum(torch.mul(pair.p, pair.y, out=pair.spare)) + 0 * distance  # a sign forgets a NaN


MEASURES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "tv": tv,
}
INFINITE: dict[str, Callable[[Tensor, Tensor], Tensor | None]] = {  # which rows are, by centred logits x and y
    "reverse_kl": lambda x, y: lacks(y, x),
    "forward_kl": lacks,
}


def log_ratio(pair: Pair, log_total: Tensor, ref_log_total: Tensor) -> None:
    torch.sub(pair.x, pair.y, out=pair.y).add_(ref_log_total - log_total)


def row_gradient(pair: Pair, divergence: Divergence, stats: DivergenceStats, grads: DivergenceGrad) -> Tensor:
    """d loss / d a of a measured pair, in the place of f."""
    gradient, per_row, per_temperature = pair.y, pair.per_row, 1 / pair.per_row.temperature_N1
    slope, of_logprob = (None if x is None else per_row.live(x.to(pair.x.dtype)) for x in grads)
    if slope is None:
        gradient.zero_()
    else:
        if divergence.name == "forward_kl":
            torch.sub(pair.p, pair.q, out=gradient)
        else:
            gradient.sub_(stats.slope[:, None]).mul_(pair.p)
        gradient.mul_(slope[:, None] * per_temperature)
    if of_logprob is not None:
        at_token_R1 = of_logprob.masked_fill(stats.logprob.isnan(), math.nan)[:, None] * per_temperature
        gradient.addcmul_(pair.p, at_token_R1, value=-1).scatter_add_(1, per_row.index_N[:, None], at_token_R1)
    return gradient
