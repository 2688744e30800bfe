"""A vocabulary whose parts lie on several ranks has the statistics, and the gradients, of the whole."""

import functools
import math

import conftest
import numpy as np
import processes
import pytest
import torch
from cases import evaluate, hold, linear_case, logits_case, policy_case, some_mask, temperatures, values_case
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed

from safe_kernels import (
    checks,
    library,
    linear_policy_loss,
    linear_safe_terms,
    linear_token_stats,
    safe_terms,
    token_stats,
    vocab_parallel,
)

BACKENDS = ["reference", *conftest.BACKENDS]
VOCABULARY = 37
WIDTHS = {2: (14, 23), 4: (9, 1, 20, 7)}  # of the ranks' parts
AXES = {"logits": -1, "ref_logits": -1, "weight": 0, "bias": 0, "ref_weight": 0, "ref_bias": 0}
SAFE = {"kl_threshold": 0.1, "alpha": 0.3, **values_case()}
LOSS = {"entropy_coef": 0.1, "kl_coef": 0.3, "kl_penalty_coef": 0.5, "kl_threshold": 0.2}
HEAD = {"softcap": 5.0, "logit_scale": 0.5, "bias": True}


def in_place(logits, **case):
    return token_stats(logits * 1, **case, inplace_backward=True)


CASES = {
    "logits": (token_stats, logits_case, {}),
    "logits, no reference": (token_stats, logits_case, {"reference": False, "temperature": 0.7}),
    "logits, all": (token_stats, logits_case, {"temperature": temperatures(), "mask": some_mask()}),
    "logits, bf16": (token_stats, logits_case, {"dtype": torch.bfloat16}),
    "logits, in place": (in_place, logits_case, {"mask": some_mask()}),
    "logits, terms": (safe_terms, logits_case, {**SAFE, "mask": some_mask()}),
    "hidden": (linear_token_stats, linear_case, {"bias": True}),
    "hidden, no reference": (linear_token_stats, linear_case, {"reference": None, "temperature": 1.3, **HEAD}),
    "hidden, own head": (linear_token_stats, linear_case, {"reference": "own", "mask": some_mask(), **HEAD}),
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
        "a part without a live column": [("logits", slice(None), first, -inf), ("ref_logits", slice(None), first, -inf)],
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
    }
    found = {}
    for edge, changes in places.items():
        case = logits_case((5,))
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


def results_of_a_rank(names, with_edges):
    """In a process of a group: of every case, and every backend."""
    patch = pytest.MonkeyPatch()
    conftest.make_small(patch)
    distributed.init_process_group("gloo")
    group, widths, found = distributed.group.WORLD, WIDTHS[distributed.get_world_size()], {}
    tasks = {name: of(name) for name in names}
    if with_edges:
        tasks |= {edge: (token_stats, case, ["logits"]) for edge, case in edges().items()}
    for backend in BACKENDS:
        for name, (op, case, wrt) in tasks.items():
            part = part_of(case, group.rank(), widths) | {"process_group": group}
            found[backend, name] = arrays(evaluate(op, part, backend, wrt))
    distributed.barrier()  # nobody leaves while another still listens
    return found


def arrays(results):
    """What a pipe can take, without bfloat16."""
    return {name: (x.float() if x.dtype == torch.bfloat16 else x).numpy() for name, x in results.items()}


def outcomes(function, size, *arguments):
    found = processes.run(function, size, *arguments, seconds=400)
    assert not any(outcome.error for outcome in found), "\n".join(outcome.error for outcome in found)
    return [outcome.result for outcome in found]


@pytest.fixture(scope="module")
def on_two():
    return outcomes(results_of_a_rank, 2, list(CASES), True)


@pytest.fixture(scope="module")
def on_four():
    return outcomes(results_of_a_rank, 4, ON_FOUR, True)


@pytest.fixture(params=[2, 4])
def ranks(request):
    return request.getfixturevalue("on_two" if request.param == 2 else "on_four")


def joined(ranks, key):
    """Results of the whole: those of the parts side by side, the others from any rank, as all have the same bits."""
    found = {}
    for name in ranks[0][key]:
        parts = [torch.from_numpy(rank[key][name]) for rank in ranks]
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


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("edge", edges())
@pytest.mark.parametrize("backend", BACKENDS)
def test_edges_are_those_of_the_whole(ranks, edge, backend):
    """Which numbers are not finite, too; of plain PyTorch's gradients of infinite numbers, only that they are not."""
    whole = evaluate(token_stats, edges()[edge], backend, ["logits"])
    for name, x in joined(ranks, (backend, edge)).items():
        torch.testing.assert_close(x, whole[name], equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
