"""Log-probs of K ids a token, and divergences from a teacher that gives only these."""

import math
import sys

import pytest
import torch
from cases import (
    evaluate,
    hold,
    hold_to_reference,
    hold_to_registration,
    linear_case,
    logits_case,
    some_mask,
    temperatures,
)
from hypothesis import given
from hypothesis import strategies as st
from memory import Allocations

from safe_kernels import kept_sets, linear_token_stats, tiled, tiles, token_stats, truncated_divergence

pytestmark = pytest.mark.usefixtures("kernels")
ENTRANCES = pytest.mark.parametrize("entrance", ["logits", "hidden"])
WRT = {"logits": ["logits"], "hidden": ["hidden", "weight"]}
NAMES = ["reverse_kl", "forward_kl", "jsd", "tv"]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(kept_sets, "WHOLE_BYTES", 5 * 37 * 4)
    monkeypatch.setattr(kept_sets, "TILE_BYTES", 6 * 48 * 4)
    monkeypatch.setattr(tiles, "WEIGHT_BYTES", 5 * 16 * 4)


def case_of(entrance, shape=(3, 7), vocabulary=37, *, k=5, seed=0, **options):
    """(function, arguments): with repeated ids, and -1 for none."""
    make, op = {"logits": (logits_case, token_stats), "hidden": (linear_case, linear_token_stats)}[entrance]
    case = make(shape, vocabulary, seed=seed, **options)
    case["tokens"] = torch.randint(-1, vocabulary, (*shape, k), generator=torch.Generator().manual_seed(seed + 5))
    case["tokens"].view(-1, k)[::4, 1] = -1
    return op, case


def finite(op):
    """With 0 for the log-prob -inf of what is no id, whose slope must not matter."""

    def call(**case):
        stats = op(**case)
        is_none = case["tokens"] == -1
        assert (stats.logprob[is_none] == -math.inf).all() and stats.logprob[~is_none].isfinite().all()
        return stats._replace(
            logprob=stats.logprob.masked_fill(is_none, 0),
            ref_logprob=None if stats.ref_logprob is None else stats.ref_logprob.masked_fill(is_none, 0),
        )

    return call


@pytest.mark.parametrize("reference", [None, "shared", "own"])
@pytest.mark.parametrize("masked", [False, True])
def test_from_hidden_states(backend, reference, masked):
    op, case = case_of("hidden", reference=reference, bias=True, softcap=5.0, logit_scale=0.7)
    case |= {"temperature": temperatures(), "with_ref_kl": reference is not None}
    if masked:
        case |= {"mask": some_mask(), "tokens": case["tokens"].clamp(min=0)}
    hold_to_reference(op if masked else finite(op), case, backend, ["hidden", "weight", "bias"])


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_from_logits(backend, reference, masked):
    op, case = case_of("logits", reference=reference)
    case |= {"temperature": temperatures(), "with_ref_kl": reference}
    if masked:
        case |= {"mask": some_mask(), "tokens": case["tokens"].clamp(min=0)}
    hold_to_reference(op if masked else finite(op), case, backend, ["logits"])


@ENTRANCES
def test_half_precision(entrance, backend):
    op, case = case_of(entrance, dtype=torch.float16)
    hold_to_reference(finite(op), case, backend, WRT[entrance])


def test_the_gradient_is_rounded_once(backend):
    """Of a token that is almost certain it is a small difference of two numbers near 1."""
    logits = torch.zeros(4, 37, dtype=torch.bfloat16)
    logits[:, 3] = torch.tensor([8.0, 12.0, 14.0, 15.0])
    case = {"logits": logits, "tokens": torch.tensor([[3, 5]] * 4)}
    exact = evaluate(token_stats, case, "reference", ["logits"], torch.float64)["d logits"]
    found = evaluate(token_stats, case, backend, ["logits"])["d logits"]
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=2e-7)


