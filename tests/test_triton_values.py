"""The Triton scan of advantages against the loop of the reference, and what its kernel compiles to."""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from cases import evaluate, hold, some_mask, values_case

import safe_kernels

pytest.importorskip("triton")

BLOCK = 8  # tokens of the tests' blocks: sequences have several
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def values(kernels, monkeypatch):
    from safe_kernels.triton_backend import launch, values

    monkeypatch.setattr(values, "SCAN", launch.ScanChoice(tokens=BLOCK, num_warps=1))
    return values


def scan(values, case):
    case = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in case.items()}
    return {name: x.cpu() for name, x in values.soft_min_gae(**case)._asdict().items()}


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
    from safe_kernels.triton_backend import values

    hold_to_loop(values, values_case((1, values.SCAN.tokens + 3), mask=some_mask((1, values.SCAN.tokens + 3))))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), ()])
def test_empty_shapes(values, shape):
    found = scan(values, values_case((*shape, 0), mask=None))
    assert all(x.shape == (*shape, 0) for x in found.values())


@pytest.mark.parametrize("name", ["v1", "v2", "rewards"])
def test_float64_is_refused(values, name):
    case = values_case(mask=None)
    case[name] = case[name].double()
    with pytest.raises(ValueError, match=f'{name} is torch.float64.*float32.*backend="torch"'):
        scan(values, case)


def test_results_carry_no_gradient(values):
    case = values_case(mask=None)
    case["v1"].requires_grad_()
    assert not any(x.requires_grad for x in scan(values, case).values())


def test_batch_shapes_are_not_specialised_on(values):
    kernel = values.gae_kernel
    names = kernel.do_not_specialize if hasattr(kernel, "do_not_specialize") else kernel.kwargs["do_not_specialize"]
    assert {"T", "gamma", "decay", "alpha"} <= set(names)


def test_kernel_compiles_without_spills():
    """In a process of its own: with the interpreter on there is nothing to compile."""
    here = Path(__file__)
    path = os.pathsep.join([str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", f"import {here.stem}; {here.stem}.print_resources()"]
    env = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for target, resources in json.loads(done.stdout).items():
        print(target, resources)
        assert not any(resources[name] for name in ("STACK", "LOCAL", "spills") if name in resources), target


def print_resources():
    """Of every target, with no optional argument and with all: what the compiled kernel takes."""
    from triton.backends.compiler import GPUTarget

    targets = {f"sm_{capability}": GPUTarget("cuda", capability, 32) for capability in (80, 90, 100)}
    targets["gfx942"] = GPUTarget("hip", "gfx942", 64)
    cases = [(name, target, optional) for name, target in targets.items() for optional in (False, True)]
    print(json.dumps({f"{name} {optional}": compiled_resources(target, optional) for name, target, optional in cases}))


def compiled_resources(target, optional):
    import triton
    from triton.compiler import ASTSource

    from safe_kernels.triton_backend.values import SCAN, gae_kernel

    types = dict.fromkeys(("v1", "v2", "rewards"), "*bf16" if optional else "*fp32")
    types |= {"mask": "*u8", "cu_seqlens": "*i32", "bootstrap": "*fp32"} if optional else {}
    types |= dict.fromkeys(("value", "advantage", "returns"), "*fp32")
    types |= {"T": "i32"} | dict.fromkeys(("gamma", "decay", "alpha"), "fp32")
    names = gae_kernel.arg_names
    source = ASTSource(
        fn=gae_kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(i,): SCAN.tokens if name == "B" else None for i, name in enumerate(names) if name not in types},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name, kind in types.items() if kind[0] == "*"},
    )
    found = triton.compile(source, target=target, options={"num_warps": SCAN.num_warps})
    if target.backend == "hip":
        lines = [line.split(":") for line in found.asm["amdgcn"].splitlines() if line.count(":") == 1]
        counts = {name.strip(): value.strip() for name, value in lines}
        return {
            "REG": int(counts[".vgpr_count"]),
            "LOCAL": int(counts[".private_segment_fixed_size"]),
            "spills": int(counts[".vgpr_spill_count"]) + int(counts[".sgpr_spill_count"]),
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(found.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [tool, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    fields = [field.split(":") for field in usage.split() if field.count(":") == 1]
    return {name: int(value) for name, value in fields if name in ("REG", "STACK", "LOCAL")}
