"""Move the trained weights back along a line until the exact KL to the reference is within a bound.

`Preview` bounds the KL after each optimizer step, on the line to the weights before it; `Budget` bounds the KL after
each rollout's update, on the line to the reference. docs/algorithm.md has the mathematics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from safe_kernels import linear_token_stats
from safe_train import parallel
from safe_train.algorithms.budget import BudgetLaw
from safe_train.algorithms.controller import Control
from safe_train.config import ConfigError, SafeConfig
from safe_train.data.batches import MicroBatch
from safe_train.engines import sharding
from safe_train.engines.engine import Engine
from safe_train.models.adapters import FACTOR, adapter_state, method_of
from safe_train.models.policy import Policy
from safe_train.models.reference import stored

AIMS = 0.97, 0.9, 0.7  # where the forwards look for the KL, as parts of the way from the origin's to the bound
TOO_LOW = 0.8  # a KL below this part gives away what the bound allows: another forward goes up again
MOVES = 8  # at most, toward a KL that is asked for


class OverBudget(RuntimeError):
    """The KL stayed above the budget wherever the policy was moved."""


class Line:
    """The way from an origin to the trained weights of now, in the parts that each process stores.

    Args:
        origins: of each parameter, in the same parts; None stands for zeros.
    """

    def __init__(self, engine: Engine, parameters: Sequence[nn.Parameter], origins: Sequence[Tensor | None]):
        self.engine, self.parameters, self.origins = engine, parameters, origins

    @torch.no_grad()
    def shrink(self, factor: float) -> None:
        """theta <- origin + factor (theta - origin)."""
        with self.engine.moving():
            for parameter, origin in zip(self.parameters, self.origins, strict=True):
                now = stored(parameter)
                now.copy_(now * factor if origin is None else origin.lerp(now, factor))


class Walk(NamedTuple):
    scale: float  # what is left of the line, 1 for all of it
    kl: float  # measured there
    forwards: int


def walk_back(
    shrink: Callable[[float], None],
    measure: Callable[[], float],
    kl: float,
    bound: float,
    at_origin: float = 0.0,
    power: float = 2.0,
    shortest: float = 0.0,
    aims: Sequence[float] = AIMS,
    too_low: float = TOO_LOW,
) -> Walk:
    """Shrinks a line at whose end the KL is `kl` until it is at most `bound`, by a secant on KL(s) - KL(0) ~ s^power.

    Each move is measured, one for each of the `aims`. The walk ends at the last measured scale within the bound, if
    there is one.
    """
    if not kl > bound:
        return Walk(1.0, kl, 0)
    room, way = bound - at_origin, [(1.0, kl)]
    for aim in aims:
        scale, kl = way[-1]
        if too_low * room <= kl - at_origin <= room or not math.isfinite(kl) or scale == shortest:
            break
        following = min(1.0, max(shortest, secant([(s, k - at_origin) for s, k in way], aim * room, power)))
        shrink(following / scale)
        way.append((following, measure()))
    within = [(s, k) for s, k in way if k <= bound]
    scale, kl = way[-1]
    if within and not kl <= bound:
        shrink(within[-1][0] / scale)
        scale, kl = within[-1]
    return Walk(scale, kl, len(way) - 1)


def walk_to(
    shrink: Callable[[float], None], measure: Callable[[], float], kl: float, wanted: float, tolerance: float
) -> Walk:
    """Shrinks a line at whose end the KL is `kl` until it is `wanted` within a part of it, in at most `MOVES` moves."""
    most, least = 1 + tolerance, 1 - tolerance
    return walk_back(shrink, measure, kl, wanted * most, aims=[1 / most] * MOVES, too_low=least / most)


def secant(way: Sequence[tuple[float, float]], wanted: float, power: float) -> float:
    """The scale at which c s^power is `wanted`, through the last point (s, KL) of the way; the last two give power."""
    scale, kl = way[-1]
    if len(way) > 1 and way[-2][1] > 0 < kl and way[-2][0] != scale:
        before, kl_before = way[-2]
        slope = math.log(kl_before / kl) / math.log(before / scale)
        power = min(max(slope, power / 4), 2 * power)
    return scale * (max(wanted, 0.0) / kl) ** (1 / power) if kl > 0 else scale


@torch.no_grad()
def mean_kl(policy: Policy, batches: Iterable[MicroBatch]) -> float:
    """Exact KL to the reference, nats per token of all processes, of the policy as it is now."""
    total, tokens = 0.0, 0
    for micro in batches:
        hidden_LH, targets_L, ref_LH = policy(micro.batch), micro.batch.targets_L, micro.ref_hidden_LH
        head, kept = policy.head(), micro.batch.kept
        kl_L = linear_token_stats(hidden_LH, tokens=targets_L, ref_hidden=ref_LH, kept=kept, **head).kl
        assert kl_L is not None
        total, tokens = total + kl_L.double().sum().item(), tokens + len(kl_L)
    sharding.reshard(policy)
    return mean_of(total, tokens)


def mean_of(total: float, tokens: int) -> float:
    """Over the tokens of all processes, with the same bits on each of them."""
    return parallel.from_main(parallel.total_number(total) / max(1, parallel.total_number(tokens)))


class Preview:
    """Bounds the KL after an optimizer step; a step from above the bound may not raise it. Adam's moments stay."""

    def __init__(self, engine: Engine, max_kl: float, min_scale: float):
        self.engine, self.max_kl, self.min_scale = engine, max_kl, min_scale
        self.line: Line | None = None

    def remember(self) -> None:
        parameters = self.engine.parameters
        self.line = Line(self.engine, parameters, [stored(p).clone() for p in parameters])

    def apply(self, minibatch: Sequence[MicroBatch], kl_before: float) -> float:
        """Shrinks the step taken since `remember`, if one was taken, and returns its scale; 1 leaves it alone."""
        if self.line is None:
            return 1.0
        line, self.line, measure = self.line, None, partial(mean_kl, self.engine.policy, minibatch)
        bound = max(kl_before, self.max_kl)
        return walk_back(line.shrink, measure, measure(), bound, kl_before, 1.0, self.min_scale).scale


