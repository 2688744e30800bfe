"""Soft-min values, their advantages and targets: the scan against the loop."""

import math

import pytest
import torch
from cases import evaluate, hold, hold_to_reference, linear_case, logits_case, some_mask, values_case
from torch._subclasses.fake_tensor import FakeTensorMode

from safe_kernels import (
    linear_safe_terms,
    linear_token_stats,
    reference,
    safe_terms,
    soft_min,
    soft_min_gae,
    token_stats,
)

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [1e-3, 0.3, 100.0])
def test_soft_min_is_the_logarithm_of_a_mean(any_backend, dtype, alpha):
    """Written out in both dtypes: every backend may share one function."""
    case = values_case(dtype=dtype, alpha=alpha)
    case.pop("rewards")
    case["v2"].view(-1)[:3] = case["v1"].view(-1)[:3]

    def written_out(v1, v2, alpha, backend):
        v1, v2 = (v.to(torch.promote_types(v.dtype, torch.float32)) for v in (v1, v2))
        return -alpha * (torch.logaddexp(-v1 / alpha, -v2 / alpha) - math.log(2))

    exact = evaluate(written_out, case, None, ["v1", "v2"], torch.float64)
    plain = evaluate(written_out, case, None, ["v1", "v2"])
    for name, x in evaluate(soft_min, case, any_backend, ["v1", "v2"]).items():
        hold(name, x, plain[name], exact[name], vocabulary=2)


def test_soft_min_gradcheck(float64_backend):
    v = [torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda v1, v2: soft_min(v1, v2, 0.3, backend=float64_backend), v)


@pytest.mark.parametrize("length", [1, 2, 7, 64, 100])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bootstrap", [None, torch.tensor([0.5, -1.0, 2.0])])
def test_scan_is_the_loop(backend, length, masked, bootstrap):
    mask = some_mask((3, length)) if masked else None
    for gamma, lam in ((1.0, 0.95), (0.9, 1.0), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5)):
        case = values_case((3, length), mask=mask, gamma=gamma, lam=lam, bootstrap=bootstrap)
        hold_to_reference(soft_min_gae, case, backend, vocabulary=length)


@pytest.mark.parametrize("bounds", [[0, 11], [0, 4, 4, 9, 11], [0, 0, 1, 11, 11]])
@pytest.mark.parametrize("masked", [False, True])
def test_packed_scan_is_the_loop(backend, bounds, masked):
    case = values_case((11,), mask=some_mask((11,)) if masked else None)
    case |= {"cu_seqlens": torch.tensor(bounds, dtype=torch.int32), "bootstrap": torch.linspace(-1, 1, len(bounds) - 1)}
    hold_to_reference(soft_min_gae, case, backend)


def test_tokens_past_the_last_bound_are_no_noise(backend):
    case = values_case((11,), mask=None, cu_seqlens=torch.tensor([0, 8], dtype=torch.int32))
    assert all(x.isfinite().all() for x in soft_min_gae(**case, backend=backend))


def test_packed_is_padded(any_backend):
    """Sequences of 2, 5 and 3 tokens: packed, and padded with masked tokens that hold NaN."""
    lengths, case = [2, 5, 3], values_case((10,))
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    padded = {}
    for name, x in case.items():
        padded[name] = torch.full((3, 5), math.nan)
        padded[name][mask] = x
    bounds = torch.tensor([0, 2, 7, 10], dtype=torch.int32)
    packed = soft_min_gae(**case, mask=None, cu_seqlens=bounds, backend=any_backend)
    for name, x in soft_min_gae(**padded, mask=mask, backend=any_backend)._asdict().items():
        torch.testing.assert_close(x[mask], getattr(packed, name))
        assert x[~mask].eq(0).all()


def test_masked_tokens_in_the_middle_are_skipped(any_backend):
    mask = some_mask((2, 9))
    case = values_case((2, 9))
    found = soft_min_gae(**case, mask=mask, backend=any_backend)
    for row in range(2):
        only = {name: x[row][mask[row]] for name, x in case.items()}
        alone = soft_min_gae(**only, mask=None, backend=any_backend)
        for name, x in alone._asdict().items():
            torch.testing.assert_close(getattr(found, name)[row][mask[row]], x)


def test_nothing_crosses_the_end_of_a_sequence(any_backend):
    case = values_case((8,), cu_seqlens=torch.tensor([0, 3, 8], dtype=torch.int32), mask=None, backend=any_backend)
    clean = soft_min_gae(**case)
    case["rewards"][4] = math.nan
    for name, x in soft_min_gae(**case)._asdict().items():
        assert torch.equal(x[:3], getattr(clean, name)[:3]), name
        assert torch.equal(x[5:], getattr(clean, name)[5:]), name


