"""A run on several processes is the run on one: the same steps, checkpoints and files; and it ends when one dies."""

import errno
import json
import os
import signal
import time
from types import MappingProxyType

import numpy as np
import processes
import pytest
import tiny
import torch
from test_checkpoint import prepare

from safe_kernels import KeptIds
from safe_train import parallel
from safe_train.cli import main
from safe_train.config import CONFIGS, ConfigError, SafeConfig
from safe_train.data.prompts import PromptDataset
from safe_train.engines import sharding
from safe_train.run import checkpoint
from safe_train.run.signals import Stopped
from safe_train.sampling import experience
from safe_train.sampling.rollout import Rollout

CLOCK = ("time/", "memory/", "tokens_per_second")
ACCELERATE = CONFIGS / "accelerate"
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}

# Lengths of the completions of each step. Two consecutive ones answer a prompt, and ranks sample consecutive prompts.
LENGTHS = {
    "ragged": [(1, 6, 2, 5, 3, 3, 6, 4), (4, 1, 1, 1, 6, 6, 6, 6)],
    "one rank got no response token": [(3, 2, 6, 1, 0, 0, 0, 0), (0, 0, 0, 0, 0, 0, 5, 0)],
}


def rollouts(kind: str, filtered: bool = False) -> list[Rollout]:
    """A fixed rollout for each step: what the processes sample would depend on their number."""
    g, tokenizer = torch.Generator().manual_seed(7), tiny.tokenizer()
    data = PromptDataset(tiny.PROMPTS, tokenizer, 8)
    prompts = [data[i] for i in (4, 0, 1, 3) for _ in range(2)]
    found = []
    for lengths in LENGTHS[kind]:
        tokens = [torch.randint(2, len(tiny.WORDS), (n,), generator=g).tolist() for n in lengths]
        logprobs = [[-2.0] * n for n in lengths]
        ended = [n < 6 for n in lengths]
        kept = [sets(row, g) for row in tokens] if filtered else []
        found.append(Rollout(prompts, tokens, tokenizer.batch_decode(tokens), ended, logprobs, kept))
    return found


def sets(tokens: list[int], g: torch.Generator) -> KeptIds:
    """Each token's: itself, and three others."""
    ids = [{token, *torch.randint(2, len(tiny.WORDS), (3,), generator=g).tolist()} for token in tokens]
    offsets = torch.tensor([0, *map(len, ids)]).cumsum(0)
    return KeptIds(torch.tensor([i for each in ids for i in sorted(each)], dtype=torch.long), offsets)


def own(rollout: Rollout) -> Rollout:
    """What this process would have sampled of it."""
    indices = [i for prompt in parallel.share(range(4)) for i in (2 * prompt, 2 * prompt + 1)]
    return rollout.take(indices)


def trainer_on(folder, kind="ragged", model=MappingProxyType({}), adapter=None, filtered=False, **settings):
    fixed = rollouts(kind, filtered)
    if settings.get("algorithm") == "distill":
        settings["teacher"] = str(folder.with_name("teacher"))
    # What was "sampled" is fixed, with log-probs of -2.
    values = {"total_steps": 2, "save_every": 1, "keep_checkpoints": 9, "max_sampler_gap": 100.0} | settings
    policy = tiny.model(**{k: v for k, v in model.items() if k != "bias"})
    if "bias" in model:
        policy.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, len(tiny.WORDS)))
    if adapter is not None:
        policy = tiny.trained_adapter(policy, **adapter)
    trainer = tiny.trainer(folder, policy=policy, **values)
    trainer.sample = lambda step: own(fixed[step % len(fixed)])
    return trainer


def without_clock(row: dict) -> dict:
    return {name: value for name, value in row.items() if not name.startswith(CLOCK)}


def arrays(tensors) -> list[np.ndarray]:
    """Not through `whole`, which leaves the others empty."""
    return [(t.full_tensor() if hasattr(t, "full_tensor") else t).detach().numpy().copy() for t in tensors]


def steps(folder, **case) -> dict:
    """Two steps: their metrics, the gradients of every optimizer step, and everything that they leave behind."""
    trainer, gradients = trainer_on(folder, save_every=2, **case), []
    take_step = trainer.take_step

    def recorded() -> None:
        critics = [] if trainer.critic is None else trainer.critic.heads.parameters()
        gradients.append(arrays(p.grad for p in [*trainer.trainable, *critics]))
        take_step()

    trainer.take_step = recorded
    history = trainer.train()
    sharding.reshard(trainer.policy)
    return {
        "metrics": [without_clock(row) for row in history],
        "gradients": gradients,
        "weights": arrays(trainer.trainable),
        "critic": [] if trainer.critic is None else arrays(trainer.critic.state_dict().values()),
        "controller": trainer.controller.state_dict(),
        "sharded": [hasattr(p, "full_tensor") for p in trainer.trainable],
        "moments": vars(trainer.reward_moments),
    }


