"""Whole steps of the trainer on a tiny model."""

import json
import math
import random
import re
from types import SimpleNamespace
from weakref import ref

import numpy as np
import pytest
import tiny
import torch
from accelerate.utils import DistributedType

from safe_train.algorithms.advantages import credit
from safe_train.algorithms.losses import Totals
from safe_train.config import ConfigError, SafeConfig
from safe_train.data.prompts import Prompt
from safe_train.engines.engine import schedule
from safe_train.engines.projection import mean_kl
from safe_train.randomness import python_generators
from safe_train.run.metrics import peak_memory_gb
from safe_train.sampling.experience import Experience
from safe_train.sampling.rollout import MODES, Rollout

ALGORITHMS = ("safe", "ppo", "ppo_two_heads", "grpo")


def rollout_of(prompts, completions):
    count = len(prompts)
    rows = [Prompt("", ids, {}) for ids in prompts]
    return Rollout(rows, completions, [""] * count, [True] * count, [[0.0] * len(tokens) for tokens in completions])


def policy_weights(trainer):
    return [p.detach().clone() for p in trainer.trainable]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_leaves_its_folder_and_its_metrics(algorithm, tmp_path, pictures):
    history = tiny.trainer(tmp_path, algorithm=algorithm, eval_every=3).train()
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


def test_the_first_rollout_does_not_depend_on_the_critic(tmp_path):
    drawn = {tuple(tiny.trainer(tmp_path / name, algorithm=name).sample(0).texts) for name in ALGORITHMS}
    assert len(drawn) == 1 and drawn != {tuple(tiny.trainer(tmp_path / "other", seed=1).sample(0).texts)}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_ratio_is_exactly_one_before_the_first_optimizer_step(algorithm, tmp_path):
    trainer = tiny.trainer(tmp_path, algorithm=algorithm)
    experience, control = tiny.experience_of(trainer)
    assert len(experience.minibatches) == 2 and max(map(len, experience.minibatches)) > 1
    for micro in experience:
        hidden = trainer.policy(micro.batch)
        loss = tiny_loss(hidden, trainer, micro, control)
        assert torch.equal(loss.logprob, micro.logprob_L)
        assert loss.clip_fraction == 0


def tiny_loss(hidden, trainer, micro, control):
    from safe_train.algorithms.losses import policy_loss

    weight = torch.full_like(micro.logprob_L, 0.1)
    return policy_loss(hidden, trainer.policy.head(), micro, weight, control, trainer.args)


def test_the_first_optimizer_step_of_a_rollout_sees_a_ratio_of_one(tmp_path):
    history = tiny.trainer(tmp_path, inner_epochs=1, minibatch_size=8).train()
    assert [(row["approx_kl"], row["clip_fraction"]) for row in history] == [(0, 0)] * 3


def test_the_controller_sees_the_exact_kl_and_the_entropy_of_response_tokens_alone(tmp_path):
    """The published KL is a sampled estimate, and the published entropy an average over padding, too."""
    trainer, seen = tiny.trainer(tmp_path), {}
    with torch.no_grad():
        for p in trainer.trainable:
            p.add_(0.1 * torch.randn_like(p))
    rollout = rollout_of([[5], [6, 7, 8], [9]], [[10, 11, 12, 1], [1], [4, 3]])
    trainer.controller.update = lambda kl, entropy, *rest: seen.update(kl=kl, entropy=entropy)
    trainer.update_controller(Experience(trainer.policy, None, rollout, trainer.args, trainer.device), torch.zeros(3))
    model, kls, entropies = trainer.policy.model, [], []
    for prompt, completion in zip(rollout.prompts, rollout.completions, strict=True):
        ids, response = torch.tensor([prompt.ids + completion]), slice(len(prompt.ids) - 1, -1)
        with torch.no_grad(), model.disable_adapter():
            reference = model(ids).logits[0, response].log_softmax(-1)
        with torch.no_grad():
            policy = model(ids).logits[0, response].log_softmax(-1)
        kls.append((policy.exp() * (policy - reference)).sum(-1))
        entropies.append(-(policy.exp() * policy).sum(-1))
    assert seen["kl"] == pytest.approx(torch.cat(kls).mean().item(), abs=1e-5) and seen["kl"] > 1e-3
    assert seen["entropy"] == pytest.approx(torch.cat(entropies).mean().item(), abs=1e-5)


