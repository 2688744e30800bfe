"""Sampling: from the policy itself, whatever the checkpoint's settings say, and the same as what is scored."""

import pytest
import tiny
import torch

from safe_train.config import SafeConfig
from safe_train.data import PromptDataset, TokenBatch
from safe_train.losses import linear_token_stats
from safe_train.models import make_policy
from safe_train.rewards import Rewards
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
