"""Statistics within the ids that a sampler kept."""

import math

import pytest
import torch
from cases import evaluate, hold_to_reference, hold_to_registration, linear_case, logits_case, some_mask, temperatures
from hypothesis import given
from hypothesis import strategies as st
from memory import Allocations

from safe_kernels import KeptIds, kept_sets, linear_token_stats, tiled, tiles, token_stats
from safe_kernels.inputs import compute_dtype

pytestmark = pytest.mark.usefixtures("kernels")
ENTRANCES = pytest.mark.parametrize("entrance", ["logits", "hidden"])
WRT = {"logits": ["logits"], "hidden": ["hidden", "weight"]}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """21 tokens are several chunks, and a weight is gathered in several parts."""
    monkeypatch.setattr(kept_sets, "TILE_BYTES", 6 * 48 * 4)
    monkeypatch.setattr(kept_sets, "ROWS_OF_A_CHUNK", 16)
    monkeypatch.setattr(tiles, "WEIGHT_BYTES", 5 * 16 * 4)


def case_of(entrance, shape=(3, 7), vocabulary=37, *, share=0.3, seed=0, **options):
    """(function, arguments): a third of the ids are kept, and the token is among them."""
    make, op = {"logits": (logits_case, token_stats), "hidden": (linear_case, linear_token_stats)}[entrance]
    case = make(shape, vocabulary, seed=seed, **options)
    is_kept = torch.rand(*shape, vocabulary, generator=torch.Generator().manual_seed(seed + 7)) < share
    case["kept"] = csr(is_kept.scatter_(-1, case["tokens"][..., None], True))
    return op, case


def csr(is_kept):
    counts = is_kept.reshape(-1, is_kept.shape[-1]).sum(-1)
    return KeptIds(is_kept.nonzero()[:, -1], torch.cat([counts.new_zeros(1), counts.cumsum(0)]))


def sets_of(sets):
    """A list a token."""
    bounds = sets.offsets.tolist()
    return [sets.ids[a:b].tolist() for a, b in zip(bounds, bounds[1:], strict=False)]


def test_the_set_of_a_masked_token_may_hold_anything():
    op, case = case_of("logits")
    case["mask"] = some_mask()
    expected = op(**case, backend="torch")
    ids, offsets = case["kept"].ids.clone(), case["kept"].offsets
    ids[~case["mask"].reshape(-1).repeat_interleave(offsets.diff())] = -100
    found = op(**case | {"kept": KeptIds(ids, offsets)}, backend="torch")
    torch.testing.assert_close(found[:2], expected[:2])  # in chunks of other ids, so rounded otherwise


def test_sets_of_two_tokens_as_lists_in_csr_are_no_list_a_token():
    op, case = case_of("logits", shape=(2,))
    expected = op(**case, backend="torch")
    found = op(**case | {"kept": KeptIds(*(x.tolist() for x in case["kept"]))}, backend="torch")
    assert torch.equal(found.logprob, expected.logprob)


@pytest.mark.parametrize("reference", [None, "shared", "own"])
@pytest.mark.parametrize("masked", [False, True])
def test_from_hidden_states(backend, reference, masked):
    op, case = case_of("hidden", reference=reference, bias=True, softcap=5.0, logit_scale=0.7)
    case |= {"mask": some_mask() if masked else None, "temperature": temperatures()}
    case["with_ref_kl"] = reference is not None
    hold_to_reference(op, case, backend, ["hidden", "weight", "bias"])


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_from_logits(backend, reference, masked):
    op, case = case_of("logits", reference=reference)
    case |= {"mask": some_mask() if masked else None, "temperature": temperatures(), "with_ref_kl": reference}
    hold_to_reference(op, case, backend, ["logits"])


@ENTRANCES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(entrance, backend, dtype):
    op, case = case_of(entrance, dtype=dtype)
    if dtype == torch.bfloat16 and backend == "triton":
        for name, x in evaluate(op, case, backend, WRT[entrance]).items():
            torch.testing.assert_close(x, evaluate(op, case, "reference", WRT[entrance])[name], rtol=0.02, atol=0.02)
    else:
        hold_to_reference(op, case, backend, WRT[entrance])


