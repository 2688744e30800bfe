"""Statistics of logits: against the reference, and the rules of their numerics."""

import itertools
import math

import pytest
import torch
from cases import evaluate, hold_to_reference, logits_case, some_mask, temperatures
from hypothesis import given
from hypothesis import strategies as st
from memory import Allocations

from safe_kernels import token_stats
from safe_kernels.triton_backend.logits import levels_of

pytestmark = pytest.mark.usefixtures("kernels")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reference, with_ref_kl", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("temperature", [1.0, 0.7, "per token"])
@pytest.mark.parametrize("masked", [False, True])
def test_holds_to_reference(backend, dtype, reference, with_ref_kl, temperature, masked):
    if temperature == "per token":
        temperature = temperatures()
    case = logits_case(dtype=dtype, reference=reference, temperature=temperature, with_ref_kl=with_ref_kl)
    if masked:
        case["mask"] = some_mask()
    hold_to_reference(token_stats, case, backend, wrt=["logits"])


@pytest.mark.parametrize("vocabulary", [1, 2, 31, 257, 32001, 50257])
def test_any_vocabulary(backend, coarse, vocabulary):
    case = logits_case((3,), vocabulary, with_ref_kl=True)
    hold_to_reference(token_stats, case, backend, wrt=["logits"], vocabulary=vocabulary)


@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min, -1e38, -1e30, -1e4])
@pytest.mark.parametrize("allowed", [[3, 9], [0], [40, 41, 63]])
@pytest.mark.parametrize("temperature", [1.0, 0.1, 1e3])
def test_a_finite_mask_has_no_mass(any_backend, low, allowed, temperature):
    """As trainers mask logits; most lanes of a row then hold nothing but masked columns, and so do whole tiles."""
    case = logits_case((3,), 64, temperature=temperature, with_ref_kl=True)
    case["tokens"] = torch.tensor(allowed)[case["tokens"] % len(allowed)]
    restricted = {name: case[name][..., allowed] for name in ("logits", "ref_logits")}
    restricted["tokens"] = (case["tokens"][:, None] == torch.tensor(allowed)).int().argmax(-1)
    expected = evaluate(token_stats, case | restricted, any_backend, ["logits"])
    for name in ("logits", "ref_logits"):
        case[name] = torch.full_like(case[name], low).index_copy(-1, torch.tensor(allowed), restricted[name])
    if temperature == 1e3 and low > -1e5:
        pytest.skip("at this temperature such a logit has mass")
    actual = evaluate(token_stats, case, any_backend, ["logits"])
    actual["d logits"] = actual["d logits"][..., allowed]
    for name, x in actual.items():
        torch.testing.assert_close(x, expected[name], msg=name)


def test_rows_of_the_lowest_logits_are_uniform(any_backend):
    """Of finfo.min alone, or beside -inf: the lowest number is a logit like any other."""
    low, logits = torch.finfo(torch.float32).min, torch.full((2, 64), -math.inf)
    logits[0], logits[1, 40:] = low, low
    stats = token_stats(logits, torch.tensor([5, 50]), ref_logits=logits, with_ref_kl=True, backend=any_backend)
    expected = torch.tensor([64.0, 24.0]).log()
    torch.testing.assert_close(stats.logprob, -expected)
    torch.testing.assert_close(stats.entropy, expected)
    torch.testing.assert_close(stats.kl, torch.zeros(2))
    torch.testing.assert_close(stats.ref_kl, torch.zeros(2))


def test_one_row_has_the_bits_that_it_has_among_others(backend, coarse):
    """Also where rows do not begin at 16 bytes."""
    for seed in range(10):
        logits = 3 * torch.randn(2, 2051, generator=torch.Generator().manual_seed(seed))[:, :2048]
        tokens = torch.tensor([5, 7])
        together, alone = (token_stats(logits[:n], tokens[:n], backend=backend) for n in (2, 1))
        assert torch.equal(together.logprob[:1], alone.logprob) and torch.equal(together.entropy[:1], alone.entropy)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("offset", [-200.0, 5000.0, -1e4])
