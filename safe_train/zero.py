"""DeepSpeed's ZeRO: gradients and optimizer cut over the processes (stage 2), and the weights with them (stage 3).

It runs on internals of DeepSpeed where there is no public way to see the gradient's norm before a step, to leave a step
out, or to keep one weight whole; constraints.txt names the version they were tested with.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import DeepSpeedPlugin
from accelerate.utils import patch_environment
from torch import Tensor, nn
from torch.nn.functional import pad

from safe_train import parallel
from safe_train.config import ConfigError, SafeConfig
from safe_train.data import TokenBatch
from safe_train.engine import Engine, adamw
from safe_train.models import Policy

MOMENTS = ("exp_avg", "exp_avg_sq")


def stage() -> int | None:
    """ZeRO's stage, if `accelerate launch` was told to use DeepSpeed."""
    if parallel.size() == 1 or not parallel.flag("ACCELERATE_USE_DEEPSPEED"):
        return None
    environment, no_file = os.environ, {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "none"}
    with patch_environment(**no_file):
        plugin = DeepSpeedPlugin()
    allowed = {
        "deepspeed_config_file": (environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none"), ("none",), ""),
        "deepspeed_moe_layer_cls_names": (environment.get("ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES"), (None,), ""),
        "zero_stage": (plugin.zero_stage, (2, 3), ""),
        "offload_optimizer_device": (plugin.offload_optimizer_device, ("none",), ""),
        "offload_param_device": (plugin.offload_param_device, ("none",), ""),
        "zero3_init_flag": (parallel.flag("ACCELERATE_DEEPSPEED_ZERO3_INIT"), (False,), ""),
        "mixed_precision": (environment.get("ACCELERATE_MIXED_PRECISION", "no"), ("no",), " (see dtype)"),
        "gradient_clipping": (plugin.gradient_clipping, ("auto",), " (see max_grad_norm)"),
        "gradient_accumulation_steps": (plugin.gradient_accumulation_steps, ("auto", 1), " (see minibatch_size)"),
    }
    for name, (given, accepted, instead) in allowed.items():
        if given not in accepted:
            choices = " or ".join(map(str, accepted))
            raise ConfigError(f"{name} of the accelerate config must be {choices} for DeepSpeed, got {given}{instead}")
    return plugin.zero_stage


def import_deepspeed() -> Any:
    try:
        return importlib.import_module("deepspeed")
    except ImportError as error:
        command = "pip install --no-build-isolation 'safe-kernels[deepspeed]'"
        raise ConfigError(f"DeepSpeed needs a package ({error}): {command}") from error


def config(stage: int) -> dict[str, Any]:
    """DeepSpeed's own settings. Clipping and the size of a step are the trainer's."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000},
    }


def check(parameters: Iterable[nn.Parameter], args: SafeConfig) -> None:
    if args.max_preview_kl is not None:
        raise ConfigError("max_preview_kl cannot be used with DeepSpeed, which holds the weights twice; FSDP2 takes it")
    dtypes = {p.dtype for p in parameters}
    if dtypes != {torch.float32}:
        names = ", ".join(sorted(map(str, dtypes)))
        raise ConfigError(
            f"the trained weights must be float32 for DeepSpeed, got {names}; set dtype to auto or float32"
        )


class Zero2Engine(Engine):
    """Every process holds the weights. Each micro-batch's gradients are reduced at once; a process keeps its part."""

    stage = 2

    def __init__(self, policy: Policy, device: torch.device, args: SafeConfig):
        self.policy = policy
        self.optimizer = adamw(policy, args)
        self.parameters = list(self.optimizer.param_groups[0]["params"])
        self.options = self.optimizer.state_dict()["param_groups"]
        check(self.parameters, args)
        self.deepspeed = import_deepspeed()
        self.place(device)
        self.engine, self.zero, *_ = self.deepspeed.initialize(
            model=policy, optimizer=self.optimizer, config=config(self.stage)
        )
        self.engine.set_gradient_accumulation_boundary(False)  # `clip` is the boundary

    def place(self, device: torch.device) -> None:
        """Brings the weights to where DeepSpeed wants them."""

    def forward(self, batch: TokenBatch) -> Tensor:
        return self.engine(batch)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        self.zero.finalize_gradient_accumulation_boundary()
        gradients = [g for group in self.zero.averaged_gradients.values() for g in group]
        # Sums, not means: the loss is normalised by the tokens of all processes already.
        torch._foreach_mul_(gradients, parallel.size())
        norm = parallel.total(torch.stack([g.square().sum() for g in gradients]).sum()).sqrt()
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1))
        return norm

    def step(self) -> None:
        self.zero.step()

    def zero_grad(self) -> None:
        self.zero.zero_grad()
        for group in self.zero.averaged_gradients:
            self.zero.averaged_gradients[group] = None

    @contextmanager
    def writable(self) -> Iterator[None]:
        yield
        self.zero.refresh_fp32_params()  # DeepSpeed steps on a copy

    def parts(self) -> list[Tensor]:
        """The flat parts of the weights that this process steps on: the optimizer's own parameters."""
        return self.zero.single_partition_of_fp32_groups

    def state_dict(self) -> dict[str, Any]:
        parts = [state for state in self.zero.optimizer.state.values() if state]
        states = {
            i: self.moments(p) | {"step": parts[0]["step"].clone()} for i, p in enumerate(self.parameters) if parts
        }
        return {"state": states, "param_groups": self.options}

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """AdamW's, of a parameter: whole on rank 0, and empty elsewhere."""
        whole = {name: self.deepspeed.utils.safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
        return {name: x.cpu() if parallel.is_main() else x.new_empty(0, device="cpu") for name, x in whole.items()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        (options,) = saved["param_groups"]
        if len(options["params"]) != len(self.parameters):
            raise ValueError(f"the optimizer is of {len(options['params'])} parameters, not {len(self.parameters)}")
        for group in self.zero.optimizer.param_groups:
            group.update({name: value for name, value in options.items() if name != "params"})
        if saved["state"]:
            for part in self.parts():
                state = {name: torch.zeros_like(part) for name in MOMENTS}
                self.zero.optimizer.state[part] = {"step": saved["state"][0]["step"].clone(), **state}
            self.load_moments(saved["state"])

    def load_moments(self, states: dict[int, dict[str, Tensor]]) -> None:
        self.zero._lazy_init_hp_params_optimizer_state()
        for index, parameter in enumerate(self.parameters):
            for name in MOMENTS:
                self.deepspeed.utils.safe_set_full_optimizer_state(
                    parameter, states[index][name].view_as(parameter), name
                )


class Zero3Engine(Zero2Engine):
    """Every process holds a part of each weight; DeepSpeed's hooks gather them module by module, forward and backward.

    The heads are kept whole, as DeepSpeed keeps its "persistent" parameters: the kernels want them outside of a module.
    """

    stage = 3

    def __init__(self, policy: Policy, device: torch.device, args: SafeConfig):
        super().__init__(policy, device, args)
        self.keep_heads()

    def place(self, device: torch.device) -> None:
        """One weight after another, so that no process ever holds the model. The frozen reference is cut with it."""
        if self.policy._frozen:
            self.policy.add_module("frozen", self.policy._frozen[0])
        self.deepspeed.zero.Init(module=self.policy, config_dict_or_path=config(self.stage))
        for buffer in self.policy.buffers():
            buffer.data = buffer.data.to(device)
        self.policy.causal_lm._can_compile_fullgraph = False  # DeepSpeed's hooks are not for the compiler

    def keep_heads(self) -> None:
        """Gathers the heads; a step gathers the persistent parameters again, and no module releases external ones."""
        heads: list[Any] = [p for p in self.policy.head().values() if isinstance(p, nn.Parameter)]
        for head in heads:
            head.ds_persist = head.is_external_param = True
        self.zero.persistent_parameters[:] = {*self.zero.persistent_parameters, *heads}
        heads[0].all_gather(heads)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        offload = self.zero.parameter_offload
        with self.whole_parameters(self.policy.model.parameters()):
            for hook in (*offload.forward_hooks, *offload.backward_hooks):
                hook.remove()
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield
            finally:
                offload._register_deepspeed_module(offload.module)

    @contextmanager
    def writable(self) -> Iterator[None]:
        with super().writable(), self.whole_parameters(self.parameters, modifier_rank=0):
            yield

    @contextmanager
    def whole_parameters(self, parameters: Iterable[nn.Parameter], modifier_rank: int | None = None) -> Iterator[None]:
        self.zero.empty_partition_cache()
        with self.deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=modifier_rank):
            yield
        self.keep_heads()

    def whole(self, tensor: Tensor) -> Tensor:
        held = getattr(tensor, "is_external_param", True)  # a buffer, or a head
        with self.deepspeed.zero.GatheredParameters([] if held else [tensor]):
            return tensor.detach().to("cpu", copy=True) if parallel.is_main() else tensor.new_empty(0, device="cpu")

    def parts(self) -> list[Tensor]:
        return self.zero.fp32_partitioned_groups_flat

    def load_moments(self, states: dict[int, dict[str, Tensor]]) -> None:
        for index, parameter in enumerate(self.parameters):
            size = parameter.ds_tensor.numel()
            for name in MOMENTS:
                whole = states[index][name].view(parameter.ds_shape).flatten()
                own = pad(whole, (0, size * parallel.size() - whole.numel())).split(size)[parallel.rank()]
                self.deepspeed.utils.safe_set_local_optimizer_state(parameter, own, name)
