"""A driver of Triton without a device: kernels are compiled for sm_90, loaded nowhere, and a launch does nothing.

With it, the time of a call is the host's alone: everything that Python does before, between and after the launches.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

import safe_kernels.triton_backend  # noqa: F401  before the variable below is set, so that its kernels are compiled

DEVICE = -1  # a number that no device has: Triton keeps compiled kernels by it
PROPERTIES = {"max_shared_mem": 232_448, "max_num_regs": 65_536, "multiprocessor_count": 132, "warpSize": 32}


class Driver(DriverBase):
    def __init__(self) -> None:
        self.launches = 0
        self.utils = self  # what loads binaries

    @classmethod
    def is_active(cls) -> bool:
        return True

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return self._launch

    def _launch(self, *arguments: Any) -> None:
        self.launches += 1

    def load_binary(self, *arguments: Any) -> tuple[int, int, int, int, int]:
        return 0, 0, 32, 0, 1024  # module, function, registers, spills, threads at most

    def get_device_properties(self, device: int) -> dict[str, int]:
        return PROPERTIES

    def get_current_device(self) -> int:
        return DEVICE

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing can be timed on no device")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty


@triton.jit
def _empty() -> None:
    pass


def empty_launch() -> None:
    _empty[(1,)]()


@contextlib.contextmanager
def no_device() -> Iterator[Driver]:
    """CPU tensors may go to the Triton backend, as to its interpreter."""
    if not isinstance(_empty, triton.JITFunction):
        raise NotImplementedError("Triton was imported with TRITON_INTERPRET=1, and compiles nothing")
    driver = Driver()
    interpreted = mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"})
    with interpreted, mock.patch.dict(vars(triton.runtime.driver)):
        triton.runtime.driver.set_active(driver)
        yield driver
