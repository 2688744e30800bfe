"""A temperature other than 1 reaches all that samples and all that takes log-probs, of policy and reference alike.

What is right comes from a copy of the model in float64: its own logits, one sequence at a time, divided by T.

Shape legend: L response tokens, V vocabulary.
"""

import copy

import pytest
import tiny
import torch
from architectures import tiny_of

from safe_train.algorithms import losses
from safe_train.engines import projection
from safe_train.engines.projection import mean_kl
from safe_train.models import scoring
from safe_train.models.policy import make_policy
from safe_train.run import self_check
from safe_train.sampling.experience import Experience
from safe_train.sampling.rollout import sample

TEMPERATURES = (0.7, 1.3)
CLOSE = {"atol": 2e-5, "rtol": 0}


def softcapped(**changes):
    return tiny_of("Gemma2", vocab_size=len(tiny.WORDS), final_logit_softcapping=3.0, head_dim=8, **changes)


POLICIES = {
    "lora": lambda: (tiny.model(), {}),
    "all weights": lambda: (tiny.model(), {"lora_r": 0}),
    "an adapter that was trained": lambda: (tiny.trained_adapter(), {}),
    "a softcap": lambda: (softcapped(), {"layout": "rows"}),
}


class Twin:
    """Policy and reference in float64, with the gradient of the policy's trained weights."""

    def __init__(self, trainer, handed_over, temperature):
        self.policy = copy.deepcopy(trainer.policy.model).double().eval()
        self.reference, self.temperature = handed_over, temperature

    def logp_LV(self, model, micro):
        rows = zip(micro.batch.cu_seqlens, micro.batch.cu_seqlens[1:], strict=False)
        logits = [model(input_ids=micro.batch.input_ids_N[None, start:end]).logits[0] for start, end in rows]
        return (torch.cat(logits)[micro.batch.predict_L] / self.temperature).log_softmax(-1)

    def statistics(self, micro):
        """Log-prob, entropy, the reference's log-prob and KL, each [L]."""
        p_LV, q_LV = self.logp_LV(self.policy, micro), self.logp_LV(self.reference, micro).detach()
        at = micro.batch.targets_L[:, None]
        entropy_L, kl_L = -(p_LV.exp() * p_LV).sum(-1), (p_LV.exp() * (p_LV - q_LV)).sum(-1)
        return p_LV.gather(-1, at)[:, 0], entropy_L, q_LV.gather(-1, at)[:, 0], kl_L


def start(folder, kind, temperature, moved=True, **changes):
    """A trainer and its twin; `moved` says that the policy has gone on from its reference."""
    model, settings = POLICIES[kind]()
    handed_over = copy.deepcopy(model).double().eval()
    trainer = tiny.trainer(folder, policy=model, temperature=temperature, **settings | changes)
    if moved:
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in trainer.trainable:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return trainer, Twin(trainer, handed_over, temperature)


def close(found, expected):
    torch.testing.assert_close(found.double(), expected.detach(), **CLOSE)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", POLICIES)
def test_what_is_sampled_and_scored_is_the_models_own_at_the_temperature(kind, temperature, tmp_path):
    trainer, twin = start(tmp_path, kind, temperature)
    for micro in tiny.experience_of(trainer)[0]:
        logprob_L, entropy_L, ref_logprob_L, kl_L = twin.statistics(micro)
        close(micro.sampler_logprob_L, logprob_L)
        close(micro.logprob_L, logprob_L)
        close(micro.entropy_L, entropy_L)
        close(micro.ref_logprob_L, ref_logprob_L)
        close(micro.kl_L, kl_L)
        assert kl_L.mean() > 1e-3
        close(torch.tensor(mean_kl(trainer.policy, [micro])), kl_L.mean())
        found = self_check.log_probs(trainer.policy, micro.batch)
        for one, expected in zip(found, (logprob_L, ref_logprob_L, kl_L), strict=True):
            close(one, expected)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", POLICIES)
