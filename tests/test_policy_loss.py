"""The closed-form loss: equal to the composition of statistics and plain losses, for every option."""

import itertools
import math

import pytest
import torch
from cases import evaluate, hold_to_reference, linear_case, policy_case, some_mask, temperatures
from memory import Allocations

from safe_kernels import linear_policy_loss, linear_token_stats

pytestmark = pytest.mark.usefixtures("kernels")
TERMS = {
    "clip": {},
    "clip low": {"clip_low": 0.05, "clip_high": 10.0},
    "clip high": {"clip_low": 1.0, "clip_high": 0.05},
    "entropy": {"entropy_coef": 0.1},
    "kl": {"kl_coef": 0.3},
    "penalty": {"kl_penalty_coef": 0.5, "kl_threshold": 0.2},
    "forward kl": {"ref_kl_coef": 0.4},
    "all": {"entropy_coef": 0.1, "kl_coef": 0.3, "kl_penalty_coef": 0.5, "kl_threshold": 0.2, "clip_high": 0.28},
}
TERMS["all"]["ref_kl_coef"] = 0.4


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_holds_to_the_composition(backend, terms, masked, dtype):
    case = policy_case(dtype=dtype, **TERMS[terms])
    if masked:
        case["mask"] = some_mask()
    hold_to_reference(linear_policy_loss, case, backend, ["hidden", "weight"])


@pytest.mark.parametrize(
    "head",
    [
        {"reference": None},
        {"reference": "own", "bias": True, "temperature": 0.7},
        {"softcap": 5.0, "logit_scale": 0.5, "bias": True, "temperature": 1.3},
    ],
    ids=["no reference", "own head", "softcap"],
)
def test_every_head(backend, head):
    terms = TERMS["entropy"] if head.get("reference", "") is None else TERMS["all"]
    wrt = ["hidden", "weight", *(["bias"] if head.get("bias") else [])]
    hold_to_reference(linear_policy_loss, policy_case(**head, **terms), backend, wrt)


def test_coefficients_as_tensors(any_backend):
    numbers = TERMS["all"]
    tensors = {name: torch.tensor(x) if "clip" not in name else x for name, x in numbers.items()}
    plain, found = (
        evaluate(linear_policy_loss, policy_case() | terms, any_backend, ["hidden"]) for terms in (numbers, tensors)
    )
    for name, x in found.items():
        torch.testing.assert_close(x, plain[name])


@pytest.mark.parametrize("reduction", ["sequence mean", "global count", "importance"])
def test_reductions_through_loss_weight(backend, reduction):
    mask = some_mask()
    live = mask.float()
    weights = {
        "sequence mean": live / live.sum(1, keepdim=True).clamp(min=1) / 3,
        "global count": live / 1000,
        "importance": live * temperatures(),
    }[reduction]
    weights = weights.where(mask, math.nan)
    hold_to_reference(
        linear_policy_loss, policy_case(mask=mask, loss_weight=weights, **TERMS["all"]), backend, ["hidden", "weight"]
    )


def test_default_reduction_is_the_token_mean(any_backend):
    mask = some_mask()
    case = policy_case(mask=mask)
    default = linear_policy_loss(**case, backend=any_backend).loss
    explicit = linear_policy_loss(**case, loss_weight=mask / mask.sum(), backend=any_backend).loss
    torch.testing.assert_close(default, explicit)


def test_gradient_accumulation(any_backend):
    """Parts of a batch with weights over the whole of it add up to the batch."""
    case = policy_case(loss_weight=torch.full((3, 7), 1 / 21), **TERMS["all"])
    whole = evaluate(linear_policy_loss, case, any_backend, ["weight"])
    parts = []
    for row in range(3):
        some = {k: v[row] if torch.is_tensor(v) and v.shape[:2] == (3, 7) else v for k, v in case.items()}
        parts.append(evaluate(linear_policy_loss, some, any_backend, ["weight"]))
    torch.testing.assert_close(sum(p["loss"] for p in parts), whole["loss"])
    upstream = {name: torch.randn((), generator=torch.Generator().manual_seed(99)) for name in ("loss",)}["loss"]
    torch.testing.assert_close(sum(p["d weight"] for p in parts) / upstream, whole["d weight"] / upstream)