def test_weights_of_another_dtype_than_the_hidden_states(backend):
    op, case = case_of("hidden")
    hold_to_reference(op, case | {"weight": case["weight"].half()}, backend, ["hidden", "weight"])


def test_small_slopes_in_float16(backend):
    """Of a loss that is a mean over many tokens: float16 holds those of the logits only scaled."""
    op, case = case_of("hidden", dtype=torch.float16)
    case |= {"hidden": case["hidden"] / 1024, "ref_hidden": None, "weight": case["weight"] * 1024}
    found = []
    for name in (backend, "reference"):
        leaf = case["hidden"].clone().requires_grad_()
        found += torch.autograd.grad(1e-7 * op(**case | {"hidden": leaf}, backend=name).logprob.sum(), leaf)
    torch.testing.assert_close(found[0], found[1], rtol=0.01, atol=2e-7)
    assert found[0].abs().amax() > 5e-5


@ENTRANCES
def test_the_definition(entrance, float64_backend):
    """Softmax over the kept logits of a row alone."""
    op, case = case_of(entrance, dtype=torch.float64)
    found = op(**case, backend=float64_backend)
    logits, ref_logits = (case["logits"], case["ref_logits"]) if entrance == "logits" else (
        case[name] @ case["weight"].T for name in ("hidden", "ref_hidden")
    )  # fmt: skip
    rows = zip(*(x.flatten(0, -2) for x in (logits, ref_logits)), case["tokens"].flatten(), strict=True)
    for i, ((a, a_ref, token), ids) in enumerate(zip(rows, sets_of(case["kept"]), strict=True)):
        logp, logq = a[ids].log_softmax(0), a_ref[ids].log_softmax(0)
        at, p = ids.index(int(token)), logp.exp()
        expected = [logp[at], -(p * logp).sum(), logq[at], (p * (logp - logq)).sum()]
        torch.testing.assert_close(torch.stack([x.flatten()[i] for x in found[:4]]), torch.stack(expected))