@ENTRANCES
def test_gradients_in_float64(entrance):
    options = {"width": 4, "reference": "own"} if entrance == "hidden" else {}
    op, case = case_of(entrance, (2, 3), 11, k=3, dtype=torch.float64, **options)
    case["tokens"] = case["tokens"].clamp(min=0)

    def results(*leaves):
        stats = op(**case | dict(zip(WRT[entrance], leaves, strict=True)), backend="torch")
        return stats.logprob, stats.kl

    assert torch.autograd.gradcheck(results, [case[name].clone().requires_grad_() for name in WRT[entrance]])


@ENTRANCES
def test_they_are_the_log_probs_of_one_id_at_a_time(entrance, any_backend):
    op, case = case_of(entrance, mask=some_mask())
    case["tokens"] = case["tokens"].clamp(min=0)
    several = op(**case, backend=any_backend)
    for i in range(5):
        single = op(**case | {"tokens": case["tokens"][..., i]}, backend=any_backend)
        torch.testing.assert_close(several.logprob[..., i], single.logprob)
        torch.testing.assert_close(several.ref_logprob[..., i], single.ref_logprob)
        torch.testing.assert_close(several.entropy, single.entropy)
        torch.testing.assert_close(several.kl, single.kl)
    assert not several.logprob[~some_mask()].any()


@ENTRANCES
def test_within_kept_sets(entrance, backend):
    op, case = case_of(entrance)
    case["tokens"] = case["tokens"].clamp(min=0)
    case["kept"] = torch.cat([case["tokens"], torch.arange(4).expand(3, 7, 4)], -1)
    hold_to_reference(op, case, backend, WRT[entrance])
    case["tokens"] = case["tokens"].clone()
    case["tokens"][1, 2, 3] = next(i for i in range(37) if i not in case["kept"][1, 2].tolist())
    found = hold_to_reference(op, case, backend)
    assert found["logprob"].isnan().sum() == 1 and found["logprob"][1, 2, 3].isnan()


@ENTRANCES
def test_an_id_outside_of_the_vocabulary(entrance, any_backend):
    op, case = case_of(entrance)
    case["tokens"] = case["tokens"].clamp(min=0)
    case["tokens"][1, 2, 3] = 37
    leaf = case.pop(WRT[entrance][0]).requires_grad_()
    stats = op(leaf, **case, backend=any_backend)
    assert stats.logprob.isnan().nonzero().tolist() == [[1, 2, 3]] and stats.entropy.isfinite().all()
    gradient = torch.autograd.grad(stats.logprob.sum(), leaf)[0]
    assert gradient.isnan().any(-1).nonzero().tolist() == [[1, 2]]


@ENTRANCES
def test_what_is_no_id_has_no_slope(entrance, any_backend):
    """Not even where the loss makes NaN of its -inf."""
    op, case = case_of(entrance)
    is_none = case["tokens"] == -1
    leaf = case.pop(WRT[entrance][0]).requires_grad_()
    logprob = op(leaf, **case, backend=any_backend).logprob
    slopes = torch.randn(logprob.shape).masked_fill(is_none, math.nan)
    found = torch.autograd.grad(logprob, leaf, slopes, retain_graph=True)[0]
    expected = torch.autograd.grad(logprob, leaf, slopes.masked_fill(is_none, 0))[0]
    assert is_none.any() and found.isfinite().all()
    torch.testing.assert_close(found, expected)


@ENTRANCES
@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (1,)])
def test_few_tokens(entrance, any_backend, shape):
    op, case = case_of(entrance, shape)
    case["tokens"] = case["tokens"].clamp(min=0)
    found = evaluate(op, case, any_backend, WRT[entrance])
    assert found["logprob"].shape == (*shape, 5) and found["entropy"].shape == shape


