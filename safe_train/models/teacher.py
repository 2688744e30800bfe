"""The teacher of `algorithm: distill`: a frozen model with the policy's tokenizer, of any width and family."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from safe_train import parallel
from safe_train.config import ConfigError, SafeConfig
from safe_train.data.batches import TokenBatch
from safe_train.models.checks import check_head
from safe_train.models.determinism import switch_off_randomness
from safe_train.models.layout import choose_layout
from safe_train.models.policy import Policy, prepare_backbone
from safe_train.models.pretrained import load_model, load_tokenizer, loading
from safe_train.randomness import seeded


class Teaches(Protocol):
    def teach(self, batch: TokenBatch) -> dict[str, Any]:
        """What the loss takes of a teacher for the response tokens of a batch."""


class Teacher(Policy):
    """A model that is read as the policy is: its hidden states, and its head inside the kernels. It never trains."""

    def __init__(self, model: Any, args: SafeConfig, device: torch.device):
        nn.Module.__init__(self)
        prepare_backbone(model, args, device, model.dtype)
        switch_off_randomness(model)
        self.model, self.temperature, self.compute_dtype = model, args.temperature, model.dtype
        self.is_lora, self.frozen_copies, self.began_trained, self.handed_over = False, [], False, None
        self.logit_transform: dict[str, Any] = {}
        with seeded(0):
            check_head(self)
        self.layout = choose_layout(args, model)
        self.shared_vocabulary: int | None = None
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def teach(self, batch: TokenBatch) -> dict[str, Any]:
        """What `linear_distillation_loss` takes of a teacher for the response tokens of a batch."""
        own = {f"teacher_{name}": x for name, x in self.head().items()}
        return {"teacher_hidden": self(batch), "shared_vocabulary": self.shared_vocabulary, **own}


def load_teacher(args: SafeConfig, policy: Policy, tokenizer: Any, device: torch.device) -> Teacher | None:
    """The model that `teacher` names, whole on each process; None without one.

    Raises:
        ConfigError: it cannot be loaded, has another tokenizer than the policy, or fewer rows in its head.
    """
    if args.teacher is None:
        return None
    named = dataclasses.replace(args, model=args.teacher, revision=args.teacher_revision)
    base = base_of(named) if is_adapter(args.teacher) else named
    has_tokenizer = (Path(args.teacher) / "tokenizer_config.json").is_file()
    check_tokenizer(tokenizer, load_tokenizer(named if has_tokenizer else base), args.teacher)
    with loading(args.teacher, "teacher"):
        model = load_model(base, device)
        if base is not named:
            model = merged(model, args.teacher)
    teacher = Teacher(model.to(device), args, device)
    own, others = (len(each.head()["weight"]) for each in (policy, teacher))
    if own > others:
        raise ConfigError(
            f"the policy's head has {own} rows and the teacher's {others}: the policy could sample an id that the "
            f"teacher has no embedding for. Take a teacher with as many, or give the policy {others} by its "
            "resize_token_embeddings"
        )
    if own < others:
        teacher.shared_vocabulary = own
        parallel.say(
            f"the heads of policy and teacher have {own} and {others} rows for one tokenizer: the divergence is over "
            f"the first {own}"
        )
    return teacher


def is_adapter(name: str) -> bool:
    return (Path(name) / "adapter_config.json").is_file()


def base_of(adapter: SafeConfig) -> SafeConfig:
    """The settings with the model that an adapter is for."""
    import peft

    base = peft.PeftConfig.from_pretrained(str(adapter.model)).base_model_name_or_path
    return dataclasses.replace(adapter, model=base, revision=None)


def merged(model: Any, adapter: str) -> Any:
    import peft

    return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()


def check_tokenizer(own: Any, other: Any, name: str) -> None:
    mine, theirs = own.get_vocab(), other.get_vocab()
    different = sorted(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token))
    if different:
        raise ConfigError(
            f"the teacher {name!r} has another tokenizer than the policy ({type(other).__name__} with {len(theirs)} "
            f"tokens, {type(own).__name__} with {len(mine)}): {len(different)} tokens have other ids, such as "
            f"{different[0]!r}. Take a teacher of the policy's family; text cannot stand in for ids here"
        )
