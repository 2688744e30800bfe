"""Inputs of the kernels, and the one rule by which their results are judged."""

import math

import torch

import safe_kernels

ULPS = 4


def logits_case(shape=(3, 7), vocabulary=37, *, dtype=torch.float32, reference=True, scale=3.0, seed=0, **options):
    """Arguments of `token_stats`."""
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, vocabulary, generator=draw) * scale
    case = {"logits": logits.to(dtype), "tokens": torch.randint(vocabulary, shape, generator=draw)}
    if reference:
        noise = torch.randn(*shape, vocabulary, generator=draw)
        case["ref_logits"] = (logits + noise).to(dtype)
    return {**case, **options}


def linear_case(
    shape=(3, 7), vocabulary=37, width=16, *, dtype=torch.float32, reference="shared", bias=False, seed=0, **options
):
    """Arguments of `linear_token_stats`; `reference` is None, "shared" or "own" (its head)."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=draw).to(dtype)

    size = 2 / math.sqrt(width)  # of weights, for logits with a standard deviation of 2
    case = {"hidden": normal(*shape, width), "weight": normal(vocabulary, width) * size}
    case["tokens"] = torch.randint(vocabulary, shape, generator=draw)
    if bias:
        case["bias"] = normal(vocabulary)
    if reference is not None:
        case["ref_hidden"] = case["hidden"] + 0.3 * normal(*shape, width)
    if reference == "own":
        case["ref_weight"], case["ref_bias"] = normal(vocabulary, width) * size, normal(vocabulary)
    return {**case, **options}


def values_case(shape=(3, 7), *, dtype=torch.float32, seed=0, **options):
    """Critic values and rewards."""
    draw = torch.Generator().manual_seed(seed)
    names = ("v1", "v2", "rewards")
    return {**{name: torch.randn(*shape, generator=draw).to(dtype) for name in names}, **options}


def policy_case(shape=(3, 7), *, seed=0, **options):
    """Arguments of `linear_policy_loss`: ratios on both sides of the clip, advantages of both signs."""
    case = linear_case(shape, seed=seed, **options)
    head = {k: v for k, v in case.items() if k not in POLICY_ONLY}
    logprob = safe_kernels.linear_token_stats(**{**head, "mask": None}, backend="reference").logprob
    draw = torch.Generator().manual_seed(seed + 1)
    case["old_logprob"] = logprob.detach() + 0.3 * torch.randn(*shape, generator=draw)
    case["advantage"] = torch.randn(*shape, generator=draw)
    return case


def distillation_case(shape=(3, 7), vocabulary=37, width=16, *, dtype=torch.float32, bias=False, seed=0, **options):
    """Arguments of `linear_distillation_loss`: a teacher of another width, with a head of its own."""
    student = linear_case(shape, vocabulary, width, dtype=dtype, reference=None, bias=bias, seed=seed)
    teacher = linear_case(shape, vocabulary, width + 8, dtype=dtype, reference=None, bias=bias, seed=seed + 1)
    tokens = student.pop("tokens")
    case = {**student, **{f"teacher_{name}": x for name, x in teacher.items() if name != "tokens"}}
    return {**case, **({"tokens": tokens} if "cross_entropy_coef" in options else {}), **options}


def distillation_logits_case(shape=(3, 7), vocabulary=37, *, dtype=torch.float32, seed=0, **options):
    """Arguments of `distillation_loss`."""
    case = logits_case(shape, vocabulary, dtype=dtype, scale=2.0, seed=seed)
    tokens = {"tokens": case["tokens"]} if "cross_entropy_coef" in options else {}
    return {"logits": case["logits"], "teacher_logits": case["ref_logits"], **tokens, **options}


POLICY_ONLY = {"loss_weight", "clip_low", "clip_high", "kl_threshold"}
POLICY_ONLY |= {"entropy_coef", "kl_coef", "kl_penalty_coef", "ref_kl_coef"}


def temperatures(shape=(3, 7), seed=0):
    return 0.5 + torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def some_mask(shape=(3, 7), seed=0):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.4
    mask.view(-1)[:2] = torch.tensor([True, False])
    return mask


def evaluate(op, case, backend, wrt=(), dtype=None):
    """Every result of `op` and, for random incoming gradients, the gradient of every argument named in `wrt`."""
    case = {name: _copy(x, dtype) for name, x in case.items()}
    for name in wrt:
        case[name].requires_grad_()
    results = op(**case, backend=backend)
    fields = results._asdict() if hasattr(results, "_asdict") else {"result": results}
    fields = {name: x for name, x in fields.items() if x is not None}
    draw = torch.Generator().manual_seed(99)
    upstream = {name: torch.randn(x.shape, generator=draw) for name, x in fields.items()}
    loss = sum((x * upstream[name].to(x)).sum() for name, x in fields.items() if x.requires_grad)
    gradients = torch.autograd.grad(loss, [case[name] for name in wrt]) if wrt else ()
    found = {name: x.detach() for name, x in fields.items()}
    return found | {f"d {name}": x for name, x in zip(wrt, gradients, strict=True)}


def _copy(x, dtype):
    if not isinstance(x, torch.Tensor):
        return x
    return x.detach().clone() if dtype is None or not x.is_floating_point() else x.detach().to(dtype)


def hold_to_reference(op, case, backend, wrt=(), vocabulary=37):
    """The rule, on every result and gradient: against float64, no worse than plain PyTorch in the same dtype."""
    exact = evaluate(op, case, "reference", wrt, torch.float64)
    plain = evaluate(op, case, "reference", wrt)
    actual = evaluate(op, case, backend, wrt)
    assert actual.keys() == exact.keys()
    for name, x in actual.items():
        assert x.dtype == plain[name].dtype and x.shape == exact[name].shape, name
        hold(name, x, plain[name], exact[name], vocabulary)
    return actual


def hold_to_registration(op, arguments):
    """`opcheck`, which compares results after the backward: not of the logits that were kept for it to write over. With
    them it compares schema, shapes and registration.
    """
    if op.name() == "safe_kernels::linear_token_stats":
        torch.library.opcheck(
            op, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
        )
        arguments = (*arguments[:14], 0, *arguments[15:])
    torch.library.opcheck(op, arguments)


def hold(name, actual, plain, exact, vocabulary):
    """Worst error <= 2 x that of plain PyTorch + a few ulps of max(1, log V), times a gradient's largest entry."""
    actual64, finite = actual.double(), exact.isfinite()
    assert torch.equal(actual64[~finite].nan_to_num(7, 8, 9), exact[~finite].nan_to_num(7, 8, 9)), f"{name}: not finite"
    if not finite.any():
        return
    error = (actual64 - exact).abs().where(finite, 0)
    allowed = 2 * (plain.double() - exact).abs().where(finite, 0).max()
    size = exact.abs().where(finite, 0).max().item() if name.startswith("d ") else 1.0
    allowed += ULPS * torch.finfo(actual.dtype).eps * size * max(1.0, math.log(vocabulary))
    worst = error.argmax()
    where = tuple(int(i) for i in torch.unravel_index(worst, error.shape))
    assert error.max() <= allowed, (  # a NaN error fails too
        f"{name}{list(where)} is {actual64.flatten()[worst]:.9g}, exact {exact.flatten()[worst]:.9g}, plain "
        f"{plain.flatten()[worst]:.9g}: error {error.max():.3g}, allowed {allowed:.3g}"
    )
