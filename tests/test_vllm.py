"""Sampling by vLLM, against a stand-in for its class `LLM`: the weights, stop tokens, seeds and log-probs of a rollout.

The stand-in computes with transformers and refuses what the engine could not do: to sample while asleep, without the
policy's weights, or with a KV cache of other weights.
"""

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from safe_train.config import ConfigError, SafeConfig
from safe_train.data.batches import TokenBatch
from safe_train.data.prompts import PromptDataset
from safe_train.models.policy import make_policy
from safe_train.models.scoring import logprobs
from safe_train.sampling.rollout import sample
from safe_train.sampling.samplers import make_sampler
from safe_train.sampling.vllm import merged_weights


@dataclasses.dataclass(kw_only=True)
class SamplingParams:
    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int
    stop_token_ids: list
    logprobs: int
    detokenize: bool
    seed: int


class EngineModel:
    """The engine's model: parameters of its own, and vLLM's way of loading them."""

    def __init__(self, model):
        self.model, self.loaded = model, None

    def named_parameters(self):
        return self.model.named_parameters()

    def load_weights(self, weights):
        own, self.loaded = dict(self.model.named_parameters()), set()
        for name, tensor in weights:
            own[name].data.copy_(tensor)
            self.loaded.add(name)
        return self.loaded


class LLM:
    def __init__(self, model, *, seed, dtype, load_format, skip_tokenizer_init, enable_sleep_mode, **settings):
        assert load_format == "dummy" and skip_tokenizer_init and enable_sleep_mode
        torch.manual_seed(seed)  # as vLLM does to the process it runs in
        config = AutoConfig.from_pretrained(model)
        assert config.architectures == ["LlamaForCausalLM"]
        self.model = EngineModel(AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval())
        self.settings, self.calls, self.last_tokens_left_out = settings, [], 0
        self.further_temperature = 1.0  # that no setting of the run says
        self.awake, self.cache_is_fresh = True, False

    def sleep(self, level):
        assert level == 1
        self.calls.append("sleep")
        self.awake = False

    def wake_up(self, tags=None):
        assert tags is None  # with tags, the newer versions ask for more of them
        self.calls.append("wake_up")
        self.awake = True

    def apply_model(self, function):
        assert self.awake
        self.calls.append("load")
        self.cache_is_fresh = False
        return [function(self.model)]

    def reset_prefix_cache(self):
        self.cache_is_fresh = True

    @torch.no_grad()
    def generate(self, prompts, sampling_params, use_tqdm):
        assert self.awake and self.cache_is_fresh and self.model.loaded
        self.calls.append("generate")
        return [self.complete(*pair) for pair in zip(prompts, sampling_params, strict=True)]

    def complete(self, prompt, params):
        assert (params.top_p, params.logprobs) == (1.0, 0)
        generator = torch.Generator().manual_seed(params.seed)
        tokens, logprobs, sets, reason = [], [], [], "length"
        while len(tokens) < params.max_tokens and reason == "length":
            ids = torch.tensor([prompt["prompt_token_ids"] + tokens])
            raw = self.model.model(ids, use_cache=False).logits[0, -1].float()
            drawn = raw / ((params.temperature or 1.0) * self.further_temperature)
            if params.top_k:
                drawn = drawn.masked_fill(drawn < drawn.topk(params.top_k).values[-1], -torch.inf)
            choice = (
                torch.multinomial(drawn.softmax(-1), 1, generator=generator) if params.temperature else raw.argmax()
            )
            tokens.append(choice.item())
            sets.append((drawn > -torch.inf).nonzero()[:, 0].tolist())
            is_raw = self.settings.get("logprobs_mode", "raw_logprobs") == "raw_logprobs"
            logprob = (raw if is_raw else drawn).log_softmax(-1)
            logprobs.append({tokens[-1]: SimpleNamespace(logprob=logprob[tokens[-1]].item())})
            reason = "stop" if tokens[-1] in params.stop_token_ids else "length"
        kept = len(tokens) - (self.last_tokens_left_out if reason == "stop" else 0)
        output = SimpleNamespace(token_ids=tokens[:kept], logprobs=logprobs[:kept], finish_reason=reason)
        if self.settings.get("return_sampling_mask"):
            assert params.temperature > 0 and params.top_k > 0
            output.sampling_mask = self.as_mask(sets[:kept])
        return SimpleNamespace(outputs=[output])

    as_mask = staticmethod(lambda sets: SimpleNamespace(token_ids=sets))


@pytest.fixture
def vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=SamplingParams))


def setting(model=None, **settings):
    torch.manual_seed(0)
    args = SafeConfig(**{"generation": "vllm", "max_new_tokens": 6, "max_prompt_tokens": 16, "lora_r": 4} | settings)
    tokenizer = tiny.tokenizer()
    policy = make_policy(model or tiny.model(), args)
    prompts = [p for p in PromptDataset(tiny.PROMPTS, tokenizer, 16).at(0, 5) for _ in range(4)]
    return policy, prompts, make_sampler(policy, tokenizer, args)


