"""Every shipped choice of the kernels, compiled for GPUs that are not here."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import counts
from safe_kernels import machine_code

KB = 1024
SHARED = {"sm_80": 99 * KB, "sm_90": 227 * KB, "sm_100": 227 * KB, "gfx942": 64 * KB}  # sm_80's also run on sm_86


def inspected(*options):
    """In a process of its own: with the interpreter on there is nothing to compile."""
    command = [sys.executable, "-m", "safe_kernels.inspect", "--json", *options]
    finished = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert finished.stdout, finished.stderr
    found = json.loads(finished.stdout)
    assert finished.returncode == any(x.get("spills_in_loops", x["spilled"]) for x in found)
    return found


@pytest.fixture(scope="module")
def compiled():
    return inspected()


@pytest.fixture
def row_kernels(compiled):
    names = ("statistics_kernel", "gradient_kernel", "divergence_kernel", "divergence_gradient_kernel")
    return [x for x in compiled if x["kernel"] in names]


@pytest.fixture
def products(compiled):
    """The matrix products in 16 bits."""
    return [x for x in compiled if x.get("bits") == 16]


def test_every_target_kernel_and_choice_is_there(compiled, row_kernels, products):
    assert {x["target"] for x in compiled} == set(SHARED)
    counts = {"statistics_kernel": 2, "gradient_kernel": 2, "gae_kernel": 2, "terms_kernel": 2, "merge_kernel": 6}
    counts |= {"divergence_kernel": 8, "divergence_gradient_kernel": 8}
    counts |= {"fused_kernel": 10 + 5, "product_kernel": 2 + 2}
    for target in SHARED:
        found = [x["kernel"] for x in compiled if x["target"] == target and not x.get("plain")]
        assert {name: found.count(name) for name in found} == counts
    plain = [(x["target"], x["reference"], x["rows"]) for x in compiled if x.get("plain")]
    asked = (("none", 4), ("shared", 8), ("shared", 9), ("own", 8), ("own", 9))
    assert sorted(plain) == sorted(2 * [("sm_90", *x) for x in asked])
    assert len(products) == 4 * (10 + 2) + len(plain)


def test_nothing_spills(compiled):
    """In a loop, with no Triton; anywhere, with the one that constraints.txt pins, for which the choices were made."""
    assert [x for x in compiled if x.get("spills_in_loops", x["spilled"])] == []
    constraints = (Path(__file__).parents[1] / "constraints.txt").read_text()
    if f"triton=={importlib.metadata.version('triton')};" in constraints:
        assert [x for x in compiled if x["spilled"]] == []


def test_rows_that_are_not_aligned_spill_in_no_loop_with_any_option_of_a_head():
    """The combinations that need most registers; `--every-combination` alone compiles 1112 for each target."""
    head = "bias ref_bias logit_scale softcap"
    statistics = f"statistics_kernel .*aligned False  with ref_logits (ref_kl )?{head} carry"
    gradient = (
        f"gradient_kernel .*aligned False  with ref_logits grad_logprob grad_entropy grad_kl (grad_ref_kl )?{head}"
    )
    found = inspected("--every-combination", "--only", f"{statistics}|{gradient}")
    assert len(found) == 6 * len(SHARED) and {x["with"].count(head) for x in found} == {1}
    assert [x for x in found if x.get("spills_in_loops", x["spilled"])] == []


def test_divergences_of_rows_that_are_not_aligned_spill_in_no_loop():
    found = inspected("--every-combination", "--only", "divergence.* (reverse_kl|jsd)  reads fp32")
    assert len(found) == 4 * len(SHARED) and all(x["arguments"] == "all" and not x["aligned"] for x in found)
    assert [x for x in found if x.get("spills_in_loops", x["spilled"])] == []


def test_shared_memory_fits(compiled):
    assert [x for x in compiled if x["shared"] > SHARED[x["target"]]] == []


def test_logits_are_loaded_16_bytes_at_a_time(row_kernels):
    assert [x for x in row_kernels if x["vector_loads"] < 1] == []


def test_row_kernels_need_next_to_no_shared_memory(row_kernels):
    assert max(x["shared"] for x in row_kernels) <= 4 * KB


BOUND_BY_INSTRUCTIONS = ("statistics with a reference and softcap", "JSD, second walk", "gradient of the JSD")


def test_an_element_costs_few_instructions():
    """So that memory binds: on an H200 about 16 for each bfloat16 logit that is read or written."""
    most = {
        "statistics": 11.5,
        "statistics with a reference": 24.5,
        "statistics with both KLs": 27.5,
        "gradient": 12.5,
        "gradient with KL": 19.5,
        "gradient with both KLs": 21.5,
        "statistics with a reference and softcap": 65,
        "reverse KL": 24.5,
        "forward KL": 24.5,
        "JSD and TV, first walk": 19.5,
        "JSD, second walk": 50,
        "TV, second walk": 19,
        "gradient of the reverse KL": 18,
        "gradient of the forward KL": 14.5,
        "gradient of the JSD": 50,
        "gradient of the TV": 19.5,
    }
    found = {x["counted"]: x for x in inspected("--counts")}
    assert found.keys() == most.keys()
    cost = {name: found[name]["instructions"] for name in most}
    assert cost["statistics with both KLs"] <= cost["statistics with a reference"] + 3.5, cost
    for name, x in found.items():
        assert x["instructions"] <= most[name], x
        assert {"spill", "exchange"}.isdisjoint(x["kinds"]), x
        assert x["load_bytes"] == [16] and set(x["store_bytes"]) <= {16} and x["bytes_in_flight"] >= 32 * KB, x
        if name not in BOUND_BY_INSTRUCTIONS:  # memory binds: no pipe, nor the latency of so many warps, takes longer
            assert all(max(x[gpu].values()) <= 1.03 * x[gpu]["memory_ms"] for gpu in ("H100", "H200")), x


def listed(*names):
    """Instructions at addresses 0, 16, ...; a number is a branch to that address."""
    parts = [("BRA", f"0x{x:x}") if isinstance(x, int) else (x, "R0") for x in names]
    return [machine_code.Instruction(16 * i, "", name, operands, 2) for i, (name, operands) in enumerate(parts)]


def test_instructions_are_counted_by_pipe():
    loop = machine_code.hot_loop(listed("MOV", "LDG.E.128", "FFMA", "IMAD", "MUFU.EX2", "FMNMX", "UIADD3", 16, "EXIT"))
    assert [x.name for x in loop] == ["LDG", "FFMA", "IMAD", "MUFU", "FMNMX", "UIADD3", "BRA"]
    found = machine_code.counts(loop, {"registers": 32, "shared": 0}, num_warps=4, logit_bytes=2, streams=1)
    assert machine_code.spills_in_loops(listed("STL", "LDL", 16, "LDL")) == 1  # the others are outside
    assert found["instructions"] == round(7 / 8, 2) and found["warps"] == 64 and found["bytes_in_flight"] == 32 * KB
    assert found["pipes"] == {name: round(n / 8, 2) for name, n in {"fma": 3, "alu": 1, "mufu": 1, "lsu": 4}.items()}
    seconds = machine_code.least_seconds(
        found | {"pipes": {"mufu": 1, "alu": 1}}, machine_code.GPUS["H100"], 8192 * 151_936
    )
    assert round(1e6 * seconds["mufu"]) == 347 and round(1e6 * seconds["alu"]) == 87


def test_a_tile_of_a_product_is_counted_without_the_product():
    code = listed("MOV", "FADD", "HGMMA", "IADD3", 32, "MUFU", 16, "EXIT", "NOP")
    assert [x.name for x in counts.epilogue(code)] == ["FADD", "MUFU", "BRA"]
    assert [x.name for x in counts.program(code)][-1] == "EXIT"


@pytest.mark.parametrize(
    ("target", "instructions"),
    [
        ("sm_80", ["vector_loads"]),
        ("sm_90", ["wgmma", "bulk_loads"]),
        ("sm_100", ["tcgen05", "bulk_loads"]),
        ("gfx942", ["mfma", "vector_loads"]),
    ],
)
def test_products_are_made_of_what_the_target_has(products, target, instructions):
    for name in instructions:
        assert [x for x in products if x["target"] == target and x.get(name, 0) < 1] == [], name
