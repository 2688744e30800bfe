"""The policy and its reference: a causal language model split where the kernels need it, backbone and head."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from safe_kernels.integrations.transformers import output_head, silent_modules
from safe_train.config import ConfigError, SafeConfig
from safe_train.data.batches import TokenBatch
from safe_train.models import adapters
from safe_train.models.attention import as_published, choose_attention, use_attention
from safe_train.models.checks import check_forward, check_head, check_positions, check_saved_class
from safe_train.models.determinism import switch_off_randomness
from safe_train.models.layout import ROWS, choose_layout, in_rows, response_states
from safe_train.models.lora import lora_config
from safe_train.models.reference import Fingerprint, HandedOver, fingerprint
from safe_train.randomness import seeded

NamedTensors = Iterable[tuple[str, Tensor]]
LIGER = "liger_kernel.transformers.monkey_patch"


class Policy(nn.Module):
    """A causal language model whose forward stops at the hidden states; the head is applied inside the kernels.

    The reference is the policy that was handed over: the same model with its adapter disabled, if that had no effect
    yet, or with the handed-over values of what is trained put in place; for full fine-tuning a frozen copy. With
    `reference` "base" it is the model without its adapter.
    """

    model: Any

    def __init__(self, model: Any, reference: str = "initial", temperature: float = 1.0):
        super().__init__()
        self.model, self.temperature = model, temperature
        self.is_lora = adapters.has_adapter(model)
        self.layout, self.compute_dtype = ROWS, model.dtype
        self.logit_transform: dict[str, Any] = {}
        # In a list, so that the frozen copy is neither trained nor saved with the policy.
        self.frozen_copies = [] if self.is_lora else [copy.deepcopy(model).eval().requires_grad_(False)]
        self.began_trained = self.is_lora and not adapters.adds_nothing(model)
        self.handed_over = HandedOver(model) if self.began_trained and reference == "initial" else None
        self.resized_vocabulary = self.is_lora and adapters.vocabulary_is_resized(model)

    def fingerprint(self, tensors: Callable[[nn.Module], NamedTensors] = nn.Module.named_parameters) -> Fingerprint:
        """Of the reference's weights without adapters, or of other tensors of it."""
        if self.frozen_copies:
            return fingerprint(tensors(self.frozen_copies[0]))
        states = [adapters.adapter_state(self.model, name=name) for name in self.model.peft_config]
        adapted = {id(tensor) for state in states for tensor in state.values()}
        return fingerprint((name, x) for name, x in tensors(self.causal_lm) if id(x) not in adapted)

    @property
    def causal_lm(self) -> Any:
        return self.model.get_base_model() if self.is_lora else self.model

    @property
    def hidden_size(self) -> int:
        return self.causal_lm.get_output_embeddings().weight.shape[1]

    def forward(self, batch: TokenBatch) -> Tensor:
        """Hidden states [L, H] that predict the response tokens."""
        return response_states(self.causal_lm, batch, self.layout)

    def with_gradient(self, hidden_LH: Tensor) -> Tensor:
        """The hidden states, once it is sure that a gradient will reach what is trained."""
        if not hidden_LH.requires_grad and not any(getattr(x, "requires_grad", False) for x in self.head().values()):
            raise ConfigError(
                "no trained parameter receives a gradient: the loss does not depend on what requires_grad is set for "
                f"in {type(self.model).__name__}; train LoRA on its linear layers (peft_config, lora_r), or lora_r 0"
            )
        return hidden_LH

    def reference(self, batch: TokenBatch) -> Tensor:
        """The reference's hidden states [L, H]."""
        if self.handed_over is None:
            return self.reference_states(batch)
        with self.handed_over.in_place():
            return self.reference_states(batch)

    @torch.no_grad()
    def reference_states(self, batch: TokenBatch) -> Tensor:
        if self.frozen_copies:
            return response_states(self.frozen_copies[0], batch, self.layout)
        with contextlib.nullcontext() if self.handed_over else adapters.disabled(self.model):
            return response_states(self.causal_lm, batch, self.layout)

    def head(self) -> dict[str, Any]:
        """The output head and the temperature, as keyword arguments of the `safe_kernels.linear_*` functions.

        All log-probs, entropies and KLs of policy and reference are taken with them.
        """
        arguments = {**output_head(self.causal_lm), **self.logit_transform, "temperature": self.temperature}
        if self.frozen_copies:
            arguments |= {f"ref_{name}": x for name, x in output_head(self.frozen_copies[0]).items()}
        if self.handed_over is not None:
            arguments |= self.handed_over.head_arguments(arguments)
        return arguments

    @contextlib.contextmanager
    def sampling(self) -> Iterator[Any]:
        """The model in the state that generation wants."""
        hook = whole_rows(self.causal_lm.get_output_embeddings())
        try:
            with as_published(self.causal_lm), plain_generation(self.model, self.causal_lm):
                yield self.model
        finally:
            hook.remove()


