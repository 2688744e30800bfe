"""TRL's functions replaced by ours: the same numbers, better rounded, in less memory."""

import contextlib

import pytest
import tiny
import torch
from cases import hold, linear_case, logits_case, some_mask
from memory import Allocations

from safe_kernels import linear

pytest.importorskip("trl", reason="TRL is not installed; it needs Python 3.11: pip install 'safe-kernels[test]'")

from trl.trainer import utils  # noqa: E402

from safe_kernels.integrations import trl as patch  # noqa: E402

OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
ORIGINALS = {
    name: getattr(utils, name)
    for name in (
        "_ChunkedLogProbFunction",
        "selective_log_softmax",
        "entropy_from_logits",
        "selective_log_softmax_and_entropy",
    )
}


@pytest.fixture
def fast(backend, kernels, monkeypatch):
    """Ours on each backend, in tiles so small that a test has many."""
    monkeypatch.setenv("SAFE_KERNELS_BACKEND", backend)
    return backend


@pytest.mark.filterwarnings("ignore:You are importing from .trl.experimental.")
def test_every_trainer_and_function_finds_ours_and_then_its_own_again():
    from trl.experimental.cpo import cpo_trainer

    with patch.apply() as active:
        assert active.replaced[: len(ORIGINALS)] == [f"trl.trainer.utils.{name}" for name in ORIGINALS]
        assert utils._ChunkedLogProbFunction is patch.LinearLogprob
        assert cpo_trainer.selective_log_softmax is utils.selective_log_softmax is patch.selective_log_softmax
        assert patch.apply() is active
    assert {name: getattr(utils, name) for name in ORIGINALS} == ORIGINALS
    assert cpo_trainer.selective_log_softmax is ORIGINALS["selective_log_softmax"]


