"""The loss of an update: what each term adds to the gradient."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import huber_loss

from safe_kernels import linear_token_stats
from safe_train.algorithms import advantages, losses
from safe_train.algorithms.controller import Control
from safe_train.algorithms.critic import Critic
from safe_train.algorithms.grpo import group_advantages
from safe_train.config import SafeConfig
from safe_train.data.batches import TokenBatch

NO_TERMS = {"entropy_coef": 0.0, "beta": 0.0}


def control(kl_coef=0.0, threshold=0.0) -> Control:
    return Control(kl_coef, threshold, 0, 0, 0, 0, 1, 1, 0, "warmup")


def case(seed=0, tokens=7, width=8, vocabulary=19):
    """Hidden states near, but not at, the reference's, and a micro-batch that refers to them."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=g)
    head = {"weight": torch.randn(vocabulary, width, generator=g), "bias": None, "softcap": None, "logit_scale": 1.0}
    targets = torch.randint(vocabulary, (tokens,), generator=g)
    ref_hidden = hidden + 0.3 * torch.randn(tokens, width, generator=g)
    logprob = stats(hidden, head, targets).logprob
    micro = SimpleNamespace(
        batch=SimpleNamespace(targets_L=targets, kept=None),
        ref_hidden_LH=ref_hidden,
        logprob_L=logprob,
        sampler_logprob_L=logprob,
        ref_logprob_L=stats(ref_hidden, head, targets).logprob,
        advantage_L=torch.zeros(tokens),
    )
    return hidden.requires_grad_(), head, micro


def stats(hidden, head, targets, ref_hidden=None):
    return linear_token_stats(hidden.detach(), tokens=targets, ref_hidden=ref_hidden, **head)


def gradient(micro_changes=None, kl_coef=0.0, threshold=0.0, **settings):
    hidden, head, micro = case()
    vars(micro).update(micro_changes or {})
    args = SafeConfig(**NO_TERMS | settings)
    weight = torch.full((7,), 1 / 7)
    loss = losses.policy_loss(hidden, head, micro, weight, control(kl_coef, threshold), args).loss
    loss.backward()
    return loss.detach(), hidden.grad


def test_no_term_no_gradient():
    assert gradient()[1].abs().max() == 0


@pytest.mark.parametrize(
    "term",
    [
        {"micro_changes": {"advantage_L": torch.ones(7)}},
        {"entropy_coef": 0.01},
        {"kl_coef": 0.1},
        {"kl_coef": 0.1, "kl_estimator": "k2"},
        {"kl_coef": 0.1, "kl_estimator": "k3"},
        {"kl_penalty_coef": 0.1},
    ],
    ids=str,
)
def test_each_term_has_a_gradient(term):
    """The published penalty is built from `kl.item()`: a constant, which changes the log and not the policy."""
    assert gradient(**term)[1].abs().max() > 1e-5


def test_kl_step_reduces_the_kl():
    hidden, head, micro = case()
    targets, ref = micro.batch.targets_L, micro.ref_hidden_LH
    before = stats(hidden, head, targets, ref).kl.mean()
    after = stats(hidden - 0.1 * gradient(kl_coef=1.0)[1], head, targets, ref).kl.mean()
    assert after < before


def test_kl_loss_is_the_coefficient_times_the_exact_mean_kl():
    hidden, head, micro = case()
    exact = stats(hidden, head, micro.batch.targets_L, micro.ref_hidden_LH).kl
    torch.testing.assert_close(gradient(kl_coef=0.7)[0], 0.7 * exact.mean())


def test_one_sided_penalty_is_silent_below_its_threshold():
    assert gradient(kl_penalty_coef=0.1, threshold=1e3)[1].abs().max() == 0


def test_sampled_estimators_have_the_exact_kls_gradient_in_expectation():
    """Averaged over the whole vocabulary with the policy's probabilities, k2's gradient is that of the exact KL."""
    g = torch.Generator().manual_seed(3)
    logits, ref = torch.randn(2, 11, generator=g, dtype=torch.float64)
    logits.requires_grad_()
    lp, rp = logits.log_softmax(-1), ref.log_softmax(-1)
    (exact,) = torch.autograd.grad((lp.exp() * (lp - rp)).sum(), logits, retain_graph=True)
    (k2,) = torch.autograd.grad((lp.detach().exp() * losses.k2(lp, rp)).sum(), logits)
    torch.testing.assert_close(exact, k2)
    assert (losses.k3(lp, rp) >= 0).all()


