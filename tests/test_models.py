"""The policy: packed hidden states, the head's arguments, the reference, and what is switched off."""

import json
import sys
import types

import pytest
import tiny
import torch
import transformers
from architectures import tiny_kind, tiny_of
from memory import Allocations
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutput

from safe_kernels import linear_policy_loss, linear_token_stats
from safe_train.cli import main
from safe_train.config import ConfigError, SafeConfig
from safe_train.data.batches import TokenBatch
from safe_train.models.lora import lora_config
from safe_train.models.policy import apply_liger, make_policy, use_tensor_cores
from safe_train.models.pretrained import load_model, load_tokenizer
from safe_train.run.start import outline

SEQUENCES = ([[5, 6, 7, 2], [8], [9, 10]], [[11, 12], [13, 14, 3, 1], [1]])


ARCHITECTURES = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Gemma2": {"final_logit_softcapping": 3.0, "sliding_window": 64},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
    "Phi": {"tie_word_embeddings": False},  # its head has a bias
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
    torch.testing.assert_close(stats.logprob, expected, **tiny.FORWARDS)
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
        assert load_model(SafeConfig(model=str(tmp_path), lora_r=lora_r), torch.device("cuda")).dtype == dtype


def test_lora_multiplies_on_tensor_cores_beside_bfloat16_weights_on_a_gpu_alone():
    exact = torch.get_float32_matmul_precision()
    for device, dtype, precision in (
        ("cpu", torch.bfloat16, exact),
        ("cuda", torch.float32, exact),
        ("cuda", torch.bfloat16, "high"),
    ):
        use_tensor_cores(torch.device(device), dtype)
        found = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(exact)
        assert found == precision


def test_lora_reaches_the_linear_layers_of_gpt2(recwarn):
    config = GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=2, eos_token_id=1)
    policy = make_policy(GPT2LMHeadModel(config), SafeConfig(max_prompt_tokens=32, max_new_tokens=32))
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name, p in policy.named_parameters() if p.requires_grad}
    assert adapted == {"c_attn", "c_proj", "c_fc"} and not [w for w in recwarn if "fan_in" in str(w.message)]
    perturb(policy)
    batch = TokenBatch.pack(*SEQUENCES)
    with torch.no_grad():
        expected = torch.cat([alone(policy.model, p, c) for p, c in zip(*SEQUENCES, strict=True)])
        found = linear_token_stats(policy(batch), tokens=batch.targets_L, **policy.head()).logprob
    torch.testing.assert_close(found, expected, **tiny.FORWARDS)


def test_sequences_must_fit_the_models_positions():
    message = r"max_prompt_tokens \+ max_new_tokens must be at most 64, .* LlamaForCausalLM has .*, got 60 \+ 5"
    with pytest.raises(ConfigError, match=message):
        make_policy(tiny.model(max_position_embeddings=64), SafeConfig(max_prompt_tokens=60, max_new_tokens=5))
    make_policy(tiny.model(max_position_embeddings=64), SafeConfig(max_prompt_tokens=60, max_new_tokens=4))


POSITIONS = {  # as the configs of each kind have them
    "gpt2": "n_positions",
    "whisper": "max_target_positions",
    "mpt": "max_seq_len",
    "rwkv": "context_length",
    "kimi_linear": "model_max_length",
    "llama": "max_position_embeddings",
}


@pytest.mark.parametrize("kind", POSITIONS)
def test_positions_are_seen_by_any_name_before_the_weights_are_loaded(kind, tmp_path):
    tiny_kind(kind, **{POSITIONS[kind]: 64}).config.save_pretrained(tmp_path)  # and no weights
    for longest, message in ((49, r"at most 64, the positions that .* has .*, got 16 \+ 49"), (48, "cannot load")):
        args = SafeConfig(model=str(tmp_path), max_prompt_tokens=16, max_new_tokens=longest)
        with pytest.raises(ConfigError, match=message):
            load_model(args, torch.device("cpu"))