def test_large_offsets_cost_nothing(any_backend, offset, temperature):
    case = logits_case(temperature=temperature, with_ref_kl=True)
    shift = {"logits": (case["logits"] + offset).double(), "ref_logits": (case["ref_logits"] + offset).double()}
    exact = evaluate(token_stats, case | shift, "reference", ["logits"])
    shifted = {name: x.float() for name, x in shift.items()}
    actual = evaluate(token_stats, case | shifted, any_backend, ["logits"])
    allowed = 1e-5 if any_backend == "torch" else 5e-3  # plain log_softmax(logits / T) rounds the quotient first
    for name, x in actual.items():
        assert (x.double() - exact[name]).abs().max() <= allowed, name


def test_minus_infinity_has_no_mass(any_backend):
    """Statistics over a restricted vocabulary are those of the vocabulary without the forbidden ids."""
    case = logits_case(vocabulary=20, with_ref_kl=True)
    case["tokens"] %= 12
    allowed = evaluate(
        token_stats, case | {k: case[k][..., :12] for k in ("logits", "ref_logits")}, any_backend, ["logits"]
    )
    for name in ("logits", "ref_logits"):
        case[name][..., 12:] = -math.inf
    actual = evaluate(token_stats, case, any_backend, ["logits"])
    gradient = actual.pop("d logits")
    torch.testing.assert_close(gradient[..., :12], allowed["d logits"])
    assert torch.equal(gradient[..., 12:], torch.zeros_like(gradient[..., 12:]))
    for name, x in actual.items():
        torch.testing.assert_close(x, allowed[name])


def test_reference_alone_at_minus_infinity(any_backend):
    case = logits_case((4,), 9)
    case["ref_logits"][1, 3] = -math.inf
    case["logits"][2, 5] = case["ref_logits"][2, 5] = -math.inf
    logits = case.pop("logits").requires_grad_()
    stats = token_stats(logits, **case, backend=any_backend)
    assert stats.kl[1] == math.inf and stats.kl[[0, 2, 3]].isfinite().all()
    stats.kl.sum().backward()
    assert not logits.grad[1].isfinite().any() and logits.grad[[0, 2, 3]].isfinite().all()
    if any_backend != "reference":
        assert logits.grad[1].isnan().all()


def test_policy_alone_at_minus_infinity(any_backend):
    """KL(reference || policy) is infinite, and its gradient (p - q) / T is not, wherever the policy is -inf."""
    case = logits_case((5,), 9, temperature=0.7, with_ref_kl=True)
    case["logits"][1, 3] = -math.inf
    case["logits"][2, 5] = case["ref_logits"][2, 5] = -math.inf
    case["logits"][3, 2], case["ref_logits"][3, 2] = -math.inf, -1e4  # which the reference has with a probability of 0
    case["ref_logits"][4, 1] = -math.inf
    logits = case.pop("logits").requires_grad_()
    stats = token_stats(logits, **case, backend=any_backend)
    assert stats.ref_kl[[1, 3]].eq(math.inf).all() and stats.ref_kl[[0, 2, 4]].isfinite().all()
    assert stats.kl[4] == math.inf and stats.kl[:4].isfinite().all()
    slopes = torch.arange(1.0, 6.0)
    (found,) = torch.autograd.grad((stats.ref_kl * slopes).sum(), logits)
    p, q = ((x / 0.7).softmax(-1) for x in (logits.detach(), case["ref_logits"]))
    torch.testing.assert_close(found, slopes[:, None] * (p - q) / 0.7)


def test_a_finite_mask_of_the_policy_alone_is_no_infinity(any_backend):
    """Log-ratios beyond 1e20 count as that much, or as themselves."""
    case = logits_case((3,), 9, with_ref_kl=True)
    case["logits"][1, 3] = -1e38
    ref_kl = token_stats(**case, backend=any_backend).ref_kl
    assert 1e10 < ref_kl[1] < math.inf and (ref_kl[[0, 2]] < 100).all()
    case["ref_logits"][2, 4] = -math.inf  # of another row
    assert token_stats(**case, backend=any_backend).ref_kl[1] == ref_kl[1]


