"""apply(kl="exact") in two processes: the numbers of one process, under DDP and under DeepSpeed's ZeRO-3."""

import importlib
import importlib.util
import os

import processes
import pytest
import tiny
import torch

pytest.importorskip("trl", reason="TRL is not installed; it needs Python 3.11: pip install 'safe-kernels[test]'")

from test_trl_exact_kl import trainer_of  # noqa: E402

from safe_kernels.integrations import trl as patch  # noqa: E402

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]
CASES = [("GRPO", "full"), ("GRPO", "LoRA"), ("RLOO", "full"), ("RLOO", "LoRA")]
ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},  # of every parameter, however small
    "zero_allow_untested_optimizer": True,
    "gradient_accumulation_steps": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
}


def fixed_completions(trainer, kind):
    """Two groups of two completions, which the processes share out."""

    def generate(prompts):
        rank, size = trainer.accelerator.process_index, trainer.accelerator.num_processes
        draw = torch.Generator().manual_seed(trainer.state.global_step)
        share = slice(rank * 4 // size, (rank + 1) * 4 // size)
        completions = torch.randint(2, len(tiny.WORDS), (4, 5), generator=draw)[share].tolist()
        texts = [" ".join(tiny.WORDS[i] for i in ids) for ids in completions]
        ids = [tiny.tokenizer()(text)["input_ids"] for text in prompts]
        if kind == "RLOO":
            return ids, completions, texts
        return ids, completions, None, texts, None, {}, None, None

    return generate


def logged(folder, cases, zero3=False) -> dict:
    """Three steps of SGD, so that a step shows the gradient of the one before."""
    found = {}
    if zero3:
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
        os.environ.pop("ACCELERATE_USE_CPU")  # it would turn DeepSpeed off
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # takes a minute to compile
        importlib.import_module("deepspeed").init_distributed("gloo")
    for kind, policy in cases:
        options = {"num_iterations": 1, "gradient_checkpointing": True, "optim": "sgd", "learning_rate": 0.5}
        options |= {"per_device_train_batch_size": 4 // int(os.environ.get("WORLD_SIZE", 1))}
        options |= {"lr_scheduler_type": "constant", **({"deepspeed": ZERO3} if zero3 else {})}
        place = folder / f"{kind} {policy}"
        place.mkdir(exist_ok=True)
        with patch.apply(kl="exact"):
            trainer = trainer_of(kind, place, policy, **options)
            trainer._generate = fixed_completions(trainer, kind)
            trainer.train()
        rows = trainer.state.log_history[:-1]
        found[kind, policy] = [[float(row[name]) for name in ("loss", "kl", "grad_norm")] for row in rows]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("cases", [CASES, CASES[:1], CASES[-1:]], ids=["DDP", "ZeRO-3, a model", "ZeRO-3, LoRA"])
def test_two_processes_train_as_one(cases, tmp_path):
    zero3 = len(cases) == 1
    if zero3 and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: make test-integrations")
    expected = logged(tmp_path, cases)
    outcomes = processes.run(logged, 2, tmp_path, cases, zero3, seconds=300)
    assert all(outcome.exit_code == 0 for outcome in outcomes), "".join(outcome.error for outcome in outcomes)
    for case in cases:
        assert len(expected[case]) == 3 and expected[case][-1][1] > 1e-3
        for row, wanted in zip(outcomes[0].result[case], expected[case], strict=True):
            assert row == pytest.approx(wanted, rel=1e-4, abs=1e-6), case
