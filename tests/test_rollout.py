"""Sampling: from the policy itself, whatever the checkpoint's settings say, and the same as what is scored."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import tiny
import torch
from architectures import tiny_kind
from transformers import (
    CompileConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from safe_train.algorithms.advantages import credit
from safe_train.algorithms.losses import Totals, importance_corrected
from safe_train.config import ConfigError, SafeConfig
from safe_train.data.batches import TokenBatch
from safe_train.data.prompts import Prompt, PromptDataset
from safe_train.models.policy import make_policy
from safe_train.models.scoring import logprobs
from safe_train.rewards.rewards import Rewards
from safe_train.run.metrics import sampler_metrics
from safe_train.sampling.experience import Experience
from safe_train.sampling.rollout import (
    Mode,
    Rollout,
    choose_mode,
    chunks,
    end_tokens,
    equal_chunks,
    sample,
    static_cache,
)
from safe_train.sampling.samplers import make_sampler
from safe_train.sampling.stopping import StopStrings

PROBES = [[2, 3, 4, 5, 6, 7, 8], [2, 3, 4], [9, 4, 7]]  # prompts of two lengths


def rollout_of(model, rows=tiny.PROMPTS, copies=1, seed=0, **settings):
    args, tokenizer = SafeConfig(**{"max_new_tokens": 6} | settings), tiny.tokenizer()
    policy = make_policy(model, args)
    prompts = [prompt for prompt in PromptDataset(rows, tokenizer, 16).at(0, len(rows)) for _ in range(copies)]
    torch.manual_seed(seed)
    return policy, sample(policy, tokenizer, prompts, args)


def scored(policy, rollout):
    batch = TokenBatch.pack([p.ids for p in rollout.prompts], rollout.completions)
    with torch.no_grad():
        return logprobs(policy(batch), policy.head(), batch.targets_L)


def test_sampler_and_trainer_agree_on_the_log_probs():
    policy, rollout = rollout_of(tiny.model(), copies=3)
    sampler = torch.tensor(sum(rollout.sampler_logprobs, []))
    torch.testing.assert_close(sampler, scored(policy, rollout), **tiny.FORWARDS)


@pytest.mark.parametrize("settings", [{}, {"generation_batch_size": 300, "cache_implementation": "static"}])
def test_samples_follow_the_whole_distribution(settings):
    """With the top-k of 50 that transformers would use, or a checkpoint's top-k of 2, rare tokens never appear."""
    model = tiny.model(initializer_range=0.02, vocab_size=80)
    model.generation_config.update(do_sample=True, top_k=2, temperature=0.1, repetition_penalty=3.0)
    _, rollout = rollout_of(model, [{"prompt": "the"}], copies=1600, max_new_tokens=1, **settings)
    counts = torch.bincount(torch.tensor([tokens[0] for tokens in rollout.completions]), minlength=80)
    assert counts.min() >= 5 and counts.max() <= 60


def test_padding_does_not_change_the_distribution():
    policy, rollout = rollout_of(tiny.model(), [{"prompt": "the cat sat on a mat"}, {"prompt": "a"}], copies=4)
    torch.testing.assert_close(
        torch.tensor(sum(rollout.sampler_logprobs, [])), scored(policy, rollout), **tiny.FORWARDS
    )


def untied(**changes):
    return tiny.model(tie_word_embeddings=False, **changes)


def qwen2(**changes):
    return built(Qwen2ForCausalLM, Qwen2Config, max_window_layers=0, **changes)


def gemma2(**changes):
    return built(Gemma2ForCausalLM, Gemma2Config, sliding_window=5, head_dim=8, **changes)


def built(model, config, **changes):
    torch.manual_seed(0)
    return model(config(**{**tiny.model().config.to_diff_dict(), "model_type": config.model_type, **changes})).eval()


