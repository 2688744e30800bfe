"""The Triton backend at full size on a GPU: `pytest -m gpu`. What fits the interpreter is tested elsewhere."""

import cases
import pytest
import torch

from safe_kernels import linear_policy_loss, linear_token_stats, soft_min_gae, token_stats

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
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
    terms = {"entropy_coef": 0.01, "kl_coef": 0.1, "kl_penalty_coef": 0.1, "kl_threshold": 0.05}
    return case | terms | {"old_logprob": logprob + 0.3 * noise[0], "advantage": noise[1]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_logits_hold_to_the_reference(vocabulary, dtype):
    case = on_device(cases.logits_case((64,), vocabulary, dtype=dtype))
    cases.hold_to_reference(token_stats, case, "triton", ["logits"], vocabulary)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_hidden_states_hold_to_the_reference(vocabulary, dtype):
    cases.hold_to_reference(
        linear_token_stats, head_case(128, vocabulary, dtype), "triton", ["hidden", "weight"], vocabulary
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_policy_loss_holds_to_the_reference(dtype):
    cases.hold_to_reference(
        linear_policy_loss, policy_case(128, 151_936, dtype), "triton", ["hidden", "weight"], 151_936
    )


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
    case["hidden"].requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = op(**case, backend="triton")
    loss = result.loss if op is linear_policy_loss else (result.logprob + result.entropy + result.kl).sum()
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before - case["hidden"].grad.nbytes <= limit