@pytest.mark.parametrize("temperature", [1e-2, 1e3])
def test_extreme_temperatures(backend, temperature):
    hold_to_reference(token_stats, logits_case(temperature=temperature, with_ref_kl=True), backend, ["logits"])


@pytest.mark.parametrize("poison", [math.nan, math.inf, "all -inf"])
def test_poisoned_row_poisons_no_other(any_backend, poison):
    case = logits_case((4,), 9, with_ref_kl=True)
    clean = evaluate(token_stats, case, any_backend, ["logits"])
    case["logits"][1, slice(None) if poison == "all -inf" else 4] = -math.inf if poison == "all -inf" else poison
    actual = evaluate(token_stats, case, any_backend, ["logits"])
    others = torch.tensor([0, 2, 3])
    for name, x in actual.items():
        assert torch.equal(x[others], clean[name][others]), name
    assert all(actual[name][1].isnan() for name in ("logprob", "entropy", "kl", "ref_kl"))
    assert actual["d logits"][1].isnan().all()


@pytest.mark.parametrize("index", [-100, -1, 37, 2**40])
def test_id_outside_the_vocabulary(any_backend, index):
    case = logits_case(with_ref_kl=True)
    clean = evaluate(token_stats, case, any_backend)
    case["tokens"][1, 2] = index
    stats = token_stats(**case, backend=any_backend)
    assert stats.logprob[1, 2].isnan() and stats.ref_logprob[1, 2].isnan()
    others = torch.ones(3, 7, dtype=torch.bool)
    others[1, 2] = False
    for name, x in stats._asdict().items():
        assert torch.equal(x[others], clean[name][others]), name
    gradient = evaluate(token_stats, case, any_backend, ["logits"])["d logits"]
    assert gradient[1, 2].isnan().all() and gradient[others].isfinite().all()
    masked = evaluate(token_stats, case | {"mask": others}, any_backend, ["logits"])
    assert all(x[1, 2].eq(0).all() for x in masked.values())


def test_masked_rows_are_zero_and_spread_nothing(any_backend):
    mask = some_mask()
    temperature = torch.ones(3, 7)
    case = logits_case(mask=mask, temperature=temperature, with_ref_kl=True)
    clean = evaluate(token_stats, case, any_backend, ["logits"])
    case["logits"][~mask] = math.nan
    case["ref_logits"][~mask] = -math.inf
    case["temperature"] = temperature.where(mask, math.nan)
    for name, x in evaluate(token_stats, case, any_backend, ["logits"]).items():
        assert torch.equal(x, clean[name]), name
        assert x[~mask].eq(0).all(), name


@given(st.lists(st.sampled_from([1, 2, 3, 16]), min_size=1, max_size=4), st.data())
def test_levels_of_strides_address_the_rows_and_are_aligned_only_where_they_say_so(shape, data):
    """The launches take them from a cache: what they depend on must be what they are kept by."""
    strides = data.draw(st.lists(st.sampled_from([0, 1, 3, 16, 48, 161]), min_size=len(shape), max_size=len(shape)))
    x = torch.arange(161 * 16 * len(shape)).as_strided(shape, strides)
    found = levels_of(x.shape, x.stride())
    if found is None:
        assert (shape[-1] > 1 and strides[-1] != 1) or len([n for n in shape[:-1] if n > 1]) > 2
        return
    inner, outer_stride, inner_stride, is_aligned = found
    row = torch.arange(x[..., 0].numel())
    starts = row // inner * outer_stride + row % inner * inner_stride
    assert torch.equal(starts[:, None] + torch.arange(shape[-1]), x.reshape(-1, shape[-1]))
    assert not is_aligned or not any(n % 16 for n in (shape[-1], outer_stride, inner_stride, *strides[:-1]))
    assert is_aligned or any(n % 16 for n in (shape[-1], *strides[:-1]))


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_results_may_be_changed_in_place_before_the_backward(any_backend, shape):
    gradients = []
    for factor in (1, 2):
        case = logits_case(shape, with_ref_kl=True)
        logits = case["logits"].requires_grad_()
        found = token_stats(**case, backend=any_backend if factor == 2 else "reference")
        logprob, ref_kl = (x.mul_(2) if factor == 2 else 2 * x for x in (found.logprob, found.ref_kl))
        (logprob + ref_kl + found.kl).sum().backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(*gradients)


