"""What the Triton backend asks of PyTorch on a GPU, without one: the tensors have no memory, the kernels do nothing.

Each call must exist for CUDA tensors of these dtypes; and what it allocates is counted.
"""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from memory import FakeAllocations
from torch._subclasses import FakeTensorMode
from triton.runtime.interpreter import InterpretedFunction

from bench.measurement.cost import sum_bytes
from bench.measurement.workloads import FROZEN, TRAINED, Workload
from safe_kernels import reference, triton_backend
from safe_kernels.formulas import Objective
from safe_kernels.inputs import Head, ScanInputs, StatsGrad, TermsInputs
from safe_kernels.linear import flat_inputs
from safe_kernels.logits import flat_inputs as flat_logits
from safe_kernels.policy_loss import weights_of
from safe_kernels.triton_backend import launch

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # only its alignment
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WIDTH = 2048


@pytest.fixture
def rocm(monkeypatch):
    """Its tensors are CUDA's by name, and its build has no product into another dtype."""
    mm = torch.mm

    def without_out_dtype(*factors, **options):
        assert "out_dtype" not in options
        return mm(*factors, **options)

    monkeypatch.setattr(torch.version, "hip", "6.4")
    launch.architecture.cache_clear()
    monkeypatch.setattr(torch, "mm", without_out_dtype)
    monkeypatch.setattr(torch.Tensor, "contiguous", contiguous)


@pytest.fixture(autouse=True)
def a_gpu_that_does_nothing(monkeypatch):
    monkeypatch.setattr(InterpretedFunction, "run", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.Tensor, "__getitem__", item)
    monkeypatch.setattr(torch, "addmm", addmm)
    launch.architecture.cache_clear()
    with FakeTensorMode(), torch.no_grad(), torch.device("cuda"):
        yield
    launch.architecture.cache_clear()


def addmm(total, x, y, *, beta, out_dtype, out):
    """As PyTorch has it for CUDA tensors, whose fake form copies with the C++ of CUDA."""
    assert total is out and total.dtype == out_dtype and x.dtype == y.dtype and x.dtype.itemsize == 2
    return torch.mm(x, y, out_dtype=out_dtype, out=out)


def item(x, key):
    """x[key] of integers, slices and None, without the C++ of CUDA, which a build for CPUs does not have."""
    axis = 0
    for part in key if isinstance(key, tuple) else (key,):
        if isinstance(part, int):
            x = x.select(axis, part)
            continue
        x = x.unsqueeze(axis) if part is None else torch.ops.aten.slice(x, axis, part.start, part.stop)
        axis += 1
    return x


def contiguous(x):
    """Likewise without the C++ of CUDA."""
    return x if x.is_contiguous() else torch.ops.aten.clone(x, memory_format=torch.contiguous_format)


def linear_inputs(count, vocabulary, dtype, reference="shared", *, with_ref_kl=False, masked=False, **options):
    case = {"temperature": 0.7} | options
    if reference != "none":
        case["ref_hidden"] = torch.empty(count, WIDTH, dtype=dtype)
    if reference == "own":
        case["ref_weight"] = torch.empty(vocabulary, WIDTH, dtype=dtype)
        case["bias"], case["ref_bias"] = torch.empty(2, vocabulary, dtype=dtype)
    if masked:
        case |= {"mask": torch.empty(count, dtype=torch.bool), "temperature": torch.empty(count), "softcap": 30.0}
    hidden, weight = torch.empty(count, WIDTH, dtype=dtype), torch.empty(vocabulary, WIDTH, dtype=dtype)
    return flat_inputs(Head(hidden, weight, torch.empty(count, dtype=torch.int64), **case), with_ref_kl)


def objective_of(inputs):
    old_logprob, advantage = torch.empty(2, len(inputs.tokens_N))
    return Objective(*weights_of(inputs, old_logprob, advantage, None), 0.2, 0.2, 0.01, 0.1, 0.1, 0.05, 0.1)


def grads_of(inputs):
    """Of everything that was asked for."""
    return StatsGrad(*torch.empty({4: 2, 8: 3, 9: 4}[inputs.stats_rows], len(inputs.tokens_N)))


