"""What buys more reward for each nat: the plan, what two arms do to iterates and gradients, and a shift's direction."""

import math

import tiny
import torch

from bench.measurement.machine import RESULTS
from bench.study import directions, lookahead, per_nat, rewards, shift, updates
from bench.study.report import read_rows
from safe_train import SafeTrainer
from safe_train.config import SafeConfig


def test_every_setting_is_one_and_all_arms_take_as_many_completions():
    args = per_nat.parser().parse_args(["--stages", "small", "smollm2", "--seeds", "2"])
    args.overrides = {}
    specs = per_nat.planned(args)
    assert len({spec.key for spec in specs}) == len(specs)
    completions = {"small": set(), "smollm2": set()}
    for spec in specs:
        found = SafeConfig.from_dict(spec.base | spec.settings | {"reward": [f"{rewards.__file__}:{spec.reward}"]})
        completions[spec.stage].add(found.completions_per_step * spec.steps)
        assert found.kl_budget == per_nat.BUDGET and found.beta == 0
    assert completions == {"small": {7680}, "smollm2": {3840}}


def with_own(cls, folder, **changes):
    args = tiny.settings(folder, algorithm="grpo", **changes)
    return cls(tiny.model(), tiny.good_words, args, tiny.PROMPTS, processing_class=tiny.tokenizer())


def test_the_policy_ends_as_the_average_of_its_iterates(tmp_path):
    iterates = []
    trainer = with_own(per_nat.Averaged, tmp_path)
    trainer.callbacks = [lambda trainer, _: iterates.append([p.detach().clone() for p in trainer.trainable])]
    trainer.train()
    assert len(iterates) == 3
    for first, second, third, found in zip(*iterates, trainer.trainable, strict=True):
        torch.testing.assert_close(found, 0.64 * first + 0.16 * second + 0.2 * third)
        assert not torch.equal(found, third)


def test_the_gradient_of_a_factor_is_taken_in_the_metric_of_the_other(tmp_path, monkeypatch):
    trainer = with_own(per_nat.Preconditioned, tmp_path)
    trainer.train()  # B is no longer 0
    layer = next(m for m in trainer.policy.modules() if getattr(m, "lora_A", None))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    for module in (m for m in trainer.policy.modules() if getattr(m, "lora_A", None)):
        for factors in (module.lora_A, module.lora_B):
            factors["default"].weight.grad = torch.randn_like(factors["default"].weight)
    before = a.grad.clone(), b.grad.clone()
    monkeypatch.setattr(trainer.engine, "step", lambda: None)
    trainer.take_step()
    metric_a = (b.T @ b).detach() + per_nat.DAMPING * (b.T @ b).diag().mean().detach() * torch.eye(4)
    metric_b = (a @ a.T).detach() + per_nat.DAMPING * (a @ a.T).diag().mean().detach() * torch.eye(4)
    torch.testing.assert_close(metric_a @ a.grad, before[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(b.grad @ metric_b, before[1], rtol=1e-3, atol=1e-4)


def test_a_shift_follows_the_reward_in_the_metric_of_the_kl(tmp_path):
    halves = []
    for name in ("one", "two"):  # the same rollout in both
        trainer = with_own(SafeTrainer, tmp_path / name, scale_rewards="none", completions_per_prompt=4)
        halves.append(shift.measured(trainer, 0) if name == "one" else directions.sampled(trainer, 0))
    half, (experience, reward_B) = halves
    weight_VH = trainer.policy.head()["weight"].double()
    states = [(m, trainer.policy(m.batch).detach().double()) for m in experience]
    tokens = sum(len(m.batch.targets_L) for m in experience)
    own_B = directions.beside_others(reward_B, 4).double()

    def kl(vector_H):
        moved = [(((h + vector_H) @ weight_VH.T).log_softmax(-1), (h @ weight_VH.T).log_softmax(-1)) for _, h in states]
        return sum((q.exp() * (q - p)).sum() for q, p in moved) / tokens

    def earned(vector_H, of):
        scores = [(m, ((h + vector_H) @ weight_VH.T).log_softmax(-1)) for m, h in states]
        return sum((of(m) * x.gather(-1, m.batch.targets_L[:, None])[:, 0]).sum() for m, x in scores) / len(reward_B)

    start_H = torch.zeros(weight_VH.shape[1], dtype=torch.float64)
    curvature_HH = torch.autograd.functional.hessian(kl, start_H)
    torch.testing.assert_close(half.metric_HH.double(), curvature_HH, rtol=1e-4, atol=1e-6)
    gradients = {
        "credit": (half.credit_H, lambda m: m.advantage_L.double()),
        "reward": (half.reward_H, lambda m: own_B[m.indices].repeat_interleave(m.batch.response_cu_seqlens.diff())),
    }
    for found_H, of in gradients.values():
        wanted_H = torch.autograd.functional.jacobian(lambda vector_H, of=of: earned(vector_H, of), start_H)
        assert wanted_H.norm() > 0
        torch.testing.assert_close(found_H.double(), wanted_H, rtol=1e-4, atol=1e-6)


def test_the_reference_is_not_shifted(tmp_path):
    trainer = with_own(SafeTrainer, tmp_path)
    batch = next(iter(directions.sampled(trainer, 0)[0])).batch
    before, reference = trainer.policy(batch), trainer.policy.reference(batch)
    moved = shift.Shift(trainer)
    moved.vector_H = torch.randn(before.shape[1])
    torch.testing.assert_close(trainer.policy(batch), before + moved.vector_H)
    assert torch.equal(trainer.policy.reference(batch), reference)


def test_the_lookahead_tilts_by_what_a_token_adds(tmp_path, monkeypatch):
    trainer = with_own(SafeTrainer, tmp_path)
    monkeypatch.setattr(lookahead, "CANDIDATES", 5)
    monkeypatch.setattr(lookahead, "scores", lambda texts: [float(len(text)) for text in texts])
    size = len(trainer.policy.head()["weight"])
    ids_BT, logp_BV = torch.tensor([[3, 4], [5, 6]]), torch.randn(2, size).log_softmax(-1)
    found_BV = lookahead.gains(trainer, ids_BT, logp_BV)
    read = lambda ids: trainer.tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
    for ids, logp_V, found_V in zip(ids_BT.tolist(), logp_BV, found_BV, strict=True):
        likeliest = set(logp_V.argsort(descending=True)[:5].tolist())
        added = [len(read([*ids, token])) - len(read(ids)) for token in range(size)]
        assert found_V.tolist() == [float(n) if token in likeliest else 0.0 for token, n in enumerate(added)]
    assert found_BV.any()
    prompt = trainer.prompts.at(0, 1)[0].ids
    texts, kl = lookahead.complete(trainer, prompt, math.inf, 3)
    assert len(texts) == 3 and abs(kl) < 1e-7
    assert lookahead.complete(trainer, prompt, 1.0, 3)[1] > 0


def test_what_a_nat_bought_by_hand():
    row = {"before": {"reward": 0.1}, "after": {"reward": 0.4, "kl": 0.09}, "base": {"max_new_tokens": 16}}
    other = {**row, "after": {"reward": 0.1, "kl": 0.09}}
    assert round(updates.bought([row]), 6) == 0.25  # 0.3 / sqrt(1.44)
    assert round(updates.bought([row, other]), 6) == 0.125


def test_the_report_has_the_tables_of_the_rows():
    rows = read_rows(RESULTS / "per_nat.jsonl")
    assert per_nat.report(rows) == (RESULTS / "per_nat.md").read_text()
    assert {row["name"] for row in rows} <= set(per_nat.CHANGES)