def test_known_values(any_backend):
    """One reward at the end, gamma = lam = 1, values 0: everyone's advantage is the reward."""
    zeros = torch.zeros(2, 4)
    rewards = torch.tensor([[0.0, 0, 0, 1], [0, 0, 0, -2]])
    found = soft_min_gae(zeros, zeros, rewards, None, gamma=1.0, lam=1.0, backend=any_backend)
    assert torch.equal(found.advantage, rewards[:, 3:].expand(2, 4)) and torch.equal(found.returns, found.advantage)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (1,), (2, 1, 3)])
def test_shapes(any_backend, shape):
    for mask in (None, torch.zeros(shape, dtype=torch.bool)):
        found = soft_min_gae(**values_case(shape), mask=mask, backend=any_backend)
        assert all(x.shape == shape for x in found)
        assert mask is None or all(x.eq(0).all() for x in found)


def test_targets_carry_no_gradient(any_backend):
    case = values_case(bootstrap=torch.ones(3))
    for x in case.values():
        x.requires_grad_()
    assert not any(x.requires_grad for x in soft_min_gae(**case, mask=None, backend=any_backend))


def test_long_sequences(backend, coarse):
    """32768 tokens, gamma = lam = 1: within float32 of the cumulative sum in float64."""
    case = values_case((1, 32768))
    found = soft_min_gae(**case, mask=None, gamma=1.0, lam=1.0, backend=backend)
    value = soft_min(case["v1"], case["v2"], 0.3, backend=backend).double()
    returns = case["rewards"].double().flip(-1).cumsum(-1).flip(-1)
    assert (found.advantage - (returns - value)).abs().max() < 1e-3


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("target_heads", [False, True])
@pytest.mark.parametrize("entrance", [safe_terms, linear_safe_terms])
def test_safe_terms_hold_to_reference(backend, entrance, layout, masked, target_heads):
    shape = (3, 7) if layout == "padded" else (21,)
    case = (logits_case if entrance is safe_terms else linear_case)(shape)
    case |= values_case(shape, kl_threshold=0.3, alpha=0.3, gamma=0.9)
    if layout == "packed":
        case["cu_seqlens"] = torch.tensor([0, 5, 5, 20, 21], dtype=torch.int32)
    if masked:
        case["mask"] = some_mask(shape)
    if target_heads:
        case |= {"target_v1": case["v1"] + 1, "target_v2": case["v2"] - 1}
    hold_to_reference(entrance, case, backend, ["logits" if entrance is safe_terms else "hidden", "v1", "v2"])


def test_the_threshold_may_be_on_another_device(any_backend, monkeypatch):
    """Without a GPU: fake tensors know their devices. The reference's loop over time would ask for their values."""
    monkeypatch.setattr(reference, "_sequences", lambda *_: [])
    with FakeTensorMode():
        logits, values = torch.randn(4, 5), torch.randn(4)
        options = {"kl_threshold": torch.zeros((), device="cuda"), "alpha": 0.3, "backend": any_backend}
        found = safe_terms(logits, torch.zeros(4).long(), values, values, values, ref_logits=logits, **options)
        assert all(x.device.type == "cpu" for x in found)


def test_safe_terms_complete_the_statistics(any_backend):
    case, values = logits_case(), values_case()
    found = safe_terms(**case, **values, kl_threshold=0.2, alpha=0.5, backend=any_backend)
    stats = token_stats(**case, backend=any_backend)
    assert all(torch.equal(getattr(found, name), x) for name, x in stats._asdict().items() if name != "ref_kl")
    torch.testing.assert_close(found.kl_penalty, (stats.kl - 0.2).relu() ** 2)
    torch.testing.assert_close(found.value, soft_min(values["v1"], values["v2"], 0.5, backend=any_backend))
    after = torch.cat([found.value[:, 1:], torch.zeros(3, 1)], 1)
    torch.testing.assert_close(found.value_target, values["rewards"] + after)


def test_linear_safe_terms_have_the_bits_of_linear_token_stats(backend):
    case = linear_case(mask=some_mask())
    found = linear_safe_terms(**case, **values_case(), kl_threshold=0.2, alpha=0.5, backend=backend)
    stats = linear_token_stats(**case, backend=backend)
    assert all(torch.equal(getattr(found, name), x) for name, x in stats._asdict().items() if name != "ref_kl")


def test_masked_values_spread_nothing(any_backend):
    mask = some_mask()
    case = logits_case() | values_case(mask=mask, kl_threshold=-1.0, alpha=0.3)
    clean = evaluate(safe_terms, case, any_backend, ["logits", "v1", "v2"])
    for name in ("logits", "v1", "v2", "rewards"):
        case[name][~mask] = math.nan
    for name, x in evaluate(safe_terms, case, any_backend, ["logits", "v1", "v2"]).items():
        assert torch.equal(x, clean[name]), name
        assert x[~mask].eq(0).all(), name