def test_micro_batches_add_up_to_the_whole_batch(tmp_path):
    gradients = []
    for budget in (16, 10_000):
        trainer = tiny.trainer(tmp_path, max_tokens_per_microbatch=budget, minibatch_size=None)
        experience, control = tiny.experience_of(trainer)
        (minibatch,) = experience.minibatches
        for micro in minibatch:
            trainer.backward(micro, control, Totals(len(experience.tokens("kl_L")), experience.count))
        gradients.append([p.grad for p in trainer.trainable])
    assert len(minibatch) == 1
    for small, whole in zip(*gradients, strict=True):
        # Through a whole float32 model, whose rounding no plain twin measures.
        torch.testing.assert_close(small, whole, atol=1e-6, rtol=1e-4)


def test_controller_is_called_once_a_rollout(tmp_path):
    """The published code calls it in every inner epoch, so its averages run twice as fast."""
    trainer = tiny.trainer(tmp_path, inner_epochs=3)
    trainer.train()
    assert len(trainer.controller.kls) == 3


def test_advantages_are_white_over_the_rollout(tmp_path):
    advantages = tiny.experience_of(tiny.trainer(tmp_path))[0].tokens("advantage_L")
    assert advantages.mean().abs() < 1e-5 and (advantages.std(correction=0) - 1).abs() < 1e-4