# At 1e-2, Adam's first step moves every weight so far that the mean ratio reaches 4, and rounding grows with it.
FULL = {"lora_r": 0, "learning_rate": 1e-3}
HANDED_OVER = {"adapter": {"use_dora": True, "modules_to_save": ["norm"]}, "learning_rate": 1e-3}
CASES = {
    "safe": {},
    "safe, one rank got no response token": {"kind": "one rank got no response token"},
    "minibatches smaller than the number of ranks": {"minibatch_size": 2, "max_tokens_per_microbatch": 8},
    "grpo": {"algorithm": "grpo"},
    "cispo of sequences, one rank got no response token": {
        "algorithm": "cispo", "importance_sampling_level": "sequence", "loss_aggregation": "sequence_mean",
        "kind": "one rank got no response token"
    },
    "FSDP2, k3, one rank got no response token": {
        "environment": FSDP, "algorithm": "grpo", "kl_estimator": "k3", "loss_aggregation": "constant_length",
        "kind": "one rank got no response token"
    },
    "ppo, full fine-tuning": {"algorithm": "ppo", **FULL},
    "KL as a return, preview": {"kl_gradient": "return", "max_preview_kl": 0.01},
    "grpo, KL as a return, one rank got no response token": {
        "algorithm": "grpo", "kl_gradient": "return", "learning_rate": 1e-3, "kind": "one rank got no response token"
    },
    "the reward of each token, one rank got no response token": {
        "algorithm": "grpo", "prefix_rewards": 1, "gae_lambda": 0.5, "learning_rate": 1e-3,
        "kind": "one rank got no response token"
    },
    "FSDP2, the reward of every second token": {"environment": FSDP, "prefix_rewards": 2},
    "tokens drawn from a part of the vocabulary": {"algorithm": "grpo", "filtered": True, "top_p": 0.9},
    "FSDP2, tokens drawn from a part, one rank got none": {
        "environment": FSDP, "filtered": True, "top_k": 4, "kind": "one rank got no response token"
    },
    "a trust region": {"algorithm": "grpo", "trust_region_kl": 1e-4},
    "a teacher, one rank got no response token": {
        "algorithm": "distill", "divergence": "jsd", "beta": 0.1, "kind": "one rank got no response token"
    },
    "FSDP2, a teacher, full fine-tuning": {"environment": FSDP, "algorithm": "distill", **FULL},
    "a trained adapter": HANDED_OVER,
    "FSDP2, a trained adapter": {"environment": FSDP, **HANDED_OVER},
    "FSDP2, trained biases, the head's too": {
        "environment": FSDP, "model": {"bias": True, "attention_bias": True}, "adapter": {"bias": "all"},
        "learning_rate": 1e-3
    },
    "FSDP2, LoRA": {"environment": FSDP},
    "FSDP2, one rank got no response token": {"environment": FSDP, "kind": "one rank got no response token"},
    "FSDP2, full fine-tuning": {"environment": FSDP, "max_preview_kl": 0.01, **FULL},
    "LoRA, a KL budget": {"kl_budget": 0.01},
    "full fine-tuning, a KL budget": {"kl_budget": 0.01, "algorithm": "grpo", **FULL},
    "FSDP2, LoRA, a KL budget": {"environment": FSDP, "kl_budget": 0.01, "kind": "one rank got no response token"},
    "FSDP2, a trained adapter, a KL budget": {"environment": FSDP, "kl_budget": 0.003, **HANDED_OVER},
    "FSDP2, full fine-tuning, a KL budget": {"environment": FSDP, "kl_budget": 0.01, **FULL},
    "FSDP2, tied head, checkpointing": {
        "environment": FSDP, "gradient_checkpointing": True, "model": {"tie_word_embeddings": True}, **FULL
    },
    "FSDP2, biased head, LoRA on the last layer": {"environment": FSDP, "model": {"bias": True}, "lora_last_layers": 1},
    "FSDP2, layers stay gathered until their backward": {
        "environment": FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "false"}, "max_preview_kl": 0.01, **FULL
    },
}  # fmt: skip


