"""What an adapter of peft means to a run: which ones can be trained, and what is saved of them."""

from __future__ import annotations

import re
import shutil
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from safe_train.config import ConfigError

# Methods whose reference and checkpoint are tested; AdaLoRA would need a call of its own after each step.
SUPPORTED = tuple(
    "LORA IA3 LOHA LOKR OFT BOFT HRA MISS LN_TUNING TRAINABLE_TOKENS VERA FOURIERFT VBLORA RANDLORA C3A SHIRA ROAD "
    "HIRA DELORA GRALORA WAVEFT PSOFT TINYLORA".split()
)
PROMPT_METHODS = (
    "its trained vectors are added by peft's own forward, and no gradient reaches them through the backbone"
)

# Settings of LoRA with which it is more than weights beside a layer's own, or is not what its checkpoint loads as.
LORA_SETTINGS = {
    "alora_invocation_tokens": "aLoRA reads the token ids in peft's own forward, which the packed forward does not run",
    "arrow_config": "it mixes other adapters",
    "monteclora_config": "its weights are random",
    "megatron_config": "the layers are Megatron's",
}
INITIALISATIONS = {
    "pissa_niter": "it is random, and plain peft, which repeats it on loading, would get other weights; use 'pissa'",
    "loftq": "plain peft repeats it on loading, on weights that were not quantised; save the quantised base first",
    "corda": "plain peft cannot repeat it on loading without its covariances; convert the adapter to plain LoRA first",
    "lora_ga": "plain peft cannot repeat it on loading without its gradients; convert the adapter to plain LoRA first",
}
BASE_IS_CHANGED = ("pissa", "olora")  # what they take out of the base's weights is in the factors

FACTOR = re.compile(r"(?P<layer>.*)\.lora_(embedding_)?(?P<factor>[AB])(\.weight)?")


def has_adapter(model: Any) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "disable_adapter")


def unwrapped(model: Any) -> Any:
    """The model itself, without `torch.compile`.

    Raises:
        ConfigError: it is in another wrapper, is cut up, or has adapters that no `PeftModel` knows of.
    """
    model = getattr(model, "_orig_mod", model)
    for module in model.modules():
        module._compiled_call_impl = None
    kind = type(model).__name__
    if kind == "PeftMixedModel":
        raise ConfigError(
            "the model is a PeftMixedModel, which saves no adapters; use get_peft_model(..., mixed=False)"
        )
    if not has_adapter(model) and not (isinstance(model, PreTrainedModel) and model.can_generate()):
        hint = "pass its .module" if hasattr(model, "module") else "pass one of transformers (AutoModelForCausalLM)"
        raise ConfigError(f"the model is a {kind}, which is not a causal language model; {hint}")
    if has_adapter(model) and has_adapter(model.get_base_model()):
        raise ConfigError(
            "the model is a PeftModel around a PeftModel, whose inner adapter no checkpoint would hold: merge the "
            "inner one first (merge_and_unload()), or add the second with add_adapter"
        )
    if any(hasattr(module, "_orig_mod") for module in model.modules()):
        raise ConfigError(
            "a part of the model is compiled by torch.compile, whose names no checkpoint has: compile nothing"
        )
    if is_cut_up(model):
        raise ConfigError(
            "the model's weights are cut up already, by FSDP, DeepSpeed or another trainer: load it again"
        )
    if not has_adapter(model) and any(is_wrapper(module) for module in model.modules()):
        raise ConfigError(
            f"the {kind} has adapter layers inside of it, from another trainer or get_peft_model: pass the PeftModel "
            "around it (trainer.policy.model) to train them on, or its merge_and_unload() for new ones"
        )
    return model


