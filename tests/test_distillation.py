"""Divergences of a student from a teacher: against the reference, by the laws that hold for every input, and what they
may allocate.
"""

import math
from pathlib import Path

import pytest
import torch
from cases import (
    distillation_case,
    distillation_logits_case,
    evaluate,
    hold_to_reference,
    linear_case,
    some_mask,
    temperatures,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from memory import Allocations

from safe_kernels import distillation_loss, linear_distillation_loss, linear_token_stats, token_stats
from safe_kernels.torch_backend import linear, rows
from safe_kernels.triton_backend import linear as triton_linear

pytestmark = pytest.mark.usefixtures("kernels")
DIVERGENCES = {
    "reverse_kl": {"divergence": "reverse_kl"},
    "forward_kl": {"divergence": "forward_kl"},
    "jsd": {"divergence": "jsd"},
    "jsd, skewed": {"divergence": "jsd", "beta": 0.1},
    "tv": {"divergence": "tv"},
}
ALL = {"bias": True, "softcap": 5.0, "logit_scale": 0.5, "teacher_softcap": 3.0, "teacher_logit_scale": 1.5}
ALL |= {"temperature": 0.6, "teacher_temperature": 1.4, "mask": some_mask()}
EVERY_DIVERGENCE = pytest.mark.parametrize("name", DIVERGENCES)


@EVERY_DIVERGENCE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", [{}, ALL | {"cross_entropy_coef": 0.3}], ids=["plain", "all"])
def test_holds_to_reference(backend, name, dtype, head):
    wrt = ["hidden", "weight", *(["bias"] if head else [])]
    hold_to_reference(
        linear_distillation_loss, distillation_case(dtype=dtype, **DIVERGENCES[name], **head), backend, wrt
    )


@EVERY_DIVERGENCE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_hold_to_reference(backend, name, dtype):
    options = {
        "temperature": 0.7,
        "mask": some_mask(),
        "cross_entropy_coef": 0.3,
        "teacher_temperature": temperatures(),
    }
    for case in (DIVERGENCES[name], DIVERGENCES[name] | options):
        hold_to_reference(distillation_loss, distillation_logits_case(dtype=dtype, **case), backend, ["logits"])


@EVERY_DIVERGENCE
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("wrt", [["hidden"], ["hidden", "weight", "bias"], ["weight"]], ids=" ".join)
def test_reductions(backend, name, reduction, wrt):
    """With "none" every token has an incoming gradient of its own, for the head's gradient as well."""
    options = {"weights": temperatures(), "mask": some_mask(), "reduction": reduction, "bias": True, "softcap": 4.0}
    case = distillation_case(cross_entropy_coef=0.3, **options, **DIVERGENCES[name])
    hold_to_reference(linear_distillation_loss, case, backend, wrt)
    options = {"weights": temperatures(), "mask": some_mask(), "reduction": reduction}
    hold_to_reference(distillation_loss, distillation_logits_case(**options, **DIVERGENCES[name]), backend, ["logits"])


def test_temperatures_per_token(backend):
    options = {"temperature": temperatures(), "teacher_temperature": temperatures(seed=3), "mask": some_mask()}
    hold_to_reference(linear_distillation_loss, distillation_case(**options), backend, ["hidden", "weight"])


@EVERY_DIVERGENCE
@pytest.mark.parametrize("vocabulary", [1, 31, 257, 20011])
def test_any_vocabulary(backend, name, vocabulary, coarse):
    case = distillation_case((3,), vocabulary, **DIVERGENCES[name])
    hold_to_reference(linear_distillation_loss, case, backend, ["hidden", "weight"], vocabulary)


def test_both_entrances_agree(any_backend):
    case = distillation_case(**ALL)
    logits, teacher_logits = (
        cap * torch.tanh(scale * (case[f"{x}hidden"] @ case[f"{x}weight"].T + case[f"{x}bias"]) / cap)
        for x, cap, scale in (("", 5.0, 0.5), ("teacher_", 3.0, 1.5))
    )
    options = {name: case[name] for name in ("temperature", "teacher_temperature", "mask")}
    found = linear_distillation_loss(**case, backend=any_backend)
    expected = distillation_loss(logits, teacher_logits, **options, backend=any_backend)
    for x, y in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(x, y)


def test_mixed_dtypes(backend):
    case = distillation_case(bias=True)
    for name in ("hidden", "teacher_weight", "teacher_bias"):
        case[name] = case[name].bfloat16()
    hold_to_reference(linear_distillation_loss, case, backend, ["hidden", "weight", "bias"])
    case = distillation_logits_case()
    case["teacher_logits"] = case["teacher_logits"].bfloat16()
    hold_to_reference(distillation_loss, case, backend, ["logits"])


def test_strided_logits(backend):
    """A shifted slice of a batch, as a causal model's logits are."""
    case = distillation_logits_case((3, 8), 40)
    sliced = {name: x[:, :-1, 1:] for name, x in case.items()}
    expected = evaluate(distillation_loss, {name: x.contiguous() for name, x in sliced.items()}, backend, ["logits"])
    leaf = case["logits"].requires_grad_()
    loss = distillation_loss(leaf[:, :-1, 1:], sliced["teacher_logits"], backend=backend).loss
    upstream = torch.randn((), generator=torch.Generator().manual_seed(99))
    torch.testing.assert_close(torch.autograd.grad(loss * upstream, leaf)[0][:, :-1, 1:], expected["d logits"])


def test_gpus_without_a_product_into_float32_hold_to_reference(monkeypatch):
    """As on ROCm and XPU, where our own product takes the place of the library's in every direction."""
    monkeypatch.setattr(triton_linear, "blas_product", triton_linear.product_of_rows)
    case = distillation_case(dtype=torch.float16, bias=True, mask=some_mask(), divergence="jsd")
    hold_to_reference(linear_distillation_loss, case, "triton", ["hidden", "weight", "bias"])


@EVERY_DIVERGENCE
@pytest.mark.parametrize("head", [{}, ALL], ids=["plain", "all"])
def test_gradcheck(float64_backend, name, head):
    head = head | {"mask": torch.tensor([True, True, False])} if head else head
    case = distillation_case((3,), 7, 4, dtype=torch.float64, **head, **DIVERGENCES[name], cross_entropy_coef=0.2)
    wrt = [x for x in ("hidden", "weight", "bias") if x in case]

    def loss(*tensors):
        return linear_distillation_loss(**case | dict(zip(wrt, tensors, strict=True)), backend=float64_backend).loss

    assert torch.autograd.gradcheck(loss, [case[x].clone().requires_grad_() for x in wrt])


@EVERY_DIVERGENCE
def test_gradcheck_of_every_token(float64_backend, name):
    case = distillation_case((3,), 7, 4, dtype=torch.float64, **DIVERGENCES[name], reduction="none")

    def loss(hidden, weight):
        return linear_distillation_loss(**case | {"hidden": hidden, "weight": weight}, backend=float64_backend).loss

    assert torch.autograd.gradcheck(loss, [case[x].clone().requires_grad_() for x in ("hidden", "weight")])


# Laws. Logits of a student and a teacher, in float64 where a limit is taken.

seeds = st.integers(0, 2**31)
BACKEND = pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
cases = st.builds(
    distillation_logits_case,
    shape=st.tuples(st.integers(1, 5)),
    vocabulary=st.integers(2, 60),
    seed=seeds,
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
)
betas = st.floats(0.01, 0.99)
ROUNDING = 1e-6


def of(case, name, backend, **options):
    return distillation_loss(**case, divergence=name, **options, backend=backend).divergence


def swapped(case):
    return case | {"logits": case["teacher_logits"], "teacher_logits": case["logits"]}


@pytest.mark.usefixtures("all_rows_in_one_program")
class TestLaws:
    @pytest.mark.parametrize("backend", ["torch", "triton"])
    @given(case=cases, scale=st.sampled_from([0.01, 1.0, 30.0]))
    def test_jsd_is_symmetric_bit_by_bit(self, backend, case, scale):
        """Both models' parts are rounded alike; the reference's are to within rounding."""
        case = case | {name: case[name] * scale for name in ("logits", "teacher_logits")}
        found = of(case, "jsd", backend)
        assert torch.equal(found, of(swapped(case), "jsd", backend))
        torch.testing.assert_close(found, of(swapped(case), "jsd", "reference"), rtol=1e-5, atol=ROUNDING)

    @BACKEND
    @given(case=cases)
    def test_jsd_is_bounded(self, backend, case):
        found = of(case, "jsd", backend)
        torch.testing.assert_close(found, of(swapped(case), "jsd", backend), rtol=0, atol=ROUNDING)
        assert (found >= -ROUNDING).all() and (found <= math.log(2) + ROUNDING).all()

    @BACKEND
    @given(case=cases, beta=betas)
    def test_jsd_is_at_most_the_entropy_of_its_weights(self, backend, case, beta):
        found = of(case, "jsd", backend, beta=beta)
        most = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert (found >= -ROUNDING).all() and (found <= most + ROUNDING).all()
        torch.testing.assert_close(found, of(swapped(case), "jsd", backend, beta=1 - beta), rtol=0, atol=ROUNDING)

    @pytest.mark.parametrize("backend", ["reference", "torch"])
    @given(case=cases)
    def test_jsd_tends_to_the_kls(self, backend, case):
        """The excess is of second order in beta: with half of it, half as large."""
        case = {name: x.double() if torch.is_tensor(x) else x for name, x in case.items()}
        for kl, beta_of in (("forward_kl", lambda beta: beta), ("reverse_kl", lambda beta: 1 - beta)):
            limit = of(case, kl, backend)
            gaps = [limit - of(case, "jsd", backend, beta=beta_of(b)) / b for b in (2e-8, 1e-8)]
            assert (gaps[0].abs() <= 1e-4 + 1e-2 * limit).all()
            assert (gaps[1] <= gaps[0] + 1e-6 * (1 + limit)).all()

    @BACKEND
    @given(case=cases)
    def test_beta_0_and_1_are_the_kls(self, backend, case):
        assert torch.equal(of(case, "jsd", backend, beta=0.0), of(case, "forward_kl", backend))
        assert torch.equal(of(case, "jsd", backend, beta=1), of(case, "reverse_kl", backend))
        torch.testing.assert_close(of(case, "reverse_kl", backend), of(swapped(case), "forward_kl", backend))

    @BACKEND
    @given(case=cases)
    def test_tv_is_bounded_by_one_and_by_pinsker(self, backend, case):
        tv = of(case, "tv", backend)
        assert (tv >= 0).all() and (tv <= 1 + ROUNDING).all()
        for name in ("reverse_kl", "forward_kl"):
            assert (2 * tv**2 <= of(case, name, backend) + ROUNDING).all()
        torch.testing.assert_close(tv, of(swapped(case), "tv", backend), rtol=0, atol=ROUNDING)

    @BACKEND
    @given(case=cases, seed=seeds)
    def test_gradient_of_tv(self, backend, case, seed):
        """p / 2 (s - sum p s) / T with s = sign(p - q): far from 0, where float32 has the sign, or exactly there."""
        draw = torch.Generator().manual_seed(seed)
        same = torch.rand(case["logits"].shape, generator=draw) > 0.5
        temperature = case["temperature"]
        logits = case["logits"].double()
        for keep_everything in (True, False):  # with all logits the same, every sign is 0
            teacher = torch.where(same | keep_everything, logits, logits + 1)
            logp, logq = (torch.log_softmax(x / temperature, -1) for x in (logits, teacher))
            assume(keep_everything or ((logp - logq).abs() > 1e-3).all())
            p, s = logp.exp(), (logp - logq).sign()
            expected = p / 2 * (s - (p * s).sum(-1, keepdim=True)) / temperature
            leaf = logits.float().requires_grad_()
            found = distillation_loss(
                leaf, teacher.float(), divergence="tv", temperature=temperature, reduction="sum", backend=backend
            ).loss
            gradient = torch.autograd.grad(found, leaf)[0]
            torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6)
            assert not keep_everything or gradient.eq(0).all()

    @BACKEND
    @given(case=cases, options=st.sampled_from([*DIVERGENCES.values()]))
    def test_nothing_between_equals(self, backend, case, options):
        case = case | options | {"teacher_logits": case["logits"], "reduction": "sum"}
        found = evaluate(distillation_loss, case, backend, ["logits"])
        assert found["divergence"].abs().max() <= ROUNDING and found["d logits"].abs().max() <= 1e-5

    @BACKEND
    @given(case=cases, options=st.sampled_from([*DIVERGENCES.values()]))
    def test_gradients_of_a_row_sum_to_zero(self, backend, case, options):
        found = evaluate(distillation_loss, case | options | {"reduction": "none"}, backend, ["logits"])
        total, size = found["d logits"].sum(-1).abs(), found["d logits"].abs().sum(-1)
        assert (total <= 1e-5 * (1 + size)).all()

    @BACKEND
    @given(case=cases)
    def test_kls_are_those_of_token_stats(self, backend, case):
        temperature, tokens = case["temperature"], torch.zeros(case["logits"].shape[:-1], dtype=torch.long)
        for one, name in ((case, "reverse_kl"), (swapped(case), "forward_kl")):
            stats = token_stats(
                one["logits"], tokens, ref_logits=one["teacher_logits"], temperature=temperature, backend=backend
            )
            found = distillation_loss(**case, divergence=name, backend=backend)
            size = max(1.0, case["logits"].abs().max().item() / temperature)
            torch.testing.assert_close(found.divergence, stats.kl, rtol=1e-5, atol=2e-6 * size)
            if name == "reverse_kl":
                torch.testing.assert_close(found.entropy, stats.entropy, rtol=1e-5, atol=2e-6 * size)


