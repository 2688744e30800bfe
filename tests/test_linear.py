"""Statistics from hidden states: against the reference, against the logits entrance, and what they may allocate."""

import math

import pytest
import torch
from cases import evaluate, hold, hold_to_reference, linear_case, policy_case, some_mask, temperatures
from memory import Allocations

from safe_kernels import linear_policy_loss, linear_token_stats, token_stats
from safe_kernels.torch_backend import linear, rows
from safe_kernels.triton_backend import linear as triton_linear

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reference, with_ref_kl", [(None, False), ("shared", False), ("own", False), ("own", True)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "temperature": 0.7, "mask": some_mask()},
        {"softcap": 5.0, "temperature": 1.3},
        {"bias": True, "softcap": 5.0, "logit_scale": 0.5, "temperature": 0.6, "mask": some_mask()},
    ],
    ids=["plain", "bias", "softcap", "all"],
)
def test_holds_to_reference(backend, dtype, reference, with_ref_kl, options):
    case = linear_case(dtype=dtype, reference=reference, with_ref_kl=with_ref_kl, **options)
    wrt = ["hidden", "weight", *(["bias"] if "bias" in options else [])]
    hold_to_reference(linear_token_stats, case, backend, wrt)


@pytest.mark.parametrize("op", [linear_token_stats, linear_policy_loss])
def test_gpus_without_a_product_into_float32_hold_to_reference(op, monkeypatch):
    """As on ROCm and XPU, where our own product takes the place of the library's in every direction."""
    monkeypatch.setattr(triton_linear, "blas_product", triton_linear.product_of_rows)
    make = policy_case if op is linear_policy_loss else linear_case
    asked = {"ref_kl_coef": 0.1} if op is linear_policy_loss else {"with_ref_kl": True}
    case = make(dtype=torch.float16, reference="own", bias=True, mask=some_mask(), **asked)
    hold_to_reference(op, case, "triton", ["hidden", "weight", "bias"])


def test_temperature_per_token(backend):
    case = linear_case(mask=some_mask(), temperature=temperatures(), with_ref_kl=True)
    hold_to_reference(linear_token_stats, case, backend, ["hidden", "weight"])


@pytest.mark.parametrize("vocabulary", [1, 31, 257, 50257])
def test_any_vocabulary(backend, vocabulary, coarse):
    case = linear_case((3,), vocabulary, with_ref_kl=True)
    hold_to_reference(linear_token_stats, case, backend, ["hidden", "weight"], vocabulary)


def test_equals_the_logits_entrance(any_backend):
    case = linear_case(softcap=5.0, logit_scale=0.5, temperature=0.7, bias=True, with_ref_kl=True)
    options = {"temperature": 0.7, "with_ref_kl": True, "backend": any_backend}
    logits, ref_logits = (
        5.0 * torch.tanh(0.5 * (case[x] @ case["weight"].T + case["bias"]) / 5.0) for x in ("hidden", "ref_hidden")
    )
    direct = token_stats(logits, case["tokens"], ref_logits=ref_logits, **options)
    for name, x in linear_token_stats(**case, backend=any_backend)._asdict().items():
        torch.testing.assert_close(x, getattr(direct, name))


def test_logits_are_never_rounded(backend):
    """bf16 inputs, float32 logits in between: the error is that of float32, in logits of the size of 100."""
    case = linear_case((20,), 501, 64, dtype=torch.bfloat16, with_ref_kl=True)
    case["hidden"], case["ref_hidden"] = 20 * case["hidden"], 20 * case["ref_hidden"]
    exact = evaluate(linear_token_stats, case, "reference", dtype=torch.float64)
    for name, x in evaluate(linear_token_stats, case, backend).items():
        assert (x.double() - exact[name]).abs().max() < 1e-4, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weight_gradient_over_many_tiles_is_accumulated_in_float32(backend, dtype, coarse):
    """Many tiles of one token each: summed in bf16, the gradient would be off by percents."""
    case = linear_case((150,), 700, 8, dtype=dtype, reference=None)
    hold_to_reference(linear_token_stats, case, backend, ["weight", "hidden"], 700)


def test_inputs_of_mixed_dtypes(backend):
    case = linear_case(reference="own", bias=True)
    for name in ("hidden", "ref_weight"):
        case[name] = case[name].bfloat16()
    hold_to_reference(linear_token_stats, case, backend, ["hidden", "weight", "bias"])


@pytest.mark.parametrize("wrt", [["hidden"], ["weight"], ["bias"], ["hidden", "weight"]])
def test_only_what_is_needed(any_backend, wrt):
    """A frozen head or body gets no gradient, and does not change the others'."""
    case = linear_case(bias=True, with_ref_kl=True)
    everything = evaluate(linear_token_stats, case, any_backend, ["hidden", "weight", "bias"])
    for name, x in evaluate(linear_token_stats, case, any_backend, wrt).items():
        torch.testing.assert_close(x, everything[name])


