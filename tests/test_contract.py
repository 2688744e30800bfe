"""Errors, backends, imports and the places the operations must work in."""

import inspect
import subprocess
import sys

import pytest
import torch
from cases import (
    distillation_case,
    distillation_logits_case,
    evaluate,
    hold_to_registration,
    linear_case,
    logits_case,
    policy_case,
    some_mask,
    temperatures,
    values_case,
)
from torch._dynamo.testing import CompileCounter

import safe_kernels
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

pytestmark = pytest.mark.usefixtures("kernels")
OPERATIONS = [
    token_stats,
    linear_token_stats,
    safe_terms,
    linear_safe_terms,
    soft_min,
    soft_min_gae,
    linear_policy_loss,
    distillation_loss,
    linear_distillation_loss,
]

DISTILLATIONS = {distillation_loss: distillation_logits_case, linear_distillation_loss: distillation_case}

ones, zeros = torch.ones(3, 7), torch.zeros(3, 7)
WRONG_LOGITS = [
    (
        {"logits": torch.ones(3, 7, 37, dtype=torch.long)},
        TypeError,
        "logits has dtype torch.int64; it must be a floating",
    ),
    ({"logits": [1.0]}, TypeError, "logits is list; it must be a tensor"),
    (
        {"logits": torch.ones(3, 7, 0)},
        ValueError,
        r"logits has shape \(3, 7, 0\); it must be \(\.\.\., V\) with V >= 1",
    ),
    ({"tokens": zeros[:2].long()}, ValueError, r"tokens has shape \(2, 7\); it must be \(3, 7\)"),
    ({"tokens": zeros}, TypeError, "tokens has dtype torch.float32; it must be torch.int64 or another"),
    ({"tokens": zeros > 1}, TypeError, "tokens has dtype torch.bool; it must be torch.int64"),
    ({"ref_logits": torch.ones(3, 7, 36)}, ValueError, r"ref_logits has shape \(3, 7, 36\); it must be \(3, 7, 37\)"),
    ({"temperature": 0.0}, ValueError, "temperature is 0.0; it must be > 0"),
    ({"temperature": -1}, ValueError, "temperature is -1; it must be > 0"),
    ({"temperature": float("nan")}, ValueError, "temperature is nan; it must be finite"),
    ({"temperature": "1"}, TypeError, "temperature is str; it must be a number"),
    ({"temperature": torch.ones(7)}, ValueError, r"temperature has shape \(7,\); it must be \(3, 7\)"),
    ({"mask": torch.ones(7, dtype=torch.bool)}, ValueError, r"mask has shape \(7,\); it must be \(3, 7\)"),
    ({"mask": ones}, TypeError, "mask is torch.float32; it must be a torch.bool tensor"),
    (
        {"ref_logits": None, "with_ref_kl": True},
        ValueError,
        "with_ref_kl is True without ref_logits; it must be False, or ref_logits given",
    ),
    ({"backend": "cuda"}, ValueError, "backend is 'cuda'; it must be one of 'reference', 'torch', 'triton'"),
]
WRONG_HEAD = [
    ({"hidden": zeros.long()[..., None]}, TypeError, "hidden has dtype torch.int64"),
    ({"weight": torch.ones(37, 15)}, ValueError, r"weight has shape \(37, 15\); it must be \(V, 16\)"),
    ({"weight": torch.ones(592)}, ValueError, r"weight has shape \(592,\); it must be \(V, 16\)"),
    ({"weight": torch.empty(0)}, ValueError, "weight is empty.*FSDP.*gather it first"),
    ({"bias": torch.ones(36)}, ValueError, r"bias has shape \(36,\); it must be \(37,\)"),
    ({"ref_hidden": torch.ones(3, 7, 15)}, ValueError, r"ref_hidden has shape \(3, 7, 15\).*whose head it shares"),
    ({"ref_hidden": torch.ones(2, 7, 16)}, ValueError, r"ref_hidden has shape \(2, 7, 16\); it must be \(3, 7, 16\)"),
    ({"ref_weight": torch.ones(36, 16)}, ValueError, r"ref_weight has shape \(36, 16\); it must be \(37, 16\)"),
    ({"ref_hidden": None, "ref_bias": torch.ones(37)}, ValueError, "ref_bias is given without ref_hidden"),
    ({"ref_hidden": None, "with_ref_kl": True}, ValueError, "with_ref_kl is True without ref_hidden"),
    ({"softcap": 0.0}, ValueError, "softcap is 0.0; it must be > 0"),
    ({"logit_scale": float("inf")}, ValueError, "logit_scale is inf; it must be finite"),
    (
        {"tokens": zeros.long()[0]},
        ValueError,
        r"tokens has shape \(7,\); it must be \(3, 7\), the leading shape of hidden",
    ),
]
WRONG_VALUES = [
    ({"alpha": 0.0}, ValueError, "alpha is 0.0; it must be > 0"),
    ({"gamma": 1.5}, ValueError, r"gamma is 1.5; it must be in \[0, 1\]"),
    ({"lam": -0.1}, ValueError, "lam is -0.1; it must be in"),
    ({"v2": ones[0]}, ValueError, r"v2 has shape \(7,\); it must be \(3, 7\)"),
    ({"rewards": ones.long()}, TypeError, "rewards has dtype torch.int64"),
    ({"v2": None}, TypeError, "v2 is NoneType; it must be a tensor"),
    ({"mask": ones}, TypeError, "mask is torch.float32; it must be a torch.bool tensor"),
    ({"bootstrap": ones}, ValueError, r"bootstrap has shape \(3, 7\); it must be \(3,\), one entry a sequence"),
    ({"cu_seqlens": torch.tensor([0, 21])}, TypeError, "cu_seqlens is torch.int64; it must be a torch.int32 tensor"),
    ({"cu_seqlens": torch.tensor([0, 21], dtype=torch.int32)}, ValueError, r"cu_seqlens .* tokens packed in one axis"),
]
WRONG_POLICY = [
    ({"old_logprob": ones[0]}, ValueError, r"old_logprob has shape \(7,\)"),
    ({"old_logprob": None}, TypeError, "old_logprob is NoneType; it must be a tensor"),
    ({"loss_weight": ones.long()}, TypeError, "loss_weight has dtype torch.int64"),
    ({"clip_low": -0.1}, ValueError, "clip_low is -0.1; it must be at least 0"),
    ({"kl_coef": torch.ones(2)}, ValueError, r"kl_coef has shape \(2,\); it must be a number or a 0-dim tensor"),
    ({"ref_hidden": None, "kl_coef": 0.1}, ValueError, "kl_coef is 0.1 without ref_hidden; it must be 0, or"),
    ({"ref_hidden": None, "ref_kl_coef": torch.tensor(0.1)}, ValueError, "ref_kl_coef is 0.1.* without ref_hidden"),
    ({"ref_kl_coef": "0.1"}, TypeError, "ref_kl_coef is str; it must be a number"),
]
WRONG_DISTILLATION = [
    ({"divergence": "kl"}, ValueError, "divergence is 'kl'; it must be one of 'reverse_kl', 'forward_kl', 'jsd', 'tv'"),
    ({"reduction": "batchmean"}, ValueError, "reduction is 'batchmean'; it must be one of 'mean', 'sum', 'none'"),
    ({"beta": 1.5}, ValueError, r"beta is 1.5; it must be in \[0.*, 1.*\]"),
    ({"beta": float("nan")}, ValueError, "beta is nan; it must be in"),
    (
        {"cross_entropy_coef": 0.1},
        ValueError,
        "cross_entropy_coef is 0.1 without tokens; it must be 0, or tokens given",
    ),
    ({"cross_entropy_coef": ones}, TypeError, "cross_entropy_coef is Tensor; it must be a number"),
    ({"weights": ones[0]}, ValueError, r"weights has shape \(7,\); it must be \(3, 7\)"),
    ({"weights": ones.long()}, TypeError, "weights has dtype torch.int64"),
    ({"temperature": 0.0}, ValueError, "temperature is 0.0; it must be > 0"),
    ({"teacher_temperature": 0.0}, ValueError, "teacher_temperature is 0.0; it must be > 0"),
    ({"teacher_temperature": ones[0]}, ValueError, r"teacher_temperature has shape \(7,\)"),
    ({"tokens": zeros}, TypeError, "tokens has dtype torch.float32"),
    ({"tokens": zeros[:2].long()}, ValueError, r"tokens has shape \(2, 7\); it must be \(3, 7\)"),
    ({"mask": ones}, TypeError, "mask is torch.float32"),
    ({"shared_vocabulary": 38}, ValueError, r"shared_vocabulary is 38; it must be an integer in \[1, 37\]"),
    ({"shared_vocabulary": 0}, ValueError, r"shared_vocabulary is 0; it must be an integer in \[1, 37\]"),
    ({"process_group": 2}, TypeError, "process_group is int; it must be a torch.distributed.ProcessGroup"),
    ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
]
WRONG_TEACHER = [
    ({"teacher_hidden": None}, TypeError, "teacher_hidden is NoneType; it must be a tensor"),
    (
        {"teacher_hidden": torch.ones(2, 7, 24)},
        ValueError,
        r"teacher_hidden has shape \(2, 7, 24\); it must be \(3, 7, 24\)",
    ),
    ({"teacher_weight": torch.ones(37, 16)}, ValueError, r"teacher_weight has shape \(37, 16\); it must be \(V, 24\)"),
    ({"teacher_weight": torch.ones(38, 24)}, ValueError, "teacher_weight has a vocabulary of 38 and weight one of 37"),
    ({"teacher_weight": torch.empty(0)}, ValueError, "teacher_weight is empty.*FSDP.*gather it first"),
    ({"teacher_bias": torch.ones(36)}, ValueError, r"teacher_bias has shape \(36,\); it must be \(37,\)"),
    ({"bias": torch.ones(36)}, ValueError, r"bias has shape \(36,\); it must be \(37,\)"),
    ({"teacher_softcap": 0.0}, ValueError, "teacher_softcap is 0.0; it must be > 0"),
    ({"teacher_logit_scale": float("inf")}, ValueError, "teacher_logit_scale is inf; it must be finite"),
    ({"hidden": torch.ones(())}, ValueError, "hidden has no axes"),
]
WRONG_TEACHER_LOGITS = [
    ({"teacher_logits": None}, TypeError, "teacher_logits is NoneType; it must be a tensor"),
    ({"teacher_logits": torch.ones(37)}, ValueError, r"teacher_logits has shape \(37,\); it must be \(3, 7, 37\)"),
    (
        {"teacher_logits": torch.ones(3, 7, 38)},
        ValueError,
        "teacher_logits has a vocabulary of 38 and logits one of 37",
    ),
    ({"logits": torch.ones(3, 7, 0)}, ValueError, r"logits has shape \(3, 7, 0\)"),
]
WRONG = [
    *((distillation_loss, distillation_logits_case(), *x) for x in (*WRONG_DISTILLATION, *WRONG_TEACHER_LOGITS)),
    *((linear_distillation_loss, distillation_case(), *x) for x in (*WRONG_DISTILLATION, *WRONG_TEACHER)),
    *((token_stats, logits_case(), *wrong) for wrong in WRONG_LOGITS),
    *((linear_token_stats, linear_case(), *wrong) for wrong in WRONG_HEAD),
    *((soft_min_gae, values_case(mask=None), *wrong) for wrong in WRONG_VALUES),
    *((linear_policy_loss, policy_case(), *wrong) for wrong in WRONG_POLICY),
    (
        safe_terms,
        logits_case() | values_case(kl_threshold=0.1, alpha=0.3),
        {"alpha": -1.0},
        ValueError,
        "alpha is -1.0",
    ),
    (
        safe_terms,
        logits_case() | values_case(kl_threshold=0.1, alpha=0.3),
        {"ref_logits": None},
        TypeError,
        "ref_logits",
    ),
    (
        linear_safe_terms,
        linear_case() | values_case(kl_threshold=0.1, alpha=0.3),
        {"v1": ones[0]},
        ValueError,
        "v1 has",
    ),
    (
        linear_safe_terms,
        linear_case() | values_case(kl_threshold=0.1, alpha=0.3),
        {"rewards": None},
        TypeError,
        "rewards is NoneType",
    ),
    (soft_min, {"v1": ones, "v2": ones, "alpha": 0.3}, {"alpha": 0}, ValueError, "alpha is 0; it must be > 0"),
]