@pytest.mark.parametrize("make", [untied, qwen2, gemma2])
@pytest.mark.parametrize("lora_r", [0, 4])
def test_a_static_cache_samples_the_same(make, lora_r):
    rollouts = []
    for kind in ("dynamic", "static"):
        policy, rollout = rollout_of(make(), copies=3, max_new_tokens=8, cache_implementation=kind, lora_r=lora_r)
        rollouts.append(rollout)
        sampler = torch.tensor(sum(rollout.sampler_logprobs, []))
        torch.testing.assert_close(sampler, scored(policy, rollout), **tiny.FORWARDS)
    assert rollouts[0].completions == rollouts[1].completions


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_chunks_are_of_one_width_and_come_back_in_order(kind, monkeypatch):
    model, seen = tiny.model(), []
    original = type(model).generate

    def watched(self, input_ids, attention_mask, **arguments):
        seen.append((tuple(input_ids.shape), attention_mask.sum(1).tolist()))
        return original(self, input_ids=input_ids, attention_mask=attention_mask, **arguments)

    monkeypatch.setattr(type(model), "generate", watched)
    policy, rollout = rollout_of(model, copies=3, generation_batch_size=4, cache_implementation=kind)
    assert [shape[0] for shape, _ in seen] == [4, 4, 4, 4]
    assert all(lengths == sorted(lengths, reverse=True) for _, lengths in seen)
    assert [shape[1] for shape, _ in seen] == [6, 4, 3, 1]
    assert [len(prompt.ids) for prompt in rollout.prompts] != sorted(len(prompt.ids) for prompt in rollout.prompts)
    sampler = torch.tensor(sum(rollout.sampler_logprobs, []))
    torch.testing.assert_close(sampler, scored(policy, rollout), **tiny.FORWARDS)


def test_chunks_hold_every_index_and_waste_little():
    assert chunks([3, 1, 2], 8) == [[0, 1, 2]]
    assert chunks([3, 1, 2], 2) == [[0, 2], [1, 1]]
    for count in range(1, 12):
        for size in range(1, 12):
            groups = chunks(list(range(count)), size)
            assert len({len(group) for group in groups}) == 1 and len(groups[0]) <= size
            assert {i for group in groups for i in group} == set(range(count))
            assert sum(map(len, groups)) - count < len(groups)


def test_a_static_cache_is_for_gpus_and_models_that_compile():
    def chosen(kind, device, compiles):
        model = SimpleNamespace(
            device=torch.device(device), _can_compile_fullgraph=compiles, config=tiny.model().config
        )
        args = SafeConfig(cache_implementation=kind, max_prompt_tokens=7, max_new_tokens=4)
        return static_cache(SimpleNamespace(causal_lm=model), args)

    assert chosen("auto", "cpu", True) is chosen("auto", "cuda", False) is chosen("dynamic", "cuda", True) is None
    assert chosen("auto", "cuda", True).layers[0].max_cache_len == 11
    assert chosen("static", "cpu", False) is not None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_decoding_is_compiled_once_for_all_rollouts(checkpointing, monkeypatch):
    """As on a GPU, with another compiler: one graph, without breaks, for chunks and prompts of any length."""
    from torch._dynamo.utils import counters

    compiler = CompileConfig(backend="eager", mode=None, fullgraph=True)
    compiler._compile_all_devices = True
    monkeypatch.setattr(
        "safe_train.sampling.rollout.GenerationConfig", lambda **kw: GenerationConfig(compile_config=compiler, **kw)
    )
    torch._dynamo.reset()
    counters.clear()
    settings = {"cache_implementation": "static", "generation_batch_size": 2, "gradient_checkpointing": checkpointing}
    args, tokenizer = SafeConfig(max_new_tokens=6, **settings), tiny.tokenizer()
    policy, prompts = make_policy(tiny.model(num_hidden_layers=1), args), PromptDataset(tiny.PROMPTS, tokenizer, 16)
    sampler, addresses = make_sampler(policy, tokenizer, args), set()
    for step in range(2):
        rollout = sampler(prompts.at(3 * step, 3))
        addresses |= {cache.layers[0].keys.data_ptr() for cache in sampler.keywords["caches"].values()}
        recorded = torch.tensor(sum(rollout.sampler_logprobs, []))
        torch.testing.assert_close(recorded, scored(policy, rollout), **tiny.FORWARDS)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter += 0.01 * parameter.requires_grad
    assert counters["stats"]["unique_graphs"] == 1
    assert len(addresses) == 1  # to which CUDA graphs are bound


