"""`safe-train export`: a checkpoint's policy as a folder that transformers and vLLM load.

The folder gets its name when it has been loaded again and its log-probs are those of the checkpoint's policy.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from safe_kernels.integrations.transformers import text_config
from safe_train.commands.at_kl import moved_checkpoint
from safe_train.commands.subject import Subject, adapted, own_tokenizer
from safe_train.config import ConfigError, SafeConfig, require_name
from safe_train.models import adapters
from safe_train.models.layout import largest_gap, probes
from safe_train.models.policy import Policy
from safe_train.models.pretrained import (
    config_of,
    load_model,
    load_weights,
    loading,
    model_class,
    quantised,
    source,
    where,
)
from safe_train.models.reference import check_fingerprint
from safe_train.run.checkpoint import identity_of
from safe_train.run.checkpoints import Checkpoints
from safe_train.sampling.rollout import end_tokens, filters_of
from safe_train.sampling.samplers import changing

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPES |= {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


class Probe(NamedTuple):
    """Some tokens, and their log-probs under the checkpoint's policy."""

    sequences: list[list[int]]
    logprobs: Tensor
    dtype: torch.dtype


def export(subject: Subject, target: Path, *, merge: bool, dtype: str | None, kl: float | None = None) -> str:
    """Writes the folder, and returns what there is to say of it.

    Args:
        kl: to the reference, to which the policy is moved first.
    """
    checkpoint = checkpoint_of(subject)
    is_adapter = (checkpoint / "policy" / "adapter_config.json").is_file()
    check_request(subject.args, target, merge=merge, dtype=dtype, is_adapter=is_adapter)
    args, origin = as_trained(subject.args, checkpoint, is_adapter), str(checkpoint)
    if kl is None:
        gap = write(args, checkpoint, target, merge=merge, dtype=dtype, is_adapter=is_adapter)
    else:
        try:
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.moved-") as folder:
                origin += f", moved: {moved_checkpoint(subject, checkpoint, kl, Path(folder))}"
                gc.collect()  # the trainer, before another model is loaded
                gap = write(args, Path(folder), target, merge=merge, dtype=dtype, is_adapter=is_adapter)
        except OSError as error:
            raise ConfigError(f"cannot write {target}: {error}") from error
    return described(target, origin, gap, args)


def write(
    args: SafeConfig, checkpoint: Path, target: Path, *, merge: bool, dtype: str | None, is_adapter: bool
) -> float:
    """Writes the folder, and returns how far the log-probs of what it holds are from the policy's."""
    model, tokenizer = load_policy(args, checkpoint, is_adapter), own_tokenizer(checkpoint / "policy", args)
    sequences = probes(model.get_base_model() if is_adapter else model)
    probe = Probe(sequences, log_probs(model, sequences), model.dtype)
    generation = generation_config(args, model, tokenizer)
    unfinished = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of an export that was killed
    try:
        unfinished.mkdir()
        tokenizer.save_pretrained(unfinished)
        generation.save_pretrained(unfinished)
        if is_adapter and not merge:
            write_adapter(checkpoint / "policy", unfinished, args)
        else:
            model = merged(model) if is_adapter else model
            model.generation_config = generation
            model.to(DTYPES[dtype] if dtype else model.dtype).save_pretrained(unfinished)
        del model  # the check loads another one
        gc.collect()
        gap = check(unfinished, args, tokenizer, probe)
        if target.exists():
            target.rmdir()  # it is empty
        unfinished.rename(target)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return gap


def described(target: Path, origin: str, gap: float, args: SafeConfig) -> str:
    config = target / "adapter_config.json"
    size = sum(path.stat().st_size for path in target.iterdir())
    what, serve = "a whole model", str(target)
    if config.is_file():
        base = json.loads(config.read_text())["base_model_name_or_path"]
        what, serve = f"the adapter, for {base}", f"{base} --enable-lora --lora-modules mine={target}"
    own = {"temperature": args.temperature} | filters_of(args)
    others = [each for each in changing(GenerationConfig.from_pretrained(target)) if each.split()[0] not in own]
    how = ", ".join(f"{name} {value:g}" for name, value in own.items())
    beside = f", beside the model's own {', '.join(others)}, without which it was trained" if others else ""
    return (
        f"{target}: {what}, {size / 1e6:,.1f} MB, of {origin}; loaded again, its log-probs differ by {gap:.2g} "
        f"nats on average from the policy's\nsample at {how}, at which it was trained, as "
        f"generation_config.json says{beside}\ntransformers: AutoModelForCausalLM.from_pretrained({str(target)!r})\n"
        f"vLLM: vllm serve {serve}"
    )


def checkpoint_of(subject: Subject) -> Path:
    if subject.run is None:
        raise ConfigError(f"{subject.name} is not a run folder: it has no config.yaml")
    if subject.checkpoint is not None:
        return subject.checkpoint
    return Checkpoints(subject.run, keep=1).candidates()[0]