def test_a_rope_that_changes_is_seen_before_the_weights_are_loaded(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    tiny.model(max_position_embeddings=128, rope_parameters=rope).config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="its rope_type dynamic turns a token otherwise"):
        load_model(SafeConfig(model=str(tmp_path), max_prompt_tokens=60, max_new_tokens=5), torch.device("cpu"))


def with_forward(forward):
    """A tiny Llama with another forward than transformers gives it."""
    model = tiny.model()
    model.__class__ = type("Mine", (LlamaForCausalLM,), {"forward": forward})
    return model


def no_mask(self, input_ids, use_cache=None, labels=None):
    return LlamaForCausalLM.forward(self, input_ids=input_ids, use_cache=use_cache)


def as_dict(self, **inputs):
    return {"logits": LlamaForCausalLM.forward(self, **inputs).logits}


def as_tuple(self, **inputs):
    return LlamaForCausalLM.forward(self, **inputs).to_tuple()


def logits_alone(self, **inputs):
    return LlamaForCausalLM.forward(self, **inputs).logits


def without_logits(self, **inputs):
    output = LlamaForCausalLM.forward(self, **inputs)
    return BaseModelOutput(last_hidden_state=output.logits)


def of_pictures(self, pixel_values, **inputs):
    return LlamaForCausalLM.forward(self, **inputs)


FORWARDS = {
    of_pictures: "its forward must run on input_ids, attention_mask, use_cache alone, .*'pixel_values'",
    no_mask: "its forward must take input_ids, attention_mask, use_cache, and does not take attention_mask",
    as_dict: "its forward must return a ModelOutput with logits, .*returned a dict",
    as_tuple: "its forward must return a ModelOutput with logits, .*returned a tuple",
    logits_alone: "its forward must return a ModelOutput with logits, .*returned a Tensor",
    without_logits: "its forward must return a ModelOutput with logits, .*returned a BaseModelOutput",
}


@pytest.mark.parametrize("forward", FORWARDS)
def test_a_forward_that_is_not_transformers_own_is_refused_by_name(forward, tmp_path):
    with pytest.raises(ConfigError, match=f"^Mine cannot be trained: {FORWARDS[forward]}"):
        tiny.trainer(tmp_path, policy=with_forward(forward))


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_a_model_that_returns_tuples_by_its_config_is_told_so(kind, tmp_path):
    model = tiny_kind(kind, vocab_size=len(tiny.WORDS))
    model.config.return_dict = False
    with pytest.raises(ConfigError, match="ForCausalLM cannot be trained: .*set model.config.return_dict = True"):
        tiny.trainer(tmp_path, policy=model, max_prompt_tokens=16)


class Bare(torch.nn.Module):
    """A language model of nobody's."""

    def get_output_embeddings(self):
        return None


def test_a_model_that_is_not_transformers_is_refused_by_name(tmp_path):
    for model in (Bare(), LlamaModel(tiny.model().config)):
        with pytest.raises(ConfigError, match=f"the model is a {type(model).__name__}, which is not a causal language"):
            tiny.trainer(tmp_path, policy=model)


def test_a_model_that_transformers_does_not_know_is_an_error(tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "none"}')
    with pytest.raises(ConfigError, match="cannot load the model .*none"):
        load_model(SafeConfig(model=str(tmp_path)), torch.device("cpu"))


def test_a_model_whose_files_lack_a_weight_is_an_error(tmp_path):
    """transformers would fill it with random numbers, and print a table."""
    model = tiny.model()
    model.save_pretrained(tmp_path, state_dict={n: x for n, x in model.state_dict().items() if "1.mlp.down" not in n})
    tiny.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match="no weights for 1 of its tensors, such as model.layers.1.mlp.down_proj.weight"
    ):
        load_model(SafeConfig(model=str(tmp_path)), torch.device("cpu"))


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


