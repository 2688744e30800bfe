"""The product whose logits stay in registers, and the plain product whose rows are independent."""

import dataclasses
import math

import pytest
import torch
from cases import hold, linear_case, some_mask, temperatures
from triton.tools.tensor_descriptor import TensorDescriptor

from safe_kernels import linear_token_stats
from safe_kernels.inputs import Head, RowStats
from safe_kernels.linear import flat_inputs
from safe_kernels.triton_backend import gemm, launch
from safe_kernels.triton_backend.fused import fused_statistics
from safe_kernels.triton_backend.gemm import product
from safe_kernels.triton_backend.logits import RowInputs

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture
def descriptors(monkeypatch, kernels):
    choice = dataclasses.replace(launch.gemm_choice(), descriptors=True)
    monkeypatch.setattr(launch, "gemm_choice", lambda *_: choice)


def statistics(with_ref_kl=False, **case):
    """The rows of RowStats by name, for arguments of `linear_token_stats` with one leading axis."""
    inputs = flat_inputs(Head(**case), with_ref_kl)
    stats = torch.full((inputs.stats_rows, len(inputs.tokens_N)), math.nan)
    fused_statistics(inputs, RowInputs.of(inputs), stats)
    return dict(zip(RowStats._fields, stats.cpu(), strict=False))


def held(case, vocabulary=37):
    """What `statistics` found, held to the reference."""
    found = statistics(**case)
    exact, plain = (
        linear_token_stats(**{k: converted(x, dtype) for k, x in case.items()}, backend="reference")._asdict()
        for dtype in (torch.float64, None)
    )
    for name, x in exact.items():
        if x is not None:
            hold(name, found[name], plain[name], x, vocabulary)
    return found


def converted(x, dtype):
    is_float = isinstance(x, torch.Tensor) and x.is_floating_point()
    return x.to(dtype) if is_float and dtype is not None else x


def case_of(shape=(21,), reference="shared", **options):
    """With both KLs if there is a reference."""
    return linear_case(shape, reference=reference, with_ref_kl=reference is not None, **options)


HEADS = {
    "plain": {},
    "bias": {"bias": True, "temperature": 0.7},
    "softcap": {"softcap": 5.0, "temperature": 1.3},
    "all": {"bias": True, "softcap": 5.0, "logit_scale": 0.5, "temperature": 0.6},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reference", [None, "shared", "own"])
@pytest.mark.parametrize("head", HEADS)
def test_holds_to_reference(dtype, reference, head):
    held(case_of(dtype=dtype, reference=reference, **HEADS[head]))


@pytest.mark.parametrize("reference", ["shared", "own"])
def test_one_kl_alone(reference):
    """It has the bits that it has beside the other one."""
    case = case_of(reference=reference, **HEADS["all"])
    both = statistics(**case)
    both.pop("ref_kl")
    assert_same(held(case | {"with_ref_kl": False}), both)


@pytest.mark.parametrize("reference", [None, "shared", "own"])
def test_saved_for_the_backward(reference):
    """Peaks and logs of sums are those of the logits."""
    case = case_of(reference=reference, temperature=0.7)
    found = statistics(**case)
    heads = {"": (case["hidden"], case["weight"], 0)}
    if reference is not None:
        own = reference == "own"
        heads["ref_"] = (case["ref_hidden"], case["ref_weight" if own else "weight"], case["ref_bias"] if own else 0)
    for name, (hidden, weight, bias) in heads.items():
        logits = hidden @ weight.T + bias
        torch.testing.assert_close(found[f"{name}peak"], logits.amax(-1))
        log_total = (logits / 0.7).logsumexp(-1) - logits.amax(-1) / 0.7
        torch.testing.assert_close(found[f"{name}log_total"], log_total)


def test_temperature_per_token():
    held(case_of(temperature=temperatures((21,))))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 1), (17, 33, 15), (16, 32, 16), (2, 65, 33)])
@pytest.mark.parametrize("reference", [None, "shared", "own"])
def test_any_size(shape, reference):
    count, vocabulary, width = shape
    held(case_of((count,), vocabulary=vocabulary, width=width, reference=reference), vocabulary)