def test_the_reference_receives_no_gradient(any_backend):
    case = linear_case(reference="own")
    for x in case.values():
        if x.is_floating_point():
            x.requires_grad_()
    stats = linear_token_stats(**case, with_ref_kl=True, backend=any_backend)
    assert not stats.ref_logprob.requires_grad
    (stats.kl.sum() + stats.ref_kl.sum() + stats.entropy.sum()).backward()
    assert case["hidden"].grad is not None and case["weight"].grad is not None
    assert all(case[name].grad is None for name in ("ref_hidden", "ref_weight", "ref_bias"))


@pytest.mark.parametrize("everywhere", [True, False], ids=["left out", "zeroed"])
def test_masked_rows_are_zero_and_spread_nothing(any_backend, everywhere, monkeypatch):
    if not everywhere:
        _zero_rows_as_off_the_cpu(monkeypatch)
    mask = some_mask()
    case = linear_case(mask=mask, with_ref_kl=True)
    clean = evaluate(linear_token_stats, case, any_backend, ["hidden", "weight"])
    case["hidden"][~mask] = math.nan
    case["ref_hidden"][~mask] = math.inf
    case["tokens"] = case["tokens"].where(mask, -100)
    for name, x in evaluate(linear_token_stats, case, any_backend, ["hidden", "weight"]).items():
        assert torch.equal(x, clean[name]), name
        assert name == "d weight" or x[~mask].eq(0).all(), name


def test_zeroed_rows_hold_to_reference(backend, monkeypatch):
    _zero_rows_as_off_the_cpu(monkeypatch)
    case = linear_case(mask=some_mask(), temperature=temperatures(), bias=True, with_ref_kl=True)
    hold_to_reference(linear_token_stats, case, backend, ["hidden", "weight", "bias"])


@pytest.mark.parametrize("everywhere", [True, False], ids=["left out", "zeroed"])
@pytest.mark.parametrize("bias, kl", [("ref_bias", "kl"), ("bias", "ref_kl")])
def test_a_masked_row_has_no_gradient_where_only_one_bias_is_infinite(backend, bias, kl, everywhere, monkeypatch):
    if not everywhere:
        _zero_rows_as_off_the_cpu(monkeypatch)
    case = linear_case(reference="own", bias=True, mask=some_mask(), with_ref_kl=True)
    case[bias][5] = -math.inf
    case["tokens"][case["tokens"] == 5] = 0
    found = evaluate(linear_token_stats, case, backend, ["hidden"])
    assert found["d hidden"][~case["mask"]].eq(0).all() and (found[kl][case["mask"]] == math.inf).all()
    assert kl == "kl" or found["d hidden"].isfinite().all()


