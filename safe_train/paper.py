"""The algorithms of the SAFE paper as its published code runs them, defects included, for anyone who wants to compare.

Reward, value and advantage are one number a sequence, read after its last token; the value loss moves the policy; the
KL penalty is a constant without gradient, worked out once an inner epoch from the sampled KL. `docs/algorithm.md` says
what is wrong with that. Where the code scores padding, this scores nothing.

Shape legend: L response tokens, B sequences, H hidden width, K value heads.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import huber_loss

from safe_kernels import soft_min
from safe_train import parallel
from safe_train.algorithms import losses
from safe_train.algorithms.advantages import per_token, permuted
from safe_train.algorithms.controller import EMA_LONG, EMA_SHORT, PHASE_SCALE, PID_DECAY, Control, clip
from safe_train.algorithms.critic import Critic
from safe_train.config import ConfigError, SafeConfig
from safe_train.data.batches import MicroBatch, TokenBatch
from safe_train.engines import sharding
from safe_train.models import scoring
from safe_train.rewards.rewards import Scores
from safe_train.sampling.experience import Experience
from safe_train.sampling.rollout import Rollout
from safe_train.settings.limits import PAPER
from safe_train.trainer import SafeTrainer

PENALTY_COEF, MOMENTUM_COEF, PPO_KL_COEF = 0.1, 5.0, 0.05
ENTROPY_FLOOR, GATE_MIN, GATE_EPS = 2.0, 0.5, 0.1
TARGET_VELOCITY = 0.001
WINDOW, HISTORY = 50, 100  # calls of the controller, of which there are `inner_epochs` a rollout


@dataclass
class PaperMoments:
    """Running mean and variance of the rewards, from a pseudo-count of 1e-4 with mean 0 and variance 1."""

    count: float = 1e-4
    mean: float = 0.0
    variance: float = 1.0

    def update(self, values: list[float]) -> None:
        """The batch's own variance is the unbiased one, though it is then weighted as if it were not."""
        count, mean = len(values), statistics.fmean(values)
        variance = statistics.variance(values) if count > 1 else 0.0
        shift, total = mean - self.mean, self.count + count
        squares = self.variance * self.count + variance * count + shift**2 * self.count * count / total
        self.mean += shift * count / total
        self.variance, self.count = squares / total, total

    @property
    def std(self) -> float:
        return self.variance**0.5 + 1e-8


@dataclass
class PaperController:
    """Called once an inner epoch, with the sampled KL of the policy as it then is. Averages start at 0.

        safe_paper        0.1 (kl_short - tau)^2 max(0.5, 2 / (entropy + 0.1))  if kl_short > tau, else 0
                          tau = clip((0.3 + PID(reward)) phase, 0.1, 0.6)
        asymmetric_paper  0.1 relu(kl - 0.3)^2 + 5 relu((kl - kl_49_calls_ago) / 50)^2
        ppo_paper         no penalty; the coefficient 0.05 of the sampled KL

    `kl_penalty` is added to the published loss as a number, which no gradient knows of: here it is only logged.
    """

    args: SafeConfig
    kl_short: float = 0.0
    kl_long: float = 0.0
    reward: float | None = None
    last_error: float = 0.0
    integral: float = 0.0
    signals: tuple[float, float] = (0.0, 0.0)  # entropy and mean reward of the rollout
    kls: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)

    def update(self, kl: float, entropy: float, reward: float, reward_std: float) -> Control:
        """The first call of a rollout. `reward` is its raw mean; `reward_std` plays no part."""
        self.signals = entropy, reward
        return self.again(kl)

    def again(self, kl: float) -> Control:
        """A later inner epoch of the same rollout."""
        args, (entropy, reward) = self.args, self.signals
        decay = EMA_SHORT if args.ema_short is None else args.ema_short
        self.kl_short = decay * self.kl_short + (1 - decay) * kl
        self.kl_long = EMA_LONG * self.kl_long + (1 - EMA_LONG) * kl
        self.kls = [*self.kls, kl][-HISTORY:]
        self.rewards = [*self.rewards, reward][-HISTORY:]
        momentum = (kl - self.kls[-WINDOW]) / WINDOW if len(self.kls) >= WINDOW else 0.0
        phase, pid = self.phase(), self.pid(reward)
        floor = ENTROPY_FLOOR if args.entropy_floor is None else args.entropy_floor
        gate, threshold, penalty = max(GATE_MIN, floor / (entropy + GATE_EPS)), args.kl_threshold, 0.0
        if args.controller == "safe_paper":
            scaled = (args.kl_threshold + pid) * PHASE_SCALE[phase]
            threshold = clip(scaled, args.kl_threshold_min, args.kl_threshold_max)
            penalty = PENALTY_COEF * max(0.0, self.kl_short - threshold) ** 2 * gate
        elif args.controller == "asymmetric_paper":
            penalty = PENALTY_COEF * max(0.0, kl - threshold) ** 2 + MOMENTUM_COEF * max(0.0, momentum) ** 2
        kl_coef = PPO_KL_COEF if args.controller == "ppo_paper" else 0.0
        return Control(kl_coef, threshold, self.kl_short, self.kl_long, momentum, penalty, gate, floor, pid, phase)

    def pid(self, reward: float) -> float:
        """PID on the velocity of the averaged reward over its target, in the reward's own unit."""
        if self.reward is None:
            self.reward = reward
            return 0.0
        smooth = PID_DECAY * self.reward + (1 - PID_DECAY) * reward
        error = smooth - self.reward - TARGET_VELOCITY
        self.reward = smooth
        self.integral = clip(self.integral + error, -1.0, 1.0)
        slope, self.last_error = error - self.last_error, error
        return self.args.pid_kp * error + self.args.pid_ki * self.integral + self.args.pid_kd * slope

    def phase(self) -> str:
        """In the published arithmetic: correctly rounded means would take another phase where two of them tie."""
        if len(self.rewards) < WINDOW:
            return "warmup"
        recent = self.rewards[-WINDOW:]
        before = self.rewards[:WINDOW] if len(self.rewards) == HISTORY else recent
        mean = sum(recent) / WINDOW
        if mean > sum(before) / WINDOW + 0.01:
            return "climbing"
        return "converged" if np.std(recent) < 0.02 and mean > 0.7 else "plateau"

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "args"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


