"""`max_kept_bytes`: logits that stay between forward and backward change what is computed again, and nothing else."""

import contextlib
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from cases import evaluate, hold_to_reference, linear_case, some_mask, temperatures
from memory import Allocations
from torch._dynamo.utils import counters

from safe_kernels import linear_safe_terms, linear_token_stats
from safe_kernels.torch_backend import linear as torch_linear
from safe_kernels.triton_backend import linear as triton_linear
from safe_train.algorithms import losses
from safe_train.config import ConfigError, SafeConfig
from safe_train.engines.kept_logits import KeptLogits

pytestmark = pytest.mark.usefixtures("kernels")
ROW = 37 * 4  # bytes of a token's logits in `linear_case`, which has 21 tokens
EVERYTHING = 1 << 20


@pytest.fixture
def logits_made(backend, monkeypatch):
    """How many rows of logits each product made, of float32 inputs; tiles of a row count in parts."""
    seen, head, blas_product = [], torch_linear.Head.logits, triton_linear.blas_product

    def by_torch(self, hidden, out):
        seen.append(len(out))
        head(self, hidden, out)

    def for_triton(x, y, out):
        seen.append(out.numel() / 37)
        blas_product(x, y, out)

    monkeypatch.setattr(torch_linear.Head, "logits", by_torch)
    monkeypatch.setattr(triton_linear, "blas_product", for_triton)
    return seen


@pytest.mark.parametrize("kept", [0, 16, EVERYTHING])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reference": None},
        {"with_ref_kl": True, "temperature": 0.7},
        {"reference": "own", "with_ref_kl": True, "bias": True, "softcap": 5.0, "logit_scale": 0.5, "temperature": 0.6},
        {"dtype": torch.float16, "mask": some_mask(), "temperature": temperatures()},
        {"dtype": torch.bfloat16, "reference": "own", "mask": torch.zeros(3, 7, dtype=torch.bool)},
    ],
    ids=["plain", "no reference", "both KLs", "all", "masked", "all masked"],
)
def test_holds_to_reference(backend, kept, options):
    streams = 1 if options.get("reference", "shared") is None else 2
    case = linear_case(**options) | {"max_kept_bytes": kept * streams * ROW}
    hold_to_reference(linear_token_stats, case, backend, ["hidden", "weight", *(["bias"] if "bias" in options else [])])


@pytest.mark.parametrize(
    ("kept", "saved", "with_reference"),
    [(0, 0, True), (15, 0, False), (16, 16, True), (20, 16, False), (EVERYTHING, 21, False), (EVERYTHING, 21, True)],
)
def test_what_is_kept_is_not_computed_again(backend, logits_made, kept, saved, with_reference, monkeypatch):
    monkeypatch.setattr(torch_linear, "PRODUCT_BYTES", 16 * ROW)
    streams = 1 + with_reference
    case = linear_case(reference="shared" if with_reference else None)
    hidden = case.pop("hidden").requires_grad_()
    stats = linear_token_stats(hidden, **case, max_kept_bytes=kept * streams * ROW, backend=backend)
    assert round(sum(logits_made), 3) == 21 * streams
    for again in (21 - saved, 21):  # the first backward uses them up
        logits_made.clear()
        (stats.kl if with_reference else stats.entropy).sum().backward(retain_graph=True)
        assert round(sum(logits_made), 3) == again * streams


@pytest.mark.parametrize("kept", [0, 16, EVERYTHING])
def test_every_backward_gives_the_same(backend, kept):
    case = linear_case(mask=some_mask(), max_kept_bytes=2 * kept * ROW, with_ref_kl=True)
    leaves = [case.pop(name).requires_grad_() for name in ("hidden", "weight")]
    stats = linear_token_stats(*leaves, **case, backend=backend)
    loss = (stats.logprob + stats.entropy + stats.kl + stats.ref_kl).sum()
    first, second, third = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(3))
    for x, y, z in zip(first, second, third, strict=True):
        torch.testing.assert_close(x, y)
        assert torch.equal(y, z)


