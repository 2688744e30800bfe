"""Part three of the study: its plan, and the distillation of the best of n samples."""

import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch

from bench.measurement.machine import RESULTS, ROOT
from bench.study import rewards, updates
from bench.study.report import read_rows
from safe_train.config import SafeConfig
from safe_train.sampling.experience import Experience


def test_every_setting_is_one_and_the_best_of_n_has_n_completions():
    args = updates.parser().parse_args([])
    args.overrides = {}
    specs = updates.planned(args)
    assert len({spec.key for spec in specs}) == len(specs) == 6 * updates.SEEDS
    for spec in specs:
        found = SafeConfig.from_dict(spec.base | spec.settings | {"reward": [f"{rewards.__file__}:{spec.reward}"]})
        assert found.completions_per_prompt == updates.N
        assert spec.stage == "best_of_n" or (found.trust_region_kl or found.trust_region_tv or 0) < found.clip_low


def test_the_best_of_each_prompt_by_hand():
    found = updates.chance_to_be_best(torch.tensor([1.0, 3.0, 2.0, 0.0, 5.0, 5.0]), 3)
    assert found.tolist() == [0.0, 1.0, 0.0, 0.0, 0.5, 0.5]


@pytest.fixture
def trained(tmp_path):
    """A policy that is no longer its reference."""
    args = tiny.settings(tmp_path, algorithm="grpo", beta=0.0, entropy_coef=0.0, max_sampler_gap=float("inf"))
    found = updates.BestOfN(tiny.model(), tiny.good_words, args, tiny.PROMPTS, processing_class=tiny.tokenizer())
    found.train()
    return found


def test_the_reference_samples(trained):
    rollout, _ = trained.collect(0)
    experience = Experience(trained.policy, None, rollout, trained.args, trained.device)
    sampled, now, reference = (experience.tokens(f"{name}logprob_L") for name in ("sampler_", "", "ref_"))
    torch.testing.assert_close(sampled, reference, **tiny.FORWARDS)
    assert (sampled - now).abs().max() > 0.01


def test_the_loss_is_the_cross_entropy_of_the_best(trained):
    """By plain PyTorch, completion by completion, with its gradient."""
    rollout, scores = trained.collect(0)
    experience = Experience(trained.policy, None, rollout, trained.args, trained.device)
    trained.compute_advantages(experience, scores["reward"], None)
    size, reward_B = trained.args.completions_per_prompt, scores["reward"]
    weight_B = [(r == group.max()) / (group == group.max()).sum() for group in reward_B.view(-1, size) for r in group]
    parameters = [p for p in trained.policy.parameters() if p.requires_grad]
    for minibatch in experience.minibatches:
        indices = [i for micro in minibatch for i in micro.indices]
        tokens = sum(len(rollout.completions[i]) for i in indices)
        expected = 0.0
        for i in indices:
            prompt, completion = rollout.prompts[i].ids, rollout.completions[i]
            logits = trained.policy.model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
            logp = torch.log_softmax(logits, -1).gather(1, torch.tensor(completion)[:, None])
            expected = expected - weight_B[i] * logp.sum() / tokens
        totals = updates.losses.Totals(tokens, len(indices))
        found = sum(trained.loss(micro, None, totals)[0] for micro in minibatch)
        torch.testing.assert_close(found, expected, **tiny.FORWARDS)
        gradients = [torch.autograd.grad(x, parameters) for x in (found, expected)]
        torch.testing.assert_close(*gradients, **tiny.FORWARDS)


def test_the_report_and_the_page_have_the_tables_of_the_rows(tmp_path):
    rows = read_rows(Path(shutil.copy(RESULTS / "updates.jsonl", tmp_path)))
    written = (RESULTS / "updates.md").read_text()
    assert updates.report(rows) == written
    tables = re.findall(r"(?:^\|.*\n)+", (ROOT / "docs/study.md").read_text(), re.MULTILINE)
    shown = [table for table in tables if "gain per sqrt(nat) |" in table and table.startswith("| arm |")]
    assert len(shown) == len({row["stage"] for row in rows}) > 0 and all(table in written for table in shown)