def test_the_reverse_kl_is_that_of_linear_token_stats(any_backend):
    """Value and gradient, with a head of the reference's own."""
    case = linear_case(reference="own", bias=True, softcap=5.0, logit_scale=0.7, temperature=0.8)
    leaves = [case[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    stats = linear_token_stats(**case, backend=any_backend)
    expected = torch.autograd.grad(stats.kl.mean(), leaves)
    shared = {"softcap": 5.0, "logit_scale": 0.7, "temperature": 0.8, "bias": case["bias"], "tokens": case["tokens"]}
    found = linear_distillation_loss(
        *(case["hidden"], case["weight"], case["ref_hidden"], case["ref_weight"]),
        **shared,
        teacher_bias=case["ref_bias"],
        teacher_softcap=5.0,
        teacher_logit_scale=0.7,
        backend=any_backend,
    )
    torch.testing.assert_close(found.divergence, stats.kl)
    torch.testing.assert_close(found.entropy, stats.entropy)
    torch.testing.assert_close(found.logprob, stats.logprob)
    torch.testing.assert_close(torch.autograd.grad(found.loss, leaves), expected)


def test_several_teachers_as_the_page_has_them():
    """docs/divergences.md, of smaller tensors, against float64 on whole logits."""
    page = (Path(__file__).parents[1] / "docs" / "divergences.md").read_text()
    code = page.partition("## Several teachers\n")[2].partition("```python\n")[2].partition("```")[0]
    for large, small in (("49152", "61"), ("128", "5"), ("576", "16"), ("960", "24"), ("2048", "8")):
        assert large in code
        code = code.replace(large, small)
    torch.manual_seed(0)
    given = {}
    exec(code, given)
    hidden = given["hidden"].detach().double().requires_grad_()
    logp = (hidden @ given["lm_head"].double().T).log_softmax(-1)
    expected = 0.0
    for (teacher_hidden, teacher_head), share in zip(given["teachers"], given["shares"], strict=True):
        logq = (teacher_hidden.double() @ teacher_head.double().T).log_softmax(-1)
        expected = expected + (share * (logp.exp() * (logp - logq)).sum(-1)).mean()
    torch.testing.assert_close(sum(given["losses"]).double(), expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(expected, hidden)
    torch.testing.assert_close(given["hidden"].grad.double(), gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_beta_is_that_of_trl(any_backend, beta):
    """Value, entropy, and the gradient of every token, for the head as well."""
    trl = pytest.importorskip("trl.kernels.chunked_divergence")
    case = {name: x.flatten(0, -2) if "hidden" in name else x for name, x in distillation_case(bias=True).items()}
    leaves = [case[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    teacher = [case[f"teacher_{name}"] for name in ("hidden", "weight", "bias")]
    divergence, entropy = trl.ChunkedDivergenceFunction.apply(*leaves, *teacher, beta, 0.8, 0.7, 5.0, 1.3, 3.0)
    options = {"temperature": 0.8, "logit_scale": 0.7, "softcap": 5.0}
    options |= {"teacher_logit_scale": 1.3, "teacher_softcap": 3.0, "reduction": "none"}
    found = linear_distillation_loss(**case, **options, divergence="jsd", beta=beta, backend=any_backend)
    torch.testing.assert_close(found.loss, divergence)
    torch.testing.assert_close(found.entropy, entropy)
    upstream = torch.randn(21, generator=torch.Generator().manual_seed(2))
    expected = torch.autograd.grad(divergence, leaves, upstream)
    torch.testing.assert_close(torch.autograd.grad(found.loss, leaves, upstream), expected)


# What is infinite, NaN or missing.


@pytest.mark.parametrize("excluded", [-math.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("who", ["student", "teacher", "both"])
def test_probabilities_of_zero(any_backend, who, excluded):
    """An id that one model excludes, by a bias of -inf, or of the lowest number, where no KL is infinite but large."""
    for name, options in DIVERGENCES.items():
        case = distillation_case(bias=True, reduction="none", **options)
        for bias in {"student": ["bias"], "teacher": ["teacher_bias"], "both": ["bias", "teacher_bias"]}[who]:
            case[bias][5] = excluded
        exact = evaluate(linear_distillation_loss, case, "reference", ["hidden"], torch.float64)
        found = evaluate(linear_distillation_loss, case, any_backend, ["hidden"])
        infinite = (name, who) in {("reverse_kl", "teacher"), ("forward_kl", "student")}
        if infinite and excluded > -math.inf:
            assert (found["divergence"] > 1e12).all() and found["divergence"].isfinite().all()
            assert any_backend == "reference" or found["d hidden"].isfinite().all()  # which does not clamp
            continue
        assert found["divergence"].isinf().all() == infinite and not found["divergence"].isnan().any(), (name, who)
        torch.testing.assert_close(found["divergence"].double(), exact["divergence"], rtol=1e-5, atol=1e-5)
        if (name, who) == ("reverse_kl", "teacher"):
            assert any_backend == "reference" or found["d hidden"].isnan().all()
        else:
            torch.testing.assert_close(found["d hidden"].double(), exact["d hidden"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("argument", ["logits", "teacher_logits"])
@EVERY_DIVERGENCE
def test_a_nan_stays_in_its_row(any_backend, name, argument):
    case = distillation_logits_case(reduction="none", **DIVERGENCES[name])
    case[argument][1, 2, 3] = math.nan
    found = evaluate(distillation_loss, case, any_backend, ["logits"])
    here = torch.zeros(3, 7, dtype=torch.bool)
    here[1, 2] = True
    assert torch.equal(found["divergence"].isnan(), here) and torch.equal(found["loss"].isnan(), here)
    gradient_is_nan = found["d logits"].isnan()
    assert not gradient_is_nan[~here].any()
    assert any_backend == "reference" or gradient_is_nan[1, 2].all()  # autograd's slope of |NaN| is 0


@pytest.mark.parametrize("value", [-math.inf, math.nan])
@EVERY_DIVERGENCE
def test_a_row_without_a_distribution_is_nan(any_backend, name, value):
    for argument in ("logits", "teacher_logits"):
        case = distillation_logits_case(reduction="none", **DIVERGENCES[name])
        case[argument][1, 2] = value
        found = distillation_loss(**case, backend=any_backend)
        assert found.divergence[1, 2].isnan() and found.divergence.isnan().sum() == 1


@pytest.mark.parametrize("everywhere", [True, False], ids=["left out", "zeroed"])
@EVERY_DIVERGENCE
def test_masked_rows_are_zero_and_spread_nothing(any_backend, name, everywhere, monkeypatch):
    if not everywhere:
        for module in (linear, rows):
            monkeypatch.setattr(module, "is_on_host", lambda _: False)
    mask = some_mask()
    case = distillation_case(mask=mask, cross_entropy_coef=0.2, weights=temperatures(), **DIVERGENCES[name])
    clean = evaluate(linear_distillation_loss, case, any_backend, ["hidden", "weight"])
    for argument in ("hidden", "teacher_hidden", "weights"):
        case[argument][~mask] = math.nan
    case["tokens"] = case["tokens"].where(mask, -100)
    for field, x in evaluate(linear_distillation_loss, case, any_backend, ["hidden", "weight"]).items():
        assert torch.equal(x, clean[field]), field
        assert field == "d weight" or x.dim() == 0 or x[~mask].eq(0).all(), field


@pytest.mark.parametrize("shape", [(0,), (2, 0), (3,)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_live(any_backend, shape, reduction):
    case = distillation_case(shape, 9, mask=torch.zeros(shape, dtype=torch.bool), reduction=reduction)
    found = evaluate(linear_distillation_loss, case, any_backend, ["hidden", "weight"])
    assert all(x.eq(0).all() for x in found.values())
    case = distillation_logits_case(shape, 9, mask=torch.zeros(shape, dtype=torch.bool), reduction=reduction)
    assert all(x.eq(0).all() for x in evaluate(distillation_loss, case, any_backend, ["logits"]).values())


def test_an_id_outside_the_vocabulary_is_nan(any_backend):
    case = distillation_case(cross_entropy_coef=0.5, reduction="none")
    case["tokens"][1, 1] = -100
    found = evaluate(linear_distillation_loss, case, any_backend, ["hidden"])
    here = torch.zeros(3, 7, dtype=torch.bool)
    here[1, 1] = True
    assert torch.equal(found["loss"].isnan(), here) and torch.equal(found["logprob"].isnan(), here)
    assert found["divergence"].isfinite().all() and torch.equal(found["d hidden"].isnan().all(-1), here)


# Users' ways.


def test_the_teacher_and_a_head_that_both_share_receive_no_gradient_from_it(any_backend):
    case = distillation_case(bias=True)
    case["teacher_hidden"] = case["hidden"] + 0.3 * torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(5))
    case |= {"teacher_weight": case["weight"].clone(), "teacher_bias": case["bias"].clone()}
    for x in case.values():
        x.requires_grad_()
    linear_distillation_loss(**case, backend=any_backend).loss.backward()
    assert all(case[name].grad is None for name in ("teacher_hidden", "teacher_weight", "teacher_bias"))
    own = case["weight"].grad.clone()
    case["weight"].grad = None
    linear_distillation_loss(**case | {"teacher_weight": case["weight"]}, backend=any_backend).loss.backward()
    torch.testing.assert_close(case["weight"].grad, own)


def test_only_the_loss_carries_a_gradient(any_backend):
    case = distillation_case(cross_entropy_coef=0.1)
    case["hidden"].requires_grad_()
    found = linear_distillation_loss(**case, backend=any_backend)
    assert found.loss.requires_grad and not any(x.requires_grad for x in found[1:])
    with torch.no_grad():
        assert not linear_distillation_loss(**case, backend=any_backend).loss.requires_grad
    case = distillation_logits_case(cross_entropy_coef=0.1)
    case["logits"].requires_grad_()
    assert not any(x.requires_grad for x in distillation_loss(**case, backend=any_backend)[1:])


def test_teachers_with_weights_of_their_own_add_up(any_backend):
    """Two calls with weights per token and teacher: the mean over the same tokens of a sum of divergences."""
    first, second = distillation_case(), distillation_case(seed=7)
    second |= {name: first[name] for name in ("hidden", "weight")}
    mask, share = some_mask(), temperatures() / 2
    losses, divergences = [], []
    for case, weights in ((first, share), (second, 1 - share)):
        found = linear_distillation_loss(**case, mask=mask, weights=weights, backend=any_backend)
        losses.append(found.loss)
        divergences.append(found.divergence * weights)
    torch.testing.assert_close(sum(losses), sum(divergences)[mask].mean())


def test_padded_heads_are_cut_when_asked(any_backend):
    case = distillation_case(bias=True, cross_entropy_coef=0.1)
    expected = evaluate(linear_distillation_loss, case, any_backend, ["hidden", "weight", "bias"])
    padded = dict(case)
    for name, more in (("weight", 3), ("bias", 3), ("teacher_weight", 8), ("teacher_bias", 8)):
        padded[name] = torch.cat([case[name], torch.randn(more, *case[name].shape[1:])])
    with pytest.raises(ValueError, match=r"vocabulary of 45 and weight one of 40.*shared_vocabulary=..., at most 40"):
        linear_distillation_loss(**padded, backend=any_backend)
    padded["shared_vocabulary"] = 37
    found = evaluate(linear_distillation_loss, padded, any_backend, ["hidden", "weight", "bias"])
    for name, x in found.items():
        expected_x = expected[name]
        if name in ("d weight", "d bias"):
            assert x[37:].eq(0).all()
            x = x[:37]
        torch.testing.assert_close(x, expected_x)
    logits = distillation_logits_case()
    more = logits | {"logits": torch.cat([logits["logits"], torch.randn(3, 7, 2)], -1), "shared_vocabulary": 37}
    torch.testing.assert_close(
        distillation_loss(**more, backend=any_backend).loss, distillation_loss(**logits, backend=any_backend).loss
    )


def test_a_group_of_several_ranks_is_refused(monkeypatch):
    class Two:
        def size(self):
            return 2

    monkeypatch.setattr("safe_kernels.checks.local_parts", lambda group, *_, **tensors: [*tensors.values(), Two()])
    for op, case in (
        (linear_distillation_loss, distillation_case()),
        (distillation_loss, distillation_logits_case()),
    ):
        with pytest.raises(ValueError, match="process_group has 2 ranks; .* needs the whole vocabulary on each"):
            op(**case)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(backend, reduction, use_reentrant):
    case = distillation_case(reduction=reduction, divergence="jsd")
    leaves = [case.pop(name).requires_grad_() for name in ("hidden", "weight")]

    def loss(*leaves):
        return linear_distillation_loss(*leaves, **case, backend=backend).loss.sum()

    plain = torch.autograd.grad(loss(*leaves), leaves)
    torch.utils.checkpoint.checkpoint(loss, *leaves, use_reentrant=use_reentrant).backward()
    assert all(torch.equal(x.grad, y) for x, y in zip(leaves, plain, strict=True))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("wrt", [["hidden"], ["hidden", "weight"]], ids=" ".join)
def test_the_jacobian_of_tokens(backend, wrt):
    """Several incoming gradients at once: every token's own."""
    case = distillation_case((3,), 11, 4, reduction="none", divergence="jsd")
    leaves = [case[name].requires_grad_() for name in wrt]
    loss = linear_distillation_loss(**case, backend=backend).loss
    together = torch.autograd.grad(loss, leaves, torch.eye(3), is_grads_batched=True, retain_graph=True)
    for i, row in enumerate(torch.eye(3)):
        alone = torch.autograd.grad(loss, leaves, row, retain_graph=True)
        for x, y in zip(together, alone, strict=True):
            torch.testing.assert_close(x[i], y)


def test_two_runs_have_the_same_bits(backend):
    case = distillation_case(vocabulary=101, divergence="jsd")
    runs = [evaluate(linear_distillation_loss, case, backend, ["hidden", "weight"]) for _ in range(2)]
    assert all(torch.equal(x, runs[1][name]) for name, x in runs[0].items())


def test_autocast_changes_nothing(any_backend):
    """Nor a backward inside of it, but that of the reference, which is PyTorch's."""
    for op, case, wrt in (
        (linear_distillation_loss, distillation_case(), ["hidden", "weight"]),
        (distillation_loss, distillation_logits_case(), ["logits"]),
    ):
        wrt = [] if any_backend == "reference" else wrt
        plain = evaluate(op, case, any_backend, wrt)
        with torch.autocast("cpu", torch.bfloat16):
            cast = evaluate(op, case, any_backend, wrt)
        assert all(torch.equal(x, plain[name]) for name, x in cast.items())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_asks_the_device(backend, reduction, monkeypatch):
    """No value is read back to the host, in the forward or the backward."""
    for module in (linear, rows):
        monkeypatch.setattr(module, "is_on_host", lambda _: False)
    options = {"mask": some_mask(), "temperature": temperatures(), "bias": True, "weights": temperatures()}
    for name in ("reverse_kl", "jsd"):
        case = distillation_case(**options, cross_entropy_coef=0.1, reduction=reduction, divergence=name)
        with Allocations() as seen:
            evaluate(linear_distillation_loss, case, backend, ["hidden", "weight", "bias"])
        assert "aten::mm" in seen.operators or "aten::addmm" in seen.operators
        assert not seen.operators & {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


@pytest.mark.parametrize("low_precision", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_tensor_of_the_size_of_the_logits(backend, low_precision, reduction, coarse, monkeypatch):
    """Nothing near N x V, of the student or of the teacher, and no float32 copy of a low-precision weight."""
    if backend == "triton" and low_precision:
        pytest.skip("on a CPU the products of the Triton backend stand in for the BLAS library's, in float32")
    monkeypatch.setattr(linear, "PRODUCT_BYTES", 30 * 1000 * 4)
    dtype = torch.bfloat16 if low_precision else torch.float32
    case = distillation_case((700,), 1000, 32, dtype=dtype, reduction=reduction, divergence="jsd")
    with Allocations() as seen:
        evaluate(linear_distillation_loss, case, backend, ["hidden"] if low_precision else ["hidden", "weight"])
    assert seen.largest < 700 * 1000 * 4 / 10
    assert not low_precision or seen.largest < 1000 * 32 * 4