ON_FOUR = [
    "safe, one rank got no response token",
    "minibatches smaller than the number of ranks",
    "FSDP2, full fine-tuning",
]


def all_steps(folder, names) -> dict:
    found = {}
    for name in names:
        case = dict(CASES[name])
        with pytest.MonkeyPatch.context() as patch:
            for variable, value in case.pop("environment", {}).items():
                patch.setenv(variable, value)
            found[name] = steps(folder / name, **case)
    return found


def with_teacher(folder):
    tiny.model(seed=5, hidden_size=48, num_attention_heads=6).save_pretrained(folder / "teacher")
    tiny.tokenizer().save_pretrained(folder / "teacher")
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return all_steps(with_teacher(tmp_path_factory.mktemp("alone")), CASES)


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    return together(2, CASES, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def on_four(tmp_path_factory):
    return together(4, ON_FOUR, tmp_path_factory.mktemp("four"))


def together(size, names, folder) -> list[dict]:
    outcomes = processes.run(all_steps, size, with_teacher(folder), list(names))
    assert all(outcome.exit_code == 0 for outcome in outcomes), "".join(outcome.error for outcome in outcomes)
    return [outcome.result for outcome in outcomes]


def close(found, expected, where: str, tolerance: float = 2e-5) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected:
            close(found[name], expected[name], f"{where} {name}", tolerance)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, pair in enumerate(zip(found, expected, strict=True)):
            close(*pair, f"{where} {i}", tolerance)
    elif isinstance(expected, (float, np.ndarray)):
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance, err_msg=where)
    else:
        assert found == expected, where


def close_after_adam(found, expected, gradients, rate: float, tolerance: float = 2e-5) -> None:
    """As `close`. A step of Adam is rate g / |g|: what rounds a small gradient moves its weight by as much."""
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        sizes = [np.abs(step[i]) for step in gradients]
        moved = sum(rate * np.minimum(2.0, 2 * tolerance / np.maximum(size, tolerance)) for size in sizes)
        assert (np.abs(ours - theirs) <= tolerance * (1 + np.abs(theirs)) + moved).all(), f"weights {i}"


def equal(by_rank: list[dict], expected: dict, case: str) -> None:
    first, *others = by_rank
    for name in ("metrics", "gradients", "critic", "controller", "moments"):
        close(first[name], expected[name], f"{case}: {name}")
    close_after_adam(
        first["weights"], expected["weights"], expected["gradients"], CASES[case].get("learning_rate", 1e-2)
    )
    for other in others:
        close(other, first, "ranks differ:", tolerance=0)
    assert all(sharded == ("FSDP2" in case) for sharded in first["sharded"])
    assert any(row.get("budget/scale", 1) < 1 for row in first["metrics"]) == ("a KL budget" in case)
    assert any(np.abs(gradient).max() > 1e-3 for gradient in first["gradients"][0])


@pytest.mark.parametrize("case", CASES)
def test_steps_on_two_processes_equal_those_of_one(case, alone, on_two):
    equal([found[case] for found in on_two], alone[case], case)


@pytest.mark.parametrize("case", ON_FOUR)
def test_steps_on_four_processes_equal_those_of_one(case, alone, on_four):
    equal([found[case] for found in on_four], alone[case], case)


def stopped_and_resumed(folder, environment, budget, shards_of) -> dict:
    """Three steps of real sampling in one go, and three with a resume after the second; then the checkpoint of another
    number of processes, continued on fixed rollouts."""
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in environment.items():
            patch.setenv(variable, value)
        settings = {"total_steps": 3, "save_every": 1, "keep_checkpoints": 9, "eval_every": 3, "window": 2, **budget}
        whole = tiny.trainer(folder / "whole", **settings).train()
        tiny.trainer(folder / "cut", **settings | {"total_steps": 2}).train()
        resumed = tiny.trainer(folder / "cut", **settings).train(resume_from_checkpoint=True)
        trainer = trainer_on(folder / "foreign", total_steps=4, window=2, lora_r=0, **budget)
        foreign = trainer.train(resume_from_checkpoint=shards_of)
    return {
        "whole": [without_clock(row) for row in whole],
        "resumed": [without_clock(row) for row in resumed],
        "foreign": [without_clock(row) for row in foreign],
        "learned": arrays(trainer.trainable),
    }