def test_strided_inputs_and_gradients(backend):
    """Views of every kind: the bits of contiguous copies."""
    base = logits_case((4, 8), 19)
    views = {
        "shifted": (base["logits"][:, :-1], base["tokens"][:, 1:], base["ref_logits"][:, :-1]),
        "transposed": (base["logits"].transpose(0, 1), base["tokens"].T, base["ref_logits"].transpose(0, 1)),
        "vocabulary first": (base["logits"].permute(2, 0, 1).contiguous().permute(1, 2, 0), base["tokens"], None),
        "expanded": (base["logits"][:1].expand(4, 8, 19), base["tokens"], base["ref_logits"]),
        "every second": (base["logits"][..., ::2], base["tokens"] // 2, base["ref_logits"][..., ::2]),
    }
    for view, (logits, tokens, ref_logits) in views.items():
        found = []
        for copy in (False, True):
            x = (logits.contiguous() if copy else logits).detach().requires_grad_()
            ref = ref_logits.contiguous() if copy and ref_logits is not None else ref_logits
            stats = token_stats(x, tokens, ref_logits=ref, backend=backend)
            loss = stats.logprob[..., ::2].sum() + stats.entropy.T.mean()
            found.append([stats.logprob, stats.entropy, *torch.autograd.grad(loss, x)])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), view


def test_incoming_gradients_of_every_kind(any_backend):
    """None, zero-stride, strided and of another dtype: equal to the dense ones."""
    case = logits_case((6,), 11, with_ref_kl=True)
    logits = case.pop("logits").requires_grad_()

    def gradient(upstream):
        stats = token_stats(logits, **case, backend=any_backend)
        outputs = [stats.logprob, stats.entropy, stats.kl, stats.ref_kl]
        kept = [(x, g) for x, g in zip(outputs, upstream, strict=True) if g is not None]
        return torch.autograd.grad([x for x, _ in kept], logits, [g for _, g in kept])[0]

    one = torch.ones(())
    dense = gradient([torch.ones(6), torch.full((6,), 2.0), torch.ones(6), torch.ones(6)])
    strided = [one.expand(6), (2 * one).expand(6), torch.ones(12)[::2], torch.ones(18)[::3]]
    torch.testing.assert_close(gradient(strided), dense)
    for kept in range(4):
        alone = [torch.ones(6) if i == kept else None for i in range(4)]
        padded = [torch.ones(6) if i == kept else torch.zeros(6) for i in range(4)]
        torch.testing.assert_close(gradient(alone), gradient(padded))


def test_gradient_of_another_dtype(any_backend):
    logits = logits_case((6,), 11)["logits"].requires_grad_()
    tokens = torch.arange(6)
    token_stats(logits, tokens, backend=any_backend).logprob.bfloat16().sum().backward()
    plain = torch.autograd.grad(logits.log_softmax(-1)[range(6), tokens].sum(), logits)[0]
    torch.testing.assert_close(logits.grad, plain)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_no_tokens(any_backend, shape):
    case = logits_case(shape, 5, with_ref_kl=True)
    found = evaluate(token_stats, case, any_backend, ["logits"])
    assert found["d logits"].shape == (*shape, 5) and found["logprob"].shape == shape


