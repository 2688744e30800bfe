"""Each algorithm's loss against its formula in float64, and how its settings weigh tokens and groups."""

import math

import pytest
import tiny
import torch

from safe_train.algorithms.cispo import clipped_weight
from safe_train.algorithms.grpo import group_advantages
from safe_train.algorithms.registry import ALGORITHMS
from safe_train.config import ConfigError, SafeConfig

GROUPS = {"completions_per_prompt": 4, "prompts_per_step": 2, "minibatch_size": None}
RELATIVES = {
    "grpo": {"algorithm": "grpo", "loss_aggregation": "sequence_mean"},
    "dr_grpo": {"algorithm": "grpo", "loss_aggregation": "constant_length", "scale_rewards": "none"},
    "dapo": {"algorithm": "grpo", "clip_high": 0.28},
    "gspo": {"algorithm": "grpo", "importance_sampling_level": "sequence", "loss_aggregation": "sequence_mean"},
    "cispo": {"algorithm": "cispo", "clip_high": 0.05},
    "cispo of sequences": {"algorithm": "cispo", "importance_sampling_level": "sequence", "beta": 0.0},
    "k3": {"algorithm": "grpo", "kl_estimator": "k3"},
    "a penalty": {"algorithm": "cispo", "kl_penalty_coef": 0.3, "kl_threshold": 0.0, "kl_threshold_min": 0.0},
}


def test_no_token_of_cispo_loses_its_gradient():
    """2 is clipped to 1.5 for either sign of the advantage, where PPO's clip would leave a gradient of 0 or 2."""
    args = SafeConfig(algorithm="cispo", completions_per_prompt=2, clip_high=0.5)
    logprob = torch.tensor([math.log(2.0), math.log(2.0), math.log(0.1)], requires_grad=True)
    found = clipped_weight(logprob.exp(), logprob, torch.tensor([1.0, -1.0, 1.0]), args)
    found.loss_L.sum().backward()
    torch.testing.assert_close(logprob.grad, torch.tensor([-1.5, 1.5, -0.1]))
    assert found.is_clipped_L.tolist() == [True, True, False]


def token_loss(args, ratio, logprob, advantage):
    """The published formulas, as they are written."""
    low, high = 1 - args.clip_low, 1 + args.clip_high
    if args.algorithm == "cispo":
        return -ratio.detach().clamp(max=high) * advantage * logprob
    return -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)


def naive_loss(trainer, experience, control):
    """Sequence by sequence from logits in float64: the loss of the first minibatch."""
    args, total = trainer.args, 0.0
    micros = experience.minibatches[0]
    count = sum(len(micro.indices) for micro in micros)
    tokens = sum(len(micro.logprob_L) for micro in micros)
    for micro in micros:
        hidden, weight = trainer.policy(micro.batch).double(), trainer.policy.head()["weight"].double()
        logp = (hidden @ weight.T).log_softmax(-1)
        logq = (micro.ref_hidden_LH.double() @ weight.T).log_softmax(-1)
        kl, entropy = (logp.exp() * (logp - logq)).sum(-1), -(logp.exp() * logp).sum(-1)
        targets = micro.batch.targets_L[:, None]
        logprob, ref_logprob = logp.gather(1, targets)[:, 0], logq.gather(1, targets)[:, 0]
        bounds = micro.batch.response_cu_seqlens.tolist()
        for first, end in zip(bounds, bounds[1:], strict=False):
            rows = slice(first, end)
            log_ratio = logprob[rows] - micro.logprob_L[rows].double()
            if args.importance_sampling_level == "sequence":
                log_ratio = log_ratio.mean().expand(end - first)
            loss = token_loss(args, log_ratio.exp(), logprob[rows], micro.advantage_L[rows].double())
            loss = loss - args.entropy_coef * entropy[rows]
            difference = ref_logprob[rows] - logprob[rows]
            exact = args.kl_estimator == "exact"
            loss = loss + control.kl_coef * (kl[rows] if exact else difference.exp() - difference - 1)
            loss = loss + args.kl_penalty_coef * (kl[rows] - control.kl_threshold).relu() ** 2
            share = {
                "token_mean": 1 / tokens,
                "sequence_mean": 1 / (count * (end - first)),
                "constant_length": 1 / (count * args.max_new_tokens),
            }
            total = total + share[args.loss_aggregation] * loss.sum()
    return total


@pytest.mark.parametrize("name", RELATIVES)
def test_the_loss_and_its_gradient_are_the_formula(name, tmp_path, monkeypatch):
    """Away from ratio 1, and whatever the micro-batches are."""
    found = {}
    for size in (30, 8192):
        trainer = tiny.trainer(tmp_path / str(size), **GROUPS, **RELATIVES[name], max_tokens_per_microbatch=size)
        experience, control = tiny.experience_of(trainer)
        trainer.update(experience, control)
        totals = []
        monkeypatch.setattr(trainer.engine, "backward", totals.append)
        monkeypatch.setattr(trainer, "optimizer_step", lambda loss: {"grad_norm": 0.0})
        monkeypatch.setattr(trainer.args, "inner_epochs", 1)
        trainer.update(experience, control)
        sums = sum(totals)
        gradients = torch.autograd.grad(sums, trainer.trainable)
        exact = naive_loss(trainer, experience, control)
        # Through a whole float32 model, whose rounding no plain twin measures.
        torch.testing.assert_close(sums.double(), exact, rtol=2e-5, atol=1e-6)
        for mine, theirs in zip(gradients, torch.autograd.grad(exact, trainer.trainable), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)
        found[size] = len(totals), sums.item()
    assert found[30][0] > found[8192][0]
    assert found[30][1] == pytest.approx(found[8192][1], rel=1e-4, abs=1e-6)


