import functools
import os
import sys

import hypothesis
import jinja2
import pytest
import torch

# The same examples everywhere; `--hypothesis-profile=explore` looks for new ones.
hypothesis.settings.register_profile("default", max_examples=20, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("explore", max_examples=500, deadline=None, print_blob=True)
hypothesis.settings.load_profile("default")

BACKENDS = ["torch", "triton"]  # those that are held against the reference


def pytest_configure(config):
    marks = config.option.markexpr
    if "gpu" not in marks or "not gpu" in marks:  # all other tests run as on a machine without a GPU
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}  # before triton is imported
    os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is nowhere is not asked for again and again without a network
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(2)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(params=["reference", *BACKENDS])
def any_backend(request):
    return request.param


@pytest.fixture(params=["reference", "torch"])
def float64_backend(request):
    return request.param


@pytest.fixture(scope="session", autouse=True)
def fast_interpreter():
    from bench.measurement.interpreter import patch_language_once_a_launch

    patch_language_once_a_launch()


@pytest.fixture(scope="session", autouse=True)
def no_pictures():
    """Drawing its report takes longer than the run of a tiny model: who wants to see one asks for `pictures`. And the
    template of peft's model card is compiled once, not at every checkpoint.
    """
    if "safe_train" not in sys.modules:  # tests of kernels alone do without its imports
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safe_train.run.run_folder.write_report", lambda *_: None)
        patch.setattr("jinja2.Template", functools.cache(jinja2.Template))
        yield


@pytest.fixture
def pictures(monkeypatch):
    from safe_train.run.report import write_report

    monkeypatch.setattr("safe_train.run.run_folder.write_report", write_report)


@pytest.fixture
def kernels(monkeypatch):
    """For every test of the kernels: uninitialised memory is NaN, and tiles are so small that a test has many."""
    make_small(monkeypatch)
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fills


def make_small(monkeypatch):
    """Tiles so small that a test has many."""
    from safe_kernels.torch_backend import linear, rows
    from safe_kernels.triton_backend import launch

    monkeypatch.setattr(rows, "TILE_BYTES", 2048)
    monkeypatch.setattr(linear, "PRODUCT_BYTES", 2048)  # of 21 tokens beside 37 logits, 13
    monkeypatch.setattr(linear, "WEIGHT_TILE_BYTES", 1024)
    monkeypatch.setattr(launch, "ROWS_OF_A_TILE", 8)
    monkeypatch.setattr(launch, "ROWS_OF_A_PRODUCT", 16)
    monkeypatch.setattr(launch, "TILE_BYTES", 512)
    monkeypatch.setattr(launch, "SWEEP_BYTES", 2048)
    monkeypatch.setattr(launch, "ROWS", launch.RowChoice(rows=8, columns=16, num_warps=1))
    gemm = launch.GemmChoice(rows=16, columns=16, inner=16, num_warps=1, num_stages=1, split=32)
    monkeypatch.setattr(launch, "gemm_choice", lambda *_: gemm)
    monkeypatch.setattr(launch, "SCAN", launch.ScanChoice(tokens=16, num_warps=1))


@pytest.fixture
def coarse(kernels, monkeypatch):
    """For tests with many tokens or a large vocabulary, which the interpreter could not walk in such small tiles."""
    from safe_kernels.triton_backend import launch

    monkeypatch.setattr(launch, "ROWS", launch.RowChoice(rows=32, columns=1024, num_warps=4))
    monkeypatch.setattr(launch, "ROWS_OF_A_TILE", 64)
    monkeypatch.setattr(launch, "TILE_BYTES", 64 * 512 * 4)
    monkeypatch.setattr(launch, "SWEEP_BYTES", 32 * 1000 * 4)
    monkeypatch.setattr(launch, "SCAN", launch.ScanChoice(tokens=1024, num_warps=8))


@pytest.fixture
def ops_seen(monkeypatch):
    """(op, copies of its arguments) of every op that the public functions and their gradients call."""
    from safe_kernels import (
        distillation,
        linear,
        linear_distillation,
        logits,
        policy_loss,
        safe_terms,
        values,
        vocab_parallel,
    )

    seen = []

    def watched(op):
        def copied(x):
            if not isinstance(x, torch.Tensor):
                return x
            return x.detach().clone().requires_grad_(x.requires_grad and "backward" not in op.name())

        def call(*arguments):
            seen.append((op, tuple(copied(x) for x in arguments)))
            return op(*arguments)

        return call

    modules = (distillation, linear, linear_distillation, logits, policy_loss, safe_terms, values, vocab_parallel)
    for module in modules:
        for name in [name for name in vars(module) if name.endswith("_op")]:
            monkeypatch.setattr(module, name, watched(getattr(module, name)))
    return seen


@pytest.fixture
def all_rows_in_one_program(kernels, monkeypatch):
    """Still several tiles a row; the interpreter's time goes with the number of tiles."""
    from safe_kernels.triton_backend import launch

    monkeypatch.setattr(launch, "ROWS", launch.RowChoice(rows=64, columns=32, num_warps=1))