def test_all_masked(any_backend):
    case = logits_case(mask=torch.zeros(3, 7, dtype=torch.bool), with_ref_kl=True)
    for name, x in evaluate(token_stats, case, any_backend, ["logits"]).items():
        assert x.eq(0).all(), name


def test_one_token_without_leading_shape(any_backend):
    stats = token_stats(torch.randn(5), torch.tensor(2), backend=any_backend)
    assert stats.logprob.shape == stats.entropy.shape == ()


@pytest.mark.parametrize(
    ("backend", "threads", "vocabulary"), [("torch", 1, 40009), ("torch", 2, 40009), ("triton", 1, 5003)]
)
def test_rows_do_not_depend_on_the_batch(backend, threads, vocabulary, coarse, monkeypatch):
    """Bitwise, forward and backward, also where a lone row is wide enough to be split over threads."""
    monkeypatch.setattr("safe_kernels.torch_backend.rows.TILE_BYTES", 4 * 40009 * 4)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        case = logits_case((9,), vocabulary, with_ref_kl=True)
        together = evaluate(token_stats, case, backend, ["logits"])
        logits = case["logits"].clone().requires_grad_()
        for row in range(9):
            part = {k: case[k][row : row + 1] for k in ("tokens", "ref_logits")} | {"logits": logits[row : row + 1]}
            stats = token_stats(**part, with_ref_kl=True, backend=backend)
            assert all(torch.equal(x, together[name][row : row + 1]) for name, x in stats._asdict().items()), row
        stats = [token_stats(logits[i : i + 1], case["tokens"][i : i + 1], backend=backend).entropy for i in range(9)]
        alone = torch.autograd.grad(torch.cat(stats).sum(), logits)[0]
        whole = token_stats(logits, case["tokens"], backend=backend).entropy
        assert torch.equal(alone, torch.autograd.grad(whole.sum(), logits)[0])
    finally:
        torch.set_num_threads(before)


