"""A vocabulary whose parts lie on several ranks has the statistics, and the gradients, of the whole."""

import datetime
import functools
import math
import traceback
from unittest import mock

import conftest
import numpy as np
import processes
import pytest
import torch
from cases import (
    evaluate,
    hold,
    hold_to_registration,
    linear_case,
    logits_case,
    policy_case,
    some_mask,
    temperatures,
    values_case,
)
from hypothesis import given
from hypothesis import strategies as st
from memory import Allocations
from torch import distributed
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from bench.measurement.interpreter import patch_language_once_a_launch
from safe_kernels import (
    checks,
    dispatch,
    inputs,
    linear_policy_loss,
    linear_safe_terms,
    linear_token_stats,
    logits,
    safe_terms,
    token_stats,
    vocab_parallel,
)

BACKENDS = ["reference", *conftest.BACKENDS]
VOCABULARY = 37
WIDTHS = {2: (14, 23), 4: (9, 1, 20, 7)}  # of the ranks' parts
AXES = {"logits": -1, "ref_logits": -1, "weight": 0, "bias": 0, "ref_weight": 0, "ref_bias": 0}
SAFE = {"kl_threshold": 0.1, "alpha": 0.3, **values_case()}
LOSS = {"entropy_coef": 0.1, "kl_coef": 0.3, "kl_penalty_coef": 0.5, "kl_threshold": 0.2, "ref_kl_coef": 0.4}
HEAD = {"softcap": 5.0, "logit_scale": 0.5, "bias": True}


def in_place(logits, **case):
    return token_stats(logits * 1, **case, inplace_backward=True)


CASES = {
    "logits": (token_stats, logits_case, {}),
    "logits, no reference": (token_stats, logits_case, {"reference": False, "temperature": 0.7}),
    "logits, all": (
        token_stats,
        logits_case,
        {"temperature": temperatures(), "mask": some_mask(), "with_ref_kl": True},
    ),
    "logits, bf16": (token_stats, logits_case, {"dtype": torch.bfloat16}),
    "logits, in place": (in_place, logits_case, {"mask": some_mask()}),
    "logits, terms": (safe_terms, logits_case, {**SAFE, "mask": some_mask()}),
    "hidden": (linear_token_stats, linear_case, {"bias": True}),
    "hidden, no reference": (linear_token_stats, linear_case, {"reference": None, "temperature": 1.3, **HEAD}),
    "hidden, own head": (
        linear_token_stats,
        linear_case,
        {"reference": "own", "mask": some_mask(), "with_ref_kl": True, **HEAD},
    ),
    "hidden, bf16": (linear_token_stats, linear_case, {"dtype": torch.bfloat16, "temperature": temperatures()}),
    "hidden, fp16": (linear_token_stats, linear_case, {"dtype": torch.float16, "mask": some_mask()}),
    "hidden, terms": (linear_safe_terms, linear_case, SAFE),
    "loss": (linear_policy_loss, policy_case, {}),
    "loss, all": (linear_policy_loss, policy_case, {**LOSS, **HEAD, "mask": some_mask(), "temperature": 0.8}),
    "loss, no reference": (linear_policy_loss, policy_case, {"reference": None, "entropy_coef": 0.1}),
}
ON_FOUR = ["logits, all", "hidden", "hidden, own head", "loss, all"]


def of(name):
    """(op, case, which arguments get a gradient)."""
    op, make, options = CASES[name]
    case = make(**options)
    return op, case, [x for x in ("logits", "hidden", "weight", "bias", "v1", "v2") if x in case]