@pytest.mark.parametrize("lora_r", [0, 4])
def test_generation_settings_of_the_model_are_its_own_but_while_the_policy_is_sampled(lora_r):
    model = tiny.model()
    own = {"top_k": 5, "temperature": 0.3, "repetition_penalty": 1.5, "eos_token_id": 1}
    model.generation_config.update(**own)
    policy = make_policy(model, SafeConfig(lora_r=lora_r))
    with pytest.raises(ZeroDivisionError), policy.sampling() as sampled:
        assert not own.items() & sampled.generation_config.to_dict().items()
        assert not own.items() & policy.causal_lm.generation_config.to_dict().items()
        _ = 1 / 0
    for each in (policy.model, policy.causal_lm):
        assert own.items() <= each.generation_config.to_dict().items()


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


def saved_bytes(policy):
    """Bytes that a forward keeps for its backward, beyond the weights."""
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.update({id(x): x}) or x, lambda x: x):
        policy(TokenBatch.pack(*SEQUENCES))
    weights = {p.untyped_storage()._cdata for p in policy.parameters()}
    return sum(x.nbytes for x in saved.values() if x.untyped_storage()._cdata not in weights)


def test_gradient_checkpointing_keeps_fewer_activations():
    settings = [SafeConfig(gradient_checkpointing=checkpointing) for checkpointing in (True, False)]
    few, many = (saved_bytes(make_policy(tiny.model(num_hidden_layers=6), args)) for args in settings)
    assert few < many / 3


def test_the_lora_reference_is_no_second_copy():
    model = tiny.model()
    before = {p.data_ptr(): p.nbytes for p in model.parameters()}
    policy = make_policy(model, SafeConfig(lora_r=4))
    after = {p.data_ptr(): p.nbytes for p in policy.parameters()}
    assert before.items() <= after.items()
    assert sum(after.values()) - sum(before.values()) == sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    batch = TokenBatch.pack(*SEQUENCES)
    with Allocations() as seen:
        policy.reference(batch)
    assert seen.largest <= batch.rows()[0].numel() * 48 * 4  # the widest activation; the embedding is wider


def test_no_logits_and_no_hidden_states_of_other_layers_are_stored(kernels):
    """A whole micro-batch, scored and trained through the policy: no tensor of [tokens, vocabulary]."""
    policy = make_policy(tiny.model(vocab_size=2000), SafeConfig(lora_r=4))
    draw = torch.Generator().manual_seed(0)
    prompts, completions = (torch.randint(2000, (4, n), generator=draw).tolist() for n in (3, 16))
    batch = TokenBatch.pack(prompts, completions)
    outputs = []
    policy.causal_lm.base_model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with Allocations() as seen:
        with torch.no_grad():
            ref_hidden_LH = policy.reference(batch)
            head = policy.head() | {"tokens": batch.targets_L, "ref_hidden": ref_hidden_LH, "backend": "torch"}
            old = linear_token_stats(policy(batch), **head)
        loss = linear_policy_loss(
            policy(batch), old_logprob=old.logprob, advantage=torch.ones_like(old.logprob), kl_coef=0.1, **head
        )
        loss.loss.backward()
    assert seen.largest < len(batch.targets_L) * 2000 * 4 / 4
    assert all(output.hidden_states is None and output.past_key_values is None for output in outputs)


@pytest.fixture
def liger(monkeypatch):
    """A stand-in for liger-kernel, and the calls it got."""
    calls = []
    package, subpackage, patch = (types.ModuleType(name) for name in ("liger_kernel", "transformers", "patch"))
    patch._apply_liger_kernel_to_instance = lambda **arguments: calls.append(arguments)
    patch.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", subpackage)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patch)
    return calls


@pytest.mark.parametrize("setting", ["auto", "true"])
def test_liger_is_applied_to_the_backbone_and_never_its_loss(setting, liger):
    model = tiny.model()
    apply_liger(model, setting, torch.device("cuda"))
    assert liger == [{"model": model, "cross_entropy": False, "fused_linear_cross_entropy": False}]