def test_importance_weights_make_the_policys_mean_of_what_is_sampled():
    """Every token once, with the sampler's probability as its weight: the gradient is that of the mean under the
    policy, for the surrogate, k2 and k3.
    """
    g = torch.Generator().manual_seed(4)
    tokens, width = 13, 8
    hidden = torch.randn(width, generator=g, dtype=torch.float64)
    head = {"weight": torch.randn(tokens, width, generator=g, dtype=torch.float64)}
    ref_hidden, advantage = hidden + 0.3 * torch.randn(width, generator=g), torch.randn(tokens, generator=g).double()
    every = (head["weight"] @ hidden).log_softmax(-1)
    sampler = (every + 0.8 * torch.randn(tokens, generator=g)).log_softmax(-1)
    ref_logprob = (head["weight"] @ ref_hidden).log_softmax(-1)

    def micro():
        rows = (ref_hidden, every, sampler, ref_logprob, advantage, torch.arange(tokens))
        names = ("ref_hidden_LH", "logprob_L", "sampler_logprob_L", "ref_logprob_L", "advantage_L", "targets_L")
        fields = dict(zip(names, rows, strict=True))
        fields["ref_hidden_LH"] = ref_hidden.expand(tokens, -1)
        return SimpleNamespace(batch=SimpleNamespace(targets_L=fields.pop("targets_L"), kept=None), **fields)

    for settings in ({"kl_estimator": "k2"}, {"kl_estimator": "k3"}, {"entropy_coef": 0.1}):
        leaf, args = hidden.clone().requires_grad_(), SafeConfig(**NO_TERMS | settings, importance_cap=1e6)
        rows = leaf.expand(tokens, -1)
        losses.policy_loss(rows, head, micro(), sampler.exp(), control(0.7), args).loss.backward()

        exact = hidden.clone().requires_grad_()
        logprob = (head["weight"] @ exact).log_softmax(-1)
        entropy, kl = -(logprob.exp() * logprob).sum(), (logprob.exp() * (logprob - ref_logprob)).sum()
        sampled = {"k2": losses.k2, "k3": losses.k3}.get(args.kl_estimator)
        if sampled is not None:  # its mean under the policy that sampled, whose probabilities do not move
            kl = (every.exp() * sampled(logprob, ref_logprob)).sum()
        surrogate = (every.exp() * (logprob - every).exp() * advantage).sum()
        (-surrogate - args.entropy_coef * entropy + 0.7 * kl).backward()
        torch.testing.assert_close(leaf.grad, exact.grad)


def test_the_importance_cap_leaves_penalty_and_entropy_alone():
    """With the clip active for both signs of the advantage, the surrogate's gradient is scaled and nothing else is."""
    advantage = torch.tensor([1.0, -1.0, 2.0, -2.0, 0.5, -0.5, 1.0])
    old = case()[2].logprob_L
    moved = {"logprob_L": old + torch.tensor([0.5, 0.5, -0.5, -0.5, 0.1, -0.1, 0.0])}
    importance = torch.tensor([0.2, 0.9, 1.5, 1.5, 0.5, 1.0, 0.1])  # after the cap
    sampler = {"sampler_logprob_L": moved["logprob_L"] - torch.tensor([0.2, 0.9, 7.0, 1.5, 0.5, 1.0, 0.1]).log()}
    others = {"entropy_coef": 0.1, "kl_penalty_coef": 0.3, "threshold": 0.01, "kl_coef": 0.2}
    none = {"advantage_L": torch.zeros(7)}
    terms = gradient(moved | sampler | none, importance_cap=1.5, **others)[1]
    torch.testing.assert_close(terms, gradient(moved | none, **others)[1])
    ours = gradient(moved | sampler | {"advantage_L": advantage}, importance_cap=1.5, **others)[1]
    surrogate = gradient(moved | {"advantage_L": advantage})[1] * importance[:, None]
    torch.testing.assert_close(ours, terms + surrogate)
    assert (surrogate.abs().sum(-1) == 0).sum() == 2  # one of each sign is clipped


