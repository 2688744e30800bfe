"""The KL budget: what it measures, how it moves the policy back, what it refuses, and the controller beside it."""

import math

import peft
import pytest
import tiny
import torch
from test_adapters import METHODS, base
from test_checkpoint import metrics

from safe_train.algorithms.budget import FIRST, ROUNDING, START_MARGIN, TARGET, BudgetLaw
from safe_train.algorithms.controller import Controller
from safe_train.config import ConfigError, SafeConfig
from safe_train.engines.projection import OverBudget, mean_kl, secant, to_reference, walk_back

BUDGET = 0.05


class Curve:
    """The KL along a line, as a function of the scale."""

    def __init__(self, kl):
        self.kl_at, self.scale, self.forwards = kl, 1.0, 0

    def shrink(self, factor):
        self.scale *= factor

    def measure(self):
        self.forwards += 1
        return self.kl_at(self.scale)

    def walk(self, bound, **options):
        return walk_back(self.shrink, self.measure, self.kl_at(1.0), bound, **options)


CURVES = {
    "quadratic": lambda s: 0.5 * s**2,
    "quadratic and cubic": lambda s: 0.4 * s**2 + 2 * s**3,
    "slower than a square": lambda s: 2 * s**1.2,
    "quartic": lambda s: 3 * s**4,
    "saturates": lambda s: 3 * (1 - math.exp(-((s / 0.1) ** 2))),
    "logistic": lambda s: 4 * s**2 / (1 + 3 * s**2),
}


@pytest.mark.parametrize("bound", [0.001, 0.01, 0.05, 0.3])
@pytest.mark.parametrize("name", CURVES)
def test_the_walk_ends_within_the_bound_after_three_forwards_at_most(name, bound):
    curve = Curve(CURVES[name])
    walk = curve.walk(bound)
    assert walk.forwards == curve.forwards <= 3
    assert walk.scale == pytest.approx(curve.scale) and 0 < walk.scale < 1
    assert walk.kl == pytest.approx(CURVES[name](curve.scale)) and walk.kl <= bound
    if name.startswith("quadratic"):
        assert walk.kl >= 0.65 * bound


def test_a_square_takes_one_forward_and_a_power_two():
    assert Curve(CURVES["quadratic"]).walk(0.05) == pytest.approx((math.sqrt(0.97 * 0.1), 0.97 * 0.05, 1))
    assert secant([(1.0, 3.0), (0.5, 3 * 0.5**3)], 0.01, 2.0) == pytest.approx((0.01 / 3) ** (1 / 3))


def test_a_walk_within_the_bound_moves_nothing():
    for kl in (0.05, 0.01, 0.0):
        curve = Curve(lambda s, kl=kl: kl)
        assert curve.walk(0.05) == (1.0, kl, 0) and curve.scale == 1.0


@pytest.mark.parametrize("kl_at", [lambda s: 0.5, lambda s: 1 - 0.5 * s, lambda s: 0.5 if s == 1 else math.nan])
def test_a_walk_that_cannot_reach_the_bound_ends(kl_at):
    walk = Curve(kl_at).walk(0.05)
    assert not walk.kl <= 0.05 and walk.forwards <= 3


@pytest.mark.parametrize(
    "kls", [[0.096, 0.097, 0.08], [0.02, 0.03, 0.05], [-1e-9, 0.05, 0.08], [0.08, 0.08, 0.08]], ids=str
)
def test_a_walk_on_noisy_measurements_stays_on_the_line(kls):
    """Each is of other samples, so a KL may be higher at a smaller scale, or below 0 by rounding."""
    way = [1.0]
    following = iter(kls)
    walk_back(
        lambda factor: way.append(way[-1] * factor), lambda: next(following), 0.1, 0.09, aims=[0.95] * 3, too_low=0.99
    )
    assert len(way) > 1 and all(0 < scale <= 1 for scale in way)


def test_a_kl_that_is_not_finite_says_nothing_of_the_pace():
    law = BudgetLaw(SafeConfig(algorithm="ppo", beta=0.0, kl_budget=0.1))
    law.observe(math.nan, 1e-3)
    law.record(0.05, 0.05)
    law.observe(0.05, 1e-3)
    assert law.pace == 0.0


def test_a_kl_that_rounding_made_negative_is_none():
    law = BudgetLaw(SafeConfig(kl_budget=0.1))
    for kl in (0.0, -1.3e-9, 4e-8, -2.3e-8, 1e-7, -1e-9, 2e-7):
        law.observe(kl, 1e-7)
        assert law.is_near == (law.rollouts <= FIRST) and law.pace == 0
    law.observe(ROUNDING + 0.04, 0.1)
    assert law.pace == pytest.approx(0.2 / 1e-7) and law.is_near