def edges():
    """Logits of five tokens, of which row 1, or those said, differ from the others. Parts end at 9, 10, 14 and 30."""
    inf, nan, everywhere, first, one = math.inf, math.nan, slice(None), slice(0, 9), slice(9, 10)
    places = {
        "a part without a live column": [
            ("logits", slice(None), first, -inf),
            ("ref_logits", slice(None), first, -inf),
        ],
        "a part without a live column in one row": [("logits", 1, one, -inf), ("ref_logits", 1, one, -inf)],
        "the policy is nowhere in a part": [("logits", 1, slice(10, 30), -inf)],
        "the reference is nowhere in a part": [("ref_logits", 1, one, -inf)],
        "one logit of the reference": [("ref_logits", 1, 35, -inf)],
        "one logit of the policy": [("logits", 1, 35, -inf)],
        "nothing of the policy": [("logits", 1, everywhere, -inf)],
        "nothing of the reference": [("ref_logits", 1, everywhere, -inf)],
        "NaN in the policy": [("logits", 1, 3, nan)],
        "NaN in the reference": [("ref_logits", 1, 30, nan)],
        "NaN among nothing": [("logits", 1, slice(10, 37), -inf), ("logits", 1, 12, nan)],
        "a large offset": [("logits", everywhere, everywhere, 1e4), ("ref_logits", everywhere, everywhere, -5e3)],
        "a part far below": [("logits", 1, first, -200.0)],
        "a part far below, and the reference nowhere": [("logits", 1, first, -300.0), ("ref_logits", 1, first, -inf)],
        "the reference far below, and the policy nowhere": [
            ("logits", 1, first, -inf),
            ("ref_logits", 1, first, -300.0),
        ],
        "the reference far below, and one of the policy": [("logits", 1, 3, -inf), ("ref_logits", 1, first, -300.0)],
        "a part far below, and one of the reference": [("logits", 1, first, -300.0), ("ref_logits", 1, 3, -inf)],
    }
    found = {}
    for edge, changes in places.items():
        case = logits_case((5,), with_ref_kl=True)
        case["tokens"] = torch.tensor([0, 9, 20, 36, 12])
        for name, rows, columns, value in changes:
            case[name][rows, columns] += value
        found[edge] = case
    for index in (-100, -1, VOCABULARY, 2**40, -(2**62)):
        found[f"id {index}"] = logits_case((5,))
        found[f"id {index}"]["tokens"][1] = index
    found["masked NaN"] = logits_case((5,), mask=torch.arange(5) != 1, temperature=torch.ones(5))
    for name in ("logits", "ref_logits"):
        found["masked NaN"][name][1, 30] = math.nan
    found["masked NaN"]["temperature"][1] = math.nan
    found["int32 ids"] = logits_case((5,))
    found["int32 ids"]["tokens"] = found["int32 ids"]["tokens"].int()
    found["no tokens"] = logits_case((0,))
    found["all masked"] = logits_case((5,), mask=torch.zeros(5, dtype=torch.bool))
    return found


def part_of(case, rank, widths):
    start = sum(widths[:rank])
    own = slice(start, start + widths[rank])
    parts = {name: case[name][..., own] if axis else case[name][own] for name, axis in AXES.items() if name in case}
    return {**case, **parts}


def shared(case, group, widths):
    return part_of(case, group.rank(), widths) | {"process_group": group}