def test_the_sampler_follows_the_policy():
    args, tokenizer = SafeConfig(max_new_tokens=6), tiny.tokenizer()
    policy, prompts = make_policy(tiny.model(), args), PromptDataset(tiny.PROMPTS, tokenizer, 16).at(0, 5)
    sampler = make_sampler(policy, tokenizer, args)
    sampler(prompts)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    rollout = sampler(prompts)
    recorded = torch.tensor(sum(rollout.sampler_logprobs, []))
    torch.testing.assert_close(recorded, scored(policy, rollout), **tiny.FORWARDS)


def test_the_head_sees_whole_rows_in_generation():
    """From rows with gaps PyTorch would copy the head for each prompt."""
    policy, contiguous = make_policy(tiny.model(), SafeConfig()), []
    head = policy.causal_lm.get_output_embeddings()
    head.register_forward_hook(lambda _, inputs, output: contiguous.append(inputs[0].is_contiguous()))
    prompts = PromptDataset(tiny.PROMPTS, tiny.tokenizer(), 16).at(0, 4)
    sample(policy, tiny.tokenizer(), prompts, SafeConfig(max_new_tokens=3))
    assert len(contiguous) >= 2 and all(contiguous)
    assert not head._forward_pre_hooks


def test_sampler_metrics():
    sampler = torch.tensor([0.5, 0.3, 0.2])
    trainer = torch.tensor([0.4, 0.3, 0.3])
    metrics = sampler_metrics(trainer.log(), sampler.log())
    gaps = (trainer / sampler).log().abs()
    per_token = trainer / sampler - 1 - (trainer / sampler).log()
    expected = {"sampler_gap": gaps.mean(), "sampler_gap_max": gaps.max(), "sampler_kl": per_token.mean()}
    assert metrics == pytest.approx({name: value.item() for name, value in expected.items()}, abs=1e-6)
    exact_kl = (sampler * (sampler / trainer).log()).sum()
    assert (sampler * per_token).sum().item() == pytest.approx(exact_kl.item(), abs=1e-6)
    assert sampler_metrics(torch.zeros(0), torch.zeros(0)) == dict.fromkeys(metrics, 0.0)


def test_importance_weights():
    sampler, trainer = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.3, 0.3])

    def weights(cap):
        micro = SimpleNamespace(logprob_L=trainer.log(), sampler_logprob_L=sampler.log())
        return importance_corrected(torch.ones(3), micro, SafeConfig(importance_cap=cap))

    torch.testing.assert_close(weights(1.2), torch.tensor([0.8, 1.0, 1.2]))
    value, uncapped = torch.tensor([1.0, -2.0, 3.0]), weights(10.0)
    mean_under_sampler, mean_under_trainer = (sampler * uncapped * value).sum(), (trainer * value).sum()
    torch.testing.assert_close(mean_under_sampler, mean_under_trainer)


def test_importance_weights_are_off_unless_asked_for():
    weight = torch.full((2,), 0.5)
    micro = SimpleNamespace(logprob_L=torch.tensor([-1.0, -1.0]), sampler_logprob_L=torch.tensor([-1.0, -3.0]))
    assert importance_corrected(weight, micro, SafeConfig()) is weight
    capped = importance_corrected(weight, micro, SafeConfig(importance_cap=2.0))
    torch.testing.assert_close(capped, torch.tensor([0.5, 1.0]))