def draws_again(folder) -> tuple[list[list[str]], list[int], list[str]]:
    """The prompts of two steps, how many were drawn for each, and the stream that they come from."""
    rows, seen = [{"prompt": f"p {i}"} for i in range(32)], []

    def differ_for_even(prompts, completions, **columns):
        return [float(int(prompt.split()[1]) % 2 == 0) * (i % 2) for i, prompt in enumerate(prompts)]

    settings = {"algorithm": "grpo", "total_steps": 2, "prompts_per_step": 3, "minibatch_size": None}
    trainer = tiny.trainer(folder, differ_for_even, prompts=rows, **settings, dynamic_sampling=20)
    collect = trainer.collect

    def watched(step):
        rollout, scores = collect(step)
        seen.append([prompt.text for prompt in rollout.prompts[::2]])
        return rollout, scores

    trainer.collect = watched
    drawn = [int(row["prompts/drawn"]) for row in trainer.train()]
    return seen, drawn, [prompt.text for prompt in trainer.prompts.at(0, sum(drawn))]


def test_all_processes_draw_the_same_groups_again(tmp_path):
    """One or two flat groups of three, and more prompts than one process has."""
    outcomes = processes.run(draws_again, 2, tmp_path)
    assert all(outcome.exit_code == 0 for outcome in outcomes), "".join(outcome.error for outcome in outcomes)
    (seen, drawn, stream), other = outcomes[0].result, outcomes[1].result
    assert other == (seen, drawn, stream) and sum(drawn) > 6
    first, second = stream[: drawn[0]], stream[drawn[0] :]
    for used, given in zip(seen, (first, second), strict=True):
        assert sorted(used) == sorted([text for text in given if int(text.split()[1]) % 2 == 0][:3])


@pytest.mark.parametrize("budget", [{}, {"kl_budget": 0.003}], ids=["", "a KL budget"])
@pytest.mark.parametrize("environment", [{}, FSDP], ids=["DDP", "FSDP2"])
def test_a_checkpoint_resumes_on_any_number_of_processes(environment, budget, tmp_path):
    history = trainer_on(tmp_path / "one", total_steps=4, window=2, lora_r=0, **budget).train()
    checkpoint = tmp_path / "one" / "checkpoints" / "step-2"
    outcomes = processes.run(stopped_and_resumed, 2, tmp_path / "two", environment, budget, checkpoint)
    assert all(outcome.exit_code == 0 for outcome in outcomes), outcomes[0].error
    first, second = (outcome.result for outcome in outcomes)
    assert first["resumed"] == first["whole"][2:] == second["whole"][2:]
    close(first["foreign"], [without_clock(row) for row in history[2:]], "from one process to two")
    for run in ("resumed", "foreign"):
        assert any(row.get("budget/scale", 1) < 1 for row in first[run]) == bool(budget)
    back = trainer_on(tmp_path / "back", total_steps=4, window=2, lora_r=0, **budget)
    rows = back.train(resume_from_checkpoint=tmp_path / "two" / "foreign" / "checkpoints" / "step-3")
    close([without_clock(row) for row in rows], first["foreign"][1:], "from two processes to one")
    close(arrays(back.trainable), first["learned"], "weights")


def resumed_with_another_adapter(folder, environment, checkpoint) -> list[dict]:
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in environment.items():
            patch.setenv(variable, value)
        trainer = trainer_on(folder, total_steps=4, window=2, **HANDED_OVER)
        with torch.no_grad():
            trainer.policy.handed_over.values[0].add_(1)  # as if another one had been handed over
        return [without_clock(row) for row in trainer.train(resume_from_checkpoint=checkpoint)]


@pytest.mark.parametrize("environment", [{}, FSDP], ids=["DDP", "FSDP2"])
def test_the_reference_of_a_resumed_run_is_the_adapter_it_began_with(environment, tmp_path):
    history = [
        without_clock(row) for row in trainer_on(tmp_path / "one", total_steps=4, window=2, **HANDED_OVER).train()
    ]
    checkpoint = tmp_path / "one" / "checkpoints" / "step-2"
    outcomes = processes.run(resumed_with_another_adapter, 2, tmp_path / "two", environment, checkpoint)
    assert all(outcome.exit_code == 0 for outcome in outcomes), outcomes[0].error
    assert history[0]["kl"] < 1e-6 and history[2]["kl"] > 1e-3
    for outcome in outcomes:
        close(outcome.result, history[2:], "from one process to two")


def in_two_dtypes(folder) -> list[dict]:
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in FSDP.items():
            patch.setenv(variable, value)
        trainer = tiny.trainer(folder, policy=tiny.model().to(torch.bfloat16), total_steps=2)
        assert {p.dtype for p in trainer.policy.parameters()} == {torch.bfloat16, torch.float32}
        return [without_clock(row) for row in trainer.train()]


