"""Whole steps of the trainer on a tiny model."""

import json
import math
import re

import pytest
import tiny
import torch

from safe_train.experience import Experience
from safe_train.preview import Preview, step_scale

ALGORITHMS = ("safe", "ppo", "ppo_two_heads", "grpo")


def experience_of(trainer):
    rollout = trainer.sample(0)
    rewards = trainer.rewards(*rollout.for_rewards())["reward"]
    experience = Experience(trainer.policy, trainer.critic, rollout, trainer.args, trainer.device)
    control = trainer.observe(experience, rewards)
    experience.estimate(trainer.training_rewards(rewards, rollout), 0.0)
    return experience, control


def policy_weights(trainer):
    return [p.detach().clone() for p in trainer.trainable]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_leaves_its_folder_and_its_metrics(algorithm, tmp_path):
    history = tiny.trainer(tmp_path, algorithm=algorithm, eval_every=3, eval_dataset="given").train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and len(history) == 3
    names = """reward reward_std rewards/good_words/mean kl kl_short kl_long kl_threshold kl_penalty kl_momentum entropy
        entropy_gate phase pid policy_loss value_loss clip_fraction ratio_mean approx_kl grad_norm critic_grad_norm
        completions/mean_length completions/clipped_fraction bad_steps sampler_gap time/rollout_s time/reward_s
        time/score_s time/update_s time/step_s tokens_per_second memory/peak_gb"""
    critic = set() if algorithm == "grpo" else {"explained_variance", "value_gap"}
    assert set(names.split()) | critic <= rows[-1].keys()
    assert all(math.isfinite(v) for row in rows for v in row.values() if not isinstance(v, str))
    assert "eval/reward" in rows[2] and "eval/reward" not in rows[1]
    for name in ("config.yaml", "environment.json", "samples.jsonl", "report.png", "checkpoints/step-3/state.json"):
        assert (tmp_path / name).stat().st_size > 0, name


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_ratio_is_exactly_one_before_the_first_optimizer_step(algorithm, tmp_path):
    trainer = tiny.trainer(tmp_path, algorithm=algorithm)
    experience, control = experience_of(trainer)
    assert len(experience.minibatches) == 2 and max(map(len, experience.minibatches)) > 1
    for micro in experience:
        hidden = trainer.policy(micro.batch)
        loss = tiny_loss(hidden, trainer, micro, control)
        assert torch.equal(loss.logprob, micro.logprob_L)
        assert loss.clip_fraction == 0


def tiny_loss(hidden, trainer, micro, control):
    from safe_train.losses import policy_loss

    weight = torch.full_like(micro.logprob_L, 0.1)
    return policy_loss(hidden, trainer.policy.head(), micro, weight, control, trainer.args)


def test_micro_batches_add_up_to_the_whole_batch(tmp_path):
    gradients = []
    for budget in (16, 10_000):
        trainer = tiny.trainer(tmp_path, max_tokens_per_microbatch=budget, minibatch_size=None)
        experience, control = experience_of(trainer)
        (minibatch,) = experience.minibatches
        for micro in minibatch:
            trainer.backward(micro, control, len(experience.tokens("kl_L")))
        gradients.append([p.grad for p in trainer.trainable])
    assert len(minibatch) == 1
    for small, whole in zip(*gradients, strict=True):
        torch.testing.assert_close(small, whole, atol=1e-6, rtol=1e-4)


def test_controller_is_called_once_a_rollout(tmp_path):
    """The published code calls it in every inner epoch, so its averages run twice as fast."""
    trainer = tiny.trainer(tmp_path, inner_epochs=3)
    trainer.train()
    assert len(trainer.controller.kls) == 3


def test_advantages_are_white_over_the_rollout(tmp_path):
    advantages = experience_of(tiny.trainer(tmp_path))[0].tokens("advantage_L")
    assert advantages.mean().abs() < 1e-5 and (advantages.std(correction=0) - 1).abs() < 1e-4


def test_returns_come_from_the_target_heads(tmp_path):
    trainer = tiny.trainer(tmp_path)
    with torch.no_grad():
        for p in trainer.critic.target_heads.parameters():
            p.zero_()
    experience, _ = experience_of(trainer)
    assert experience.tokens("target_values_KL").abs().max() == 0
    # With target values of 0, the return of a token is its discounted reward alone.
    for micro in experience:
        ends = micro.batch.response_cu_seqlens[1:].long() - 1
        assert (micro.returns_L[ends].unsqueeze(1) - trainer_rewards(trainer)).abs().min(1).values.max() < 1e-5