def test_the_first_update_begins_with_ratio_1_and_kl_0(kind, temperature, tmp_path):
    trainer, _ = start(tmp_path, kind, temperature, moved=False)
    experience, control = tiny.experience_of(trainer)
    for micro in experience:
        hidden_LH, head = trainer.policy(micro.batch), trainer.policy.head()
        weight_L = torch.full_like(micro.logprob_L, 0.1)
        loss = losses.policy_loss(hidden_LH, head, micro, weight_L, control, trainer.args)
        assert torch.equal(loss.logprob, micro.logprob_L) and loss.clip_fraction == 0
        assert torch.equal(micro.logprob_L, micro.ref_logprob_L) and micro.kl_L.abs().max() < 1e-6
    history = tiny.trainer(tmp_path, temperature=temperature, inner_epochs=1, minibatch_size=8, total_steps=1).train()
    assert (history[0]["ratio_mean"], history[0]["clip_fraction"]) == (pytest.approx(1, abs=1e-6), 0)
    assert history[0]["kl"] < 1e-6 and history[0]["sampler_gap"] < 1e-5


LOSSES = {
    "exact": {"kl_penalty_coef": 0.5},
    "k2": {"kl_estimator": "k2"},
    "k3": {"kl_estimator": "k3", "importance_cap": 1.5},
    "importance weights": {"importance_cap": 1.5},
}


def composed(twin, micro, weight_L, control, args):
    """The loss by its definition, in float64."""
    logprob_L, entropy_L, ref_logprob_L, kl_L = twin.statistics(micro)
    cap = args.importance_cap
    seen_L = (micro.logprob_L - micro.sampler_logprob_L).double().exp().clamp(max=cap) if cap else 1.0
    ratio_L, advantage_L = (logprob_L - micro.logprob_L.double()).exp(), micro.advantage_L.double()
    clipped_L = ratio_L.clamp(1 - args.clip_low, 1 + args.clip_high)
    surrogate_L = seen_L * torch.minimum(ratio_L * advantage_L, clipped_L * advantage_L)
    d_L = ref_logprob_L - logprob_L
    estimate_L = {"exact": kl_L, "k2": d_L**2 / 2, "k3": d_L.exp() - 1 - d_L}[args.kl_estimator]
    if args.kl_estimator != "exact":
        estimate_L = seen_L * estimate_L
    excess_L = (kl_L - control.kl_threshold).clamp(min=0) ** 2
    terms_L = control.kl_coef * estimate_L - surrogate_L - args.entropy_coef * entropy_L
    return (weight_L.double() * (terms_L + args.kl_penalty_coef * excess_L)).sum()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", LOSSES)
def test_the_loss_and_its_gradient_are_those_of_the_tempered_policies(kind, temperature, tmp_path):
    trainer, _ = start(tmp_path, "lora", temperature, **LOSSES[kind])
    experience, control = tiny.experience_of(trainer)
    control = control._replace(kl_coef=0.7, kl_threshold=0.01)
    torch.manual_seed(5)
    with torch.no_grad():  # after an update of the rollout, and a sampler of its own rounding
        for parameter in trainer.trainable:
            parameter.add_(0.02 * torch.randn_like(parameter))
    twin = Twin(trainer, tiny.model().double(), temperature)
    for micro in experience:
        micro.sampler_logprob_L = micro.logprob_L + 0.5 * torch.randn_like(micro.logprob_L)
        weight_L = torch.rand_like(micro.logprob_L)
        hidden_LH = trainer.policy(micro.batch)
        loss = losses.policy_loss(hidden_LH, trainer.policy.head(), micro, weight_L, control, trainer.args).loss
        expected = composed(twin, micro, weight_L, control, trainer.args)
        # Through a whole float32 model, whose rounding no plain twin measures.
        torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=1e-5)
        own = [p for p in twin.policy.parameters() if p.requires_grad]
        wanted = torch.autograd.grad(expected, own)
        for found, right in zip(torch.autograd.grad(loss, trainer.trainable), wanted, strict=True):
            assert (found - right).abs().max() <= 3e-5 * right.abs().max()  # 8e-6 was measured


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_an_evaluation_is_of_the_tempered_policies(temperature, tmp_path):
    trainer, twin = start(tmp_path, "lora", temperature)
    found = trainer.evaluate()
    statistics = [twin.statistics(m) for m in Experience(trainer.policy, None, found.rollout, trainer.args, "cpu")]
    _, entropy_L, ref_logprob_L, kl_L = (torch.cat(each) for each in zip(*statistics, strict=True))
    expected = (entropy_L.mean(), ref_logprob_L.mean(), kl_L.mean())
    assert (found.entropy, found.reference_logprob, found.kl) == pytest.approx([x.item() for x in expected], abs=2e-5)