class PaperCritic(Critic):
    """Two heads behind one LayerNorm; "single" is one head without it. Nothing reads the targets, as published."""

    def __init__(self, hidden_size: int, args: SafeConfig):
        nn.Module.__init__(self)
        single, width = args.critic == "single", max(1, hidden_size // 4)
        self.args = args
        heads = (
            nn.Sequential(nn.Linear(hidden_size, width), nn.GELU(), nn.Linear(width, 1)) for _ in range(2 - single)
        )
        self.heads = nn.ModuleList([nn.Identity() if single else nn.LayerNorm(hidden_size), *heads])
        self.target_heads = copy.deepcopy(self.heads).requires_grad_(False)

    def read(self, heads: nn.ModuleList, hidden_LH: Tensor) -> Tensor:
        """Values [K, L], whose gradient reaches the policy."""
        norm, *values = heads
        normal_LH = norm(hidden_LH.float())
        return torch.stack([value(normal_LH).squeeze(-1) for value in values])


class NotScored(ConfigError, parallel.StoppedTogether):
    """Found in the rewards of all processes, by all of them at the same place."""


class PaperTrainer(SafeTrainer):
    """`SafeTrainer` for `safe_paper`, `asymmetric_paper` and `ppo_paper`."""

    make_controller, make_moments, make_critic = PaperController, PaperMoments, PaperCritic
    algorithms = PAPER

    def collect(self, step: int) -> tuple[Rollout, Scores]:
        rollout, scores = super().collect(step)
        reward_B = scores["reward"]
        if reward_B.isnan().any():
            raise NotScored(
                f"no reward applies to {int(reward_B.isnan().sum())} of {len(reward_B)} completions (all said None), "
                f"which the published {self.args.algorithm} has no meaning for: take safe, ppo or grpo"
            )
        return rollout, scores

    def mean_kl_and_entropy(self, experience: Experience) -> tuple[float, float]:
        """Sampled KL over the tokens, and entropy over the completions."""
        kl = (experience.tokens("logprob_L") - experience.tokens("ref_logprob_L")).mean().item()
        entropies = [
            part.mean()
            for micro in experience
            for part in micro.entropy_L.split(micro.batch.response_cu_seqlens.diff().tolist())
            if len(part)
        ]
        return kl, parallel.gather(torch.stack(entropies)).mean().item()

    @torch.no_grad()
    def compute_advantages(self, experience: Experience, reward_B: Tensor, control: Control) -> None:
        """Advantages reward - value, whitened over the sequences; the reward is the value's target."""
        reward_B = permuted(experience, reward_B) if self.args.shuffle_advantages else reward_B
        advantages = []
        for micro in experience:
            boundaries = micro.batch.response_cu_seqlens
            own_B = reward_B[micro.indices].float().to(self.device)
            values_KB = self.values(micro.batch)[1][:, : len(own_B)]
            advantages.append(own_B - self.soft_min(values_KB))
            if micro.indices:
                micro.values_KL = torch.stack([per_token(value_B, boundaries) for value_B in values_KB])
                micro.returns_L = per_token(own_B, boundaries)
        every_B = parallel.gather(torch.cat(advantages))
        mean, std = every_B.mean(), every_B.std() + 1e-8
        for micro, own_B in zip(experience, advantages, strict=True):
            if micro.indices:
                micro.advantage_L = per_token((own_B - mean) / std, micro.batch.response_cu_seqlens)
        sharding.reshard(self.policy)

    def loss(self, micro: MicroBatch, control: Control, totals: losses.Totals) -> tuple[Tensor, dict[str, Tensor]]:
        args, batch = self.args, micro.batch
        weight_L = torch.full_like(micro.logprob_L, 1 / totals.tokens)
        hidden_LH, values_KB = self.values(batch)
        head = self.policy.head()
        policy = losses.policy_loss(hidden_LH, head, micro, weight_L, control._replace(kl_coef=0.0), args)
        total = policy.loss
        if control.kl_coef:
            logprob_L = scoring.logprobs(hidden_LH, head, batch.targets_L, self.kept_logits.bytes)
            total = total + control.kl_coef * (weight_L * (logprob_L - micro.ref_logprob_L)).sum()
        lengths_B = batch.response_cu_seqlens.diff()
        share_L = per_token(1 / (lengths_B * args.completions_per_step), batch.response_cu_seqlens)
        value_L = per_token(self.soft_min(values_KB), batch.response_cu_seqlens)
        errors_L = value_errors(value_L, self.soft_min(micro.values_KL), micro.returns_L, args)
        value_loss = (share_L * errors_L).sum()
        means = losses.means(policy, value_loss, micro, totals)
        means["sampled_kl"] = (weight_L * (policy.logprob - micro.ref_logprob_L)).sum()
        return total + args.value_coef * value_loss, means

    def after_optimizer_step(self, epoch: int, means: Mapping[str, Any]) -> dict[str, float]:
        """`update_controller` was the call of the first inner epoch, whose policy is the one that sampled."""
        if epoch == 0:
            return {}
        control = self.controller.again(float(means["sampled_kl"]))._asdict()
        return {name: value for name, value in control.items() if isinstance(value, float)}

    def values(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """States [L, H] that predict the response, and the heads' values [K, B] at the last token of each sequence."""
        ends = replace(batch, predict_L=torch.cat([batch.predict_L, batch.cu_seqlens[1:].long() - 1]))
        forward = self.engine.forward if torch.is_grad_enabled() else self.policy
        hidden_LH, ends_BH = forward(ends).split([len(batch.predict_L), len(batch.cu_seqlens) - 1])
        assert self.critic is not None
        return hidden_LH, self.critic(ends_BH)

    def soft_min(self, values_KB: Tensor) -> Tensor:
        return soft_min(values_KB[0], values_KB[-1], self.args.alpha)


def value_errors(value: Tensor, old_value: Tensor, target: Tensor, args: SafeConfig) -> Tensor:
    """The second value moved at most `value_clip` from the rollout's: the mean of both errors, or the larger one."""
    clipped = old_value + (value - old_value).clamp(-args.value_clip, args.value_clip)
    if args.algorithm == "ppo_paper":
        return (value - target).square()
    if args.algorithm == "asymmetric_paper":
        return torch.maximum((value - target).square(), (clipped - target).square()) / 2
    errors = [huber_loss(x, target, reduction="none", delta=args.huber_delta) for x in (value, clipped)]
    return (errors[0] + errors[1]) / 2


def make_trainer(args: SafeConfig, **objects: Any) -> SafeTrainer:
    """The trainer that runs `args.algorithm`; `objects` are what else a SafeTrainer takes."""
    return (PaperTrainer if args.algorithm in PAPER else SafeTrainer)(args=args, **objects)
