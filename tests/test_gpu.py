"""The Triton backend at full size on a GPU: `pytest -m gpu`. What fits the interpreter is tested elsewhere."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import torch

from safe_kernels import (
    distillation_loss,
    linear_distillation_loss,
    linear_policy_loss,
    linear_safe_terms,
    linear_token_stats,
    safe_terms,
    soft_min_gae,
    token_stats,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="runs with -m gpu on a CUDA device"),
]
DEVICE = "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
VOCABULARIES = [128_256, 151_936, 50_257]
WIDTH = 2048


def on_device(case):
    return {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in case.items()}


def head_case(tokens, vocabulary, dtype, reference=True):
    """Hidden states and a head whose logits have a standard deviation of 2, made on the device."""
    draw = torch.Generator(DEVICE).manual_seed(0)
    hidden, noise = (torch.randn(tokens, WIDTH, generator=draw, device=DEVICE) for _ in range(2))
    weight = torch.randn(vocabulary, WIDTH, generator=draw, device=DEVICE) * (2 / WIDTH**0.5)
    case = {"hidden": hidden.to(dtype), "weight": weight.to(dtype)}
    case["tokens"] = torch.randint(vocabulary, (tokens,), generator=draw, device=DEVICE)
    return case | ({"ref_hidden": (hidden + 0.3 * noise).to(dtype)} if reference else {})


def policy_case(tokens, vocabulary, dtype):
    case = head_case(tokens, vocabulary, dtype)
    with torch.no_grad():
        logprob = linear_token_stats(**case, backend="triton").logprob
    noise = torch.randn(2, tokens, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))
    terms = {"entropy_coef": 0.01, "kl_coef": 0.1, "kl_penalty_coef": 0.1, "kl_threshold": 0.05, "ref_kl_coef": 0.1}
    return case | terms | {"old_logprob": logprob + 0.3 * noise[0], "advantage": noise[1]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd", "tv"])
def test_distillation_holds_to_the_reference(divergence, dtype):
    vocabulary, options = 151_936, {"divergence": divergence, "cross_entropy_coef": 0.1, "teacher_temperature": 1.3}
    case = on_device(cases.distillation_case((64,), vocabulary, 256, dtype=dtype, softcap=8.0, **options))
    cases.hold_to_reference(linear_distillation_loss, case, "triton", ["hidden", "weight"], vocabulary)
    case = on_device(cases.distillation_logits_case((64,), vocabulary, dtype=dtype, **options))
    cases.hold_to_reference(distillation_loss, case, "triton", ["logits"], vocabulary)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_logits_hold_to_the_reference(vocabulary, dtype):
    case = on_device(cases.logits_case((64,), vocabulary, dtype=dtype, with_ref_kl=True))
    cases.hold_to_reference(token_stats, case, "triton", ["logits"], vocabulary)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_hidden_states_hold_to_the_reference(vocabulary, dtype):
    for asked in (False, True):
        case = head_case(128, vocabulary, dtype) | {"with_ref_kl": asked}
        cases.hold_to_reference(linear_token_stats, case, "triton", ["hidden", "weight"], vocabulary)


@pytest.mark.parametrize("dtype", DTYPES)
def test_policy_loss_holds_to_the_reference(dtype):
    cases.hold_to_reference(
        linear_policy_loss, policy_case(128, 151_936, dtype), "triton", ["hidden", "weight"], 151_936
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_fused_products_hold_to_the_reference(vocabulary, dtype):
    case = head_case(128, vocabulary, dtype) | {"batch_invariant": True, "with_ref_kl": True}
    exact, plain = (
        cases.evaluate(linear_token_stats, case | {"batch_invariant": False}, "reference", ["hidden", "weight"], kind)
        for kind in (torch.float64, None)
    )
    for name, x in cases.evaluate(linear_token_stats, case, "triton", ["hidden", "weight"]).items():
        cases.hold(name, x, plain[name], exact[name], vocabulary)


@pytest.mark.parametrize("reference", [False, True])
def test_a_row_has_the_same_bits_in_any_batch(reference):
    case = head_case(1000, 151_936, torch.bfloat16, reference) | {"batch_invariant": True}
    whole = cases.evaluate(linear_token_stats, case, "triton")
    for some in (slice(0, 1), slice(500, 700), slice(999, 1000)):
        part = {name: x[some] for name, x in case.items() if name in ("hidden", "ref_hidden", "tokens")}
        alone = cases.evaluate(linear_token_stats, case | part, "triton")
        assert all(torch.equal(x, whole[name][some]) for name, x in alone.items())


@pytest.mark.parametrize("op", [safe_terms, linear_safe_terms])
def test_safe_terms_hold_to_the_reference(op):
    shape, vocabulary = (4, 100), 50_257
    values = cases.values_case(shape) | {
        "kl_threshold": 0.1,
        "alpha": 0.3,
        "gamma": 0.9,
        "mask": cases.some_mask(shape),
    }
    make = cases.logits_case if op is safe_terms else cases.linear_case
    leaf = "logits" if op is safe_terms else "hidden"
    cases.hold_to_reference(op, on_device(make(shape, vocabulary, **values)), "triton", [leaf, "v1", "v2"], vocabulary)


@pytest.mark.parametrize("op", [token_stats, linear_token_stats, linear_policy_loss])
def test_in_one_compiled_graph(op):
    """With the default compiler, which the CPU tests leave out."""
    make = {
        token_stats: cases.logits_case,
        linear_token_stats: cases.linear_case,
        linear_policy_loss: cases.policy_case,
    }
    case, leaf = on_device(make[op]()), "logits" if op is token_stats else "hidden"

    def loss(x):
        result = op(**case | {leaf: x}, backend="triton")
        return result.loss if op is linear_policy_loss else (result.logprob * result.entropy + result.kl).sum()

    x = case[leaf].clone().requires_grad_()
    found = [torch.autograd.grad(run(x), x)[0] for run in (loss, torch.compile(loss, fullgraph=True))]
    torch.testing.assert_close(*found)


def test_on_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    case = {name: x.to("cuda:1") for name, x in cases.logits_case().items()} | {"with_ref_kl": True}
    here = token_stats(**on_device(case), backend="triton")
    there = token_stats(**case, backend="triton")
    assert all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(here, there, strict=True))


def test_scan_holds_to_the_reference():
    case = on_device(cases.values_case((16, 1500), mask=cases.some_mask((16, 1500))))
    cases.hold_to_reference(soft_min_gae, case, "triton", vocabulary=1500)


def test_rows_past_two_to_the_31():
    """16,384 x 151,936 elements: the last rows have the bits they have alone, forward and backward."""
    logits = torch.randn(16_384, 151_936, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    tokens = torch.arange(16_384, device=DEVICE)
    whole = token_stats(logits, tokens, backend="triton")
    whole.logprob.sum().backward()
    last = logits[-4:].detach().clone().requires_grad_()
    alone = token_stats(last, tokens[-4:], backend="triton")
    alone.logprob.sum().backward()
    assert torch.equal(whole.logprob[-4:], alone.logprob) and torch.equal(whole.entropy[-4:], alone.entropy)
    assert torch.equal(logits.grad[-4:], last.grad)


@pytest.mark.parametrize("op", [linear_token_stats, linear_policy_loss])
def test_two_runs_have_the_same_bits(op):
    make = head_case if op is linear_token_stats else policy_case
    case = make(512, 151_936, torch.bfloat16)
    first, second = (cases.evaluate(op, case, "triton", ["hidden", "weight"]) for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())


@pytest.mark.parametrize(("op", "limit"), [(linear_token_stats, 400e6), (linear_policy_loss, 1.2e9)])
def test_memory_with_a_frozen_head(op, limit):
    """8192 tokens, H = 2048, V = 151,936, bf16, with KL: the logits alone would take 2.5 GB."""
    make = head_case if op is linear_token_stats else policy_case
    case = make(8192, 151_936, torch.bfloat16)

    def step(case):
        case["hidden"].requires_grad_()
        result = op(**case, backend="triton")
        loss = result.loss if op is linear_policy_loss else (result.logprob + result.entropy + result.kl).sum()
        loss.backward()

    step(make(8, 512, torch.bfloat16))  # after which cuBLAS has its workspaces
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(case)
    assert torch.cuda.max_memory_allocated() - before - case["hidden"].grad.nbytes <= limit


def test_nothing_reads_or_writes_out_of_bounds():
    """Every op on odd small shapes, under NVIDIA's memory checker."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    tests = Path(__file__).parent
    # Within a segment of PyTorch's cache, what belongs to another tensor is not out of bounds.
    own = {"PYTHONPATH": f"{tests.parent}", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--error-exitcode", "1", "--report-api-errors", "no", sys.executable, __file__]
    done = subprocess.run(command, cwd=tests, env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


def odd_shapes():
    values = cases.values_case(mask=cases.some_mask()) | {"kl_threshold": 0.1, "alpha": 0.3, "gamma": 0.9}
    wrong = torch.tensor([[-100, 37, 5, 1 << 40, 0, 36, -1]]).expand(3, 7)
    evaluated = [
        (token_stats, cases.logits_case(tokens=wrong), ["logits"]),
        (linear_token_stats, cases.linear_case(bias=True), ["hidden", "weight", "bias"]),
        (linear_token_stats, cases.linear_case(reference="own", batch_invariant=True), ["hidden"]),
        (linear_policy_loss, cases.policy_case(kl_coef=0.1), ["hidden", "weight"]),
        (safe_terms, cases.logits_case(**values), ["logits", "v1"]),
        (soft_min_gae, cases.values_case((5, 1030), mask=None), []),
    ]
    for op, case, wrt in evaluated:
        cases.evaluate(op, on_device(case), "triton", wrt)
    torch.cuda.synchronize()


if __name__ == "__main__":
    odd_shapes()
