"""What a token's own credit can buy at best: the reward itself, looked up for each token that may come next.

    python bench/study/lookahead.py [--tau X,X] [--completions K]

Each token is drawn from p(a) exp((R(text + a) - R(text)) / tau), in which the `CANDIDATES` likeliest tokens have their
own gain and the others none. This tilt is the best policy for the sum of what the tokens add, each with a KL penalty of
its own and no view of what follows: what a model trained with `prefix_rewards: 1` and `gae_lambda: 0` aims at, however
large it is. KL is exact, on the demo's held-out prompts.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a checkout that is not installed

from bench.study.arms import BASE, FRESH
from bench.study.rewards import vader
from safe_train import SafeTrainer
from safe_train.config import SafeConfig

CANDIDATES = 300


class Found(NamedTuple):
    reward: float
    error: float  # standard error, over prompts
    kl: float  # nats a token
    gain: float  # reward above the reference's per sqrt(nat) of a completion


def main() -> None:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--tau", default="0.3,0.22", help="of the tilt, in units of the reward")
    top.add_argument("--completions", type=int, default=32, help="of each prompt")
    found = top.parse_args()
    settings = BASE | FRESH | {"algorithm": "grpo", "reward": ["vader"], "use_cpu": True}
    with tempfile.TemporaryDirectory() as folder:
        trainer = SafeTrainer(
            args=SafeConfig.from_dict(settings | {"output_dir": folder}), eval_dataset=FRESH["eval_dataset"]
        )
        before = tilted(trainer, math.inf, found.completions, 0.0)
        print("\n| tau | reward (standard error) | KL, nats a token | gain per sqrt(nat) |\n|---|---|---|---|")
        print(f"| the reference | {before.reward:.3f} ({before.error:.3f}) | 0 | |", flush=True)
        for tau in map(float, found.tau.split(",")):
            at = tilted(trainer, tau, found.completions, before.reward)
            print(f"| {tau:g} | {at.reward:.3f} ({at.error:.3f}) | {at.kl:.4f} | {at.gain:.3f} |", flush=True)


def tilted(trainer: SafeTrainer, tau: float, completions: int, before: float) -> Found:
    """Completions of the held-out prompts, `completions` each; tau = inf is the reference."""
    assert trainer.eval_prompts is not None
    torch.manual_seed(0)
    count = trainer.eval_prompts.known_length
    assert count is not None
    rewards, kls = [], []
    for prompt in trainer.eval_prompts.at(0, count):
        texts, kl = complete(trainer, prompt.ids, tau, completions)
        rewards.append(statistics.fmean(vader([prompt.text] * completions, texts)))
        kls.append(kl)
    reward, kl = statistics.fmean(rewards), statistics.fmean(kls)
    nats = kl * trainer.args.max_new_tokens
    gain = (reward - before) / math.sqrt(nats) if nats > 0 else math.nan
    return Found(reward, statistics.stdev(rewards) / math.sqrt(count), kl, gain)


@torch.no_grad()
def complete(trainer: SafeTrainer, prompt: list[int], tau: float, count: int) -> tuple[list[str], float]:
    """Texts, and the mean KL of a token. Completions go on to their full length: an end is a token as any other."""
    model, prompt_BN = trainer.policy.causal_lm, torch.tensor([prompt]).expand(count, -1)
    ids_BT, kls = prompt_BN[:, :0], []
    for _ in range(trainer.args.max_new_tokens):  # without a cache: VADER takes the time
        logits_B1V = model(torch.cat([prompt_BN, ids_BT], dim=1), use_cache=False, logits_to_keep=1).logits
        logp_BV = logits_B1V[:, -1].float().log_softmax(-1)
        tilt_BV = gains(trainer, ids_BT, logp_BV) / tau if math.isfinite(tau) else torch.zeros_like(logp_BV)
        logq_BV = (logp_BV + tilt_BV).log_softmax(-1)
        kls.append((logq_BV.exp() * (logq_BV - logp_BV)).sum(-1).mean().item())
        ids_BT = torch.cat([ids_BT, logq_BV.exp().multinomial(1)], dim=1)
    return texts_of(trainer, ids_BT), statistics.fmean(kls)


def gains(trainer: SafeTrainer, ids_BT: Tensor, logp_BV: Tensor) -> Tensor:
    """R(text + a) - R(text) of each candidate a, 0 of the others."""
    candidates_BC = logp_BV.topk(CANDIDATES).indices
    longer_NT = torch.cat([ids_BT.repeat_interleave(CANDIDATES, 0), candidates_BC.view(-1, 1)], dim=1)
    after_BC = torch.tensor(scores(texts_of(trainer, longer_NT))).view_as(candidates_BC)
    before_B1 = torch.tensor(scores(texts_of(trainer, ids_BT)))[:, None]
    return torch.zeros_like(logp_BV).scatter_(1, candidates_BC, (after_BC - before_B1).float())


def scores(texts: list[str]) -> list[float]:
    return vader([""] * len(texts), texts)


def texts_of(trainer: SafeTrainer, ids_BT: Tensor) -> list[str]:
    return trainer.tokenizer.batch_decode(ids_BT, skip_special_tokens=True)


if __name__ == "__main__":
    main()