def is_cut_up(model: nn.Module) -> bool:
    """Whether its weights are in parts on several processes."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters())


def is_wrapper(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def check_head(model: Any) -> None:
    """Refuses adapters on the output head, which the kernels read as one weight: those that are not active, too."""
    head = model.get_base_model().get_output_embeddings()
    if not is_wrapper(head):
        return
    parts = {part for key in head.state_dict() for part in key.split(".")}
    holders = sorted(parts & model.peft_config.keys())
    whose = f"the adapter {', '.join(map(repr, holders))}" if holders else "the layer of a deleted adapter"
    advice = (
        "leave it out of target_modules and modules_to_save, and tied embeddings out of trainable_token_indices. If it "
        "was trained so, pass the model's merge_and_unload(): a new adapter is trained on that"
    )
    if not set(holders) & set(model.active_adapters):
        advice = (
            "it is not active, but peft leaves its layer there, even behind delete_adapter. Load the model again with "
            "the active one alone (PeftModel.from_pretrained(base, folder, is_trainable=True)), or pass this model's "
            "merge_and_unload(): a new adapter is trained on that"
        )
    raise ConfigError(
        f"the output head must be a plain Linear layer, and {whose} is on it, as a {type(head).__name__}: {advice}"
    )


def add_adapter(model: Any, peft_config: Any) -> Any:
    import peft

    if has_adapter(model):
        raise ConfigError(
            "the model has an adapter and a peft_config was given: pass no peft_config to train its adapter on, or "
            "merge it first (model.merge_and_unload())"
        )
    check_method(peft_config)
    with warnings.catch_warnings():  # peft asks transformers under a name that it is about to drop
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        try:
            return peft.get_peft_model(model, peft_config)
        except (ValueError, TypeError, ImportError, NotImplementedError, AttributeError) as error:
            raise ConfigError(f"peft cannot put this adapter on {type(model).__name__}: {error}") from error


def check_method(config: Any) -> None:
    """Refuses what cannot be trained, or would not load as what was trained."""
    method = getattr(config.peft_type, "value", str(config.peft_type))
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ConfigError(f"the peft method {method} cannot be trained here: {PROMPT_METHODS}; use LoRA")
    if method not in SUPPORTED:
        raise ConfigError(f"the peft method {method} is not supported, only {', '.join(SUPPORTED)}")
    if method != "LORA":
        return
    for setting, reason in LORA_SETTINGS.items():
        if getattr(config, setting, None):
            raise ConfigError(f"LoRA with {setting} is not supported: {reason}; leave it out")
    for name, reason in INITIALISATIONS.items():
        if str(config.init_lora_weights).lower().startswith(name):
            raise ConfigError(f"init_lora_weights {config.init_lora_weights!r} is not supported: {reason}")


def active(model: Any) -> str:
    """The name of the one adapter that is switched on."""
    names = model.active_adapters
    return names[0] if isinstance(names, list) else names


def method_of(model: Any) -> str:
    """What peft calls the active adapter's method."""
    method = model.peft_config[active(model)].peft_type
    return getattr(method, "value", str(method))