@pytest.mark.parametrize(("zeroed", "estimate"), [("target_heads", "returns_L"), ("heads", "advantage_L")])
def test_returns_come_from_the_target_heads_and_advantages_from_the_online_ones(zeroed, estimate, tmp_path):
    """Under values of 0, both are lambda^k times the reward, k tokens before the end; advantages are whitened after."""
    trainer = tiny.trainer(tmp_path, max_tokens_per_microbatch=10_000, minibatch_size=None)
    with torch.no_grad():
        for p in getattr(trainer.critic, zeroed).parameters():
            p.zero_()
    experience = Experience(trainer.policy, trainer.critic, trainer.sample(0), trainer.args, trainer.device)
    credit(experience, torch.arange(8.0), trainer.controller.last, trainer.args)
    (micro,) = experience
    lengths = micro.batch.response_cu_seqlens.diff().tolist()
    expected = torch.tensor(
        [i * (1 - 1 / 6) ** k for i, n in zip(micro.indices, lengths, strict=True) for k in reversed(range(n))]
    )
    if estimate == "advantage_L":
        expected = (expected - expected.mean()) / expected.std(correction=0)
    torch.testing.assert_close(getattr(micro, estimate), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value_level", ["token", "sequence"])
def test_values_do_not_see_the_tokens_they_judge(value_level, tmp_path):
    """The published value is read after the response, so a better critic erases the advantage."""
    trainer, values = tiny.trainer(tmp_path, value_level=value_level), []
    for token in (4, 10):
        rollout = rollout_of([[5, 6, 7]], [[9, token, 3]])
        values.append(Experience(trainer.policy, trainer.critic, rollout, trainer.args, trainer.device))
    one, other = (experience.tokens("values_KL") for experience in values)
    torch.testing.assert_close(one[:, :2], other[:, :2])
    if value_level == "token":
        assert not torch.allclose(one[:, 2], other[:, 2]) and not torch.allclose(one[:, 0], one[:, 1])
    else:
        torch.testing.assert_close(one, other[:, :1].expand(2, 3))


@pytest.mark.parametrize("kl_gradient", ["token", "return"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_empty_completions_train_nothing_and_disturb_nobody(algorithm, kl_gradient, tmp_path):
    settings = {"algorithm": algorithm, "kl_gradient": kl_gradient}
    trainer = tiny.trainer(tmp_path, **settings, minibatch_size=2, max_tokens_per_microbatch=1)
    rollout = rollout_of([[5], [6, 7], [8], [9]], [[], [1], [], [10, 11, 1]])
    experience = Experience(trainer.policy, trainer.critic, rollout, trainer.args, trainer.device)
    control = trainer.update_controller(experience, torch.arange(4.0))
    credit(experience, trainer.training_rewards(torch.arange(4.0), rollout), control, trainer.args)
    assert len(experience.tokens("advantage_L")) == 4
    assert all(math.isfinite(value) for value in trainer.update(experience, control).values())


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
    experience, _ = tiny.experience_of(trainer)
    if algorithm == "grpo":
        assert experience.tokens("advantage_L").abs().max() == 0
    assert math.isfinite(trainer.train()[0]["policy_loss"])


@pytest.mark.parametrize("kl_gradient", ["token", "return"])
def test_a_batch_of_one(kl_gradient, tmp_path):
    settings = {"prompts_per_step": 1, "completions_per_prompt": 1, "minibatch_size": 1, "max_new_tokens": 1}
    settings |= {"kl_gradient": kl_gradient}
    history = tiny.trainer(tmp_path, **settings).train()
    assert [row["completions/mean_length"] for row in history] == [1, 1, 1]
    assert all(math.isfinite(row["policy_loss"]) and math.isfinite(row["grad_norm"]) for row in history)


def test_full_fine_tuning_with_a_frozen_reference(tmp_path):
    history = tiny.trainer(tmp_path, lora_r=0, learning_rate=1e-2).train()
    assert history[0]["kl"] == pytest.approx(0, abs=1e-6) and history[-1]["kl"] > 1e-3


def test_weights_that_are_trained_must_be_float32(tmp_path):
    with pytest.raises(ConfigError, match="must be float32, got torch.bfloat16, which rounds most updates away"):
        tiny.trainer(tmp_path, policy=tiny.model().bfloat16(), lora_r=0)
    trained = tiny.trainer(tmp_path, policy=tiny.model().bfloat16()).trainable
    assert {parameter.dtype for parameter in trained} == {torch.float32}


@pytest.mark.parametrize("settings", [{"kl_gradient": "return"}, {"kl_estimator": "k3"}, {"critic": "mean"}], ids=str)
def test_variants_run(settings, tmp_path):
    assert all(math.isfinite(row["policy_loss"]) for row in tiny.trainer(tmp_path, **settings).train())


def test_a_missing_end_is_charged(tmp_path):
    trainer = tiny.trainer(tmp_path, missing_eos_penalty=2.0, normalize_rewards=False)
    rollout = trainer.sample(0)
    rewards = torch.arange(8.0)
    charged = trainer.training_rewards(rewards, rollout)
    assert charged.tolist() == [r - (0.0 if ended else 2.0) for r, ended in zip(range(8), rollout.ended, strict=True)]


@pytest.mark.parametrize("prefix_rewards", [0, 1])
def test_the_control_run_permutes_rewards_among_the_completions(prefix_rewards, tmp_path):
    """In one group of eight, whose advantages are then the same numbers in another order; of a first token alone, which
    every completion has."""
    changes = {"algorithm": "grpo", "prompts_per_step": 1, "completions_per_prompt": 8, "minibatch_size": None}
    changes |= {"normalize_rewards": False, "scale_rewards": "none", "gae_lambda": 1.0}
    found = []
    for shuffle in (False, True):
        trainer = tiny.trainer(
            tmp_path / str(shuffle), **changes, prefix_rewards=prefix_rewards, shuffle_advantages=shuffle
        )
        rollout, scores = trainer.collect(0)
        experience = Experience(trainer.policy, None, rollout, trainer.args, trainer.device)
        experience.prefix_BK = scores.prefix_BK
        control = trainer.update_controller(experience, scores["reward"])
        credit(experience, torch.arange(8.0).double(), control, trainer.args)
        found.append(experience.table("advantage_L")[:, 0])
    assert not torch.equal(*found)
    torch.testing.assert_close(found[0].sort().values, found[1].sort().values)


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


@pytest.mark.parametrize("min_scale", [1e-3, 0.1])
def test_preview_walks_an_overshooting_step_back(min_scale, tmp_path):
    settings = {"learning_rate": 0.3, "minibatch_size": 8, "inner_epochs": 1}
    bound = {"max_preview_kl": 0.02, "preview_min_scale": min_scale}
    kls, scales = [], []
    for name, changes in (("free", {}), ("bound", bound)):
        trainer = tiny.trainer(tmp_path / name, **settings, **changes)
        experience, control = tiny.experience_of(trainer)
        scales.append(trainer.update(experience, control).get("preview_scale"))
        kls.append(mean_kl(trainer.policy, experience.minibatches[0]))
    assert scales[0] is None and scales[1] < 0.2 and kls[1] < kls[0] / 2
    assert kls[1] <= 0.02 or scales[1] == pytest.approx(min_scale) and min_scale == 0.1


def test_evaluation_repeats_and_leaves_the_random_numbers_of_training_alone(tmp_path):
    def noisy(completions, **columns):
        return [random.random() + np.random.rand() for _ in completions]

    trainer = tiny.trainer(tmp_path, reward=noisy)
    torch_state, others = torch.get_rng_state(), python_generators()
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first.numbers() == second.numbers() and first.reward_error > 0
    assert torch.equal(torch_state, torch.get_rng_state()) and python_generators() == others
    assert first.kl == pytest.approx(0, abs=1e-6) and 0 < first.distinct_words <= 1


def test_report_names_the_mechanisms_that_never_acted(tmp_path):
    from safe_train.run.report import idle_mechanisms, read_metrics, write_report

    tiny.trainer(tmp_path / "a", learning_rate=1e-9).train()
    tiny.trainer(tmp_path / "b", algorithm="grpo").train()
    off = {"kl_excess_coef": 0, "phases": False, "entropy_gate": False, "pid_kp": 0, "pid_ki": 0, "pid_kd": 0}
    tiny.trainer(tmp_path / "off", learning_rate=1e-9, **off).train()
    assert idle_mechanisms(tmp_path / "off", read_metrics(tmp_path / "off")) == "never acted: clip, KL momentum"
    note = idle_mechanisms(tmp_path / "a", read_metrics(tmp_path / "a"))
    assert re.match(r"never acted: clip, KL threshold, KL momentum, entropy gate", note)
    for beta, idle in ((0.0, True), (0.1, False)):
        run = tmp_path / str(beta)
        tiny.trainer(run, algorithm="grpo", beta=beta, kl_gradient="return").train()
        assert ("KL's return" in idle_mechanisms(run, read_metrics(run))) == idle
    write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "both.png")
    assert (tmp_path / "both.png").stat().st_size > 10_000


def test_report_tells_runs_of_one_name_apart_and_survives_a_row_cut_short(tmp_path, monkeypatch):
    from safe_train.run import report

    drawn = []
    monkeypatch.setattr(report, "draw_compared", lambda axis, panel, rows, settings, color, name: drawn.append(name))
    for parent in ("a", "b"):
        tiny.trainer(tmp_path / parent / "run", total_steps=1).train()
        with (tmp_path / parent / "run" / "metrics.jsonl").open("a") as file:
            file.write('{"step": 2, "rew')
    drawn.clear()
    runs = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    report.write_report(runs, tmp_path / "both.png")
    assert list(dict.fromkeys(drawn)) == [str(run) for run in runs]


def test_everything_a_step_touches_is_on_the_accelerators_device(tmp_path, monkeypatch):
    device = torch.device("meta")
    accelerator = SimpleNamespace(device=device, distributed_type=DistributedType.NO)
    monkeypatch.setattr("safe_train.parallel.Accelerator", lambda **kwargs: accelerator)
    for needs_values in ("models.policy.fingerprint", "trainer.check_deterministic"):
        monkeypatch.setattr(f"safe_train.{needs_values}", lambda *_: {})
    monkeypatch.setattr("safe_train.models.policy.check_head", lambda _: None)  # this device has no numbers
    monkeypatch.setattr("safe_train.trainer.choose_mode", lambda *_: MODES[0])
    trainer = tiny.trainer(tmp_path, lora_r=0)
    models = (trainer.policy, *trainer.policy.frozen_copies, trainer.critic)
    assert len(models) == 3 and all(p.device == device for model in models for p in model.parameters())
    accelerator.distributed_type = DistributedType.MEGATRON_LM
    with pytest.raises(ConfigError, match="distributed_type must be one of NO, MULTI_CPU, .*got MEGATRON_LM"):
        tiny.trainer(tmp_path)


def test_memory_is_that_of_the_device_that_trains(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert peak_memory_gb(torch.device("cpu")) > 0.01


def test_evaluation_needs_held_out_prompts(tmp_path):
    from safe_train import SafeTrainer

    def trainer(**settings):
        args = tiny.settings(tmp_path, **settings)
        return SafeTrainer(tiny.model(), tiny.good_words, args, tiny.PROMPTS, processing_class=tiny.tokenizer())

    with pytest.raises(ConfigError, match="needs held-out prompts: set eval_dataset"):
        trainer().evaluate()
    with pytest.raises(ConfigError, match="eval_dataset must be set when eval_every is"):
        trainer(eval_every=1)
    with pytest.raises(ConfigError, match="no prompt file 'none.jsonl'"):
        trainer(eval_every=1, eval_dataset="none.jsonl")
    unread = trainer(eval_dataset="none.jsonl")  # a config's own, which may be out of reach, and is not needed
    with pytest.raises(ConfigError, match="no prompt file 'none.jsonl'"):
        unread.evaluate()


def test_several_reward_functions_have_their_weights_and_one_exchange(tmp_path, monkeypatch):
    def half(completions, **columns):
        return [0.5] * len(completions)

    trainer = tiny.trainer(tmp_path, reward=[tiny.good_words, half], reward_weights=[0.0, 3.0], total_steps=1)
    exchanged = []
    monkeypatch.setattr("safe_train.parallel.gather", lambda values: exchanged.append(values.shape) or values)
    trainer.collect(0)
    assert exchanged == [(3, 8)]  # two rewards and their sum
    assert trainer.train()[0]["reward"] == 1.5


def test_a_tracker_that_is_not_installed_is_an_error(tmp_path):
    for tracker in ("clearml", "weights-and-biases"):
        with pytest.raises(ConfigError, match=f"report_to {tracker} needs a package of that name; here it can be all"):
            tiny.trainer(tmp_path, report_to=[tracker])


def test_an_update_is_not_kept_beside_the_next_rollout(tmp_path, monkeypatch):
    made, alive = [], []
    trainer = tiny.trainer(tmp_path)
    monkeypatch.setattr(
        "safe_train.trainer.Experience", lambda *arguments: made.append(ref(x := Experience(*arguments))) or x
    )
    complete = trainer.complete_prompts
    trainer.complete_prompts = lambda *where: alive.extend(each() for each in made) or complete(*where)
    trainer.train()
    assert len(made) == 3 and alive == [None] * 3


def test_callbacks_and_a_model_without_its_tokenizer(tmp_path):
    from safe_train import SafeTrainer

    seen = []
    trainer = tiny.trainer(tmp_path, total_steps=2)
    trainer.callbacks = [lambda t, metrics: seen.append((t.step, metrics["reward"]))]
    trainer.train()
    assert [step for step, _ in seen] == [1, 2]
    with pytest.raises(ConfigError, match="needs its tokenizer"):
        SafeTrainer(tiny.model(), tiny.good_words, tiny.settings(tmp_path), tiny.PROMPTS)


@pytest.mark.parametrize(
    ("kind", "factors"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.854, 0.5, 0.146]),
    ],
)
def test_learning_rates_rise_and_fall(kind, factors, tmp_path):
    args = SafeConfig(total_steps=6, warmup_steps=2, lr_scheduler_type=kind)
    assert [schedule(args, step) for step in range(6)] == pytest.approx(factors, abs=1e-3)
    used = []
    trainer = tiny.trainer(tmp_path, total_steps=6, warmup_steps=2, lr_scheduler_type=kind)
    trainer.callbacks = [
        lambda trainer, row: used.append(
            [x.param_groups[0]["lr"] for x in (trainer.engine.optimizer, trainer.critic_optimizer)]
        )
    ]
    assert [row["learning_rate"] for row in trainer.train()] == [policy for policy, _ in used]
    rates = trainer.args.learning_rate, trainer.args.critic_learning_rate
    assert used == [pytest.approx([rate * factor for rate in rates], rel=5e-3) for factor in factors]