@pytest.mark.parametrize("name", ["kl", "ref_kl"])
@pytest.mark.parametrize("kept", [0, 16, EVERYTHING])
def test_many_slopes_at_once(backend, kept, name):
    """By is_grads_batched and by vmap, which run the ops once a sample, before and after a backward of one sample."""
    case = linear_case(max_kept_bytes=2 * kept * ROW, with_ref_kl=True)
    leaves = [case.pop(leaf).requires_grad_() for leaf in ("hidden", "weight")]
    kl, slopes = getattr(linear_token_stats(*leaves, **case, backend=backend), name), torch.randn(2, 3, 7)

    def gradient(slope, **options):
        return torch.autograd.grad(kl, leaves, slope, retain_graph=True, **options)

    at_once = [torch.func.vmap(gradient)(slopes), gradient(slopes, is_grads_batched=True)]
    expected = [torch.stack(x) for x in zip(*map(gradient, slopes), strict=True)]
    at_once += [torch.func.vmap(gradient)(slopes), gradient(slopes, is_grads_batched=True)]
    for found in at_once:
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("kept", [16, EVERYTHING])
def test_compiled_autograd_uses_them_up_too(backend, kept):
    torch._dynamo.reset()
    case = linear_case(max_kept_bytes=2 * kept * ROW)
    leaves = [case.pop(name).requires_grad_() for name in ("hidden", "weight")]
    stats = linear_token_stats(*leaves, **case, backend=backend)
    loss, found = (stats.entropy + stats.kl).sum(), []
    for is_compiled in (True, False, True):
        compiled = torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager"))
        with compiled if is_compiled else contextlib.nullcontext():
            loss.backward(retain_graph=True)
        found.append([x.grad for x in leaves])
        for x in leaves:
            x.grad = None
    for again in found[1:]:
        for x, y in zip(again, found[0], strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("asked", ["entropy", "kl", "ref_kl"])
def test_what_the_forward_computed_beyond_what_is_differentiated_changes_nothing(backend, asked):
    """Of the kept logits the torch backend keeps another form where both KLs are asked for."""
    found = []
    for options in ({"max_kept_bytes": 0}, {}, {"max_kept_bytes": EVERYTHING}):
        case = linear_case(reference="own", softcap=5.0, with_ref_kl=True, **options)
        case["hidden"].requires_grad_()
        stats = linear_token_stats(**case, backend=backend)
        found += torch.autograd.grad(getattr(stats, asked).sum(), case["hidden"])
    for x in found[1:]:
        torch.testing.assert_close(x, found[0])


def test_more_bytes_than_any_memory(backend):
    """Of any size that a caller may write for all of them."""
    case = linear_case(max_kept_bytes=1e30)
    hold_to_reference(linear_token_stats, case, backend, ["hidden"])
    hold_to_reference(linear_token_stats, case | {"max_kept_bytes": sys.maxsize}, backend, ["hidden"])


def test_a_backward_without_slopes_leaves_them(backend, logits_made):
    case = linear_case(max_kept_bytes=EVERYTHING)
    hidden, weight = case.pop("hidden").requires_grad_(), case.pop("weight").requires_grad_()
    stats = linear_token_stats(hidden, weight, **case, backend=backend)
    logits_made.clear()
    alone = torch.autograd.grad(stats.logprob.sum(), weight, retain_graph=True)[0]
    assert not logits_made
    both = torch.autograd.grad(stats.logprob.sum(), [hidden, weight])
    torch.testing.assert_close(both[1], alone)


@pytest.mark.parametrize("what", ["no gradient", "no_grad", "batch_invariant", "inference_mode"])
def test_nothing_is_kept_where_nothing_can_use_it(backend, what, ops_seen):
    case = linear_case(max_kept_bytes=EVERYTHING, batch_invariant=what == "batch_invariant")
    case["hidden"].requires_grad_(what != "no gradient")
    contexts = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    with contexts.get(what, contextlib.nullcontext)():
        linear_token_stats(**case, backend=backend)
    found = [op(*arguments)[-1] for op, arguments in ops_seen if op.name() == "safe_kernels::linear_token_stats"]
    assert [x.numel() for x in found] == [0]


@pytest.mark.parametrize("kept", [16, EVERYTHING])
def test_hooks_on_saved_tensors_see_them(backend, kept):
    """Of activation checkpointing, which drops them, and of what moves activations elsewhere, which copies them."""
    case = linear_case(max_kept_bytes=2 * kept * ROW)
    hidden = case.pop("hidden").requires_grad_()

    def loss(hidden):
        stats = linear_token_stats(hidden, **case, backend=backend)
        return (stats.logprob + stats.kl).sum()

    plain = torch.autograd.grad(loss(hidden), hidden)[0]
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(tuple(x.shape)) or x.clone(), lambda x: x):
        value = loss(hidden)
    assert (2, {"torch": {16: 13}, "triton": {16: 16, EVERYTHING: 32}}[backend].get(kept, 21), 37) in shapes
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(value, hidden, retain_graph=True)[0], plain)
    for use_reentrant in (False, True):
        value = torch.utils.checkpoint.checkpoint(loss, hidden, use_reentrant=use_reentrant)
        hidden.grad = None
        value.backward()
        torch.testing.assert_close(hidden.grad, plain)


@pytest.mark.parametrize("kept", [0, 16, EVERYTHING])
def test_compiled(backend, kept):
    """One graph for all numbers of tokens, or two: for fewer than are kept and for more. The gradients are the same."""
    torch._dynamo.reset()
    counters["stats"].clear()

    def gradient(hidden, weight, tokens, ref_hidden):
        stats = linear_token_stats(
            hidden, weight, tokens, ref_hidden=ref_hidden, max_kept_bytes=2 * kept * ROW, backend=backend
        )
        return stats.logprob + stats.entropy + stats.kl

    compiled = torch.compile(gradient, fullgraph=True, dynamic=True)
    for count in (21, 9, 33):
        case = linear_case((count,))
        leaves = [case.pop(name).requires_grad_() for name in ("hidden", "weight")]
        given = (*leaves, case["tokens"], case["ref_hidden"])
        plain, found = (torch.autograd.grad(f(*given).sum(), leaves) for f in (gradient, compiled))
        for x, y in zip(found, plain, strict=True):
            torch.testing.assert_close(x, y)
    assert counters["stats"]["unique_graphs"] <= (2 if kept == 16 else 1)


