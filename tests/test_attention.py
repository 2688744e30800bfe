"""Attention of packed forwards: each implementation equals one sequence at a time; auto takes the fastest possible."""

import inspect

import pytest
import tiny
import torch
import transformers
from architectures import tiny_of
from memory import Allocations
from torch.nn.attention.varlen import varlen_attn
from transformers import modeling_flash_attention_utils as flash_utils
from transformers import modeling_utils

from safe_kernels import linear_token_stats
from safe_train.config import ConfigError, SafeConfig
from safe_train.data.batches import TokenBatch
from safe_train.data.prompts import Prompt
from safe_train.models import attention
from safe_train.models.attention import boundaries, choose_attention, generation_attention, obstacle, use_attention
from safe_train.models.policy import make_policy
from safe_train.sampling.rollout import sample

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WINDOW = 4
SEQUENCES = (
    [[5, 6, 7, 2, 9, 11], [8], [9, 10], [3, 4, 21]],
    [[11, 12, 30, 31, 17], [13, 14, 3, 1], [1], [7, 8, 9, 10, 11, 12, 13]],
)  # the longest of them is three windows long
ARCHITECTURES = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen2 with windows": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "Mistral": {"sliding_window": WINDOW},
    "Gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "sliding_window": WINDOW},
    "Phi": {"tie_word_embeddings": False},  # its head has a bias
}


def model_of(architecture, **settings):
    return tiny_of(architecture.split()[0], **ARCHITECTURES[architecture] | settings)


def plain_varlen(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False,
    softcap=None,
):  # fmt: skip
    """What `torch.nn.attention.varlen.varlen_attn` computes, one sequence at a time in plain PyTorch."""
    starts = cu_seq_q.tolist()
    assert cu_seq_q.dtype == torch.int32 and starts == cu_seq_k.tolist() and starts[-1] == len(query)
    assert max_q == max_k == max(b - a for a, b in zip(starts, starts[1:], strict=False)) and type(max_q) is int
    assert enable_gqa or query.shape[1] == key.shape[1]
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    outputs = []
    for a, b in zip(starts, starts[1:], strict=False):
        scores = torch.einsum("qhd,khd->hqk", query[a:b], key[a:b]) * (scale or query.shape[-1] ** -0.5)
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        back = torch.arange(b - a)[:, None] - torch.arange(b - a)
        seen = (back >= -window_size[1]) & ((back <= window_size[0]) | (window_size[0] < 0))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, value[a:b]))
    return torch.cat(outputs)


def flash_package(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False,
                  window_size=(-1, -1), softcap=0.0):  # fmt: skip
    """`flash_attn_varlen_func` of the package flash-attn, in plain PyTorch."""
    assert causal
    return plain_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale=softmax_scale,
        window_size=(window_size[0], 0), enable_gqa=True, softcap=softcap,
    )  # fmt: skip


@pytest.fixture
def stand_ins(monkeypatch):
    """The implementations that need a GPU, with plain PyTorch where their kernels would run."""
    is_of_5_0 = not hasattr(modeling_utils.PreTrainedModel, "_flash_attn_can_dispatch")
    functions = (flash_package, flash_package, *[None] * (2 if is_of_5_0 else 3))
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *_, **__: functions)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    check = "_flash_attn_2_can_dispatch" if is_of_5_0 else "_flash_attn_can_dispatch"
    monkeypatch.setattr(modeling_utils.PreTrainedModel, check, lambda *_, **__: True)
    monkeypatch.setattr(modeling_utils, "is_kernels_available", lambda: False)
    monkeypatch.setattr(attention, "varlen_attn", plain_varlen)


def use_everywhere(policy, name):
    """As `make_policy` would where the implementation can run: for the policy and its frozen copy."""
    for model in (policy.causal_lm, *policy.frozen_copies):
        use_attention(model, name)
    policy.layout = "packed" if name in attention.FLASH else "rows"


def packed_results(policy, sequences=SEQUENCES):
    """Hidden states, and gradients of a loss that reads every response token, of one packed forward."""
    batch = TokenBatch.pack(*sequences).to(policy.causal_lm.device)
    hidden_LH, ref_hidden_LH = policy(batch), policy.reference(batch)
    logprob_L = linear_token_stats(hidden_LH, tokens=batch.targets_L, ref_hidden=ref_hidden_LH, **policy.head()).logprob
    return results(policy.causal_lm, hidden_LH, logprob_L)


