"""`kl_gradient: return`: the KL's whole gradient, against autograd through the sum over all sequences of a toy."""

import copy
import dataclasses
import math
from itertools import combinations_with_replacement, permutations, product

import pytest
import tiny
import torch

from safe_train.algorithms import losses, returns
from safe_train.algorithms.advantages import credit
from safe_train.algorithms.controller import Control
from safe_train.algorithms.critic import Critic, reward_heads
from safe_train.config import ConfigError, SafeConfig
from safe_train.data.prompts import Prompt
from safe_train.sampling.experience import Experience
from safe_train.sampling.rollout import Rollout

VOCABULARY, LENGTH = 4, 3
WHOLE = list(product(range(VOCABULARY), repeat=LENGTH))
# Token 0 ends a response.
ENDING = sorted({seq[: seq.index(0) + 1] if 0 in seq else seq for seq in WHOLE})
CONTROL = Control(0.7, 0.05, 0, 0, 0, 0, 1, 1, 0, "warmup")


def row(prefix) -> int:
    """Of a table with one row a prefix, shorter ones first."""
    first = (VOCABULARY ** len(prefix) - 1) // (VOCABULARY - 1)
    return first + sum(token * VOCABULARY**i for i, token in enumerate(prefix))


class Toy:
    """Logits of the next token after each prefix, as a policy of one layer whose head is the identity."""

    layout = "packed"

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        rows = row((0,) * LENGTH)
        self.logits = torch.randn(rows, VOCABULARY, generator=g, dtype=torch.float64).requires_grad_()
        self.ref_logits = self.logits.detach() + torch.randn(rows, VOCABULARY, generator=g, dtype=torch.float64)

    def head(self):
        return {"weight": torch.eye(VOCABULARY, dtype=torch.float64)}

    def states(self, batch, table):
        bounds = batch.response_cu_seqlens.tolist()
        responses = [batch.targets_L[a:b].tolist() for a, b in zip(bounds, bounds[1:], strict=False)]
        return table[[row(response[:t]) for response in responses for t in range(len(response))]]

    def __call__(self, batch):
        return self.states(batch, self.logits)

    def reference(self, batch):
        return self.states(batch, self.ref_logits)

    def logprobs_and_costs(self, sequence, args):
        """Of the tokens of a response, differentiable."""
        rows = [row(sequence[:t]) for t in range(len(sequence))]
        logp, logq = self.logits[rows].log_softmax(-1), self.ref_logits[rows].log_softmax(-1)
        kl = (logp.exp() * (logp - logq)).sum(-1)
        cost = CONTROL.kl_coef * kl + args.kl_penalty_coef * (kl - CONTROL.kl_threshold).relu() ** 2
        return logp[range(len(sequence)), sequence], cost


class ToyCritic(Critic):
    """No value of the reward, which is 0; of the later KL an arbitrary function of the state."""

    def read(self, heads, hidden_LH):
        value_L = hidden_LH.detach() @ torch.tensor([0.3, -0.5, 0.2, 0.7], dtype=torch.float64)
        values_KL = torch.zeros(reward_heads(self.args), len(value_L), dtype=torch.float64)
        return torch.cat([values_KL, value_L[None]]) if self.args.kl_gradient == "return" else values_KL


def rollout_of(responses) -> Rollout:
    count = len(responses)
    tokens = [list(response) for response in responses]
    zeros = [[0.0] * len(response) for response in responses]
    return Rollout([Prompt("", [0], {})] * count, tokens, [""] * count, [True] * count, zeros)


def settings(**changes) -> SafeConfig:
    values = {"algorithm": "grpo", "entropy_coef": 0.0, "max_new_tokens": LENGTH, "completions_per_prompt": 2}
    return SafeConfig(**values | {"gae_lambda": 1.0} | changes)


def expected_gradient(toy, args, sequences, together=1):
    """Of our loss, over all rollouts of so many completions, of which the policy draws each by itself."""
    args = copy.copy(args)
    args.completions_per_prompt = together  # a group of one has no other to be compared with
    critic, total = None if args.critic == "none" else ToyCritic(VOCABULARY, args), 0.0
    for responses in combinations_with_replacement(sequences, together):
        experience = Experience(toy, critic, rollout_of(responses), args, torch.device("cpu"))
        credit(experience, torch.zeros(together, dtype=torch.float64), CONTROL, args)
        (micro,) = experience
        chance = len(set(permutations(responses))) * micro.logprob_L.sum().exp()
        weight_L = losses.token_weights(micro, losses.Totals(LENGTH * together, together), args)
        total = total + chance * losses.policy_loss(toy(micro.batch), toy.head(), micro, weight_L, CONTROL, args).loss
    return torch.autograd.grad(total, toy.logits)[0]


