"""The published algorithms against their formulas, written here once more and in another way."""

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from safe_train.algorithms.losses import Totals
from safe_train.config import ConfigError, SafeConfig
from safe_train.paper import PaperController, PaperCritic, PaperMoments, PaperTrainer, value_errors
from safe_train.sampling.experience import Experience
from safe_train.settings.limits import PAPER
from safe_train.trainer import SafeTrainer

PPO = {"normalize_rewards": False, "entropy_coef": 0.0, "critic_max_grad_norm": math.inf}
CALLS = 3000


def settings(algorithm, **changes):
    return SafeConfig(algorithm=algorithm, **(PPO if algorithm == "ppo_paper" else {}), **changes)


def trainer(folder, algorithm, **changes):
    own = PPO if algorithm == "ppo_paper" else {}
    return tiny.trainer(folder, algorithm=algorithm, minibatch_size=None, **own, **changes)


@pytest.fixture(scope="module")
def signals():
    """KL, entropy and reward of thousands of calls: a slow climb, jumps, a flat stretch, noise, negative KL."""
    draw = random.Random(0)
    calls = []
    for t in range(CALLS):
        reward = min(0.75, t / 800) + (0.4 if 1200 <= t < 1400 else 0) + (-3.0 if 1500 <= t < 1530 else 0)
        reward += 0 if t > 2000 else draw.gauss(0, 0.05)
        kl = 0.4 + 0.4 * math.sin(t / 90) + draw.gauss(0, 0.05)
        calls.append((kl, 2.5 + 2.4 * math.sin(t / 300), reward))
    return np.array(calls)


def average(values, decay):
    """From 0, without a correction: each value with its own weight."""
    age = np.arange(len(values))[:, None] - np.arange(len(values))[None, :]
    return np.where(age >= 0, (1 - decay) * decay ** np.maximum(age, 0), 0) @ values


def expected_phase(rewards):
    if len(rewards) < 50:
        return "warmup", 1.5
    recent = rewards[-50:]
    before = rewards[-100:-50] if len(rewards) >= 100 else recent
    if recent.mean() > before.mean() + 0.01:
        return "climbing", 1.2
    return ("converged", 1.0) if recent.std() < 0.02 and recent.mean() > 0.7 else ("plateau", 0.8)


def expected_pid(rewards):
    """The averaged reward starts at the first one, whose own call has no output."""
    smooth = [rewards[0]]
    for reward in rewards[1:]:
        smooth.append(smooth[-1] + 0.05 * (reward - smooth[-1]))
    errors = np.diff(smooth) - 0.001
    integrals = [0.0]
    for error in errors:
        integrals.append(np.clip(integrals[-1] + error, -1, 1))
    outputs = 0.3 * errors + 0.01 * np.array(integrals[1:]) + 0.05 * np.diff(errors, prepend=0.0)
    return np.concatenate([[0.0], outputs]), integrals


def test_the_safe_controller_follows_its_formulas_for_thousands_of_calls(signals):
    controller = PaperController(settings("safe_paper"))
    found = [controller.update(kl, entropy, reward, reward_std=9.9) for kl, entropy, reward in signals]
    kl, entropy, reward = signals.T
    short, long, (pid, integrals) = average(kl, 0.9), average(kl, 0.99), expected_pid(reward)
    phases = [expected_phase(reward[: t + 1]) for t in range(CALLS)]
    threshold = np.clip((0.3 + pid) * np.array([scale for _, scale in phases]), 0.1, 0.6)
    gate = np.maximum(0.5, 2.0 / (entropy + 0.1))
    penalty = np.where(short > threshold, 0.1 * (short - threshold) ** 2 * gate, 0.0)
    assert [c.phase for c in found] == [name for name, _ in phases]
    assert {name for name, _ in phases} == {"warmup", "climbing", "plateau", "converged"}
    assert min(integrals) == -1 and (penalty > 0).any() and (penalty == 0).any() and gate.max() > 8
    columns = {"kl_short": short, "kl_long": long, "pid": pid, "kl_threshold": threshold, "kl_penalty": penalty}
    for name, column in columns.items():
        np.testing.assert_allclose([getattr(c, name) for c in found], column, rtol=1e-9, atol=1e-12, err_msg=name)
    assert {c.kl_coef for c in found} == {0.0}


def test_a_tie_of_two_means_is_decided_as_published():
    """50 rewards, then 50 that are 0.01 higher: rounding alone says whether that is climbing. A correctly rounded mean
    decides otherwise for 448 of the 1000.
    """
    found, expected = [], []
    for i in range(1000):
        before, recent = [i / 1000] * 50, [round(i / 1000 + 0.01, 3)] * 50
        controller = PaperController(settings("safe_paper"), rewards=before + recent)
        found.append(controller.phase() == "climbing")
        expected.append(sum(recent) / len(recent) > sum(before) / len(before) + 0.01)
    assert found == expected and {True, False} == set(found)