def only_what_is_needed_is_exchanged(group, widths):
    """Numbers of a token, never a column; the hidden gradient once, and only if someone wants it."""
    tokens, width, ranks = 6, 16, group.size()
    part = shared(linear_case((tokens,), bias=True), group, widths)
    for wrt, asked in (([], False), ([], True)):
        with pytest.MonkeyPatch.context() as patch:
            seen = []
            patch.setattr(distributed, "all_gather", functools.partial(seen_exchange, seen, "", distributed.all_gather))
            evaluate(linear_token_stats, part | {"with_ref_kl": asked}, "torch", wrt)
        assert seen == [("", 1), ("", (9 if asked else 8) * tokens)]
    for wrt, backwards in (
        ([], []),
        (["weight", "bias"], []),
        (["hidden"], [("all_to_all_single", tokens * width), ("all_gather", tokens * width // ranks)]),
    ):
        for backend in conftest.BACKENDS:
            with pytest.MonkeyPatch.context() as patch:
                seen = []
                for name in ("all_gather", "all_to_all_single"):
                    spy = functools.partial(seen_exchange, seen, name, getattr(distributed, name))
                    patch.setattr(distributed, name, spy)
                evaluate(linear_token_stats, part, backend, wrt)
            assert seen == [("all_gather", 1), ("all_gather", 8 * tokens), *backwards]


def seen_exchange(seen, name, exchange, received, sent, **options):
    seen.append((name, sent.numel()))
    return exchange(received, sent, **options)


def nothing_asks_the_device(group, widths):
    for op, case in ((linear_token_stats, linear_case(bias=True)), (linear_policy_loss, policy_case(**LOSS))):
        part = shared(case, group, widths)
        with mock.patch("safe_kernels.torch_backend.rows.is_on_host", lambda _: False), Allocations() as seen:
            evaluate(op, part, "torch", ["hidden", "weight"])
        assert not seen.operators & {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}


def a_row_does_not_depend_on_the_batch(group, widths):
    """Bitwise, in the results and the hidden gradient, for which the rows of a batch are shared out."""
    part = shared(linear_case((9,), batch_invariant=True, temperature=0.9, with_ref_kl=True), group, widths)
    for backend in conftest.BACKENDS:
        found = []
        for rows in (slice(0, 9), slice(0, 1), slice(3, 4), slice(2, 7)):
            some = {name: part[name][rows].clone() for name in ("hidden", "tokens", "ref_hidden")}
            stats = linear_token_stats(**part | some | {"hidden": some["hidden"].requires_grad_()}, backend=backend)
            gradient = torch.autograd.grad(
                (stats.logprob + stats.entropy + stats.kl + stats.ref_kl).sum(), some["hidden"]
            )
            found.append((rows, [*stats, *gradient]))
        (_, together), *others = found
        for rows, results in others:
            assert all(torch.equal(x, whole[rows]) for x, whole in zip(results, together, strict=True)), (backend, rows)


def a_loss_has_the_bits_of_the_scoring(group, widths):
    """With and without a gradient: a ratio of exactly 1; and only the loss carries a gradient."""
    for backend in conftest.BACKENDS:
        part = shared(linear_case(mask=some_mask(), temperature=0.7), group, widths)
        scored = linear_token_stats(**part, with_ref_kl=True, backend=backend)
        part |= {"old_logprob": scored.logprob, "advantage": torch.ones(3, 7), "entropy_coef": 0.1, "ref_kl_coef": 0.1}
        part["hidden"].requires_grad_()
        found = linear_policy_loss(**part, backend=backend)
        with torch.no_grad():
            without = linear_policy_loss(**part, backend=backend)
        for result in (found, without):
            for name in scored._fields:
                assert torch.equal(getattr(result, name), getattr(scored, name)), (backend, name)
            assert result.clip_fraction == 0
        assert torch.equal(found.loss, without.loss) and not without.loss.requires_grad
        assert found.loss.requires_grad and not any(x.requires_grad for x in found[1:])


def two_runs_have_the_same_bits(group, widths):
    for backend in conftest.BACKENDS:
        part = shared(linear_case(), group, widths)
        runs = [evaluate(linear_token_stats, part, backend, ["hidden", "weight"]) for _ in range(2)]
        assert all(torch.equal(x, runs[1][name]) for name, x in runs[0].items())


def the_gradient_is_written_over_the_logits(group, widths):
    part = shared(logits_case(), group, widths)
    for backend in conftest.BACKENDS:
        leaf, found = part["logits"].clone().requires_grad_(), []
        logits = leaf * 1
        logits.register_hook(found.append)
        stats = token_stats(**part | {"logits": logits}, inplace_backward=True, backend=backend)
        stats.kl.sum().backward(retain_graph=True)
        assert found[0].data_ptr() == logits.data_ptr() and torch.equal(logits, leaf.grad)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            stats.kl.sum().backward()


def a_dtensor_is_its_part(group, widths):
    """Of the head and of logits; gradients come back as DTensors."""
    mesh = init_device_mesh("cpu", (group.size(),))
    case = linear_case(reference="own", bias=True)
    tensors = {name: distribute_tensor(case[name], mesh, [Shard(0)]) for name in AXES if name in case}
    whole = evaluate(linear_token_stats, case, "torch", ["hidden", "weight", "bias"])
    for name, x in evaluate(linear_token_stats, case | tensors | {"process_group": group}, "torch",
                            ["hidden", "weight", "bias"]).items():  # fmt: skip
        if name in ("d weight", "d bias"):
            assert isinstance(x, DTensor) and x.placements == (Shard(0),)
            x = x.full_tensor()
        torch.testing.assert_close(x, whole[name])

    case = logits_case()
    tensors = {name: distribute_tensor(case[name], mesh, [Shard(2)]) for name in ("logits", "ref_logits")}
    found = evaluate(token_stats, case | tensors | {"process_group": group}, "torch", ["logits"])
    whole = evaluate(token_stats, case, "torch", ["logits"])
    torch.testing.assert_close(found["kl"], whole["kl"])
    torch.testing.assert_close(found["d logits"].full_tensor(), whole["d logits"])


def another_dtensor_is_refused(group, widths):
    mesh, case = init_device_mesh("cpu", (group.size(),)), linear_case()
    alone, *_ = [own for own in (distributed.new_group([rank]) for rank in range(group.size())) if own != -100]
    for tensor, placement, process_group, message in (
        (case["weight"], Replicate(), group, r"placements \(Replicate\(\),\).*Shard\(0\)"),
        (case["weight"], Shard(1), group, r"must have Shard\(0\) on the group's ranks"),
        (case["weight"], Shard(0), alone, r"on the ranks \[0, 1\].*in their order: \[.\]"),
        (case["weight"], Shard(0), None, "weight is a DTensor.*give their process_group"),
        (torch.ones(1, 16), Shard(0), group, "leaves none of axis 0 to the last"),
    ):
        weight = distribute_tensor(tensor, mesh, [placement])
        with pytest.raises(ValueError, match=message):
            linear_token_stats(**case | {"weight": weight, "process_group": process_group})
    for name in ("hidden", "tokens"):
        whole = distribute_tensor(case[name], mesh, [Replicate()])
        with pytest.raises(TypeError, match=f"{name} is a DTensor; it must be a tensor that this rank holds"):
            linear_token_stats(**case | {name: whole})
    logits = {"logits": distribute_tensor(torch.ones(3, 7, 37), mesh, [Shard(2)])}
    with pytest.raises(ValueError, match="logits is a DTensor.*give their process_group"):
        token_stats(**logits_case(reference=False) | logits)


def a_group_without_this_rank_is_refused(group, widths):
    other = distributed.new_group([0])
    if group.rank() > 0:
        with pytest.raises(TypeError, match="process_group is int; it must be a torch.distributed.ProcessGroup"):
            token_stats(**logits_case(), process_group=other)


def ranks_that_disagree_are_told(group, widths):
    rank = group.rank()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFE_KERNELS_DEBUG", "1")
        part = shared(linear_case(), group, widths)
        linear_token_stats(**part)  # ids of another rank are no mistake
        with pytest.raises(ValueError, match=r"the number of tokens is \[21, 28\] on the ranks"):
            linear_token_stats(**part_of(linear_case((3 + rank, 7)), rank, widths), process_group=group)
        with pytest.raises(ValueError, match=r"the width of hidden is \[16, 17\] on the ranks"):
            linear_token_stats(**part_of(linear_case(width=16 + rank), rank, widths), process_group=group)
        with pytest.raises(ValueError, match="tokens differs between the ranks"):
            linear_token_stats(**part | {"tokens": part["tokens"] + rank})
        with pytest.raises(ValueError, match="mask differs between the ranks"):
            linear_token_stats(**part | {"mask": part["tokens"] != rank})
        with pytest.raises(ValueError, match=r"tokens has the id 37; it must be in \[0, 37\)"):
            token_stats(**shared(logits_case(), group, widths) | {"tokens": torch.full((3, 7), 37)})
        part = shared(logits_case(), group, widths)
        part["logits"] = part["logits"].detach().masked_fill(torch.tensor(rank == 0), math.nan)
        with pytest.raises(ValueError, match="logits has NaN"):  # on every rank, though one has it
            token_stats(**part)


def activation_checkpointing(group, widths):
    for backend in BACKENDS:
        part = shared(linear_case(), group, widths)
        hidden = part.pop("hidden").requires_grad_()

        def loss(hidden, backend=backend, part=part):
            stats = linear_token_stats(hidden, **part, backend=backend)
            return stats.logprob.sum() + stats.kl.sum()

        plain = torch.autograd.grad(loss(hidden), hidden)[0]
        again = torch.utils.checkpoint.checkpoint(loss, hidden, use_reentrant=False)
        assert torch.equal(torch.autograd.grad(again, hidden)[0], plain)


def one_compiled_graph(group, widths):
    part = shared(linear_case(mask=some_mask()), group, widths)
    hidden = part.pop("hidden").requires_grad_()

    def loss(hidden):
        stats = linear_token_stats(hidden, **part, backend="torch")
        return (stats.logprob * stats.kl).sum()

    found = [torch.autograd.grad(run(hidden), hidden)[0]
             for run in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True))]  # fmt: skip
    assert torch.equal(*found)


BEHAVIOURS = {
    behaviour.__name__: behaviour
    for behaviour in (
        only_what_is_needed_is_exchanged,
        nothing_asks_the_device,
        a_row_does_not_depend_on_the_batch,
        a_loss_has_the_bits_of_the_scoring,
        two_runs_have_the_same_bits,
        the_gradient_is_written_over_the_logits,
        a_dtensor_is_its_part,
        another_dtensor_is_refused,
        a_group_without_this_rank_is_refused,
        ranks_that_disagree_are_told,
        activation_checkpointing,
        one_compiled_graph,
    )
}
ALSO_ON_FOUR = ["a_row_does_not_depend_on_the_batch", "a_dtensor_is_its_part"]


def results_of_a_rank(names, behaviours):
    """In a process of a group: of every case and edge on every backend; and what went wrong in the behaviours."""
    patch = pytest.MonkeyPatch()
    patch_language_once_a_launch()
    conftest.make_small(patch)
    distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=180))
    group, widths, found = distributed.group.WORLD, WIDTHS[distributed.get_world_size()], {}
    tasks = {name: of(name) for name in names}
    tasks |= {edge: (token_stats, case, ["logits"]) for edge, case in edges().items()}
    for backend in BACKENDS:
        for name, (op, case, wrt) in tasks.items():
            found[backend, name] = arrays(evaluate(op, shared(case, group, widths), backend, wrt))
    errors = {name: error_of(behaviour, group, widths) for name, behaviour in behaviours.items()}
    distributed.barrier()  # nobody leaves while another still listens
    return found, errors