@ENTRANCES
def test_integer_dtypes(entrance, any_backend):
    op, case = case_of(entrance)
    case["tokens"] = case["tokens"].clamp(min=0)
    expected = op(**case, backend=any_backend).logprob
    for dtype in (torch.int32, torch.uint8):
        assert torch.equal(op(**case | {"tokens": case["tokens"].to(dtype)}, backend=any_backend).logprob, expected)


def test_logits_of_any_strides(backend):
    op, case = case_of("logits")
    for logits in (
        torch.randn(3, 8, 37)[:, :-1],
        torch.randn(7, 3, 37).transpose(0, 1),
        torch.randn(3, 7, 74)[..., ::2],
    ):
        found = evaluate(finite(op), case | {"logits": logits.contiguous()}, backend, ["logits"])
        leaf = logits.detach().requires_grad_()
        stats = finite(op)(**case | {"logits": leaf}, backend=backend)
        for name, x in stats._asdict().items():
            assert x is None or torch.equal(x, found[name])


@ENTRANCES
def test_bad_arguments(entrance, any_backend):
    op, case = case_of(entrance)
    with pytest.raises(ValueError, match=r"tokens has shape \(3, 7, 0\); the last axis must be K >= 1 ids"):
        op(**case | {"tokens": case["tokens"][..., :0]}, backend=any_backend)
    with pytest.raises(ValueError, match=r"tokens has shape \(3, 6\); it must be \(3, 7\)"):
        op(**case | {"tokens": case["tokens"][:, :6]}, backend=any_backend)
    option = {"logits": "inplace_backward", "hidden": "batch_invariant"}[entrance]
    with pytest.raises(ValueError, match=rf"{option} is given with tokens of shape \(\.\.\., K\), for which it is not"):
        op(**case | {option: True}, backend=any_backend)


@ENTRANCES
def test_registered(entrance, backend):
    """opcheck, and the shapes of what has no memory."""
    op, case = case_of(entrance)
    seen = []
    module = tiled
    name = f"{'linear_' if entrance == 'hidden' else ''}tiled_token_stats"
    forward, backward = getattr(module, f"{name}_op"), getattr(module, f"{name}_backward_op")
    with pytest.MonkeyPatch.context() as patch:
        target = f"safe_kernels.{'linear' if entrance == 'hidden' else 'logits'}"
        patch.setattr(sys.modules[target], f"{name}_op", lambda *a: seen.append(a) or forward(*a))
        op(**case, backend=backend)
    arguments = [x.clone() if isinstance(x, torch.Tensor) else x for x in seen[0]]
    leaves = 3 if entrance == "hidden" else 1
    wanted = [None if x is None else x.clone().requires_grad_() for x in arguments[:leaves]]
    hold_to_registration(forward, (*wanted, *arguments[leaves:]))
    stats = forward(*arguments)[-1]
    grads, needed = [torch.randn(21, 5), None, torch.randn(21), None], [True, True, False] if leaves > 1 else []
    hold_to_registration(backward, (*arguments[:-1], stats, *grads, *needed, backend))
    meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in case.items()}
    for x, y in zip(op(**meta, backend=backend), op(**case, backend=backend), strict=True):
        assert (x is None and y is None) or (x.is_meta and x.shape == y.shape and x.dtype == y.dtype)