def test_the_asymmetric_controller_looks_back_over_fifty_calls(signals):
    controller = PaperController(settings("asymmetric_paper"))
    found = np.array([controller.update(kl, 1.0, 0.0, 1.0).kl_penalty for kl, _, _ in signals])
    kl = signals[:, 0]
    momentum = np.zeros(CALLS)
    momentum[49:] = (kl[49:] - kl[:-49]) / 50
    expected = 0.1 * np.maximum(0, kl - 0.3) ** 2 + 5 * np.maximum(0, momentum) ** 2
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-15)
    assert (momentum > 0).any() and found[:49].max() == 0.1 * max(0, kl[:49].max() - 0.3) ** 2


def test_the_reward_moments_are_a_weighted_mixture_from_a_faint_prior():
    draw, moments = random.Random(1), PaperMoments()
    batches = [[draw.gauss(3, 2) for _ in range(n)] for n in (16, 1, 5, 16)]
    for batch in batches:
        moments.update(batch)
    weight = np.array([1e-4, *map(len, batches)])
    mean = np.array([0, *map(np.mean, batches)])
    variance = np.array([1, *(np.var(b, ddof=1) if len(b) > 1 else 0 for b in batches)])
    mixture = (weight * mean).sum() / weight.sum()
    spread = (weight * (variance + mean**2)).sum() / weight.sum() - mixture**2
    assert moments.mean == pytest.approx(mixture) and moments.std == pytest.approx(spread**0.5 + 1e-8)


def test_the_critic_is_a_shared_norm_and_two_heads():
    torch.manual_seed(0)
    critic, states_BH = PaperCritic(8, SafeConfig(critic="soft_min")), torch.randn(5, 8, requires_grad=True)
    normal = (states_BH - states_BH.mean(-1, keepdim=True)) / (
        states_BH.var(-1, correction=0, keepdim=True) + 1e-5
    ).sqrt()
    heads = [dict(head.named_parameters()) for head in critic.heads[1:]]
    expected = [
        (torch.nn.functional.gelu(normal @ h["0.weight"].T + h["0.bias"]) @ h["2.weight"].T + h["2.bias"])[:, 0]
        for h in heads
    ]
    torch.testing.assert_close(critic(states_BH), torch.stack(expected))
    critic(states_BH).sum().backward()
    assert states_BH.grad.abs().sum() > 0  # the value loss moves the policy
    single = PaperCritic(8, SafeConfig(critic="single"))
    assert len(single(states_BH)) == 1 and not any(isinstance(m, torch.nn.LayerNorm) for m in single.modules())


@pytest.mark.parametrize("algorithm", PAPER)
def test_value_errors(algorithm):
    value, old, target = (np.random.default_rng(i).normal(size=50) for i in range(3))
    clipped = np.clip(value, old - 0.2, old + 0.2)

    def huber(x):
        x = np.abs(x - target)
        return np.where(x <= 0.5, x**2 / 2, 0.5 * (x - 0.25))

    expected = {
        "safe_paper": (huber(value) + huber(clipped)) / 2,
        "asymmetric_paper": np.maximum((value - target) ** 2, (clipped - target) ** 2) / 2,
        "ppo_paper": (value - target) ** 2,
    }
    found = value_errors(*(torch.tensor(x) for x in (value, old, target)), settings(algorithm))
    np.testing.assert_allclose(found, expected[algorithm], rtol=1e-12)


def naive_loss(run, rollout, reward, old):
    """The published loss of a rollout, from logits, a sequence at a time; `old` is what its first call returned."""
    model, head, args = run.policy.model, run.policy.causal_lm.lm_head.weight, run.args
    logprobs, entropies, references, values = [], [], [], []
    for prompt, completion in zip(rollout.prompts, rollout.completions, strict=True):
        ids = torch.tensor([[*prompt.ids, *completion]])
        states = model.get_base_model().model(input_ids=ids).last_hidden_state[0]
        logp = (states @ head.T)[len(prompt.ids) - 1 : -1].log_softmax(-1)
        logprobs.append(logp[range(len(completion)), completion])
        entropies.append(-(logp.exp() * logp).sum(-1))
        with torch.no_grad(), model.disable_adapter():
            other = model.get_base_model().model(input_ids=ids).last_hidden_state[0]
        references.append(
            (other @ head.T)[len(prompt.ids) - 1 : -1].log_softmax(-1)[range(len(completion)), completion]
        )
        v = run.critic(states[-1:])[:, 0]
        values.append(-args.alpha * (torch.logsumexp(-v / args.alpha, 0) - math.log(len(v))))
    value, lengths = torch.stack(values), [len(c) for c in rollout.completions]
    old = old or SimpleNamespace(logprob=torch.cat(logprobs).detach(), value=value.detach())
    advantage = reward - old.value
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    spread = torch.cat([a.expand(n) for a, n in zip(advantage, lengths, strict=True)])
    ratio = (torch.cat(logprobs) - old.logprob).exp()
    loss = -torch.minimum(ratio * spread, ratio.clamp(0.8, 1.2) * spread).mean()
    if args.algorithm == "ppo_paper":
        loss = loss + 0.05 * (torch.cat(logprobs) - torch.cat(references)).mean()
    else:
        loss = loss - 0.01 * torch.cat(entropies).mean()
    return loss + 0.5 * value_errors(value, old.value, reward, args).mean(), old


