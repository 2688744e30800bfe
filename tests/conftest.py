import os

import hypothesis
import pytest
import torch

# The same examples everywhere; `--hypothesis-profile=explore` looks for new ones.
hypothesis.settings.register_profile("default", max_examples=20, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("explore", max_examples=500, deadline=None, print_blob=True)
hypothesis.settings.load_profile("default")

BACKENDS = ["torch"]  # those that are held against the reference


def pytest_configure():
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(2)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(params=["reference", *BACKENDS])
def any_backend(request):
    return request.param


@pytest.fixture
def kernels(monkeypatch):
    """For every test of the kernels: uninitialised memory is NaN, and tiles are so small that a test has many."""
    from safe_kernels.torch_backend import linear, rows

    monkeypatch.setattr(rows, "TILE_BYTES", 2048)
    monkeypatch.setattr(linear, "WEIGHT_TILE_BYTES", 1024)
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fills
