"""How the policy is trained: a forward, the way of its gradient to the optimizer, and the step.

`Engine` is that of one process, and of several under DDP or FSDP2; DeepSpeed's is in `zero`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from safe_train import parallel
from safe_train.config import ConfigError, SafeConfig
from safe_train.data.batches import TokenBatch
from safe_train.engines import sharding
from safe_train.models.policy import Policy


class Engine:
    """The policy and its AdamW. Gradients add up over micro-batches; `clip` sums them over processes, once a step."""

    def __init__(self, policy: Policy, device: torch.device, args: SafeConfig):
        sharding.shard(policy, device, args)
        self.policy = policy
        self.optimizer = adamw(policy, device, args)
        self.parameters = self.optimizer.param_groups[0]["params"]
        self.keep_reference()

    def keep_reference(self) -> None:
        """Takes the policy of now for the one that was handed over, if its values are what is kept of that."""
        if self.policy.handed_over is not None:
            self.policy.handed_over.keep(self.parameters, self.replacing)

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """Inside, the parts of the weights that a process stores may be replaced for a while: nothing is gathered."""
        sharding.reshard(self.policy)
        yield

    def moving(self) -> AbstractContextManager[None]:
        """Inside, the parts of the trained weights that a process stores may be changed for good."""
        return self.replacing()

    def forward(self, batch: TokenBatch) -> Tensor:
        """Hidden states [L, H] of the policy, of which a gradient will be taken."""
        return self.policy.with_gradient(self.policy(batch))

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip(self, max_norm: float) -> Tensor:
        """Scales the gradient to at most `max_norm` and returns its norm before, the same on every process."""
        parallel.sum_gradients(sharding.unsharded(self.parameters))
        require_some(sum(p.grad is not None for p in self.parameters))
        return sharding.number(clip_grad_norm_(self.parameters, max_norm))

    def step(self) -> None:
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def gathered(self) -> AbstractContextManager[None]:
        """The whole policy on every process, for generation."""
        return sharding.gathered(self.policy)

    def writable(self) -> AbstractContextManager[None]:
        """Inside, the policy's weights may be replaced."""
        return nullcontext()

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor of the policy, gathered if it is in parts: then on the CPU of rank 0, and empty elsewhere."""
        return sharding.whole(tensor.detach())

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state, gathered likewise."""
        saved = self.optimizer.state_dict()
        for index, moments in saved["state"].items():
            saved["state"][index] = {name: sharding.whole(x) for name, x in moments.items()}
        return saved

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        for index, moments in saved["state"].items():
            parameter = self.parameters[index]
            saved["state"][index] = {name: sharding.shard_like(x, parameter) for name, x in moments.items()}
        self.optimizer.load_state_dict(saved)


def require_some(gradients: int) -> None:
    """Stops all processes when what is trained has no gradient: its norm would be 0, and no step would change it."""
    if not parallel.total_number(gradients):
        raise ConfigError(
            "no trained parameter receives a gradient: the loss does not depend on what the optimizer was given. If a "
            "reward or a callback chose another adapter (set_adapter) or changed requires_grad, let it undo that"
        )


def adamw(policy: Policy, device: torch.device, args: SafeConfig) -> torch.optim.AdamW:
    trainable = [p for p in policy.parameters() if p.requires_grad]
    others = sorted({str(p.dtype) for p in trainable} - {"torch.float32"})
    if others:
        hint = "set dtype float32, or load the model with dtype=torch.float32"
        if policy.is_lora:
            hint += "; or make what is trained float32, such as the layers in modules_to_save (p.data = p.data.float())"
        else:
            hint += "; or train LoRA on it"
        raise ConfigError(
            f"the trained weights must be float32, got {', '.join(others)}, which rounds most updates away: {hint}"
        )
    return torch.optim.AdamW(trainable, **options(policy, device, args))


def options(policy: Policy, device: torch.device, args: SafeConfig) -> dict[str, Any]:
    fused = device.type == "cuda"  # the default copies one of the moments at each step
    betas = args.adam_beta1, args.adam_beta2
    return {"lr": learning_rate(policy, args), "betas": betas, "weight_decay": args.weight_decay, "fused": fused}


def learning_rate(policy: Policy, args: SafeConfig) -> float:
    return args.learning_rate or (1e-4 if policy.is_lora else 1e-5)


def schedule(args: SafeConfig, step: int) -> float:
    """What the learning rates are multiplied with in a step, by its number alone: there is nothing to be resumed."""
    if step < args.warmup_steps:
        return (step + 1) / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, args.total_steps - args.warmup_steps)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[args.lr_scheduler_type]