def test_importance_weights_scale_the_surrogate_and_not_the_critics(tmp_path):
    trainer = tiny.trainer(tmp_path, importance_cap=2.0, entropy_coef=0.0)
    rollout = trainer.sample(0)
    rewards = trainer.rewards(*rollout.for_rewards())["reward"]
    experience = Experience(trainer.policy, trainer.critic, rollout, trainer.args, trainer.device)
    control = trainer.update_controller(experience, rewards)
    credit(experience, trainer.training_rewards(rewards, rollout), control, trainer.args)
    micro, results = experience.minibatches[0][0], {}
    for ratio in (1.0, 0.5, 9.0):
        micro.sampler_logprob_L = micro.logprob_L - math.log(ratio)
        results[ratio] = trainer.backward(micro, control, Totals(len(micro.logprob_L), len(micro.indices)))
    policy, value = (
        {ratio: result[name] for ratio, result in results.items()} for name in ("policy_loss", "value_loss")
    )
    torch.testing.assert_close(policy[0.5], 0.5 * policy[1.0])
    torch.testing.assert_close(policy[9.0], 2.0 * policy[1.0])
    assert policy[1.0] != 0 and value[0.5] == value[9.0] == value[1.0]


def test_completions_end_with_their_first_end_token():
    _, rollout = rollout_of(tiny.model(), copies=40)
    assert {True, False} == set(rollout.ended)
    for tokens, recorded, ended in zip(rollout.completions, rollout.sampler_logprobs, rollout.ended, strict=True):
        assert tokens.count(1) == ended and (tokens[-1] == 1) == ended
        assert len(tokens) == len(recorded) and (ended or len(tokens) == 6)


def test_the_tokenizers_end_token_ends_a_completion_too():
    """A chat model may end its turns with another token than its texts."""
    args, tokenizer = SafeConfig(max_new_tokens=6), tiny.tokenizer()
    tokenizer.eos_token = "dog"
    policy = make_policy(tiny.model(), args)
    assert end_tokens(policy, tokenizer) == [1, tokenizer.eos_token_id]
    assert end_tokens(policy, tiny.tokenizer()) == [1]
    rollout = sample(policy, tokenizer, PromptDataset(tiny.PROMPTS, tokenizer, 16).at(0, 40), args)
    assert {tokens[-1] for tokens, ended in zip(rollout.completions, rollout.ended, strict=True) if ended} == {1, 5}
    assert not any({1, 5} & set(tokens[:-1]) for tokens in rollout.completions)
    tokenizer.eos_token = policy.model.generation_config.eos_token_id = None
    assert end_tokens(policy, tokenizer) == [1]  # by the model's config
    policy.model.config.eos_token_id = None
    assert end_tokens(policy, tokenizer) == []


