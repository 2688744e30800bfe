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
from torch import Tensor, nn
from torch.nn.functional import pad

from safe_train import parallel
from safe_train.config import ConfigError, SafeConfig
from safe_train.data.batches import TokenBatch
from safe_train.engines.engine import Engine, adamw, require_some
from safe_train.models.policy import Policy

MOMENTS = ("exp_avg", "exp_avg_sq")


# Fields of the accelerate config: the variable that `accelerate launch` sets, what it may be, and what to set instead.
FIELDS = {
    "deepspeed_config_file": ("DEEPSPEED_CONFIG_FILE", ("none",), ""),
    "zero_stage": ("DEEPSPEED_ZERO_STAGE", ("2", "3"), ""),
    "offload_optimizer_device": ("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", ("none",), ""),
    "offload_param_device": ("DEEPSPEED_OFFLOAD_PARAM_DEVICE", ("none",), ""),
    "zero3_init_flag": ("DEEPSPEED_ZERO3_INIT", ("false",), ""),
    "deepspeed_moe_layer_cls_names": ("DEEPSPEED_MOE_LAYER_CLS_NAMES", ("none",), ""),
    "mixed_precision": ("MIXED_PRECISION", ("no",), "; see dtype"),
    "gradient_clipping": ("GRADIENT_CLIPPING", ("auto",), "; see max_grad_norm"),
    "gradient_accumulation_steps": ("GRADIENT_ACCUMULATION_STEPS", ("1", "auto"), "; see minibatch_size"),
}


def stage() -> int | None:
    """ZeRO's stage, if `accelerate launch` was told to use DeepSpeed."""
    if parallel.size() == 1 or not parallel.flag("ACCELERATE_USE_DEEPSPEED"):
        return None
    given = {name: os.environ.get(f"ACCELERATE_{variable}") for name, (variable, *_) in FIELDS.items()}
    for name, (_, allowed, instead) in FIELDS.items():
        value = given[name] or allowed[0]
        if value not in allowed:
            needed = " or ".join(allowed)
            raise ConfigError(f"{name} of the accelerate config must be {needed} for DeepSpeed, got {value}{instead}")
    return int(given["zero_stage"] or 2)


def import_deepspeed() -> Any:
    try:
        return importlib.import_module("deepspeed")
    except ImportError as error:
        command = "pip install --no-build-isolation 'safe-kernels[deepspeed]'"
        raise ConfigError(f"DeepSpeed needs a package ({error}): {command}") from error


def config(stage: int, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's own settings. Clipping and the size of a step are the trainer's.

    Of several gathers at once DeepSpeed waits for the last alone, then for the device: on gloo an earlier one may still
    be writing, over weights that were loaded meanwhile.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": None,
        "log_level": "warning",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 0,  # the heads alone
            "stage3_allgather_sequential": device.type == "cpu",
        },
    }


