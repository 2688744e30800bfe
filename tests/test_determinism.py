"""What is random in a model is off, by whatever name; and switches of PyTorch that the run would obey are refused."""

import contextlib
import random

import numpy as np
import pytest
import tiny
import torch
import transformers
from architectures import tiny_of

from safe_train.config import ConfigError, SafeConfig
from safe_train.data.batches import TokenBatch
from safe_train.models.policy import make_policy
from safe_train.randomness import python_generators

BATCH = TokenBatch.pack([[2, 3, 4], [9]], [[5, 6, 7, 8], [10, 1]])


def opt():
    """Dropout in the layers themselves, and layers that are left out at random."""
    config = transformers.OPTConfig(
        vocab_size=40, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=1024, pad_token_id=0, bos_token_id=2, eos_token_id=1, dropout=0.5, layerdrop=0.5,
        activation_dropout=0.5, attention_dropout=0.5,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def gpt_neo():
    """The rate is read from the config in each forward."""
    config = transformers.GPTNeoConfig(
        vocab_size=40, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global"], 2]],
        max_position_embeddings=1024, bos_token_id=2, eos_token_id=1, attention_dropout=0.5, resid_dropout=0.5,
    )  # fmt: skip
    return transformers.GPTNeoForCausalLM(config)


def falcon():
    """The rates are read from the config, too."""
    config = transformers.FalconConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, attention_dropout=0.5,
        hidden_dropout=0.5, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    return transformers.FalconForCausalLM(config)


MODELS = {
    "OPT": opt,
    "GPT-Neo": gpt_neo,
    "Falcon": falcon,
    "Mixtral": lambda: tiny_of("Mixtral", num_local_experts=4, router_jitter_noise=0.5),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_two_forwards_in_training_mode_are_bit_equal(name, checkpointing):
    torch.manual_seed(0)
    policy = make_policy(MODELS[name](), SafeConfig(gradient_checkpointing=checkpointing, lora_r=0))
    policy.train()
    assert torch.equal(policy(BATCH), policy(BATCH))


@pytest.mark.parametrize("rate", [0.01, 0.5])
def test_a_rate_that_decides_in_evaluation_stays(rate):
    """PhiMoE's `router_jitter_noise` is a threshold; its other jitter goes."""
    model = tiny_of("Phimoe", vocab_size=64, num_local_experts=4, router_jitter_noise=rate, input_jitter_noise=0.5)
    ids = torch.arange(60).view(3, 20)
    with torch.no_grad():
        expected = model(ids).logits
        policy = make_policy(model, SafeConfig(lora_r=0))
        for found in (policy.causal_lm, *policy.frozen_copies):
            torch.testing.assert_close(found(ids).logits, expected, rtol=0, atol=1e-5)
    assert {config.router_jitter_noise for config in (model.config, policy.causal_lm.config)} == {rate}
    assert policy.causal_lm.config.input_jitter_noise == 0


def test_a_model_that_samples_its_experts_in_training_is_refused_with_gradient_checkpointing(tmp_path):
    def phimoe():
        return tiny_of("Phimoe", num_local_experts=4, router_jitter_noise=0.5)

    tiny.trainer(tmp_path, policy=phimoe(), lora_r=0)
    with pytest.raises(ConfigError, match="two forwards of PhimoeForCausalLM .* set gradient_checkpointing to false"):
        tiny.trainer(tmp_path, policy=phimoe(), lora_r=0, gradient_checkpointing=True)


DRAWS = {"torch": lambda: torch.rand(()).item(), "python": random.random, "numpy": np.random.rand}


def shaken(by, probability=1.0, draw=DRAWS["torch"]):
    """A model that is random in training, now and then, in a way that no name tells."""
    model = tiny.model()
    model.model.norm.register_forward_hook(
        lambda module, _, output: output + by * (module.training and draw() < probability)
    )
    return model


@pytest.mark.parametrize("source", DRAWS)
@pytest.mark.parametrize("probability", [0.5, 0.25])
def test_what_is_random_under_another_name_is_refused(probability, source, tmp_path):
    draw = DRAWS[source]
    with pytest.raises(ConfigError, match="two forwards of LlamaForCausalLM on the same tokens differ by"):
        tiny.trainer(tmp_path, policy=shaken(1e-3, probability, draw), gradient_checkpointing=True)
    tiny.trainer(tmp_path, policy=shaken(1e-3, probability, draw))  # in evaluation mode, in which it is off


@pytest.mark.parametrize("source", DRAWS)
def test_numbers_that_are_drawn_to_no_effect_are_none_of_the_runs(source, tmp_path):
    states = []
    for by in (None, 0.0):
        model = tiny.model() if by is None else shaken(by, draw=DRAWS[source])
        tiny.trainer(tmp_path, policy=model, gradient_checkpointing=True)
        states.append((torch.get_rng_state().tolist(), python_generators()))
    assert states[0] == states[1]


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


LEFT_ON = {
    "default dtype is torch.bfloat16; call torch.set_default_dtype": default_dtype,
    "default device is meta": lambda: torch.device("meta"),
    "gradients are switched off": torch.no_grad,
    "gradients are switched off; leave": torch.inference_mode,
    "autocast is on for cpu": lambda: torch.autocast("cpu"),
}


@pytest.mark.parametrize("message", LEFT_ON)
def test_a_switch_that_user_code_left_on_is_refused(message, tmp_path):
    model, trainer = tiny.model(), tiny.trainer(tmp_path)
    with LEFT_ON[message](), pytest.raises(ConfigError, match=message):
        tiny.trainer(tmp_path, policy=model)
    with LEFT_ON[message](), pytest.raises(ConfigError, match=message):
        trainer.train()
    assert not (tmp_path / "metrics.jsonl").exists()