def plain(hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs):
    """The formulas, on whole logits of the compute dtype."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    z = hidden.to(dtype) @ weight.to(dtype).T
    z = logit_scale * (z if bias is None else z + bias.to(dtype))
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    logp = z.log_softmax(-1)
    p = logp.exp()
    found = {
        "log_probs": logp.gather(-1, targets[:, None])[:, 0],
        "entropy": -(p * logp).sum(-1),
        "log_sum_sq_probs": p.detach().square().sum(-1).log(),
        "mean_logits": z.detach().mean(-1),
        "is_top1": z.argmax(-1) == targets,
    }
    return tuple(found[name] if name == "log_probs" or name in outputs else None for name in OUTPUTS)


def hidden_results(apply, case, settings, outputs, used=("log_probs", "entropy"), dtype=None):
    """What `apply` returns, and its gradients for random slopes on those outputs that are `used`."""
    leaves = {name: case[name].detach().clone() for name in ("hidden", "weight", "bias") if name in case}
    leaves = {name: x.to(dtype or x.dtype).requires_grad_() for name, x in leaves.items()}
    heads = leaves["hidden"], leaves["weight"], leaves.get("bias"), case["tokens"]
    results = apply(*heads, *settings, outputs)
    assert [x is not None for x in results] == [name == "log_probs" or name in outputs for name in OUTPUTS]
    found = {name: x.detach() for name, x in zip(OUTPUTS, results, strict=True) if x is not None}
    draw = torch.Generator().manual_seed(5)
    slopes = {name: torch.randn(len(case["tokens"]), generator=draw) for name in used}
    loss = sum((results[OUTPUTS.index(name)] * slope).sum() for name, slope in slopes.items())
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return found | {f"d {name}": x for name, x in zip(leaves, gradients, strict=True)}


def hidden_case(dtype=torch.float32, **options):
    """Half of the targets are the most likely token."""
    case = linear_case((21,), 53, reference=None, dtype=dtype, **options)
    logits = case["hidden"].float() @ case["weight"].float().T
    case["tokens"][::2] = (logits + case["bias"].float() if "bias" in case else logits).argmax(-1)[::2]
    return case


SETTINGS = {  # temperature, chunk size, softcap, logit scale
    "plain": (1.0, 32, None, 1.0),
    "temperature": (0.7, 32, None, 1.0),
    "softcap and scale": (1.3, 16, 4.0, 0.8),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_log_probs_from_hidden_states(dtype, setting, fast):
    if fast == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter rounds to bfloat16 by truncation")
    case, settings = hidden_case(dtype, bias=setting != "plain"), SETTINGS[setting]
    exact = hidden_results(plain, case, settings, OUTPUTS, dtype=torch.float64)
    actual = hidden_results(patch.LinearLogprob.apply, case, settings, OUTPUTS)
    yardsticks = {"plain": plain, "TRL's own": ORIGINALS["_ChunkedLogProbFunction"].apply}
    for yardstick in yardsticks.values():
        other = hidden_results(yardstick, case, settings, OUTPUTS)
        for name, x in actual.items():
            assert x.dtype == other[name].dtype and x.shape == other[name].shape, name
            if name != "is_top1" and not (name == "mean_logits" and settings[2] and dtype != torch.float32):
                hold(name, x, other[name], exact[name], 53)
    assert torch.equal(actual["is_top1"], exact["is_top1"]) and 0 < actual["is_top1"].sum() < 21
    if dtype != torch.float32:  # with a softcap each logit is rounded as TRL rounds it
        torch.testing.assert_close(actual["mean_logits"].double(), exact["mean_logits"], atol=0.02, rtol=0)


def test_outputs_that_are_not_asked_for_cost_no_gradient(fast, monkeypatch):
    """The entropy of a metric must not be differentiated: GRPO asks for it in every step."""
    slopes = []
    original = linear.linear_gradients
    monkeypatch.setattr(linear, "linear_gradients", lambda *a: slopes.append(a[2]) or original(*a))
    case = hidden_case()
    for outputs in (("log_probs",), OUTPUTS):
        actual = hidden_results(patch.LinearLogprob.apply, case, SETTINGS["plain"], outputs, used=("log_probs",))
        exact = hidden_results(plain, case, SETTINGS["plain"], outputs, used=("log_probs",), dtype=torch.float64)
        ordinary = hidden_results(plain, case, SETTINGS["plain"], outputs, used=("log_probs",))
        for name in ("log_probs", "d hidden", "d weight"):
            hold(name, actual[name], ordinary[name], exact[name], 53)
    assert [[x is not None for x in slope] for slope in slopes] == [[True, False, False, False]] * 2


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_a_frozen_part_gets_no_gradient(frozen, fast):
    case = hidden_case()
    leaves = {name: case[name].requires_grad_(name != frozen) for name in ("hidden", "weight")}
    logprob, *_ = patch.LinearLogprob.apply(*leaves.values(), None, case["tokens"], *SETTINGS["plain"], ())
    logprob.sum().backward()
    assert (leaves[frozen].grad is None) and all(x.grad is not None for n, x in leaves.items() if n != frozen)


def test_no_token_at_all_keeps_the_graph(fast):
    case = linear_case((0,), 53, reference=None)
    results = hidden_results(patch.LinearLogprob.apply, case, SETTINGS["softcap and scale"], OUTPUTS)
    assert all(results[name].shape == (0,) for name in OUTPUTS)
    assert results["d hidden"].shape == (0, 16) and not results["d weight"].any()


def test_autocast_rounds_the_operands_and_nothing_else(fast):
    """Not the logits, and not the gradients of float32 weights."""
    if fast == "triton":
        pytest.skip("the interpreter rounds to bfloat16 by truncation")

    def apply(*arguments):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return patch.LinearLogprob.apply(*arguments)

    case, settings = hidden_case(bias=True), SETTINGS["temperature"]
    rounded = {**case, **{name: case[name].bfloat16().float() for name in ("hidden", "weight")}}
    exact = hidden_results(plain, rounded, settings, OUTPUTS, dtype=torch.float64)
    ordinary = hidden_results(plain, rounded, settings, OUTPUTS)
    actual = hidden_results(apply, case, settings, OUTPUTS)
    for name in [*OUTPUTS[:4], "d hidden", "d weight", "d bias"]:
        assert actual[name].dtype == torch.float32
        hold(name, actual[name], ordinary[name], exact[name], 53)


def test_a_float32_head_of_a_bfloat16_model(fast):
    """`cast_lm_head_to_fp32`: hidden states become float32, and the weight may have stayed bfloat16."""
    if fast == "triton":
        pytest.skip("the interpreter rounds to bfloat16 by truncation")
    case = hidden_case()
    case["weight"] = case["weight"].bfloat16()
    exact = hidden_results(plain, case, SETTINGS["plain"], OUTPUTS, dtype=torch.float64)
    ordinary, actual = (
        hidden_results(apply, case, SETTINGS["plain"], OUTPUTS) for apply in (plain, patch.LinearLogprob.apply)
    )
    assert actual["d weight"].dtype == torch.bfloat16 and actual["d hidden"].dtype == torch.float32
    for name in ("log_probs", "entropy", "d hidden", "d weight"):
        hold(name, actual[name], ordinary[name], exact[name], 53)


def test_a_weight_that_is_gone_after_the_forward_is_gathered_again(fast, monkeypatch):
    """As under ZeRO-3, where TRL gathers the head for the forward alone."""
    model = tiny.model(tie_word_embeddings=False)
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    weight, entered = model.lm_head.weight, []
    whole = weight.detach().clone()
    ids = torch.randint(2, 20, (2, 7), generator=torch.Generator().manual_seed(1))

    @contextlib.contextmanager
    def gathered(*parameters):
        assert parameters[0] is weight and parameters[1] is None
        entered.append(torch.is_grad_enabled())
        weight.data = whole
        yield
        weight.data = whole.new_empty(0)

    def gradients():
        output = model(ids, labels=ids, fused_lm_head=True)
        loss = output.loss - 0.1 * output.entropy.sum()
        return torch.autograd.grad(loss, [weight, model.model.norm.weight])

    expected = gradients()
    monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", gathered)
    weight.data = whole.new_empty(0)
    with patch.apply():
        for actual, wanted in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(actual, wanted)
    assert entered == [True, False] and weight.numel() == 0


def test_a_weight_that_was_not_gathered_is_an_error():
    case = hidden_case()
    with pytest.raises(ValueError, match="weight is empty"):
        patch.LinearLogprob.apply(case["hidden"], torch.empty(0), None, case["tokens"], *SETTINGS["plain"], OUTPUTS)


def test_the_reference_backend_has_no_place_in_trl(monkeypatch):
    monkeypatch.setenv("SAFE_KERNELS_BACKEND", "reference")
    with pytest.raises(ValueError, match="inside TRL it must be 'torch' or 'triton'"):
        hidden_results(patch.LinearLogprob.apply, hidden_case(), SETTINGS["plain"], OUTPUTS)


def test_torch_compile_takes_it_whole():
    case, settings = hidden_case(bias=True), SETTINGS["softcap and scale"]
    compiled = torch.compile(patch.LinearLogprob.apply, fullgraph=True, backend="aot_eager")
    expected = hidden_results(patch.LinearLogprob.apply, case, settings, OUTPUTS)
    for name, x in hidden_results(compiled, case, settings, OUTPUTS).items():
        torch.testing.assert_close(x, expected[name])


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_shorter_signatures_of_older_versions(has_bias):
    case = hidden_case(bias=has_bias)
    heads = (case["hidden"], case["weight"], *([case["bias"]] if has_bias else []), case["tokens"])
    full = (*heads[:2], case.get("bias"), case["tokens"])
    for options in ((), (4.0,), (4.0, 0.8)):
        actual = patch.TwoOutputs(has_bias).apply(*heads, 0.7, 32, *options)
        expected = plain(*full, 0.7, 32, *options, *(None, 1.0)[len(options) :], OUTPUTS)
        for x, wanted in zip(actual, expected[:2], strict=True):
            torch.testing.assert_close(x, wanted)


def logits_results(function, logits, *arguments, dtype=None, **options):
    """As float64, whatever the dtype; and d logits for random slopes."""
    logits = logits.detach().to(dtype or logits.dtype).requires_grad_()
    results = function(logits, *arguments, **options)
    results = results if isinstance(results, tuple) else (results,)
    draw = torch.Generator().manual_seed(7)
    loss = sum((x * torch.randn(x.shape, generator=draw)).sum() for x in results)
    (gradient,) = torch.autograd.grad(loss, [logits])
    return {**{f"result {i}": x.detach() for i, x in enumerate(results)}, "d logits": gradient}


def plain_selected(logits, index, temperature=1.0, row_mask=None):
    logp = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
    found = logp.gather(-1, index if index.dim() == logits.dim() else index[..., None]).view(index.shape)
    return found if row_mask is None else found.masked_fill(row_mask == 0, 0)


def plain_entropy(logits, temperature=1.0, row_mask=None):
    logp = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)
    found = -(logp.exp() * logp).sum(-1)
    return found if row_mask is None else found.masked_fill(row_mask == 0, 0)


def plain_both(logits, index, entropy_requires_grad=True, **options):
    return plain_selected(logits, index, **options), plain_entropy(logits, **options)


def hold_logits(name, reference, case, *arguments, **options):
    function = getattr(patch, name)
    exact = logits_results(reference, case["logits"], *arguments, dtype=torch.float64, **options)
    actual = logits_results(function, case["logits"], *arguments, **options)
    for other in (reference, ORIGINALS[name]):
        ordinary = logits_results(other, case["logits"], *arguments, **options)
        for key, x in actual.items():
            assert x.dtype == (case["logits"].dtype if key.startswith("d ") else torch.float32), key
            hold(key, x, ordinary[key], exact[key], 37)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("tokens", [None, 1, 5], ids=["one", "K=1", "K=5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selected_log_probs(dtype, tokens, temperature, masked, fast):
    if fast == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter rounds to bfloat16 by truncation")
    case = logits_case(dtype=dtype, reference=False)
    draw = torch.Generator().manual_seed(3)
    index = case["tokens"] if tokens is None else torch.randint(37, (3, 7, tokens), generator=draw)
    row_mask = (torch.rand(index.shape, generator=draw) > 0.4).long() if masked else None
    hold_logits("selective_log_softmax", plain_selected, case, index, temperature=temperature, row_mask=row_mask)


def test_selected_log_probs_of_the_old_signature_and_of_a_slice(fast):
    case = logits_case(reference=False)
    whole = torch.nn.functional.pad(case["logits"], (0, 0, 0, 1)).requires_grad_()
    for index in (case["tokens"], case["tokens"][..., None].expand(-1, -1, 2)):
        actual = patch.selective_log_softmax(whole[:, :-1], index)
        torch.testing.assert_close(actual, plain_selected(case["logits"], index))
        (gradient,) = torch.autograd.grad(actual.sum(), [whole])
        assert gradient.shape == whole.shape and not gradient[:, -1].any() and gradient[:, :-1].any()


@pytest.mark.parametrize("rows, tokens", [((3, 7), 0), ((0, 7), 4), ((0,), 0), ((5,), 0)])
def test_no_token_is_asked_for(rows, tokens, fast):
    logits = logits_case(rows, dtype=torch.float16, reference=False)["logits"].requires_grad_()
    found = patch.selective_log_softmax(logits, torch.zeros(*rows, tokens, dtype=torch.int32), row_mask=None)
    assert (found.shape, found.dtype) == ((*rows, tokens), torch.float32)
    found.sum().backward()
    assert logits.grad.shape == logits.shape and not logits.grad.any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_ids_of_any_integer_dtype(dtype, fast):
    logits, head = logits_case(reference=False), linear_case((12,), reference=None)
    index = logits["tokens"][..., None].expand(-1, -1, 2)
    for ids in (logits["tokens"], index):
        wide, narrow = (patch.selective_log_softmax(logits["logits"], x) for x in (ids, ids.to(dtype)))
        assert torch.equal(wide, narrow)
    wide, narrow = (
        patch.LinearLogprob.apply(head["hidden"], head["weight"], None, x, 1.0, 0, None, 1.0, ("entropy", "is_top1"))
        for x in (head["tokens"], head["tokens"].to(dtype))
    )
    assert all(x is y is None or torch.equal(x, y) for x, y in zip(wide, narrow, strict=True))


def test_tokens_that_are_impossible_or_asked_for_twice(fast):
    case = logits_case((2, 3), reference=False)
    case["logits"][0, :, :5] = -torch.inf
    index = torch.tensor([[1, 9, 9, 30], [0, 1, 2, 3], [36, 36, 36, 36]]).expand(2, 3, 4)
    hold_logits("selective_log_softmax", plain_selected, case, index)


@pytest.mark.parametrize("tokens", [None, 4])
def test_rows_that_are_left_out_may_hold_nan(tokens, fast):
    case = logits_case(reference=False)
    row_mask = some_mask()
    case["logits"][~row_mask] = torch.nan
    index = case["tokens"] if tokens is None else case["tokens"][..., None].expand(-1, -1, tokens)
    row_mask = row_mask if tokens is None else row_mask[..., None].expand(-1, -1, tokens)
    found = logits_results(patch.selective_log_softmax, case["logits"], index, row_mask=row_mask)
    assert not any(x.isnan().any() for x in found.values())
    assert not found["d logits"][~some_mask()].any() and found["d logits"][some_mask()].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(), (5,), (3, 7)])
def test_entropy(shape, dtype, fast):
    case = logits_case(shape, dtype=dtype, reference=False)
    hold_logits("entropy_from_logits", plain_entropy, case)


@pytest.mark.parametrize("masked", [False, True])
def test_both_at_once(masked, fast):
    case = logits_case(reference=False)
    options = {"temperature": 0.8, "row_mask": some_mask().int() if masked else None}
    hold_logits("selective_log_softmax_and_entropy", plain_both, case, case["tokens"], **options)
    logits = case["logits"].requires_grad_()
    logprob, entropy = patch.selective_log_softmax_and_entropy(logits, case["tokens"], False, **options)
    assert logprob.requires_grad and not entropy.requires_grad


@pytest.mark.parametrize("name", ["selective_log_softmax", "selective_log_softmax_and_entropy"])
def test_a_temperature_of_zero_is_refused_as_by_trl(name):
    case = logits_case(reference=False)
    for function in (getattr(patch, name), ORIGINALS[name]):
        with pytest.raises(ValueError, match="temperature"):
            function(case["logits"], case["tokens"], temperature=0.0)
    with pytest.raises(ValueError, match="temperature"):
        patch.selective_log_softmax(case["logits"], case["tokens"][..., None], temperature=0.0)


MIB = 1 << 20


@pytest.mark.parametrize("outputs", [("log_probs", "entropy"), OUTPUTS], ids=["GRPO", "DPO"])
def test_the_loss_part_needs_less_memory_than_trl_s_own(outputs):
    """Beyond the inputs: 64 MiB of logits at a time, 6 of rows in the cache, the gradients, and their next terms."""
    case = linear_case((1024,), 32_768, 8, reference=None)
    peaks = []
    for apply in (patch.LinearLogprob.apply, ORIGINALS["_ChunkedLogProbFunction"].apply):
        leaves = [case[name].detach().requires_grad_() for name in ("hidden", "weight")]
        with Allocations() as seen:
            logprob, *_ = apply(*leaves, None, case["tokens"], 1.0, 32_768, None, 1.0, outputs)
            logprob.sum().backward()
        peaks.append(seen.peak)
    assert peaks[0] < 80 * MIB < 500 * MIB < peaks[1], [x / MIB for x in peaks]


@pytest.mark.parametrize("tokens", [None, 4], ids=["one", "K=4"])
def test_selected_log_probs_allocate_the_gradient_and_little_else(tokens):
    """One tensor of the logits' size and dtype, and no float32 tensor of a vocabulary a token."""
    case = logits_case((4, 128), 32_768, dtype=torch.bfloat16, reference=False)
    index = case["tokens"] if tokens is None else case["tokens"][..., None] // torch.arange(1, tokens + 1)
    logits, peaks = case["logits"], []
    for function in (patch.selective_log_softmax, ORIGINALS["selective_log_softmax"]):
        leaf = logits.detach().requires_grad_()
        with Allocations() as seen:
            function(leaf, index).sum().backward()
        peaks.append((seen.peak, seen.largest))
    assert peaks[0][1] == logits.nbytes and peaks[0][0] < logits.nbytes + 10 * MIB < peaks[1][0]