def results_alone(model, sequences=SEQUENCES):
    """The same from the model's own forward, one sequence at a time."""
    states, logprobs = [], []
    for prompt, completion in zip(*sequences, strict=True):
        ids = torch.tensor([prompt + completion], device=model.device)
        at = torch.arange(len(prompt) - 1, ids.shape[1] - 1, device=model.device)
        states.append(model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, at])
        logits = model(input_ids=ids, use_cache=False).logits[0, at]
        logprobs.append(logits.log_softmax(-1).gather(-1, ids[0, at + 1, None])[:, 0])
    return results(model, torch.cat(states), torch.cat(logprobs))


def results(model, hidden_LH, logprob_L):
    model.zero_grad()
    (logprob_L * torch.linspace(-1, 2, len(logprob_L), device=logprob_L.device)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"hidden": hidden_LH.detach(), **gradients}


def hold(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        error = (found[name].double() - x.double()).abs().max().item()
        assert error <= tolerance * max(1.0, x.abs().max().item()), f"{name}: {error}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["auto", "eager", "varlen", "flash_attention_2"])
def test_together_equals_one_sequence_at_a_time(architecture, name, stand_ins):
    if architecture == "Gemma2" and name == "varlen":
        pytest.skip("varlen_attn has no softcap; test_what_cannot_run_is_named_with_the_reason")
    # In eager attention's float32 softmax the mask of float64 is -inf, and a padded token that sees nothing NaN.
    model = model_of(architecture).to(torch.float32 if name in ("auto", "eager") else torch.float64)
    expected = results_alone(model)
    policy = make_policy(model, SafeConfig(lora_r=0))
    if name != "auto":
        use_everywhere(policy, name)
    tolerance = 2e-5  # norms and eager's softmax are float32 whatever the model is
    hold(packed_results(policy), expected, tolerance)
    hold({"hidden": policy.reference(TokenBatch.pack(*SEQUENCES))}, {"hidden": expected["hidden"]}, tolerance)


def test_the_windows_of_these_models_matter():
    for architecture in ("Qwen2 with windows", "Mistral", "Gemma2"):
        narrow, wide = (model_of(architecture, sliding_window=window) for window in (WINDOW, 64))
        assert (results_alone(narrow)["hidden"] - results_alone(wide)["hidden"]).abs().max() > 0.01


def test_stand_in_has_the_signature_of_the_installed_function():
    ours, theirs = (inspect.signature(f).parameters for f in (plain_varlen, varlen_attn))
    if "window_size" not in theirs:
        pytest.skip("attention uses the varlen_attn of torch 2.11 and newer")
    assert set(ours) - set(theirs) <= {"softcap", "enable_gqa"}  # torch 2.11 has no `enable_gqa`
    assert all(ours[name].kind == theirs[name].kind for name in ours if name in theirs)
    assert list(ours)[:7] == list(theirs)[:7]


def test_varlen_without_grouped_heads_repeats_them(stand_ins, monkeypatch):
    model = model_of("Llama")
    expected = results_alone(model)
    policy = make_policy(model, SafeConfig(lora_r=0))
    use_everywhere(policy, "varlen")
    names = list(inspect.signature(plain_varlen).parameters)[:7]

    def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        return plain_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)

    assert list(inspect.signature(older).parameters)[:7] == names
    monkeypatch.setattr(attention, "varlen_attn", older)
    hold(packed_results(policy), expected, 2e-5)


def test_flash_needs_no_mask_and_gets_boundaries(stand_ins, monkeypatch):
    """A mask would be N x N; the longest length is a number on the host, so nothing waits for the device."""
    model, batch = model_of("Qwen2 with windows"), TokenBatch.pack(*SEQUENCES)
    assert boundaries(model, batch) == {}  # sdpa reads position_ids
    calls = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        calls.append((attention_mask, kwargs["sliding_window"], kwargs["max_length_q"]))
        return varlen(module, query, key, value, attention_mask, **kwargs)

    varlen = attention.varlen_attention
    monkeypatch.setattr(attention, "varlen_attention", spy)
    policy = make_policy(model, SafeConfig(lora_r=0))
    use_everywhere(policy, "varlen")
    policy(batch)
    assert calls == [(None, None, 11), (None, WINDOW, 11)]
    given = boundaries(policy.causal_lm, batch)
    assert given.keys() == flash_utils.FlashAttentionKwargs.__annotations__.keys()
    assert given["cu_seq_lens_q"] is batch.cu_seqlens and given["max_length_q"] == 11


