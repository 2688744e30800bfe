"""`token_stats_of`: a model of transformers and labels in, statistics of its own logits out; REINFORCE in ten lines."""

import re
from pathlib import Path

import pytest
import tiny
import torch
from architectures import SPECIAL, tiny_config, tiny_kind
from cases import temperatures
from transformers import AutoConfig, AutoModelForImageTextToText

from safe_kernels.integrations import transformers as hf
from safe_kernels.integrations.transformers import token_stats_of


def batch():
    draw = torch.Generator().manual_seed(3)
    ids, mask = torch.randint(4, 20, (3, 8), generator=draw), torch.ones(3, 8, dtype=torch.int64)
    mask[0, 6:] = mask[1, 7:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100  # prompts
    return ids, labels, mask


def plain(model, ref_model, temperature, dtype):
    """From whole logits of the models' own forward."""
    ids, labels, mask = batch()
    live = labels[:, 1:] != -100
    logits, ref_logits = (x(input_ids=ids, attention_mask=mask).logits[:, :-1] for x in (model, ref_model))
    logp, logq = ((z.to(dtype) / temperature[..., None].to(dtype)).log_softmax(-1) for z in (logits, ref_logits))
    found = {
        "logprob": logp.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0],
        "entropy": -(logp.exp() * logp).sum(-1),
        "kl": (logp.exp() * (logp - logq.detach())).sum(-1),
    }
    return {name: x * live for name, x in found.items()}


def with_gradient(model, stats):
    """The statistics, and the gradient of the embeddings for random slopes."""
    draw = torch.Generator().manual_seed(4)
    weight = model.get_input_embeddings().weight
    loss = sum((x * torch.randn(x.shape, generator=draw).to(x)).sum() for x in stats.values())
    return {name: x.detach() for name, x in stats.items()} | {"d weight": torch.autograd.grad(loss, [weight])[0]}


@pytest.mark.parametrize("kind", ["llama", "cohere2", "nanochat", "opt"])
def test_statistics_of_its_own_logits(kind):
    """Also with a scale, a softcap, and a projection before the head."""
    model, reference = tiny_kind(kind).eval(), tiny_kind(kind).eval()
    with torch.no_grad():
        for x in reference.parameters():
            x.add_(0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(x.numel())))
    temperature, (ids, labels, mask) = temperatures((3, 7)), batch()
    stats = token_stats_of(model, ids, labels, ref_model=reference, temperature=temperature, attention_mask=mask)
    actual = with_gradient(model, {name: getattr(stats, name) for name in ("logprob", "entropy", "kl")})
    ordinary = with_gradient(model, plain(model, reference, temperature, torch.float32))
    model, reference = model.double(), reference.double()
    exact = with_gradient(model, plain(model, reference, temperature, torch.float64))
    for name, x in actual.items():
        if name == "d weight":  # through a model, whose float32 has its own rounding
            torch.testing.assert_close(x.double(), exact[name], rtol=1e-3, atol=1e-4)
        else:
            torch.testing.assert_close(x.double(), exact[name], **tiny.FORWARDS)
            torch.testing.assert_close(x, ordinary[name], **tiny.FORWARDS)
            assert (x[labels[:, 1:] == -100] == 0).all()
    assert actual["kl"].max() > 1e-3


def test_under_autocast_an_ordinary_model_is_an_ordinary_model():
    """Whose logits are rounded to bfloat16, which the check does not take for something that it does to them."""
    model, (ids, labels, mask) = tiny.model().eval(), batch()
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
    expected = plain(model, model, torch.ones(3, 7), torch.float32)["logprob"]
    with torch.autocast("cpu", torch.bfloat16):
        found = token_stats_of(model, ids, labels, attention_mask=mask).logprob
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)


