"""Ways to differentiate other than `backward`: the derivative, or an error that names the backend; never zeros."""

import functools

import pytest
import torch
from cases import (
    distillation_case,
    distillation_logits_case,
    linear_case,
    logits_case,
    policy_case,
    some_mask,
    values_case,
)
from torch import distributed
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

from safe_kernels import (
    distillation_loss,
    linear_distillation_loss,
    linear_policy_loss,
    linear_safe_terms,
    linear_token_stats,
    reference,
    safe_terms,
    soft_min,
    soft_min_gae,
    token_stats,
)

pytestmark = [
    pytest.mark.usefixtures("kernels"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),  # by PyTorch's own forward mode
]

SAFE = values_case(kl_threshold=0.1, alpha=0.3, gamma=0.9)
SPLIT = {"kl_coef": 0.3, "kl_penalty_coef": 0.2, "kl_threshold": 0.01, "entropy_coef": 0.1, "ref_kl_coef": 0.2}
KEPT = torch.arange(0, 37, 2).expand(3, 7, 19)
# An operation, its arguments, by which one it is differentiated, and of which result.
OPERATIONS = {
    "logprob of logits": (token_stats, logits_case(mask=some_mask()), "logits", "logprob"),
    "kl of logits": (token_stats, logits_case(), "logits", "kl"),
    "ref_kl of logits": (token_stats, logits_case(with_ref_kl=True), "logits", "ref_kl"),
    "ref_kl of hidden states": (linear_token_stats, linear_case(with_ref_kl=True, softcap=5.0), "hidden", "ref_kl"),
    "entropy of hidden states": (linear_token_stats, linear_case(softcap=5.0), "hidden", "entropy"),
    "logprob of a head": (linear_token_stats, linear_case(reference=None), "weight", "logprob"),
    "kl of a bias": (linear_token_stats, linear_case(bias=True, reference="own"), "bias", "kl"),
    "kl within kept sets": (token_stats, logits_case(kept=KEPT), "logits", "kl"),
    "entropy within kept sets": (linear_token_stats, linear_case(kept=KEPT), "weight", "entropy"),
    "kl beside several ids": (linear_token_stats, linear_case(softcap=5.0) | {"tokens": KEPT}, "hidden", "kl"),
    "penalty": (safe_terms, logits_case(**SAFE), "logits", "kl_penalty"),
    "value": (safe_terms, logits_case(**SAFE), "v1", "value"),
    "penalty of hidden states": (linear_safe_terms, linear_case(**SAFE), "hidden", "kl_penalty"),
    "value beside hidden states": (linear_safe_terms, linear_case(**SAFE), "v2", "value"),
    "policy loss": (linear_policy_loss, policy_case(**SPLIT), "hidden", "loss"),
    "policy loss of a head": (linear_policy_loss, policy_case(**SPLIT), "weight", "loss"),
    "distillation": (linear_distillation_loss, distillation_case(divergence="jsd"), "hidden", "loss"),
    "distillation of tokens": (linear_distillation_loss, distillation_case(reduction="none"), "weight", "loss"),
    "distillation of logits": (distillation_loss, distillation_logits_case(divergence="forward_kl"), "logits", "loss"),
}
ESTIMATES = values_case(mask=some_mask(), bootstrap=torch.tensor([0.5, -1.0, 2.0]))
GAE = {name: (soft_min_gae, ESTIMATES, name, "advantage") for name in ("v1", "rewards", "bootstrap")}
every_operation = pytest.mark.parametrize("name", OPERATIONS)


def function_of(operation, backend):
    """A scalar function of one argument, and where to differentiate it."""
    op, case, argument, result = operation
    weights = torch.randn(3, 7, generator=torch.Generator().manual_seed(5))

    def function(x):
        found = getattr(op(**case | {argument: x}, backend=backend), result)
        return found if found.dim() == 0 else (found * weights).sum()

    return function, case[argument].clone()