def value_case(values, old, returns):
    micro = SimpleNamespace(
        values_KL=torch.tensor(old), returns_L=torch.tensor(returns), is_scored_L=torch.tensor(True)
    )
    live = torch.tensor(values, requires_grad=True)
    weight = torch.full((len(returns),), 1 / len(returns))
    losses.value_loss(live, micro, weight, SafeConfig(value_clip=0.2, huber_delta=0.5)).backward()
    return live.grad


def test_both_heads_regress_the_returns():
    """The published code regresses only the soft-min, so the heads are not independent."""
    below, above = value_case([[0.0], [1.5]], [[0.0], [1.5]], [1.0])
    assert below < 0 < above


def test_value_loss_without_clipping_is_huber():
    values, returns = torch.tensor([[0.3, -0.2]]), torch.tensor([0.25, 2.0])
    micro = SimpleNamespace(values_KL=values, returns_L=returns, is_scored_L=torch.tensor(True))
    loss = losses.value_loss(values, micro, torch.full((2,), 0.5), SafeConfig())
    torch.testing.assert_close(loss, huber_loss(values[0], returns, delta=0.5))


def test_value_clip_stops_the_gradient_of_a_value_that_moved_far_toward_the_return():
    moved_past, moved_away = value_case([[0.5]], [[0.0]], [1.0]), value_case([[-0.5]], [[0.0]], [1.0])
    assert moved_past.abs().max() == 0
    assert moved_away.abs().max() > 0


def test_rewards_arrive_on_the_last_token():
    batch = TokenBatch.pack([[1]] * 3, [[2, 3], [], [4, 5, 6]])
    assert advantages.token_rewards(torch.tensor([1.0, 9.0, 3.0]), batch.response_cu_seqlens).tolist() == [
        0.0,
        1.0,
        0.0,
        0.0,
        3.0,
    ]


def test_group_advantages_compare_with_the_group_and_vanish_for_equal_rewards():
    found = group_advantages(torch.tensor([1.0, 3.0, 7.0, 7.0]), 2)
    assert found[:2].tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5], rel=1e-3)
    assert found[2:].tolist() == [0, 0]


def test_whitening_centres_what_it_cannot_scale():
    for values, expected in (([3.0, 3.0], [0.0, 0.0]), ([1.0, 3.0], [-1.0, 1.0])):
        v = torch.tensor(values)
        assert advantages.whiten(v, v.mean(), v.var(correction=0)).tolist() == pytest.approx(expected)


def test_critic_sends_no_gradient_to_the_policy():
    hidden = torch.randn(5, 16, requires_grad=True)
    critic = Critic(16, SafeConfig())
    critic(hidden).sum().backward()
    assert hidden.grad is None and all(p.grad is not None for p in critic.heads.parameters())


def test_targets_start_as_copies_and_lag_behind():
    """The published targets are never read; ours are what the returns are made from."""
    critic, hidden = Critic(16, SafeConfig()), torch.randn(5, 16)
    assert torch.equal(critic(hidden), critic.target(hidden))
    assert not torch.equal(critic(hidden)[0], critic(hidden)[1])
    old = [p.clone() for p in critic.target_heads.parameters()]
    with torch.no_grad():
        for p in critic.heads.parameters():
            p.add_(1.0)
    critic.polyak(0.25)
    for before, target in zip(old, critic.target_heads.parameters(), strict=True):
        torch.testing.assert_close(target, before + 0.25)


@pytest.mark.parametrize(("reading", "heads"), [("soft_min", 2), ("mean", 2), ("single", 1)])
def test_critic_readings(reading, heads):
    critic = Critic(16, SafeConfig(critic=reading))
    values = critic(torch.randn(5, 16, dtype=torch.bfloat16))
    assert values.shape == (heads, 5) and values.dtype == torch.float32
    first, second = critic.pair(values)
    assert torch.equal(first, second) == (reading != "soft_min")
    assert torch.equal(first, values[0] if reading != "mean" else values.mean(0))