def test_rewards_are_scaled_by_the_group_the_batch_or_not():
    rewards = torch.tensor([1.0, 3.0, 10.0, 16.0], dtype=torch.float64)
    assert group_advantages(rewards, 2, "none").tolist() == [-1, 1, -3, 3]
    batch = rewards.std()
    torch.testing.assert_close(group_advantages(rewards, 2, "batch"), torch.tensor([-1, 1, -3, 3]) / (batch + 1e-4))
    torch.testing.assert_close(
        group_advantages(rewards, 2, "group").abs(), torch.full((4,), 0.5**0.5).double(), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm": "ppo", "scale_rewards": "none"}, "scale_rewards must be group for ppo, which has no groups"),
        ({"algorithm": "ppo", "dynamic_sampling": 1}, "dynamic_sampling must be 0 for ppo, which has no groups"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level must be token for safe, whose"),
        ({"algorithm": "cispo"}, "completions_per_prompt must be at least 2 for cispo"),
        ({"algorithm": "cispo", "critic": "single", "completions_per_prompt": 2}, "critic must be none for cispo"),
        ({"algorithm": "safe_paper", "loss_aggregation": "sequence_mean"}, "loss_aggregation must be left alone"),
        (
            {
                "algorithm": "grpo",
                "completions_per_prompt": 2,
                "scale_rewards": "batch",
                "multi_objective_aggregation": "normalize_then_sum",
            },
            "scale_rewards must be group with normalize_then_sum",
        ),
    ],
)
def test_settings_that_make_no_sense_together_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        SafeConfig(**settings)


def test_an_algorithm_brings_its_settings():
    for name, algorithm in ALGORITHMS.items():
        preset = SafeConfig.load(None, [f"algorithm={name}", "completions_per_prompt=2", *PAPERS.get(name, ())])
        given = {"entropy_coef": 0.0} if name == "ppo_paper" else {}
        assert {key: getattr(preset, key) for key in algorithm.preset} == algorithm.preset | given


PAPERS = {"ppo_paper": ("normalize_rewards=false", "entropy_coef=0", "critic_max_grad_norm=inf")}


def rising_for_even(prompts, completions, **columns):
    """Rewards of prompt `p NUMBER`: 0, 1, 2 ... if the number is even, else all 1."""
    return [float(i % 4) if int(prompt.split()[1]) % 2 == 0 else 1.0 for i, prompt in enumerate(prompts)]


NUMBERED = [{"prompt": f"p {i}"} for i in range(64)]
DRAWN = {"algorithm": "grpo", **GROUPS, "total_steps": 3, "save_every": 1, "beta": 0.0}


def numbers(prompts):
    return [int(prompt.text.split()[1]) for prompt in prompts]


def drawing(folder, rows=NUMBERED, rounds=20):
    return tiny.trainer(folder, rising_for_even, prompts=rows, **DRAWN, dynamic_sampling=rounds)


def test_groups_without_spread_are_drawn_again_from_the_prompts_that_follow(tmp_path):
    trainer = drawing(tmp_path)
    stream = numbers(trainer.prompts.at(0, 40))
    rollout, scores = trainer.collect(0)
    assert sorted(numbers(rollout.prompts[::4])) == sorted([i for i in stream if i % 2 == 0][:2])
    assert scores["reward"].tolist() == [0.0, 1.0, 2.0, 3.0] * 2
    history = trainer.train()
    assert trainer.position(3) == sum(metrics["prompts/drawn"] for metrics in history) > 6
    assert all(metrics["reward"] == 1.5 for metrics in history)


def test_a_bound_leaves_groups_without_spread_as_they_are(tmp_path):
    trainer = drawing(tmp_path, [row for row in NUMBERED if int(row["prompt"].split()[1]) % 2], rounds=2)
    _, scores = trainer.collect(0)
    assert scores["reward"].tolist() == [1.0] * 8 and trainer.drawn == 2 + 2 + 2


def test_a_resumed_run_goes_on_behind_the_prompts_that_were_drawn(tmp_path):
    whole = drawing(tmp_path / "whole")
    expected = whole.train()
    first = drawing(tmp_path / "cut")
    first.callbacks = [lambda trainer, metrics: setattr(trainer.control, "should_training_stop", True)]
    first.train()
    second = drawing(tmp_path / "cut")
    found = second.train(resume_from_checkpoint=True)
    assert [x["prompts/drawn"] for x in found] == [x["prompts/drawn"] for x in expected[1:]]
    for mine, theirs in zip(second.trainable, whole.trainable, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "name, default, other, answer",
    [
        ("ema_long", "0.99", "0.5", "unknown setting 'ema_long'; it is gone: it decided nothing"),
        ("kl_in_reward", "false", "true", "unknown setting 'kl_in_reward'; it is gone: kl_gradient=return"),
    ],
)
def test_an_older_file_is_read_with_the_default_of_what_is_gone_and_answered_otherwise(
    name, default, other, answer, tmp_path
):
    path = tmp_path / "config.yaml"
    path.write_text(f"{name}: {default}\nseed: 3\n")
    assert SafeConfig.load(path).seed == 3
    path.write_text(f"{name}: {other}\n")
    with pytest.raises(ConfigError, match=answer):
        SafeConfig.load(path)


def test_cispo_trains(tmp_path):
    history = tiny.trainer(tmp_path, algorithm="cispo", total_steps=2, **GROUPS).train()
    assert all(math.isfinite(metrics["policy_loss"]) for metrics in history)