def test_frozen_weights_may_be_bfloat16_under_float32_adapters(tmp_path):
    """The default on a GPU; one group of FSDP2 then gathers both."""
    first, second = processes.run(in_two_dtypes, 2, tmp_path)
    assert first.error == second.error == "" and first.result == second.result
    assert first.result[0]["kl"] < 1e-3 < first.result[0]["grad_norm"]


def gathered_in_bfloat16(folder) -> dict:
    """The case of the tied head, with the policy that a GPU gets."""
    mixed = sharding.precision(torch.device("cuda"), torch.float32, SafeConfig())
    case = dict(CASES["FSDP2, tied head, checkpointing"])
    score, states = experience.score, set()

    def seen(*arguments):
        micro = score(*arguments)
        states.add(micro.ref_hidden_LH.dtype)
        return micro

    with pytest.MonkeyPatch.context() as patch:
        for variable, value in case.pop("environment").items():
            patch.setenv(variable, value)
        patch.setattr(sharding, "precision", lambda *_: mixed)
        patch.setattr(experience, "score", seen)
        return steps(folder, **case) | {"states": [str(dtype) for dtype in states]}


def test_float32_shards_may_be_gathered_in_bfloat16(alone, tmp_path):
    """Full fine-tuning on GPUs: the same gradients up to bfloat16, in float32, and a reference that starts equal."""
    first, second = processes.run(gathered_in_bfloat16, 2, tmp_path)
    assert first.error == second.error == "" and first.result["states"] == ["torch.bfloat16"]
    close(second.result, first.result, "ranks differ", tolerance=0)
    assert first.result["metrics"][0]["kl"] == 0
    assert {w.dtype for w in first.result["gradients"][0] + first.result["weights"]} == {np.dtype(np.float32)}
    found, exact = (
        np.concatenate([g.ravel() for g in result["gradients"][0]])
        for result in (first.result, alone["FSDP2, tied head, checkpointing"])
    )
    assert 1e-4 < np.linalg.norm(found - exact) / np.linalg.norm(exact) < 0.03


@pytest.mark.parametrize(
    ("device", "dtype", "asked", "runs_in"),
    [
        ("cuda", torch.float32, "auto", torch.bfloat16),
        ("cuda", torch.float32, "float32", torch.float32),
        ("cuda", torch.bfloat16, "auto", torch.bfloat16),
        ("cuda", torch.float16, "auto", torch.float16),
        ("cpu", torch.float32, "auto", torch.float32),
    ],
)
def test_fsdp_computes_float32_weights_in_bfloat16_on_a_gpu(device, dtype, asked, runs_in, monkeypatch):
    device, args = torch.device(device), SafeConfig(dtype=asked)
    assert sharding.compute_dtype(device, dtype, args) == dtype
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setattr("safe_train.parallel.size", lambda: 2)
    assert sharding.compute_dtype(device, dtype, args) == runs_in
    expected = (None, None) if runs_in == dtype else (runs_in, torch.float32)
    policy = sharding.precision(device, dtype, args)
    assert (policy.param_dtype, policy.reduce_dtype) == expected


def from_a_model_of_its_own(folder) -> list[list[np.ndarray]]:
    trainer = tiny.trainer(folder, policy=tiny.model(seed=int(os.environ["RANK"])), lora_r=0)
    return [arrays(module.parameters()) for module in (trainer.policy, trainer.policy.frozen_copies[0], trainer.critic)]


def test_all_processes_start_from_the_first_ones_weights(tmp_path):
    first, second = processes.run(from_a_model_of_its_own, 2, tmp_path)
    close(second.result, first.result, "weights", tolerance=0)
    close(first.result[1], arrays(tiny.model(seed=0).parameters()), "reference", tolerance=0)


def to_its_own_folder(folder) -> tuple[list[str], int]:
    """A folder that only one process writes; each is given its own here to see who does."""
    mine = folder / f"rank-{os.environ['RANK']}"
    trainer = tiny.trainer(mine, total_steps=1, eval_every=1)
    trainer.train()
    return [path.name for path in mine.iterdir()] if mine.exists() else [], trainer.step


