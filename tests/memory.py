"""What PyTorch allocates while a block runs, counted operator by operator: the same on every machine."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """`peak`: most bytes alive at once; `largest`: bytes of the largest tensor; `operators`: names of what ran.

    Storages of `known` tensors are not counted. What an operator allocates and frees inside itself is not seen.
    """

    def __init__(self, known=()):
        super().__init__()
        self.alive, self.peak, self.largest = 0, 0, 0
        self.operators: set[str] = set()
        self._storages = {x.untyped_storage()._cdata for x in known if isinstance(x, torch.Tensor)}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        self.operators.add(f"aten.{function.overloadpacket.__name__}")
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self._count(x.untyped_storage())
        return result

    def _count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages.add(key)
        self.alive += size
        self.peak, self.largest = max(self.peak, self.alive), max(self.largest, size)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key, size):
        self._storages.discard(key)
        self.alive -= size
