"""Sampling: from the policy itself, whatever the checkpoint's settings say, and the same as what is scored."""

import pytest
import tiny
import torch

from safe_train.config import ConfigError, SafeConfig
from safe_train.data import PromptDataset, TokenBatch
from safe_train.losses import linear_token_stats
from safe_train.models import make_policy
from safe_train.rewards import Rewards, load_reward, text_of
from safe_train.rollout import sample


def rollout_of(model, rows=tiny.PROMPTS, copies=1, seed=0, **settings):
    args, tokenizer = SafeConfig(**{"max_new_tokens": 6} | settings), tiny.tokenizer()
    policy = make_policy(model, args)
    prompts = [prompt for prompt in PromptDataset(rows, tokenizer, 16).at(0, len(rows)) for _ in range(copies)]
    torch.manual_seed(seed)
    return policy, sample(policy, tokenizer, prompts, args)


def scored(policy, rollout):
    batch = TokenBatch.pack([p.ids for p in rollout.prompts], rollout.completions)
    with torch.no_grad():
        return linear_token_stats(policy(batch), tokens=batch.targets_L, **policy.head()).logprob


def test_sampler_and_trainer_agree_on_the_log_probs():
    policy, rollout = rollout_of(tiny.model(), copies=3)
    sampler = torch.tensor(sum(rollout.sampler_logprobs, []))
    torch.testing.assert_close(sampler, scored(policy, rollout), atol=2e-5, rtol=0)


def test_samples_follow_the_whole_distribution():
    """With the top-k of 50 that transformers would use, or a checkpoint's top-k of 2, rare tokens never appear."""
    model = tiny.model(initializer_range=0.02, vocab_size=80)
    model.generation_config.update(do_sample=True, top_k=2, temperature=0.1, repetition_penalty=3.0)
    _, rollout = rollout_of(model, [{"prompt": "the"}], copies=1600, max_new_tokens=1)
    counts = torch.bincount(torch.tensor([tokens[0] for tokens in rollout.completions]), minlength=80)
    assert counts.min() >= 5 and counts.max() <= 60


def test_padding_does_not_change_the_distribution():
    policy, rollout = rollout_of(tiny.model(), [{"prompt": "the cat sat on a mat"}, {"prompt": "a"}], copies=4)
    torch.testing.assert_close(
        torch.tensor(sum(rollout.sampler_logprobs, [])), scored(policy, rollout), atol=2e-5, rtol=0
    )


def test_completions_end_with_their_first_end_token():
    _, rollout = rollout_of(tiny.model(), copies=40)
    assert {True, False} == set(rollout.ended)
    for tokens, logprobs, ended in zip(rollout.completions, rollout.sampler_logprobs, rollout.ended, strict=True):
        assert tokens.count(1) == ended and (tokens[-1] == 1) == ended
        assert len(tokens) == len(logprobs) and (ended or len(tokens) == 6)


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


def constant(value):
    def reward(prompts, completions, **columns):
        return [value] * len(completions)

    return reward


def test_rewards_are_summed_with_their_weights():
    def ones(completions, **columns):
        return [1.0] * len(completions)

    def twos(completions, **columns):
        return [2.0] * len(completions)

    scores = Rewards([ones, twos], [1.0, -0.25])(["a", "b"], ["c", "d"], {})
    assert scores["reward"].tolist() == [0.5, 0.5] and scores["twos"].tolist() == [2.0, 2.0]
    with pytest.raises(ConfigError, match="reward_weights must be one number for each reward"):
        Rewards([ones, twos], [1.0])


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        (constant(float("nan")), ValueError, "reward 'reward' returned nan for the completion 'b'"),
        (constant(None), ValueError, "reward 'reward' returned None"),
        (lambda **kwargs: [1.0, 2.0], ValueError, "returned 2 values for 1 completions"),
        (lambda **kwargs: 1 / 0, RuntimeError, "raised ZeroDivisionError"),
    ],
)
def test_a_reward_that_fails_is_named(reward, error, message):
    with pytest.raises(error, match=message):
        Rewards([reward])(["a"], ["b"], {})


def test_two_rewards_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="share a name"):
        Rewards([constant(1), constant(2)])


def test_reward_from_a_file(tmp_path):
    source = tmp_path / "mine.py"
    source.write_text("def length(completions, **columns):\n    return [float(len(c)) for c in completions]\n")
    assert load_reward(f"{source}:length")(completions=["abc"]) == [3.0]


@pytest.mark.parametrize("name", ["{tmp}/none.py:f", "{tmp}/empty.py:f", "no_such_package:f", "{tmp}/no-model"])
def test_a_reward_that_does_not_load_is_an_error(name, tmp_path):
    """The published code falls back to counting words, silently, and its best score is near that count's ceiling."""
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match="cannot load the reward"):
        load_reward(name.format(tmp=tmp_path))


def test_reward_model_scores_prompt_and_completion(tmp_path):
    from tokenizers.processors import TemplateProcessing
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    settings = {"vocab_size": len(tiny.WORDS), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    for labels in (1, 3):
        config = LlamaConfig(**settings, **heads, num_labels=labels)
        LlamaForSequenceClassification(config).save_pretrained(tmp_path / str(labels))
        tiny.tokenizer().save_pretrained(tmp_path / str(labels))
    reward = load_reward(str(tmp_path / "1"))
    together = reward(["the cat", "a"], [" sat", " dog is good"])
    alone = reward(["the cat"], [" sat"]) + reward(["a"], [" dog is good"])
    assert together == pytest.approx(alone, abs=1e-5) and together[0] != together[1]
    reward.tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<eos> $A", special_tokens=[("<eos>", 1)])
    reward.tokenizer.chat_template = "<eos>{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chat = [[{"role": role, "content": text}] for role, text in (("user", "the cat"), ("assistant", " sat"))]
    assert reward(chat[:1], chat[1:]) == pytest.approx(reward(["the cat"], [" sat"]), abs=1e-5)
    reward.tokenizer.model_max_length = 3
    assert reward(["the cat sat on"], [" a mat"]) == pytest.approx(reward([""], ["a mat"]), abs=1e-5)
    with pytest.raises(ConfigError, match="has 3 outputs, it must have 1"):
        load_reward(str(tmp_path / "3"))


def test_vader_prefers_praise():
    reward = load_reward("vader")
    good, bad = reward(["", ""], ["a wonderful, lovely day", [{"role": "assistant", "content": "a horrible day"}]])
    assert good > 0.5 > -0.4 > bad
    assert text_of([{"role": "assistant", "content": "x"}]) == "x"