def test_nothing_asks_the_device(backend, monkeypatch):
    """No value is read back to the host, in the forward or the backward."""
    _zero_rows_as_off_the_cpu(monkeypatch)
    case = linear_case(mask=some_mask(), temperature=torch.ones(3, 7), bias=True)
    policy = {"old_logprob": torch.zeros(3, 7), "advantage": torch.ones(3, 7), "kl_coef": torch.tensor(0.1)}
    policy["ref_kl_coef"] = torch.tensor(0.1)
    for op, arguments in ((linear_token_stats, case | {"with_ref_kl": True}), (linear_policy_loss, case | policy)):
        with Allocations() as seen:
            evaluate(op, arguments, backend, ["hidden", "weight", "bias"])
        assert "aten::mm" in seen.operators or "aten::addmm" in seen.operators
        assert not seen.operators & {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


def _zero_rows_as_off_the_cpu(monkeypatch):
    for module in (linear, rows):
        monkeypatch.setattr(module, "is_on_host", lambda _: False)


def test_strided_inputs_and_gradients(backend):
    case = linear_case((4, 6), 19, 8, reference="own", bias=True, with_ref_kl=True)
    views = {
        **{name: torch.stack([case[name], case[name] + 1], -1)[:, 0] for name in ("bias", "ref_bias")},
        "hidden": torch.stack([case["hidden"], case["hidden"]], -1)[..., 0],
        "weight": case["weight"].T.contiguous().T,
        "tokens": case["tokens"].T.contiguous().T,
        "ref_hidden": case["ref_hidden"].transpose(0, 1).contiguous().transpose(0, 1),
    }
    found = []
    for arguments in (case, case | views):
        leaves = {name: x.detach() if torch.is_tensor(x) else x for name, x in arguments.items()}
        hidden, weight = leaves["hidden"].requires_grad_(), leaves["weight"].requires_grad_()
        stats = linear_token_stats(**leaves, backend=backend)
        loss = (
            stats.logprob[:, ::2].sum() + stats.kl.T.mean() + stats.ref_kl[::2].sum() + stats.entropy.bfloat16().sum()
        )
        found.append([*stats, *torch.autograd.grad(loss, [hidden, weight])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("threads", [1, 2])
def test_batch_invariant(backend, threads):
    """A row's results and hidden gradient have the same bits alone, in other company and at another place."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        vocabulary = 5003 if backend == "torch" else 53  # tiny tiles are slow in the interpreter
        case = linear_case((9,), vocabulary, 24, batch_invariant=True, temperature=0.9, with_ref_kl=True)
        together = evaluate(linear_token_stats, case, backend, ["hidden"])
        whole = case["hidden"].clone().requires_grad_()
        all_rows = linear_token_stats(**case | {"hidden": whole}, backend=backend)
        gradient_of_all = torch.autograd.grad(all_rows.entropy.sum(), whole)[0]
        for some in (slice(0, 1), slice(3, 4), slice(2, 7), slice(8, 9)):
            part = {k: case[k][some].clone() for k in ("hidden", "tokens", "ref_hidden")}
            part["hidden"].requires_grad_()
            stats = linear_token_stats(**case | part, backend=backend)
            assert all(torch.equal(x, together[name][some]) for name, x in stats._asdict().items())
            gradient = torch.autograd.grad(stats.entropy.sum(), part["hidden"])[0]
            assert torch.equal(gradient, gradient_of_all[some])
    finally:
        torch.set_num_threads(before)


def test_a_gradient_in_float16_does_not_depend_on_a_neighbours_slope(backend):
    case = linear_case((2,), 53, 24, dtype=torch.float16, batch_invariant=True)
    found = []
    for neighbour in (1.0, 3e4):
        hidden = case["hidden"].clone().requires_grad_()
        stats = linear_token_stats(**case | {"hidden": hidden}, backend=backend)
        found.append(torch.autograd.grad(stats.entropy, hidden, torch.tensor([0.1, neighbour]))[0][0])
    assert torch.equal(*found) and found[0].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("slope", "options"),
    [(3e3, {}), (3.0, {"temperature": 1e-4, "logit_scale": 0.3}), (1e-4, {"mask": some_mask((9,))})],
)
def test_gradients_in_float16_are_scaled_row_by_row(backend, slope, options):
    """Neither large slopes of other rows, masked ones too, nor a small temperature cost a row its precision."""
    case = linear_case((9,), 53, 24, dtype=torch.float16, bias=True, **options)
    slopes = torch.full((9,), slope)
    slopes[::2] = 1e-4
    if "mask" in options:
        slopes[~options["mask"]] = 1e8
    found = {}
    for name in ("reference", backend):
        leaves = [case[x].clone().requires_grad_() for x in ("hidden", "weight", "bias")]
        stats = linear_token_stats(**case | dict(zip(("hidden", "weight", "bias"), leaves, strict=True)), backend=name)
        found[name] = torch.autograd.grad((stats.logprob * slopes).sum(), leaves)
    for x, y in zip(found[backend], found["reference"], strict=True):
        rows = (x, y) if x.shape == case["hidden"].shape else (x[None], y[None])
        for row, expected in zip(*rows, strict=True):
            assert (row - expected).float().norm() <= 3e-3 * expected.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_batch_invariant_holds_to_reference(backend, dtype):
    case = linear_case(mask=some_mask(), dtype=dtype, with_ref_kl=True)
    wrt = ["hidden", "weight"]
    exact = evaluate(linear_token_stats, case, "reference", wrt, torch.float64)
    plain = evaluate(linear_token_stats, case, "reference", wrt)
    for name, x in evaluate(linear_token_stats, case | {"batch_invariant": True}, backend, wrt).items():
        hold(name, x, plain[name], exact[name], 37)


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_tokens(any_backend, shape):
    found = evaluate(linear_token_stats, linear_case(shape, 5, with_ref_kl=True), any_backend, ["hidden", "weight"])
    assert found["d hidden"].shape == (*shape, 16) and found["d weight"].eq(0).all()


def test_all_masked(any_backend):
    case = linear_case(mask=torch.zeros(3, 7, dtype=torch.bool), with_ref_kl=True)
    for name, x in evaluate(linear_token_stats, case, any_backend, ["hidden", "weight"]).items():
        assert x.eq(0).all(), name


def test_two_runs_have_the_same_bits(backend):
    case = linear_case(vocabulary=101, with_ref_kl=True)
    runs = [evaluate(linear_token_stats, case, backend, ["hidden", "weight"]) for _ in range(2)]
    assert all(torch.equal(x, runs[1][name]) for name, x in runs[0].items())


def test_autocast_changes_nothing(any_backend):
    plain = evaluate(linear_token_stats, linear_case(), any_backend)
    with torch.autocast("cpu", torch.bfloat16):
        cast = evaluate(linear_token_stats, linear_case(), any_backend)
    assert all(torch.equal(x, plain[name]) for name, x in cast.items())


def test_backward_inside_autocast(backend):
    plain = evaluate(linear_token_stats, linear_case(), backend, ["hidden", "weight"])
    with torch.autocast("cpu", torch.bfloat16):
        cast = evaluate(linear_token_stats, linear_case(), backend, ["hidden", "weight"])
    assert all(torch.equal(x, plain[name]) for name, x in cast.items())


@pytest.mark.parametrize("name", ["logprob", "entropy", "kl", "ref_kl"])
@pytest.mark.parametrize("head", [{}, {"bias": True, "softcap": 2.0, "logit_scale": 0.5, "temperature": 0.8}])
def test_gradcheck(float64_backend, name, head):
    case = linear_case((3,), 7, 4, dtype=torch.float64, with_ref_kl=True, **head)
    wrt = [x for x in ("hidden", "weight", "bias") if x in case]

    def statistic(*tensors):
        return getattr(linear_token_stats(**case | dict(zip(wrt, tensors, strict=True)), backend=float64_backend), name)

    case["ref_weight"] = case["weight"].clone()  # constant, as the reference is
    assert torch.autograd.gradcheck(statistic, [case[x].clone().requires_grad_() for x in wrt])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(any_backend, use_reentrant):
    case = linear_case(with_ref_kl=True)
    hidden = case.pop("hidden").requires_grad_()

    def loss(hidden):
        stats = linear_token_stats(hidden, **case, backend=any_backend)
        return stats.logprob.sum() + stats.kl.sum() + stats.ref_kl.sum()

    plain = torch.autograd.grad(loss(hidden), hidden)[0]
    torch.utils.checkpoint.checkpoint(loss, hidden, use_reentrant=use_reentrant).backward()
    assert torch.equal(hidden.grad, plain)


@pytest.mark.parametrize("low_precision", [False, True])
@pytest.mark.parametrize("op", [linear_token_stats, linear_policy_loss])
def test_no_tensor_of_the_size_of_the_logits(backend, op, low_precision, coarse, monkeypatch):
    """Forward and backward, with a reference: nothing near N x V, and no float32 copy of a low-precision weight."""
    if backend == "triton" and low_precision:
        pytest.skip("on a CPU the products of the Triton backend stand in for the BLAS library's, in float32")
    monkeypatch.setattr(linear, "PRODUCT_BYTES", 30 * 1000 * 4)
    case = linear_case((700,), 1000, 64, dtype=torch.bfloat16 if low_precision else torch.float32)
    if op is linear_policy_loss:
        case |= {"old_logprob": torch.zeros(700), "advantage": torch.ones(700), "kl_coef": 0.1, "ref_kl_coef": 0.1}
    else:
        case["with_ref_kl"] = True
    with Allocations() as seen:
        evaluate(op, case, backend, ["hidden"])
    assert seen.largest < 700 * 1000 * 4 / 10
    assert not low_precision or seen.largest < 1000 * 64 * 4


@pytest.mark.slow
@pytest.mark.parametrize("op", [linear_token_stats, linear_policy_loss])
def test_peak_memory_is_an_eighth_of_the_reference(backend, op, monkeypatch):
    """N = 1024, V = 49152, H = 64 in float32, forward and backward, beyond the inputs and the returned gradients."""
    if backend == "triton":
        pytest.skip("hours in Triton's interpreter")
    monkeypatch.undo()
    torch.use_deterministic_algorithms(False)
    case = linear_case((1024,), 49152, 64, reference=None)
    case["weight"] *= 0.5
    if op is linear_policy_loss:
        case |= {"old_logprob": torch.full((1024,), -10.0), "advantage": torch.randn(1024), "entropy_coef": 0.01}
    peaks, found = {}, {}
    for name in ("reference", backend):
        inputs = {
            k: v.clone().requires_grad_(k in ("hidden", "weight")) for k, v in case.items() if hasattr(v, "clone")
        }
        with Allocations() as seen:
            result = op(**case | inputs, backend=name)
            loss = result.loss if op is linear_policy_loss else (result.logprob + 0.1 * result.entropy).sum()
            del result
            gradients = torch.autograd.grad(loss, [inputs["hidden"], inputs["weight"]])
        peaks[name], found[name] = seen.peak - sum(x.nbytes for x in gradients), gradients
    assert peaks[backend] <= peaks["reference"] / 8, peaks
    for a, b in zip(found[backend], found["reference"], strict=True):
        torch.testing.assert_close(a, b)


def test_what_triton_does_not_offer_is_refused():
    case = linear_case()
    for name in ("hidden", "weight", "ref_hidden"):
        with pytest.raises(ValueError, match="float64 inputs"):
            linear_token_stats(**case | {name: case[name].double()}, backend="triton")