def error_of(behaviour, group, widths):
    try:
        behaviour(group, widths)
    except Exception:
        return traceback.format_exc()
    return ""


def arrays(results):
    """What a pipe can take, without bfloat16."""
    return {name: (x.float() if x.dtype == torch.bfloat16 else x).numpy() for name, x in results.items()}


def outcomes(function, size, *arguments):
    found = processes.run(function, size, *arguments, seconds=400)
    assert not any(outcome.error for outcome in found), "\n".join(outcome.error for outcome in found)
    return [outcome.result for outcome in found]


@pytest.fixture(scope="module")
def on_two():
    return outcomes(results_of_a_rank, 2, list(CASES), BEHAVIOURS)


@pytest.fixture(scope="module")
def on_four():
    return outcomes(results_of_a_rank, 4, ON_FOUR, {name: BEHAVIOURS[name] for name in ALSO_ON_FOUR})


@pytest.fixture(params=[2, 4])
def ranks(request):
    return request.getfixturevalue("on_two" if request.param == 2 else "on_four")


def joined(ranks, key):
    """Results of the whole: those of the parts side by side, the others from any rank, as all have the same bits."""
    found = {}
    for name in ranks[0][0][key]:
        parts = [torch.from_numpy(results[key][name]) for results, _ in ranks]
        axis = AXES.get(name.removeprefix("d ")) if name.startswith("d ") else None
        if axis is None:
            assert all(np.array_equal(x, parts[0], equal_nan=True) for x in parts), f"{name} differs between the ranks"
        found[name] = parts[0] if axis is None else torch.cat(parts, axis)
    return found