def to_reference(engine: Engine, asked_by: str = "kl_budget") -> Line:
    """The line on which the policy becomes the reference.

    LoRA whose reference is the model without it is scaled; anything else is interpolated to the values that the
    reference keeps: those handed over of an adapter, the frozen copy for full fine-tuning.
    """
    policy = engine.policy
    sharding.reshard(policy)  # what was gathered for a rollout is under the parameters' names until then
    if policy.is_lora and method_of(policy.model) == "DELORA":
        raise ConfigError(
            f"{asked_by} cannot be used with the peft method DELORA, which normalises its factors: no scale of theirs "
            f"leads back to the start. Use LoRA or DoRA, or leave {asked_by} out"
        )
    if policy.frozen_copies:
        names = {id(p): name for name, p in policy.model.named_parameters()}
        frozen = dict(policy.frozen_copies[0].named_parameters())
        return Line(engine, engine.parameters, [stored(frozen[names[id(p)]]) for p in engine.parameters])
    if policy.handed_over is not None:
        return Line(engine, policy.handed_over.parameters, policy.handed_over.values)
    factors = scaled_factors(policy, asked_by)
    return Line(engine, factors, [None] * len(factors))


def scaled_factors(policy: Policy, asked_by: str) -> list[nn.Parameter]:
    """One trained factor of each layer of LoRA: B where it is trained. With it scales what the layer adds."""
    scaled: dict[str, nn.Parameter] = {}
    for name, parameter in sorted(adapter_state(policy.model).items()):  # A before B
        factor = FACTOR.fullmatch(name)
        if factor is None:
            raise ConfigError(
                f"{asked_by} with reference base needs plain LoRA, whose scale leads to the base, and the adapter has "
                f"{name}: set reference initial, or leave {asked_by} out"
            )
        if parameter.requires_grad:
            assert isinstance(parameter, nn.Parameter)
            scaled[factor["layer"]] = parameter
    return list(scaled.values())


class Budget:
    """Keeps the exact KL to the reference, on the tokens of each rollout, within `kl_budget` after its update."""

    def __init__(self, engine: Engine, args: SafeConfig):
        self.engine, self.law = engine, BudgetLaw(args)
        self.failure = ""  # why the run has to stop
        to_reference(engine)
        vocabulary = engine.policy.causal_lm.get_output_embeddings().weight.shape[0]
        if self.law.budget > math.log(vocabulary):
            raise ConfigError(
                f"kl_budget must be at most log({vocabulary}) = {math.log(vocabulary):.4g} nats a token, the logarithm "
                f"of the vocabulary's size, got {self.law.budget:g}"
            )

    def steer(self, control: Control, kl: float) -> Control:
        """The controller's decision, with the coefficient that brings the KL to its place inside the budget."""
        return self.law.steer(control, kl)

    def hold(self, batches: Iterable[MicroBatch], learning_rate: float) -> dict[str, float]:
        """Moves the policy back where the update left the budget, on its rollout's tokens; returns what to log."""
        started, law, policy = perf_counter(), self.law, self.engine.policy
        batches = list(batches)
        before = mean_of(sum(m.kl_L.double().sum().item() for m in batches), sum(len(m.kl_L) for m in batches))
        law.observe(before, learning_rate)
        found = {"budget/margin": law.margin, "budget/forwards": 0.0}
        if law.is_near:
            limit, measure = law.limit, partial(mean_kl, policy, batches)
            reached = measure()
            walk = walk_back(to_reference(self.engine).shrink, measure, reached, limit)
            law.record(reached, walk.kl)
            found |= {"budget/kl": walk.kl, "budget/kl_reached": reached, "budget/scale": walk.scale}
            found["budget/forwards"] = 1.0 + walk.forwards
            self.failure = "" if walk.kl <= law.budget else self.beyond(reached, walk)
        found["budget/projected_fraction"] = law.projections / law.rollouts
        return found | {"time/budget_s": perf_counter() - started}

    def beyond(self, reached: float, walk: Walk) -> str:
        return (
            f"the KL is {walk.kl:.4g} nats a token, above kl_budget {self.law.budget:g}: the update reached "
            f"{reached:.4g}, and {walk.forwards} moves toward the reference, the last to {walk.scale:.3g} of the way, "
            "did not bring it within. A lower learning_rate keeps the KL where it falls toward the reference"
        )

    def check(self) -> None:
        if self.failure:
            raise OverBudget(self.failure)


def make_budget(engine: Engine, args: SafeConfig) -> Budget | None:
    return None if args.kl_budget is None else Budget(engine, args)


def make_preview(engine: Engine, args: SafeConfig) -> Preview | None:
    limit = args.max_preview_kl
    return None if limit is None else Preview(engine, limit, args.preview_min_scale)
