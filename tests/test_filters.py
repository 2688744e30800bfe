"""Training on tokens that were drawn from a part of the vocabulary: top_k, top_p and min_p."""

import dataclasses
import itertools
import sys
from types import SimpleNamespace

import numpy
import pytest
import tiny
import torch
from test_export import export, trained
from test_vllm import LLM, SamplingParams, setting
from transformers import GenerationConfig, LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from safe_train.algorithms import losses
from safe_train.config import ConfigError, SafeConfig
from safe_train.data.batches import TokenBatch

FILTERS = {
    "top_k": ({"top_k": 5}, [TopKLogitsWarper(5)]),
    "top_p": ({"top_p": 0.7}, [TopPLogitsWarper(0.7)]),
    "min_p": ({"min_p": 0.2}, [MinPLogitsWarper(0.2)]),
    "all": (
        {"top_k": 9, "top_p": 0.9, "min_p": 0.05, "temperature": 1.3},
        [TopKLogitsWarper(9), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)],
    ),
}


def dense(kept, vocabulary):
    """[L, V]: which ids each token was drawn from."""
    is_kept = torch.zeros(len(kept.offsets) - 1, vocabulary, dtype=torch.bool)
    for row, (start, end) in enumerate(zip(kept.offsets[:-1].tolist(), kept.offsets[1:].tolist(), strict=True)):
        is_kept[row, kept.ids[start:end]] = True
    return is_kept


def logp(model, batch, temperature, is_kept):
    """[L, V] log-probs within the sets, in the dtype of the model, by its own forward."""
    rows, mask, place = batch.rows()
    logits = model(rows, attention_mask=mask).logits.flatten(0, 1)[place] / temperature
    return logits.masked_fill(~is_kept, -torch.inf).log_softmax(-1)


@pytest.mark.parametrize("name", FILTERS)
def test_what_a_token_was_drawn_from_is_what_the_filters_of_transformers_leave(name, tmp_path):
    settings, warpers = FILTERS[name]
    trainer = tiny.trainer(tmp_path, completions_per_prompt=8, **settings)
    rollout, temperature = trainer.sample(0), trainer.args.temperature
    assert len(rollout.kept) == len(rollout.completions)
    for prompt, tokens, kept, seen in zip(
        rollout.prompts, rollout.completions, rollout.kept, rollout.sampler_logprobs, strict=True
    ):
        batch = TokenBatch.pack([prompt.ids], [tokens])
        with torch.no_grad():
            whole = trainer.policy.causal_lm(batch.input_ids_N[None]).logits[0, len(prompt.ids) - 1 : -1] / temperature
        left = LogitsProcessorList(warpers)(None, whole)
        assert torch.equal(dense(kept, len(tiny.WORDS)), left > -torch.inf)
        expected = left.log_softmax(-1).gather(1, batch.targets_L[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(seen), expected, **tiny.FORWARDS)
    counts = torch.cat([kept.offsets.diff() for kept in rollout.kept])
    assert 1 <= counts.min() and counts.min() < counts.max() < len(tiny.WORDS) or name == "top_k"


@pytest.mark.parametrize("algorithm", ["safe", "ppo", "grpo", "cispo"])
def test_the_ratio_before_the_first_step_is_exactly_one(algorithm, tmp_path):
    settings = {"minibatch_size": None, "inner_epochs": 1, "total_steps": 2}
    rows = tiny.trainer(tmp_path, algorithm=algorithm, top_p=0.8, **settings).train()
    assert [row["ratio_mean"] for row in rows] == [pytest.approx(1.0, abs=1e-6)] * 2
    assert [row["approx_kl"] for row in rows] == [0.0] * 2
    assert max(row["sampler_gap"] for row in rows) < 1e-5


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_statistics_and_gradient_are_those_of_the_renormalised_policies(algorithm, tmp_path):
    """The right values from the model's own logits in float64, by autograd."""
    settings = {"algorithm": algorithm, "top_p": 0.8, "temperature": 1.2, "lora_r": 0, "beta": 0.3, "entropy_coef": 0.1}
    trainer = tiny.trainer(tmp_path, minibatch_size=None, max_tokens_per_microbatch=10_000, **settings)
    with torch.no_grad():  # away from the reference, so that the KL is not 0
        for parameter in trainer.trainable:
            parameter.add_(0.05 * torch.randn_like(parameter))
    experience, control = tiny.experience_of(trainer)
    (micro,) = experience
    batch, totals = micro.batch, losses.Totals(len(micro.logprob_L), len(micro.indices))
    is_kept = dense(batch.kept, len(tiny.WORDS))
    model, reference = (tiny.model().double() for _ in range(2))
    model.load_state_dict(trainer.policy.causal_lm.state_dict())
    p = logp(model, batch, 1.2, is_kept)
    with torch.no_grad():
        q = logp(reference, batch, 1.2, is_kept)
    here = {"logprob": p, "ref_logprob": q}
    expected = {name: x.gather(1, batch.targets_L[:, None])[:, 0] for name, x in here.items()}
    expected["entropy"] = -(p.exp() * p.masked_fill(~is_kept, 0)).sum(-1)
    expected["kl"] = (p.exp() * (p - q).masked_fill(~is_kept, 0)).sum(-1)
    for name, x in expected.items():
        torch.testing.assert_close(getattr(micro, f"{name}_L").double(), x.detach(), atol=1e-5, rtol=1e-5)
    assert expected["kl"].mean() > 0.01

    hidden, weights = trainer.engine.forward(batch), losses.token_weights(micro, totals, trainer.args)
    losses.policy_loss(hidden, trainer.policy.head(), micro, weights, control, trainer.args).loss.backward()
    ratio = (expected["logprob"] - expected["logprob"].detach()).exp()
    loss = -ratio * micro.advantage_L - 0.1 * expected["entropy"] + control.kl_coef * expected["kl"]
    (weights * loss).sum().backward()
    for own, right in zip(trainer.policy.causal_lm.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(own.grad.double(), right.grad, atol=2e-6, rtol=1e-4)


def test_a_filtered_run_learns_holds_its_budget_and_resumes_exactly(tmp_path):
    settings = {"algorithm": "grpo", "top_p": 0.9, "min_p": 0.02, "kl_budget": 0.1, "total_steps": 4}
    whole = tiny.trainer(tmp_path / "whole", **settings).train()
    tiny.trainer(tmp_path / "parts", **settings | {"total_steps": 2}).train()
    rest = tiny.trainer(tmp_path / "parts", **settings).train(resume_from_checkpoint=True)
    names = ("reward", "kl", "entropy", "policy_loss", "budget/kl")
    assert [[row[name] for name in names] for row in rest] == [[row[name] for name in names] for row in whole[2:]]
    assert all(row["budget/kl"] <= 0.1 for row in whole)


def test_a_greedy_completion_and_an_evaluation_are_of_the_policy(tmp_path):
    trainer = tiny.trainer(tmp_path, top_k=3, total_steps=1)
    plain = tiny.trainer(tmp_path / "plain", total_steps=1)
    prompts = trainer.prompts.at(0, 5)
    assert trainer.complete(prompts, greedy=True).completions == plain.complete(prompts, greedy=True).completions
    assert trainer.evaluate().kl == pytest.approx(0, abs=1e-6)


def test_the_published_algorithms_draw_from_the_top_k_and_score_the_whole_policy(tmp_path):
    trainer = tiny.trainer(tmp_path, algorithm="safe_paper", top_k=3, minibatch_size=None)
    rollout = trainer.sample(0)
    assert rollout.kept == [] and max(max(row) for row in rollout.sampler_logprobs) < 0
    for changes, message in (
        ({"top_p": 0.9}, "top_p must be left alone"),
        ({"min_p": 0.1}, "min_p must be left alone"),
    ):
        with pytest.raises(ConfigError, match=message):
            SafeConfig(algorithm="safe_paper", **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\]"),
        ({"min_p": 1.0}, r"min_p must be in \[0, 1\)"),
        ({"top_p": 0.9, "generation": "vllm"}, "top_k must be above 0 with top_p 0.9 with generation vllm"),
        ({"min_p": 0.1, "generation": "vllm"}, "top_k must be above 0 with min_p 0.1 with generation vllm"),
    ],
)
def test_what_a_filter_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        SafeConfig(**changes)