def test_reference_of_another_width():
    case, other = case_of(reference="own"), case_of(width=40, reference="own", seed=1)
    held(case | {name: other[name] for name in ("ref_hidden", "ref_weight")})


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_hidden_and_weight_of_different_dtypes(dtypes):
    """They meet in float32, as if both had been there."""
    case = case_of(dtype=torch.float16)
    mixed = (
        case | {k: case[k].to(dtypes[0]) for k in ("hidden", "ref_hidden")} | {"weight": case["weight"].to(dtypes[1])}
    )
    whole = {k: converted(x, torch.float32) for k, x in case.items()}
    assert_same(statistics(**mixed), statistics(**whole))


def test_strided_inputs():
    case = case_of(width=24, bias=True)
    apart = {k: torch.stack([case[k], case[k]], -1)[..., 0] for k in ("hidden", "weight", "ref_hidden")}
    wide = {k: torch.cat([case[k], case[k]], -1)[:, :24] for k in ("hidden", "weight", "ref_hidden")}
    whole = statistics(**case)
    assert_same(statistics(**case | apart), whole)
    assert_same(statistics(**case | wide), whole)


@pytest.mark.parametrize("reference", [None, "shared", "own"])
def test_masked_rows(reference):
    """They get zeros, and NaN stays in them; some fill a tile."""
    case = case_of((40,), vocabulary=33, width=8, reference=reference, mask=some_mask((40,)))
    case["mask"][16:32] = False
    for name in ("hidden", "ref_hidden"):
        if name in case:
            case[name][~case["mask"]] = math.nan
    found = statistics(**case)
    alone = {k: x[case["mask"]] if torch.is_tensor(x) and len(x) == 40 else x for k, x in case.items()}
    for name, x in held(alone | {"mask": None}, 33).items():
        assert torch.equal(found[name][case["mask"]], x)
        assert found[name][~case["mask"]].eq(0).all()


def test_a_nan_row_is_nan_alone():
    case = case_of()
    whole = statistics(**case)
    case["hidden"][3, 2] = math.nan
    for name, x in statistics(**case).items():
        assert name not in ("logprob", "entropy", "kl", "ref_kl") or x[3].isnan()
        assert torch.equal(x.index_fill(0, torch.tensor(3), 0), whole[name].index_fill(0, torch.tensor(3), 0))


def test_reference_excludes_what_the_policy_does_not():
    case = case_of(reference="own")
    case["ref_bias"][20] = -math.inf
    assert statistics(**case)["kl"].eq(math.inf).all()
    case["bias"] = torch.zeros(37).index_fill(0, torch.tensor(20), -math.inf)
    case["tokens"][case["tokens"] == 20] = 0
    held(case)
    case["ref_bias"][20] = 0
    assert statistics(**case)["ref_kl"].eq(math.inf).all()


def test_an_id_that_is_no_token():
    case = case_of()
    whole = statistics(**case)
    case["tokens"][5:10] = torch.tensor([-1, 37, 47, 2**32 + 3, -(2**40)])
    for name, x in statistics(**case).items():
        if "logprob" in name:
            assert x[5:10].isnan().all() and x.isnan().sum() == 5
        else:
            assert torch.equal(x, whole[name])


@pytest.mark.parametrize("reference", [None, "shared", "own"])
def test_far_logits(reference):
    """Offsets of -200 and 5000 that every column shares, and splits far apart."""
    case = case_of(reference=reference, bias=True)
    case["bias"] -= 200
    held(case)
    case["bias"][:32] += 150
    held(case)


@pytest.mark.parametrize("reference", [None, "shared", "own"])
def test_descriptors_and_pointers_give_the_same_bits(reference, request, monkeypatch):
    case = case_of(vocabulary=41, width=40, reference=reference, dtype=torch.float16, bias=True)
    pointers = statistics(**case)
    request.getfixturevalue("descriptors")
    seen = []
    monkeypatch.setattr(gemm, "TensorDescriptor", lambda *x: seen.append(x) or TensorDescriptor(*x))
    assert_same(statistics(**case), pointers)
    assert len(seen) == {None: 2, "shared": 3, "own": 4}[reference]


