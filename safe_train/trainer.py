"""The training loop. `SafeTrainer.train_step` is the algorithm: sample, score, control, credit, update.

What comes before the first step is in `__init__` and `run/start.py`; what surrounds a step, such as events, evaluations
and checkpoints, in `run/session.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import torch
from accelerate.utils import set_seed
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import TrainerCallback, TrainerControl

from safe_train import parallel
from safe_train.algorithms import losses
from safe_train.algorithms.advantages import credit
from safe_train.algorithms.controller import Control, Controller, Moments
from safe_train.algorithms.critic import Critic, value_states
from safe_train.algorithms.registry import ALGORITHMS
from safe_train.config import ConfigError, SafeConfig
from safe_train.data.batches import MicroBatch
from safe_train.data.prompts import Prompt, PromptDataset, load_prompts
from safe_train.engines.engine import learning_rate, schedule
from safe_train.engines.kept_logits import KeptLogits
from safe_train.engines.launched import make_engine
from safe_train.engines.projection import make_budget, make_preview
from safe_train.models.determinism import check_torch_state
from safe_train.models.policy import Policy
from safe_train.models.reference import identity
from safe_train.models.teacher import Teaches
from safe_train.randomness import fingerprint, guest, own_random_numbers, seed_of, seeded
from safe_train.rewards.calls import RewardFunction
from safe_train.rewards.groups import learned_from, refilled, warn_if_unscored, without_spread
from safe_train.rewards.prefixes import scored
from safe_train.rewards.rewards import Scores
from safe_train.run import events, start
from safe_train.run.evaluation import Evaluation, evaluate
from safe_train.run.folder_lock import FolderLock, releasing
from safe_train.run.metrics import step_metrics
from safe_train.run.self_check import check_bad_steps, check_deterministic, check_sampler_gap, sampled_prompts
from safe_train.run.session import Session
from safe_train.sampling.experience import Experience, check_trust_region, gathered
from safe_train.sampling.rollout import Rollout, choose_mode, end_tokens
from safe_train.sampling.samplers import make_sampler
from safe_train.sampling.stopping import described
from safe_train.settings.limits import PAPER

Rows = Any  # a sequence of rows, a DataFrame, or what `datasets` has

REWARDS = 0  # whose random numbers, beside those of the callbacks


class SafeTrainer:
    """Trains a causal language model with SAFE, PPO, GRPO, CISPO or a teacher.

    Args:
        model: a causal language model of transformers, a `PeftModel` around one, or the name of one. What is handed
            over is the reference, too. Default: `args.model`.
        reward_funcs: one or several rewards: callables `(prompts, completions, **columns) -> list[float | None]` as
            for TRL's GRPO, async ones too, or names. Default: `args.reward`.
        args: the settings.
        train_dataset, eval_dataset: rows with prompts (a list of dicts, a DataFrame, or a Dataset, DatasetDict or
            IterableDataset of `datasets`), or the name of a data set. Default: those `args` names.
        processing_class: the tokenizer; loaded with the model when that is a name.
        peft_config: replaces the LoRA settings of `args`; not for a `PeftModel`, whose active adapter is trained on.
        callbacks: functions, each called after every step, behind its checkpoint, as `callback(trainer, metrics)`; or
            objects of transformers' `TrainerCallback`. Both are called on every process. Their random numbers are their
            own: the seed and the step decide them. `trainer.control.should_training_stop` ends the run.

    Started by `accelerate launch` or torchrun, each process samples, judges and trains on its share, and the weights,
    the controller and the metrics are the same on all of them; see `parallel`, `engine`, and for weights in parts
    `sharding` (FSDP2) and `zero` (DeepSpeed).

    Raises:
        ConfigError: a setting, model, reward or data set that cannot be used, and what to do about it.
    """

    make_controller: ClassVar[Any] = Controller
    make_moments: ClassVar[Any] = Moments
    make_critic: ClassVar[Any] = Critic
    algorithms: ClassVar[Sequence[str]] = tuple(name for name in ALGORITHMS if name not in PAPER)

    @releasing(always=False)
    def __init__(
        self,
        model: Any = None,
        reward_funcs: RewardFunction | str | Sequence[RewardFunction | str] | None = None,
        args: SafeConfig | None = None,
        train_dataset: Rows | str | None = None,
        eval_dataset: Rows | str | None = None,
        processing_class: Any = None,
        peft_config: Any = None,
        callbacks: Sequence[Callable[[SafeTrainer, dict[str, Any]], None] | TrainerCallback] = (),
    ):
        check_torch_state()
        args = args or SafeConfig()
        if args.algorithm not in self.algorithms:
            raise ConfigError(
                f"{type(self).__name__} runs {', '.join(self.algorithms)}, got algorithm {args.algorithm!r}"
            )
        given = {"model": model, "dataset": train_dataset, "eval_dataset": eval_dataset}
        self.args, rewards = start.asked_for(args, reward_funcs, processing_class, **given)
        self.callbacks, self.control = events.instances(callbacks), TrainerControl()
        self.state = events.new_state(self.args)
        if isinstance(model, str):
            model = None  # `args` has its name
        self.join(is_named=model is None)
        self.load(model, processing_class, train_dataset, eval_dataset, rewards, peft_config)
        self.build()

    def join(self, is_named: bool) -> None:
        """Joins the other processes, and takes the run's folder."""
        self.accelerator = parallel.start(self.args)
        self.device = self.accelerator.device
        start.check_4bit(self.args, self.device, is_named)
        self.folder_lock = FolderLock(Path(self.args.output_dir))
        self.folder_lock.acquire()
        set_seed(self.args.seed)

    def load(
        self, model: Any, tokenizer: Any, rows: Any, eval_rows: Any, rewards: Sequence[start.Reward], peft_config: Any
    ) -> None:
        """Tokenizer, prompts, rewards and policy: those that were handed over, or those that the settings name."""
        args = self.args
        self.tokenizer = start.prepare_tokenizer(tokenizer, args)
        if model is None:
            start.check_outline(args, self.tokenizer, peft_config)
        self.prompts = load_prompts(rows, "dataset", self.tokenizer, args)
        self.eval_prompts: PromptDataset | None = None
        if args.eval_every or eval_rows is not None:  # else read when first asked for: a run may never need them
            self.eval_prompts = load_prompts(eval_rows, "eval_dataset", self.tokenizer, args)
        self.rewards = start.make_rewards(rewards, args, self.device, self.prompts.at(0, 2), self.state)
        self.policy: Policy = start.load_policy(model, self.tokenizer, args, self.device, peft_config)
        self.identity = identity(self.policy, self.tokenizer, args.reference)  # while the weights are whole

    def build(self) -> None:
        """What samples, judges and trains the policy, and the counters of a run that has not begun."""
        args = self.args
        self.engine = make_engine(self.policy, self.device, args)
        check_deterministic(self.policy, self.device)
        check_trust_region(self.policy, args)
        self.trainable = self.engine.parameters
        with self.engine.gathered():
            self.mode = choose_mode(self.policy, args, sampled_prompts(self.prompts))
        self.sampler = make_sampler(self.policy, self.tokenizer, args, self.mode)
        parallel.say(described(self.tokenizer, end_tokens(self.policy, self.tokenizer, args), args.stop_strings))
        self.build_critic()
        start.check_space(Path(args.output_dir), [*self.trainable, *(self.critic.parameters() if self.critic else ())])
        self.controller, self.reward_moments = self.make_controller(args), self.make_moments()
        self.preview, self.budget = make_preview(self.engine, args), make_budget(self.engine, args)
        self.kept_logits, self.step, self.bad_steps = KeptLogits(args, self.device), 0, 0
        self.best_reward: float | None = None  # of an evaluation
        self.known_position = 0, 0  # of a step, in the stream of prompts; a resumed run knows that of its checkpoint
        self.drawn = args.prompts_per_step  # prompts that the last step was given
        self.times: dict[str, float] = {}

    def build_critic(self) -> None:
        args = self.args
        self.critic: Critic | None = None
        self.critic_optimizer: torch.optim.Optimizer | None = None
        if args.critic != "none":
            with seeded(seed_of(args.seed)):  # runs that differ in the critic alone sample the same first rollout
                self.critic = self.make_critic(self.policy.hidden_size, args).to(self.device)
            parallel.broadcast(self.critic.parameters())
            self.critic_optimizer = torch.optim.AdamW(self.critic.heads.parameters(), lr=args.critic_learning_rate)

    @cached_property
    def teacher(self) -> Teaches | None:
        return start.make_teacher(self.args, self.policy, self.tokenizer, self.device)

    @releasing(always=True)
    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> list[dict[str, Any]]:
        """Runs to `total_steps` and returns the metrics of the steps it ran; the run folder holds everything else.

        Args:
            resume_from_checkpoint: True for the newest complete checkpoint of the run folder, or a checkpoint's path.
        """
        check_torch_state()
        session = Session(self, resume_from_checkpoint)
        with session.signals:
            for step in session.steps():
                session.record(*self.train_step(step, session))
        return session.finished()

    def train_step(self, step: int, session: Session) -> tuple[Rollout, Scores, dict[str, Any]]:
        """Sample, score, control, credit, update. Returns the rollout, its rewards and the step's metrics."""
        args = self.args
        with self.timed("step"):
            with session.keeping():
                rollout, rewards = self.collect(step)
                with self.timed("score"):
                    experience = Experience(self.policy, self.critic, rollout, args, self.device, session.teacher)
                check_sampler_gap(experience, self.policy.compute_dtype, args)
            control = self.update_controller(experience, rewards["reward"])
            experience.prefix_BK = None if rewards.prefix_BK is None else self.normalised(rewards.prefix_BK)
            self.compute_advantages(experience, self.training_rewards(learned_from(rewards, args), rollout), control)
            with self.timed("update"):
                update = self.update(experience, control)
            if self.budget is not None:
                update |= self.budget.hold(experience, update["learning_rate"])
        metrics = step_metrics(rollout, rewards, experience, control, update, self.times)
        session.note_tokens(rollout, rewards, experience)
        return rollout, rewards, metrics | ({"prompts/drawn": self.drawn} if args.dynamic_sampling else {})

    def evaluate(self) -> Evaluation:
        """Samples on the held-out prompts, always with the same random numbers, and leaves training's alone.

        With several processes, all of them have to call it.
        """
        if self.eval_prompts is None:
            if self.args.eval_dataset is None:
                raise ConfigError("an evaluation needs held-out prompts: set eval_dataset")
            self.eval_prompts = load_prompts(None, "eval_dataset", self.tokenizer, self.args)
        events.update(self)
        return evaluate(self.policy, self.complete, self.eval_prompts, self.rewards, self.args, self.device)

    def collect(self, step: int) -> tuple[Rollout, Scores]:
        """The rollout and the rewards of all processes, on each of them."""
        events.update(self)
        args, size = self.args, self.args.completions_per_prompt
        self.drawn = args.prompts_per_step
        rollout, scores = self.draw(partial(self.sample, step), step)
        for again in range(1, args.dynamic_sampling + 1):
            flat = int(without_spread(scores["reward"], size).sum())
            if flat == 0:
                break
            seconds, count = dict(self.times), max(flat, parallel.size())
            following = partial(self.complete_prompts, self.position(step) + self.drawn, count)
            more = self.draw(following, step, again)
            self.times |= {name: seconds[name] + self.times[name] for name in ("rollout", "reward")}
            rollout, scores = refilled(rollout, scores, *more, size)
            self.drawn += count
        self.times |= {f"reward/{name}": seconds for name, seconds in scores.seconds.items()}
        warn_if_unscored(scores, step, args)
        return rollout, scores

    def draw(self, sample: Callable[[], Rollout], step: int, *again: int) -> tuple[Rollout, Scores]:
        """What all processes sample, each its own share, and the scores."""
        with own_random_numbers(self.args.seed, step, *again):
            with self.timed("rollout"):
                own = sample()
        with self.timed("reward"), parallel.together(f"the rewards of step {step + 1}"):
            with guest(self.args.seed, step, REWARDS, *again):
                scores = scored(own, self.rewards, self.tokenizer, self.args)
        return gathered(own), scores.gathered()

    def sample(self, step: int) -> Rollout:
        """Completions of this process's share of the step's prompts."""
        return self.complete_prompts(self.position(step), self.args.prompts_per_step)

    def complete_prompts(self, position: int, count: int) -> Rollout:
        prompts = parallel.share(self.prompts.at(position, count))
        return self.complete([prompt for prompt in prompts for _ in range(self.args.completions_per_prompt)])

    def position(self, step: int) -> int:
        """How many prompts the steps before this one were given: since the run began, or its data set was replaced."""
        known_step, known_position = self.known_position
        return known_position + (step - known_step) * self.args.prompts_per_step

    def complete(self, prompts: Sequence[Prompt], **how: bool) -> Rollout:
        """A completion for each of this process's prompts; with `greedy` the likeliest token each time."""
        with self.engine.gathered():
            return self.sampler(prompts, **how)

    def update_controller(self, experience: Experience, reward_B: Tensor) -> Control:
        """Takes the rollout into the reward moments, then asks the controller for the update's coefficients.

        Where no reward applies to any completion, the running mean stands for the rollout's.
        """
        known_B = reward_B[~reward_B.isnan()]
        self.reward_moments.update(known_B.tolist())
        kl, entropy = self.mean_kl_and_entropy(experience)
        mean = known_B.mean().item() if len(known_B) else self.reward_moments.mean
        seen = parallel.from_main((kl, entropy, mean, self.reward_moments.std))
        control = self.controller.update(*seen)
        if self.budget is not None:
            control = self.budget.steer(control, seen[0])
        parallel.check_same({"step": self.step, "controller": control, "random numbers": fingerprint()})
        return control

    def mean_kl_and_entropy(self, experience: Experience) -> tuple[float, float]:
        """The rollout's KL to the reference and its entropy as the controller sees them, nats per token."""
        return experience.tokens("kl_L").mean().item(), experience.tokens("entropy_L").mean().item()

    def compute_advantages(self, experience: Experience, reward_B: Tensor, control: Control) -> None:
        credit(experience, reward_B, control, self.args)

    def training_rewards(self, reward_B: Tensor, rollout: Rollout) -> Tensor:
        """Rewards as the advantages see them: normalised, and charged for not ending."""
        missing_B = (~torch.tensor(rollout.ended)).double()
        return self.normalised(reward_B) - self.args.missing_eos_penalty * missing_B

    def normalised(self, reward: Tensor) -> Tensor:
        """By the running moments; in float64, on the CPU, where differences are still to be taken."""
        reward = reward.double()
        if self.args.normalize_rewards and self.args.multi_objective_aggregation != "normalize_then_sum":
            reward = (reward - self.reward_moments.mean) / (self.reward_moments.std or 1.0)
        return reward

    def update(self, experience: Experience, control: Control) -> dict[str, float]:
        """Inner epochs over the rollout, one optimizer step a minibatch. Returns means over those steps."""
        seen: dict[str, list[Tensor]] = defaultdict(list)
        rate = self.set_learning_rates()
        for epoch in range(self.args.inner_epochs):
            for minibatch in experience.minibatches:
                totals = losses.Totals(
                    parallel.total_number(sum(len(micro.batch.targets_L) for micro in minibatch)),
                    parallel.total_number(sum(len(micro.indices) for micro in minibatch)),
                )
                if totals.tokens == 0:
                    continue
                sums: dict[str, Any] = {}
                for micro in minibatch:
                    for name, value in self.backward(micro, control, totals).items():
                        sums[name] = sums.get(name, 0) + value
                means: dict[str, Any] = dict(parallel.totals(sums))
                means |= self.optimizer_step(means["policy_loss"] + means["value_loss"])
                means |= self.after_optimizer_step(epoch, means)
                if self.preview is not None:
                    means["preview_scale"] = self.preview.apply(minibatch, means["kl_before_step"].item())
                for name, value in means.items():
                    seen[name].append(torch.as_tensor(value))
        self.kept_logits.measure()
        return {"learning_rate": rate} | {name: torch.stack(x).float().mean().item() for name, x in seen.items()}

    def set_learning_rates(self) -> float:
        """Those of this step; returns the policy's."""
        factor = schedule(self.args, self.step)
        rate = learning_rate(self.policy, self.args) * factor
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        if self.critic_optimizer is not None:
            for group in self.critic_optimizer.param_groups:
                group["lr"] = self.args.critic_learning_rate * factor
        return rate

    def backward(self, micro: MicroBatch, control: Control, totals: losses.Totals) -> dict[str, Tensor]:
        """Adds a micro-batch's share of the minibatch's gradient; returns its share of the minibatch's means."""
        total, means = self.loss(micro, control, totals)
        self.engine.backward(total)
        return means

    def loss(self, micro: MicroBatch, control: Control, totals: losses.Totals) -> tuple[Tensor, dict[str, Tensor]]:
        """A micro-batch's share of the loss, and of the means, of its minibatch."""
        weight_L = losses.token_weights(micro, totals, self.args)
        hidden_LH = self.engine.forward(micro.batch)
        head, kept = self.policy.head(), self.kept_logits.bytes
        policy = losses.policy_loss(hidden_LH, head, micro, weight_L, control, self.args, kept)
        total, value_loss = policy.loss, torch.zeros_like(policy.loss)
        if self.critic is not None:
            values_KL = self.critic(value_states(hidden_LH, micro.batch, self.args))
            value_loss = losses.value_loss(values_KL, micro, weight_L, self.args)
            total = total + self.args.value_coef * value_loss
        return total, losses.means(policy, value_loss, micro, totals)

    def after_optimizer_step(self, epoch: int, means: Mapping[str, Any]) -> dict[str, float]:
        """Hook after each optimizer step, with its means; returns what else to log."""
        return {}

    def optimizer_step(self, loss: Tensor) -> dict[str, float]:
        """Clips both gradients and steps both optimizers, or neither when something is not finite."""
        args, critics = self.args, [] if self.critic is None else list(self.critic.heads.parameters())
        parallel.sum_gradients(critics)
        norm = self.engine.clip(args.max_grad_norm)
        critic_norm = clip_grad_norm_(critics, args.critic_max_grad_norm)
        finite = bool(torch.isfinite(norm + critic_norm + loss))
        self.bad_steps = 0 if finite else self.bad_steps + 1
        if finite:
            self.take_step()
        self.engine.zero_grad()
        if self.critic_optimizer is not None:
            self.critic_optimizer.zero_grad()
        check_bad_steps(self.bad_steps, args, loss, norm, critic_norm)
        return {"grad_norm": float(norm), "critic_grad_norm": float(critic_norm), "bad_steps": float(not finite)}

    def take_step(self) -> None:
        if self.preview is not None:
            self.preview.remember()
        self.engine.step()
        if self.critic is not None and self.critic_optimizer is not None:
            self.critic_optimizer.step()
            self.critic.polyak(self.args.polyak)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Wall-clock seconds of a part of the step, with the device's queue emptied at its end."""
        started = perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.times[name] = perf_counter() - started
