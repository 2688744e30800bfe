"""The self-check before the first rollout stops what would train on wrong numbers, and disturbs nothing else."""

import dataclasses
import json
from types import SimpleNamespace

import datasets
import processes
import pytest
import tiny
import torch
from architectures import tiny_kind
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import is_progress_bar_enabled

from safe_train import parallel
from safe_train.config import ConfigError
from safe_train.run import self_check
from safe_train.run.checkpoints import Checkpoints
from safe_train.sampling.rollout import Mode

SIZES = {
    "vocab_size": len(tiny.WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
    "initializer_range": 0.3, "max_position_embeddings": 64,
}  # fmt: skip


def model(kind, **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | changes)).eval()


def refused(trainer, tmp_path, *words):
    """Before anything is sampled or written."""
    trainer.sampler = None
    with pytest.raises(ConfigError) as caught:
        trainer.train()
    assert all(word in str(caught.value) for word in words), caught.value
    assert not list(tmp_path.rglob("metrics.jsonl")) and not list(tmp_path.rglob("step-*"))


# Each part, broken on purpose


def test_a_head_with_another_scale(tmp_path):
    trainer = tiny.trainer(tmp_path)
    trainer.policy.logit_transform["logit_scale"] = 1.01
    refused(trainer, tmp_path, "the head of LlamaForCausalLM", "on the same hidden states")


def test_a_model_that_scales_its_logits_by_what_no_setting_says(tmp_path):
    class Scaled(type(tiny.model())):
        def forward(self, *arguments, **options):
            output = super().forward(*arguments, **options)
            output.logits = output.logits * 1.01
            return output

    scaled = tiny.model()
    scaled.__class__ = Scaled
    with pytest.raises(ConfigError, match="no scale or softcap of its config"):
        tiny.trainer(tmp_path, policy=scaled)


@pytest.mark.parametrize("kind", ["opt", "gpt2"])
def test_a_model_whose_mask_ignores_positions(kind, tmp_path):
    """Packed although no attention reads the boundaries: OPT makes its own positions, GPT-2 takes them."""
    changes = {"opt": {"ffn_dim": 48, "word_embed_proj_dim": 32}, "gpt2": {"n_positions": 64}}[kind]
    trainer = tiny.trainer(tmp_path, policy=model(kind, **changes), max_prompt_tokens=16)
    trainer.policy.layout = "packed"
    gap = self_check.mean_gap(*both_layouts(trainer))
    if gap > 0.01:
        refused(trainer, tmp_path, "layout packed", "sequences see one another", "Set layout to rows")
    else:
        self_check.self_check(trainer)
    assert (gap > 0.01) == (kind == "opt")


def both_layouts(trainer):
    batch = self_check.batch_of([[2, 3, 4, 5], [6, 7, 8], [9, 10, 11, 12, 13]])
    together, *_ = self_check.log_probs(trainer.policy, batch)
    with self_check.alone(trainer.policy):
        return together, self_check.log_probs(trainer.policy, batch)[0]


@pytest.mark.parametrize("lora_r", [0, 4])
def test_a_reference_that_is_not_the_policy_handed_over(lora_r, tmp_path):
    trainer = tiny.trainer(tmp_path, lora_r=lora_r)
    with torch.no_grad():
        for parameter in trainer.policy.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    refused(trainer, tmp_path, "the reference is not the policy that was handed over")


def test_a_reference_that_mixes_sequences_alone(tmp_path, monkeypatch):
    trainer = tiny.trainer(tmp_path, lora_r=0)
    frozen = trainer.policy.frozen_copies[0]
    right = frozen.forward

    def mixed(input_ids, attention_mask, **options):
        return right(input_ids=input_ids.roll(len(input_ids) - 1, 0), attention_mask=attention_mask, **options)

    monkeypatch.setattr(frozen, "forward", mixed)
    refused(trainer, tmp_path, "the reference, layout rows")


# What is right passes, and is not disturbed


@pytest.mark.parametrize("changes", [{}, {"lora_r": 0}, {"dtype": torch.bfloat16}, {"layout": "packed"},
                                     {"gradient_checkpointing": True}, {"reference": "base"}])  # fmt: skip
def test_what_is_right_passes_and_draws_no_random_number(changes, tmp_path):
    settings = dict(changes)
    dtype = settings.pop("dtype", torch.float32)
    trainer = tiny.trainer(tmp_path, policy=tiny.model().to(dtype), **settings)
    before, mode = torch.get_rng_state(), trainer.policy.training
    self_check.self_check(trainer)
    assert torch.equal(torch.get_rng_state(), before) and trainer.policy.training == mode
    assert trainer.policy.layout == changes.get("layout", "rows")