def scoring(case, backend):
    """On the torch backend by `linear_token_stats`, elsewhere by the loss itself, whose products have other tiles."""
    if backend == "torch":
        return linear_token_stats(**case, backend=backend)
    nothing = torch.zeros(case["tokens"].shape)
    return linear_policy_loss(**case, old_logprob=nothing, advantage=nothing, backend=backend)


@pytest.mark.parametrize(
    "options", [{}, {"mask": "some"}, {"temperature": 0.7, "bias": True}, {"batch_invariant": True}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reference", [None, "shared"])
def test_statistics_have_the_bits_of_the_scoring(backend, options, dtype, reference):
    """Hence a ratio of exactly 1 before the first optimizer step, with and without gradient mode or a reference."""
    if "mask" in options:
        options = {"mask": some_mask()}
    case = linear_case(vocabulary=101, dtype=dtype, **options)
    if reference is None:
        case.pop("ref_hidden")
    scored = scoring(linear_case(vocabulary=101, dtype=dtype, **options), backend)
    hidden = case.pop("hidden").requires_grad_()
    case |= {"old_logprob": scored.logprob, "advantage": torch.ones(3, 7), "entropy_coef": 0.1}
    with_gradient = linear_policy_loss(hidden, **case, backend=backend)
    with torch.no_grad():
        without = linear_policy_loss(hidden, **case, backend=backend)
    for found in (with_gradient, without):
        assert torch.equal(found.logprob, scored.logprob) and torch.equal(found.entropy, scored.entropy)
        assert reference is None or torch.equal(found.kl, scored.kl)
        assert found.clip_fraction == 0
    assert torch.equal(with_gradient.loss, without.loss)


def test_only_the_loss_carries_a_gradient(any_backend):
    case = policy_case(**TERMS["all"])
    case["hidden"].requires_grad_()
    found = linear_policy_loss(**case, backend=any_backend)
    assert found.loss.requires_grad and not any(x.requires_grad for x in found[1:])
    with torch.no_grad():
        assert not linear_policy_loss(**case, backend=any_backend).loss.requires_grad


def test_clip_fraction(any_backend):
    case = linear_case((4,), 9)
    logprob = linear_token_stats(**case, backend=any_backend).logprob
    case["old_logprob"] = logprob - torch.tensor([0.5, 0.5, -0.5, 0.0])  # ratios 1.65, 1.65, 0.61, 1
    case["advantage"] = torch.tensor([1.0, -1.0, -1.0, 1.0])  # the clip acts on the first and the third
    assert linear_policy_loss(**case, backend=any_backend).clip_fraction == 0.5
    live = torch.tensor([True, False, False, True])
    assert linear_policy_loss(**case, mask=live, backend=any_backend).clip_fraction == 0.5


def test_gradient_is_scaled_and_rounded_once(backend):
    if backend == "triton":
        pytest.skip("its products take the gradient of the logits in the inputs' precision")
    case = policy_case(dtype=torch.bfloat16)
    hidden = case.pop("hidden").requires_grad_()
    wide = {k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in case.items()}
    exact = hidden.detach().float().requires_grad_()
    (linear_policy_loss(hidden, **case, backend=backend).loss * 0.3).backward()
    (linear_policy_loss(exact, **wide, backend=backend).loss * 0.3).backward()
    assert torch.equal(hidden.grad, exact.grad.bfloat16())


def test_the_gradient_does_not_outlive_the_backward(backend):
    """A loss kept for the log does not keep a gradient of the size of the weight with it."""
    case = policy_case()
    case["weight"].requires_grad_()
    loss = linear_policy_loss(**case, backend=backend).loss
    loss.backward(retain_graph=True)
    first = case["weight"].grad.clone()
    loss.backward()
    torch.testing.assert_close(case["weight"].grad, 2 * first)
    with pytest.raises(RuntimeError, match="have already been freed"):
        loss.backward()


def test_the_backward_allocates_the_gradients_alone(backend):
    case = policy_case(vocabulary=300, dtype=torch.bfloat16)
    leaves = [case[name].requires_grad_() for name in ("hidden", "weight")]
    loss = linear_policy_loss(**case, backend=backend).loss
    with Allocations() as seen:
        found = torch.autograd.grad(loss, leaves)
    in_float32 = 4 * found[1].numel()  # which a CPU rounds from
    assert seen.peak <= sum(x.nbytes for x in found) + in_float32 + 1024


def test_masked_tokens_spread_nothing(any_backend):
    mask = some_mask()
    case = policy_case(mask=mask, **TERMS["all"])
    clean = evaluate(linear_policy_loss, case, any_backend, ["hidden", "weight"])
    for name in ("hidden", "ref_hidden", "old_logprob", "advantage"):
        case[name][~mask] = math.nan
    for name, x in evaluate(linear_policy_loss, case, any_backend, ["hidden", "weight"]).items():
        assert torch.equal(x, clean[name]), name
        assert name == "d weight" or x.dim() == 0 or x[~mask].eq(0).all(), name


@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_live(any_backend, tokens):
    case = linear_case((tokens,), 9, mask=torch.zeros(tokens, dtype=torch.bool))
    case |= {"old_logprob": torch.zeros(tokens), "advantage": torch.ones(tokens)}
    found = evaluate(linear_policy_loss, case, any_backend, ["hidden", "weight"])
    assert all(x.eq(0).all() for x in found.values())


def test_a_switched_off_term_stays_out(any_backend):
    """An infinite KL that is only watched does not reach the loss."""
    case = policy_case(reference="own")
    case["ref_bias"][3] = -math.inf
    found = evaluate(linear_policy_loss, case, any_backend, ["hidden", "weight"])
    assert found["kl"].eq(math.inf).all() and found["loss"].isfinite() and found["d weight"].isfinite().all()


@pytest.mark.parametrize("clip, advantage", [*itertools.product((0.05, 0.2), (1.0, -1.0))])
def test_gradcheck(float64_backend, clip, advantage):
    case = policy_case((3,), vocabulary=7, width=4, dtype=torch.float64, **TERMS["all"] | {"clip_high": clip})
    case |= {"ref_weight": case["weight"].clone(), "advantage": torch.full((3,), advantage)}

    def loss(hidden, weight):
        return linear_policy_loss(**case | {"hidden": hidden, "weight": weight}, backend=float64_backend).loss

    assert torch.autograd.gradcheck(loss, [case[x].clone().requires_grad_() for x in ("hidden", "weight")])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(backend, use_reentrant):
    """The forward runs twice: without gradient mode, or with gradients that are dropped, and again in the backward."""
    case = policy_case(**TERMS["all"])
    hidden = case.pop("hidden").requires_grad_()

    def loss(hidden):
        return linear_policy_loss(hidden, **case, backend=backend).loss

    plain = torch.autograd.grad(loss(hidden), hidden)[0]
    torch.utils.checkpoint.checkpoint(loss, hidden, use_reentrant=use_reentrant).backward()
    assert torch.equal(hidden.grad, plain)


def test_small_loss_weights_lose_nothing_in_float16(backend):
    """Thousands of tokens make each weight small, and a loss scale comes only after the gradient has been rounded."""
    case = policy_case((4,), vocabulary=300, dtype=torch.float16, loss_weight=torch.full((4,), 1 / 8192))
    hold_to_reference(linear_policy_loss, case, backend, ["weight"], 300)
    found = {}
    for name in (backend, "reference"):
        weight = case["weight"].clone().requires_grad_()
        loss = linear_policy_loss(**case | {"weight": weight}, backend=name).loss * 2.0**16
        found[name] = torch.autograd.grad(loss, weight)[0].float()
    error = (found[backend] - found["reference"]).norm() / found["reference"].norm()
    assert error < 2e-3 and (found[backend] == 0).sum() <= (found["reference"] == 0).sum()