@ENTRANCES
def test_compiled(entrance, backend):
    torch._dynamo.reset()

    def loss(leaf, tokens, teacher_logprob, rest):
        logprob = op(leaf, tokens=tokens, **rest, backend=backend).logprob
        return truncated_divergence(logprob, teacher_logprob, tokens, 37).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    op, case = case_of(entrance)
    leaf, tokens = case.pop(WRT[entrance][0]).requires_grad_(), ids_of(37, 5)
    del case["tokens"]
    teacher = torch.randn(3, 7, 37).log_softmax(-1).gather(-1, tokens)
    plain, found = (torch.autograd.grad(f(leaf, tokens, teacher, case), leaf)[0] for f in (loss, compiled))
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("entrance", ["logits", "hidden"])
def test_memory(entrance, monkeypatch):
    """A few tiles: nothing near N x V or N x K x H."""
    monkeypatch.undo()
    torch.use_deterministic_algorithms(False)
    count, vocabulary = 512, 4096
    monkeypatch.setattr(kept_sets, "WHOLE_BYTES", 32 * vocabulary * 4)
    monkeypatch.setattr("safe_kernels.torch_backend.rows.TILE_BYTES", 8 * vocabulary * 4)
    op, case = case_of(entrance, (count,), vocabulary, k=64, dtype=torch.bfloat16)
    leaf = case.pop(WRT[entrance][0]).requires_grad_()
    with Allocations() as seen:
        stats = op(leaf, **case, backend="torch")
        (stats.logprob.exp().sum() + stats.kl.sum()).backward()
    assert seen.peak - leaf.grad.nbytes < 9 * 32 * vocabulary * 4 < count * vocabulary * 4
    assert entrance == "logits" or seen.largest <= 32 * vocabulary * 4 * 1.05


def ids_of(vocabulary, k, shape=(3, 7), seed=0):
    """Different ids of each token."""
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, vocabulary, generator=draw).argsort(-1)[..., :k]


def sides_of(seed, vocabulary, scale, shape=(3, 7)):
    """Log-probs of the whole vocabulary of student and teacher."""
    draw = torch.Generator().manual_seed(seed)
    student = torch.randn(*shape, vocabulary, generator=draw) * scale
    teacher = student + torch.randn(*shape, vocabulary, generator=draw) * scale / 2
    return student.log_softmax(-1), teacher.log_softmax(-1)


def whole(name, beta, logp, logq):
    """By the definition, in float64."""
    logp, logq = logp.double(), logq.double()
    p, q = logp.exp(), logq.exp()
    if name == "jsd" and beta in (0, 1):
        name = "reverse_kl" if beta else "forward_kl"
    m = beta * q + (1 - beta) * p
    return {
        "reverse_kl": p * (logp - logq),
        "forward_kl": q * (logq - logp),
        "jsd": beta * q * (logq - m.log()) + (1 - beta) * p * (logp - m.log()),
        "tv": (p - q).abs() / 2,
    }[name].sum(-1)


def truncated(name, beta, logp, logq, ids):
    at_ids = (x.gather(-1, ids) for x in (logp, logq))
    return truncated_divergence(*at_ids, ids, logp.shape[-1], divergence=name, beta=beta)


laws = given(
    name=st.sampled_from(NAMES),
    beta=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 2**31),
    vocabulary=st.integers(1, 40),
    scale=st.sampled_from([0.1, 1.0, 3.0]),
    k=st.integers(0, 40),
)


@laws
def test_of_all_ids_it_is_exact(name, beta, seed, vocabulary, scale, k):
    logp, logq = sides_of(seed, vocabulary, scale)
    ids = ids_of(vocabulary, vocabulary, seed=seed)
    padded = torch.cat([ids, torch.full((3, 7, k), -1)], -1)
    values = [torch.cat([x.gather(-1, ids), torch.randn(3, 7, k)], -1) for x in (logp, logq)]
    found = truncated_divergence(*values, padded, vocabulary, divergence=name, beta=beta)
    torch.testing.assert_close(found.double(), whole(name, beta, logp, logq), rtol=1e-4, atol=3e-6)


@laws
def test_it_does_not_fall_as_ids_are_added(name, beta, seed, vocabulary, scale, k):
    logp, logq = sides_of(seed, vocabulary, scale)
    ids = ids_of(vocabulary, vocabulary, seed=seed)
    values = [truncated(name, beta, logp, logq, ids[..., :count]) for count in range(vocabulary + 1)]
    assert not values[0].any()
    for less, more in zip(values, values[1:], strict=False):
        assert (less >= 0).all() and (more >= less - 3e-6 * (1 + less)).all()
    exact = whole(name, beta, logp, logq)
    assert (values[min(k, vocabulary)] <= exact + 3e-6 * (1 + exact)).all()