def test_a_forward_with_varlen_never_waits_for_the_device(monkeypatch):
    monkeypatch.setattr(attention, "varlen_attn", lambda query, *_, **options: query)
    policy, batch = make_policy(model_of("Mistral"), SafeConfig(lora_r=4)), TokenBatch.pack(*SEQUENCES)
    use_everywhere(policy, "varlen")
    with Allocations() as seen:
        policy(batch)
        policy.reference(batch)
    assert not seen.operators & {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::equal"}


@pytest.mark.parametrize("name", ["sdpa", "varlen", "flash_attention_2"])
def test_recomputed_layers_know_the_boundaries_too(name, stand_ins):
    """Gradient checkpointing of a packed forward with LoRA."""
    gradients = []
    for checkpointing in (False, True):
        args = SafeConfig(lora_r=4, gradient_checkpointing=checkpointing)
        policy = make_policy(model_of("Qwen2 with windows"), args)
        use_everywhere(policy, name)
        for i, parameter in enumerate(p for p in policy.parameters() if p.requires_grad):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))
        gradients.append(packed_results(policy))
    assert any("lora_A" in key for key in gradients[0])
    hold(gradients[1], gradients[0], 1e-6)


@pytest.mark.parametrize("architecture", ["Llama", "Gemma2"])
@pytest.mark.parametrize("name", ["varlen", "flash_attention_2"])
def test_generation_pads_and_caches_whatever_trains(architecture, name, stand_ins):
    """Left padding and a cache need a mask; the sampler's log-probs are those of the packed forward."""
    if architecture == "Gemma2" and name == "varlen":
        pytest.skip("varlen_attn has no softcap")
    policy = make_policy(model_of(architecture), SafeConfig(lora_r=0))
    use_everywhere(policy, name)
    prompts = [Prompt("", ids, {}) for ids in SEQUENCES[0]]
    tokenizer = tiny.tokenizer()
    tokenizer.batch_decode = lambda rows, **_: [str(row) for row in rows]  # its vocabulary is smaller
    rollout = sample(policy, tokenizer, prompts, SafeConfig(max_new_tokens=7))
    assert policy.causal_lm.config._attn_implementation == name
    batch = TokenBatch.pack([p.ids for p in prompts], rollout.completions)
    states = {"hidden": policy(batch), "ref_hidden": policy.reference(batch)}
    logprob_L = linear_token_stats(**states, tokens=batch.targets_L, **policy.head()).logprob
    sampled = torch.tensor(sum(rollout.sampler_logprobs, []))
    torch.testing.assert_close(logprob_L.detach(), sampled, **tiny.FORWARDS)


@pytest.mark.parametrize("changes", [{}, {"lora_r": 0, "gradient_checkpointing": True, "eval_every": 1}])
@pytest.mark.parametrize("name", ["varlen", "flash_attention_2"])
def test_a_run_where_only_packed_forwards_are_possible(name, changes, stand_ins, monkeypatch, tmp_path):
    """Checks, sampling, training, evaluation and resuming, as on a GPU."""
    monkeypatch.setattr(attention, "obstacle", lambda chosen, *_: "")
    settings = {"attn_implementation": name, "total_steps": 2, "save_every": 1, "liger_kernel": "false"} | changes
    run = tiny.trainer(tmp_path, policy=tiny.model(), **settings)
    run.train()
    assert run.policy.layout == "packed" and run.policy.causal_lm.config._attn_implementation == name
    resumed = tiny.trainer(tmp_path, policy=tiny.model(), **settings | {"total_steps": 3})
    assert len(resumed.train(resume_from_checkpoint=True)) >= 1 and resumed.step == 3


def test_generation_attention():
    for name, expected in (("sdpa", "sdpa"), ("eager", "eager"), ("varlen", "sdpa")):
        model = model_of("Llama")
        use_attention(model, name)
        assert generation_attention(model) == expected
    gemma = model_of("Gemma2")
    use_attention(gemma, "flex_attention")
    assert generation_attention(gemma) == "eager"