@pytest.mark.parametrize("op, case, change, error, message", WRONG, ids=[f"{w[0].__name__}-{w[4][:30]}" for w in WRONG])
def test_errors_name_the_argument(op, case, change, error, message):
    with pytest.raises(error, match=message):
        op(**case | change)


def test_a_sharded_weight_is_refused(tmp_path):
    from torch import distributed
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        case = linear_case()
        case["weight"] = distribute_tensor(case["weight"], init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(ValueError, match="weight is a DTensor; it must be the whole weight.*full_tensor"):
            linear_token_stats(**case)
    finally:
        distributed.destroy_process_group()


class TestDebug:
    @pytest.fixture(autouse=True)
    def debug(self, monkeypatch):
        monkeypatch.setenv("SAFE_KERNELS_DEBUG", "1")

    def test_ids(self):
        case = logits_case()
        case["tokens"][1, 1] = -100
        with pytest.raises(ValueError, match=r"tokens has the id -100; it must be in \[0, 37\) or masked"):
            token_stats(**case)
        token_stats(**case, mask=case["tokens"] >= 0)

    def test_nan(self):
        case = linear_case()
        case["hidden"][1, 1] = float("nan")
        with pytest.raises(ValueError, match="hidden has NaN in the row of a live token"):
            linear_token_stats(**case)

    def test_temperature(self):
        with pytest.raises(ValueError, match="temperature has a minimum of 0"):
            token_stats(**logits_case(temperature=zeros))

    def test_distillation(self):
        for op, case in (
            (distillation_loss, distillation_logits_case()),
            (linear_distillation_loss, distillation_case()),
        ):
            with pytest.raises(ValueError, match="weights has a minimum of -1"):
                op(**case, weights=-ones)
            op(**case, weights=-ones, mask=zeros > 0)
            with pytest.raises(ValueError, match="teacher_temperature has a minimum of 0"):
                op(**case, teacher_temperature=zeros)
            with pytest.raises(ValueError, match="tokens has the id 37"):
                op(**case, tokens=zeros.long() + 37)
            teacher = next(name for name in ("teacher_logits", "teacher_hidden") if name in case)
            case[teacher][0, 0] = float("nan")
            with pytest.raises(ValueError, match=f"{teacher} has NaN in the row of a live token"):
                op(**case)

    def test_sequences(self):
        with pytest.raises(ValueError, match="cu_seqlens is .*; it must rise from 0 to 9"):
            soft_min_gae(**values_case((9,)), mask=None, cu_seqlens=torch.tensor([0, 8], dtype=torch.int32))


def test_the_environment_chooses_the_backend(monkeypatch):
    called, case = [], logits_case()
    monkeypatch.setattr(reference, "token_stats", lambda *args, **options: called.append("reference"))
    token_stats(**case)
    assert not called
    monkeypatch.setenv("SAFE_KERNELS_BACKEND", "reference")
    token_stats(**case)
    assert called == ["reference"]
    token_stats(**case, backend="torch")
    assert called == ["reference"]
    monkeypatch.setenv("SAFE_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match="environment variable SAFE_KERNELS_BACKEND is 'fast'; it must be one of"):
        token_stats(**case)


def test_triton_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="'triton' needs tensors on a GPU, got CPU tensors"):
        token_stats(**logits_case(), backend="triton")


@pytest.mark.parametrize("op", OPERATIONS)
def test_the_definition_has_the_public_signature(op):
    """Less `backend`; and every backend has every operation."""
    public = dict(inspect.signature(op).parameters)
    assert public.pop("backend").default is None
    own = inspect.signature(getattr(reference, op.__name__)).parameters
    rest = any(p.kind is p.VAR_KEYWORD for p in own.values())
    assert rest or own.keys() == public.keys()
    for argument, parameter in own.items():
        assert parameter.kind is parameter.VAR_KEYWORD or parameter.default == public[argument].default, argument
    for argument, parameter in public.items():
        assert argument in own or parameter.kind is parameter.KEYWORD_ONLY, argument
    assert op.__doc__


def test_the_import_needs_torch_alone():
    code = "import sys, torch; before = set(sys.modules); import safe_kernels; print(*(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {name.split(".")[0] for name in loaded} - set(sys.stdlib_module_names) == {"safe_kernels"}
    assert not any(name.startswith("safe_kernels.triton_backend") for name in loaded)


SAFE = {"kl_threshold": 0.1, "alpha": 0.3, "gamma": 0.9, **values_case()}
COMPILED = {
    "logits": (token_stats, logits_case(mask=some_mask()), ["logits"]),
    "in place": (token_stats, logits_case(inplace_backward=True, reference=False), ["logits"]),
    "hidden": (linear_token_stats, linear_case(bias=True, temperature=temperatures()), ["hidden", "weight", "bias"]),
    "safe": (safe_terms, logits_case(**SAFE), ["logits", "v1", "v2"]),
    "linear safe": (linear_safe_terms, linear_case(**SAFE, mask=some_mask()), ["hidden", "v1", "v2"]),
    "both KLs of logits": (token_stats, logits_case(with_ref_kl=True), ["logits"]),
    "both KLs of hidden": (linear_token_stats, linear_case(with_ref_kl=True), ["hidden"]),
    "policy loss with both KLs": (
        linear_policy_loss,
        policy_case(kl_coef=0.2, ref_kl_coef=torch.tensor(0.1)),
        ["hidden"],
    ),
    "policy loss": (linear_policy_loss, policy_case(kl_coef=torch.tensor(0.1)), ["hidden", "weight"]),
    "scan": (soft_min_gae, values_case(mask=some_mask()), []),
    "distillation": (
        linear_distillation_loss,
        distillation_case(bias=True, divergence="jsd", cross_entropy_coef=0.1, mask=some_mask(), weights=ones),
        ["hidden", "weight", "bias"],
    ),
    "distillation of tokens": (
        linear_distillation_loss,
        distillation_case(teacher_temperature=temperatures(), reduction="none"),
        ["hidden", "weight"],
    ),
    "distillation of tokens, frozen head": (
        linear_distillation_loss,
        distillation_case(reduction="none", divergence="tv"),
        ["hidden"],
    ),
    "distillation of logits": (
        distillation_loss,
        distillation_logits_case(divergence="forward_kl", cross_entropy_coef=0.1, reduction="none"),
        ["logits"],
    ),
}


@pytest.mark.parametrize("name", COMPILED)
def test_in_one_compiled_graph(name, backend):
    op, case, wrt = COMPILED[name]
    torch._dynamo.reset()

    def loss(*leaves):
        leaves = {leaf: x * 1 for leaf, x in zip(wrt, leaves, strict=True)}  # what is overwritten must not be a leaf
        result = op(**case | leaves, backend=backend)
        found = [result.loss] if hasattr(result, "loss") else result
        return sum((x * x).sum() for x in found if x is not None)

    found = []
    for run in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaves = [case[leaf].clone().requires_grad_() for leaf in wrt]
        value = run(*leaves)
        found.append([value.detach(), *(torch.autograd.grad(value, leaves) if wrt else ())])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("name", COMPILED)
def test_ops_hold_to_what_they_register(name, backend, ops_seen):
    """Schemas, shapes without data and gradients, of every op that a forward and backward reach: by `opcheck`."""
    op, case, wrt = COMPILED[name]
    if name == "in place":
        leaf = case["logits"].clone().requires_grad_()
        op(**case | {"logits": leaf * 1}, backend=backend).entropy.sum().backward()
    else:
        evaluate(op, case, backend, wrt)
    assert len(ops_seen) > bool(wrt)
    for registered, arguments in list(ops_seen):
        hold_to_registration(registered, arguments)


@pytest.mark.parametrize("name", [*COMPILED, "soft-min"])
def test_tensors_without_memory(name, backend):
    """On the meta device results have the shapes and dtypes that they have elsewhere."""
    op, case, _ = COMPILED.get(name, (soft_min, {"v1": SAFE["v1"], "v2": SAFE["v2"], "alpha": 0.3}, []))
    meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in case.items()}
    found, expected = (op(**arguments, backend=backend) for arguments in (meta, case))
    for x, y in zip(found, expected, strict=True):
        assert (x is None and y is None) or (x.is_meta and x.shape == y.shape and x.dtype == y.dtype)