@laws
def test_gradients_are_those_of_float64(name, beta, seed, vocabulary, scale, k):
    logp, logq = sides_of(seed, vocabulary, scale)
    logp = logp + 1e-3 * torch.sign(logp - logq)  # away from the kink of tv
    ids, found = ids_of(vocabulary, min(k, vocabulary), seed=seed), []
    if (1 - logp.double().exp().gather(-1, ids).sum(-1)).abs().min() < 1e-3:
        return  # there float32 does not know the tail
    for dtype in (torch.float32, torch.float64):
        leaf = logp.to(dtype).requires_grad_()
        found.append(torch.autograd.grad(truncated(name, beta, leaf, logq.to(dtype), ids).sum(), leaf)[0])
    torch.testing.assert_close(found[0].double(), found[1], rtol=1e-3, atol=1e-3)


def test_the_gradient_to_the_logits(backend):
    """Of the whole way, from logits, against float64 autograd of the definition over K + 1 outcomes."""
    case = logits_case(reference=False)
    ids, teacher = ids_of(37, 6), torch.randn(3, 7, 37).log_softmax(-1)
    for name in NAMES:
        found = {}
        for kind, dtype in ((backend, torch.float32), ("reference", torch.float32), ("exact", torch.float64)):
            leaf = case["logits"].to(dtype).requires_grad_()
            if kind == "exact":
                p = leaf.log_softmax(-1).exp().gather(-1, ids)
                p = torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)
                q = teacher.to(dtype).exp().gather(-1, ids)
                q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
                value = whole(name, 0.5, p.log(), q.log())
            else:
                logprob = token_stats(leaf, ids, backend=kind).logprob
                value = truncated_divergence(logprob, teacher.gather(-1, ids), ids, 37, divergence=name)
            found[kind] = torch.autograd.grad(value.sum(), leaf)[0]
        hold(f"d {name}", *found.values(), 37)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("distance", [0, 1e-8, 1e-3])
def test_close_to_the_teacher(name, distance):
    """A value of 1e-7 is not lost beside terms of 1, and none is negative."""
    logits = torch.randn(200, 30, generator=torch.Generator().manual_seed(0)).double()
    logp = (logits + distance * torch.randn(200, 30).double()).log_softmax(-1)
    ids, logq = ids_of(30, 30, (200,)), logits.log_softmax(-1)
    found = truncated(name, 0.5, logp.float(), logq.float(), ids)
    assert (found >= 0).all()
    torch.testing.assert_close(found.double(), whole(name, 0.5, logp, logq), rtol=0.01, atol=1e-9)


def test_with_all_ids_there_is_no_other_outcome():
    """Not even where the probabilities of one side, rounded, do not sum to 1."""
    logp, logq = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.5, 0.4]).log()
    ids = torch.tensor([1, 0])
    torch.testing.assert_close(truncated_divergence(logp, logq, ids, 2, divergence="tv"), torch.tensor(0.05))
    torch.testing.assert_close(truncated_divergence(logp, logq, ids, 3, divergence="tv"), torch.tensor(0.10))


