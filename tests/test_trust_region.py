"""A trust region on the exact divergence from the policy that sampled, in the place of the ratio's clip."""

import math
import os

import processes
import pytest
import tiny
import torch

from safe_train.algorithms import losses
from safe_train.config import ConfigError, SafeConfig
from safe_train.run.evaluation import Judge

UNCLIPPED = {"clip_low": math.inf, "clip_high": math.inf}


def moved(tmp_path, by=0.05, **settings):
    """A trainer whose policy has moved since it sampled, its one micro-batch, and what the controller decided."""
    one = {"minibatch_size": None, "max_tokens_per_microbatch": 10_000, "completions_per_prompt": 4}
    trainer = tiny.trainer(tmp_path, **{"algorithm": "grpo", "beta": 0.0, "entropy_coef": 0.0} | one | settings)
    experience, control = tiny.experience_of(trainer)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.trainable:
            parameter.add_(by * torch.randn(parameter.shape, generator=draw))
    (micro,) = experience
    return trainer, micro, control


def logp(model, batch):
    rows, mask, place = batch.rows()
    return model(rows, attention_mask=mask).logits.flatten(0, 1)[place].double().log_softmax(-1)


def divergences(trainer, micro):
    """[L] KL and total variation of now from then, and the log-ratio of the tokens, from the models' own logits."""
    with torch.no_grad():
        now, then = logp(trainer.policy.causal_lm, micro.batch), logp(tiny.model(), micro.batch)
    kl, tv = (now.exp() * (now - then)).sum(-1), (now.exp() - then.exp()).abs().sum(-1) / 2
    return kl, tv, (now - then).gather(1, micro.batch.targets_L[:, None])[:, 0]


def gradient(trainer, micro, control):
    weights = losses.token_weights(micro, losses.Totals(len(micro.logprob_L), len(micro.indices)), trainer.args)
    hidden = trainer.engine.forward(micro.batch)
    found = losses.policy_loss(hidden, trainer.policy.head(), micro, weights, control, trainer.args)
    found.loss.backward()
    return found, [parameter.grad.clone() for parameter in trainer.trainable]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", ["trust_region_kl", "trust_region_tv"])