def test_a_step_is_walked_back_on_a_straight_line_from_the_kl_before_it():
    """As `max_preview_kl` does: the KL is not 0 where the step began, nor least."""
    curve = Curve(lambda s: 0.1 + 0.4 * s)
    assert curve.walk(0.3, at_origin=0.1, power=1.0, shortest=0.1) == pytest.approx((0.485, 0.294, 1))
    above = Curve(lambda s: 0.5 + 0.1 * s)
    assert above.walk(0.5, at_origin=0.5, power=1.0, shortest=0.1) == pytest.approx((0.1, 0.51, 1))


def far(trainer, seed=3, by=0.1):
    """Moves all that is trained, so that the KL is some nats."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad(), trainer.engine.moving():
        for p in trainer.trainable:
            p.add_(by * torch.randn(p.shape, generator=draw))


@torch.no_grad()
def kl_in_float64(trainer, experience) -> float:
    """From the logits of both models."""
    total, tokens, head = 0.0, 0, trainer.policy.head()
    for micro in experience:
        weights = head["weight"], head.get("ref_weight", head["weight"])
        hidden = trainer.policy(micro.batch), micro.ref_hidden_LH
        p, q = ((h.double() @ w.double().T).log_softmax(-1) for h, w in zip(hidden, weights, strict=True))
        total, tokens = total + (p.exp() * (p - q)).sum().item(), tokens + len(p)
    return total / tokens


def bound(folder, model, **settings):
    """A trainer whose policy was moved far away, and what its first step collected."""
    trainer = tiny.trainer(folder, policy=model, kl_budget=BUDGET, **settings)
    experience, _ = tiny.experience_of(trainer)
    while mean_kl(trainer.policy, experience) < 2 * BUDGET:
        far(trainer, by=0.03)
    return trainer, experience


KINDS = {
    "LoRA": (tiny.model, {}),
    "full fine-tuning": (tiny.model, {"lora_r": 0}),
    "full fine-tuning, tied": (lambda: tiny.model(tie_word_embeddings=True), {"lora_r": 0}),
    "trained adapter": (tiny.trained_adapter, {}),
    "trained adapter, base": (tiny.trained_adapter, {"reference": "base"}),
} | {name: (lambda name=name: peft.get_peft_model(base(), METHODS[name]()), {}) for name in METHODS if name != "DELORA"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_is_moved_back_into_the_budget(kind, tmp_path):
    make, settings = KINDS[kind]
    trainer, experience = bound(tmp_path, make(), **settings)
    found = trainer.budget.hold(experience, 1.0)
    limit = BUDGET * (1 - START_MARGIN)
    assert found["budget/kl_reached"] > limit and 0 < found["budget/scale"] < 1 and found["budget/forwards"] <= 4
    assert found["budget/kl"] <= limit
    assert found["budget/kl"] == pytest.approx(kl_in_float64(trainer, experience), rel=1e-4, abs=1e-7)
    trainer.budget.check()
    to_reference(trainer.engine).shrink(0.0)
    assert mean_kl(trainer.policy, experience) == pytest.approx(0, abs=1e-6)


REFUSED = {
    "zero": (tiny.model, {"kl_budget": 0.0}, "kl_budget must be positive, got 0.0"),
    "negative": (tiny.model, {"kl_budget": -0.1}, "kl_budget must be positive"),
    "NaN": (tiny.model, {"kl_budget": math.nan}, "kl_budget must be positive, got nan"),
    "log V": (tiny.model, {"kl_budget": 3.2}, r"kl_budget must be at most log\(22\) = 3.091 nats"),
    "a method": (lambda: peft.get_peft_model(base(), METHODS["DELORA"]()), {}, "peft method DELORA"),
    "base": (lambda: tiny.trained_adapter(use_dora=True), {"reference": "base"}, "reference base needs plain LoRA"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_budget_that_cannot_be_held_is_refused(case, tmp_path):
    make, settings, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        tiny.trainer(tmp_path, policy=make(), **{"kl_budget": BUDGET} | settings)


@pytest.mark.parametrize("settings", [{}, {"lora_r": 0}, {"algorithm": "grpo"}], ids=str)
def test_resumed_under_a_budget_equals_uninterrupted(settings, tmp_path):
    values = {"total_steps": 5, "save_every": 1, "keep_checkpoints": 9, "window": 2, "kl_budget": 0.01} | settings
    rows = tiny.trainer(tmp_path, **values).train()
    assert any(row["budget/scale"] < 1 for row in rows)
    assert all(row["budget/kl"] <= 0.01 for row in rows)
    whole = metrics(tmp_path)
    tiny.trainer(tmp_path, **values).train(resume_from_checkpoint=tmp_path / "checkpoints" / "step-3")
    assert metrics(tmp_path) == whole


def test_another_budget_holds_from_the_resumed_step_on(tmp_path):
    values = {"total_steps": 4, "save_every": 1, "keep_checkpoints": 9}
    tiny.trainer(tmp_path, **values, kl_budget=0.2).train()
    rows = tiny.trainer(tmp_path, **values, kl_budget=0.005).train(tmp_path / "checkpoints" / "step-2")
    assert len(rows) == 2 and all(row["budget/kl"] <= 0.005 for row in rows) and rows[0]["budget/scale"] < 1


def test_a_budget_that_cannot_be_reached_stops_the_run_behind_a_checkpoint(tmp_path, monkeypatch):
    trainer = tiny.trainer(tmp_path, total_steps=9, kl_budget=0.01)
    monkeypatch.setattr("safe_train.engines.projection.mean_kl", lambda *_: 0.5)
    with pytest.raises(
        OverBudget, match="the KL is 0.5 nats a token, above kl_budget 0.01: the update reached 0.5, and 3"
    ):
        trainer.train()
    assert (tmp_path / "checkpoints" / "step-1" / "state.json").exists()
    (row,) = metrics(tmp_path)
    assert row["budget/kl"] == 0.5 and row["budget/forwards"] == 4


def test_a_budget_that_is_far_costs_no_forward_once_the_pace_is_known(tmp_path):
    far_off = {"total_steps": FIRST + 3, "learning_rate": 1e-4, "kl_budget": 1.0, "kl_budget_control": False}
    plain = tiny.trainer(tmp_path / "plain", **far_off | {"kl_budget": None}).train()
    rows = tiny.trainer(tmp_path / "far", **far_off).train()
    assert [row["budget/forwards"] for row in rows] == [1.0] * FIRST + [0.0] * 3
    assert [row["kl"] for row in rows] == [row["kl"] for row in plain]
    assert not any(name.startswith("budget") for name in plain[0])


@pytest.mark.parametrize("tokens, start", [(1, 1.0), (16, 0.659), (256, 0.165)])
def test_a_charge_of_sums_starts_where_it_would_end(tokens, start):
    """1 / sqrt(2 x tokens x 0.072), 0.072 being 0.9 of what the margin leaves of 0.1; a token's own KL starts at 1."""
    settings = {"algorithm": "ppo", "kl_budget": 0.1, "max_new_tokens": tokens}
    assert math.exp(BudgetLaw(SafeConfig(**settings)).log_coef) == 1.0
    assert math.exp(BudgetLaw(SafeConfig(kl_gradient="return", **settings)).log_coef) == pytest.approx(start, rel=2e-3)