@pytest.mark.parametrize("name", ["linear_token_stats", "linear_safe_terms"])
def test_the_public_functions_take_it(backend, name, ops_seen):
    case = linear_case(max_kept_bytes=EVERYTHING)
    case["hidden"].requires_grad_()
    if name == "linear_safe_terms":
        values = dict(zip(("v1", "v2", "rewards"), torch.zeros(3, 3, 7), strict=True))
        linear_safe_terms(**case, **values, kl_threshold=0.1, alpha=1.0, backend=backend)
    else:
        linear_token_stats(**case, backend=backend)
    assert [a[14] for op, a in ops_seen if op.name() == "safe_kernels::linear_token_stats"] == [EVERYTHING]


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (-1, ValueError, "max_kept_bytes is -1; it must be at least 0"),
        (math.nan, ValueError, "max_kept_bytes is nan"),
        ("64 MiB", TypeError, "max_kept_bytes is str; it must be a number"),
        (True, TypeError, "max_kept_bytes is bool"),
    ],
)
def test_bad_values(value, error, words):
    with pytest.raises(error, match=words):
        linear_token_stats(**linear_case(max_kept_bytes=value))


@pytest.mark.parametrize(("kept", "tiles"), [(0, 1), (256, 4), (1024, 16)])
def test_memory(kept, tiles, monkeypatch):
    """Of the torch backend: one product's logits, or what is kept, through which the others pass."""
    monkeypatch.undo()
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch_linear, "PRODUCT_BYTES", 64 * 4096 * 4)
    case = linear_case((1024,), 4096, 8, reference=None, max_kept_bytes=kept * 4096 * 4)
    case["hidden"].requires_grad_()
    with Allocations() as seen:
        linear_token_stats(**case, backend="torch").entropy.sum().backward()
    tile = 64 * 4096 * 4
    assert tiles * tile <= seen.peak < (tiles + 6.1) * tile  # with those in the cache, of this product and of the last


def test_the_default_is_the_tile_that_exists_anyway(backend, ops_seen, monkeypatch):
    monkeypatch.setattr(torch_linear, "PRODUCT_BYTES", 13 * ROW)
    evaluate(linear_token_stats, linear_case(), backend, ["hidden"])
    op, arguments = ops_seen[0]
    assert op(*arguments)[-1].shape == ((2, 13, 37) if backend == "torch" else (0, 0, 0))


@pytest.mark.parametrize(("setting", "expected"), [("default", None), ("auto", None), ("0", 0), ("123456", 123456)])
def test_the_trainers_setting(setting, expected):
    kept = KeptLogits(SafeConfig(max_kept_bytes=setting), torch.device("cpu"))
    kept.measure()
    assert kept.bytes == expected


def test_auto_takes_half_of_what_no_update_needed(monkeypatch):
    """1000 bytes free on the device and 300 in PyTorch's cache, of which 200 were in use at the highest point."""
    known = {"mem_get_info": (1000, 5000), "memory_reserved": 300, "max_memory_allocated": 200}
    for name, value in known.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    kept = KeptLogits(SafeConfig(max_kept_bytes="auto"), torch.device("cuda"))
    assert kept.bytes == 0
    kept.measure()
    assert kept.bytes == 550
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 300)
    kept.measure()
    assert kept.bytes == 550


@pytest.mark.parametrize("value", ["much", "-1", "1e9", ""])
def test_a_setting_that_is_no_number_of_bytes(value):
    with pytest.raises(ConfigError, match="max_kept_bytes must be a number of bytes, auto or default, got"):
        SafeConfig(max_kept_bytes=value)


def test_the_composed_loss_has_the_same_gradient(logits_made, backend, monkeypatch):
    monkeypatch.setenv("SAFE_KERNELS_BACKEND", backend)
    case, found = linear_case((21,)), []
    for kept in (0, EVERYTHING):
        rows = {name: torch.zeros(21) for name in ("logprob_L", "sampler_logprob_L", "ref_logprob_L")}
        rows |= {"advantage_L": torch.ones(21), "ref_hidden_LH": case["ref_hidden"]}
        micro = SimpleNamespace(batch=SimpleNamespace(targets_L=case["tokens"], kept=None), **rows)
        args = SafeConfig(algorithm="cispo", completions_per_prompt=2, entropy_coef=0.01)
        hidden = case["hidden"].clone().requires_grad_()
        given = (micro, torch.full((21,), 1 / 21), SimpleNamespace(kl_coef=0.1, kl_threshold=0.2), args)
        logits_made.clear()
        losses.policy_loss(hidden, {"weight": case["weight"]}, *given, max_kept_bytes=kept).loss.backward()
        found.append((hidden.grad, round(sum(logits_made))))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert [made for _, made in found] == [2 * 42, 42]
