"""TRL's distillation losses replaced by ours: the same numbers and training, better rounded, in less memory."""

import contextlib
import importlib

import pytest
import tiny
import torch
from cases import distillation_case, distillation_logits_case, hold, some_mask
from memory import Allocations

pytest.importorskip("trl", reason="TRL is not installed; it needs Python 3.11: pip install 'safe-kernels[test]'")

from trl.trainer import distillation_trainer, utils  # noqa: E402

from safe_kernels import distillation_loss, linear_distillation_loss  # noqa: E402
from safe_kernels.integrations import trl as patch  # noqa: E402
from safe_kernels.integrations import trl_distillation as ours  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:You are importing from .trl.experimental.")
NAMES = ["loss", "entropy", "tokens", "d hidden", "d weight", "d bias"]

ALL = {"student_logit_scale": 0.7, "teacher_logit_scale": 1.3, "temperature": 0.8}
ALL |= {"student_final_logit_softcapping": 5.0, "teacher_final_logit_softcapping": 3.0}
MIB = 1 << 20


@pytest.fixture
def fast(backend, kernels, monkeypatch):
    """Ours on each backend, in tiles so small that a test has many."""
    monkeypatch.setenv("SAFE_KERNELS_BACKEND", backend)
    return backend


STOCK = distillation_trainer._chunked_divergence_loss
TRAINERS = {"gkd": "GKDTrainer", "gold": "GOLDTrainer", "iw_opd": "IWOPDTrainer"}


def class_of(trainer):
    return getattr(importlib.import_module(f"trl.experimental.{trainer}.{trainer}_trainer"), TRAINERS[trainer])


def results(loss, case, mask, wrt=("hidden", "weight", "bias"), dtype=None, **options):
    """What `loss` returns for the arguments of `distillation_case`, and its gradients for a slope that is not 1."""
    case = {name: x.detach().clone().to(dtype or x.dtype) for name, x in case.items()}
    leaves = [case[name].requires_grad_() for name in wrt if name in case]
    heads = (case["hidden"], case["teacher_hidden"], case["weight"], case["teacher_weight"])
    biases = {f"{x}_lm_head_bias": case.get(y) for x, y in (("student", "bias"), ("teacher", "teacher_bias"))}
    found = loss(*heads, mask, **biases, **options)
    gradients = torch.autograd.grad(3 * found[0], leaves) if leaves else ()
    return dict(zip([*NAMES[:3], *(f"d {x}" for x in wrt if x in case)], (*found, *gradients), strict=True))


def exact_loss(hidden, teacher_hidden, weight, teacher_weight, mask, beta, num_items_in_batch=None, **options):
    """The formulas on whole logits, in the dtype that they have or float32."""
    named = {"temperature": options.get("temperature", 1.0), "divergence": "jsd", "beta": beta, "reduction": "sum"}
    for prefix, name in (("", "student"), ("teacher_", "teacher")):
        named |= {
            f"{prefix}bias": options.get(f"{name}_lm_head_bias"),
            f"{prefix}logit_scale": options.get(f"{name}_logit_scale", 1.0),
            f"{prefix}softcap": options.get(f"{name}_final_logit_softcapping"),
        }
    live, heads = mask != 0, (hidden, weight, teacher_hidden, teacher_weight)
    found = linear_distillation_loss(*heads, **named, mask=live, backend="reference")
    count = live.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return found.loss / count, found.entropy.sum(), live.sum()


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [{}, ALL | {"num_items_in_batch": torch.tensor(30.0)}], ids=["plain", "all"])
def test_the_loss_from_hidden_states(beta, dtype, settings, fast):
    """No further from float64 than TRL's own: a teacher of another width, with everything a head may have."""
    if fast == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter rounds to bfloat16 by truncation")
    case, mask, options = (
        distillation_case(dtype=dtype, bias=bool(settings)),
        some_mask().int(),
        {"beta": beta, **settings},
    )
    exact = results(exact_loss, case, mask, dtype=torch.float64, **options)
    stock = results(STOCK, case, mask, **options)
    found = results(ours.chunked_divergence_loss, case, mask, **options)
    for name, x in found.items():
        assert x.dtype == stock[name].dtype and x.shape == stock[name].shape, name
        if name == "tokens":
            assert x == stock[name] == mask.sum()
        else:
            count = mask.sum() if name == "entropy" else 1  # what is held is of the size of one token's
            hold(name, x / count, stock[name] / count, exact[name].double() / count, 37)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_autocast_rounds_the_operands_and_nothing_else(beta, fast):
    """Gradients of float32 weights are those of TRL: float32, never rounded."""
    if fast == "triton":
        pytest.skip("the interpreter rounds to bfloat16 by truncation")

    def under_autocast(loss):
        def call(*given, **named):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return loss(*given, **named)

        return call

    case, mask = distillation_case(bias=True), some_mask()
    rounded = {name: x if "bias" in name else x.bfloat16().float() for name, x in case.items()}
    exact = results(exact_loss, rounded, mask, dtype=torch.float64, beta=beta)
    stock = results(under_autocast(STOCK), case, mask, beta=beta)
    ordinary = results(exact_loss, rounded, mask, beta=beta)
    found = results(under_autocast(ours.chunked_divergence_loss), case, mask, beta=beta)
    for name in (x for x in NAMES if x != "tokens"):
        assert found[name].dtype == stock[name].dtype == torch.float32
        hold(name, found[name], ordinary[name], exact[name], 37)