def trainer_rewards(trainer):
    values = torch.arange(0, 5) / 4  # what the tiny reward can give for six words, normalised
    return (values - trainer.reward_moments.mean) / trainer.reward_moments.std


def test_value_level_sequence_reads_the_prompts_end(tmp_path):
    experience, _ = experience_of(tiny.trainer(tmp_path, value_level="sequence"))
    for micro in experience:
        bounds = micro.batch.response_cu_seqlens.tolist()
        for start, end in zip(bounds[:-1], bounds[1:], strict=True):
            spread = micro.values_KL[:, start:end] - micro.values_KL[:, start : start + 1]
            assert spread.abs().max() < 1e-5


def test_training_raises_the_reward(tmp_path):
    history = tiny.trainer(tmp_path, total_steps=25, prompts_per_step=5, completions_per_prompt=8, minibatch_size=20,
                           max_tokens_per_microbatch=400, learning_rate=3e-2, save_every=25).train()  # fmt: skip
    control = tiny.trainer(tmp_path / "control", total_steps=25, prompts_per_step=5, completions_per_prompt=8,
                           minibatch_size=20, max_tokens_per_microbatch=400, learning_rate=3e-2, save_every=25,
                           shuffle_advantages=True).train()  # fmt: skip
    last, shuffled = (sum(row["reward"] for row in rows[-5:]) / 5 for rows in (history, control))
    assert last > history[0]["reward"] + 0.3 and last > shuffled + 0.3


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_equal_rewards_move_nothing_but_the_entropy_term(algorithm, tmp_path):
    def same(prompts, completions, **columns):
        return [0.7] * len(completions)

    trainer = tiny.trainer(tmp_path, reward=same, algorithm=algorithm, entropy_coef=0.0, beta=0.0, total_steps=1)
    experience, _ = experience_of(trainer)
    if algorithm == "grpo":
        assert experience.tokens("advantage_L").abs().max() == 0
    assert math.isfinite(trainer.train()[0]["policy_loss"])


def test_a_batch_of_one(tmp_path):
    settings = {"prompts_per_step": 1, "completions_per_prompt": 1, "minibatch_size": 1, "max_new_tokens": 1}
    history = tiny.trainer(tmp_path, **settings).train()
    assert [row["completions/mean_length"] for row in history] == [1, 1, 1]
    assert all(math.isfinite(row["policy_loss"]) and math.isfinite(row["grad_norm"]) for row in history)


def test_full_fine_tuning_with_a_frozen_reference(tmp_path):
    history = tiny.trainer(tmp_path, lora_r=0, learning_rate=1e-2).train()
    assert history[0]["kl"] == pytest.approx(0, abs=1e-6) and history[-1]["kl"] > 1e-3


@pytest.mark.parametrize("settings", [{"kl_in_reward": True}, {"kl_estimator": "k3"}, {"critic": "mean"}], ids=str)
def test_variants_run(settings, tmp_path):
    assert all(math.isfinite(row["policy_loss"]) for row in tiny.trainer(tmp_path, **settings).train())


def test_kl_in_reward_charges_the_controllers_coefficient(tmp_path):
    trainer = tiny.trainer(tmp_path, gae_lambda=1.0)
    with torch.no_grad():
        for p in trainer.trainable:
            p.add_(0.1 * torch.randn_like(p))
        for p in trainer.critic.parameters():
            p.zero_()
    experience, _ = experience_of(trainer)
    plain = [micro.returns_L for micro in experience]
    experience.estimate(torch.zeros(8), kl_charge=0.5)
    for micro, _ in zip(experience, plain, strict=True):
        charges = -0.5 * (micro.logprob_L - micro.ref_logprob_L)
        bounds = micro.batch.response_cu_seqlens.tolist()
        for start, end in zip(bounds[:-1], bounds[1:], strict=True):
            torch.testing.assert_close(micro.returns_L[start:end], charges[start:end].flip(0).cumsum(0).flip(0))


def test_missing_end_is_charged_and_control_run_permutes(tmp_path):
    trainer = tiny.trainer(tmp_path, missing_eos_penalty=2.0, normalize_rewards=False)
    rollout = trainer.sample(0)
    rewards = torch.arange(8.0)
    charged = trainer.training_rewards(rewards, rollout)
    assert charged.tolist() == [r - (0.0 if ended else 2.0) for r, ended in zip(range(8), rollout.ended, strict=True)]
    trainer.args.shuffle_advantages, trainer.args.missing_eos_penalty = True, 0.0
    shuffled = trainer.training_rewards(rewards, rollout)
    assert not torch.equal(shuffled, rewards) and torch.equal(shuffled.sort().values, rewards)