@pytest.mark.parametrize("pace", [0.02, 0.04, 0.1])
@pytest.mark.parametrize("drive", [0.05, 0.3])
def test_one_set_of_gains_brings_the_kl_to_its_target(pace, drive):
    """A policy that walks in sqrt(KL) at a bounded pace toward the tilted policy's, drive / coefficient."""
    args = SafeConfig(algorithm="ppo", beta=0.0, kl_budget=0.1)
    law, control, root, kls = BudgetLaw(args), Controller(args), 0.0, []
    for _ in range(200):
        decided = law.steer(control.update(root**2, 1.0, 0.0, 1.0), root**2)
        law.observe(root**2, 1e-3)
        root += min(pace, max(-pace, drive / decided.kl_coef - root))
        reached = root**2
        root = min(root, law.limit**0.5)
        law.record(reached, root**2)
        kls.append(root**2)
    assert kls[-1] == pytest.approx(TARGET * law.limit, rel=0.1) and max(kls) <= law.limit


@pytest.mark.parametrize("tell", [0.4, 0.7, 1.0])
def test_a_kl_that_the_trained_tokens_understate_neither_breaks_the_budget_nor_leaves_it_unused(tell):
    """The KL on the update's own tokens is a part of the next rollout's, and the smaller the larger the coefficient."""
    args = SafeConfig(algorithm="ppo", beta=0.0, kl_budget=0.1)
    law, control, root, kls, coefs = BudgetLaw(args), Controller(args), 0.0, [], []
    for _ in range(200):
        kls.append(root**2)
        decided = law.steer(control.update(kls[-1], 1.0, 0.0, 1.0), kls[-1])
        coefs.append(decided.kl_coef)
        law.observe(kls[-1], 1e-3)
        told = tell / (1 + 0.1 * decided.kl_coef)
        root += min(0.04, max(-0.04, 0.3 / decided.kl_coef - root))
        reached = told * root**2
        root = min(root, (law.limit / told) ** 0.5)
        law.record(reached, min(reached, law.limit))
    assert max(kls[30:]) <= 0.1 < 1.25 * min(kls[100:])
    assert max(coefs) < 3


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"kl_threshold_min": 0.0}, "kl_threshold_min must be positive"),
        ({"kl_integral_coef": 1.0}, "kl_integral_coef must be 0"),
    ],
)
def test_settings_that_a_budget_replaces_or_divides_by_are_refused(setting, message):
    SafeConfig(**setting)
    with pytest.raises(ConfigError, match=message):
        SafeConfig(kl_budget=0.1, **setting)