def test_two_runs_have_the_same_bits(backend):
    case = logits_case(vocabulary=501, with_ref_kl=True)
    runs = [evaluate(token_stats, case, backend, ["logits"]) for _ in range(2)]
    assert all(torch.equal(x, runs[1][name]) for name, x in runs[0].items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_is_rounded_once(backend, dtype):
    """Low-precision logits: the one-hot is subtracted in float32, so the gradient is the rounded float32 gradient."""
    if backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bfloat16 instead of rounding")
    case = logits_case(dtype=dtype, with_ref_kl=True)
    low = evaluate(token_stats, case, backend, ["logits"])
    wide = evaluate(token_stats, case | {k: case[k].float() for k in ("logits", "ref_logits")}, backend, ["logits"])
    assert torch.equal(low["d logits"], wide["d logits"].to(dtype))


def test_autocast_changes_nothing(any_backend):
    case = logits_case()
    plain = evaluate(token_stats, case, any_backend, ["logits"])
    with torch.autocast("cpu", torch.bfloat16):
        cast = evaluate(token_stats, case, any_backend, ["logits"])
    assert all(torch.equal(x, plain[name]) for name, x in cast.items())


@pytest.mark.parametrize("name", ["logprob", "entropy", "kl", "ref_kl"])
@pytest.mark.parametrize("temperature", [0.8, "per token"])
def test_gradcheck(float64_backend, name, temperature):
    case = logits_case((3,), 7, dtype=torch.float64, scale=1.0, with_ref_kl=True)
    logits = case.pop("logits").requires_grad_()
    case["temperature"] = torch.tensor([0.5, 1.0, 2.0]) if temperature == "per token" else temperature
    assert torch.autograd.gradcheck(lambda x: getattr(token_stats(x, **case, backend=float64_backend), name), logits)


class TestInplaceBackward:
    def test_writes_over_the_logits(self, backend):
        case = logits_case(with_ref_kl=True)
        plain = evaluate(token_stats, case, backend, ["logits"])["d logits"]
        leaf = case["logits"].requires_grad_()
        logits = leaf * 1
        storage = logits.data_ptr()
        found = evaluate_kept(token_stats, case | {"logits": logits, "inplace_backward": True}, backend, logits)
        assert found.data_ptr() == storage and torch.equal(found, plain)
        assert torch.equal(logits.detach(), plain)

    def test_writes_over_a_shifted_view(self, backend):
        base = logits_case((2, 5), 9)
        whole = base["logits"].requires_grad_() * 1
        stats = token_stats(whole[:, :-1], base["tokens"][:, 1:], inplace_backward=True, backend=backend)
        stats.logprob.sum().backward()
        again = base["logits"].detach().requires_grad_()
        token_stats(again[:, :-1], base["tokens"][:, 1:], backend=backend).logprob.sum().backward()
        assert torch.equal(base["logits"].grad, again.grad)
        assert torch.equal(whole[:, :-1], again.grad[:, :-1])

    def test_writes_over_logits_of_any_strides(self, backend):
        case = logits_case((2, 3, 4), 9, with_ref_kl=True)
        plain = evaluate(token_stats, case, backend, ["logits"])["d logits"]
        logits = (case["logits"].permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0).requires_grad_()) * 1
        assert not logits.is_contiguous()
        found = evaluate_kept(token_stats, case | {"logits": logits, "inplace_backward": True}, backend, logits)
        assert torch.equal(found, plain) and torch.equal(logits.detach(), plain)

    @pytest.mark.parametrize("shift", [37, -37, 1, -1, 0])
    @pytest.mark.parametrize("name", ["kl", "ref_kl"])
    def test_a_reference_that_shares_memory(self, backend, name, shift):
        """Views of one tensor, a row or an element apart: what is written must not be read as the reference."""
        case, memory = logits_case(reference=False), logits_case((3, 9), reference=False)["logits"].flatten()
        first = {"logits": 37, "ref_logits": 37 + shift}
        found = []
        for inplace in (False, True):
            shared = memory.clone().requires_grad_() * 1
            views = {name: shared[start:][: 21 * 37].view(3, 7, 37) for name, start in first.items()}
            views["ref_logits"] = views["ref_logits"].detach()
            stats = token_stats(**case | views, with_ref_kl=True, inplace_backward=inplace, backend=backend)
            upstream = torch.arange(21.0).view(3, 7)
            loss = (getattr(stats, name) * upstream + stats.logprob - stats.entropy).sum()
            found.append(torch.autograd.grad(loss, views["logits"])[0])
        assert torch.equal(*found) and found[0].any()
        assert found[1].data_ptr() == views["logits"].data_ptr()

    def test_halves_of_a_batch_are_not_copied(self):
        case = logits_case((64,), vocabulary=512, reference=False)
        policy, reference = torch.cat([case["logits"], case["logits"] * 0.9]).requires_grad_().mul(1).chunk(2)
        loss = token_stats(
            policy, case["tokens"], ref_logits=reference, inplace_backward=True, backend="torch"
        ).kl.sum()
        with Allocations() as allocations:
            torch.autograd.grad(loss, policy)
        assert allocations.largest < policy.nbytes

    def test_second_backward_raises(self, backend):
        logits = logits_case()["logits"].requires_grad_() * 1
        stats = token_stats(logits, torch.zeros(3, 7, dtype=torch.long), inplace_backward=True, backend=backend)
        stats.logprob.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            stats.logprob.sum().backward()

    def test_another_consumer_raises(self, backend):
        logits = logits_case()["logits"].requires_grad_() * 1
        other = (logits**2).sum()
        stats = token_stats(logits, torch.zeros(3, 7, dtype=torch.long), inplace_backward=True, backend=backend)
        stats.logprob.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            other.backward()

    def test_logits_changed_in_between_raise(self, any_backend):
        logits = logits_case()["logits"].requires_grad_() * 1
        stats = token_stats(logits, torch.zeros(3, 7, dtype=torch.long), inplace_backward=True, backend=any_backend)
        if any_backend != "reference":  # the reference keeps its own copies
            logits.mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                stats.logprob.sum().backward()

    def test_overlapping_logits_are_refused(self, any_backend):
        for logits in (torch.randn(1, 9).expand(4, 9), torch.randn(12).as_strided((4, 9), (1, 1))):
            with pytest.raises(ValueError, match="elements share memory"):
                token_stats(logits, torch.zeros(4, dtype=torch.long), inplace_backward=True, backend=any_backend)