@pytest.fixture
def gpu(monkeypatch):
    """An environment to choose in: a GPU of compute capability 9.0, no package of FlashAttention, torch 2.11."""

    def install(packages=(), capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(attention, "varlen_attn", plain_varlen)
        for version in (2, 3):
            check = f"is_flash_attn_{version}_available"
            monkeypatch.setattr(transformers.utils, check, lambda version=version: version in packages)

    install()
    return install


@pytest.mark.parametrize(
    ("architecture", "packages", "capability", "dtype", "expected"),
    [
        ("Qwen2", (2, 3), (9, 0), torch.bfloat16, "flash_attention_3"),
        ("Qwen2", (2,), (9, 0), torch.float16, "flash_attention_2"),
        ("Qwen2", (), (8, 0), torch.bfloat16, "varlen"),
        ("Mistral", (), (9, 0), torch.bfloat16, "varlen"),
        ("Qwen2", (), (7, 5), torch.float16, "sdpa"),
        ("Qwen2", (2, 3), (9, 0), torch.float32, "sdpa"),
        ("Gemma2", (2,), (9, 0), torch.bfloat16, "flash_attention_2"),
        ("Gemma2", (), (9, 0), torch.bfloat16, "flex_attention"),
    ],
)
def test_auto_takes_the_fastest_on_a_gpu(architecture, packages, capability, dtype, expected, gpu):
    gpu(packages, capability)
    assert choose_attention("auto", model_of(architecture), CUDA, dtype) == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_auto_on_a_cpu_is_sdpa_or_eager_for_softcap(architecture):
    policy = make_policy(model_of(architecture), SafeConfig(lora_r=0))
    assert policy.causal_lm.config._attn_implementation == ("eager" if architecture == "Gemma2" else "sdpa")


@pytest.mark.parametrize("name", ["flash_attention_3", "flash_attention_2", "varlen", "flex_attention"])
def test_what_needs_a_gpu_is_refused_without_one(name):
    with pytest.raises(ConfigError, match=f"attn_implementation {name} needs a GPU to train on, the device is cpu"):
        make_policy(model_of("Llama"), SafeConfig(attn_implementation=name))


def test_what_cannot_run_is_named_with_the_reason(gpu, monkeypatch):
    half, llama, gemma = torch.bfloat16, model_of("Llama"), model_of("Gemma2")
    assert "pip install 'safe-kernels[flash]'" in obstacle("flash_attention_2", llama, CUDA, half)
    assert "flash-attn-3" in obstacle("flash_attention_3", llama, CUDA, half)
    assert "16-bit dtype, the model runs in torch.float32" in obstacle("varlen", llama, CUDA, torch.float32)
    assert "has no softcap" in obstacle("varlen", gemma, CUDA, half)
    assert "has no softcap" in obstacle("sdpa", gemma, CPU, half)
    assert "this model's heads have 12" in obstacle("varlen", model_of("Llama", width=24, heads=2), CUDA, half)
    llama.sinks = torch.nn.Parameter(torch.zeros(4))
    assert "no attention sinks" in obstacle("varlen", llama, CUDA, half)
    llama.config.layer_types = ["chunked_attention", "full_attention"]
    assert "has no chunked_attention" in obstacle("flash_attention_2", llama, CUDA, half)
    monkeypatch.setattr(attention, "varlen_attn", None)
    assert "needs torch 2.11" in obstacle("varlen", model_of("Llama"), CUDA, half)


def test_a_model_that_cannot_be_switched_keeps_what_it_has(monkeypatch):
    model = model_of("Llama", attn_implementation="eager")
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    assert choose_attention("auto", model, CPU, torch.float32) == "eager"
    with pytest.raises(ConfigError, match="sdpa cannot be set for LlamaForCausalLM"):
        choose_attention("sdpa", model, CPU, torch.float32)


def test_varlen_refuses_what_it_cannot_compute():
    x = torch.zeros(1, 2, 3, 8)
    with pytest.raises(NotImplementedError, match="no softcap"):
        attention.varlen_attention(None, x, x, x, None, softcap=2.0)
    with pytest.raises(NotImplementedError, match="no dropout"):
        attention.varlen_attention(None, x, x, x, None, dropout=0.1)
    with pytest.raises(ValueError, match="needs a packed forward"):
        attention.varlen_attention(None, x, x, x, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs with -m gpu on a CUDA device")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", ["flash_attention_3", "flash_attention_2", "varlen", "sdpa", "flex_attention"])
def test_on_a_gpu_packed_is_no_worse_than_eager_alone(architecture, name):
    """Against float32 one sequence at a time: errors in bfloat16 at most twice those of eager attention in bfloat16."""
    draw = torch.Generator().manual_seed(0)
    lengths = [(40, 100), (1, 1), (7, 300), (128, 128)]
    sequences = tuple([torch.randint(3, 40, (pair[k],), generator=draw).tolist() for pair in lengths] for k in (0, 1))
    settings = {"width": 256, "initializer_range": 0.05}
    exact = results_alone(model_of(architecture, **settings).to(CUDA), sequences)
    half = model_of(architecture, **settings).to(CUDA, torch.bfloat16)
    if reason := obstacle(name, half, CUDA, torch.bfloat16):
        pytest.skip(f"{name} {reason}")
    plain = results_alone(half, sequences)
    found = packed_results(make_policy(half, SafeConfig(lora_r=0, attn_implementation=name)), sequences)
    for key, x in exact.items():
        allowed = 2 * (plain[key].float() - x).abs().max() + 1e-3 * x.abs().max()
        assert (found[key].float() - x).abs().max() <= allowed, key