@ENTRANCES
def test_gradients_in_float64(entrance):
    options = {"reference": "own", "width": 4} if entrance == "hidden" else {}
    op, case = case_of(entrance, (2, 3), 17, dtype=torch.float64, **options)
    if entrance == "hidden":
        case |= {"bias": torch.randn(17).double(), "softcap": 4.0, "logit_scale": 0.5}
    names = [*WRT[entrance], *(["bias"] if entrance == "hidden" else [])]

    def results(*leaves):
        return [x for x in op(**case | dict(zip(names, leaves, strict=True)), backend="torch") if x is not None][:4:3]

    leaves = [case[name].clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(results, leaves)


@ENTRANCES
def test_all_forms_of_the_same_sets(entrance, any_backend):
    op, case = case_of(entrance)
    lists = sets_of(case["kept"])
    dense = torch.full((21, 24), -1)
    for row, ids in zip(dense, lists, strict=True):
        row[1 : 1 + len(ids)] = torch.tensor(ids)
    forms = [dense.view(3, 7, 24), [lists[i : i + 7] for i in (0, 7, 14)], tuple(x.int() for x in case["kept"])]
    expected = evaluate(op, case, any_backend, WRT[entrance])
    for form in forms:
        for name, x in evaluate(op, case | {"kept": form}, any_backend, WRT[entrance]).items():
            assert torch.equal(x, expected[name]), name


@ENTRANCES
def test_order_and_repetition_do_not_matter(entrance, any_backend):
    op, case = case_of(entrance)
    lists = sets_of(case["kept"])
    twice = [[*reversed(ids), *ids[:3]] for ids in lists]
    expected = evaluate(op, case, any_backend, WRT[entrance])
    found = evaluate(op, case | {"kept": [twice[i : i + 7] for i in (0, 7, 14)]}, any_backend, WRT[entrance])
    assert all(torch.equal(x, expected[name]) for name, x in found.items())


@ENTRANCES
def test_of_everything_it_is_the_whole_distribution(entrance, any_backend):
    op, case = case_of(entrance, share=2)
    found = evaluate(op, case, any_backend, WRT[entrance])
    for name, x in evaluate(op, case | {"kept": None}, any_backend, WRT[entrance]).items():
        torch.testing.assert_close(found[name], x, rtol=1e-5, atol=1e-5)


@ENTRANCES
def test_of_the_token_alone_nothing_is_uncertain(entrance, any_backend):
    op, case = case_of(entrance, share=0)
    assert all(not x.any() for x in evaluate(op, case, any_backend, WRT[entrance]).values())


@ENTRANCES
def test_a_token_outside_of_its_set(entrance, any_backend):
    """Its log-probs are NaN, and the log-prob's gradient; its entropy and KL are those of the set."""
    op, case = case_of(entrance)
    outside = next(i for i in range(37) if i not in sets_of(case["kept"])[8])
    case["tokens"][1, 1] = outside
    leaf = case.pop(WRT[entrance][0]).requires_grad_()
    stats = op(leaf, **case, backend=any_backend)
    is_nan = torch.zeros(3, 7, dtype=torch.bool)
    is_nan[1, 1] = True
    assert torch.equal(stats.logprob.isnan(), is_nan) and torch.equal(stats.ref_logprob.isnan(), is_nan)
    assert stats.entropy.isfinite().all() and stats.kl.isfinite().all()
    gradient = torch.autograd.grad((stats.entropy + stats.kl).sum(), leaf, retain_graph=True)[0]
    assert gradient.isfinite().all() and gradient[1, 1].any()
    gradient = torch.autograd.grad(stats.logprob.sum(), leaf)[0]
    assert torch.equal(gradient.isnan().any(-1), is_nan)
    if entrance == "logits":
        assert torch.equal(gradient.isnan().view(21, 37)[8], kept_sets.kept_mask(case["kept"], 37)[8])


@ENTRANCES
def test_masked_tokens(entrance, any_backend):
    """They may have no set, and NaN inputs."""
    op, case = case_of(entrance)
    mask, lists = some_mask(), sets_of(case["kept"])
    lists = [ids if live else None for ids, live in zip(lists, mask.flatten().tolist(), strict=True)]
    nested, spoiled = [lists[i : i + 7] for i in (0, 7, 14)], WRT[entrance][0]
    expected = evaluate(op, case | {"mask": mask}, any_backend, WRT[entrance])
    case[spoiled] = case[spoiled].masked_fill(~mask[..., None], math.nan)
    found = evaluate(op, case | {"mask": mask, "kept": nested}, any_backend, WRT[entrance])
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name])
        assert name == "d weight" or not x[~mask].any()


@pytest.mark.parametrize("with_ref_kl", [False, True])
def test_minus_infinity(backend, with_ref_kl):
    """Of the reference alone inside of a set: an infinite KL. Outside, or of both: nothing."""
    op, case = case_of("logits", (3, 7))
    sets = sets_of(case["kept"])
    inside = [next(i for i in sets[row] if i != case["tokens"].flatten()[row]) for row in range(21)]
    outside = [next(i for i in range(37) if i not in sets[row]) for row in range(21)]
    rows = torch.arange(21)
    case["ref_logits"].view(21, 37)[rows[:14], torch.tensor(inside)[:14]] = -math.inf
    case["logits"].view(21, 37)[rows[7:14], torch.tensor(inside)[7:14]] = -math.inf
    case["ref_logits"].view(21, 37)[rows[14:], torch.tensor(outside)[14:]] = -math.inf
    found = hold_to_reference(op, case | {"with_ref_kl": with_ref_kl}, backend)
    assert found["kl"][0].isinf().all() and found["kl"][1:].isfinite().all()


@ENTRANCES
def test_the_expected_score_is_zero(entrance, any_backend):
    """Over draws from the set, which the gradient of whole log-probs has not."""
    ids, expected_scores = torch.tensor([3, 5, 11, 30]), {}
    for sets in ([ids.tolist()] * 4, None):
        op, case = case_of(entrance, (4,), seed=3)
        name = WRT[entrance][0]
        leaf = case.pop(name)[:1].clone().requires_grad_()
        case |= {"tokens": ids, "kept": sets}
        logprob = op(leaf.expand(4, -1), **case, backend=any_backend).logprob
        p = logprob.detach().exp()
        expected_scores[sets is None] = torch.autograd.grad((p / p.sum() * logprob).sum(), leaf)[0].abs().max()
        assert sets is None or abs(p.sum() - 1) < 1e-6
    assert expected_scores[False] < 1e-6 < 1e-2 < expected_scores[True]


