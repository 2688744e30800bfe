"""The Triton scan of advantages against the loop of the reference, and what its kernel compiles to."""

import math

import pytest
import torch
from cases import evaluate, hold, hold_to_reference, linear_case, logits_case, some_mask, values_case

import safe_kernels

pytest.importorskip("triton")

BLOCK = 8  # tokens of the tests' blocks: sequences have several


@pytest.fixture
def values(kernels, monkeypatch):
    from safe_kernels.triton_backend import launch, values

    monkeypatch.setattr(launch, "SCAN", launch.ScanChoice(tokens=BLOCK, num_warps=1))
    return values


def scan(values, case):
    return {name: x.cpu() for name, x in safe_kernels.soft_min_gae(**case, backend="triton")._asdict().items()}


def hold_to_loop(values, case):
    exact = evaluate(safe_kernels.soft_min_gae, case, "reference", dtype=torch.float64)
    plain = evaluate(safe_kernels.soft_min_gae, case, "reference")
    found = scan(values, case)
    for name, x in found.items():
        assert x.dtype == torch.float32 and x.shape == exact[name].shape, name
        hold(name, x, plain[name], exact[name], case["v1"].shape[-1])
        assert case["mask"] is None or x[~case["mask"]].eq(0).all(), name
    return found


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 2])
@pytest.mark.parametrize("masked", [False, True])
def test_scan_is_the_loop(values, length, masked):
    mask = some_mask((2, length)) if masked else None
    for gamma, lam in ((1.0, 0.95), (0.9, 1.0), (0.99, 0.0), (0.0, 0.5)):
        hold_to_loop(values, values_case((2, length), mask=mask, gamma=gamma, lam=lam))
    hold_to_loop(values, values_case((2, length), mask=mask, bootstrap=torch.tensor([0.5, -1.0])))


@pytest.mark.parametrize("bounds", [[0, 21], [0, 1, 1, 19, 21], [0, 0, 9, 21, 21]])
@pytest.mark.parametrize("masked", [False, True])
def test_packed_scan_is_the_loop(values, bounds, masked):
    case = values_case((21,), mask=some_mask((21,)) if masked else None, gamma=0.9)
    case |= {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32), "bootstrap": torch.linspace(-1, 1, len(bounds) - 1)}
    hold_to_loop(values, case)


