"""SAFE's control law: statistics of a rollout in, coefficients of the loss out. Plain numbers, no tensors.

From SAFE (arXiv 2602.04651), with the corrections that `docs/algorithm.md` lists: the paper's penalty is the threshold
law below; here it scales the live, differentiable KL instead of being added to the loss as a constant.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from safe_train.config import SafeConfig

PHASE_SCALE = {"warmup": 1.5, "climbing": 1.2, "plateau": 0.8, "converged": 1.0}
PHASE_MARGIN = 0.1  # reward standard deviations that count as a change
EMA_SHORT, EMA_LONG = 0.9, 0.99
PID_DECAY = 0.95
GATE_EPS = 0.1
INTEGRAL_MAX = 1.0


class Control(NamedTuple):
    kl_coef: float  # multiplies the mean exact KL in the loss
    kl_threshold: float  # tau, nats per token
    kl_short: float
    kl_long: float
    kl_momentum: float  # rise of the KL over the window; may be negative
    kl_penalty: float  # the adaptive part of kl_coef
    entropy_gate: float
    entropy_floor: float
    pid: float
    phase: str
    kl_integral: float = 0.0  # what kl_coef has learned to hold the threshold


@dataclass
class Ema:
    """Exponential average, corrected for its empty start."""

    decay: float
    total: float = 0.0
    weight: float = 0.0

    def update(self, value: float) -> float:
        self.total = self.decay * self.total + (1 - self.decay) * value
        self.weight = self.decay * self.weight + (1 - self.decay)
        return self.total / self.weight


@dataclass
class Moments:
    """Running count, mean and variance of the rewards."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0

    def update(self, values: list[float]) -> None:
        if not values:
            return
        count, mean = len(values), statistics.fmean(values)
        shift, total = mean - self.mean, self.count + count
        self.m2 += sum((v - mean) ** 2 for v in values) + shift**2 * self.count * count / total
        self.mean += shift * count / total
        self.count = total

    @property
    def std(self) -> float:
        return (self.m2 / self.count) ** 0.5 if self.count else 0.0


@dataclass
class Controller:
    """Called once a rollout. With `controller: fixed` it observes the same signals and leaves the coefficient at beta.

    A rollout with a statistic that is not finite would stay in the averages for good: it is not observed, and gets the
    coefficients of the one before.

    kl_coef = beta + gate [ lambda relu(kl_short - tau) + lambda_m relu(kl - kl_window_ago) ] + hold
    hold    = clip(hold before + lambda_i (kl_short - tau), 0, 1); lambda_i is 0 unless kl_integral_coef is set
    tau     = clip((base + PID(reward velocity)) * phase scale, min, max)
    gate    = clip(entropy_floor / (entropy + 0.1), gate_min, gate_max)
    """

    args: SafeConfig
    entropy_floor: float | None = None
    window: int = field(init=False)
    kl_short: Ema = field(init=False)
    kl_long: Ema = field(init=False)
    reward: Ema = field(init=False)
    last_reward: float | None = None
    last_error: float = 0.0
    integral: float = 0.0
    kls: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    last: Control = field(init=False)

    def __post_init__(self) -> None:
        args = self.args
        self.window = args.window or max(3, args.total_steps // 10)
        self.kl_short, self.kl_long = Ema(self.short_decay), Ema(EMA_LONG)
        self.reward = Ema(PID_DECAY)
        if self.entropy_floor is None:
            self.entropy_floor = args.entropy_floor
        floor = self.entropy_floor or 0.0
        self.last = Control(args.beta, args.kl_threshold, 0.0, 0.0, 0.0, 0.0, 1.0, floor, 0.0, "warmup")

    @property
    def short_decay(self) -> float:
        """In a short run an average over ten rollouts would still be that of the start."""
        return min(EMA_SHORT, 1 - 1 / self.window) if self.args.ema_short is None else self.args.ema_short

    def update(self, kl: float, entropy: float, reward: float, reward_std: float) -> Control:
        """Coefficients for this rollout's update, from its mean KL and entropy (nats per token) and mean reward."""
        args = self.args
        if not all(map(math.isfinite, (kl, entropy, reward, reward_std))):
            return self.last
        self.kls.append(kl)
        self.rewards.append(reward)
        if self.entropy_floor is None:
            self.entropy_floor = 0.5 * entropy
        kl_short, kl_long = self.kl_short.update(kl), self.kl_long.update(kl)
        momentum = kl - self.kls[-1 - self.window] if len(self.kls) > self.window else 0.0
        pid = self.pid(reward, reward_std)
        phase = self.phase(reward_std)
        scale = PHASE_SCALE[phase] if args.phases else 1.0
        threshold = clip((args.kl_threshold + pid) * scale, args.kl_threshold_min, args.kl_threshold_max)
        gate = clip(self.entropy_floor / (entropy + GATE_EPS), args.gate_min, args.gate_max)
        excess, rise = max(0.0, kl_short - threshold), max(0.0, momentum)
        penalty = args.kl_excess_coef * excess + args.kl_momentum_coef * rise
        penalty *= gate if args.entropy_gate else 1.0
        acts = args.controller == "safe"
        hold = self.last.kl_integral + args.kl_integral_coef * (kl_short - threshold)
        hold = clip(hold, 0.0, INTEGRAL_MAX) if acts and args.kl_integral_coef > 0 else 0.0
        kl_coef = args.beta + (penalty if acts else 0.0) + hold
        floor = self.entropy_floor
        self.last = Control(kl_coef, threshold, kl_short, kl_long, momentum, penalty, gate, floor, pid, phase, hold)
        return self.last

    def pid(self, reward: float, reward_std: float) -> float:
        """PID on the velocity of the smoothed reward, in reward standard deviations: rising rewards earn room."""
        smooth = self.reward.update(reward)
        if self.last_reward is None or reward_std == 0:
            self.last_reward = smooth
            return 0.0
        error = (smooth - self.last_reward) / reward_std
        self.last_reward = smooth
        self.integral = clip(self.integral + error, -1.0, 1.0)
        slope, self.last_error = error - self.last_error, error
        return self.args.pid_kp * error + self.args.pid_ki * self.integral + self.args.pid_kd * slope

    def phase(self, reward_std: float) -> str:
        """Compares the last window of mean rewards with the one before, in reward standard deviations."""
        window = self.window
        if len(self.rewards) < 2 * window:
            return "warmup"
        recent, before = self.rewards[-window:], self.rewards[-2 * window : -window]
        margin = PHASE_MARGIN * reward_std
        if statistics.fmean(recent) > statistics.fmean(before) + margin:
            return "climbing"
        gained = statistics.fmean(recent) - statistics.fmean(self.rewards[:window])
        if gained > reward_std and statistics.pstdev(recent) < margin:
            return "converged"
        return "plateau"

    def state_dict(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "args"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what was observed; the settings stay those that this run was given.

        What followed from the first rollout or the number of steps stays, too: a run that is made longer goes on alike.
        """
        for key, value in state.items():
            if isinstance(value, dict):
                value = Ema(**value | {"decay": getattr(self, key).decay})
            setattr(self, key, Control(*value) if key == "last" else value)
        if self.args.entropy_floor is not None:
            self.entropy_floor = self.args.entropy_floor
        self.window = self.args.window or self.window
        self.kl_short.decay = self.short_decay


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
