"""What a KL budget decides from what it has seen: margin, measurements, and the KL coefficient. Plain numbers."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from safe_train.algorithms.controller import Control, clip

if TYPE_CHECKING:
    from safe_train.config import SafeConfig

START_MARGIN = 0.2  # until the run has shown its own
WINDOW, QUANTILE = 20, 0.9  # of the rollouts that the margin is taken from
FIRST = 5  # updates that are measured whatever was seen
SAFETY = 2.0  # an update may move the policy so many times as far as the furthest so far, and is still measured

TARGET = 0.9  # the controller's target, as a part of what the margin leaves
START_COEF, COEF_MIN, COEF_MAX = 1.0, 1e-3, 10.0
SLOPE = 2.0  # d log KL / d log coefficient of a tilted policy, whose KL a completion is var(A) / (2 coefficient^2)
ERROR_MAX = 2.0
ROUNDING = 1e-6  # nats: a KL near 0 is as large, or negative, by float32 alone


def distance(kl: float) -> float:
    """How far a KL is from the reference, in the units of a step: its square root, without what is rounding."""
    return max(0.0, kl - ROUNDING) ** 0.5


def start_ratios() -> list[float]:
    """As if half of the window had shown no margin, and half the one to start with."""
    return [1.0, 1 / (1 - START_MARGIN)] * (WINDOW // 2)


@dataclass
class BudgetLaw:
    """Called in each rollout: `steer` before the update, `observe` after it, `record` if its KL was measured."""

    args: SafeConfig
    ratios: list[float] = field(default_factory=start_ratios)  # a rollout's KL over that measured before it
    pace: float = 0.0  # largest rise of sqrt(KL) in an update, per unit of the learning rate
    kl: float | None = None  # of the last rollout
    learning_rate: float = 0.0  # of its update
    reached: float | None = None  # the KL after its update, if it was measured
    kept: float | None = None  # and after the projection
    rollouts: int = 0
    projections: int = 0
    log_coef: float = field(init=False)  # the controller's integral

    def __post_init__(self) -> None:
        self.log_coef = math.log(START_COEF)
        if self.args.kl_gradient == "return":  # charges sums over a completion: start where such a charge ends
            self.log_coef = min(self.log_coef, -0.5 * math.log(SLOPE * self.args.max_new_tokens * TARGET * self.limit))

    @property
    def budget(self) -> float:
        assert self.args.kl_budget is not None
        return self.args.kl_budget

    @property
    def margin(self) -> float:
        """What keeps the next rollout within the budget as often as `QUANTILE` says."""
        ratio = sorted(self.ratios)[math.ceil(QUANTILE * len(self.ratios)) - 1]
        return 1 - 1 / max(1.0, ratio)

    @property
    def limit(self) -> float:
        """The KL that an update may leave, on the tokens that it was made from."""
        return self.budget * (1 - self.margin)

    @property
    def bias(self) -> float:
        """What a KL on the update's own tokens is typically multiplied by in the next rollout, where that is above 1.

        The KL term lowers the KL on its own tokens more than elsewhere, the more so the larger its coefficient.
        """
        return max(1.0, statistics.median_low(self.ratios))

    def observe(self, kl: float, learning_rate: float) -> None:
        """A rollout's KL, and the rate of the update that follows on it."""
        if self.kept is not None and self.kept > self.limit / 2 and math.isfinite(kl):
            self.ratios = [*self.ratios[1:], kl / self.kept]
        if self.kept is None and self.kl is not None:
            self.see_rise(kl)
        self.kl, self.learning_rate, self.reached, self.kept = kl, learning_rate, None, None
        self.rollouts += 1

    @property
    def is_near(self) -> bool:
        """Whether the update may have left the limit, by the furthest that any has moved the policy."""
        assert self.kl is not None
        furthest = distance(self.kl) + SAFETY * self.pace * self.learning_rate
        return self.rollouts <= FIRST or not furthest**2 <= self.limit

    def record(self, reached: float, kept: float) -> None:
        """The KL after the update, and after the projection."""
        self.see_rise(reached)
        self.reached, self.kept = reached, kept
        self.projections += kept != reached

    def see_rise(self, kl: float) -> None:
        assert self.kl is not None
        if not (math.isfinite(kl) and math.isfinite(self.kl)):
            return
        rise = distance(kl) - distance(self.kl)
        if self.learning_rate > 0:
            self.pace = max(self.pace, rise / self.learning_rate)

    def steer(self, control: Control, kl: float) -> Control:
        """PI on log(KL / target), in the logarithm of the KL coefficient, to which `beta` is added.

            e = log(max(KL, bias x KL before the last projection) / target), within +-2
            u = I + n / (SLOPE (n + 1)) e,  I <- I + e / (SLOPE (n + 1)),  both within the coefficient's bounds
            n = sqrt(target) / rise of sqrt(KL) in an update: the updates from the reference to the target

        I stays within the bounds of the coefficient, so it does not wind up.
        """
        args = self.args
        if not args.kl_budget_control or args.controller not in ("safe", "fixed"):
            return control
        target, rise = self.target(control), self.pace * self.learning_rate
        error, log_coef = 0.0, self.log_coef
        if rise > 0 and math.isfinite(kl):
            seen = max(kl, self.bias * (self.reached or 0.0), 1e-12)
            error = clip(math.log(seen / target), -ERROR_MAX, ERROR_MAX)
            updates = max(1.0, target**0.5 / rise)
            low, high = math.log(COEF_MIN), math.log(COEF_MAX)
            self.log_coef = clip(self.log_coef + error / (SLOPE * (updates + 1)), low, high)
            log_coef = clip(self.log_coef + error * updates / (SLOPE * (updates + 1)), low, high)
        coef = math.exp(log_coef)
        return control._replace(kl_coef=args.beta + coef, kl_penalty=coef, kl_threshold=target)

    def target(self, control: Control) -> float:
        """Where the controller wants a rollout's KL. SAFE's threshold, gate and momentum lower it, to a bounded part.

        full   = 0.9 bias limit
        target = full clip( tau / tau_base / max(1, g) / (1 + lambda_m relu(rise) / limit), tau_min / tau_base, 1)
        """
        args, share = self.args, 1.0
        if args.controller == "safe":
            gate = max(1.0, control.entropy_gate) if args.entropy_gate else 1.0
            rise = args.kl_momentum_coef * max(0.0, control.kl_momentum) / self.limit
            share = control.kl_threshold / args.kl_threshold / gate / (1 + rise)
            share = clip(share, args.kl_threshold_min / args.kl_threshold, 1.0)
        return TARGET * self.bias * self.limit * share

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "args"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what was seen; a budget that was changed holds from the next update on."""
        for name, value in state.items():
            setattr(self, name, value)
