"""The policy: packed hidden states, the head's arguments, the reference, and what is switched off."""

import pytest
import tiny
import torch
import transformers

from safe_kernels import linear_token_stats
from safe_train.config import ConfigError, SafeConfig
from safe_train.data import TokenBatch
from safe_train.models import load_model, lora_config, make_policy

SEQUENCES = ([[5, 6, 7, 2], [8], [9, 10]], [[11, 12], [13, 14, 3, 1], [1]])


def tiny_of(architecture: str, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=2, eos_token_id=1, initializer_range=0.3,
        attn_implementation="eager", **settings)  # fmt: skip
    return getattr(transformers, f"{architecture}ForCausalLM")(config).eval()


ARCHITECTURES = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Gemma2": {"final_logit_softcapping": 3.0, "sliding_window": 64},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
}


def alone(model, prompt, completion):
    """Log-probs of one sequence's response, from the model's own logits."""
    ids = torch.tensor([prompt + completion])
    logits = model(input_ids=ids).logits[0].float()
    positions = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
    return logits.log_softmax(-1)[positions, ids[0, positions + 1]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_statistics_equal_the_models_own_logits_one_sequence_at_a_time(architecture):
    model = tiny_of(architecture, **ARCHITECTURES[architecture])
    with torch.no_grad():
        expected = torch.cat([alone(model, p, c) for p, c in zip(*SEQUENCES, strict=True)])
        policy = make_policy(model, SafeConfig(lora_r=0))
        batch = TokenBatch.pack(*SEQUENCES)
        stats = linear_token_stats(
            policy(batch), tokens=batch.targets_L, ref_hidden=policy.reference(batch), **policy.head()
        )
    torch.testing.assert_close(stats.logprob, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(stats.kl, torch.zeros_like(stats.kl), atol=1e-6, rtol=0)


def perturb(policy):
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize("lora_r", [0, 4])
def test_reference_stays_where_it_was_when_the_policy_moves(lora_r):
    policy, batch = make_policy(tiny.model(), SafeConfig(lora_r=lora_r)), TokenBatch.pack(*SEQUENCES)
    before, head = policy.reference(batch), policy.head()
    ref_weight = head.get("ref_weight", head["weight"]).clone()
    perturb(policy)
    assert not torch.equal(policy(batch), before)
    assert torch.equal(policy.reference(batch), before)
    assert torch.equal(policy.head().get("ref_weight", policy.head()["weight"]), ref_weight)


def test_lora_trains_no_weight_of_the_model_and_shares_the_head():
    policy = make_policy(tiny.model(), SafeConfig(lora_r=4))
    assert all("lora_" in name for name, p in policy.named_parameters() if p.requires_grad)
    assert "ref_weight" not in policy.head() and not policy.head()["weight"].requires_grad


def test_trained_weights_are_float32_and_frozen_ones_bfloat16_on_a_gpu(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    for lora_r, dtype in ((0, torch.float32), (4, torch.bfloat16)):
        assert load_model(str(tmp_path), SafeConfig(lora_r=lora_r), torch.device("cuda"))[0].dtype == dtype


def test_lora_on_the_last_layers_only():
    policy = make_policy(tiny.model(num_hidden_layers=3), SafeConfig(lora_r=4, lora_last_layers=1))
    names = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert names and all("layers.2." in name for name in names)


def test_dropout_is_off_even_in_training_mode():
    """With dropout in the update and none in the rollout, the published ratio is not 1 before any update."""
    model = tiny.model(attention_dropout=0.5)
    config = lora_config(model, SafeConfig())
    config.lora_dropout = 0.5
    policy, batch = make_policy(model, SafeConfig(), config), TokenBatch.pack(*SEQUENCES)
    perturb(policy)
    policy.train()
    assert torch.equal(policy(batch), policy(batch))


def test_generation_settings_of_the_checkpoint_are_dropped():
    model = tiny.model()
    model.generation_config.update(top_k=5, temperature=0.3, repetition_penalty=1.5, eos_token_id=1)
    kept = make_policy(model, SafeConfig()).causal_lm.generation_config.to_diff_dict()
    assert not {"top_k", "temperature", "repetition_penalty"} & kept.keys() and kept["eos_token_id"] == 1


def test_adapted_head_and_frozen_policy_are_refused():
    config = lora_config(tiny.model(), SafeConfig())
    config.target_modules = ["lm_head"]
    with pytest.raises(ConfigError, match="output head must be a plain Linear"):
        make_policy(tiny.model(), SafeConfig(), config)
    with pytest.raises(ConfigError, match="no trainable parameter"):
        make_policy(tiny.model().requires_grad_(False), SafeConfig(lora_r=0))


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        policy = make_policy(tiny.model(), SafeConfig(gradient_checkpointing=checkpointing))
        torch.manual_seed(1)
        perturb(policy)
        policy(TokenBatch.pack(*SEQUENCES)).square().sum().backward()
        gradients.append([p.grad for p in policy.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