@pytest.mark.parametrize("change", ["odd stride", "odd base"])
@pytest.mark.parametrize("with_larger_tiles", [False, True])
def test_what_no_descriptor_can_describe(change, with_larger_tiles, descriptors, monkeypatch):
    """The choice of tiles is by widths alone: with other tiles the bits would be others."""
    if with_larger_tiles:
        larger = dataclasses.replace(launch.gemm_choice(), columns=32, split=64)
        monkeypatch.setattr(launch, "plain_choice", lambda *_: larger)
    case = case_of(width=16, reference=None)
    whole = statistics(**case)
    if change == "odd stride":
        case["hidden"] = torch.cat([case["hidden"], torch.ones(21, 1)], 1)[:, :16]
    else:
        case["weight"] = torch.cat([torch.ones(1), case["weight"].flatten()])[1:].view(37, 16)
    assert_same(statistics(**case), whole)


@pytest.mark.parametrize("reference", [None, "shared", "own"])
def test_a_row_has_the_same_bits_in_any_company(reference):
    case = case_of((21,), vocabulary=41, width=24, reference=reference, temperature=temperatures((21,)))
    whole = statistics(**case)
    for some in (slice(0, 1), slice(3, 20), torch.tensor([20, 7, 7])):
        assert_same(statistics(**of_rows(case, some)), {name: x[some] for name, x in whole.items()})
    mask = some_mask((21,))
    masked = statistics(**case, mask=mask)
    assert_same({name: x[mask] for name, x in masked.items()}, {name: x[mask] for name, x in whole.items()})


def of_rows(case, some):
    names = ("hidden", "ref_hidden", "tokens", "temperature")
    return case | {name: case[name][some].clone() for name in names if name in case}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert torch.equal(x, expected[name]), name


def test_two_runs_have_the_same_bits():
    case = case_of()
    assert_same(statistics(**case), statistics(**case))


def test_no_tokens():
    assert all(x.shape == (0,) for x in statistics(**case_of((0,))).values())


def products(x, y):
    out = torch.full((x.shape[0], y.shape[1]), math.nan)
    product(x, y, out)
    return out.cpu()


def factors(shape=(21, 40, 37), dtypes=(torch.float32, torch.float32), transposed=(False, False)):
    draw = torch.Generator().manual_seed(0)
    rows, width, columns = shape
    sizes = ((rows, width), (width, columns))
    found = []
    for size, dtype, swap in zip(sizes, dtypes, transposed, strict=True):
        x = torch.randn(size, generator=draw).to(dtype)
        found.append(x.T.contiguous().T if swap else x)
    return found


@pytest.mark.parametrize("bulk", [False, True])
@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("shape", [(21, 40, 37), (1, 1, 1), (16, 16, 16), (33, 24, 32)])
def test_product(shape, transposed, bulk, request):
    if bulk:
        request.getfixturevalue("descriptors")
    x, y = factors(shape, transposed=transposed)
    hold("product", products(x, y), x @ y, x.double() @ y.double(), 1)


@pytest.mark.parametrize(
    "dtypes", [(torch.float16, torch.float16), (torch.float16, torch.float32), (torch.float32, torch.float16)]
)
def test_product_in_low_precision(dtypes):
    x, y = factors(dtypes=dtypes)
    hold("product", products(x, y), x.float() @ y.float(), x.double() @ y.double(), 1)


@pytest.mark.parametrize("transposed", [(False, False), (False, True)])
def test_product_rows_have_the_same_bits_in_any_company(transposed):
    x, y = factors((37, 40, 37), transposed=transposed)
    whole = products(x, y)
    for some in (slice(0, 1), slice(5, 6), slice(3, 30), torch.tensor([36, 7, 7, 20])):
        assert torch.equal(products(x[some].clone(), y), whole[some])