@pytest.mark.parametrize("wrt", [["hidden"], ["weight"], ["hidden", "weight", "bias"]], ids=" ".join)
def test_a_frozen_part_gets_no_gradient_and_costs_none(wrt, fast, monkeypatch):
    asked, original = [], ours.loss_and_gradients
    monkeypatch.setattr(ours, "loss_and_gradients", lambda *a: asked.append(a[3]) or original(*a))
    case, mask = distillation_case(bias=True), some_mask()
    for name, x in results(ours.chunked_divergence_loss, case, mask, wrt, beta=0.5).items():
        torch.testing.assert_close(x, results(STOCK, case, mask, wrt, beta=0.5)[name])
    for x in case.values():
        x.requires_grad_()
    with torch.no_grad():
        loss, *_ = ours.chunked_divergence_loss(
            *(case[name] for name in ("hidden", "teacher_hidden", "weight", "teacher_weight")), mask, 0.5
        )
    assert not loss.requires_grad
    assert asked == [[name in wrt for name in ("hidden", "weight", "bias")], [False] * 3]


@pytest.mark.parametrize("items", [None, torch.tensor(8.0)])
def test_no_token_counts(items, fast):
    """As on a rank whose completions are all masked: a zero that reaches every parameter."""
    found = results(
        ours.chunked_divergence_loss,
        distillation_case(bias=True),
        torch.zeros(3, 7),
        beta=1.0,
        num_items_in_batch=items,
    )
    assert all(x.eq(0).all() for x in found.values())


def test_what_is_masked_may_hold_nan(fast):
    case, mask = distillation_case(bias=True), some_mask()
    clean = results(ours.chunked_divergence_loss, case, mask, beta=0.5)
    for name in ("hidden", "teacher_hidden"):
        case[name][~mask] = torch.nan
    for name, x in results(ours.chunked_divergence_loss, case, mask, beta=0.5).items():
        assert torch.equal(x, clean[name]), name


def test_weights_that_are_gone_are_gathered_for_the_forward(fast, monkeypatch):
    """As under ZeRO-3. The backward needs none: the forward has taken the gradient."""
    case, mask, entered = distillation_case(), some_mask(), []
    expected = results(STOCK, case, mask, beta=0.5)
    leaves = [case[name].requires_grad_() for name in ("hidden", "weight")]
    whole = {id(case[name]): case[name].detach().clone() for name in ("weight", "teacher_weight")}

    @contextlib.contextmanager
    def gathered(weight, bias):
        entered.append(weight)
        weight.data = whole[id(weight)]
        yield
        weight.data = whole[id(weight)].new_empty(0)

    heads = [case[name] for name in ("hidden", "teacher_hidden", "weight", "teacher_weight")]
    held = case["weight"].expand_as(case["weight"]).grad_fn.next_functions  # as DeepSpeed does, while it is whole
    monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", gathered)
    for weight in heads[2:]:
        weight.data = weight.data.new_empty(0)
    loss, *_ = ours.chunked_divergence_loss(*heads, mask, 0.5)
    for x, name in zip(torch.autograd.grad(3 * loss, leaves), ("d hidden", "d weight"), strict=True):
        torch.testing.assert_close(x, expected[name])
    assert held and [x is y for x, y in zip(entered, heads[2:], strict=True)] == [True, True]
    with pytest.raises(ValueError, match="weight is empty"):
        monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", lambda *_: contextlib.nullcontext())
        ours.chunked_divergence_loss(*heads, mask, 0.5)


def test_other_vocabularies_second_derivatives_and_the_reference_are_refused(monkeypatch):
    case = distillation_case()
    heads = [case[name] for name in ("hidden", "teacher_hidden", "weight", "teacher_weight")]
    with pytest.raises(ValueError, match="a vocabulary of 36 and weight one of 37"):
        ours.chunked_divergence_loss(*heads[:3], heads[3][1:], some_mask(), 0.5)
    loss, *_ = ours.chunked_divergence_loss(heads[0].requires_grad_(), *heads[1:], some_mask(), 0.5)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(loss, heads[0], create_graph=True)
    monkeypatch.setenv("SAFE_KERNELS_BACKEND", "reference")
    with pytest.raises(ValueError, match="inside TRL it must be 'torch' or 'triton'"):
        ours.chunked_divergence_loss(*heads, some_mask(), 0.5)


