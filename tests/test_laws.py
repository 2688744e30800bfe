"""Properties that hold for every input."""

import functools
import math

import pytest
import torch
from cases import evaluate, linear_case, logits_case, values_case
from hypothesis import given
from hypothesis import strategies as st

from safe_kernels import linear_token_stats, soft_min, soft_min_gae, token_stats

pytestmark = pytest.mark.usefixtures("all_rows_in_one_program")
BACKEND = pytest.mark.parametrize("backend", ["reference", "torch", "triton"])

seeds = st.integers(0, 2**31)
shapes = st.tuples(st.integers(1, 5), st.integers(1, 9))
vocabularies = st.integers(1, 120)
scales = st.sampled_from([0.01, 1.0, 5.0, 50.0])
temperatures = st.sampled_from([0.3, 1.0, 2.5])
alphas = st.sampled_from([1e-2, 0.3, 10.0, 1e3, 1e7])
cases = st.builds(
    functools.partial(logits_case, with_ref_kl=True),
    shape=shapes,
    vocabulary=vocabularies,
    scale=scales,
    seed=seeds,
    temperature=temperatures,
)


def close(found, expected, vocabulary, scale=1.0):
    """Equal but for rounding of numbers of the size of `scale`, or log V."""
    allowed = 32 * torch.finfo(torch.float32).eps * max(scale, 1.0, math.log(vocabulary))
    for name in found:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-5, atol=allowed, msg=lambda m, n=name: f"{n}: {m}"
        )


def size(case):
    """The largest difference of logits: what bounds the rounding of log-probs."""
    return (
        max(case[name].nan_to_num(0, neginf=0).abs().max().item() for name in ("logits", "ref_logits"))
        / case["temperature"]
    )


@BACKEND
@given(case=cases)
def test_bounds(backend, case):
    vocabulary = case["logits"].shape[-1]
    stats = token_stats(**case, backend=backend)
    rounding = 1e-6 * max(1.0, size(case))
    assert (stats.logprob <= rounding).all() and (stats.ref_logprob <= rounding).all()
    assert (stats.entropy >= -rounding).all() and (stats.entropy <= math.log(vocabulary) + rounding).all()
    assert (stats.kl >= -rounding).all() and (stats.ref_kl >= -rounding).all()


@BACKEND
@given(case=cases)
def test_no_kl_to_itself(backend, case):
    stats = token_stats(**case | {"ref_logits": case["logits"]}, backend=backend)
    assert (
        stats.kl.abs().max() <= 1e-6
        and stats.ref_kl.abs().max() <= 1e-6
        and torch.equal(stats.logprob, stats.ref_logprob)
    )


@BACKEND
@given(case=cases, seed=seeds, forbidden=st.sampled_from([0.0, 0.3, 0.9]))
def test_one_kl_is_the_other_with_exchanged_roles(backend, case, seed, forbidden):
    """Where it is infinite, too, and where it is none, as a distribution has no mass anywhere."""
    noise = torch.Generator().manual_seed(seed)
    for name in ("logits", "ref_logits"):
        case[name][torch.rand(case[name].shape, generator=noise) < forbidden] = -math.inf
    exchanged = case | {"logits": case["ref_logits"], "ref_logits": case["logits"]}
    found, other = (token_stats(**x, backend=backend) for x in (case, exchanged))
    allowed = 32 * torch.finfo(torch.float32).eps * max(1.0, size(case))
    torch.testing.assert_close(found.ref_kl, other.kl, rtol=1e-5, atol=allowed, equal_nan=True)
    torch.testing.assert_close(found.kl, other.ref_kl, rtol=1e-5, atol=allowed, equal_nan=True)


@BACKEND
@given(case=cases)
def test_gradients_of_a_row_sum_to_zero(backend, case):
    """A common shift of a row changes nothing, so no gradient points along it."""
    gradient = evaluate(token_stats, case, backend, ["logits"])["d logits"]
    assert (gradient.sum(-1).abs() <= 1e-6 * max(1.0, size(case)) * (1 + gradient.abs().sum(-1))).all()


@BACKEND
@given(case=cases, shift=st.floats(-100, 100))
def test_a_common_shift_changes_nothing(backend, case, shift):
    shifted = case | {name: case[name] + shift for name in ("logits", "ref_logits")}
    found, expected = (evaluate(token_stats, x, backend, ["logits"]) for x in (shifted, case))
    close(found, expected, case["logits"].shape[-1], (size(case) + abs(shift) / case["temperature"]) * 10)