@ENTRANCES
def test_nothing_reaches_what_nobody_kept(entrance, any_backend):
    op, case = case_of(entrance, share=0.05)
    is_kept = kept_sets.kept_mask(case["kept"], 37)
    gradients = evaluate(op, case, any_backend, WRT[entrance])
    if entrance == "logits":
        assert not gradients["d logits"].view(21, 37)[~is_kept].any()
    else:
        nobody = ~is_kept.any(0)
        assert nobody.any() and not gradients["d weight"][nobody].any() and gradients["d weight"][~nobody].any()


@ENTRANCES
@pytest.mark.parametrize("shape", [(0,), (), (2, 0), (1,)])
def test_few_tokens(entrance, any_backend, shape):
    op, case = case_of(entrance, shape)
    sets = case["kept"] if shape == (1,) else torch.arange(9).expand(*shape, 9)
    case |= {"kept": sets, "tokens": torch.full(shape, int(case["kept"].ids[0]) if shape == (1,) else 4)}
    gradients = evaluate(op, case, any_backend, WRT[entrance])
    assert gradients["logprob"].shape == shape and all(x.isfinite().all() for x in gradients.values())


def test_a_vocabulary_of_one(any_backend):
    op, case = case_of("hidden", vocabulary=1)
    assert all(not x.any() for x in evaluate(op, case, any_backend, ["hidden", "weight"]).values())


@pytest.mark.parametrize("view", ["slice", "transposed", "strided"])
def test_logits_of_any_strides(backend, view):
    op, case = case_of("logits")
    base = {"slice": torch.randn(3, 8, 37)[:, :-1], "transposed": torch.randn(7, 3, 37).mT.mT.transpose(0, 1)}
    logits = base[view] if view in base else torch.randn(3, 7, 74)[..., ::2]
    assert not logits.is_contiguous()
    found = evaluate(op, case | {"logits": logits.contiguous()}, backend, ["logits"])
    leaf = logits.detach().requires_grad_()
    stats = op(**case | {"logits": leaf}, backend=backend)
    assert all(torch.equal(x, found[name]) for name, x in stats._asdict().items() if x is not None)


@pytest.mark.parametrize("op", [token_stats, linear_token_stats])
@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ("top", TypeError, "kept is str; it must be KeptIds, a tensor"),
        (torch.zeros(3, 6, 2).long(), ValueError, r"kept has shape \(3, 6, 2\); it must be \(3, 7, 'K'\)"),
        (torch.zeros(3, 7, 2), TypeError, "kept has ids of dtype torch.float32"),
        ((torch.zeros(21).long(), torch.arange(22.0)), TypeError, "kept has offsets of dtype torch.float32"),
        ((torch.zeros(21).long(), torch.arange(21)), ValueError, r"the offsets of kept has shape \(21,\)"),
        ((torch.zeros(21, 1).long(), torch.arange(22)), ValueError, r"the ids of kept has shape \(21, 1\)"),
        ((torch.zeros(20).long(), torch.arange(22)), ValueError, "they must rise from 0 to 20, the number of its ids"),
        ((torch.zeros(22).long(), 1 + torch.arange(22)), ValueError, "offsets from 1 to 22"),
        ((torch.zeros(21).long(), torch.arange(22)[torch.randperm(22)]), ValueError, "kept has offsets from"),
        (torch.full((3, 7, 1), 37), ValueError, r"kept has the id 37; it must be in \[0, 37\), or -1 for none"),
        (torch.full((3, 7, 1), -2), ValueError, "kept has the id -2"),
        (torch.full((3, 7, 1), -1), ValueError, "kept has no id for token 0 of 21"),
        ([[[1]] * 7] * 2, ValueError, r"kept has 14 lists for tokens of shape \(3, 7\)"),
        ([[[1]] * 7, [[1]] * 7, [[1]] * 6], ValueError, "rows of other lengths"),
    ],
)
def test_bad_sets(op, value, error, words, any_backend):
    case = logits_case() if op is token_stats else linear_case()
    with pytest.raises(error, match=words):
        op(**case, kept=value, backend=any_backend)


