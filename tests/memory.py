"""What PyTorch allocates on the CPU while a block runs, inside operators too: the same on every machine."""

import itertools
import os

from torch.profiler import ProfilerActivity, profile


class Allocations:
    """`peak`: most bytes alive at once; `largest`: bytes of the largest allocation; `operators`: names of what ran."""

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
