"""The parts of apply(kl="exact"): TRL's head call with a reference, and what stands for the reference's log-probs."""

import contextlib

import pytest
import torch
from cases import hold, linear_case

pytest.importorskip("trl", reason="TRL is not installed; it needs Python 3.11: pip install 'safe-kernels[test]'")

from trl.trainer import utils  # noqa: E402

from safe_kernels import linear_token_stats  # noqa: E402
from safe_kernels.integrations import trl as patch  # noqa: E402
from safe_kernels.integrations.trl_exact_kl import RefLogprob  # noqa: E402

TEMPERATURE = 0.9


@pytest.mark.parametrize("reference", ["shared", "own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_head_call_with_a_reference(dtype, reference):
    case = linear_case((21,), 53, reference=reference, dtype=dtype, bias=True)
    slopes = torch.randn(3, 21, generator=torch.Generator().manual_seed(2))

    def results(call, dtype):
        leaves = [case[name].detach().clone().to(dtype).requires_grad_() for name in ("hidden", "weight", "bias")]
        found = call(*leaves, *(case.get(f"ref_{name}") for name in ("hidden", "weight", "bias")))
        gradients = torch.autograd.grad((torch.stack(found) * slopes).sum(), leaves)
        return [*found, *gradients]

    def ours(hidden, weight, bias, *ref):
        head = (hidden, weight, bias, case["tokens"], TEMPERATURE, 32, 4.0, 0.8, ("entropy",))
        logprob, entropy, *_, kl = patch.LinearLogprob.apply(*head, *ref)
        return logprob, entropy, kl

    def plain(*heads):
        exact = heads[0].dtype if heads[0].dtype == torch.float64 else torch.float32
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias = (None if x is None else x.to(exact) for x in heads)
        ref_head = (weight.detach(), bias.detach()) if ref_weight is None else (ref_weight, ref_bias)
        pairs = [(hidden, weight, bias), (ref_hidden, *ref_head)]
        logp, logq = ((4 * torch.tanh(0.2 * (x @ w.T + b)) / TEMPERATURE).log_softmax(-1) for x, w, b in pairs)
        p = logp.exp()
        return (
            logp.gather(-1, case["tokens"][:, None])[:, 0],
            -(p * logp).sum(-1),
            (p * (logp - logq)).sum(-1),
        )

    exact, ordinary = results(plain, torch.float64), results(plain, dtype)
    names = ["logprob", "entropy", "kl", "d hidden", "d weight", "d bias"]
    for name, actual, other, wanted in zip(names, results(ours, dtype), ordinary, exact, strict=True):
        hold(name, actual, other, wanted, 53)


def test_autocast_rounds_both_heads_and_sums_the_gradient_in_float32():
    case = linear_case((21,), 53, reference="own")
    names = ("hidden", "weight", "ref_hidden", "ref_weight")

    def results(call, dtype):
        leaves = [case[name].to(dtype).requires_grad_("ref" not in name) for name in names]
        found = call(*leaves)
        return [found.detach(), *torch.autograd.grad(found.sum(), leaves[:2])]

    def ours(hidden, weight, *ref):
        with torch.autocast("cpu", torch.bfloat16):
            return patch.LinearLogprob.apply(hidden, weight, None, case["tokens"], 1.0, 0, None, 1.0, (), *ref)[-1]

    def rounded(hidden, weight, ref_hidden, ref_weight):
        return linear_token_stats(hidden, weight, case["tokens"], ref_hidden=ref_hidden, ref_weight=ref_weight).kl

    kl, *gradients = results(ours, torch.float32)
    expected, *of_rounded = results(rounded, torch.bfloat16)
    torch.testing.assert_close(kl, expected)
    for x, wanted in zip(gradients, of_rounded, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.bfloat16(), wanted)


def test_a_reference_s_head_that_is_gone_is_gathered_for_forward_and_backward(monkeypatch):
    """As under ZeRO-3."""
    case = linear_case((21,), 53, reference="own")
    whole, weight = case["ref_weight"], case["weight"].requires_grad_()
    absent = torch.nn.Parameter(whole.new_empty(0), requires_grad=False)

    @contextlib.contextmanager
    def gathered(*parameters):
        assert any(x is absent for x in parameters)
        absent.data = whole
        yield
        absent.data = whole.new_empty(0)

    def gradient(ref_weight):
        head = (case["hidden"], weight, None, case["tokens"], 1.0, 0, None, 1.0, ())
        return torch.autograd.grad(patch.LinearLogprob.apply(*head, case["ref_hidden"], ref_weight)[-1].sum(), weight)

    expected = gradient(whole)
    monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", gathered)
    torch.testing.assert_close(gradient(absent), expected)
    assert absent.numel() == 0


def test_other_expressions_of_the_reference_s_log_probs_are_refused():
    x, kls = torch.zeros(2, 3), [torch.ones(2, 3)]
    ref, k1 = (RefLogprob(kls, estimate) for estimate in (RefLogprob.K3, RefLogprob.K1))
    assert torch.exp(ref - x) - (ref - x) - 1 is kls[0] and x - k1 is kls[0]
    for wrong in (
        lambda: torch.exp(ref - x) - 1,
        lambda: (ref - x) - 1,
        lambda: ref - 1,
        lambda: torch.exp(ref),
        lambda: torch.clamp(ref - x, -20, 20),
        lambda: torch.exp(ref - x) - (ref - x) - 2,
        lambda: torch.add(x, ref),
        lambda: torch.where(x > 0, ref, x),
        lambda: x * (ref - x),
        lambda: x - ref,
        lambda: x * (k1 - x),
        lambda: torch.exp(k1 - x) - (k1 - x) - 1,
    ):
        with pytest.raises(RuntimeError, match="this version of TRL computes the KL as "):
            wrong()
    with pytest.raises(RuntimeError, match="TRL scored the policy 0 times"):
        x - RefLogprob([], RefLogprob.K1)