@pytest.mark.parametrize(("entrance", "option"), [("logits", "inplace_backward"), ("hidden", "batch_invariant")])
def test_what_is_not_offered(entrance, option, backend):
    op, case = case_of(entrance)
    with pytest.raises(ValueError, match=f"{option} is given with kept, for which it is not offered"):
        op(**case | {option: True}, backend=backend)


@ENTRANCES
def test_registered(entrance, backend, monkeypatch):
    """opcheck of the ops and of their gradients."""
    op, case = case_of(entrance, bias=True) if entrance == "hidden" else case_of(entrance)
    seen, module = [], __import__("safe_kernels.linear" if entrance == "hidden" else "safe_kernels.logits")
    module = getattr(module, "linear" if entrance == "hidden" else "logits")
    name = f"{'linear_' if entrance == 'hidden' else ''}tiled_token_stats"
    forward, backward = getattr(tiled, f"{name}_op"), getattr(tiled, f"{name}_backward_op")
    monkeypatch.setattr(module, f"{name}_op", lambda *arguments: seen.append(arguments) or forward(*arguments))
    op(**case, backend=backend)
    arguments = [x.clone() if isinstance(x, torch.Tensor) else x for x in seen[0]]
    leaves = 3 if entrance == "hidden" else 1
    wanted = [x.requires_grad_() for x in arguments[:leaves]]
    hold_to_registration(forward, (*wanted, *arguments[leaves:]))
    stats = forward(*arguments)[-1]
    grads, needed = [torch.randn(21), None, torch.randn(21), None], [True, False, True][: leaves if leaves > 1 else 0]
    constants = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments[:-1]]
    hold_to_registration(backward, (*constants, stats.detach(), *grads, *needed, backend))


@ENTRANCES
def test_compiled(entrance, backend):
    """One graph for all numbers of tokens and ids."""
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(leaf, tokens, sets, rest):
        stats = op(leaf, tokens=tokens, kept=sets, **rest, backend=backend)
        return (stats.logprob + stats.entropy + stats.kl).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=graphs)
    for count in (21, 9, 34):
        op, case = case_of(entrance, (count,))
        leaf = case.pop(WRT[entrance][0]).requires_grad_()
        tokens, sets = case.pop("tokens"), case.pop("kept")
        plain, found = (torch.autograd.grad(f(leaf, tokens, sets, case), leaf)[0] for f in (loss, compiled))
        torch.testing.assert_close(found, plain)
    assert graphs.frame_count <= 2


@ENTRANCES
def test_without_memory(entrance, backend):
    op, case = case_of(entrance)
    meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in case.items()}
    meta["kept"] = KeptIds(*(x.to("meta") for x in case["kept"]))
    for x, y in zip(op(**meta, backend=backend), op(**case, backend=backend), strict=True):
        assert (x is None and y is None) or (x.is_meta and x.shape == y.shape and x.dtype == y.dtype)


@ENTRANCES
def test_autograd(entrance, backend):
    """A slope twice, many at once, none without gradient, and no second derivative."""
    op, case = case_of(entrance)
    leaf = case.pop(WRT[entrance][0]).requires_grad_()
    entropy = op(leaf, **case, backend=backend).entropy
    slopes = torch.randn(2, 3, 7)
    expected = torch.stack([torch.autograd.grad(entropy, leaf, x, retain_graph=True)[0] for x in slopes])
    found = torch.autograd.grad(entropy, leaf, slopes, retain_graph=True, is_grads_batched=True)[0]
    torch.testing.assert_close(found, expected)
    with pytest.raises(RuntimeError, match="no second derivative|no autograd formula"):
        torch.autograd.grad(entropy.sum(), leaf, create_graph=True)[0].pow(2).sum().backward()
    with torch.no_grad():
        assert torch.equal(op(leaf, **case, backend=backend).entropy, entropy)