def test_only_the_first_process_writes_and_prints(tmp_path):
    first, second = processes.run(to_its_own_folder, 2, tmp_path)
    assert first.error == second.error == ""
    assert {"metrics.jsonl", "samples.jsonl", "config.yaml", "checkpoints"} <= set(first.result[0])
    assert second.result == ([], 1)
    assert "step    1  reward" in first.printed and "step" not in second.printed


def resume_from_its_own_folder(folder) -> None:
    mine = folder / f"rank-{os.environ['RANK']}"
    tiny.trainer(folder / "rank-0", total_steps=1).train()
    tiny.trainer(mine, total_steps=2).train(resume_from_checkpoint=True)


def test_processes_that_do_not_share_a_folder_are_told(tmp_path):
    for outcome in processes.run(resume_from_its_own_folder, 2, tmp_path):
        assert "the processes disagree on step: ['1', '0']" in outcome.error


def with_a_bad_gradient(folder) -> tuple[list[float], bool]:
    trainer = tiny.trainer(folder, total_steps=2)
    before, backward, calls = arrays(trainer.trainable), trainer.backward, []

    def poisoned(*arguments):
        result = backward(*arguments)
        calls.append(0)
        if parallel.rank() == 1 and len(calls) == 1:
            trainer.trainable[0].grad[0] = float("nan")
        return result

    trainer.backward = poisoned
    history = trainer.train()
    return [row["bad_steps"] for row in history], all(np.isfinite(w).all() for w in arrays(trainer.trainable) + before)


def test_a_bad_gradient_on_one_process_skips_the_step_on_all(tmp_path):
    for outcome in processes.run(with_a_bad_gradient, 2, tmp_path):
        assert outcome.result == ([0.25, 0.0], True), outcome.error


def dies(folder, how: str) -> None:
    trainer = tiny.trainer(folder, total_steps=9, save_every=1, ddp_timeout=3.0)
    rewards = trainer.rewards

    def fatal(*arguments):
        if trainer.step == 1 and parallel.rank() == 1:
            if how == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(7)
            os._exit(9)
        return rewards(*arguments)

    trainer.rewards = fatal
    trainer.train()


@pytest.mark.parametrize(("how", "seen"), [("is killed", "Connection"), ("hangs", "Timed out")])
def test_when_a_process_dies_the_others_stop(how, seen, tmp_path):
    first, second, third = processes.run(dies, 3, tmp_path, how, seconds=60)
    for outcome in (first, third):
        assert outcome.exit_code == 1 and "lost the others: one of them stopped" in outcome.error
    assert seen in first.error + third.error and second.exit_code != 0
    assert (tmp_path / "checkpoints" / "step-1" / "state.json").exists()


def gets_sigterm(folder) -> int:
    trainer = tiny.trainer(folder, total_steps=9, save_every=9)

    def terminate(trainer, metrics):
        if trainer.step == 1 and parallel.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.callbacks = [terminate]
    try:
        trainer.train()
    except Stopped:
        return trainer.step
    return 0


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    first, second = processes.run(gets_sigterm, 2, tmp_path)
    assert first.result == second.result == 2, first.error + second.error
    assert "continue with safe-train run --resume" in first.printed and "--resume" not in second.printed
    assert (tmp_path / "checkpoints" / "step-2" / "state.json").exists()


def evaluates(folder, who: str) -> list:
    """An evaluation by one process alone, or by all of them, in a callback or behind the run."""
    trainer = tiny.trainer(folder, total_steps=2, ddp_timeout=20.0)
    if who == "behind the run, the first alone":
        trainer.train()
        return trainer.evaluate().numbers() if parallel.is_main() else []
    chosen = parallel.is_main() if who == "in a callback, the first alone" else True
    trainer.callbacks = [lambda trainer, row: trainer.evaluate()] if chosen else []
    if who == "before the run, the first alone":
        trainer.callbacks = []
        if parallel.is_main():
            trainer.evaluate()
    return [without_clock(row) for row in trainer.train()]


@pytest.mark.parametrize(
    ("who", "other"),
    [
        ("in a callback, the first alone", "process 1 is in the callbacks of step 1"),
        ("before the run, the first alone", r"process 1 is in train()"),
        ("behind the run, the first alone", "evaluate() takes all processes, so each of them has to come here, too"),
    ],
)
def test_an_evaluation_by_one_process_alone_says_what_to_do(who, other, tmp_path):
    started = time.monotonic()
    first, second = processes.run(evaluates, 2, tmp_path, who, seconds=60)
    assert first.exit_code == 1 and other in first.error, first.error
    if "behind" not in who:
        assert "process 0 is in evaluate()" in second.error and "call it on every process" in second.error
    assert time.monotonic() - started < 50