def test_the_signature_before_1_15():
    """With the size of a chunk as the seventh argument."""

    def older(a, b, c, d, mask, beta, chunk_size, num_items_in_batch=None, temperature=1.0):
        raise AssertionError

    case, mask = distillation_case(), some_mask()
    heads = [case[name] for name in ("hidden", "teacher_hidden", "weight", "teacher_weight")]
    found = ours._from_hidden_states(older)(*heads, mask, 0.3, 256, num_items_in_batch=8, temperature=0.7)
    torch.testing.assert_close(found, STOCK(*heads, mask, 0.3, num_items_in_batch=8, temperature=0.7))


def from_logits(loss, case, wrt=("logits",), dtype=None, **options):
    case = {name: x.detach().clone().to(dtype or x.dtype) for name, x in case.items()}
    leaves = [case[name].requires_grad_() for name in wrt]
    found = loss(case["logits"], case["teacher_logits"], **options)
    gradients = torch.autograd.grad((3 * found).sum(), leaves)
    return {"loss": found.detach(), **{f"d {name}": x for name, x in zip(wrt, gradients, strict=True)}}


REDUCTIONS = [
    {},
    {"labels": None},
    {"reduction": "sum"},
    {"labels": None, "reduction": "sum", "temperature": 0.6},
    {"num_items_in_batch": torch.tensor(31), "temperature": 1.7},
    {"num_items_in_batch": 31, "labels": None},
]


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("beta", [0, 0.3, 1.0])
@pytest.mark.parametrize("options", REDUCTIONS)
def test_the_loss_from_logits(trainer, beta, options, fast, monkeypatch):
    stock, case = class_of(trainer).generalized_jsd_loss, distillation_logits_case()
    labels = torch.where(some_mask(), 1, -100)
    options = {"labels": labels, "beta": beta, **options}
    calls = []
    monkeypatch.setattr(ours, "distillation_loss", lambda *a, **k: calls.append(k) or distillation_loss(*a, **k))
    expected, exact = (from_logits(stock, case, dtype=dtype, **options) for dtype in (None, torch.float64))
    for name, x in from_logits(ours._from_logits(stock), case, **options).items():
        assert x.shape == expected[name].shape and x.dtype == torch.float32
        count = 21 if name == "loss" and options.get("reduction") == "sum" else 1  # held is the mean of the tokens
        hold(name, x / count, expected[name] / count, exact[name] / count, 37)
    assert [call["backend"] for call in calls] == [fast]


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits(beta, dtype, fast):
    """Computed in float32, where TRL's own is in the dtype of the logits; their gradient has their dtype."""
    if fast == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter rounds to bfloat16 by truncation")
    stock, case = class_of("gkd").generalized_jsd_loss, distillation_logits_case(dtype=dtype)
    options = {"labels": torch.where(some_mask(), 1, -100), "beta": beta, "temperature": 1.3}
    expected, exact = (from_logits(stock, case, dtype=x, **options) for x in (None, torch.float64))
    found = from_logits(ours._from_logits(stock), case, **options)
    assert found["loss"].dtype == torch.float32 and found["d logits"].dtype == dtype
    for name, x in found.items():
        hold(name, x, expected[name], exact[name], 37)
        error, other = ((y[name].double() - exact[name]).abs().max() for y in (found, expected))
        assert error <= other, name


@pytest.mark.parametrize(
    "trainer, options, wrt",
    [
        ("gkd", {"reduction": "none"}, ["logits"]),
        ("gkd", {"reduction": "mean"}, ["logits"]),
        ("gkd", {}, ["logits", "teacher_logits"]),
        ("gold", {"logits_are_probs": True}, ["logits"]),
        ("iw_opd", {"top_k": 3}, ["logits"]),
    ],
)
def test_what_stays_trl_s_own(trainer, options, wrt, monkeypatch):
    monkeypatch.setattr(ours, "distillation_loss", None)
    case = distillation_logits_case()
    if options.get("logits_are_probs"):
        case = {name: x.softmax(-1) for name, x in case.items()}
    stock = class_of(trainer).generalized_jsd_loss
    expected, found = (from_logits(loss, case, wrt, **options) for loss in (stock, ours._from_logits(stock)))
    assert all(torch.equal(x, expected[name]) for name, x in found.items())


