"""The sweep of the closed-form policy loss: statistics, slopes and gradients of a tile while it is there."""

from typing import Any

from torch import Tensor

from ..inputs import LinearInputs, LiveTokens
from ..objective import Objective, Results, policy_loss
from ..results import PolicyLoss
from .linear import GradientSums, asked_of, head_of, loaded_tiles
from .rows import Gradients, RowStats, logit_gradient, row_statistics


def linear_policy_loss(*tensors: Tensor, mask: Tensor | None, **options: Any) -> PolicyLoss:
    _, _, tokens, *_ = tensors
    return policy_loss(sweep, LiveTokens.of(tokens.shape, mask), *tensors, **options)


def sweep(inputs: LinearInputs, objective: Objective, needed: tuple[bool, ...]) -> tuple[Results, list[Tensor | None]]:
    tokens, with_reference, head = asked_of(inputs), inputs.ref_hidden_NH is not None, head_of(inputs)
    stats = RowStats.empty(tokens, with_reference)
    sums = GradientSums(inputs, needed)
    for rows, some, tile, hidden_RH in loaded_tiles(inputs, tokens, with_reference):
        part = row_statistics(tile, some)
        stats.write(rows, part)
        if any(needed):
            logprob, entropy, _, kl = part.results(some)
            *_, slopes = objective.rows(rows).evaluate(logprob, entropy, kl)
            logit_gradient(tile, some, part, Gradients.of(some, *slopes))
            sums.add(rows, head.product_gradient(tile, some, part), hidden_RH)
    return stats.results(tokens), sums.sums
