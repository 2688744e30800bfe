"""The reference policy: the policy that was handed over, and how a resumed run knows that it still is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from safe_train import parallel
from safe_train.config import ConfigError
from safe_train.models.adapters import adapter_state

Fingerprint = dict[str, list[Any]]  # of each tensor: its dtype, and a checksum of its bits
Identity = dict[str, Any]

# Settings in a model's config that no logit of the run depends on. Rates of dropout are 0 by the time it is read.
NOT_COMPUTED = set(
    "_name_or_path architectures bos_token_id dtype eos_token_id pad_token_id torch_dtype transformers_version "
    "use_cache".split()
)
CHUNK = 2**20

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class HandedOver:
    """The values with which an adapter's trained tensors were handed over, to be put in place for the reference."""

    def __init__(self, model: Any, adapter: Mapping[str, Tensor] | None = None):
        # Under their names in a checkpoint, whole, on rank 0: what sharded processes hold later are parts.
        own = {} if adapter is not None else adapter_state(model)
        self.adapter = dict(adapter or {name: parallel.cpu_on_main(x.detach().clone()) for name, x in own.items()})
        self.head = trained_head(model.get_output_embeddings())
        self.keep([p for p in model.parameters() if p.requires_grad])

    def keep(
        self, parameters: Iterable[nn.Parameter], replacing: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        """Takes the parameters' values of now, in the parts that this process stores; see `Engine.replacing`."""
        self.parameters, self.replacing = list(parameters), replacing
        self.values = [stored(p).clone() for p in self.parameters]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the policy is the one that was handed over."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        with self.replacing():
            for parameter, value in zip(self.parameters, self.values, strict=True):
                current = stored(parameter)
                other = current.clone()
                current.copy_(value)
                value.copy_(other)

    def head_arguments(self, head: Mapping[str, Any]) -> dict[str, Any]:
        """The reference's own head, for the `safe_kernels.linear_*` functions, if the policy's is trained."""
        if not self.head:
            return {}
        own = {name: x.to(head[name]) for name, x in self.head.items()}
        return {"ref_" + name: own.get(name, head[name]) for name in ("weight", "bias")}


def trained_head(head: nn.Module) -> dict[str, Tensor]:
    tensors = {name: getattr(head, name, None) for name in ("weight", "bias")}
    return {name: whole(x).detach().clone() for name, x in tensors.items() if x is not None and x.requires_grad}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def stored(parameter: Tensor) -> Tensor:
    """What this process stores of a parameter, which under FSDP2 and ZeRO-3 is a part of it."""
    part = getattr(parameter, "ds_tensor", parameter)
    return part.to_local().data if isinstance(part, DTensor) else part.data


def identity(policy: Any, tokenizer: Any, reference: str) -> Identity:
    """What a run must have again to go on: the reference's weights, the model's config, the tokenizer's vocabulary."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return {
        "weights": policy.fingerprint(),
        "buffers": policy.fingerprint(saved_buffers),
        "config": json.loads(json.dumps(computed(policy.causal_lm.config.to_dict()), default=str)),
        "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "reference": reference,
    }


def saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds beside parameters, such as a router's biases. Other buffers follow from the config."""
    saved = model.state_dict(keep_vars=True)
    return ((name, x) for name, x in model.named_buffers() if name in saved)


def computed(settings: Any) -> Any:
    """The settings of a model, and of its parts, on which its logits may depend."""
    if not isinstance(settings, dict):
        return settings
    return {str(name): computed(x) for name, x in settings.items() if name not in NOT_COMPUTED}


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> Fingerprint:
    """What tells weights from others: exact, the same on every device, and cheap."""
    return {name: [str(x.dtype).removeprefix("torch."), checksum(x)] for name, x in tensors}


def checksum(tensor: Tensor) -> int:
    """A sum, modulo 2^64, of the bits of the numbers, each times an odd factor that depends on its position."""
    chunks = tensor.detach().contiguous().view(-1).view(INTEGERS[tensor.element_size()]).split(CHUNK)
    longest = max(len(chunks), len(chunks[0]))
    factors = torch.arange(1, longest + 1, device=tensor.device) * 0x1E3779B97F4A7C15
    factors = (factors ^ (factors >> 29)) | 1
    sums = torch.stack([(chunk * factors[: len(chunk)]).sum() for chunk in chunks])
    return int((sums * factors[: len(sums)]).sum())


def check_identity(saved: Identity, own: Identity, where: object) -> None:
    """Raises if the run that is to go on has another model or reference than the one that was saved."""
    if saved["reference"] != own["reference"]:
        raise ConfigError(
            f"{where} is of a run with reference {saved['reference']}, this one has {own['reference']}: set it back"
        )
    check_fingerprint(saved["weights"], own["weights"], where)
    if "buffers" in saved:  # which earlier versions did not look at
        check_fingerprint(saved["buffers"], own["buffers"], where)
    there, here = saved["config"], own["config"]
    differ = sorted(x for x in there.keys() | here.keys() if there.get(x) != here.get(x))
    if differ:
        name = differ[0]
        raise ConfigError(
            f"{where} does not fit the model: its config has {name} {here.get(name)}, at the run's beginning "
            f"{there.get(name)}; pass the model that the run was started with"
        )
    if saved["vocabulary"] != own["vocabulary"]:
        raise ConfigError(
            f"{where} does not fit the tokenizer: its vocabulary is not that of the run's beginning; pass the "
            "tokenizer that the run was started with"
        )


def check_fingerprint(saved: Fingerprint, own: Fingerprint, where: object) -> None:
    names = sorted(saved.keys() ^ own.keys())
    cast = sorted(name for name in saved.keys() & own.keys() if saved[name][0] != own[name][0])
    if cast and not names:
        raise ConfigError(
            f"{where} does not fit the model: {cast[0]} is in {own[cast[0]][0]}, at the run's beginning it was in "
            f"{saved[cast[0]][0]}; set dtype, or load the model in it"
        )
    found = names or sorted(name for name in saved if saved[name] != own[name])
    if found:
        raise ConfigError(
            f"{where} does not fit the model: {len(found)} of the weights that are not trained, or of the reference, "
            f"are not those of the run's beginning, such as {found[0]}; pass the model that the run was started with"
        )
