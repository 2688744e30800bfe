"""What PyTorch allocates while a block runs, inside operators too: the same on every machine."""

import itertools
import os
import weakref

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations:
    """Of a CPU. `peak`: most bytes alive at once; `largest`: bytes of one tensor; `operators`: names of what ran."""

    def __enter__(self):
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own notes
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error):
        self._profile.__exit__(*error)
        events = sorted(self._profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        sizes = [event.nbytes() for event in events if event.name() == "[memory]"]  # negative where memory is freed
        self.peak, self.largest = max(0, *itertools.accumulate(sizes)), max(0, *sizes)
        self.operators = {event.name() for event in events}


class FakeAllocations(TorchDispatchMode):
    """`peak`: most bytes of fake tensors alive at once that were made while the block ran."""

    def __init__(self):
        super().__init__()
        self.peak = self._alive = 0
        self._storages = weakref.WeakSet()

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        self._storages.update(storages((arguments, options)))
        results = operator(*arguments, **options or {})
        for storage in storages(results):
            if storage not in self._storages:
                self._storages.add(storage)
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return results

    def _count(self, size):
        self._alive += size
        self.peak = max(self.peak, self._alive)


def storages(tensors):
    return [x.untyped_storage() for x in tree_leaves(tensors) if isinstance(x, torch.Tensor)]