@contextlib.contextmanager
def plain_generation(*models: Any) -> Iterator[None]:
    """Inside, the models have no settings of their own for generation (top_k, repetition_penalty, end tokens, ...).

    `generate` would add them to those that it is called with, and sample from another policy than the one that trains.
    """
    from transformers import GenerationConfig

    own = [(model, vars(model)["generation_config"]) for model in models if "generation_config" in vars(model)]
    for model, _ in own:  # a PeftModel may have its own, and hands them to its base
        model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for model, config in own:
            model.generation_config = config


def whole_rows(head: nn.Module) -> RemovableHandle:
    """Makes the head's input contiguous on CPUs.

    `generate` slices the last position out of the prompt's hidden states, and with a batch of slices PyTorch would
    copy the head once for each: in bfloat16 that takes longer than all the rest of a short rollout.
    """
    return head.register_forward_pre_hook(lambda _, inputs: tuple(x.contiguous() if x.is_cpu else x for x in inputs))


def make_policy(
    model: Any,
    args: SafeConfig,
    peft_config: Any = None,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Policy:
    """Adds LoRA, and switches dropout off everywhere.

    `device` and `dtype` say where and in what the forward will run, if not where and in what the weights are now.
    """
    model = adapters.unwrapped(model)
    base = model
    if adapters.has_adapter(model):
        adapters.check_head(model)
        base = model.get_base_model()
    prepare_backbone(base, args, device or base.device, dtype or base.dtype)
    if peft_config is None and args.lora_r > 0 and not adapters.has_adapter(model):
        peft_config = lora_config(model, args)
    if peft_config is not None:
        model = adapters.add_adapter(model, peft_config)
        adapters.check_head(model)
    if adapters.has_adapter(model):
        adapters.check_adapter(model, args.reference)
    elif args.reference == "base":
        raise ConfigError("reference must be initial with lora_r 0, which leaves no base beside the policy")
    else:
        check_saved_class(model)
    switch_off_randomness(model)
    policy = Policy(model, args.reference, args.temperature)
    policy.compute_dtype = dtype or base.dtype
    if not any(p.requires_grad for p in policy.parameters()):
        raise ConfigError("the policy has no trainable parameter")
    with seeded(0):  # what a model draws in a check is none of the run's
        check_head(policy)
        policy.layout = choose_layout(args, policy.causal_lm)
    switch_checkpointing(policy.causal_lm, args.gradient_checkpointing)
    return policy.train(args.gradient_checkpointing)


def switch_checkpointing(model: Any, is_on: bool) -> None:
    """Recomputes activations in the backward, or not, whatever another trainer left switched on."""
    if is_on:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.disable_input_require_grads()  # a hook for reentrant checkpointing, which breaks the graph of decoding
    elif any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()


def prepare_backbone(model: Any, args: SafeConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Checks the model's positions and forward, chooses its attention, and puts Liger's kernels into the layers.

    What a model has beside its language model, such as a vision tower, is frozen: no text reaches it.
    """
    check_positions(model.config, args, type(model).__name__)
    check_forward(model)
    with as_published(model):
        for tower in silent_modules(model).values():
            tower.requires_grad_(False)
    use_attention(model, choose_attention(args.attn_implementation, model, device, dtype, in_rows(args, model)))
    apply_liger(model, args.liger_kernel, device)


def use_tensor_cores(device: torch.device, dtype: torch.dtype) -> None:
    """LoRA multiplies in float32. Beside bfloat16 weights TF32 is precise enough for it, and runs on tensor cores."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        torch.set_float32_matmul_precision("high")


def apply_liger(model: Any, setting: str, device: torch.device) -> None:
    """Liger's norms, RoPE and MLP in place of the backbone's. Its losses stay out: the head runs in our kernels."""
    if setting == "false":
        return
    reason = liger_obstacle(model.config.model_type, device)
    if reason and setting == "true":
        raise ConfigError(f"liger_kernel true {reason}; auto does without Liger where it cannot run")
    if not reason:
        apply = importlib.import_module(LIGER)._apply_liger_kernel_to_instance
        apply(model=model, cross_entropy=False, fused_linear_cross_entropy=False)


def liger_obstacle(model_type: str, device: torch.device) -> str:
    if device.type != "cuda":
        return f"needs a GPU, the device is {device.type}"
    try:
        known = importlib.import_module(LIGER).MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError:
        return "needs a package: pip install liger-kernel"
    return "" if model_type in known else f"has no kernels for the model type {model_type!r}"