@pytest.mark.parametrize(("behind", "ends"), [("<turn> and", [1, len(tiny.WORDS)]), (" and", [1]), ("", [1])])
def test_the_end_of_a_turn_ends_a_completion(behind, ends):
    """A base model's own end tokens end texts, not turns."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    policy = make_policy(tiny.model(), SafeConfig(max_new_tokens=6))
    assert end_tokens(policy, tokenizer) == [1]
    tokenizer.chat_template = "{% for m in messages %}" + "{{ m['content'] }}" + behind + "{% endfor %}"
    assert end_tokens(policy, tokenizer) == ends


def test_a_tokenizer_without_padding_samples_the_same():
    model, tokenizer, args = tiny.model(), tiny.tokenizer(), SafeConfig(max_new_tokens=6)
    policy, rollouts = make_policy(model, args), []
    for token in ("<pad>", None):
        tokenizer.pad_token = token
        torch.manual_seed(0)
        rollouts.append(sample(policy, tokenizer, PromptDataset(tiny.PROMPTS, tokenizer, 16).at(0, 5), args))
    assert rollouts[0].completions == rollouts[1].completions


def test_generation_leaves_the_training_mode_alone():
    policy, _ = rollout_of(tiny.model(), gradient_checkpointing=True)
    assert policy.model.training


def test_rewards_see_the_columns_and_chat_messages():
    seen = {}

    def watch(prompts, completions, answer, **columns):
        seen.update(prompts=prompts, completions=completions, answer=answer)
        return [1.0] * len(completions)

    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} and {% endfor %}"
    row = {"prompt": [{"role": "user", "content": "the cat"}], "answer": "dog"}
    args = SafeConfig(max_new_tokens=4)
    rollout = sample(make_policy(tiny.model(), args), tokenizer, PromptDataset([row], tokenizer, 8).at(0, 1), args)
    Rewards([watch])(*rollout.for_rewards())
    assert seen["answer"] == ["dog"] and seen["prompts"] == [row["prompt"]]
    assert seen["completions"] == [[{"role": "assistant", "content": rollout.texts[0]}]]


def test_rewards_see_the_columns_of_all_rows():
    prompts = [Prompt("the", [2], {"answer": "dog"}), Prompt("a", [3], {"answer": "cat", "level": 2})]
    rollout = Rollout(prompts, [[1], [1]], ["", ""], [True, True], [[0.0], [0.0]])
    assert rollout.for_rewards()[2] == {"answer": ["dog", "cat"], "level": [None, 2]}


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("llama", Mode(padded=True, cached=True)),
        ("whisper", Mode(padded=False, cached=True)),
        ("bart", Mode(padded=False, cached=True)),
        ("rwkv", Mode(padded=False, cached=False)),
    ],
)
def test_the_fastest_mode_that_samples_the_policy_is_chosen(kind, mode, capsys):
    args = SafeConfig(max_prompt_tokens=16, max_new_tokens=6, lora_r=2)
    policy = make_policy(tiny_kind(kind), args)
    before = torch.get_rng_state()
    assert choose_mode(policy, args, PROBES) == mode
    assert torch.equal(before, torch.get_rng_state())
    assert ("log-probs differ by" in capsys.readouterr().out) == (kind != "llama")
    tokenizer = tiny.tokenizer()
    prompts = [prompt for prompt in PromptDataset(tiny.PROMPTS, tokenizer, 8).at(0, 5) for _ in range(2)]
    rollout = make_sampler(policy, tokenizer, args, mode)(prompts)
    assert rollout.prompts == prompts
    recorded = torch.tensor(sum(rollout.sampler_logprobs, []))
    torch.testing.assert_close(recorded, scored(policy, rollout), atol=1e-4, rtol=0)


def test_groups_of_equal_length_hold_every_index():
    assert equal_chunks([3, 1, 3, 3, 1], 2) == [[0, 2], [3], [1, 4]]
    assert equal_chunks([2], 8) == [[0]]


@pytest.mark.parametrize("kind", ["roberta", "xmod"])
def test_a_model_that_no_mode_samples_right_is_refused(kind):
    """Their own forward counts positions otherwise than their code for generation."""
    args = SafeConfig(max_prompt_tokens=16, max_new_tokens=6)
    with pytest.raises(ConfigError, match="cannot be sampled from: padded, .*; in groups .* without a cache"):
        choose_mode(make_policy(tiny_kind(kind), args), args, PROBES)


class Processed(LogitsProcessor):
    """What a model's own code for generation may do to its scores, beside what it was told to."""

    def __init__(self, change):
        self.change = change

    def __call__(self, input_ids, scores):
        return self.change(scores)


CHANGES = {
    "another temperature": lambda scores: scores / 0.9,
    "a filter": lambda scores: scores.masked_fill(scores < scores.topk(3).values[:, -1:], -torch.inf),
    "a penalty": lambda scores: scores - 0.3 * torch.arange(scores.shape[1]),
}


def generating_with(change, model=None):
    """A model that applies the change in each `generate`, before the processors that it is given."""
    model = tiny.model() if model is None else model
    original = type(model)._get_logits_processor

    def with_change(self, *arguments, logits_processor, **options):
        first = LogitsProcessorList([Processed(change), *logits_processor])
        return original(self, *arguments, logits_processor=first, **options)

    model._get_logits_processor = with_change.__get__(model)
    return model


@pytest.mark.parametrize("kind", CHANGES)
def test_a_model_that_samples_from_another_distribution_stops_the_run(kind, tmp_path):
    with pytest.raises(ConfigError, match="LlamaForCausalLM cannot be sampled from: padded, log-probs differ by"):
        tiny.trainer(tmp_path, policy=generating_with(CHANGES[kind]))
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("kind", CHANGES)
def test_the_gap_of_each_rollout_shows_another_distribution(kind, tmp_path):
    trainer = tiny.trainer(tmp_path)
    generating_with(CHANGES[kind], trainer.policy.causal_lm)
    with pytest.raises(ConfigError, match=r"log-probs differ by .* \(sampler_gap\), at most 0.01 is rounding"):
        trainer.train()


