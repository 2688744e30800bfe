"""`prefix_rewards`: what each token adds to the reward of the text so far, by hand and over all texts of a toy."""

import math
from itertools import combinations_with_replacement, permutations

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_kl_gradient import ENDING, LENGTH, Toy, rollout_of, settings
from test_reward_model import at_the_last_token, llama, saved

from safe_train.algorithms import losses
from safe_train.algorithms.advantages import credit, earned, token_rewards
from safe_train.algorithms.controller import Control
from safe_train.config import ConfigError
from safe_train.rewards.groups import refilled
from safe_train.rewards.prefixes import scored
from safe_train.rewards.rewards import Rewards
from safe_train.sampling.experience import Experience
from safe_train.sampling.rollout import joined

NAN = math.nan
CONTROL = Control(0.0, 0.05, 0, 0, 0, 0, 1, 1, 0, "warmup")
GROUPS = {"algorithm": "grpo", "completions_per_prompt": 4, "prompts_per_step": 2, "minibatch_size": None}


def test_a_token_gets_what_it_adds():
    """Responses of 3, 0, 4 and 1 tokens; the rewards of what they begin with, and of the whole."""
    prefix_BK = torch.tensor([[1.0, 2, 4, NAN], [NAN] * 4, [0, NAN, 5, NAN], [7, NAN, NAN, NAN]])
    reward_B, bounds = torch.tensor([10.0, 99, 6, 8]), torch.tensor([0, 3, 3, 7, 8])
    found = token_rewards(reward_B, bounds, prefix_BK, 1)
    assert found.tolist() == [1, 2, 6, 0, 5, 0, 1, 1]


def test_the_last_token_of_a_part_gets_what_the_part_adds():
    """Every 2 tokens: parts of 2, 2 and 1 tokens, and of 2 and 2."""
    prefix_BK = torch.tensor([[1.0, 2, 4], [3, 5, NAN]])
    found = token_rewards(torch.tensor([10.0, 6]), torch.tensor([0, 5, 9]), prefix_BK, 2)
    assert found.tolist() == [0, 1, 0, 2, 6, 0, 2, 0, 1]


def test_before_the_first_prefix_that_is_known_stands_0():
    found = token_rewards(torch.tensor([10.0]), torch.tensor([0, 3]), torch.tensor([[NAN, NAN, 4.0]]), 1)
    assert found.tolist() == [0, 4, 6]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 12), st.integers(0, 2**16))