def exact_gradient(toy, args, sequences):
    total = 0.0
    for sequence in sequences:
        logprob, cost = toy.logprobs_and_costs(sequence, args)
        total = total + logprob.sum().exp() * cost.sum()
    return torch.autograd.grad(total / LENGTH, toy.logits)[0]


def later_part(toy, args, sequences, discount=1.0):
    """E[sum_t grad log p_t sum_{s > t} discount^(s - t) c_s], token by token."""
    total = 0.0
    for sequence in sequences:
        logprob, cost = toy.logprobs_and_costs(sequence, args)
        chance = logprob.sum().exp().detach()
        for t, later in ((t, s) for s in range(len(sequence)) for t in range(s)):
            total = total + chance * logprob[t] * discount ** (later - t) * cost[later].detach()
    return torch.autograd.grad(total / LENGTH, toy.logits)[0]


CASES = {
    "grpo": {},
    "a ratio that is no built-in": {"algorithm": "cispo"},
    "a one-sided penalty, too": {"kl_penalty_coef": 0.4},
    "the same of the composed loss": {"algorithm": "cispo", "kl_penalty_coef": 0.4},
    "a critic": {"algorithm": "ppo"},
    "a pessimistic critic": {"algorithm": "safe"},
}


@pytest.mark.parametrize("name", CASES)
def test_the_expected_gradient_is_that_of_the_expected_kl(name):
    """Responses of one or several lengths; the scale of each aggregation is that of the token's own part."""
    toy = Toy()
    for sequences, aggregation in (
        (WHOLE, "token_mean"), (WHOLE, "sequence_mean"), (WHOLE, "constant_length"), (ENDING, "constant_length"),
    ):  # fmt: skip
        args = settings(**CASES[name], kl_gradient="return", loss_aggregation=aggregation)
        exact = exact_gradient(toy, args, sequences)
        torch.testing.assert_close(expected_gradient(toy, args, sequences), exact)
        token = expected_gradient(toy, dataclasses.replace(args, kl_gradient="token"), sequences)
        missing = later_part(toy, args, sequences)
        assert missing.norm() > 0.3 * exact.norm()
        torch.testing.assert_close(token + missing, exact)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_the_mean_of_the_others_is_a_baseline_without_bias(algorithm):
    toy = Toy()
    args = settings(algorithm=algorithm, kl_gradient="return", loss_aggregation="constant_length")
    found = expected_gradient(toy, args, ENDING, together=2)
    torch.testing.assert_close(found, exact_gradient(toy, args, ENDING))


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_later_kl_is_discounted(algorithm):
    toy, args = Toy(), settings(algorithm=algorithm, kl_gradient="return", gamma=0.8)
    token = expected_gradient(toy, dataclasses.replace(args, kl_gradient="token"), WHOLE)
    found = expected_gradient(toy, args, WHOLE)
    torch.testing.assert_close(found - token, later_part(toy, args, WHOLE, discount=0.8))


ONLINE, LAGGED = 0.3, -0.2  # the KL's head


def moved(trainer):
    """The trainer with a policy away from its reference, so that there is a KL to charge, and values of later KL."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in trainer.trainable:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
        if trainer.critic is not None and trainer.args.kl_gradient == "return":
            for heads, value in ((trainer.critic.heads, ONLINE), (trainer.critic.target_heads, LAGGED)):
                assert not any(parameter.any() for parameter in heads[-1][-1].parameters())  # where it starts
                heads[-1][-1].bias.fill_(value)
    return trainer


def credited(folder, reward=tiny.good_words, **changes):
    """The experience of a first step, with advantages, and the controller's decision."""
    trainer = moved(tiny.trainer(folder, reward, **{"max_new_tokens": 6, "prompts_per_step": 8} | changes))
    return tiny.experience_of(trainer)


def costs_by_hand(experience, control, args):
    """{completion: the cost of its later KL, of each token}, in float64, by the definition."""
    found = {}
    for micro in experience:
        lengths = micro.batch.response_cu_seqlens.diff().tolist()
        for i, kl in zip(micro.indices, micro.kl_L.double().split(lengths), strict=True):
            cost = control.kl_coef * kl + args.kl_penalty_coef * (kl - control.kl_threshold).relu() ** 2
            pairs = [[args.gamma ** (s - t) * cost[s] for s in range(t + 1, len(kl))] for t in range(len(kl))]
            found[i] = [float(sum(later)) for later in pairs]
    return found


def by_completion(experience, name="advantage_L"):
    return {
        i: values
        for micro in experience
        for i, values in zip(
            micro.indices, getattr(micro, name).split(micro.batch.response_cu_seqlens.diff().tolist()), strict=True
        )
    }