def test_liger_where_it_cannot_run(liger, monkeypatch):
    cuda, model, other = torch.device("cuda"), tiny.model(), tiny_of("Phi")
    apply_liger(model, "false", cuda)
    apply_liger(other, "auto", cuda)
    make_policy(tiny.model(), SafeConfig())
    with pytest.raises(ConfigError, match="liger_kernel true has no kernels for the model type 'phi'"):
        apply_liger(other, "true", cuda)
    with pytest.raises(ConfigError, match="liger_kernel true needs a GPU"):
        make_policy(tiny.model(), SafeConfig(liger_kernel=True))
    assert liger == []
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", None)
    apply_liger(model, "auto", cuda)
    with pytest.raises(ConfigError, match="liger_kernel true needs a package: pip install liger-kernel"):
        apply_liger(model, "true", cuda)


@pytest.mark.parametrize("name", ["qwen2.5-3b-hh.yaml", "qwen2.5-3b-fsdp.yaml"])
def test_ready_configs_run_on_a_small_local_model(name, tmp_path, monkeypatch):
    """The same code path on a CPU: a model folder, transcripts, the chat template, and a reward from a file."""
    monkeypatch.chdir(tmp_path)
    model, tokenizer = tiny_of("Qwen2", bos_token_id=None), tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    turns = ("the cat sat", "is a dog happy", "a tree under the mat")
    rows = [{"chosen": f"\n\nHuman: {turn}\n\nAssistant: it was", "rejected": "no"} for turn in turns]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "reward.py").write_text(
        "def good(prompts, completions, **columns):\n"
        "    return [sum(word in 'good happy' for word in turns[0]['content'].split()) for turns in completions]\n"
    )
    small = ["total_steps=2", "prompts_per_step=4", "max_new_tokens=5", "use_cpu=true", "output_dir=run"]
    small += ["model=model", "dataset=rows.jsonl", "eval_dataset=rows.jsonl", "reward=reward.py:good"]
    small += ["lora_r=4"] if "hh" in name else ["minibatch_size=2"]
    assert main(["run", "--config", name, *small]) == 0
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 2 and all(row["grad_norm"] > 0 for row in metrics)


def test_lora_is_put_on_the_named_layers_alone():
    policy = make_policy(tiny.model(), SafeConfig(lora_r=4, lora_target_modules=["v_proj", "down_proj"]))
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name, p in policy.named_parameters() if p.requires_grad}
    assert adapted == {"v_proj", "down_proj"}
    for wrong in ("lm_head", "c_attn"):
        with pytest.raises(ConfigError, match=rf"linear layers \(down_proj, gate_proj, .*\), got '{wrong}'"):
            make_policy(tiny.model(), SafeConfig(lora_target_modules=["q_proj", wrong]))


def test_a_revision_is_that_of_the_model_and_of_its_tokenizer(tmp_path, monkeypatch):
    tiny.model().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    asked = []

    def recording(load):
        return lambda *names, **options: asked.append(options["revision"]) or load(*names, **options)

    for kind in (transformers.AutoTokenizer, transformers.AutoModelForCausalLM):
        monkeypatch.setattr(kind, "from_pretrained", recording(kind.from_pretrained))
    for revision in (None, "v1.2"):
        args = SafeConfig(model=str(tmp_path), revision=revision)
        load_tokenizer(args), load_model(args, torch.device("cpu"))
    assert asked == ["main", "main", "v1.2", "v1.2"]


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_outline_of_a_model_counts_its_head_as_the_model_does(is_tied, tmp_path):
    """What the disk must hold is known before the weights are loaded."""
    model = tiny.model(tie_word_embeddings=is_tied)
    model.config.save_pretrained(tmp_path)
    made = outline(SafeConfig(model=str(tmp_path)))
    assert [p.shape for p in made.parameters()] == [p.shape for p in model.parameters()]
    assert all(p.is_meta for p in made.parameters())