def test_what_tokens_add_sums_to_the_reward_less_that_of_no_token(lengths, every, seed):
    g = torch.Generator().manual_seed(seed)
    reward_B = torch.randn(len(lengths), generator=g, dtype=torch.float64)
    prefix_BK = torch.randn(len(lengths), max(1, -(-9 // every)), generator=g, dtype=torch.float64)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    parts = token_rewards(reward_B, bounds, prefix_BK, every).split(lengths)
    expected = [(r - p[0]).item() if n else 0.0 for r, p, n in zip(reward_B, prefix_BK, lengths, strict=True)]
    assert [part.sum().item() for part in parts] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("algorithm", ["grpo", "cispo"])
def test_with_lambda_1_the_expected_gradient_is_that_of_the_reward(algorithm):
    """Whatever the prefixes' rewards are: over all pairs of responses of a toy, in float64."""
    toy, draw = Toy(), torch.Generator().manual_seed(5)
    args = settings(algorithm=algorithm, scale_rewards="none", prefix_rewards=1, clip_high=math.inf)
    reward = {response: torch.randn((), generator=draw, dtype=torch.float64) for response in ENDING}
    prefixes = sorted({response[:t] for response in ENDING for t in range(LENGTH)})
    potential = {prefix: torch.randn((), generator=draw, dtype=torch.float64).item() for prefix in prefixes}
    total = 0.0
    for responses in combinations_with_replacement(ENDING, 2):
        experience = Experience(toy, None, rollout_of(responses), args, torch.device("cpu"))
        rows = [[potential[r[:t]] if t < len(r) else NAN for t in range(LENGTH)] for r in responses]
        experience.prefix_BK = torch.tensor(rows, dtype=torch.float64)
        credit(experience, torch.stack([reward[r] for r in responses]), CONTROL, args)
        (micro,) = experience
        chance = len(set(permutations(responses))) * micro.logprob_L.sum().exp()
        weight_L = losses.token_weights(micro, losses.Totals(LENGTH * 2, 2), args)
        loss = losses.policy_loss(toy(micro.batch), toy.head(), micro, weight_L, CONTROL, args).loss
        total = total + chance.detach() * loss
    exact = 0.0
    for response in ENDING:
        exact = exact - toy.logprobs_and_costs(response, args)[0].sum().exp() * reward[response] / LENGTH
    found, expected = (torch.autograd.grad(x, toy.logits)[0] for x in (total, exact))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # advantages are float32


def naive(trainer, rollout, prefix_BK, reward_B):
    """The advantages of grpo, token by token: what follows, less the others' at that place, by the spread."""
    args, every = trainer.args, trainer.args.prefix_rewards
    follows = []
    for tokens, prefixes, reward in zip(rollout.completions, prefix_BK.tolist(), reward_B.tolist(), strict=True):
        marks = [*range(0, len(tokens), every), len(tokens)]
        values = [*prefixes[: len(marks) - 1], reward]
        added = {end - 1: b - a for end, a, b in zip(marks[1:], values, values[1:], strict=False)}
        lam = args.gae_lambda
        follows.append([sum(lam ** (s - t) * x for s, x in added.items() if s >= t) for t in range(len(tokens))])
    centred, count = [], args.completions_per_prompt
    for i, own in enumerate(follows):
        same = [args.scale_rewards != "group" or j // count == i // count for j in range(len(follows))]
        others = [x for j, x in enumerate(follows) if j != i and same[j]]
        at = [[x[min(t, len(x) - 1)] for x in others if x] for t in range(len(own))]
        centred.append([x - (sum(there) / len(there) if there else 0.0) for x, there in zip(own, at, strict=True)])
    size = {"group": args.completions_per_prompt, "batch": len(centred), "none": len(centred)}[args.scale_rewards]
    found = []
    for first in range(0, len(centred), size):
        group = centred[first : first + size]
        std = torch.tensor([x for own in group for x in own], dtype=torch.float64).std().item()
        scale = 1.0 if args.scale_rewards == "none" else std + 1e-4
        found += [[x / scale for x in own] for own in group]
    return found


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("every", [1, 4])
def test_the_advantages_of_grpo_are_the_formula(scale, every, tmp_path):
    """In small micro-batches and in one, with completions of several lengths."""
    own = {"scale_rewards": scale, "prefix_rewards": every, "gae_lambda": 0.7, "max_new_tokens": 9}
    for size in (30, 8192):
        trainer = tiny.trainer(tmp_path / str(size), **GROUPS, **own, max_tokens_per_microbatch=size)
        rollout, scores = trainer.collect(0)
        assert len(set(map(len, rollout.completions))) > 1
        trainer.reward_moments.update(scores["reward"].tolist())
        experience = Experience(trainer.policy, None, rollout, trainer.args, trainer.device)
        experience.prefix_BK = trainer.normalised(scores.prefix_BK)
        reward_B = trainer.training_rewards(scores["reward"], rollout)
        credit(experience, reward_B, CONTROL, trainer.args)
        expected = naive(trainer, rollout, experience.prefix_BK, reward_B)
        for micro in experience:
            own_L = torch.tensor([x for i in micro.indices for x in expected[i]])
            torch.testing.assert_close(micro.advantage_L, own_L, rtol=1e-4, atol=1e-5)  # sums in float32


def test_groups_in_which_all_is_equal_teach_nothing():
    """One of right answers alone, one of wrong ones, of several lengths: the default lambda is 1."""
    args = settings(scale_rewards="group", prefix_rewards=1, gae_lambda=None)
    responses = [(1, 2, 3), (1, 0), (2, 2, 2), (3, 0)]
    experience = Experience(Toy(), None, rollout_of(responses), args, torch.device("cpu"))
    experience.prefix_BK = torch.zeros(4, LENGTH, dtype=torch.float64)
    credit(experience, torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64), CONTROL, args)
    assert experience.tokens("advantage_L").eq(0).all()


def test_a_critic_learns_what_is_still_to_come(tmp_path):
    trainer = tiny.trainer(tmp_path, algorithm="ppo", prefix_rewards=1, gae_lambda=1.0, normalize_rewards=False)
    rollout, scores = trainer.collect(0)
    experience = Experience(trainer.policy, trainer.critic, rollout, trainer.args, trainer.device)
    experience.prefix_BK = trainer.normalised(scores.prefix_BK)
    credit(experience, trainer.training_rewards(scores["reward"], rollout), CONTROL, trainer.args)
    for micro in experience:
        still = [
            (scores["reward"][i] - scores.prefix_BK[i, t]).item()
            for i in micro.indices
            for t in range(len(rollout.completions[i]))
        ]
        torch.testing.assert_close(micro.returns_L, torch.tensor(still), rtol=1e-4, atol=1e-5)


def test_without_the_setting_the_reward_stands_on_the_last_token(tmp_path):
    trainer = tiny.trainer(tmp_path, algorithm="ppo")
    rollout, scores = trainer.collect(0)
    assert scores.prefix_BK is None
    experience = Experience(trainer.policy, trainer.critic, rollout, trainer.args, trainer.device)
    for micro in experience:
        rewards_L = earned(experience, micro, scores["reward"], trainer.args)
        last = micro.batch.response_cu_seqlens[1:].long() - 1
        assert rewards_L[last].tolist() == scores["reward"][micro.indices].float().tolist()
        assert rewards_L.count_nonzero() == scores["reward"][micro.indices].count_nonzero()


def test_rewards_see_the_texts_that_the_completions_begin_with(tmp_path):
    seen = []

    def words(prompts, completions, completion_ids, name, log_extra, log_metric):
        seen.append((prompts, completions, completion_ids, name))
        log_extra("words", [len(text.split()) for text in completions])
        log_metric("called", len(completions))
        return [None if text == "" else float(len(text.split())) for text in completions]

    rows = [row | {"name": row["prompt"][:3]} for row in tiny.PROMPTS]
    trainer = tiny.trainer(tmp_path, words, prompts=rows, **GROUPS, prefix_rewards=2)
    rollout, scores = trainer.collect(0)
    (whole, begun), tokenizer = seen, tiny.tokenizer()
    assert whole[1] == rollout.texts
    places = [(i, n) for i, tokens in enumerate(rollout.completions) for n in range(0, len(tokens), 2)]
    assert begun[0] == [rollout.prompts[i].text for i, _ in places]
    assert begun[2] == [rollout.completions[i][:n] for i, n in places]
    assert begun[1] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in begun[2]]
    assert begun[3] == [rollout.prompts[i].columns["name"] for i, _ in places]
    assert scores.prefix_BK.shape == (8, 3) and scores.prefix_BK[:, 0].isnan().all()
    for (i, n), text in zip(places, begun[1], strict=True):
        assert n == 0 or scores.prefix_BK[i, n // 2] == len(text.split())
    assert scores.metrics == {"called": [8.0]}  # and nothing of the prefixes
    assert [len(values) for values in scores.extra.values()] == [8]


def test_a_classifier_scores_what_completions_begin_with(tmp_path):
    classifier, plain = llama(), tiny.tokenizer()
    trainer = tiny.trainer(tmp_path / "run", saved(tmp_path / "model", classifier), **GROUPS, prefix_rewards=2)
    rollout, scores = trainer.collect(0)
    for i, tokens in enumerate(rollout.completions):
        for n in range(0, len(tokens), 2):
            text = rollout.prompts[i].text + plain.decode(tokens[:n], skip_special_tokens=True)
            expected = at_the_last_token(classifier, text)
            assert scores.prefix_BK[i, n // 2].item() == pytest.approx(expected, abs=1e-4)
    assert len(trainer.train()) == 3


def test_a_completion_without_a_reward_is_left_out(tmp_path):
    trainer = tiny.trainer(tmp_path, **GROUPS, prefix_rewards=1, scale_rewards="none", gae_lambda=1.0)
    rollout, scores = trainer.collect(0)
    experience = Experience(trainer.policy, None, rollout, trainer.args, trainer.device)
    experience.prefix_BK = scores.prefix_BK.clone()
    reward_B = scores["reward"].clone()
    reward_B[3] = NAN
    credit(experience, reward_B, CONTROL, trainer.args)
    table_BT = experience.table("advantage_L")
    assert table_BT[3].nan_to_num().eq(0).all()
    others = [reward_B[i] - scores.prefix_BK[i, 0] for i in range(8) if i not in (0, 3)]
    expected = reward_B[0] - scores.prefix_BK[0, 0] - sum(others) / len(others)
    assert table_BT[0, 0].item() == pytest.approx(expected.item(), abs=1e-6)


def test_groups_that_are_drawn_again_bring_their_prefixes(tmp_path):
    trainer = tiny.trainer(tmp_path, **GROUPS, prefix_rewards=1)
    (rollout, scores), (more, more_scores) = trainer.collect(0), trainer.collect(1)
    scores.by_name["reward"][:4] = 0.25  # a group without a spread
    filled, both = refilled(rollout, scores, more, more_scores, 4)
    assert filled.completions[:4] in (more.completions[:4], more.completions[4:])
    every = joined([rollout, more]).completions
    table = torch.cat([scores.prefix_BK, more_scores.prefix_BK])
    for i, tokens in enumerate(filled.completions):
        rows = [table[j] for j, other in enumerate(every) if other == tokens]
        assert any(torch.equal(both.prefix_BK[i].nan_to_num(), row.nan_to_num()) for row in rows)


def test_an_empty_rollout_has_no_prefixes(tmp_path):
    """As on a process that no prompt was left for."""
    trainer = tiny.trainer(tmp_path, **GROUPS, prefix_rewards=1)
    rollout, _ = trainer.collect(0)
    rewards = Rewards([lambda prompts, completions: []])
    assert scored(rollout.take([]), rewards, trainer.tokenizer, trainer.args).prefix_BK.shape == (0, 6)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = tiny.trainer(tmp_path / "whole", **GROUPS, prefix_rewards=1, total_steps=4)
    expected = whole.train()
    tiny.trainer(tmp_path / "parts", **GROUPS, prefix_rewards=1, total_steps=2).train()
    found = tiny.trainer(tmp_path / "parts", **GROUPS, prefix_rewards=1, total_steps=4).train(True)
    assert [row["reward"] for row in found] == [row["reward"] for row in expected[2:]]
    assert [row["policy_loss"] for row in found] == [row["policy_loss"] for row in expected[2:]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefix_rewards": -1}, "prefix_rewards must be at least 0"),
        ({"prefix_rewards": 1, "gamma": 0.9}, "gamma must be 1 with prefix_rewards"),
        (
            {**GROUPS, "prefix_rewards": 1, "multi_objective_aggregation": "normalize_then_sum"},
            "multi_objective_aggregation must be sum_then_normalize, min or mean_minus_variance with prefix_rewards",
        ),
        (
            {**GROUPS, "prefix_rewards": 1, "importance_sampling_level": "sequence"},
            "importance_sampling_level must be token with prefix_rewards",
        ),
        ({"algorithm": "safe_paper", "prefix_rewards": 1}, "prefix_rewards must be left alone for safe_paper"),
        (
            {"algorithm": "distill", "teacher": "x", "prefix_rewards": 1},
            "prefix_rewards must be left alone for distill",
        ),
    ],
)
def test_what_it_does_not_go_with_is_refused(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        tiny.settings(tmp_path, **changes)