@pytest.mark.parametrize("form", ["lists", "offsets"])
def test_vllm_says_what_it_drew_from(form, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", stand_in(form))
    policy, prompts, sampler = setting(top_k=4, temperature=0.8)
    rollout = sampler(prompts)
    assert sampler.engine.settings["logprobs_mode"] == "processed_logprobs"
    batch = TokenBatch.pack([p.ids for p in rollout.prompts], rollout.completions, rollout.kept)
    counts = batch.kept.offsets.diff()
    assert counts.min() >= 1 and counts.max() == 4
    with torch.no_grad():
        expected = logp(policy.causal_lm, batch, 0.8, dense(batch.kept, len(tiny.WORDS)))
    seen = torch.tensor(sum(rollout.sampler_logprobs, []))
    torch.testing.assert_close(seen, expected.gather(1, batch.targets_L[:, None])[:, 0], **tiny.FORWARDS)
    assert sampler(prompts, greedy=True).kept == []


def test_a_vllm_that_does_not_say_it_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", stand_in("none"))
    with pytest.raises(ConfigError, match="vLLM 0.27.0 does not say which tokens top_k and top_p left"):
        setting(top_k=4)


def stand_in(form):
    def with_offsets(sets):
        offsets = [0, *itertools.accumulate(map(len, sets))]
        return SimpleNamespace(token_ids=numpy.array(sum(sets, [])), offsets=numpy.array(offsets))

    def without(model=""):
        """The arguments of an engine."""

    def with_masks(model="", return_sampling_mask=False):
        """The same of a newer one."""

    engine = type("Engine", (LLM,), {"as_mask": staticmethod(with_offsets)} if form == "offsets" else {})
    version, arguments = ("0.27.0", without) if form == "none" else ("0.28.0", with_masks)
    return SimpleNamespace(LLM=engine, SamplingParams=SamplingParams, EngineArgs=arguments, __version__=version)


def test_an_exported_model_is_sampled_as_it_was_trained(tmp_path, capsys):
    trained(tmp_path, top_p=0.9, min_p=0.02, temperature=0.7)
    assert export(tmp_path) == 0
    found = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (found.top_p, found.min_p, found.temperature, found.do_sample) == (0.9, 0.02, 0.7, True)
    said = capsys.readouterr().out
    assert "sample at temperature 0.7, top_p 0.9, min_p 0.02, at which it was trained" in said
    assert "the model's own top_k 20, without which it was trained" in said


def test_a_rollout_keeps_the_sets_of_what_is_taken_from_it(tmp_path):
    rollout = tiny.trainer(tmp_path, top_p=0.8).sample(0)
    order = [3, 0, 5]
    taken = rollout.take(order)
    assert all(torch.equal(a.ids, rollout.kept[i].ids) for a, i in zip(taken.kept, order, strict=True))
    assert dataclasses.replace(rollout, kept=[]).take(order).kept == []