def test_a_composite_model_in_training_gets_the_types_that_its_caller_gives():
    """Those of text alone give what they give by default, and others give something else."""
    torch.manual_seed(0)
    config = tiny_config(type(AutoConfig.for_model("gemma3")), SPECIAL.get("gemma3", {}))
    model, (ids, labels, mask) = AutoModelForImageTextToText.from_config(config).train(), batch()
    expected, *found = (
        token_stats_of(model, ids, labels, attention_mask=mask, **given).logprob
        for given in ({}, {"token_type_ids": torch.zeros_like(ids)}, {"token_type_ids": torch.ones_like(ids)})
    )
    assert torch.equal(found[0], expected) and not torch.equal(found[1], expected)


def test_no_logits_are_made(monkeypatch):
    model, (ids, labels, mask) = tiny.model(), batch()
    token_stats_of(model, ids, labels, attention_mask=mask)
    shapes, head = [], hf.head_replaced

    def spy(model, forward):
        def seen(hidden):
            found = forward(hidden)
            shapes.append(found.shape)
            return found

        return head(model, seen)

    monkeypatch.setattr(hf, "head_replaced", spy)
    token_stats_of(model, ids, labels, attention_mask=mask)
    assert shapes == [(3, 8, 1)]


def test_a_model_is_measured_once_and_again_when_its_config_changes(monkeypatch):
    model, (ids, labels, mask) = tiny_kind("granitemoe"), batch()
    measured, original = [], hf.logit_transform
    monkeypatch.setattr(hf, "logit_transform", lambda model: measured.append(0) or original(model))
    model.train()
    model.get_input_embeddings().training = False
    for _ in range(2):
        token_stats_of(model, ids, labels, attention_mask=mask)
    assert len(measured) == 1
    assert model.training and not model.get_input_embeddings().training  # each module as it was
    model.config.logits_scaling = 8.0
    before = token_stats_of(model.eval(), ids, labels, attention_mask=mask).logprob
    assert len(measured) == 2
    own = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    own = own.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0] * (labels[:, 1:] != -100)
    torch.testing.assert_close(before, own, **tiny.FORWARDS)


class Scaled(type(tiny.model())):
    """A model with a scale that its config does not name."""

    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = 1.01 * output.logits
        return output


def test_what_the_kernels_do_not_compute_is_refused():
    ids, labels, _ = batch()
    with pytest.raises(ValueError, match="Scaled does something to its logits"):
        token_stats_of(Scaled(tiny.model().config).eval(), ids, labels)
    with pytest.raises(ValueError, match=r"one shape \(batch, time\); they have \(3, 8\) and \(3, 7\)"):
        token_stats_of(tiny.model(), ids, labels[:, 1:])
    with pytest.raises(ValueError, match="ref_model has .*'logit_scale': 0.25.* both must agree"):
        token_stats_of(tiny.model(), ids, labels, ref_model=tiny_kind("granitemoe"))


def test_a_wrong_reading_is_refused(monkeypatch):
    monkeypatch.setattr(hf, "logit_transform", lambda model: {"logit_scale": 1.01, "softcap": None})
    ids, labels, _ = batch()
    with pytest.raises(
        ValueError, match="LlamaForCausalLM: with .* differ by .* nats from those of the model's own code"
    ):
        token_stats_of(tiny.model(), ids, labels)


def test_reinforce_in_ten_lines():
    """The example of docs/integrations.md learns to say pleasant words."""
    page = (Path(__file__).parents[1] / "docs" / "integrations.md").read_text()
    code = re.search(r"```python\n(import torch\n.*?token_stats_of.*?)```", page, re.DOTALL)[1]
    good = torch.tensor([tiny.WORDS.index(word) for word in ("good", "happy")])
    given = {"model": tiny.model(), "prompt_ids": torch.tensor([[2, 4]]).repeat(16, 1)}
    given["reward"] = lambda completion_ids: torch.isin(completion_ids, good).float().mean(-1)
    torch.manual_seed(0)
    exec(code, given)
    first, *_, last = given["rewards"]
    assert len(code.strip().splitlines()) <= 20 and last > first + 0.3, given["rewards"]