@pytest.mark.parametrize("changes", [{}, {"cache_implementation": "static", "generation_batch_size": 1500}])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_samples_follow_the_tempered_distribution(temperature, changes):
    args, tokenizer = tiny.settings("", temperature=temperature, max_new_tokens=1, **changes), tiny.tokenizer()
    policy, count = make_policy(tiny.model(), args), 3000
    prompts = [tiny_prompt("the cat", tokenizer)] * count
    torch.manual_seed(0)
    drawn = torch.tensor([tokens[0] for tokens in sample(policy, tokenizer, prompts, args).completions])
    with torch.no_grad():
        logits_V = tiny.model().double()(torch.tensor([prompts[0].ids])).logits[0, -1]
    expected_V = count * (logits_V / temperature).softmax(-1)
    error_V = torch.bincount(drawn, minlength=len(tiny.WORDS)) - expected_V
    assert (error_V.abs() < 4.5 * expected_V.sqrt() + 1).all()
    plain_V = count * logits_V.softmax(-1)
    assert ((torch.bincount(drawn, minlength=len(tiny.WORDS)) - plain_V).abs() > 6 * plain_V.sqrt()).any()


def tiny_prompt(text, tokenizer):
    from safe_train.data.prompts import PromptDataset

    return PromptDataset([{"prompt": text}], tokenizer, 16).at(0, 1)[0]


CALLS = ("linear_token_stats", "linear_policy_loss")


@pytest.mark.parametrize(
    "changes",
    [
        {"max_preview_kl": 0.01, "eval_every": 1},
        {"algorithm": "grpo", "kl_estimator": "k3"},
        {"algorithm": "ppo", "kl_gradient": "return", "lora_r": 0},
        {"algorithm": "safe_paper", "top_k": 5, "minibatch_size": None},
        {"algorithm": "ppo_paper", "normalize_rewards": False, "entropy_coef": 0.0, "minibatch_size": None,
         "critic_max_grad_norm": float("inf")},
    ],
    ids=lambda changes: changes.get("algorithm", "safe"),
)  # fmt: skip
def test_each_call_of_a_run_is_given_the_temperature(changes, tmp_path, monkeypatch):
    seen = []

    def watched(function):
        def call(*arguments, **options):
            seen.append((function.__name__, options["temperature"]))
            return function(*arguments, **options)

        return call

    for place in ("models.checks", "run.self_check"):
        monkeypatch.setattr(f"safe_train.{place}.head_gap", lambda *_: 0.0)  # at temperature 1, on both sides
    for module in (losses, scoring, projection):
        for name in CALLS:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, watched(getattr(module, name)))
    history = tiny.trainer(tmp_path, temperature=0.7, total_steps=2, **changes).train()
    trainer = tiny.trainer(tmp_path, temperature=0.7, total_steps=3, **changes)
    history += trainer.train(resume_from_checkpoint=True)
    trainer.evaluate()
    assert {temperature for _, temperature in seen} == {0.7} and {name for name, _ in seen} == set(CALLS)
    assert all(row["sampler_gap"] < 1e-5 for row in history)


@pytest.mark.parametrize("temperature", [0.05, 30.0])
def test_an_extreme_temperature_is_no_reason_to_stop(temperature, tmp_path):
    for kind in ("lora", "all weights"):
        model, settings = POLICIES[kind]()
        trainer = tiny.trainer(tmp_path / kind, policy=model, temperature=temperature, **settings)
        assert len(trainer.train()) == 3
