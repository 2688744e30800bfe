"""Where the parts run."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.measurement import timing
from bench.measurement.cost import Roofs
from bench.measurement.machine import identity
from bench.measurement.rows import Run, now
from bench.measurement.workloads import Workload
from bench.suites.kernels import Settings
from safe_kernels.triton_backend import launch

SECONDS = 0.3  # of repeats for each pass of each provider


@dataclass(frozen=True)
class Place:
    """Where the parts run: on the GPU at full size, or tiny on a CPU in Triton's interpreter."""

    tiny: bool = False
    file: Path = Path()
    commit: str = ""
    site: Path = Path()
    wheels: Path = Path()

    @property
    def device(self) -> str:
        return "cpu" if self.tiny else "cuda"

    @property
    def target(self) -> str:
        """The class of launch choices; Hopper's where a plan is made without a GPU."""
        has_device = self.tiny or torch.cuda.is_available()
        return launch.architecture(torch.device(self.device)) if has_device else "sm_90"

    @functools.cached_property
    def run(self) -> Run:
        return Run(now(), identity(self.device), self.commit, None, self.device)

    def shrink(self, workload: Workload) -> Workload:
        """Itself on the GPU; in the interpreter toy sizes, and no bfloat16, in which it is wrong."""
        if not self.tiny:
            return workload
        if workload.T:
            return replace(workload, N=2 * 40, T=40)
        dtype = "float16" if workload.dtype == "bfloat16" else workload.dtype
        return replace(workload, model="toy", N=3, H=16, V=37, dtype=dtype)

    @functools.cache  # noqa: B019
    def roofs(self, dtype: str) -> Roofs:
        return Roofs(1e11, 1e10) if self.tiny else timing.roofs(dtype, self.device)

    def settings(self, workload: Workload, seconds: float = SECONDS, passes: tuple[str, ...] = ()) -> Settings:
        roofs = {workload.dtype: self.roofs(workload.dtype)}
        return Settings(self.device, 0.0 if self.tiny else seconds, roofs, self.tiny, only_passes=passes)
