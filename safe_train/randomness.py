"""The random numbers of a run: saved with a checkpoint, and each process's own while it samples."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor

from safe_train import parallel


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


def restore_generators(states: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    np.random.set_state(numbers["numpy"])
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])
    version, internal, gauss = numbers["python"]
    random.setstate((version, tuple(internal), gauss))


@contextmanager
def own_random_numbers(seed: int, step: int) -> Iterator[None]:
    """Random numbers that the seed, the step and this process's rank decide; afterwards the shared ones go on.

    What all processes draw outside of it is the same on all of them. A process that is alone has one stream for all.
    """
    if parallel.size() == 1:
        yield
        return
    with seeded(seed_of(seed, step, parallel.rank())):
        yield


def seed_of(*numbers: int) -> int:
    """A seed that the numbers decide, and that no neighbouring numbers share, nor fewer or more of them."""
    return int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1)[0])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, NumPy's and PyTorch's random numbers from `seed`; afterwards those from before go on."""
    shared = torch_generators(), python_generators()
    set_seed(seed)
    try:
        yield
    finally:
        restore_generators(*shared)