@BACKEND
@given(case=cases, seed=seeds)
def test_the_order_of_the_vocabulary_does_not_matter(backend, case, seed):
    order = torch.randperm(case["logits"].shape[-1], generator=torch.Generator().manual_seed(seed))
    permuted = case | {name: case[name][..., order] for name in ("logits", "ref_logits")}
    permuted["tokens"] = order.argsort()[case["tokens"]]
    found, expected = (evaluate(token_stats, x, backend, ["logits"]) for x in (permuted, case))
    expected["d logits"] = expected["d logits"][..., order]
    close(found, expected, len(order), size(case))


@BACKEND
@given(case=cases)
def test_temperature_divides_the_logits(backend, case):
    divided = (
        case | {name: case[name] / case["temperature"] for name in ("logits", "ref_logits")} | {"temperature": 1.0}
    )
    per_token = case | {"temperature": torch.full(case["tokens"].shape, case["temperature"])}
    expected = evaluate(token_stats, case, backend)
    close(evaluate(token_stats, divided, backend), expected, case["logits"].shape[-1], size(case))
    close(evaluate(token_stats, per_token, backend), expected, case["logits"].shape[-1], size(case))


@given(case=cases, rows=st.integers(1, 40))
def test_the_size_of_a_tile_does_not_matter(case, rows):
    expected = evaluate(token_stats, case, "torch", ["logits"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safe_kernels.torch_backend.rows.TILE_BYTES", rows * case["logits"].shape[-1] * 4)
        found = evaluate(token_stats, case, "torch", ["logits"])
    assert all(torch.equal(x, expected[name]) for name, x in found.items())


@BACKEND
@given(case=cases, seed=seeds)
def test_masked_tokens_change_no_other(backend, case, seed):
    mask = torch.rand(case["tokens"].shape, generator=torch.Generator().manual_seed(seed)) > 0.5
    everything = evaluate(token_stats, case, backend, ["logits"])
    for name, x in evaluate(token_stats, case | {"mask": mask}, backend, ["logits"]).items():
        expected = everything[name].clone()
        expected[~mask] = 0
        assert torch.equal(x, expected), name


@BACKEND
@given(seed=seeds, shape=shapes, vocabulary=vocabularies, width=st.integers(1, 33))
def test_hidden_states_are_logits(backend, seed, shape, vocabulary, width):
    case = linear_case(shape, vocabulary, width, seed=seed, with_ref_kl=True)
    direct = {"logits": case["hidden"] @ case["weight"].T, "ref_logits": case["ref_hidden"] @ case["weight"].T}
    expected = evaluate(token_stats, {"tokens": case["tokens"], "with_ref_kl": True, **direct}, backend)
    close(evaluate(linear_token_stats, case, backend), expected, vocabulary, size(direct | {"temperature": 1.0}) * 4)


@BACKEND
@given(seed=seeds, alpha=alphas)
def test_soft_min_is_between_minimum_and_mean(backend, seed, alpha):
    v1, v2 = (values_case((20,), seed=seed)[name] for name in ("v1", "v2"))
    value = soft_min(v1, v2, alpha, backend=backend)
    rounding = 1e-6 * max(1.0, alpha)
    assert (value >= torch.minimum(v1, v2) - rounding).all() and (value <= (v1 + v2) / 2 + rounding).all()
    assert torch.equal(value, soft_min(v2, v1, alpha, backend=backend))
    assert (soft_min(v1 + 0.1, v2, alpha, backend=backend) >= value - rounding).all()


@BACKEND
@given(seed=seeds, alpha=alphas)
def test_soft_min_gradient_is_a_softmax(backend, seed, alpha):
    v = [values_case((20,), seed=seed)[name].requires_grad_() for name in ("v1", "v2")]
    gradients = torch.stack(torch.autograd.grad(soft_min(*v, alpha, backend=backend).sum(), v))
    torch.testing.assert_close(gradients, torch.softmax(-torch.stack(v) / alpha, 0))


@given(seed=seeds, lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5), alpha=alphas, lam=st.floats(0, 1))
def test_the_scan_is_the_loop(seed, lengths, alpha, lam):
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    count, draw = sum(lengths), torch.Generator().manual_seed(seed)
    case = values_case((count,), seed=seed, cu_seqlens=bounds, alpha=alpha, lam=lam)
    case |= {"mask": torch.rand(count, generator=draw) > 0.3, "bootstrap": torch.randn(len(lengths), generator=draw)}
    found, expected = (soft_min_gae(**case, backend=backend) for backend in ("torch", "reference"))
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y)


@given(seed=seeds, lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_a_sequence_has_the_same_bits_in_every_pack(seed, lengths):
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    case = values_case((bounds[-1],), seed=seed)
    packed = soft_min_gae(**case, mask=None, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), backend="torch")
    for a, b in zip(bounds, bounds[1:], strict=False):
        alone = soft_min_gae(**{name: x[a:b] for name, x in case.items()}, mask=None, backend="torch")
        assert all(torch.equal(x, y[a:b]) for x, y in zip(alone, packed, strict=True))