def check_gradients(found, inputs, needed):
    for x, leaf, need in zip(found, inputs[:3], needed, strict=True):
        assert (x is None) == (leaf is None or not need)
        assert x is None or (x.shape, x.dtype, x.is_cuda) == (leaf.shape, torch.float32, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reference, rows", [("none", 4), ("shared", 8), ("own", 8), ("shared", 9), ("own", 9)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_hidden_states(dtype, reference, rows, masked, batch_invariant):
    options = {"with_ref_kl": rows == 9, "masked": masked, "batch_invariant": batch_invariant}
    inputs = linear_inputs(128, 5000, dtype, reference, **options)
    stats = triton_backend.linear_statistics(inputs)
    assert (stats.shape, stats.dtype, stats.is_cuda) == ((rows, 128), torch.float32, True)
    for needed in ((True, True, True), (True, False, False)):
        grads = grads_of(inputs)
        check_gradients(triton_backend.linear_gradients(inputs, stats, grads, needed), inputs, needed)
        if reference != "none":
            _, found = triton_backend.linear_loss(inputs, objective_of(inputs), needed)
            check_gradients(found, inputs, needed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_rocm", [False, True])
def test_products_of_a_tile(dtype, is_rocm, request):
    """Of part of a tile, and of its gradient in float32 beside 16 bits."""
    if is_rocm:
        request.getfixturevalue("rocm")
    tile, hidden, weight = (
        torch.empty(128, 4000),
        torch.empty(128, WIDTH, dtype=dtype),
        torch.empty(990, WIDTH).to(dtype),
    )
    part, out = tile[:, 1000:1990], torch.empty(128, WIDTH)
    triton_backend.matrix_product(hidden, weight.T, part)
    triton_backend.matrix_product(part, weight, out)
    triton_backend.matrix_product(part.T, hidden, torch.empty(990, WIDTH))
    assert tile.shape == (128, 4000) and out.is_cuda and out.dtype == torch.float32


def test_hidden_states_beside_a_head_of_another_dtype():
    inputs = linear_inputs(128, 5000, torch.bfloat16)._replace(weight_VH=torch.empty(5000, WIDTH))
    for batch_invariant in (False, True):
        inputs = inputs._replace(batch_invariant=batch_invariant)
        stats = triton_backend.linear_statistics(inputs)
        needed = (True, True, False)
        check_gradients(triton_backend.linear_gradients(inputs, stats, grads_of(inputs), needed), inputs, needed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits(dtype):
    logits, ref_logits = torch.empty(2, 128, 50_257, dtype=dtype)
    tokens = torch.empty(128, dtype=torch.int32)
    inputs = flat_logits(logits, tokens, ref_logits, 1.0, None)
    stats = triton_backend.logits_statistics(inputs)
    assert stats.shape == (8, 128)
    triton_backend.logits_gradient(inputs, stats, grads_of(inputs), logits)


def test_values():
    found = triton_backend.soft_min_gae(ScanInputs(*torch.empty(3, 16, 1500), None, 0.99, 0.95, 0.3, None, None))
    assert [x.shape for x in found] == [(16, 1500)] * 3
    inputs = TermsInputs(*torch.empty(5, 128), None, None, 32, 0.1, None, 0.3, 0.9)
    assert triton_backend.value_terms(torch.empty(128), inputs).shape == (3, 128)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reference, rows", [("none", 4), ("own", 8), ("own", 9)])
def test_hidden_states_on_rocm(dtype, reference, rows, rocm):
    test_hidden_states(dtype, reference, rows, masked=True, batch_invariant=False)


def test_the_reference_on_rocm(rocm):
    rows, weight = torch.empty(3, 8, device="cpu"), torch.empty(5, 8, dtype=torch.bfloat16, device="cpu")
    hidden = SimpleNamespace(dtype=torch.bfloat16, is_cuda=True, float=lambda: rows)
    assert reference._product(hidden, weight).dtype == torch.float32


def test_no_gpu_gets_float32_copies_of_16_bit_factors(monkeypatch):
    """XPU's tensors are not even fake in a build for CPUs: only what chooses the product is asked."""
    asked, xpu = [], {"dtype": torch.bfloat16, "is_cuda": False, "device": SimpleNamespace(type="xpu")}
    monkeypatch.setattr(triton_backend.linear, "product_of_rows", lambda *matrices: asked.append(matrices))
    x, y, out = (SimpleNamespace(**xpu) for _ in range(3))  # a copy would be an AttributeError
    triton_backend.linear.blas_product(x, y, out)
    assert asked == [(x, y, out)]


@pytest.mark.parametrize(
    ("entrance", "part", "most"),
    [("hidden", FROZEN, 1.75e9), ("hidden", TRAINED, 7.2e9), ("loss", FROZEN, 0.14e9), ("loss", TRAINED, 32e9)],
)
def test_bytes_of_the_sums(entrance, part, most, monkeypatch):
    """What adding products to float32 sums moves at 8192 x 151,936 x 2048, as the cost model says."""
    workload, moved = Workload(entrance, "", 8192, WIDTH, 151_936, dtype="bfloat16"), []

    def counted(total, product, x, y, factor, beta=1):
        moved.append(total.numel() * 4 * (1 + beta))

    monkeypatch.setattr(triton_backend.linear, "add_product", counted)
    inputs, needed = linear_inputs(8192, 151_936, torch.bfloat16, "none"), (True, part == TRAINED, False)
    if entrance == "loss":
        triton_backend.linear_loss(inputs, objective_of(inputs), needed)
    else:
        stats = triton_backend.linear_statistics(inputs)
        triton_backend.linear_gradients(inputs, stats, grads_of(inputs), needed)
    assert sum(moved) == sum_bytes(workload, part)
    assert sum_bytes(dataclasses.replace(workload, H=2048), part) <= most


@pytest.mark.parametrize("needed", [(True, False, False), (True, True, True)])
@pytest.mark.parametrize("kept", [0, 100, 256])
def test_kept_logits(kept, needed):
    inputs = linear_inputs(256, 5000, torch.bfloat16, "own")
    rows = triton_backend.kept_rows(inputs, kept * 8 * 5000)
    assert rows == {0: 0, 100: 0, 256: 256}[kept]
    logits = torch.empty(2, rows, 5000)
    stats = triton_backend.linear_statistics(inputs, logits)
    found = triton_backend.linear_gradients(inputs, stats, grads_of(inputs), needed, logits)
    check_gradients(found, inputs, needed)


@pytest.mark.parametrize(("closed_form", "limit"), [(False, 400e6), (True, 1.2e9)])
@pytest.mark.parametrize("build", ["cuda", "rocm"])
def test_memory_with_a_frozen_head(closed_form, limit, build, request):
    """As `test_gpu.py` measures it on a GPU: 8192 tokens with KL, whose logits alone would take 2.5 GB."""
    if build == "rocm":
        request.getfixturevalue("rocm")
    inputs, needed = linear_inputs(8192, 151_936, torch.bfloat16), (True, False, False)
    with FakeAllocations() as seen:
        if closed_form:
            triton_backend.linear_loss(inputs, objective_of(inputs), needed)
        else:
            stats = triton_backend.linear_statistics(inputs)
            triton_backend.linear_gradients(inputs, stats, grads_of(inputs), needed)
    assert limit / 2 < seen.peak <= limit