def direction(x):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(6))


def dual(function, x, requires_grad=False):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(
            function(forward_ad.make_dual(x.requires_grad_(requires_grad), direction(x)))
        ).tangent


def around(function, x, inner):
    """Forward mode from outside of a transform that has nothing to do with it."""
    return jvp(lambda y: inner(lambda scale: scale * function(y))(torch.ones(2)).sum(), (x,), (direction(x),))[1]


def dual_around(function, x):
    with forward_ad.dual_level():
        y = forward_ad.make_dual(x, direction(x))
        return forward_ad.unpack_dual(grad(lambda scale: scale * function(y))(torch.ones(()))).tangent


FORWARD = {
    "jvp": lambda f, x: jvp(f, (x,), (direction(x),))[1],
    "jacfwd": lambda f, x: (jacfwd(f)(x) * direction(x)).sum(),
    "forward_ad": dual,
    "forward_ad of a leaf": functools.partial(dual, requires_grad=True),
    "jvp around vmap": lambda f, x: around(f, x, vmap),
    "jvp around grad": lambda f, x: around(f, x, lambda g: grad(lambda scale: g(scale).sum())) / 2,
    "forward_ad around grad": dual_around,
    "without autograd": lambda f, x: torch.no_grad()(FORWARD["jvp"])(f, x),
}
forward_ways = pytest.mark.parametrize("way", FORWARD)


@forward_ways
@every_operation
def test_forward_mode_is_refused(name, way, backend):
    with pytest.raises(NotImplementedError, match=f"backend '{backend}' has no forward-mode.*backend='reference'"):
        FORWARD[way](*function_of(OPERATIONS[name], backend))


@pytest.mark.parametrize("argument", GAE)
@forward_ways
def test_forward_mode_of_estimates_is_refused(way, argument, backend):
    with pytest.raises(NotImplementedError, match=f"backend '{backend}' has no forward-mode derivative"):
        FORWARD[way](*function_of(GAE[argument], backend))


@pytest.mark.parametrize("argument", GAE)
def test_the_reference_has_the_derivative_of_estimates(argument):
    op, case, *rest = GAE[argument]
    case = {name: x.double() if x.is_floating_point() else x for name, x in case.items()}
    function, x = function_of((op, case, *rest), "reference")
    tangent = direction(x).double()
    expected = (function(x + 1e-4 * tangent) - function(x - 1e-4 * tangent)) / 2e-4
    torch.testing.assert_close(jvp(function, (x,), (tangent,))[1], expected, rtol=1e-6, atol=1e-6)


@every_operation
def test_the_reference_has_the_derivative_in_forward_mode(name):
    """Along any direction that of the gradient by backward, which the fast backends are held to."""
    function, x = function_of(OPERATIONS[name], "reference")
    tangents = [FORWARD[way](function, x.detach()) for way in ("jvp", "forward_ad")]
    expected = (torch.autograd.grad(function(x.requires_grad_()), x)[0] * direction(x)).sum()
    assert expected.abs() > 1e-4
    for tangent in tangents:
        torch.testing.assert_close(tangent, expected)


def test_what_forward_mode_does_not_reach_is_computed(backend):
    function, x = function_of(OPERATIONS["policy loss"], backend)
    found = jvp(lambda y: y.square().sum() * function(x * 1) * function(y.detach()), (x,), (direction(x),))[1]
    torch.testing.assert_close(found, 2 * (x * direction(x)).sum() * function(x) ** 2)


REVERSE = {
    "grad": lambda f, x: grad(f)(x),
    "vjp": lambda f, x: vjp(f, x)[1](torch.ones(()))[0],
    "jacrev": lambda f, x: jacrev(f)(x),
    "per-sample gradients": lambda f, x: vmap(grad(f))(x.expand(2, *x.shape))[1],
    "grad of a leaf": lambda f, x: grad(f)(x.requires_grad_()),
    "grad around vmap": lambda f, x: grad(lambda y: vmap(lambda s: s * f(y))(torch.ones(2)).sum())(x) / 2,
}