def test_no_grad_keeps_nothing(any_backend):
    case = logits_case(with_ref_kl=True)
    case["logits"].requires_grad_()
    with torch.no_grad():
        stats = token_stats(**case, backend=any_backend)
    assert all(x is None or x.grad_fn is None for x in stats)
    with torch.inference_mode():
        assert torch.equal(token_stats(**case, backend=any_backend).kl, stats.kl)


@pytest.mark.parametrize("op", [token_stats, linear_token_stats, linear_policy_loss, *DISTILLATIONS])
@pytest.mark.parametrize("constant", [True, False])
def test_double_backward_is_refused(op, constant):
    """Even where no slope leads back to the inputs, and the gradient would pass for a constant."""
    make = {token_stats: logits_case, linear_token_stats: linear_case, linear_policy_loss: policy_case} | DISTILLATIONS
    case = make[op]()
    leaf = case.pop("logits" if "logits" in case else "hidden").requires_grad_()
    result = op(leaf, **case)
    result = result.loss if hasattr(result, "loss") else result.entropy
    value = result.sum() if constant else result.pow(2).sum()
    with pytest.raises(RuntimeError, match="no autograd formula was registered|no second derivative"):
        gradient = torch.autograd.grad(value, leaf, create_graph=True)[0]
        (value + gradient.pow(2).sum()).backward()