def test_what_is_left_out_of_the_models_settings_is_said(tmp_path, capsys):
    tiny.trainer(tmp_path)
    assert "settings for generation" not in capsys.readouterr().out
    model = tiny.model()
    model.generation_config.update(top_p=0.8, top_k=20, repetition_penalty=1.05, temperature=1.0, eos_token_id=[1, 4])
    tiny.trainer(tmp_path, policy=model, temperature=0.7)
    assert (
        "sampling at temperature 0.7, without the model's own settings for generation: top_k 20, top_p 0.8, "
        "repetition_penalty 1.05\n"
    ) in capsys.readouterr().out


def test_settings_of_the_model_for_generation_change_no_rollout(tmp_path):
    """Those of a checkpoint, and those that a callback sets while the run goes on; the model keeps them."""
    rollouts = []
    for own in ({}, {"do_sample": True, "temperature": 0.1, "top_k": 2, "min_p": 0.9, "repetition_penalty": 3.0}):
        trainer = tiny.trainer(tmp_path, temperature=1.3)
        trainer.policy.causal_lm.generation_config.update(**own)
        rollouts.append(trainer.sample(0))
        assert own.items() <= trainer.policy.causal_lm.generation_config.to_dict().items()
    assert rollouts[0] == rollouts[1]


def test_stop_tokens_and_strings_end_completions():
    """A string may span tokens; one that the prompt has, or began, does not count."""
    tokenizer, policy = tiny.tokenizer(), make_policy(tiny.model(), SafeConfig())
    prompts = [prompt for prompt in PromptDataset(tiny.PROMPTS, tokenizer, 16).at(0, 5) for _ in range(20)]
    plain = sample(policy, tokenizer, prompts, SafeConfig(max_new_tokens=8)).completions
    pairs = Counter(pair for tokens in plain for pair in zip(tokens, tokens[1:], strict=False) if 5 not in pair)
    (first, second), _ = next(pair for pair in pairs.most_common() if 1 not in pair[0])
    args = SafeConfig(max_new_tokens=8, stop_tokens=["dog"], stop_strings=[f"{tiny.WORDS[first]} {tiny.WORDS[second]}"])
    assert end_tokens(policy, tokenizer, args) == [5]
    began = [{"prompt": f"{args.stop_strings[0]} {tiny.WORDS[first]}"}]
    prompts += [prompt for prompt in PromptDataset(began, tokenizer, 16).at(0, 1) for _ in range(60)]
    rollout = sample(policy, tokenizer, prompts, args)

    def is_end(tokens):
        return tokens[-1] == 5 or tokens[-2:] == [first, second]

    ends = set()
    for tokens, recorded, ended in zip(rollout.completions, rollout.sampler_logprobs, rollout.ended, strict=True):
        assert ended == is_end(tokens) and (ended or len(tokens) == 8) and len(recorded) == len(tokens)
        assert not any(is_end(tokens[:end]) for end in range(1, len(tokens)))
        ends.add(tokens[-1] if ended else None)
    assert ends == {5, second, None}
    assert any(tokens[0] == second and len(tokens) > 1 for tokens in rollout.completions[100:])


def test_a_stop_string_is_completed_by_the_last_token_of_the_completion_alone():
    stops = StopStrings(tiny.tokenizer(), ["a cat"])
    rows = torch.tensor([tiny.tokenizer()(text)["input_ids"] for text in ("the a cat", "a cat the", "dog the cat")])
    assert [stops.behind(width)(rows, None).tolist() for width in (1, 2)] == [[True, False, False], [False] * 3]
    assert stops.through_first(rows[:2].flatten().tolist()) == (rows[0].tolist(), True)


def test_a_stop_token_that_the_model_does_not_have_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="stop_tokens: '<end>' is no token .* stop_strings takes any text"):
        tiny.trainer(tmp_path, stop_tokens=["<end>"])
    with pytest.raises(ConfigError, match="stop_strings must be null with generation vllm"):
        SafeConfig(generation="vllm", stop_strings=["a"])
