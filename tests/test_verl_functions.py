"""What stands in for verl's functions of logits, where verl itself is not installed: shapes, ids, second consumers."""

import pytest
import torch
from cases import hold, linear_case, logits_case, temperatures

from safe_kernels.integrations import verl

CONSUMERS = {
    "a sum of squares": lambda z: 0.1 * z.square().sum(),
    "an entropy": lambda z: -(z.softmax(-1) * z.log_softmax(-1)).sum(),
    "a slice": lambda z: (z[:, 1:] * z[:, :-1]).sum(),
    "none": lambda z: z.new_zeros(()),
}
PRODUCERS = {
    "a product": lambda leaf: leaf * 1.5,
    "a softcap, whose backward reads what it returned": lambda leaf: leaf.tanh(),
    "a view": lambda leaf: (leaf * 1.5).view(2, -1, 37).flatten(0, 1),
}


def gradient(case, dtype, producer, consumer, comes_first, *, ours=False):
    """Of log-probs and of what else reads the logits, in the leaf behind them."""
    leaf = case["logits"].to(dtype, copy=True).requires_grad_()
    logits = producer(leaf)

    def logprob(z):
        if ours:
            return verl.logprobs_from_logits(z, case["tokens"], inplace_backward=True)
        return z.log_softmax(-1).gather(-1, case["tokens"][:, None]).squeeze(-1)

    terms = [consumer, lambda z: (logprob(z) * temperatures((12,))).sum()]
    sum(term(logits) for term in (terms if comes_first else terms[::-1])).backward()
    return leaf.grad


@pytest.mark.parametrize("comes_first", [True, False])
@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("producer", PRODUCERS)
def test_logits_that_others_read_too(producer, consumer, comes_first):
    case = logits_case((12,), reference=False)
    arguments = (PRODUCERS[producer], CONSUMERS[consumer], comes_first)
    exact, plain = (gradient(case, dtype, *arguments) for dtype in (torch.float64, torch.float32))
    hold("d logits", gradient(case, torch.float32, *arguments, ours=True), plain, exact, 37)


def test_a_backward_leaves_the_logits_for_a_second_one():
    case = logits_case(reference=False)
    leaf = case["logits"].requires_grad_()
    logits = leaf * 1.5
    before = logits.detach().clone()
    logprob, other = verl.logprobs_from_logits(logits, case["tokens"]), logits.square().sum()
    logprob.sum().backward(retain_graph=True)
    assert torch.equal(logits, before)
    once = leaf.grad.clone()
    leaf.grad = None
    (logprob.sum() + other).backward()
    torch.testing.assert_close(leaf.grad - 2 * 1.5 * before, once)


@pytest.mark.parametrize(
    "leading, labels_shape", [((6,), (1, 6)), ((6,), (6, 1)), ((2, 3), (6,)), ((1, 6), (6,)), ((), (1,))]
)
def test_labels_of_another_shape_beside_logits(leading, labels_shape):
    case = logits_case(leading, reference=False)
    found = verl.logprobs_from_logits(case["logits"], case["tokens"].view(labels_shape))
    assert torch.equal(found, verl.logprobs_from_logits(case["logits"], case["tokens"]))
    assert found.shape == leading


def test_labels_of_another_number_are_named():
    case = logits_case((6,), reference=False)
    with pytest.raises(ValueError, match=r"tokens has shape \(5,\); it must be \(6,\)"):
        verl.logprobs_from_logits(case["logits"], case["tokens"][:5])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_ids_of_any_integer_dtype(dtype):
    """156 in uint8 is what -100 becomes there, and still a token."""
    case = linear_case((12,), vocabulary=200, reference=None)
    case["tokens"][::2] = 156 if dtype == torch.uint8 else -100
    narrow = case["tokens"].to(dtype)
    for found, wide in zip(
        verl.fused_linear_for_ppo(None, case["hidden"], case["weight"], narrow),
        verl.fused_linear_for_ppo(None, case["hidden"], case["weight"], case["tokens"]),
        strict=True,
    ):
        assert torch.equal(found, wide) and (found[::2] == 0).all() == (dtype != torch.uint8)
    logits = case["hidden"] @ case["weight"].T
    found, wide = (verl.logprobs_from_logits(logits, x) for x in (narrow, case["tokens"]))
    assert torch.equal(found.nan_to_num(), wide.nan_to_num())


def test_an_exact_kl_is_refused_with_what_to_use_instead():
    with pytest.raises(ValueError, match=r"kl='exact' is not possible in verl: .* Use actor\.kl_loss_type=k3\+"):
        verl.apply(kl="exact")
    assert not verl.PATCH.replaced