def test_no_second_derivative_of_logits_that_are_overwritten(backend):
    logits = torch.randn(3, 5).requires_grad_()
    value = token_stats(logits * 1, torch.zeros(3).long(), inplace_backward=True, backend=backend).entropy.sum()
    with pytest.raises(RuntimeError, match="inplace_backward=True has no second derivative"):
        torch.autograd.grad(value, logits, create_graph=True)


def graphs(function, *calls):
    """How often dynamo compiles for these arguments."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for arguments in calls:
        compiled(*arguments)
    return counter.frame_count


@pytest.mark.parametrize("op", [token_stats, linear_token_stats, linear_policy_loss, safe_terms, *DISTILLATIONS])
def test_another_number_of_tokens_is_compiled_once(op, backend):
    """The first is taken as fixed, the second makes it a symbol."""
    makes = {token_stats: logits_case, safe_terms: logits_case, linear_policy_loss: policy_case} | DISTILLATIONS
    make = makes.get(op, linear_case)

    def case(tokens):
        extra = values_case((tokens,)) | {"kl_threshold": 0.1, "alpha": 0.3} if op is safe_terms else {}
        return list((make((tokens,)) | extra).items())

    names = [name for name, _ in case(4)]
    calls = [[x for _, x in case(tokens)] for tokens in (4, 5, 6, 7)]
    assert graphs(lambda *x: op(**dict(zip(names, x, strict=True)), backend=backend)[0], *calls) <= 2


def test_another_float_is_compiled_again():
    case = linear_case()
    assert graphs(lambda t: linear_token_stats(**case, temperature=t).logprob, [0.7], [0.8], [0.9]) <= 3


def test_tensors_of_inference_mode(backend):
    """As a reference model's hidden states may be."""
    case = linear_case()
    with torch.inference_mode():
        case |= {name: case[name].clone() for name in ("ref_hidden", "tokens")}
    case["hidden"].requires_grad_()
    linear_token_stats(**case, backend=backend).kl.sum().backward()
    assert case["hidden"].grad.isfinite().all()