def test_frozen_parts_get_no_gradient(backend):
    op, case = case_of("hidden", bias=True)
    expected = evaluate(op, case, backend, ["hidden", "weight", "bias"])
    for name in ("hidden", "weight", "bias"):
        assert torch.equal(evaluate(op, case, backend, [name])[f"d {name}"], expected[f"d {name}"])


def test_autocast_is_ignored(backend):
    op, case = case_of("hidden")
    expected = evaluate(op, case, backend, ["hidden"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = evaluate(op, case, backend, ["hidden"])
    assert all(torch.equal(x, expected[name]) for name, x in found.items())


@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 40),
    vocabulary=st.integers(1, 80),
    share=st.sampled_from([0.0, 0.05, 0.5, 2.0]),
    budget=st.integers(1, 60),
    rows=st.integers(1, 50),
)
def test_chunks(seed, count, vocabulary, share, budget, rows):
    """Every row is in one of them, its set and token are where the ids say, and the tile fits if it has two rows."""
    _, case = case_of("logits", (count,), vocabulary, share=share, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_sets, "TILE_BYTES", budget * 16 * 4)
        patch.setattr(kept_sets, "ROWS_OF_A_CHUNK", rows)
        patch.setattr(kept_sets, "IDS_OF_A_CHUNK", 50 * budget)
        found = list(kept_sets.chunks(case["kept"], case["tokens"], vocabulary, torch.float32))
    assert [i for chunk in found for i in range(count)[chunk.rows]] == list(range(count))
    sets = sets_of(case["kept"])
    for chunk in found:
        height, width = chunk.is_kept_RW.shape
        assert height == 1 or 4 * height * width <= budget * 16 * 4
        assert width % 16 == 0 and width > len(chunk.ids) and height <= rows
        for i, row in enumerate(range(count)[chunk.rows]):
            assert chunk.ids[chunk.is_kept_RW[i, : len(chunk.ids)]].tolist() == sorted(sets[row])
            assert chunk.ids[chunk.tokens_R[i]] == case["tokens"][row]


@given(seed=st.integers(0, 2**31), budget=st.integers(1, 60), share=st.sampled_from([0.05, 0.5]))
@ENTRANCES
def test_the_size_of_a_chunk_does_not_matter(entrance, seed, budget, share):
    op, case = case_of(entrance, share=share, seed=seed)
    expected = evaluate(op, case, "reference", WRT[entrance])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_sets, "TILE_BYTES", budget * 16 * 4)
        for name, x in evaluate(op, case, "torch", WRT[entrance]).items():
            torch.testing.assert_close(x, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [0.02, 2.0])
@ENTRANCES
def test_memory(entrance, share, monkeypatch):
    """A few tiles, however many ids are kept: nothing near N x V, or N x K x H, or a copy of the weight."""
    monkeypatch.undo()
    torch.use_deterministic_algorithms(False)
    count, vocabulary, width = 512, 4096, 64
    monkeypatch.setattr(kept_sets, "TILE_BYTES", 32 * vocabulary * 4)
    monkeypatch.setattr(kept_sets, "IDS_OF_A_CHUNK", 8 * vocabulary)
    monkeypatch.setattr(tiles, "WEIGHT_BYTES", 128 * width * 4)
    monkeypatch.setattr("safe_kernels.torch_backend.rows.TILE_BYTES", 8 * vocabulary * 4)
    op, case = case_of(entrance, (count,), vocabulary, share=share)
    leaf = case.pop(WRT[entrance][0]).requires_grad_()
    with Allocations() as seen:
        stats = op(leaf, **case, backend="torch")
        (stats.logprob + stats.kl).sum().backward()
    tile = 32 * vocabulary * 4
    assert seen.peak - leaf.grad.nbytes < 8 * tile < count * vocabulary * 4
    assert entrance == "logits" or seen.largest <= tile * 1.05


def test_results_are_in_the_compute_dtype(any_backend):
    for dtype in (torch.float16, torch.float32):
        op, case = case_of("hidden", dtype=dtype)
        assert all(x is None or x.dtype == compute_dtype(case["hidden"]) for x in op(**case, backend=any_backend))