def test_tokens_beyond_it_have_no_gradient(name, level, tmp_path):
    """Against the loss of the tokens that are left, chosen by the models' own logits in float64."""
    trainer, micro, control = moved(tmp_path, lora_r=0, trust_region_level=level, **UNCLIPPED, **{name: 0.02})
    kl, tv, log_ratio = divergences(trainer, micro)
    measured = kl if name == "trust_region_kl" else tv
    some = slice(len(measured) // 3, len(measured) // 2) if level == "token" else slice(-6, None)
    ordered = measured.sort().values[some]
    widest = ordered.diff().argmax()  # no rounding decides there; states that two completions share have one value
    bound = ordered[widest : widest + 2].mean().item()
    trainer.args = SafeConfig.from_dict(dict(trainer.args.items()) | {name: bound})
    beyond = measured > bound
    if level == "token":
        masked = beyond & (log_ratio * micro.advantage_L > 0)
    else:
        bounds = micro.batch.response_cu_seqlens.tolist()
        masked = torch.cat([beyond[a:b].any().expand(b - a) for a, b in zip(bounds, bounds[1:], strict=False)])
    assert 0 < masked.sum() < len(masked)
    found, own = gradient(trainer, micro, control)
    assert found.clip_fraction.item() == pytest.approx(masked.double().mean().item())
    for parameter in trainer.trainable:
        parameter.grad = None
    ratio = (losses_logprob(trainer, micro) - micro.logprob_L).exp()
    (-(ratio * micro.advantage_L)[~masked].sum() / len(masked)).backward()
    for mine, parameter in zip(own, trainer.trainable, strict=True):
        torch.testing.assert_close(mine, parameter.grad, atol=2e-6, rtol=1e-4)


def losses_logprob(trainer, micro):
    return logp(trainer.policy.causal_lm, micro.batch).gather(1, micro.batch.targets_L[:, None])[:, 0].float()


@pytest.mark.parametrize("lora_r", [0, 4])
def test_the_head_that_sampled_is_remembered_where_it_is_trained(lora_r, tmp_path):
    trainer, micro, _ = moved(tmp_path, lora_r=lora_r, trust_region_kl=0.1, **UNCLIPPED)
    assert ("teacher_weight" in micro.sampled_from) == (lora_r == 0)
    hidden, head = trainer.policy(micro.batch), trainer.policy.head()
    found = losses.divergence_from_rollout(hidden, head, micro, trainer.args)
    kl, *_ = divergences(trainer, micro)
    assert kl.mean() > 1e-3
    torch.testing.assert_close(found.double(), kl, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("algorithm", ["safe", "ppo", "grpo", "cispo"])
def test_a_run_within_it_is_the_run_without(algorithm, tmp_path):
    """Far below the bound nothing is masked; the exact bits come from one more path, so up to rounding."""
    settings = {"algorithm": algorithm, "total_steps": 2, "completions_per_prompt": 2, "learning_rate": 1e-4}
    plain = tiny.trainer(tmp_path / "plain", **settings).train()
    bound = tiny.trainer(tmp_path / "bound", trust_region_kl=50.0, **settings).train()
    for name in ("policy_loss", "kl", "clip_fraction"):
        assert [row[name] for row in bound] == pytest.approx([row[name] for row in plain], abs=1e-5)


def test_an_evaluation_remembers_no_head(tmp_path, monkeypatch):
    """Each chunk would hold a copy of a trained one."""
    trainer = tiny.trainer(tmp_path, algorithm="grpo", lora_r=0, trust_region_kl=0.1)
    made, sample = [], Judge.sample
    monkeypatch.setattr(Judge, "sample", lambda *a, **how: made.append(sample(*a, **how)) or made[-1])
    trainer.evaluate()
    parts = [micro for _, parts in made for part in parts for micro in part]
    assert parts and not any(micro.sampled_from for micro in parts)
    assert all(micro.sampled_from for micro in tiny.experience_of(trainer)[0])


def refused(folder):
    os.environ.update({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})
    with pytest.raises(ConfigError, match="a trained head is in parts here: train LoRA without the head"):
        tiny.trainer(folder, algorithm="grpo", lora_r=0, trust_region_kl=0.1)
    return sorted(set(os.listdir(folder)) - {"run.lock"}) if os.path.isdir(folder) else []


def test_a_trained_head_in_parts_is_refused_before_anything_is_written(tmp_path):
    assert [(each.error, each.result) for each in processes.run(refused, 2, tmp_path / "run")] == [("", [])] * 2


def test_a_bound_holds_a_policy_that_would_run_away(tmp_path):
    settings = {"algorithm": "grpo", "completions_per_prompt": 4, "learning_rate": 3e-2, "inner_epochs": 6, **UNCLIPPED}
    free = tiny.trainer(tmp_path / "free", total_steps=2, **settings).train()
    held = tiny.trainer(tmp_path / "held", total_steps=2, trust_region_kl=0.01, **settings).train()
    assert held[1]["kl"] < 0.7 * free[1]["kl"] and held[0]["clip_fraction"] > 0.1


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"trust_region_kl": 0.0}, "trust_region_kl must be positive"),
        ({"trust_region_kl": math.nan}, "trust_region_kl must be positive"),
        ({"trust_region_tv": 1.0}, r"trust_region_tv must be in \(0, 1\)"),
        ({"trust_region_kl": 0.1, "trust_region_tv": 0.1}, "trust_region_tv must be null with trust_region_kl"),
        ({"trust_region_kl": 0.1, "top_p": 0.9}, "top_p must be 1 with a trust region"),
        ({"trust_region_kl": 0.1, "algorithm": "safe_paper"}, "trust_region_kl must be left alone for safe_paper"),
        ({"trust_region_level": "word"}, "trust_region_level must be one of token, sequence"),
    ],
)
def test_what_it_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        SafeConfig(**changes)
