"""The random numbers of a run: saved with a checkpoint, and each process's own while it samples."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor

from safe_train import parallel

AUTOCAST = ("cpu", "cuda")
DEVICES = ("cuda", "xpu")  # kinds of which a process can use several


def python_generators() -> dict[str, Any]:
    """The states of Python's and NumPy's generators, which rewards may use."""
    numpy: Any = np.random.get_state(legacy=False)
    numpy["state"]["key"] = numpy["state"]["key"].tolist()
    return {"python": random.getstate(), "numpy": numpy}


def torch_generators() -> dict[str, Tensor]:
    """States of PyTorch's generators: the CPU's, and the GPU's if the run uses it."""
    states = {"torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def device_generators() -> dict[str, Any]:
    """The states of PyTorch's generators on all devices of each kind that this process has used."""
    states: dict[str, Any] = {
        name: getattr(torch, name).get_rng_state_all() for name in DEVICES if getattr(torch, name).is_initialized()
    }
    return states | ({"mps": torch.mps.get_rng_state()} if torch.backends.mps.is_available() else {})


def restore_devices(states: dict[str, Any]) -> None:
    for name in DEVICES:
        if name in states:
            getattr(torch, name).set_rng_state_all(states[name])
        else:  # not used before: it starts, when it is, from the seed that the CPU's generator had
            getattr(torch, name).manual_seed_all(torch.initial_seed())
    if "mps" in states:
        torch.mps.set_rng_state(states["mps"])


def restore_generators(states: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    np.random.set_state(numbers["numpy"])
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])
    version, internal, gauss = numbers["python"]
    random.setstate((version, tuple(internal), gauss))


@contextmanager
def own_random_numbers(*numbers: int) -> Iterator[None]:
    """Random numbers that `numbers` and this process's rank decide; afterwards the shared ones go on.

    What all processes draw outside of it is the same on all of them. A process that is alone has one stream for all.
    """
    if parallel.size() == 1:
        yield
        return
    with seeded(seed_of(*numbers, parallel.rank())):
        yield


def seed_of(*numbers: int) -> int:
    """A seed that the numbers decide, and that no neighbouring numbers share, nor fewer or more of them."""
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1)[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and PyTorch's random numbers from `seed`; afterwards those from before go on, on any device."""
    states, devices, numbers = torch_generators(), device_generators(), python_generators()
    set_seed(seed)
    try:
        yield
    finally:
        restore_generators(states, numbers)
        restore_devices(devices)


@contextmanager
def guest(*numbers: int) -> Iterator[None]:
    """For functions of the user's, a reward or a callback, that are called inside of a run.

    They get random numbers that `numbers` and this process's rank decide. Afterwards the run's own go on, and
    PyTorch's switches and the working directory are as they were.
    """
    with seeded(seed_of(*numbers, parallel.rank())), same_switches(), same_directory():
        yield


@contextmanager
def same_directory() -> Iterator[None]:
    """Afterwards the working directory is what it was: the run's relative paths begin there."""
    try:
        folder = os.getcwd()
    except FileNotFoundError:  # somebody deleted it
        yield
        return
    try:
        yield
    finally:
        os.chdir(folder)


@contextmanager
def same_switches() -> Iterator[None]:
    """Afterwards the default dtype and device, whether gradients are recorded, and autocast are what they were."""
    dtype, device, has_gradients = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    autocast = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in AUTOCAST}
    is_cached = torch.is_autocast_cache_enabled()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(None if device.type == "cpu" else device)  # a set one slows each call down
        torch.set_grad_enabled(has_gradients)
        for kind, (is_enabled, own_dtype) in autocast.items():
            torch.set_autocast_enabled(kind, is_enabled)
            torch.set_autocast_dtype(kind, own_dtype)
        torch.set_autocast_cache_enabled(is_cached)
        torch.clear_autocast_cache()  # copies of the policy's weights, which the next step changes


def fingerprint() -> int:
    """A number that differs when the state of PyTorch's generator does."""
    return zlib.crc32(torch.get_rng_state().numpy().tobytes())