def test_an_evaluation_by_all_processes_in_a_callback_changes_nothing(tmp_path):
    first, second = processes.run(evaluates, 2, tmp_path / "all", "in a callback, all")
    quiet, _ = processes.run(to_its_end, 2, tmp_path / "quiet")
    assert first.result == second.result == quiet.result, first.error + quiet.error


def to_its_end(folder, total_steps: int = 2) -> list:
    return [without_clock(row) for row in tiny.trainer(folder, total_steps=total_steps).train()]


def fails_on_one(folder, what: str) -> tuple[list[str], list[dict]]:
    """The reward or the callback of process 1 fails in step 2, or behind it; then the run goes on from there."""
    settings = {"total_steps": 4, "save_every": 9}
    trainer = tiny.trainer(folder, **settings)
    rewards = trainer.rewards

    def failing(*arguments):
        if trainer.step == (1 if what == "reward" else 2) and parallel.rank() == 1:
            raise ValueError("no more")
        return rewards(*arguments)

    if what == "reward":
        trainer.rewards = failing
    else:
        trainer.callbacks = [failing]
        rewards = print
    with pytest.raises((ValueError, RuntimeError), match="no more"):
        trainer.train()
    return [path.name for path in (folder / "checkpoints").iterdir()], [
        without_clock(row) for row in tiny.trainer(folder, **settings).train(resume_from_checkpoint=True)
    ]


@pytest.mark.parametrize(("what", "saved"), [("reward", 1), ("callback", 2)])
def test_a_guest_that_fails_on_one_process_stops_all_with_the_last_finished_step(what, saved, tmp_path):
    first, second = processes.run(fails_on_one, 2, tmp_path / "cut", what)
    assert first.error == second.error == ""
    whole, _ = processes.run(to_its_end, 2, tmp_path / "whole", 4)
    assert first.result == second.result == ([f"step-{saved}"], whole.result[saved:])


def has_no_room(folder) -> None:
    trainer = tiny.trainer(folder, total_steps=2, save_every=1)

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if parallel.is_main():
        trainer.callbacks = [lambda *_: setattr(checkpoint, "flush", full)]
    trainer.train()


def test_a_full_disk_under_the_first_process_stops_all(tmp_path):
    first, second = processes.run(has_no_room, 2, tmp_path)
    assert "No space left on device" in first.error and "process 0 stopped with OSError: cannot write" in second.error
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]


REFUSED = [
    (
        {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"},
        {},
        "offload_param_device of the accelerate config must be none for DeepSpeed, got cpu",
    ),
    (FSDP | {"FSDP_VERSION": "1"}, {}, "fsdp_version of the accelerate config must be 2, got 1"),
    (FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params of the accelerate config must be false"),
    ({}, {"prompts_per_step": 1, "minibatch_size": 2}, "prompts_per_step must be at least the 2 processes"),
]


def refused(folder) -> None:
    for environment, settings, message in REFUSED:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ConfigError, match=message):
            for variable, value in environment.items():
                patch.setenv(variable, value)
            tiny.trainer(folder, **settings)


def test_what_does_not_work_is_refused(tmp_path):
    for outcome in processes.run(refused, 2, tmp_path):
        assert outcome.error == ""


@pytest.mark.parametrize(("name", "sharded"), [("ddp.yaml", False), ("fsdp2.yaml", True)])
def test_the_trainer_takes_the_shipped_accelerate_configs(name, sharded, monkeypatch):
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_multi_gpu_env

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    arguments = launch.launch_command_parser().parse_args(["--config_file", str(ACCELERATE / name), "train.py"])
    arguments, *_ = launch._validate_launch_command(arguments)
    monkeypatch.undo()
    for variable, value in prepare_multi_gpu_env(arguments).items():
        if variable.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(variable, value)
    monkeypatch.setattr("safe_train.parallel.size", lambda: arguments.num_processes)
    assert arguments.num_processes == 8 and (sharding.settings() is not None) == sharded


@pytest.mark.parametrize("started", [{"OMPI_COMM_WORLD_SIZE": "2"}, {"LOCAL_RANK": "0", "WORLD_SIZE": "2"}], ids=str)
def test_processes_that_would_all_do_the_same_work_are_refused(started, monkeypatch):
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="2 processes were started, and this one works in a group of 1: each group"):
        parallel.check_launch()