def test_what_is_replaced_and_how_it_comes_back():
    before = {name: class_of(name).generalized_jsd_loss for name in TRAINERS}
    module = "trl.trainer.distillation_trainer"
    for kl in (None, "exact"):
        with patch.apply(kl) as active:
            assert active.replaced[-4] == f"{module}._chunked_divergence_loss"
            assert [x.rpartition(".")[0].rpartition(".")[2] for x in active.replaced[-3:]] == [*TRAINERS.values()]
            assert distillation_trainer._chunked_divergence_loss is ours.chunked_divergence_loss
            assert all(class_of(name).generalized_jsd_loss is not loss for name, loss in before.items())
        assert distillation_trainer._chunked_divergence_loss is STOCK
        assert {name: class_of(name).generalized_jsd_loss for name in TRAINERS} == before


def test_trl_s_function_of_hidden_states_needs_more_memory():
    """Beyond the inputs: ours two chunks of 64 MiB of logits, the gradients, and their next terms."""
    case, mask, peaks = distillation_case((1024,), 32_768, 8), torch.ones(1024), []
    heads = [case[name].requires_grad_() for name in ("hidden", "teacher_hidden", "weight", "teacher_weight")]
    for loss in (ours.chunked_divergence_loss, STOCK):
        with Allocations() as seen:
            torch.autograd.grad(loss(*heads, mask, 0.5)[0], [heads[0], heads[2]])
        peaks.append(seen.peak)
    assert peaks[0] < 160 * MIB < 700 * MIB < peaks[1], [x / MIB for x in peaks]


def test_trl_s_function_of_logits_needs_more_memory():
    """Ours allocates the gradient and little else."""
    case, peaks, stock = distillation_logits_case((4, 64), 32_768), [], class_of("gkd").generalized_jsd_loss
    logits, teacher, size = case["logits"].requires_grad_(), case["teacher_logits"], case["logits"].nbytes
    for loss in (ours._from_logits(stock), stock):
        with Allocations() as seen:
            torch.autograd.grad(loss(logits, teacher, torch.ones(4, 64)), logits)
        peaks.append(seen.peak)
    assert peaks[0] < 1.5 * size < 8 * size < peaks[1], [x / size for x in peaks]


def trained(kind, output_dir, **options):
    """What the trainer logged in each step, and the weights it ended with."""
    from datasets import Dataset

    trl = importlib.import_module("trl" if kind == "Distillation" else "trl.experimental.gkd")
    settings = getattr(trl, f"{kind}Config")(
        output_dir=str(output_dir),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        gradient_checkpointing=False,
        use_cpu=True,
        seed=1,
        max_steps=2,
        learning_rate=1e-3,
        **options,
    )
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    rows = tiny.PROMPTS if kind == "Distillation" else [conversation(row["prompt"]) for row in 2 * tiny.PROMPTS]
    trainer = getattr(trl, f"{kind}Trainer")(
        model=tiny.model(),
        teacher_model=tiny.model(seed=1, hidden_size=48, num_attention_heads=4),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer.state.log_history[:-1], trainer.model.state_dict()


def conversation(prompt):
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": "is good and happy"}]}


CASES = {
    "Distillation": {"max_completion_length": 6, "bf16": False},
    "Distillation, JSD, tempered": {"max_completion_length": 6, "bf16": False, "beta": 0.4, "temperature": 0.8},
    "Distillation, autocast": {"max_completion_length": 6, "bf16": True, "beta": 0.0},
    "GKD": {"max_new_tokens": 6, "bf16": False, "lmbda": 0.5, "max_length": 32},
}


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_a_trainer_trains_as_before(name, tmp_path, monkeypatch):
    """Losses, gradient norms, entropies and every other number that it logs."""
    kind, calls = name.partition(",")[0], []
    inner = "loss_and_gradients" if kind == "Distillation" else "distillation_loss"
    original = getattr(ours, inner)
    monkeypatch.setattr(ours, inner, lambda *a, **k: calls.append(a) or original(*a, **k))
    expected, weights = trained(kind, tmp_path, **CASES[name])
    assert not calls
    with patch.apply():
        actual, actual_weights = trained(kind, tmp_path, **CASES[name])
    assert len(calls) == 4 and len(expected) == 2
    tolerance = {"rel": 1e-2, "abs": 1e-3} if "autocast" in name else {"rel": 1e-4, "abs": 1e-5}
    for step, wanted in zip(actual, expected, strict=True):
        numbers = [key for key in wanted if "time" not in key and "runtime" not in key]
        assert {"loss", "grad_norm"} <= set(numbers) and step.keys() == wanted.keys() and wanted["loss"] > 0.1
        for key in numbers:
            assert step[key] == pytest.approx(wanted[key], **tolerance), key
    for key, x in weights.items():
        torch.testing.assert_close(actual_weights[key], x, rtol=1e-3, atol=2e-3 if "autocast" in name else 1e-4)