def test_what_a_backward_does_not_read_may_change(backend):
    values = values_case()
    case = logits_case(**values, kl_threshold=0.1, alpha=0.3)
    case["logits"].requires_grad_()
    case["v1"].requires_grad_()
    case["kl_threshold"] = torch.tensor(0.1)
    expected = torch.autograd.grad(safe_terms(**case, backend=backend).kl_penalty.sum(), case["logits"])[0]
    found = safe_terms(**case, backend=backend)
    loss = found.kl_penalty.sum() + 0 * found.value.sum()
    case["rewards"].zero_()
    with torch.no_grad():  # results are the caller's own
        for x in (case["kl_threshold"], *found):
            x.zero_()
    torch.testing.assert_close(torch.autograd.grad(loss, case["logits"])[0], expected, rtol=0, atol=0)


def test_a_caller_may_change_the_statistics_before_the_backward(backend):
    """Whatever the gradient needs of them is its own: logits, hidden states and the closed form alike."""
    for op, case, wrt in (
        (token_stats, logits_case(with_ref_kl=True), "logits"),
        (linear_token_stats, linear_case(with_ref_kl=True), "hidden"),
        (linear_policy_loss, policy_case(kl_coef=0.1, ref_kl_coef=0.1), "hidden"),
    ):
        case[wrt].requires_grad_()
        gradients = []
        for changes in (False, True):
            found = op(**case, backend=backend)
            differentiable = (found.logprob, found.entropy, found.kl, found.ref_kl)
            loss = found.loss if op is linear_policy_loss else sum(x.sum() for x in differentiable)
            with torch.no_grad():
                for x in found if changes else ():
                    x.zero_()
            gradients += torch.autograd.grad(loss, case[wrt])
        assert torch.equal(*gradients), op