@pytest.mark.parametrize("way", REVERSE)
@every_operation
def test_gradients_by_torch_func_are_refused_or_right(name, way, any_backend):
    function, x = function_of(OPERATIONS[name], any_backend)
    if any_backend != "reference":
        with pytest.raises(NotImplementedError, match=f"backend '{any_backend}' has no derivative by torch.func"):
            REVERSE[way](function, x)
        return
    (expected,) = torch.autograd.grad(function(x.requires_grad_()), x)
    torch.testing.assert_close(REVERSE[way](function, x.detach()), expected)


def test_estimates_are_constants_for_a_gradient(any_backend):
    function, x = function_of(GAE["v1"], any_backend)
    assert not grad(function)(x).any()


def test_what_torch_func_does_not_differentiate_is_computed(backend):
    function, x = function_of(OPERATIONS["kl of logits"], backend)
    expected = 2 * x * function(x) ** 2
    torch.testing.assert_close(grad(lambda y: y.square().sum() * function(x) * function(y.detach()))(x), expected)
    torch.testing.assert_close(grad(lambda y: y.square().sum() * torch.no_grad()(function)(y) ** 2)(x), expected)


@pytest.mark.parametrize("alpha", [0.3, 4.0])
def test_soft_min_has_every_derivative(any_backend, alpha):
    v1, v2 = values_case()["v1"], values_case()["v2"]
    function = functools.partial(soft_min, v2=v2, alpha=alpha, backend=any_backend)
    slope = torch.sigmoid((v2 - v1) / alpha)
    torch.testing.assert_close(jvp(function, (v1,), (direction(v1),))[1], slope * direction(v1))
    torch.testing.assert_close(grad(lambda x: function(x).sum())(v1), slope)
    torch.testing.assert_close(
        grad(lambda x: grad(lambda y: function(y).sum())(x).sum())(v1), -slope * (1 - slope) / alpha
    )


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "name, backend", [*((name, "torch") for name in OPERATIONS), ("kl of logits", "triton"), ("policy loss", "triton")]
)
def test_vmap_is_a_loop(name, backend):
    """With the gradients of what stands outside of it, which no tensor inside tells."""
    function, x = function_of(OPERATIONS[name], backend)
    several = torch.stack([x, x + 0.1 * direction(x)], 1).requires_grad_()
    weights = torch.tensor([1.0, -2.0])
    found, expected = vmap(function, in_dims=1)(several), torch.stack([function(y) for y in several.unbind(1)])
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((values * weights).sum(), several)[0] for values in (found, expected)]
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        torch.testing.assert_close(vmap(function, in_dims=1)(several), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@every_operation
def test_a_jacobian_of_batched_gradients(name):
    op, case, argument, result = OPERATIONS[name]
    x, found = case[argument].clone().requires_grad_(), []
    for vectorize in (True, False):
        outputs = lambda y: getattr(op(**case | {argument: y}, backend="torch"), result).flatten()[:3]  # noqa: E731
        found.append(torch.autograd.functional.jacobian(outputs, x, vectorize=vectorize))
    torch.testing.assert_close(*found)


def test_batched_gradients_do_not_overwrite_the_logits(backend):
    case = logits_case(inplace_backward=True)
    logits = case["logits"].requires_grad_() * 1
    entropy = token_stats(**case | {"logits": logits}, backend=backend).entropy.flatten()
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.autograd.grad(entropy, logits, torch.eye(21), is_grads_batched=True)
    assert torch.equal(logits, case["logits"])


@pytest.mark.parametrize("argument", ["v1", "v2"])
@pytest.mark.parametrize("op, make", [(safe_terms, logits_case), (linear_safe_terms, linear_case)])
def test_second_derivatives_by_values_are_right(op, make, argument, backend):
    operation = (op, make(**SAFE, mask=some_mask()), argument, "value")
    found = []
    for name in ("reference", backend):
        function, x = function_of(operation, name)
        (first,) = torch.autograd.grad(function(x.requires_grad_()), x, create_graph=True)
        found.append(torch.autograd.grad((first * direction(x)).sum(), x)[0])
    torch.testing.assert_close(*found)
    assert found[0].abs().max() > 1e-3


@pytest.mark.parametrize("name", [name for name in OPERATIONS if "value" not in name])
def test_other_second_derivatives_are_refused(name, backend):
    function, x = function_of(OPERATIONS[name], backend)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        (first,) = torch.autograd.grad(function(x.requires_grad_()), x, create_graph=True)
        torch.autograd.grad((first * direction(x)).sum(), x)


def test_a_second_derivative_of_the_penalty_by_the_kl_is_refused(backend):
    """Which is a result, too: that of a square by autograd would lack a term, not be 0."""
    case = logits_case(**SAFE)
    found = safe_terms(**case | {"logits": case["logits"].clone().requires_grad_()}, backend=backend)
    (first,) = torch.autograd.grad(found.kl_penalty.square().sum(), found.kl, create_graph=True)
    torch.testing.assert_close(first, 4 * (found.kl - SAFE["kl_threshold"]).relu() ** 3)
    with pytest.raises(RuntimeError, match="kl_penalty has no second derivative: use backend='reference'"):
        torch.autograd.grad(first.sum(), found.kl)


def test_the_reference_of_a_shared_vocabulary_has_one_derivative(tmp_path):
    """Its gradients are exchanged between the ranks, which neither forward mode nor a second backward would do."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        case = linear_case(process_group=distributed.group.WORLD)
        hidden = case.pop("hidden").requires_grad_()
        entropy = reference.linear_token_stats(hidden, **case).entropy.sum()
        (first,) = torch.autograd.grad(entropy, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()
        with pytest.raises(RuntimeError, match="forward|jvp"):
            dual(lambda x: reference.linear_token_stats(x, **case).entropy.sum(), hidden.detach())
    finally:
        distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("way", ["jvp", "grad", "per-sample gradients"])
def test_compiled_it_is_no_zero_either(way, fullgraph):
    torch._dynamo.reset()
    function, x = function_of(OPERATIONS["entropy of hidden states"], "torch")
    compiled = torch.compile(lambda y: (FORWARD | REVERSE)[way](function, y), backend="aot_eager", fullgraph=fullgraph)
    with pytest.raises((NotImplementedError, torch._dynamo.exc.TorchDynamoException)):
        compiled(x)


def test_forward_mode_in_the_functions_for_trl(backend, monkeypatch):
    from safe_kernels.integrations import trl, trl_distillation

    monkeypatch.setenv("SAFE_KERNELS_BACKEND", backend)
    logits, head = logits_case(reference=False), linear_case((6,), reference=None)
    distill = functools.partial(trl_distillation.chunked_divergence_loss, completion_mask=torch.ones(6), beta=0.5)
    heads = (head["hidden"], head["weight"], head["weight"])
    index = logits["tokens"][..., None].expand(-1, -1, 3)
    functions = [
        (lambda x: trl.selective_log_softmax(x, logits["tokens"]), logits["logits"]),
        (lambda x: trl.selective_log_softmax(x, index), logits["logits"]),
        (trl.entropy_from_logits, logits["logits"]),
        (lambda x: trl.LinearLogprob.apply(x, head["weight"], None, head["tokens"], 1.0, 0)[0], head["hidden"]),
        (lambda x: distill(x, *heads)[0], head["hidden"]),
    ]
    for function, x in functions:
        for way in (FORWARD["jvp"], dual):
            with pytest.raises(RuntimeError):
                way(lambda y, function=function: function(y).sum(), x)