def check_adapter(model: Any, reference: str) -> None:
    """Refuses an adapter whose checkpoint or reference would not be what it is in memory."""
    if isinstance(model.active_adapter, str):
        check_method(model.peft_config[model.active_adapter])
    wrappers: list[Any] = [module for module in model.modules() if is_wrapper(module)]
    names = sorted({name for wrapper in wrappers for name in wrapper.active_adapters})
    if len(names) != 1 or any(wrapper.disable_adapters for wrapper in wrappers):
        raise ConfigError(
            f"exactly one adapter must be active, and be switched on in all layers, got {names}; see set_adapter, or "
            "merge the others into the weights"
        )
    merged = sorted({name for wrapper in wrappers for name in wrapper.merged_adapters})
    if merged:
        raise ConfigError(f"the adapter {merged} is merged, so no gradient reaches it; call unmerge_adapter()")
    name = active(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise ConfigError(
            f"the policy has no trainable parameter: its adapter {name!r} is frozen; load it with is_trainable=True"
        )
    held = {id(tensor) for tensor in adapter_state(model).values()}
    others = sorted(n for n, p in trained.items() if id(p) not in held)
    if others:
        raise ConfigError(
            f"{len(others)} weights are trained that no checkpoint of the adapter {name!r} holds, such as {others[0]}: "
            "freeze them (requires_grad_(False)), name their module in modules_to_save, or train all weights (lora_r=0)"
        )
    if reference == "base":
        check_base(model.peft_config[name])


def check_base(config: Any) -> None:
    """Refuses `reference: base` where the policy without its adapter is not the base."""
    start = str(getattr(config, "init_lora_weights", ""))
    if start.lower().startswith(BASE_IS_CHANGED):
        raise ConfigError(
            f"reference must be initial with init_lora_weights {start!r}, which changes the base's weights"
        )
    if getattr(config, "bias", "none") != "none":
        raise ConfigError(f"reference must be initial with bias {config.bias!r}, which trains the base's own biases")


def adapter_state(
    model: Any, state: Mapping[str, Tensor] | None = None, name: str | None = None, embeddings: bool = False
) -> dict[str, Tensor]:
    """What a checkpoint holds of an adapter (default: the active one), under the names it has there."""
    import peft

    state, name = model.state_dict(keep_vars=True) if state is None else state, name or active(model)
    return peft.get_peft_model_state_dict(model, state, adapter_name=name, save_embedding_layers=embeddings)


def adds_nothing(model: Any) -> bool:
    """Whether the active adapter is LoRA without effect so far: one of the two factors of each layer is 0."""
    layers: dict[str, list[Tensor]] = defaultdict(list)
    for key, tensor in adapter_state(model).items():
        factor = FACTOR.fullmatch(key)
        if factor is None:
            return False
        layers[factor["layer"]].append(tensor)
    return all(any(not tensor.any() for tensor in factors) for factors in layers.values())


@contextmanager
def disabled(model: Any) -> Iterator[None]:
    """The model without its adapter. peft's own `disable_adapter` would thaw what the user froze, when it ends."""
    wrappers: list[Any] = [module for module in model.modules() if is_wrapper(module)]
    for wrapper in wrappers:
        wrapper._disable_adapters = True
    try:
        yield
    finally:
        for wrapper in wrappers:
            wrapper._disable_adapters = False


def vocabulary_is_resized(model: Any) -> bool:
    """Whether the embeddings have another number of rows than in the files that the model was loaded from."""
    base = model.get_base_model()
    if not base.name_or_path:
        return False
    try:
        source = type(base.config).from_pretrained(base.name_or_path, local_files_only=True)
    except OSError:  # nothing is known of its files
        return False
    return source.get_text_config().vocab_size != base.get_input_embeddings().weight.shape[0]


def save(model: Any, folder: Path, state: Mapping[str, Tensor], embeddings: bool) -> None:
    """Writes the active adapter where `PeftModel.from_pretrained(base, folder)` finds it, whatever its name."""
    name = active(model)
    model.save_pretrained(folder, state_dict=state, selected_adapters=[name], save_embedding_layers=embeddings)
    if name == "default":
        return
    for file in (folder / name).iterdir():
        file.rename(folder / file.name)
    shutil.rmtree(folder / name)


def load(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Puts the tensors of a saved adapter into the active one; frozen embeddings beside it stay as they are."""
    import peft

    own = adapter_state(model)
    found = {name: x for name, x in weights.items() if name in own}
    absent = sorted(own.keys() - found.keys())
    extra = sorted(weights.keys() - adapter_state(model, embeddings=True).keys())
    if absent or extra:
        raise ValueError(f"adapters of another model or rank: {[*absent, *extra][:3]} ...")
    peft.set_peft_model_state_dict(model, {name: x.to(model.device) for name, x in found.items()}, active(model))


def untrained_experts(model: Any) -> str:
    """What a mixture-of-experts model does not train, as one line; nothing for other models."""
    sizes = {name: p.numel() for name, p in model.named_parameters() if ".experts." in name}
    if not sizes:
        return ""
    frozen = sum(p.numel() for name, p in model.named_parameters() if name in sizes and is_left_out(name, p))
    settings = vars(model.config.get_text_config())
    losses = {name: x for name, x in settings.items() if re.search("(aux|z)_loss", name) and isinstance(x, float) and x}
    said = [f"{frozen:,} weights of experts are frozen: LoRA does not reach them"] if frozen else []
    if losses:
        said.append(
            f"the router's own losses are not trained ({', '.join(f'{name} {x}' for name, x in losses.items())})"
        )
    return "mixture of experts: " + "; ".join(said) if said else ""


def is_left_out(name: str, parameter: nn.Parameter) -> bool:
    """Whether a weight is frozen, without an adapter beside it."""
    return not parameter.requires_grad and ".base_layer." not in name and ".lora_" not in name