def scored(policy, rollout):
    batch = TokenBatch.pack([p.ids for p in rollout.prompts], rollout.completions)
    with torch.no_grad():
        return logprobs(policy(batch), policy.head(), batch.targets_L)


def optimizer_step(policy):
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    batch = TokenBatch.pack([[2, 3]], [[4, 5]])
    for _ in range(2):  # the first step moves LoRA's B only
        policy(batch).square().mean().backward()
        optimizer.step()


def test_greedy_completions_are_those_of_transformers(vllm):
    policy, prompts, sampler = setting()
    own = sample(policy, tiny.tokenizer(), prompts, dataclasses.replace(sampler.args, generation="hf"), greedy=True)
    drawn, greedy = sampler(prompts), sampler(prompts, greedy=True)
    assert greedy.completions == own.completions and drawn.completions != own.completions


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora_r", [0, 4])
def test_the_engine_has_the_policys_weights_after_each_optimizer_step(vllm, lora_r, tied):
    policy, prompts, sampler = setting(tiny.model(tie_word_embeddings=tied), lora_r=lora_r)
    first = sampler(prompts)
    torch.testing.assert_close(torch.tensor(sum(first.sampler_logprobs, [])), scored(policy, first), **tiny.FORWARDS)
    optimizer_step(policy)
    before = [parameter.clone() for parameter in policy.parameters()]
    rollout = sampler(prompts)
    recorded = torch.tensor(sum(rollout.sampler_logprobs, []))
    torch.testing.assert_close(recorded, scored(policy, rollout), **tiny.FORWARDS)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True)), "sampling moved the policy"
    merged = policy.model.merge_and_unload() if lora_r else policy.model
    engine = dict(sampler.engine.model.named_parameters())
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(engine[name], parameter, atol=1e-6, rtol=0)


def test_a_rollout_wakes_loads_samples_and_sleeps(vllm):
    _, prompts, sampler = setting(tiny.model(initializer_range=0.02))
    rollout = sampler(prompts)
    assert sampler.engine.calls == ["sleep", "wake_up", "load", "generate", "sleep"]
    assert rollout.prompts == prompts and {True, False} == set(rollout.ended)
    for tokens, recorded, ended in zip(rollout.completions, rollout.sampler_logprobs, rollout.ended, strict=True):
        assert tokens.count(1) == ended and (tokens[-1] == 1) == ended
        assert len(tokens) == len(recorded) and (ended or len(tokens) == 6)
    assert rollout.texts == tiny.tokenizer().batch_decode(rollout.completions, skip_special_tokens=True)


def test_random_numbers_are_those_of_the_run(vllm):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    policy, prompts, sampler = setting(tiny.model(seed=7))
    torch.manual_seed(7)
    again = make_sampler(policy, tiny.tokenizer(), sampler.args)
    assert torch.equal(torch.get_rng_state(), state), "starting the engine reseeded the run"
    first = sampler(prompts)
    torch.manual_seed(7)
    assert again(prompts).completions == first.completions != sampler(prompts).completions


def test_the_engine_gets_the_memory_and_length_of_the_settings(vllm, monkeypatch):
    _, _, sampler = setting(vllm_gpu_memory_utilization=0.4)
    assert sampler.engine.settings["gpu_memory_utilization"] == 0.4 and sampler.engine.settings["max_model_len"] == 22
    assert "distributed_executor_backend" not in sampler.engine.settings
    monkeypatch.setattr("safe_train.parallel.size", lambda: 2)
    monkeypatch.setattr("safe_train.parallel.rank", lambda: 0)
    assert setting()[2].engine.settings["distributed_executor_backend"] == "external_launcher"


def test_the_engine_sleeps_even_when_sampling_fails(vllm, monkeypatch):
    _, prompts, sampler = setting()
    monkeypatch.setattr(LLM, "complete", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sampler(prompts)
    assert sampler.engine.calls[-1] == "sleep"


def test_a_completion_without_its_end_token_is_an_error(vllm):
    _, prompts, sampler = setting(tiny.model(initializer_range=0.02))
    sampler.engine.last_tokens_left_out = 1
    with pytest.raises(RuntimeError, match=r"after \d of 6 tokens without an end token \[1\] \(finish reason 'stop'"):
        sampler(prompts)


def test_the_tokenizers_end_token_ends_a_completion_too(vllm):
    _, prompts, sampler = setting(tiny.model(initializer_range=0.02))
    sampler.tokenizer.eos_token = "cat"
    rollout = sampler(prompts)
    assert {tokens[-1] for tokens, ended in zip(rollout.completions, rollout.ended, strict=True) if ended} == {1, 4}


def test_weights_that_the_engine_does_not_know_are_an_error(vllm, monkeypatch):
    monkeypatch.setattr(
        EngineModel, "load_weights", lambda self, weights: {name for name, _ in weights if "norm" not in name}
    )
    _, prompts, sampler = setting()
    with pytest.raises(
        RuntimeError, match="got no weights for 5 of its parameters, such as model.layers.0.input_layern"
    ):
        sampler(prompts)


def test_merging_keeps_the_bits_of_the_policy_when_it_is_cut_short():
    policy = make_policy(tiny.model().to(torch.bfloat16), SafeConfig(lora_r=4))
    optimizer_step(policy)
    before = [(parameter.data_ptr(), parameter.clone()) for parameter in policy.parameters()]
    next(merged_weights(policy))
    weights = dict(merged_weights(policy))
    for (pointer, values), parameter in zip(before, policy.parameters(), strict=True):
        assert parameter.data_ptr() == pointer and torch.equal(values, parameter)
    merged = dict(policy.model.merge_and_unload().named_parameters())
    assert weights.keys() == merged.keys() and all(torch.equal(weights[name], merged[name]) for name in merged)


ADAPTED = {
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True, "lora_alpha": 3},
    "biases": {"bias": "all"},
    "a bias of LoRA's own": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "PiSSA": {"init_lora_weights": "pissa"},
    "a norm in a layer": {"modules_to_save": ["post_attention_layernorm"]},
    "a parameter": {"target_modules": [], "target_parameters": ["gate_proj.weight"]},
}