@functools.cache
def expected(name):
    op, case, wrt = of(name)
    return evaluate(op, case, "reference", wrt, torch.float64), evaluate(op, case, "reference", wrt)


def holds(ranks, name, backend):
    exact, plain = expected(name)
    found = joined(ranks, (backend, name))
    assert found.keys() == exact.keys()
    for field, x in found.items():
        assert x.shape == exact[field].shape, field
        hold(field, x.to(plain[field].dtype), plain[field], exact[field], VOCABULARY)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_ranks_hold_to_the_whole(on_two, name, backend):
    holds(on_two, name, backend)


@pytest.mark.parametrize("name", ON_FOUR)
@pytest.mark.parametrize("backend", BACKENDS)
def test_four_ranks_hold_to_the_whole(on_four, name, backend):
    holds(on_four, name, backend)


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_on_two_ranks(on_two, name):
    assert not any(errors[name] for _, errors in on_two), "\n".join(errors[name] for _, errors in on_two)


@pytest.mark.parametrize("name", ALSO_ON_FOUR)
def test_on_four_ranks(on_four, name):
    assert not any(errors[name] for _, errors in on_four), "\n".join(errors[name] for _, errors in on_four)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("edge", edges())
@pytest.mark.parametrize("backend", BACKENDS)
def test_edges_are_those_of_the_whole(ranks, edge, backend):
    """Which numbers are not finite, too; of plain PyTorch's gradients of infinite numbers, only that they are not."""
    whole = evaluate(token_stats, edges()[edge], backend, ["logits"])
    for name, x in joined(ranks, (backend, edge)).items():
        torch.testing.assert_close(x, whole[name], equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def alone(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", ["logits, all", "logits, terms", "hidden, own head", "loss, all"])
def test_a_group_of_one_has_the_bits_of_none(alone, any_backend, name):
    op, case, wrt = of(name)
    plain = evaluate(op, case, any_backend, wrt)
    for field, x in evaluate(op, case | {"process_group": alone}, any_backend, wrt).items():
        assert torch.equal(x, plain[field]), field


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by PyTorch's own forward mode
@pytest.mark.parametrize("argument", ["logits", "v1"])
def test_the_reference_has_every_derivative_in_a_group_of_one(alone, argument):
    _, case, _ = of("logits, terms")

    def function(x):
        found = safe_terms(**case | {argument: x}, process_group=alone, backend="reference")
        return (found.kl_penalty + found.value).square().sum()

    x = case[argument].clone()
    direction = torch.linspace(-1, 1, x.numel()).view(x.shape)
    gradient = torch.func.grad(function)(x)
    torch.testing.assert_close(torch.func.jvp(function, (x,), (direction,))[1], (gradient * direction).sum())
    torch.testing.assert_close(gradient, torch.autograd.grad(function(x.requires_grad_()), x)[0])


def test_a_dtensor_on_one_rank_is_whole(alone):
    case = linear_case(reference=None)
    weight = distribute_tensor(case["weight"], init_device_mesh("cpu", (1,)), [Shard(0)])
    stats = linear_token_stats(**case | {"weight": weight}, process_group=alone)
    assert torch.equal(stats.logprob, linear_token_stats(**case).logprob)


@pytest.mark.parametrize("op, make", [(token_stats, logits_case), (linear_token_stats, linear_case)])
@pytest.mark.parametrize("group", ["tp", -100, 2])
def test_what_is_no_group_is_refused(any_backend, op, make, group):
    message = f"process_group is {type(group).__name__}; it must be a torch.distributed.ProcessGroup"
    with pytest.raises(TypeError, match=message):
        op(**make(), process_group=group, backend=any_backend)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", ["logits, terms", "hidden, own head", "loss, all"])
def test_ops_hold_to_what_they_register(alone, name, monkeypatch, ops_seen):
    """In a group of one, which only the public functions leave out."""
    monkeypatch.setattr(checks, "local_parts", lambda group, axis=0, **tensors: [*tensors.values(), group])
    op, case, wrt = of(name)
    evaluate(op, case | {"process_group": alone}, "torch", wrt)
    assert torch.ops.safe_kernels.vocabulary_bounds.default in [registered for registered, _ in ops_seen]
    for registered, arguments in list(ops_seen):
        hold_to_registration(registered, arguments)


@st.composite
def splits(draw):
    """Logits of some tokens, here and there -inf or NaN, and the widths of the parts."""
    widths, seed = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4)), draw(st.integers(0, 2**31))
    case = logits_case((9,), sum(widths), with_ref_kl=True, seed=seed, scale=draw(st.sampled_from([0.1, 5.0, 50.0])))
    case["temperature"] = draw(st.sampled_from([0.3, 1.0, 2.5]))
    noise = torch.Generator().manual_seed(seed)
    for name in ("logits", "ref_logits"):
        case[name][torch.rand(case[name].shape, generator=noise) < draw(st.sampled_from([0.0, 0.5, 0.9]))] = -math.inf
        case[name][torch.rand(case[name].shape, generator=noise) < draw(st.sampled_from([0.0, 0.02]))] = math.nan
    return case, widths