class Zero2Engine(Engine):
    """Every process holds the weights. Each micro-batch's gradients are reduced at once; a process keeps its part."""

    stage = 2

    def __init__(self, policy: Policy, device: torch.device, args: SafeConfig):
        self.policy = policy
        self.optimizer = adamw(policy, device, args)
        self.parameters = list(self.optimizer.param_groups[0]["params"])
        self.options = self.optimizer.state_dict()["param_groups"]
        self.deepspeed = import_deepspeed()
        self.place(device)
        self.engine, self.zero, *_ = self.deepspeed.initialize(
            model=policy, optimizer=self.optimizer, config=config(self.stage, device)
        )
        self.engine.set_gradient_accumulation_boundary(False)  # `clip` is the boundary
        self.keep_reference()

    def place(self, device: torch.device) -> None:
        """Stage 2 finds the weights on the device."""

    def forward(self, batch: TokenBatch) -> Tensor:
        return self.policy.with_gradient(self.engine(batch))

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        require_some(sum(p.requires_grad for p in self.parameters))  # ZeRO moves the gradients elsewhere
        self.zero.finalize_gradient_accumulation_boundary()
        gradients = [g for group in self.zero.averaged_gradients.values() for g in group]
        # Sums, not means: the loss is normalised by the tokens of all processes already.
        torch._foreach_mul_(gradients, parallel.size())
        norm = parallel.total(torch.stack([g.square().sum() for g in gradients]).sum()).sqrt()
        # Not by NaN: the padding of the parts is zero, and DeepSpeed never writes it again.
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1).nan_to_num(1.0))
        return norm

    def step(self) -> None:
        self.zero.step()

    def zero_grad(self) -> None:
        self.zero.zero_grad()
        for group in self.zero.averaged_gradients:
            self.zero.averaged_gradients[group] = None

    @contextmanager
    def moving(self) -> Iterator[None]:
        with self.replacing():
            yield
        self.zero.refresh_fp32_params()  # DeepSpeed steps on a copy

    @contextmanager
    def writable(self) -> Iterator[None]:
        yield
        self.zero.refresh_fp32_params()

    def parts(self) -> list[Tensor]:
        """The flat parts of the weights that this process steps on: the optimizer's own parameters."""
        return self.zero.single_partition_of_fp32_groups

    def state_dict(self) -> dict[str, Any]:
        steps = [state["step"] for state in self.optimizer.state.values() if state]
        states = {i: {"step": steps[0].clone(), **self.moments(p)} for i, p in enumerate(self.parameters) if steps}
        return {"state": states, "param_groups": self.options}

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """AdamW's, of a parameter: whole on rank 0, and empty elsewhere."""
        get = self.deepspeed.utils.safe_get_full_optimizer_state
        return {name: parallel.cpu_on_main(get(parameter, name)) for name in MOMENTS}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        (options,) = saved["param_groups"]
        if len(options["params"]) != len(self.parameters):
            raise ValueError(f"the optimizer is of {len(options['params'])} parameters, not {len(self.parameters)}")
        for group in self.optimizer.param_groups:
            group.update({name: value for name, value in options.items() if name != "params"})
        if saved["state"]:
            for part in self.parts():
                state = {name: torch.zeros_like(part) for name in MOMENTS}
                step = saved["state"][0]["step"].to(part.device if options["fused"] else "cpu", copy=True)
                self.optimizer.state[part] = {"step": step, **state}
            self.load_moments(saved["state"])

    def load_moments(self, states: dict[int, dict[str, Tensor]]) -> None:
        self.zero._lazy_init_hp_params_optimizer_state()
        put = self.deepspeed.utils.safe_set_full_optimizer_state
        for index, parameter in enumerate(self.parameters):
            for name in MOMENTS:
                put(parameter, states[index][name].view_as(parameter), name)


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
        if self.policy.frozen_copies:
            self.policy.add_module("frozen", self.policy.frozen_copies[0])
        self.deepspeed.zero.Init(module=self.policy, config_dict_or_path=config(self.stage, device))
        for buffer in self.policy.buffers():
            buffer.data = buffer.data.to(device)
        self.policy.causal_lm._can_compile_fullgraph = False  # DeepSpeed's hooks are not for the compiler

    def keep_heads(self) -> None:
        """Gathers the heads; a step gathers the persistent parameters again, and no module releases external ones."""
        heads: list[Any] = [p for p in self.policy.head().values() if isinstance(p, nn.Parameter)]
        for head in heads:
            head.ds_persist = head.is_external_param = True
        known = self.zero.persistent_parameters
        known += [head for head in heads if not any(head is each for each in known)]
        heads[0].all_gather(heads)

    @contextmanager
    def replacing(self) -> Iterator[None]:
        self.zero.empty_partition_cache()
        yield
        self.keep_heads()

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
            written = [p.detach().double().sum() for p in self.parameters]
        for parameter, expected in zip(self.parameters, written, strict=True):
            found = self.deepspeed.utils.safe_get_full_fp32_param(parameter).double().sum()
            if not torch.isclose(found, expected, rtol=1e-9):
                raise RuntimeError(f"DeepSpeed lost a weight of shape {tuple(parameter.ds_shape)} that was loaded")

    @contextmanager
    def whole_parameters(self, parameters: Iterable[Tensor], modifier_rank: int | None = None) -> Iterator[None]:
        self.zero.empty_partition_cache()
        with self.deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=modifier_rank):
            yield
        self.keep_heads()

    def whole(self, tensor: Tensor) -> Tensor:
        if tensor.requires_grad:
            return parallel.cpu_on_main(self.deepspeed.utils.safe_get_full_fp32_param(tensor))
        with self.whole_parameters([tensor]):
            return parallel.cpu_on_main(tensor.detach())

    def parts(self) -> list[Tensor]:
        return self.zero.fp32_partitioned_groups_flat

    def load_moments(self, states: dict[int, dict[str, Tensor]]) -> None:
        put = self.deepspeed.utils.safe_set_local_optimizer_state
        for index, parameter in enumerate(self.parameters):
            size = parameter.ds_tensor.numel()
            for name in MOMENTS:
                whole = states[index][name].view(parameter.ds_shape).flatten()
                padded = pad(whole, (0, size * parallel.size() - whole.numel()))
                put(parameter, padded.split(size)[parallel.rank()], name)
