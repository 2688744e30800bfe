"""Our functions in LLaMA-Factory, AReaL and SkyRL against float64, beside a plain formula and, where the trainer is
installed, beside its own function (`python tests/integrations/run.py NAME` installs it).
"""

import importlib
import importlib.util
import math
import sys
import types

import processes
import pytest
import torch
from cases import hold, logits_case, some_mask
from torch import distributed

from safe_kernels.integrations import areal, llamafactory, skyrl

B, T, V = 4, 7, 37
DTYPES = [torch.float32, torch.bfloat16]


def case(dtype):
    """Logits, and labels of which the first ones are no tokens, as in a prompt; the last sequence has none."""
    given = logits_case((B, T), V, reference=False, dtype=dtype)
    labels = given["tokens"].clone()
    for row, prompt in enumerate((1, 3, 2, T)):
        labels[row, :prompt] = -100
    return {"logits": given["logits"], "tokens": given["tokens"], "labels": labels}


def logp_and_entropy(logits, temperature=1.0):
    logp = (logits / temperature).log_softmax(-1)
    return logp, -(logp.exp() * logp).sum(-1)


def at(logp, tokens):
    return logp.gather(-1, tokens[..., None])[..., 0]


def plain_batch_logps(logits, labels, label_pad_token_id=-100, ld_alpha=None):
    """In loops: the first labels of a pair, as many as the shorter one has, count whole, the others by `ld_alpha`."""
    logp, sums, counts = logits.log_softmax(-1), [], []
    live = [[t for t in range(1, T) if labels[b, t] != label_pad_token_id] for b in range(B)]
    for b in range(B):
        shorter = min(len(live[b]), len(live[(b + B // 2) % B]))
        factor = [1.0 if ld_alpha is None or t - live[b][0] < shorter else ld_alpha for t in live[b]]
        terms = [f * logp[b, t - 1, labels[b, t]] for f, t in zip(factor, live[b], strict=True)]
        sums.append(sum(terms, 0 * logp[b].sum()))
        counts.append(len(live[b]))
    return torch.stack(sums), torch.tensor(counts)


FUNCTIONS = {  # (ours, the plain formula, how both are called)
    "llamafactory": (llamafactory, "get_batch_logps", plain_batch_logps, lambda f, c: f(c["logits"], c["labels"])),
    "llamafactory, LD-DPO": (
        llamafactory,
        "get_batch_logps",
        plain_batch_logps,
        lambda f, c: f(c["logits"], c["labels"], ld_alpha=0.3),
    ),
    "areal": (
        areal,
        "gather_logprobs",
        lambda z, labels, t, group: at(logp_and_entropy(z, t)[0], labels),
        lambda f, c: f(c["logits"], c["tokens"], 0.7, None),
    ),
    "areal, entropy": (
        areal,
        "gather_logprobs_entropy",
        lambda z, labels, t, group: (at(logp_and_entropy(z, t)[0], labels), logp_and_entropy(z, t)[1]),
        lambda f, c: f(c["logits"], c["tokens"], 0.7, None),
    ),
    "skyrl": (
        skyrl,
        "logprobs_from_logits",
        lambda z, labels: at(logp_and_entropy(z)[0], labels),
        lambda f, c: f(c["logits"], c["tokens"]),
    ),
    "skyrl, entropy": (
        skyrl,
        "chunked_entropy_from_logits",
        lambda z, grad, mask: logp_and_entropy(z)[1] * mask,
        lambda f, c: f(c["logits"], True, some_mask((B, T)).long()),
    ),
}


def evaluated(function, call, given, dtype):
    """The outputs, and the gradient of the logits for random slopes of those that have one."""
    given["logits"] = given["logits"].to(dtype).requires_grad_()
    found = call(function, given)
    found = dict(enumerate(found if isinstance(found, tuple) else (found,)))
    draw = torch.Generator().manual_seed(5)
    loss = sum((x * torch.randn(x.shape, generator=draw).to(x)).sum() for x in found.values() if x.is_floating_point())
    loss.backward()
    return {**{name: x.detach() for name, x in found.items()}, "d logits": given["logits"].grad}


@pytest.fixture(scope="module")
def shells():
    """SkyRL's packages without what they import (Ray, Python 3.12): the file of its functions needs jaxtyping alone."""
    spec = importlib.util.find_spec("skyrl")
    names = ["skyrl", "skyrl.backends", "skyrl.backends.skyrl_train", "skyrl.backends.skyrl_train.utils"]
    with pytest.MonkeyPatch.context() as patch:
        for name in names if spec is not None else ():
            module = types.ModuleType(name)
            folder = name.split(".")[1:]
            module.__path__ = ["/".join([*spec.submodule_search_locations, *folder])]
            module.__spec__ = spec
            patch.setitem(sys.modules, name, module)
        yield
        patch.delitem(sys.modules, skyrl.MODULE, raising=False)


def stock(ours, name):
    """The trainer's own function, or the test is skipped."""
    package = ours.PATCH.package
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: python tests/integrations/run.py {package}")
    replacement = next(x for x in ours.PATCH.replacements if x.name == name)
    return getattr(importlib.import_module(replacement.module), name)


@pytest.mark.parametrize("yardstick", ["plain", "stock"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_further_from_float64(name, dtype, yardstick, shells, kernels):
    ours, function, plain, call = FUNCTIONS[name]
    other = plain if yardstick == "plain" else stock(ours, function)
    with torch.compiler.set_stance("force_eager"):  # AReaL compiles its own
        beside = evaluated(other, call, case(dtype), dtype)
    exact = evaluated(plain, call, case(dtype), torch.float64)
    actual = evaluated(getattr(ours, function), call, case(dtype), dtype)
    assert actual.keys() == beside.keys() == exact.keys()
    for key, x in actual.items():
        assert x.dtype == (dtype if key == "d logits" else torch.float32 if x.is_floating_point() else torch.int64), key
        assert x.shape == beside[key].shape, key
        if x.is_floating_point():
            hold(f"{key}", x, beside[key], exact[key], V)
        else:
            assert torch.equal(x, exact[key]) and torch.equal(x, beside[key])


@pytest.mark.parametrize("ours", [areal, llamafactory, skyrl], ids=lambda module: module.PATCH.package)
def test_the_patch_knows_the_installed_trainer(ours, shells):
    before = {what.name: stock(ours, what.name) for what in ours.PATCH.replacements}
    with ours.apply() as patch:
        assert patch.replaced == [f"{what.module}.{what.name}" for what in ours.PATCH.replacements]
        assert all(stock(ours, name) is getattr(ours, name) for name in before)
    assert all(stock(ours, name) is own for name, own in before.items())


def test_llamafactory_s_trainers_find_ours(monkeypatch):
    """Both have bound the name. `torchaudio`, which reads sound files for them, is a stub."""
    own = stock(llamafactory, "get_batch_logps")
    monkeypatch.setitem(sys.modules, "torchaudio", types.ModuleType("torchaudio"))
    trainers = [importlib.import_module(f"llamafactory.train.{x}.trainer") for x in ("dpo", "kto")]
    with llamafactory.apply():
        assert all(x.get_batch_logps is llamafactory.get_batch_logps for x in trainers)
    assert all(x.get_batch_logps is own for x in trainers)


def test_llamafactory_s_shapes_are_checked():
    with pytest.raises(ValueError, match=r"logits has shape \(2, 3, 5\), labels \(2, 4\); they must be"):
        llamafactory.get_batch_logps(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.int64))


def test_skyrl_s_entropy_has_a_gradient_only_if_it_is_asked_for():
    logits = case(torch.float32)["logits"].requires_grad_()
    assert not skyrl.chunked_entropy_from_logits(logits).requires_grad
    assert skyrl.chunked_entropy_from_logits(logits, requires_grad=True).requires_grad
    masked = skyrl.chunked_entropy_from_logits(logits.detach().fill_(math.nan), False, torch.zeros(B, T))
    assert torch.equal(masked, torch.zeros(B, T))


def on_a_part(name, own):
    """AReaL's function, or ours, on this rank's half of the vocabulary."""
    distributed.init_process_group("gloo")
    group, rank = distributed.group.WORLD, distributed.get_rank()
    given = case(torch.float32)
    given["logits"] = given["logits"][..., :36].chunk(2, -1)[rank].contiguous()
    given["tokens"] = given["tokens"].clamp(max=35)
    function = stock(areal, name) if own else getattr(areal, name)
    found = evaluated(function, lambda f, c: f(c["logits"], c["tokens"], 0.7, group), given, torch.float32)
    return {key: x.numpy() for key, x in found.items()}


@pytest.mark.parametrize("own", [False, True], ids=["ours", "stock"])
@pytest.mark.parametrize("name", ["gather_logprobs", "gather_logprobs_entropy"])
def test_areal_s_vocabulary_on_two_ranks(name, own):
    """Against the whole in float64. AReaL's own function, where it is installed, shows that both mean the same."""
    if own:
        stock(areal, name)
    found = processes.run(on_a_part, 2, name, own)
    assert [outcome.error for outcome in found] == ["", ""]
    whole = case(torch.float32)
    whole["logits"], whole["tokens"] = whole["logits"][..., :36], whole["tokens"].clamp(max=35)
    _, _, plain, call = FUNCTIONS["areal, entropy" if "entropy" in name else "areal"]
    exact, single = (evaluated(plain, call, dict(whole), dtype) for dtype in (torch.float64, torch.float32))
    for rank, outcome in enumerate(found):
        for key, x in outcome.result.items():
            parts = [y.chunk(2, -1)[rank] if key == "d logits" else y for y in (single[key], exact[key])]
            if own:  # whose entropy is the small difference of large numbers, by its formula
                torch.testing.assert_close(torch.from_numpy(x).double(), parts[1], rtol=1e-4, atol=1e-5)
            else:
                hold(f"{key} of rank {rank}", torch.from_numpy(x), *parts, 36)