def without_asking_for_cpus(folder):
    del os.environ["ACCELERATE_USE_CPU"]  # as torchrun leaves it
    return [row["reward"] for row in tiny.trainer(folder, use_cpu=False).train()], parallel.size()


def test_torchrun_without_a_gpu_shares_the_work_whether_cpus_were_asked_for_or_not(tmp_path):
    first, second = processes.run(without_asking_for_cpus, 2, tmp_path)
    assert first.error == second.error == "" and first.result == second.result and first.result[1] == 2


@pytest.mark.parametrize(("processes_asked_for", "is_said"), [("2", True), ("1", False)])
def test_one_process_where_several_were_asked_for_is_said(processes_asked_for, is_said, monkeypatch, capsys):
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    given = ["--cpu", "--num_processes", processes_asked_for, "--num_machines", "1", "train.py"]
    arguments, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(given))
    for variable, value in prepare_simple_launcher_cmd_env(arguments)[1].items():
        monkeypatch.setenv(variable, value)
    parallel.start(SafeConfig(use_cpu=True))
    said = "accelerate launch was asked for several processes and started this one alone"
    assert (said in capsys.readouterr().out) == is_said


def test_each_process_samples_with_numbers_of_its_own(tmp_path):
    first, second = processes.run(draws, 2, tmp_path)
    assert first.result["own"] != second.result["own"] and first.result["again"] == first.result["own"]
    assert first.result["shared"] == second.result["shared"]


def draws(folder) -> dict:
    from safe_train.randomness import own_random_numbers

    tiny.trainer(folder)
    found = {}
    for name in ("own", "again"):
        with own_random_numbers(3, 5):
            found[name] = (torch.rand(1).item(), np.random.rand())
    return found | {"shared": (torch.rand(1).item(), np.random.rand())}


def test_maxima_are_found_in_one_exchange(monkeypatch):
    calls = []
    monkeypatch.setattr(parallel, "gather_objects", lambda own: calls.append(own) or [own, {"a": 3.0, "b": 0.0}])
    assert parallel.maxima({"a": 1.0, "b": 2.0}) == {"a": 3.0, "b": 2.0} and len(calls) == 1


def test_helpers_are_the_identity_for_a_process_that_is_alone():
    values = torch.arange(3.0)
    assert parallel.total(values) is values and parallel.gather(values) is values
    assert parallel.share([1, 2, 3]) == [1, 2, 3] and parallel.total_number(2) == 2 and parallel.is_main()
    with pytest.raises(ZeroDivisionError):
        parallel.main_only(lambda: 1 / 0)()


def with_rewards_that_log(folder) -> tuple:
    """The second process logs a column and a metric that the first one does not."""

    def judge(completions, log_extra, log_metric):
        rank = parallel.rank()
        log_metric("rank", rank)
        if rank == 1:
            log_extra("note", [f"{rank}: {text}" for text in completions])
            log_metric("share", 0.5)
        return [None if rank == 0 and i == 0 else float(rank) for i in range(len(completions))]

    trainer = tiny.trainer(folder, judge, total_steps=1, eval_every=1, eval_completions=4)
    row = trainer.train()[0]
    return {name: x for name, x in row.items() if name in LOGGED}


LOGGED = ("rank", "share", "reward", "rewards/none_fraction", "eval/rank", "eval/rewards/judge/mean")


def test_what_rewards_log_is_that_of_all_processes(tmp_path):
    first, second = processes.run(with_rewards_that_log, 2, tmp_path)
    assert first.error == second.error == ""
    expected = {"rank": 0.5, "share": 0.5, "reward": 4 / 7, "rewards/none_fraction": 1 / 8, "eval/rank": 0.5}
    expected["eval/rewards/judge/mean"] = 2 / 3
    assert first.result == second.result == pytest.approx(expected)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    notes = [row["note"] for row in samples]
    assert notes == [None] * 4 + [f"1: {row['completion']}" for row in samples[4:]]
    assert [row["reward"] for row in samples] == [None, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]


def by_the_command(pairs) -> tuple[int, bool]:
    return main(["run", *pairs]), torch.distributed.is_initialized()


@pytest.mark.parametrize(("setting", "status"), [("seed=0", 0), ("reward=[a.py:b]", 2)])
def test_the_command_leaves_the_group_of_processes_at_its_end(setting, status, tmp_path):
    pairs = [*prepare(tmp_path), f"output_dir={tmp_path}/run", "total_steps=1", setting]
    for outcome in processes.run(by_the_command, 2, pairs):
        assert outcome.result == (status, False), outcome.error + outcome.printed