def test_non_finite_gradients_never_reach_the_weights(tmp_path):
    trainer = tiny.trainer(tmp_path, max_bad_steps=4, total_steps=5)
    before = policy_weights(trainer)
    original = trainer.backward

    def poisoned(*arguments):
        result = original(*arguments)
        trainer.trainable[0].grad[0] = float("nan")
        return result

    trainer.backward = poisoned
    with pytest.raises(FloatingPointError, match="4 optimizer steps in a row had a non-finite"):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, policy_weights(trainer), strict=True))


def test_one_bad_step_is_counted_and_survived(tmp_path):
    trainer = tiny.trainer(tmp_path, total_steps=2)
    original, calls = trainer.optimizer_step, []

    def once(loss):
        calls.append(loss)
        return original(loss * float("nan") if len(calls) == 2 else loss)

    trainer.optimizer_step = once
    history = trainer.train()
    assert history[0]["bad_steps"] == 0.25 and history[1]["bad_steps"] == 0 and trainer.bad_steps == 0


@pytest.mark.parametrize("reward", [lambda completions, **kw: [float("nan")] * len(completions), lambda **kw: 1 / 0])
def test_a_failing_reward_stops_the_run_and_leaves_the_checkpoint(reward, tmp_path):
    count = []

    def fails_later(**columns):
        count.append(0)
        return tiny.good_words(**columns) if len(count) <= 2 else reward(**columns)

    with pytest.raises(
        (ValueError, RuntimeError), match=r"reward 'fails_later' (returned nan|raised ZeroDivisionError)"
    ):
        tiny.trainer(tmp_path, reward=fails_later, total_steps=4).train()
    assert (tmp_path / "checkpoints" / "step-2" / "state.json").exists()


def test_preview_walks_an_overshooting_step_back(tmp_path):
    free = tiny.trainer(tmp_path / "free", learning_rate=0.3, minibatch_size=8, inner_epochs=1)
    bound = tiny.trainer(tmp_path / "bound", learning_rate=0.3, minibatch_size=8, inner_epochs=1, max_preview_kl=0.02)
    kls, scales = [], []
    for trainer in (free, bound):
        experience, control = experience_of(trainer)
        scales.append(trainer.update(experience, control).get("preview_scale"))
        kls.append(trainer.mean_kl(experience.minibatches[0]))
    assert scales[0] is None and scales[1] < 1
    assert kls[1] < kls[0] / 2


def test_preview_scale():
    assert step_scale(0.1, 0.2, 0.3, 0.1) == 1.0
    assert step_scale(0.1, 0.5, 0.3, 0.1) == pytest.approx(0.5)
    assert step_scale(0.5, 0.4, 0.3, 0.1) == 1.0, "a step that comes down is left alone"
    assert step_scale(0.5, 0.6, 0.3, 0.1) == 0.1
    parameter = torch.nn.Parameter(torch.zeros(2))
    preview = Preview([parameter], 0.3, 0.1)
    preview.remember()
    parameter.data += 4
    assert preview.apply(0.1, 0.5) == pytest.approx(0.5)
    torch.testing.assert_close(parameter.data, torch.full((2,), 2.0))


def test_evaluation_repeats_and_leaves_the_random_numbers_of_training_alone(tmp_path):
    trainer = tiny.trainer(tmp_path)
    state = torch.get_rng_state()
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first.numbers() == second.numbers() and torch.equal(state, torch.get_rng_state())
    assert first.kl == pytest.approx(0, abs=1e-6) and 0 < first.distinct_words <= 1


def test_report_names_the_mechanisms_that_never_acted(tmp_path):
    from safe_train.report import idle_mechanisms, read_metrics, write_report

    tiny.trainer(tmp_path / "a", learning_rate=1e-9).train()
    tiny.trainer(tmp_path / "b", algorithm="grpo").train()
    note = idle_mechanisms(tmp_path / "a", read_metrics(tmp_path / "a"))
    assert re.match(r"never acted: clip, KL threshold, KL momentum, entropy gate", note)
    write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "both.png")
    assert (tmp_path / "both.png").stat().st_size > 10_000


def test_callbacks_and_a_model_without_its_tokenizer(tmp_path):
    from safe_train import SafeTrainer
    from safe_train.config import ConfigError

    seen = []
    trainer = tiny.trainer(tmp_path, total_steps=2)
    trainer.callbacks = [lambda t, metrics: seen.append((t.step, metrics["reward"]))]
    trainer.train()
    assert [step for step, _ in seen] == [1, 2]
    with pytest.raises(ConfigError, match="needs its tokenizer"):
        SafeTrainer(tiny.model(), tiny.good_words, tiny.settings(tmp_path))