def evaluate_kept(op, case, backend, logits):
    """The gradient that reaches `logits`, for the incoming gradients of `evaluate`."""
    found = []
    logits.register_hook(found.append)
    stats = op(**case, backend=backend)
    draw = torch.Generator().manual_seed(99)
    upstream = {name: torch.randn(x.shape, generator=draw) for name, x in stats._asdict().items()}
    sum((x * upstream[name]).sum() for name, x in stats._asdict().items() if x.requires_grad).backward()
    return found[0]


@pytest.mark.parametrize("low", [-200.0, -2e4, -1e20])
def test_a_ratio_that_is_infinite_where_the_policy_underflows(any_backend, low):
    names, logits = ("logits", "ref_logits"), (torch.tensor([[0.0, low]]), torch.tensor([[0.0, -math.inf]]))
    options = {"tokens": torch.tensor([0]), "with_ref_kl": True, "backend": any_backend}
    assert token_stats(**dict(zip(names, logits, strict=True)), **options).kl == math.inf
    assert token_stats(**dict(zip(names[::-1], logits, strict=True)), **options).ref_kl == math.inf


@pytest.mark.parametrize(
    "name, where", [*itertools.product(["entropy", "kl", "logprob"], ["policy", "both"]), ("ref_kl", "both")]
)
def test_large_slopes_beside_a_logit_without_mass(any_backend, name, where):
    """A token of probability 0 has a gradient of 0, also where 1e18 times its log-prob would be beyond float32."""
    case = logits_case((3,), 20)
    for side in ("logits",) if where == "policy" else ("logits", "ref_logits"):
        case[side][:, 7] = -math.inf
    case["tokens"] = torch.tensor([1, 2, 3])
    found = []
    for scale in (1.0, 1e18):
        leaf = case["logits"].clone().requires_grad_()
        options = {"ref_logits": case["ref_logits"], "with_ref_kl": True, "backend": any_backend}
        stats = token_stats(leaf, case["tokens"], **options)
        found.append(torch.autograd.grad((scale * getattr(stats, name)).sum(), leaf)[0])
    torch.testing.assert_close(found[1] / 1e18, found[0])
    assert found[1][:, 7].eq(0).all()


@pytest.mark.parametrize("poison", ["policy", "reference", "all of the reference"])
def test_no_infinite_kl_where_there_is_none(any_backend, poison):
    """A row that is poisoned, or without a reference, has no KL, not even an infinite one."""
    case = logits_case((3,), 20)
    case["ref_logits"][1, slice(None) if poison == "all of the reference" else 18] = -math.inf
    if poison != "all of the reference":
        case["logits" if poison == "policy" else "ref_logits"][1, 3] = math.nan
    kl = token_stats(**case, backend=any_backend).kl
    assert kl[1].isnan() and kl[[0, 2]].isfinite().all()
    case["logits"], case["ref_logits"] = case["ref_logits"], case["logits"]
    ref_kl = token_stats(**case, with_ref_kl=True, backend=any_backend).ref_kl
    assert ref_kl[1].isnan() and ref_kl[[0, 2]].isfinite().all()


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[:, :-1]], ids=["itself", "a view"])
def test_a_leaf_is_not_overwritten(any_backend, view):
    logits = view(torch.randn(3, 5).requires_grad_())
    with pytest.raises(ValueError, match="is a leaf"):
        token_stats(logits, torch.zeros(3, dtype=torch.long), inplace_backward=True, backend=any_backend)
