"""Every causal kind of transformers: log-probs are those of the model's own logits, or the model is refused by name.

The list is transformers' own, so a new kind is tried the day it appears.
"""

import pytest
import tiny
import torch
from architectures import IS_CURRENT, KINDS, SPECIAL, needs_current, tiny_config, tiny_kind
from transformers import AutoConfig, AutoModelForImageTextToText

from safe_train.config import ConfigError, SafeConfig
from safe_train.data.batches import TokenBatch
from safe_train.models import scoring
from safe_train.models.lora import lora_config
from safe_train.models.pretrained import load_model

# Longer than the windows and chunks of 4 tokens, and of different lengths.
SEQUENCES = ([[5, 6, 7, 3], [8], [9, 10]], [[11, 12, 13, 14, 15, 20], [13, 14, 3, 9], [4]])

# They want settings of their own, or a package that is not installed: what a tiny one would be is not known here.
NOT_BUILT = {
    *("blt", "dbrx", "dots3_note", "dots3_note_text", "gemma3n", "gemma4_assistant", "gemma4_unified_assistant"),
    *("musicgen", "musicgen_melody", "phi4_multimodal", "qwen4_exp", "qwen4_exp_text", "xlstm"),
}


# One step of one optimizer step, whose sequences share a micro-batch.
SETTINGS = {"total_steps": 1, "max_new_tokens": 3, "max_prompt_tokens": 8}
SETTINGS |= {"inner_epochs": 1, "minibatch_size": 8, "max_tokens_per_microbatch": 96}


@torch.no_grad()
def own_logprobs(model):
    """Log-probs of the responses by the model's own forward, one sequence at a time; no cache, as in training."""
    found = []
    for prompt, response in zip(*SEQUENCES, strict=True):
        ids = torch.tensor([prompt + response])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        logits = logits[0, len(prompt) - 1 : -1]
        found.append(logits.float().log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(found)


@torch.no_grad()
def policy_logprobs(trainer):
    batch = TokenBatch.pack(*SEQUENCES)
    return scoring.logprobs(trainer.policy(batch), trainer.policy.head(), batch.targets_L)


def verdict(kind, folder):
    """What becomes of a run on this kind: its log-probs, then a step with LoRA and sampling."""
    try:
        model = tiny_kind(kind)
        expected = own_logprobs(model)
    except Exception:
        if IS_CURRENT:
            raise
        return "not made"
    head = model.get_output_embeddings()
    if IS_CURRENT and head is not None and head.weight.shape[1] > 64:
        return "not tiny"  # its log-probs would be so large that float32 rounds them by the bound below
    try:
        trainer = tiny.trainer(folder, policy=model, **SETTINGS)
    except ConfigError as error:
        assert type(model).__name__ in str(error)
        return "refused"
    if not (policy_logprobs(trainer) - expected).abs().max() < 1e-4:
        return "wrong"
    (row,) = trainer.train()
    assert row["sampler_gap"] < 1e-4 and row["kl"] < 1e-5 and row["grad_norm"] > 0, row
    return "trained"


@pytest.mark.slow
def test_every_causal_kind_is_right_or_refused(tmp_path):
    verdicts = {}
    for kind in KINDS:
        if kind in NOT_BUILT:
            continue
        try:
            verdicts[kind] = verdict(kind, tmp_path / kind)
        except Exception as error:  # noqa: BLE001 (each kind's own, to be named below)
            verdicts[kind] = f"{type(error).__name__}: {error}"
    trained = [kind for kind, what in verdicts.items() if what == "trained"]
    refused = [kind for kind, what in verdicts.items() if what in ("refused", "not made")]
    print(f"{len(trained)} of {len(verdicts)} train right, refused: {', '.join(refused)}")
    wrong = {kind: what for kind, what in verdicts.items() if kind not in (*trained, *refused)}
    assert wrong == ({} if IS_CURRENT else {"doge": "wrong"})
    assert len(trained) >= (145 if IS_CURRENT else 110), refused


COMPOSITE = {
    "gemma3": ("model.vision_tower.", "model.multi_modal_projector."),
    "mistral3": ("model.vision_tower.", "model.multi_modal_projector."),
    "qwen2_5_vl": ("model.visual.",),
    "qwen3_vl": ("model.visual.",),
    "smolvlm": ("model.vision_model.", "model.connector."),
}


def composite(kind):
    torch.manual_seed(0)
    config = tiny_config(type(AutoConfig.for_model(kind)), SPECIAL.get(kind, {}))
    return AutoModelForImageTextToText.from_config(config).eval()


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=needs_current) if kind.startswith("qwen") else kind for kind in COMPOSITE]
)
def test_the_language_model_of_a_composite_one_is_trained_and_saved_with_the_rest(kind, tmp_path):
    model = composite(kind)
    towers = {name: p.clone() for name, p in model.named_parameters() if name.startswith(COMPOSITE[kind])}
    expected = own_logprobs(model)
    settings = SETTINGS | {"lora_r": 0}
    trainer = tiny.trainer(tmp_path, policy=model, **settings)
    assert (policy_logprobs(trainer) - expected).abs().max() < 1e-4
    trained = {id(p) for p in trainer.trainable}
    names = {name for name, p in trainer.policy.model.named_parameters() if id(p) not in trained}
    assert towers and names == towers.keys()
    trainer.train()
    own = dict(trainer.policy.model.named_parameters())
    assert all(torch.equal(own[name], p) for name, p in towers.items())
    found = policy_logprobs(trainer)
    assert (found - expected).abs().max() > 1e-3

    folder = tmp_path / "checkpoints" / "step-1" / "policy"
    again = load_model(SafeConfig(model=str(folder), **settings), torch.device("cpu"))
    assert type(again) is type(model)
    assert (own_logprobs(again.eval()) - found).abs().max() < 1e-4
    assert all(torch.equal(dict(again.named_parameters())[name], p) for name, p in towers.items())


@pytest.mark.parametrize("kind", COMPOSITE)
def test_lora_is_put_on_the_language_model_alone(kind, tmp_path):
    trainer = tiny.trainer(tmp_path, policy=composite(kind), lora_r=2, lora_last_layers=1, max_prompt_tokens=8)
    adapted = {name for name, p in trainer.policy.causal_lm.named_parameters() if p.requires_grad}
    assert adapted and not any(name.startswith(COMPOSITE[kind]) for name in adapted)
    assert all(".layers.1." in name for name in adapted)


def test_lora_leaves_out_what_is_read_without_a_call_and_what_only_has_the_name():
    """peft refuses Mamba's `out_proj`; CTRL's layers are called 0 and 2, as its blocks are; a router is left out."""
    args = SafeConfig(lora_r=2)
    assert "out_proj" not in lora_config(tiny_kind("mamba"), args).target_modules
    assert "out_proj" in lora_config(tiny_kind("opt"), args).target_modules
    ctrl = lora_config(tiny_kind("ctrl"), args)
    assert "0" in ctrl.target_modules and "transformer.h.0" in ctrl.exclude_modules
    assert "router" not in lora_config(tiny_kind("phimoe"), args).target_modules
    assert "o_a_proj" not in lora_config(tiny_kind("deepseek_v4"), args).target_modules
    assert "query_key_value" in lora_config(tiny_kind("falcon"), args).target_modules  # a Linear of Falcon's own