@pytest.mark.usefixtures("all_rows_in_one_program")
@pytest.mark.parametrize("backend", conftest.BACKENDS)
@given(split=splits())
def test_any_split_is_the_whole(backend, split):
    """The merge, and the gradients of the parts from what it gives: without processes."""
    case, widths = split
    module = dispatch.backend_of(backend)
    whole = evaluate(token_stats, case, backend, ["logits"])
    bounds = torch.tensor([0, *np.cumsum(widths).tolist()])
    parts = []
    for rank, first in enumerate(bounds.tolist()[:-1]):
        part = part_of(case, rank, widths)
        ids, temperature = part["tokens"] - first, part["temperature"]
        parts.append(logits.flat_inputs(part["logits"], ids, part["ref_logits"], temperature, None, with_ref_kl=True))
    local = torch.stack([module.logits_statistics(part) for part in parts])
    holders = (case["tokens"] >= bounds[:-1, None]) & (case["tokens"] < bounds[1:, None])
    merged = vocab_parallel.merged(local, holders, case["temperature"])
    names = ("logprob", "entropy", "ref_logprob", "kl", "ref_kl")
    found = dict(zip(names, merged[[0, 1, 4, 5, 8]], strict=True))

    draw = torch.Generator().manual_seed(99)
    upstream = {name: torch.randn(9, generator=draw) for name in names}
    gradients = [torch.empty_like(part.logits) for part in parts]
    for part, gradient in zip(parts, gradients, strict=True):
        grads = inputs.StatsGrad(*(upstream[name] for name in inputs.StatsGrad._fields))
        module.logits_gradient(part, merged, grads, gradient)
    found["d logits"] = torch.cat(gradients, -1)

    size = max(1.0, *(case[x].nan_to_num(0, neginf=0).abs().max().item() for x in ("logits", "ref_logits")))
    for name, x in found.items():
        allowed = 64 * torch.finfo(torch.float32).eps * size / min(1.0, case["temperature"])
        message = functools.partial(lambda name, text: f"{name}: {text}", name)
        torch.testing.assert_close(x, whole[name], rtol=1e-5, atol=allowed, equal_nan=True, msg=message)