@pytest.mark.parametrize("algorithm", PAPER)
def test_the_loss_and_its_gradient_equal_the_formulas_from_logits(algorithm, tmp_path):
    run = trainer(tmp_path, algorithm, inner_epochs=1)
    rollout, rewards = run.collect(0)
    experience = Experience(run.policy, run.critic, rollout, run.args, run.device)
    control = run.update_controller(experience, rewards["reward"])
    reward = run.training_rewards(rewards["reward"], rollout).float()
    run.compute_advantages(experience, reward, control)
    old = naive_loss(run, rollout, reward, None)[1]
    run.update(experience, control)  # so that neither ratio nor value are what they were
    parameters = [*run.trainable, *run.critic.heads.parameters()]
    expected = naive_loss(run, rollout, reward, old)[0]
    gradients = torch.autograd.grad(expected, parameters)
    totals = Totals(sum(map(len, rollout.completions)), len(rollout.completions))
    losses = [run.loss(micro, control, totals)[0] for micro in experience]
    assert len(losses) > 1
    found = torch.autograd.grad(sum(losses), parameters)
    torch.testing.assert_close(sum(losses), expected, rtol=2e-5, atol=2e-6)
    for mine, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-6)


def test_the_sampled_kl_keeps_its_logits_as_the_setting_says(tmp_path, ops_seen):
    run = trainer(tmp_path, "ppo_paper", max_kept_bytes="123456")
    rollout, rewards = run.collect(0)
    experience = Experience(run.policy, run.critic, rollout, run.args, run.device)
    control = run.update_controller(experience, rewards["reward"])
    run.compute_advantages(experience, run.training_rewards(rewards["reward"], rollout), control)
    ops_seen.clear()
    run.loss(experience.minibatches[0][0], control, Totals(8, 4))
    assert [a[14] for op, a in ops_seen if op.name() == "safe_kernels::linear_token_stats"] == [123456]


def test_the_penalty_has_no_gradient_and_is_worked_out_in_every_inner_epoch(tmp_path):
    run = trainer(tmp_path, "safe_paper", inner_epochs=3, kl_threshold=0.0, kl_threshold_min=0.0)
    rollout, rewards = run.collect(0)
    experience = Experience(run.policy, run.critic, rollout, run.args, run.device)
    control = run.update_controller(experience, rewards["reward"])
    run.compute_advantages(experience, run.training_rewards(rewards["reward"], rollout), control)
    micro = experience.minibatches[0][0]
    totals = Totals(sum(map(len, rollout.completions)), len(rollout.completions))
    gradients = [
        torch.autograd.grad(run.loss(micro, control._replace(kl_penalty=penalty), totals)[0], run.trainable)
        for penalty in (0.0, 1e6)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    kls = []
    run.controller.again = lambda kl: kls.append(kl) or control
    run.update(experience, control)
    assert len(kls) == 2 and kls[0] != kls[1]


@pytest.mark.parametrize("algorithm", PAPER)
def test_a_run_and_a_resumed_run_agree(algorithm, tmp_path):
    def begun(name):
        """With the controller's windows of fifty calls full."""
        run = trainer(tmp_path / name, algorithm, top_k=8, total_steps=4)
        for i in range(60):
            run.controller.update(i / 100, 1.0, i / 50, 1.0)
        return run

    whole = begun("whole").train()
    first = begun("parts")
    first.callbacks = [lambda run, _: (_ for _ in ()).throw(KeyboardInterrupt) if run.step == 2 else None]
    with pytest.raises(KeyboardInterrupt):
        first.train()
    rest = trainer(tmp_path / "parts", algorithm, top_k=8, total_steps=4).train(resume_from_checkpoint=True)
    timeless = [
        [{k: v for k, v in row.items() if not k.startswith(("time", "tokens_per", "memory"))} for row in rows]
        for rows in (whole[2:], rest)
    ]
    assert timeless[0] == timeless[1]


def test_what_the_published_algorithms_do_not_have_is_refused(tmp_path):
    for wrong, name in (
        ({"algorithm": "safe_paper", "beta": 0.1}, "beta"),
        ({"algorithm": "asymmetric_paper", "critic": "single"}, "critic"),
        ({"algorithm": "ppo_paper"}, "normalize_rewards"),
        ({"algorithm": "safe_paper", "top_p": 0.9}, "top_p"),
        ({"algorithm": "ppo", "controller": "safe_paper"}, "controller"),
    ):
        with pytest.raises(ConfigError, match=name):
            SafeConfig(**wrong)
    assert SafeConfig(algorithm="safe_paper", top_k=50).top_k == 50
    with pytest.raises(ConfigError, match="algorithm"):
        SafeTrainer(args=settings("safe_paper"))
    with pytest.raises(ConfigError, match="algorithm"):
        PaperTrainer(args=SafeConfig())
