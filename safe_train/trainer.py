"""The training loop. `SafeTrainer.train` is the algorithm on one page; everything it calls is a screen away."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import torch
from accelerate.utils import set_seed
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl

from safe_train import parallel
from safe_train.algorithms import losses
from safe_train.algorithms.controller import Control, Controller, Moments
from safe_train.algorithms.critic import Critic
from safe_train.algorithms.experience import Experience, gathered, value_states
from safe_train.algorithms.preview import Preview, mean_kl
from safe_train.config import ALGORITHMS, PAPER, ConfigError, SafeConfig, require_name
from safe_train.data.batches import MicroBatch
from safe_train.data.chat import read_text
from safe_train.data.datasets_io import Source, from_python, read
from safe_train.data.prompts import Prompt, PromptDataset, make_prompts
from safe_train.engines import sharding
from safe_train.engines.engine import learning_rate, schedule
from safe_train.engines.launched import make_engine, place
from safe_train.models.adapters import untrained_experts, unwrapped
from safe_train.models.checks import check_vocabulary
from safe_train.models.determinism import check_torch_state
from safe_train.models.policy import Policy, make_policy, use_tensor_cores
from safe_train.models.pretrained import load_model, load_tokenizer
from safe_train.models.reference import identity
from safe_train.randomness import fingerprint, guest, own_random_numbers, seed_of, seeded
from safe_train.rewards.calls import RewardFunction
from safe_train.rewards.rewards import Rewards, Scores
from safe_train.run import events
from safe_train.run.checkpoint import Checkpoints, say
from safe_train.run.evaluation import Evaluation, evaluate
from safe_train.run.folder_lock import FolderLock, releasing
from safe_train.run.metrics import step_metrics
from safe_train.run.run_folder import RunFolder, refuse_existing
from safe_train.run.self_check import check_deterministic, check_sampler_gap, sampled_prompts, self_check
from safe_train.run.signals import Stopped, StopSignals
from safe_train.run.start import asked_for, check_4bit, check_outline, check_space, load_rewards
from safe_train.sampling.rollout import MODES, Mode, Rollout, choose_mode, end_tokens
from safe_train.sampling.samplers import make_sampler
from safe_train.sampling.stopping import described, stop_tokens

Rows = Any  # a sequence of rows, a DataFrame, or what `datasets` has

REWARDS = 0  # whose random numbers, beside those of the callbacks


class SafeTrainer:
    """Trains a causal language model with SAFE, PPO or GRPO.

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
        args, rewards = asked_for(args, reward_funcs, processing_class, **given)
        self.args, self.callbacks = args, events.instances(callbacks)
        self.control, self.state = TrainerControl(), events.new_state(args)
        self.accelerator = parallel.start(args)
        self.device = self.accelerator.device
        is_named = model is None or isinstance(model, str)
        check_4bit(args, self.device, is_named)
        self.folder_lock = FolderLock(Path(args.output_dir))
        self.folder_lock.acquire()
        set_seed(args.seed)
        self.tokenizer = load_tokenizer(args) if processing_class is None else processing_class
        if args.chat_template is not None:
            self.tokenizer.chat_template = read_text("chat_template", args.chat_template)
        if args.stop_tokens is not None:
            stop_tokens(self.tokenizer, args.stop_tokens)
        if is_named:
            check_outline(args, self.tokenizer, peft_config)
        self.prompts = self.prompt_dataset(train_dataset, "dataset")
        self.eval_prompts: PromptDataset | None = None
        if args.eval_every or eval_dataset is not None:  # else read when first asked for: a run may never need them
            self.eval_prompts = self.prompt_dataset(eval_dataset, "eval_dataset")
        with guest(args.seed):  # a file that seeds when it is imported
            functions = load_rewards(rewards, args, self.device, self.prompts.at(0, 2))
            self.rewards = Rewards(
                functions,
                args.reward_weights,
                aggregation=args.multi_objective_aggregation,
                variance_coef=args.reward_variance_coef,
                limit=args.async_reward_timeout,
                state=self.state,
            )

        model = unwrapped(load_model(args, self.device) if is_named else model)
        dtype = sharding.compute_dtype(self.device, model.dtype, args)
        use_tensor_cores(self.device, dtype)
        model = place(model, self.device)
        self.policy: Policy = make_policy(model, args, peft_config, device=self.device, dtype=dtype)
        note = check_vocabulary(self.policy.causal_lm, self.tokenizer)
        if note and parallel.is_main():
            print(note, flush=True)
        models = (self.policy, *self.policy.frozen_copies)
        parallel.broadcast(parameter for each in models for parameter in each.parameters())
        self.identity = identity(self.policy, self.tokenizer, args.reference)  # while the weights are whole
        if parallel.is_main() and (left_out := untrained_experts(self.policy.causal_lm)):
            print(left_out, flush=True)
        self.engine = make_engine(self.policy, self.device, args)
        check_deterministic(self.policy, self.device)
        self.trainable = self.engine.parameters
        self.mode = self.sampling_mode()
        self.sampler = make_sampler(self.policy, self.tokenizer, args, self.mode)
        if parallel.is_main():
            print(
                described(self.tokenizer, end_tokens(self.policy, self.tokenizer, args), args.stop_strings), flush=True
            )
        self.critic: Critic | None = None
        self.critic_optimizer: torch.optim.Optimizer | None = None
        if args.critic != "none":
            with seeded(seed_of(args.seed)):  # runs that differ in the critic alone sample the same first rollout
                self.critic = self.make_critic(self.policy.hidden_size, args.critic).to(self.device)
            parallel.broadcast(self.critic.parameters())
            self.critic_optimizer = torch.optim.AdamW(self.critic.heads.parameters(), lr=args.critic_learning_rate)
        trained = [*self.trainable, *(self.critic.parameters() if self.critic is not None else ())]
        check_space(Path(args.output_dir), trained)
        self.controller, self.reward_moments = self.make_controller(args), self.make_moments()
        limit = args.max_preview_kl
        self.preview = None if limit is None else Preview(self.trainable, limit, args.preview_min_scale)
        self.step = self.bad_steps = 0
        self.best_reward: float | None = None  # of an evaluation
        self.known_position = 0, 0  # of a step, in the stream of prompts; a resumed run knows that of its checkpoint
        self.times: dict[str, float] = {}

    def sampling_mode(self) -> Mode:
        """How transformers samples this model right; vLLM has its own way."""
        if self.args.generation == "vllm":
            return MODES[0]
        with self.engine.gathered():
            return choose_mode(self.policy, self.args, sampled_prompts(self.prompts))

    def read_rows(self, rows: Any, setting: str) -> Source:
        """The rows that were handed over, or those that the setting names."""
        if rows is not None and not isinstance(rows, (str, Path)):
            return from_python(rows, setting)
        name = getattr(self.args, setting)
        require_name(setting, name)
        return read(name, self.args.on_bad_row)

    def prompt_dataset(self, rows: Any, setting: str) -> PromptDataset:
        """Renders the prompts that the run will visit, and says what was found."""
        args, is_held_out = self.args, setting != "dataset"
        visits = args.eval_completions + parallel.size() if is_held_out else args.total_steps * args.prompts_per_step
        try:
            source = self.read_rows(rows, setting)
            prompts = make_prompts(source, self.tokenizer, args, is_held_out=is_held_out, visits=visits)
        except ConfigError as error:
            raise ConfigError(f"{setting} {getattr(args, setting)}: {error}") from error
        if parallel.is_main():
            print(prompts.summary(setting), flush=True)
        return prompts

    @releasing(always=True)
    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> list[dict[str, Any]]:
        """Runs to `total_steps` and returns the metrics of the steps it ran; the run folder holds everything else.

        Args:
            resume_from_checkpoint: True for the newest complete checkpoint of the run folder, or a checkpoint's path.
        """
        check_torch_state()
        args, checkpoints = self.args, Checkpoints(self.args.output_dir, self.args.keep_checkpoints)
        best = Checkpoints(args.output_dir, keep=1, name="best")
        parallel.meet("train()")
        self.folder_lock.acquire()
        if resume_from_checkpoint:
            checkpoints.load(self, None if resume_from_checkpoint is True else Path(resume_from_checkpoint))
            best.discard_after(self.step)
            if args.save_best and parallel.from_main(not best.complete()):
                self.best_reward = None
        elif self.step == 0:
            refuse_existing(Path(args.output_dir))
        parallel.check_same({"step": self.step})
        self_check(self)
        folder = RunFolder(args, self.accelerator, resume_at=self.step, layout=self.policy.layout)
        history = []
        with StopSignals() as signals:
            events.begin(self)
            for step in self.steps():
                with checkpoints.keeping(self):
                    events.begin_step(self)
                with self.timed("step"):
                    with checkpoints.keeping(self):
                        rollout, rewards = self.collect(step)
                    with self.timed("score"):
                        experience = Experience(self.policy, self.critic, rollout, args, self.device)
                    with checkpoints.keeping(self):
                        check_sampler_gap(experience, self.policy.compute_dtype, args)
                    control = self.update_controller(experience, rewards["reward"])
                    learned_from_B = rewards.learned_from(args.multi_objective_aggregation, args.completions_per_prompt)
                    self.compute_advantages(experience, self.training_rewards(learned_from_B, rollout), control)
                    with self.timed("update"):
                        update = self.update(experience, control)
                metrics = step_metrics(rollout, rewards, experience, control, update, self.times)
                metrics["layout"] = self.policy.layout
                del experience  # or the next one is made beside it
                self.step = step + 1
                try:
                    with checkpoints.keeping(self):
                        events.call(self, "on_step_end")
                        metrics |= self.evaluation_metrics(folder)
                finally:  # the step is done even when its evaluation fails
                    if self.step % args.samples_every == 0:
                        folder.log_samples(self.step, rollout, rewards)
                    folder.log(self.step, metrics)
                history.append(metrics)
                if self.is_best(metrics):
                    best.save(self)
                ends, stop = self.is_last(metrics["kl"]), signals.agreed()
                is_saved = ends or stop is not None or self.step % args.save_every == 0 or self.control.should_save
                if is_saved:
                    checkpoints.save(self)
                with checkpoints.keeping(self):
                    events.end_step(self, metrics, is_saved)
                if self.was_stopped(checkpoints) or ends:
                    break
                if stop:
                    raise Stopped.after(self.step, stop, args.output_dir)
            with checkpoints.keeping(self):
                events.call(self, "on_train_end")
        folder.finish()
        return history

    def steps(self) -> Iterator[int]:
        """The steps that are left, with a progress bar on the first process."""
        total, hidden = self.args.total_steps, not parallel.is_main()
        yield from tqdm(range(self.step, total), initial=self.step, total=total, unit="step", disable=hidden)

    def evaluation_metrics(self, folder: RunFolder) -> dict[str, float]:
        """Those of an evaluation, if it is time for one or a callback asked for it."""
        is_time = self.args.eval_every and self.step % self.args.eval_every == 0
        if not (is_time or self.control.should_evaluate):
            return {}
        evaluation = self.evaluate()
        folder.log_evaluation(self.step, evaluation)
        numbers = evaluation.numbers()
        events.call(self, "on_evaluate", metrics={f"eval_{name}": value for name, value in numbers.items()})
        return {f"eval/{name}": value for name, value in numbers.items()}

    def is_best(self, metrics: Mapping[str, Any]) -> bool:
        """Whether this step was evaluated, was better than all before it, and is to be kept for that."""
        reward = metrics.get("eval/reward")
        if reward is None or math.isnan(reward) or (self.best_reward is not None and reward <= self.best_reward):
            return False
        self.best_reward = reward
        return self.args.save_best

    def is_last(self, kl: float) -> bool:
        """Whether the run ends with this step: it is the last, a callback asked for it, or the KL passed `stop_kl`."""
        return self.step == self.args.total_steps or self.control.should_training_stop or self.is_beyond(kl)

    def is_beyond(self, kl: float) -> bool:
        limit = self.args.stop_kl
        if limit is None or not parallel.from_main(kl > limit):
            return False
        say(f"stopped after step {self.step}, with a checkpoint: its KL {kl:.3g} is above stop_kl {limit:g}")
        return True

    def was_stopped(self, checkpoints: Checkpoints) -> bool:
        """Whether a callback ended the run, which is then saved as if it were done."""
        if not self.control.should_training_stop:
            return False
        if checkpoints.step != self.step:
            checkpoints.save(self)
        say(f"stopped after step {self.step}, with a checkpoint: a callback asked for it")
        return True

    def evaluate(self) -> Evaluation:
        """Samples on the held-out prompts, always with the same random numbers, and leaves training's alone.

        With several processes, all of them have to call it.
        """
        if self.eval_prompts is None:
            if self.args.eval_dataset is None:
                raise ConfigError("an evaluation needs held-out prompts: set eval_dataset")
            self.eval_prompts = self.prompt_dataset(None, "eval_dataset")
        events.update(self)
        return evaluate(self.policy, self.complete, self.eval_prompts, self.rewards, self.args, self.device)

    def collect(self, step: int) -> tuple[Rollout, Scores]:
        """The rollout and the rewards of all processes, on each of them."""
        events.update(self)
        with own_random_numbers(self.args.seed, step):
            with self.timed("rollout"):
                own = self.sample(step)
        with self.timed("reward"), parallel.together(f"the rewards of step {step + 1}"):
            with guest(self.args.seed, step, REWARDS):
                rewards = self.rewards(*own.for_rewards())
        self.times |= {f"reward/{name}": seconds for name, seconds in rewards.seconds.items()}
        scores = rewards.gathered()
        if scores["reward"].isnan().all() and parallel.is_main():
            tqdm.write(f"step {step + 1}: every reward is None, so this step learns from KL and entropy alone")
        return gathered(own), scores

    def sample(self, step: int) -> Rollout:
        """Completions of this process's share of the step's prompts."""
        args = self.args
        prompts = parallel.share(self.prompts.at(self.position(step), args.prompts_per_step))
        repeated = [prompt for prompt in prompts for _ in range(args.completions_per_prompt)]
        return self.complete(repeated)

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
        parallel.check_same({"step": self.step, "controller": control, "random numbers": fingerprint()})
        return control

    def mean_kl_and_entropy(self, experience: Experience) -> tuple[float, float]:
        """The rollout's KL to the reference and its entropy as the controller sees them, nats per token."""
        return experience.tokens("kl_L").mean().item(), experience.tokens("entropy_L").mean().item()

    def compute_advantages(self, experience: Experience, reward_B: Tensor, control: Control) -> None:
        experience.compute_advantages(reward_B, kl_charge=control.kl_coef if self.args.kl_in_reward else 0.0)

    def training_rewards(self, reward_B: Tensor, rollout: Rollout) -> Tensor:
        """Rewards as the advantages see them: normalised, charged for not ending, permuted in the control run.

        In float64, on the CPU, where the differences within a group are still to be taken.
        """
        reward_B = reward_B.double()
        if self.args.normalize_rewards and self.args.multi_objective_aggregation != "normalize_then_sum":
            reward_B = (reward_B - self.reward_moments.mean) / (self.reward_moments.std or 1.0)
        reward_B = reward_B - self.args.missing_eos_penalty * (~torch.tensor(rollout.ended)).double()
        if self.args.shuffle_advantages:
            reward_B = reward_B[torch.randperm(len(reward_B))]
        return reward_B if self.critic is None else reward_B.float().to(self.device)

    def update(self, experience: Experience, control: Control) -> dict[str, float]:
        """Inner epochs over the rollout, one optimizer step a minibatch. Returns means over those steps."""
        seen: dict[str, list[Tensor]] = defaultdict(list)
        rate = self.set_learning_rates()
        for epoch in range(self.args.inner_epochs):
            for minibatch in experience.minibatches:
                tokens = parallel.total_number(sum(len(micro.batch.targets_L) for micro in minibatch))
                if tokens == 0:
                    continue
                sums: dict[str, Any] = {}
                for micro in minibatch:
                    for name, value in self.backward(micro, control, tokens).items():
                        sums[name] = sums.get(name, 0) + value
                means: dict[str, Any] = dict(parallel.totals(sums))
                means |= self.optimizer_step(means["policy_loss"] + means["value_loss"])
                means |= self.after_optimizer_step(epoch, means)
                if self.preview is not None:
                    means["preview_scale"] = self.preview.apply(
                        means["kl_before_step"].item(), mean_kl(self.policy, minibatch)
                    )
                for name, value in means.items():
                    seen[name].append(torch.as_tensor(value))
        averages = {name: torch.stack(values).float().mean().item() for name, values in seen.items()}
        return {"learning_rate": rate, **averages}

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

    def backward(self, micro: MicroBatch, control: Control, tokens: float) -> dict[str, Tensor]:
        """Adds a micro-batch's share of the minibatch's gradient; returns its share of the minibatch's means."""
        total, means = self.loss(micro, control, tokens)
        self.engine.backward(total)
        return means

    def loss(self, micro: MicroBatch, control: Control, tokens: float) -> tuple[Tensor, dict[str, Tensor]]:
        """A micro-batch's share of the loss, and of the means, of a minibatch of so many response tokens."""
        weight_L = torch.full_like(micro.logprob_L, 1 / tokens)
        hidden_LH = self.engine.forward(micro.batch)
        policy = losses.policy_loss(hidden_LH, self.policy.head(), micro, weight_L, control, self.args)
        total, value_loss = policy.loss, torch.zeros_like(policy.loss)
        if self.critic is not None:
            values_KL = self.critic(value_states(hidden_LH, micro.batch, self.args))
            value_loss = losses.value_loss(values_KL, micro, weight_L, self.args)
            total = total + self.args.value_coef * value_loss
        return total, losses.means(policy, value_loss, micro, weight_L)

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
        if self.bad_steps >= args.max_bad_steps:
            raise FloatingPointError(
                f"{self.bad_steps} optimizer steps in a row had a non-finite loss or gradient (loss {loss:.4g}, "
                f"policy gradient {norm:.4g}, critic gradient {critic_norm:.4g}); none of them reached the weights. "
                f"The last checkpoint in {args.output_dir} is intact; a lower learning_rate may help."
            )
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