@pytest.mark.parametrize("name", NAMES)
def test_peaked_rows(name):
    """The tail of one side is 0 in float32, or of both: finite values and gradients."""
    logits = torch.tensor([[40.0, 0, 0, 0], [0.0, 0, 0, 0], [40, 0, 0, 0], [16.9, 0, 0, 0], [200.0, 0, 0, 0]])
    student = logits.clone().requires_grad_()
    teacher = logits[[1, 0, 0, 0, 3]].log_softmax(-1)
    ids = torch.tensor([[0, 1]] * 5)
    value = truncated(name, 0.5, student.log_softmax(-1), teacher, ids)
    gradient = torch.autograd.grad(value.sum(), student)[0]
    assert value.isfinite().all() and (value >= 0).all() and gradient.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_padding_and_masks(name):
    logp, logq = sides_of(0, 20, 2.0)
    ids, mask = ids_of(20, 6), some_mask()
    expected = truncated(name, 0.3, logp, logq, ids)
    leaf = torch.cat([logp.gather(-1, ids), torch.full((3, 7, 2), -math.inf)], -1).requires_grad_()
    teacher = torch.cat([logq.gather(-1, ids), torch.full((3, 7, 2), math.nan)], -1)
    padded = torch.cat([ids, torch.full((3, 7, 2), -1)], -1)
    found = truncated_divergence(leaf, teacher, padded, 20, divergence=name, beta=0.3)
    torch.testing.assert_close(found, expected)
    gradient = torch.autograd.grad(found.sum(), leaf)[0]
    assert gradient.isfinite().all() and not gradient[..., 6:].any()
    spoiled = [x.masked_fill(~mask[..., None], math.nan) for x in (leaf, teacher)]
    masked = truncated_divergence(*spoiled, padded, 20, divergence=name, beta=0.3, mask=mask)
    torch.testing.assert_close(masked, expected * mask)
    assert torch.autograd.grad(masked.sum(), leaf)[0].isfinite().all()


def test_a_probability_of_zero():
    """The teacher's makes the reverse KL infinite, the student's the forward; of both it adds nothing."""
    p = torch.tensor([[0.5, 0.25, 0.0], [0.5, 0.0, 0.0]]).log()
    q = torch.tensor([[0.5, 0.0, 0.0], [0.5, 0.25, 0.0]]).log()
    ids = torch.tensor([[0, 1, 2]] * 2)
    found = {name: truncated_divergence(p, q, ids, 9, divergence=name) for name in NAMES}
    assert found["reverse_kl"].isinf().tolist() == [True, False] == found["forward_kl"].isinf().logical_not().tolist()
    assert found["jsd"].isfinite().all() and torch.allclose(found["tv"], torch.tensor(0.25))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"logprob": [1.0]}, TypeError, "logprob is list; it must be a tensor"),
        ({"logprob": torch.tensor(1.0)}, ValueError, "logprob has no axes"),
        ({"teacher_logprob": torch.zeros(3, 7, 4)}, ValueError, r"teacher_logprob has shape \(3, 7, 4\); it must"),
        ({"tokens": torch.zeros(3, 7).long()}, ValueError, r"tokens has shape \(3, 7\); it must be \(3, 7, 5\)"),
        ({"tokens": torch.full((3, 7, 5), 4)}, ValueError, "tokens has the id 4 twice for one token"),
        ({"tokens": torch.arange(5).expand(3, 7, 5) + 33}, ValueError, r"tokens has the id 37; it must be in \[0, 37"),
        ({"vocabulary": 4}, ValueError, "tokens has the id"),
        ({"vocabulary": 0}, ValueError, "vocabulary is 0; it must be at least 1"),
        ({"divergence": "kl"}, ValueError, "divergence is 'kl'; it must be one of 'reverse_kl', 'forward_kl'"),
        ({"beta": 1.5}, ValueError, r"beta is 1.5; it must be in \[0.*, 1.*\]"),
        ({"mask": torch.ones(3, 7)}, TypeError, "mask is torch.float32"),
        ({"teacher_logprob": torch.full((3, 7, 5), -1.0)}, ValueError, "that sum to 1.839; they must sum to 1"),
    ],
)  # fmt: skip
def test_bad_divergences(change, error, words):
    logp, logq = sides_of(0, 37, 1.0)
    ids = ids_of(37, 5)
    case = {"logprob": logp.gather(-1, ids), "teacher_logprob": logq.gather(-1, ids), "tokens": ids, "vocabulary": 37}
    with pytest.raises(error, match=words):
        truncated_divergence(**case | change)