def test_it_runs_again_on_what_was_resumed(tmp_path, monkeypatch):
    tiny.trainer(tmp_path, total_steps=2).train()
    trainer = tiny.trainer(tmp_path, total_steps=3)
    right = Checkpoints.load

    def damaged(checkpoints, run, path):
        right(checkpoints, run, path)
        run.policy.logit_transform["logit_scale"] = 1.01

    monkeypatch.setattr(Checkpoints, "load", damaged)
    rows = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match="the head of LlamaForCausalLM"):
        trainer.train(resume_from_checkpoint=True)
    assert (tmp_path / "metrics.jsonl").read_text() == rows


def test_prompts_of_one_token_are_enough():
    assert self_check.sequences_of(of([5])) == [[5] * n for n in self_check.LENGTHS]
    assert self_check.sequences_of(of(list(range(20)), list(range(20, 40))))[1] == list(range(9, 25))
    assert self_check.sampled_prompts(of(list(range(40)))) == [list(range(7)), [9, 10, 11], [12, 13, 14]]


def test_sampling_is_tried_with_prompts_of_one_length_as_well(tmp_path):
    """RWKV's state is right for one row, and wrong for several."""
    trainer = tiny.trainer(tmp_path, policy=tiny_kind("rwkv"), lora_r=2, max_prompt_tokens=8, max_new_tokens=3)
    assert trainer.mode == Mode(padded=False, cached=False)


def of(*prompts):
    found = [SimpleNamespace(ids=ids) for ids in prompts]
    return SimpleNamespace(at=lambda start, count: [found[i % len(found)] for i in range(count)])


def on_process(folder, broken_rank):
    trainer = tiny.trainer(folder)
    if parallel.rank() == broken_rank:
        trainer.policy.logit_transform["logit_scale"] = 1.01
    assert is_progress_bar_enabled() is parallel.is_main() is not datasets.are_progress_bars_disabled()  # of one alone
    try:
        trainer.train()
    except ConfigError as error:
        return str(error)


@pytest.mark.slow
def test_processes_stop_together_with_the_same_message(tmp_path):
    found = processes.run(on_process, 2, tmp_path, 1)
    assert [outcome.exit_code for outcome in found] == [0, 0], found
    assert found[0].result == found[1].result and "the head of LlamaForCausalLM" in found[0].result


# The gap of each rollout


def test_a_rollout_that_was_sampled_elsewhere_stops_the_run_with_its_last_step_saved(tmp_path):
    trainer = tiny.trainer(tmp_path, total_steps=3, save_every=3)
    right = trainer.sampler

    def stale(prompts):
        found = right(prompts)
        if trainer.step < 1:
            return found
        logprobs = [[x - 0.5 for x in row] for row in found.sampler_logprobs]
        return dataclasses.replace(found, sampler_logprobs=logprobs)

    trainer.sampler = stale
    with pytest.raises(ConfigError, match=r"sampler_gap.*at most 0.01.*max_sampler_gap"):
        trainer.train()
    assert [path.name for path in Checkpoints(tmp_path, 3).complete()] == ["step-1"]
    (row,) = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row["step"] == 1 and row["sampler_gap"] < 1e-4
    resumed = tiny.trainer(tmp_path, total_steps=3, max_sampler_gap=1.0)
    resumed.sampler = stale_from(resumed)
    assert len(resumed.train(resume_from_checkpoint=True)) == 2


def stale_from(trainer):
    right = trainer.sampler

    def sample(prompts):
        found = right(prompts)
        logprobs = [[x - 0.5 for x in row] for row in found.sampler_logprobs]
        return dataclasses.replace(found, sampler_logprobs=logprobs)

    return sample


@pytest.mark.parametrize(
    ("dtype", "generation", "given", "largest"),
    [(torch.float32, "hf", None, 0.01), (torch.bfloat16, "hf", None, 0.15), (torch.bfloat16, "vllm", None, 0.3),
     (torch.bfloat16, "vllm", 0.05, 0.05)],
)  # fmt: skip
def test_limits_of_the_gap(dtype, generation, given, largest):
    class Experience:
        def tokens(self, name):
            return torch.zeros(5) if name == "logprob_L" else torch.full((5,), self.gap)

    args, experience = tiny.settings("", generation=generation, max_sampler_gap=given), Experience()
    experience.gap = 0.99 * largest
    self_check.check_sampler_gap(experience, dtype, args)
    for experience.gap in (1.01 * largest, float("nan")):
        with pytest.raises(ConfigError, match=f"at most {largest:g} is rounding"):
            self_check.check_sampler_gap(experience, dtype, args)