REWARDS = {
    "group": {"algorithm": "grpo"},
    "batch": {"algorithm": "grpo", "scale_rewards": "batch"},
    "none": {"algorithm": "cispo", "scale_rewards": "none", "gamma": 0.9},
    "of several": {"algorithm": "grpo", "multi_objective_aggregation": "normalize_then_sum"},
    "permuted": {"algorithm": "grpo", "shuffle_advantages": True},
    "penalty": {"algorithm": "grpo", "kl_penalty_coef": 0.3, "kl_threshold": 0.1},
    "small micro-batches": {"algorithm": "grpo", "max_tokens_per_microbatch": 8, "minibatch_size": 2},
}


@pytest.mark.parametrize("name", REWARDS)
def test_nothing_that_scales_rewards_scales_the_kl(name, tmp_path):
    """Beside the advantage without it, the charge is what the definition says, for completions of any length."""
    plain, _ = credited(tmp_path / "token", **REWARDS[name])
    experience, control = credited(tmp_path / "return", **REWARDS[name], kl_gradient="return")
    costs = costs_by_hand(experience, control, experience.args)
    before, after = by_completion(plain), by_completion(experience)
    assert len({len(cost) for cost in costs.values()}) > 2 and max(map(max, costs.values())) > 0.05
    for i, cost in costs.items():
        others = [[c[t] for j, c in costs.items() if j != i and len(c) > t] for t in range(len(cost))]
        usual = torch.tensor([math.fsum(x) / max(1, len(x)) for x in others])
        torch.testing.assert_close(before[i] - after[i], torch.tensor(cost) - usual, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("algorithm", ["safe", "ppo", "ppo_two_heads"])
def test_with_a_critic_the_charge_is_gae_on_what_the_others_paid_and_its_own_head(algorithm, tmp_path):
    """The reward's part is that of a run without it, whitened by itself."""
    plain, _ = credited(tmp_path / "token", algorithm=algorithm, beta=0.1)
    experience, control = credited(tmp_path / "return", algorithm=algorithm, beta=0.1, kl_gradient="return")
    heads = reward_heads(experience.args)
    assert torch.equal(plain.tokens("values_KL"), experience.tokens("values_KL")[:heads])
    assert torch.equal(plain.tokens("returns_L"), experience.tokens("returns_L"))
    assert experience.tokens("values_KL")[heads:].shape[0] == 1
    costs, lam = costs_by_hand(experience, control, experience.args), 1 - 1 / 6
    before, after, targets = (
        by_completion(plain),
        by_completion(experience),
        by_completion(experience, "unusual_cost_L"),
    )
    for i, cost in costs.items():
        others = [[c[t] for j, c in costs.items() if j != i and len(c) > t] for t in range(len(cost))]
        usual = [math.fsum(x) / max(1, len(x)) for x in others]
        charge = gae_by_hand(cost, [value + ONLINE for value in usual], lam)
        target = [LAGGED + x for x in gae_by_hand(cost, [value + LAGGED for value in usual], lam)]
        torch.testing.assert_close(before[i] - after[i], torch.tensor(charge), atol=5e-6, rtol=1e-5)
        torch.testing.assert_close(targets[i], torch.tensor(target), atol=5e-6, rtol=1e-5)


def gae_by_hand(later, values, lam):
    """Advantages of what `later` sums up from each token on, without a discount."""
    found, following = [0.0] * len(later), 0.0
    for t in reversed(range(len(later))):
        next_sum, next_value = (later[t + 1], values[t + 1]) if t + 1 < len(later) else (0.0, 0.0)
        found[t] = following = later[t] - next_sum + next_value - values[t] + lam * following
    return found


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_where_the_reward_says_nothing_the_kl_still_does(algorithm, tmp_path):
    """Groups of equal rewards, and completions to which no reward applies."""
    for name, reward in (("equal", 1.0), ("none", None)):
        experience, _ = credited(
            tmp_path / name, lambda completions, value=reward, **_: [value] * len(completions),
            algorithm=algorithm, kl_gradient="return", normalize_rewards=False,
        )  # fmt: skip
        advantages = by_completion(experience)
        assert all(x[:-1].ne(0).all() for x in advantages.values())
        if algorithm == "grpo":
            costs = experience.table("later_cost_L")
            position = torch.cat([x.new_tensor(range(len(x))) for x in advantages.values()]).long()
            totals = torch.zeros(costs.shape[1]).index_add(0, position, torch.cat([*advantages.values()]))
            torch.testing.assert_close(totals, torch.zeros_like(totals), atol=1e-5, rtol=0)


def test_the_heads_learn_from_what_each_is_there_for(tmp_path):
    """The KL's head has a target at every token, the reward's only where a reward applies."""
    rewards = [1.0, None] * 8
    trainer = moved(tiny.trainer(tmp_path, lambda **_: rewards, prompts_per_step=8, kl_gradient="return"))
    experience, _ = tiny.experience_of(trainer)
    for micro in experience:
        values_KL = (micro.values_KL + 0.01).requires_grad_()
        weight_L = torch.full_like(micro.returns_L, 0.5)
        loss = losses.value_loss(values_KL, micro, weight_L, trainer.args)
        (gradient_KL,) = torch.autograd.grad(loss, values_KL)
        assert torch.equal(gradient_KL[:2].ne(0).all(0), micro.is_scored_L)
        assert gradient_KL[2].ne(0).float().mean() > 0.5
    assert not experience.tokens("is_scored_L").all()
    trainer.update(experience, trainer.controller.last)
    for heads in (trainer.critic.heads, trainer.critic.target_heads):
        assert heads[2][-1].weight.any()


RUNS = {
    "grpo": {"algorithm": "grpo", "beta": 0.5},
    "cispo": {"algorithm": "cispo", "gamma": 0.9},
    "ppo": {"algorithm": "ppo", "beta": 0.5},
    "safe": {"kl_threshold": 0.1, "kl_threshold_max": 0.1},
    "a budget": {"algorithm": "grpo", "kl_budget": 0.02},
    "dynamic sampling": {"algorithm": "grpo", "dynamic_sampling": 2, "importance_cap": 2.0},
    "a critic of prompts": {"algorithm": "safe", "value_level": "sequence", "kl_penalty_coef": 0.2},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_learns_from_it_and_resumes_exactly(name, tmp_path):
    settings = {"total_steps": 4, "save_every": 2, "learning_rate": 2e-2, "window": 3, **RUNS[name]}
    whole = tiny.trainer(tmp_path / "whole", kl_gradient="return", **settings)
    history = whole.train()
    assert all(math.isfinite(row["policy_loss"]) and row["bad_steps"] == 0 for row in history)
    tiny.trainer(tmp_path / "cut", kl_gradient="return", **settings | {"total_steps": 2}).train()
    second = tiny.trainer(tmp_path / "cut", kl_gradient="return", **settings)
    resumed = second.train(resume_from_checkpoint=True)
    assert history[-1]["kl_return"] > 0 and 0 < history[-1]["kl_return_explained"] < 1
    for name in ("kl", "kl_return", "kl_return_explained"):
        assert [row[name] for row in resumed] == [row[name] for row in history[2:]]
    for mine, theirs in zip(second.trainable, whole.trainable, strict=True):
        assert torch.equal(mine, theirs)
    token = tiny.trainer(tmp_path / "token", **settings)
    assert token.train()[0]["kl"] == history[0]["kl"]
    assert not torch.equal(token.trainable[0], whole.trainable[0])


def test_a_checkpoint_without_the_kls_head_does_not_fit(tmp_path):
    tiny.trainer(tmp_path).train()
    with pytest.raises(ConfigError, match="does not fit this run's settings"):
        tiny.trainer(tmp_path, total_steps=4, kl_gradient="return").train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kl_gradient": "sequence"}, "kl_gradient must be one of token, return, got 'sequence'"),
        ({"kl_gradient": True}, "kl_gradient must be str, got True"),
        ({"kl_gradient": "return", "kl_estimator": "k3"}, "kl_estimator must be exact with kl_gradient return"),
        (
            {"kl_gradient": "return", "algorithm": "grpo", "completions_per_prompt": 2,
             "importance_sampling_level": "sequence"},
            "kl_gradient must be token with importance_sampling_level sequence",
        ),
        ({"kl_gradient": "return", "algorithm": "safe_paper"}, "kl_gradient must be left alone for safe_paper"),
        ({"kl_in_reward": True}, "unknown setting 'kl_in_reward'; it is gone: kl_gradient=return charges"),
        ({"use_kl_in_reward": True}, "here it is kl_gradient=return"),
        ({"use_kl_in_reward": False}, "here it is kl_gradient=token"),
        ({"kl_estimator": "k1"}, "use exact, k2 or k3"),
    ],
)  # fmt: skip
def test_what_it_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        SafeConfig(**changes)


def test_what_follows_stays_in_its_response():
    boundaries = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    assert returns.following(torch.arange(1.0, 6.0), boundaries).tolist() == [2.0, 0.0, 4.0, 5.0, 0.0]
    assert returns.following(torch.zeros(0), torch.tensor([0, 0], dtype=torch.int32)).tolist() == []