def test_masked_blocks_are_skipped(values):
    """Whole blocks, the last tokens, the first ones, every token."""
    mask = torch.ones(4, 4 * BLOCK, dtype=torch.bool)
    mask[0, BLOCK - 2 : 3 * BLOCK + 1] = False
    mask[1, BLOCK:] = False
    mask[2, : 2 * BLOCK + 3] = False
    mask[3] = False
    found = hold_to_loop(values, values_case((4, 4 * BLOCK), mask=mask, gamma=0.9, bootstrap=torch.arange(4.0)))
    assert all(x[3].eq(0).all() for x in found.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(values, dtype):
    case = values_case((2, 11), dtype=dtype, mask=some_mask((2, 11)), bootstrap=torch.ones(2, dtype=dtype))
    low = scan(values, case)
    full = scan(values, {name: x.float() if x.is_floating_point() else x for name, x in case.items()})
    assert all(torch.equal(low[name], x) for name, x in full.items())


@pytest.mark.parametrize("alpha", [1e-3, 100.0])
def test_any_gap_between_the_critics(values, alpha):
    case = values_case((1, 4), mask=None, alpha=alpha)
    case["v1"][:] = torch.tensor([0.0, 1e4, -1e4, 3.0])
    case["v2"][:] = torch.tensor([0.0, -1e4, 1e4, 3.0])
    hold_to_loop(values, case)


def test_any_strides(values):
    case = values_case((3, 2, 11), mask=some_mask((3, 2, 11)), bootstrap=torch.arange(6.0).view(3, 2))
    strided = {name: x.mT.contiguous().mT for name, x in case.items()}
    strided["rewards"] = case["rewards"] = case["rewards"][:, :1, :1].expand(3, 2, 11)
    strided["bootstrap"] = case["bootstrap"].T.contiguous().T
    case["rewards"] = case["rewards"].contiguous()
    contiguous = scan(values, case)
    assert all(torch.equal(x, contiguous[name]) for name, x in scan(values, strided).items())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_masked_tokens_spread_nothing(values, bad):
    mask = some_mask((2, 21))
    case = values_case((2, 21), mask=mask)
    clean = scan(values, case)
    for name in ("v1", "v2", "rewards"):
        case[name][~mask] = bad
    assert all(torch.equal(x, clean[name]) for name, x in scan(values, case).items())


def test_nothing_crosses_the_end_of_a_sequence(values):
    case = values_case((21,), cu_seqlens=torch.tensor([0, 3, 21], dtype=torch.int32), mask=None)
    clean = scan(values, case)
    case["rewards"][4] = math.nan
    for name, x in scan(values, case).items():
        assert torch.equal(x[:3], clean[name][:3]) and torch.equal(x[5:], clean[name][5:]), name


def test_bits_do_not_depend_on_other_sequences_or_the_layout(values):
    case = values_case((3, 21), mask=some_mask((3, 21)))
    batch = scan(values, case)
    assert all(torch.equal(x, batch[name]) for name, x in scan(values, case).items())
    packed = {name: x.flatten() for name, x in case.items()}
    packed["cu_seqlens"] = torch.arange(0, 64, 21, dtype=torch.int32)
    assert all(torch.equal(x, batch[name].flatten()) for name, x in scan(values, packed).items())
    for row in range(3):
        alone = scan(values, {name: x[row] for name, x in case.items()})
        assert all(torch.equal(x, batch[name][row]) for name, x in alone.items())


def test_the_block_of_launch_py():
    from safe_kernels.triton_backend import launch, values

    hold_to_loop(values, values_case((1, launch.SCAN.tokens + 3), mask=some_mask((1, launch.SCAN.tokens + 3))))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), ()])
def test_empty_shapes(values, shape):
    found = scan(values, values_case((*shape, 0), mask=None))
    assert all(x.shape == (*shape, 0) for x in found.values())


def test_float64_is_refused(values):
    """Of what a value is computed from; beside a float32 `v1` the others are rounded (test_contract.py)."""
    case = values_case(mask=None)
    case["v1"] = case["v1"].double()
    with pytest.raises(ValueError, match="float32; float64 inputs need backend 'torch'"):
        scan(values, case)


def test_results_carry_no_gradient(values):
    case = values_case(mask=None)
    case["v1"].requires_grad_()
    assert not any(x.requires_grad for x in scan(values, case).values())


def test_batch_shapes_are_not_specialised_on(values):
    kernel = values.gae_kernel
    names = kernel.do_not_specialize if hasattr(kernel, "do_not_specialize") else kernel.kwargs["do_not_specialize"]
    assert {"T", "gamma", "decay", "alpha"} <= set(names)


@pytest.mark.parametrize("entrance", [safe_kernels.safe_terms, safe_kernels.linear_safe_terms])
@pytest.mark.parametrize("packed", [False, True])
def test_the_next_live_token_may_be_blocks_away(entrance, packed):
    """Gaps of more than the 32 tokens, and packs of more than the 32 sequences, that are looked at together."""
    shape = (140,) if packed else (2, 70)
    draw = torch.Generator().manual_seed(0)
    case = (logits_case if entrance is safe_kernels.safe_terms else linear_case)(shape, 5)
    case |= values_case(shape) | {"kl_threshold": 0.1, "alpha": 0.3, "gamma": 0.9}
    case["mask"] = torch.rand(shape, generator=draw) > 0.93
    if packed:
        bounds = torch.cat([torch.tensor([0, 140]), torch.randint(100, (40,), generator=draw)])  # some are empty
        case["cu_seqlens"] = bounds.sort().values.int()
    hold_to_reference(entrance, case, "triton", vocabulary=5)