def test_frozen_logits_are_not_kept(backend):
    case = logits_case(**values_case(), kl_threshold=0.1, alpha=0.3)
    case["v1"].requires_grad_()
    found = safe_terms(**case, backend=backend)
    case["logits"].zero_()  # would be noticed
    found.value.sum().backward()


NARROW = [
    *((token_stats, dtype) for dtype in (torch.int8, torch.int16, torch.int32, torch.uint16)),
    *((op, torch.uint8) for op in (token_stats, linear_token_stats, linear_policy_loss, safe_terms, linear_safe_terms)),
]


@pytest.mark.parametrize("op, dtype", NARROW)
def test_tokens_of_any_integer_dtype(op, dtype, any_backend, monkeypatch):
    """In a vocabulary that some of them cannot count; with the checks of values, which compare ids with its size."""
    monkeypatch.setenv("SAFE_KERNELS_DEBUG", "1")
    make = {token_stats: logits_case, safe_terms: logits_case, linear_policy_loss: policy_case}.get(op, linear_case)
    extra = values_case((3,), kl_threshold=0.1, alpha=0.3) if "safe" in op.__name__ else {}
    case, wrt = make((3,), vocabulary=300, **extra), ["logits" if op in (token_stats, safe_terms) else "hidden"]
    case["tokens"] %= 128
    wide = evaluate(op, case, any_backend, wrt)
    narrow = evaluate(op, case | {"tokens": case["tokens"].to(dtype)}, any_backend, wrt)
    assert all(torch.equal(x, wide[name]) for name, x in narrow.items())


