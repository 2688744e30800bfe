"""The reference policy: the policy that was handed over, and how a resumed run knows that it still is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from safe_train import parallel
from safe_train.adapters import adapter_state
from safe_train.config import ConfigError

Fingerprint = dict[str, list[Any]]  # of each tensor: its dtype, and the sum of its bits as integers

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


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> Fingerprint:
    """What tells weights from others: exact, the same on every device, and cheap."""
    return {name: [str(x.dtype).removeprefix("torch."), bits(x)] for name, x in tensors}


def bits(tensor: Tensor) -> int:
    return int(tensor.detach().contiguous().view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64))


def check_fingerprint(saved: Fingerprint, own: Fingerprint, where: object) -> None:
    """Raises if the run that is to go on has another reference than the one that was saved.

    Weights in another dtype differ by rounding alone, as far as can be told.
    """
    names = sorted(saved.keys() ^ own.keys())
    differ = [name for name in saved.keys() & own.keys() if saved[name] != own[name] and saved[name][0] == own[name][0]]
    found = names or sorted(differ)
    if found:
        raise ConfigError(
            f"{where} does not fit the model: {len(found)} of the weights that are not trained, or of the reference, "
            f"are not those of the run's beginning, such as {found[0]}; pass the model that the run was started with"
        )