@pytest.mark.parametrize("kind", ADAPTED)
def test_the_engine_gets_all_that_is_trained(vllm, kind):
    """A plain model that loads what is sent computes what the policy does, whose own bits stay as they are."""
    plain = tiny.model(attention_bias=True)
    policy = make_policy(tiny.trained_adapter(tiny.model(attention_bias=True), **ADAPTED[kind]), SafeConfig())
    before = [parameter.clone() for parameter in policy.parameters()]
    sent = {name: weight.clone() for name, weight in merged_weights(policy)}
    assert sent.keys() == dict(plain.named_parameters()).keys()
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    plain.load_state_dict(sent)
    ids = torch.tensor([[2, 3, 4, 5, 6]])
    torch.testing.assert_close(plain(ids).logits, policy.model(ids).logits, atol=1e-4, rtol=0)


def test_adapters_that_cannot_be_merged_are_refused(vllm):
    args = SafeConfig(generation="vllm", max_new_tokens=6, max_prompt_tokens=16)
    policy = make_policy(tiny.trained_adapter(tiny.model(attention_bias=True), lora_bias=True), args)
    with pytest.raises(
        ConfigError, match="needs adapters that can be merged into the weights, .*the base layer has no bias"
    ):
        make_sampler(policy, tiny.tokenizer(), args)


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.norm.weight", "model.layers.1.mlp.down_proj.weight"])
def test_an_engine_with_other_weights_is_found_at_the_first_rollout(vllm, lost):
    """It says that it took them all."""
    _, prompts, sampler = setting()
    load = sampler.engine.model.load_weights

    def loses(weights):
        return load((name, torch.zeros_like(x) if name == lost else x) for name, x in weights)

    sampler.engine.model.load_weights = loses
    with pytest.raises(ConfigError, match="log-probs of vLLM's first completions differ from the policy's by"):
        sampler(prompts)


def test_a_run_and_its_evaluation_sample_by_vllm(vllm, tmp_path):
    trainer = tiny.trainer(tmp_path, generation="vllm", importance_cap=2.0, total_steps=2)
    history = trainer.train()
    assert trainer.sampler.engine.calls.count("generate") == 2
    assert all(row["sampler_gap_max"] < 2e-5 and abs(row["sampler_kl"]) < 1e-6 for row in history)
    trainer.evaluate()
    assert trainer.sampler.engine.calls.count("generate") == 4  # sampled and greedy


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_the_log_probs_are_those_that_were_drawn_from(vllm, tmp_path, temperature):
    history = tiny.trainer(
        tmp_path, generation="vllm", importance_cap=2.0, total_steps=2, temperature=temperature
    ).train()
    assert all(row["sampler_gap_max"] < 2e-5 for row in history)


def test_the_published_algorithms_draw_from_the_top_and_score_the_whole_policy(vllm, tmp_path):
    changes = {"algorithm": "safe_paper", "top_k": 3, "minibatch_size": None, "generation": "vllm"}
    assert all(row["sampler_gap_max"] < 2e-5 for row in tiny.trainer(tmp_path, **changes).train())
    with pytest.raises(ConfigError, match="temperature must be 1 with generation vllm and top_k, .*, got 0.7"):
        tiny.trainer(tmp_path, temperature=0.7, **changes)


@pytest.mark.parametrize("step", [0, 1])
def test_a_temperature_of_the_engines_own_stops_the_run(vllm, tmp_path, step):
    """At the first rollout, and at a later one."""
    trainer = tiny.trainer(tmp_path, generation="vllm", total_steps=3)
    right = trainer.sampler.engine.generate

    def hotter(*arguments, **options):
        trainer.sampler.engine.further_temperature = 1.0 if trainer.step < step else 3.0
        return right(*arguments, **options)

    trainer.sampler.engine.generate = hotter
    message = "the log-probs of vLLM's first completions differ" if step == 0 else r"\(sampler_gap\), at most 0.3"
    with pytest.raises(ConfigError, match=message):
        trainer.train()


def test_without_vllm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"pip install 'safe-kernels\[vllm\]', or set generation to hf"):
        setting()