def test_an_id_outside_a_vocabulary_is_found_in_any_dtype(any_backend):
    case = logits_case(vocabulary=20)
    case["tokens"][1, 1] = 200
    found = token_stats(**case | {"tokens": case["tokens"].to(torch.uint8)}, backend=any_backend)
    assert torch.equal(found.logprob.isnan(), case["tokens"] == 200)


def test_float64_beside_a_float32_model_does_not_choose_the_backend(monkeypatch):
    """numpy makes float64: on a GPU one such advantage must not take the kernels away."""
    monkeypatch.setattr(safe_kernels.dispatch, "GPUS", ("cpu",))
    sides = {"old_logprob", "advantage", "loss_weight", "temperature", "v1", "v2", "rewards", "target_v1", "bootstrap"}
    terms = {"kl_threshold": 0.1, "alpha": 0.3}
    cases = [
        (token_stats, logits_case(temperature=temperatures())),
        (linear_policy_loss, policy_case(loss_weight=ones / 21)),
        (safe_terms, logits_case(**values_case(**terms))),
        (linear_safe_terms, linear_case(**values_case(target_v1=ones, target_v2=ones, **terms))),
        (soft_min_gae, values_case(mask=None, bootstrap=torch.ones(3))),
    ]
    for op, case in cases:
        wide = {
            name: x.double() if name in sides and (op, name) != (soft_min_gae, "v1") else x for name, x in case.items()
        }
        for narrow, found in zip(op(**case), op(**wide), strict=True):
            assert narrow is found is None or torch.equal(narrow, found) and found.dtype == torch.float32, op
