"""What `safe-train eval` and `export` work on: a run, one of its checkpoints, or any model or adapter without a run."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from safe_train.config import ConfigError, SafeConfig
from safe_train.models.policy import Policy
from safe_train.models.pretrained import load_model, load_tokenizer, loading
from safe_train.run.checkpoint import Contents, named
from safe_train.run.checkpoints import Checkpoints


class Subject(NamedTuple):
    args: SafeConfig
    name: str
    run: Path | None = None
    checkpoint: Path | None = None  # of the run; None: the newest
    adapter: Path | None = None  # without a run, around the model that args names

    def contents(self, policy: Policy) -> tuple[Path, Contents]:
        """The checkpoint, and what is in it."""
        assert self.run is not None
        path = self.checkpoint
        found = (path, named(path, policy)) if path else Checkpoints(self.run, keep=1).newest(policy)
        if found is None:
            raise ConfigError(f"{self.run} has no complete checkpoint")
        return found

    def objects(self) -> dict[str, Any]:
        """What a trainer takes beside the settings: the kind of a run's adapter; an adapter's model and tokenizer."""
        if self.run is not None:
            folder = (self.checkpoint or Checkpoints(self.run, keep=1).candidates()[0]) / "policy"
            return {"peft_config": saved_kind(folder)} if (folder / "adapter_config.json").is_file() else {}
        if self.adapter is None:
            return {}
        device = torch.device("cuda" if torch.cuda.is_available() and not self.args.use_cpu else "cpu")
        model = adapted(load_model(self.args, device), self.adapter)
        return {"model": model, "processing_class": own_tokenizer(self.adapter, self.args)}


def find(what: str, checkpoint: str | None, config: str | None, overrides: Sequence[str]) -> Subject:
    """What the word names: a folder of a run or a checkpoint, of a model or adapter, or a model of the Hub."""
    path = Path(what).expanduser()
    run = run_of(path)
    if run is not None:
        if config is not None:
            raise ConfigError(f"{run} has settings of its own: give others as key=value, not by --config")
        if path != run and checkpoint is not None:
            raise ConfigError(f"{path} is one checkpoint, and --checkpoint {checkpoint} another: give the run, {run}")
        args = SafeConfig.load(run / "config.yaml", [f"output_dir={run}", *overrides])
        return Subject(args, run.name, run, path if run != path else chosen(run, checkpoint))
    if checkpoint is not None:
        raise ConfigError(f"--checkpoint is of a run, and {path} is not a run folder: it has no config.yaml")
    name = path.resolve().name if path.exists() else what.replace("/", "--")
    if (path / "state.json").is_file():  # a checkpoint that was taken out of its run
        path = path / "policy"
    check_model_folder(path, what)
    if (path / "adapter_config.json").is_file():
        return Subject(adapters_settings(path, config, overrides), name, adapter=path)
    return Subject(SafeConfig.load(config, [f"model={path if path.exists() else what}", *overrides]), name)


def run_of(path: Path) -> Path | None:
    """The run of a folder, or of a checkpoint in it."""
    candidates = [path, path.parent.parent] if (path / "state.json").is_file() else [path]
    return next((each for each in candidates if (each / "config.yaml").is_file()), None)


def chosen(run: Path, checkpoint: str | None) -> Path | None:
    """The checkpoint of that number, or the best one; None for the newest."""
    folders = {"checkpoints": Checkpoints(run, keep=1), "best": Checkpoints(run, keep=1, name="best")}
    complete = [path for each in folders.values() for path in each.complete()]
    if not complete:
        raise ConfigError(f"{run} has no complete checkpoint")
    if checkpoint is None:
        return None
    if checkpoint == "best":
        found = folders["best"].complete()
    else:
        found = [path for path in complete if path.name == f"step-{checkpoint}"]
    if not found:
        names = ", ".join(f"{path.parent.name}/{path.name}" for path in complete)
        raise ConfigError(f"{run} has no checkpoint {checkpoint}, but {names}: give a step's number, or best")
    return found[0]


def check_model_folder(path: Path, what: str) -> None:
    is_name = not path.is_absolute() and what.count("/") <= 1 and not what.startswith((".", "~"))
    if path.exists() or not is_name:
        if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise ConfigError(
                f"{path} is not a run folder (no config.yaml), not a checkpoint (no state.json), and no model (no "
                "config.json or adapter_config.json)"
            )


def adapters_settings(path: Path, config: str | None, overrides: Sequence[str]) -> SafeConfig:
    """Those of an adapter without a run: KL is to the model that it is for, which `model` may name anew."""
    import peft

    with loading(str(path)):
        base = peft.PeftConfig.from_pretrained(str(path)).base_model_name_or_path
    return SafeConfig.load(config, [f"model={base}", "reference=base", *overrides])


def saved_kind(folder: Path) -> Any:
    """The settings of a saved adapter, which may have been given in Python, for a new one."""
    import peft

    with loading(str(folder)):
        config = peft.PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    return config


def adapted(base: Any, adapter: Path) -> Any:
    """The model with the adapter of a folder, which may have embeddings for more tokens than the model had."""
    import peft

    embeddings = base.get_input_embeddings()
    name = next(name for name, module in base.named_modules() if module is embeddings)
    with loading(str(adapter)):
        own = peft.load_peft_weights(str(adapter), device="cpu").get(f"base_model.model.{name}.weight")
    if own is not None and len(own) != len(embeddings.weight):
        base.resize_token_embeddings(len(own), mean_resizing=False)
    with loading(str(adapter)), warnings.catch_warnings():  # peft asks transformers under a name that it drops
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return peft.PeftModel.from_pretrained(base, str(adapter), is_trainable=True)


def own_tokenizer(folder: Path, args: SafeConfig) -> Any:
    """The folder's tokenizer; that of the model where it has none."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        return load_tokenizer(args)
    with loading(str(folder)):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=args.trust_remote_code)


def for_evaluation(subject: Subject, output_dir: str) -> SafeConfig:
    """The settings with which only held-out prompts are read."""
    args = subject.args
    if args.eval_dataset is None:
        raise ConfigError("an evaluation needs held-out prompts: set eval_dataset")
    return replace(args, dataset=args.eval_dataset, output_dir=output_dir)