def check_request(args: SafeConfig, target: Path, *, merge: bool, dtype: str | None, is_adapter: bool) -> None:
    """What can be known before anything is loaded."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists already: name a new folder")
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent} is no folder: {target.name} would be made in it")
    if merge and not is_adapter:
        raise ConfigError("--merge is for adapters, and this run trained all weights (lora_r 0): leave it out")
    if merge and args.load_in_4bit:
        raise ConfigError(
            "--merge is refused with load_in_4bit: the adapter was trained on weights rounded to 4 bits, and neither "
            "those with it nor the original ones with it are the policy again; leave it out"
        )
    if is_adapter and dtype and not merge:
        raise ConfigError("--dtype is for whole models: an adapter stays in float32, or add --merge")
    if is_adapter:
        require_name("model", args.model)


def as_trained(args: SafeConfig, checkpoint: Path, is_adapter: bool) -> SafeConfig:
    """The settings with the dtype that the frozen weights had, on whatever device that was."""
    weights = identity_of(checkpoint).get("weights", {}) if is_adapter else {}
    found = {kind for kind, _ in weights.values()} & {"float32", "bfloat16"}
    return dataclasses.replace(args, dtype=found.pop()) if len(found) == 1 else args


def load_policy(args: SafeConfig, checkpoint: Path, is_adapter: bool) -> Any:
    """The checkpoint's model; adapters on the base that the run began with."""
    folder = checkpoint / "policy"
    if not is_adapter:
        own = dataclasses.replace(args, model=str(folder), revision=None)
        with loading(str(folder)):
            return load_weights(model_class(config_of(own)), folder, dtype="auto").eval()
    model = adapted(load_model(args, torch.device("cpu")), folder).eval()
    saved = identity_of(checkpoint)
    if "weights" in saved:
        check_fingerprint(saved["weights"], Policy(model).fingerprint(), checkpoint)
    return model


@torch.no_grad()
def log_probs(model: Any, sequences: list[list[int]]) -> Tensor:
    """Of the tokens of some sequences, each alone, by the model's own forward."""
    found = []
    for ids in sequences:
        ids_BT = torch.tensor([ids], device=model.device)
        logits_BTV = model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=False).logits
        found.append(logits_BTV[0, :-1].float().log_softmax(-1).gather(-1, ids_BT[0, 1:, None])[:, 0].cpu())
    return torch.cat(found)


def generation_config(args: SafeConfig, model: Any, tokenizer: Any) -> Any:
    """The model's own as published, with the temperature and the end tokens of training."""
    found = model.generation_config
    if args.model is not None and not args.model.startswith("<"):
        try:
            found = GenerationConfig.from_pretrained(source(args), **where(args))
            found.validate(strict=True)
        except (OSError, ValueError):  # there is none, or one that could not be written
            found = model.generation_config
    own = SimpleNamespace(model=SimpleNamespace(generation_config=found))
    trained = {"temperature": args.temperature} | filters_of(args)
    found.update(**trained, do_sample=bool(found.do_sample) or trained != {"temperature": 1.0})
    found.eos_token_id = end_tokens(own, tokenizer, args) or None  # type: ignore[arg-type]
    found.pad_token_id = found.pad_token_id if found.pad_token_id is not None else tokenizer.pad_token_id
    return found


def merged(model: Any) -> Any:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if adapters.is_wrapper(embeddings) and embeddings.get_base_layer().weight is head.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # what is added is not the head's
    try:
        whole = model.merge_and_unload(safe_merge=True)
    except (NotImplementedError, RuntimeError, ValueError, AttributeError) as error:
        kind = model.peft_config[adapters.active(model)].peft_type.value
        raise ConfigError(f"peft cannot merge this {kind} adapter ({error}): export it without --merge") from error
    is_tied = whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    for config in {id(x): x for x in (whole.config, text_config(whole))}.values():
        if hasattr(config, "tie_word_embeddings"):
            config.tie_word_embeddings = is_tied  # a head that was trained is its own
    return whole


def write_adapter(policy: Path, folder: Path, args: SafeConfig) -> None:
    """The checkpoint's adapter, with the model that it is for where it will be found."""
    for path in policy.glob("adapter_model*"):
        shutil.copy(path, folder)
    config = json.loads((policy / "adapter_config.json").read_text())
    base = Path(source(args))
    config |= {"base_model_name_or_path": str(base.resolve() if base.exists() else base), "revision": args.revision}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def check(folder: Path, args: SafeConfig, tokenizer: Any, probe: Probe) -> float:
    """Loads the folder as anybody would, and returns how far its log-probs are from the right ones."""
    from transformers import AutoTokenizer

    own_args = dataclasses.replace(args, model=str(folder), revision=None)
    is_adapter = (folder / "adapter_config.json").is_file()
    try:
        kind = model_class(config_of(args if is_adapter else own_args))
        options = {"trust_remote_code": args.trust_remote_code}
        own = (
            {"dtype": probe.dtype, **quantised(args, probe.dtype, torch.device("cpu"))}
            if is_adapter
            else {"dtype": "auto"}
        )
        model = kind.from_pretrained(folder, **own, **options).eval()
        again = AutoTokenizer.from_pretrained(folder, **options)
        GenerationConfig.from_pretrained(folder)
        found = log_probs(model, probe.sequences)
    except Exception as error:
        advice = ": --merge writes a whole model" if is_adapter else ""
        raise ConfigError(f"{folder} cannot be loaded: {type(error).__name__}: {error}{advice}") from error
    if (again.chat_template, again.get_vocab()) != (tokenizer.chat_template, tokenizer.get_vocab()):
        raise ConfigError(f"the tokenizer in {folder} is another one when it is loaded again")
    gap, limit = (found - probe.logprobs).abs().mean().item(), max(map(largest_gap, (model.dtype, probe.dtype)))
    if not gap <= limit:
        advice = "--dtype float32 rounds less, and without --merge nothing is added up"
        if is_adapter:
            advice = (
                "transformers, which has code of its own for adapters, gets other log-probs than peft: --merge writes "
                "a whole model"
            )
        raise ConfigError(
            f"{folder}, loaded again, has log-probs that differ by {gap:.2g} nats on average from the policy's, at "
            f"most {limit:g} is rounding: {advice}"
        )
    return gap
