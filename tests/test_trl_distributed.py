"""apply(kl="exact") and distillation in two processes: the numbers of one, under DDP and under DeepSpeed's ZeRO-3."""

import contextlib
import importlib
import importlib.util
import os

import processes
import pytest
import tiny
import torch
from cases import distillation_case, some_mask

pytest.importorskip("trl", reason="TRL is not installed; it needs Python 3.11: pip install 'safe-kernels[test]'")

import trl  # noqa: E402
from test_trl_exact_kl import trainer_of  # noqa: E402
from trl.trainer import distillation_trainer  # noqa: E402

from safe_kernels.integrations import trl as patch  # noqa: E402
from safe_kernels.integrations import trl_distillation  # noqa: E402

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
    found, shared = {}, shared_options(zero3)
    for kind, policy in cases:
        options = {"num_iterations": 1, "learning_rate": 0.5, **shared}
        place = folder / f"{kind} {policy}"
        place.mkdir(exist_ok=True)
        with patch.apply(kl="exact"):
            trainer = trainer_of(kind, place, policy, **options)
            trainer._generate = fixed_completions(trainer, kind)
            trainer.train()
        rows = trainer.state.log_history[:-1]
        found[kind, policy] = [[float(row[name]) for name in ("loss", "kl", "grad_norm")] for row in rows]
    return found


def shared_options(zero3):
    if zero3:
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
        os.environ.pop("ACCELERATE_USE_CPU")  # it would turn DeepSpeed off
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # takes a minute to compile
        importlib.import_module("deepspeed").init_distributed("gloo")
    options = {"per_device_train_batch_size": 4 // int(os.environ.get("WORLD_SIZE", 1)), "optim": "sgd"}
    options |= {"gradient_checkpointing": True, "lr_scheduler_type": "constant"}
    return options | ({"deepspeed": ZERO3} if zero3 else {})


def distilled(folder, zero3=False, patched=True) -> list[list[float]]:
    """Loss and gradient norm of three steps on fixed completions."""
    from datasets import Dataset

    options = {"max_steps": 3, "logging_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True}
    options |= {"bf16": False, "seed": 1, "beta": 0.5, "learning_rate": 0.1, **shared_options(zero3)}
    with patch.apply() if patched else contextlib.nullcontext():
        trainer = trl.DistillationTrainer(
            model=tiny.model(),
            teacher_model=tiny.model(seed=1, hidden_size=48),
            args=trl.DistillationConfig(output_dir=str(folder), **options),
            train_dataset=Dataset.from_list(tiny.PROMPTS),
            processing_class=tiny.tokenizer(),
        )

        def generate(*_):
            rank, size = trainer.accelerator.process_index, trainer.accelerator.num_processes
            draw = torch.Generator().manual_seed(trainer.state.global_step)
            completions = torch.randint(2, len(tiny.WORDS), (4, 5), generator=draw)
            return completions[rank * 4 // size : (rank + 1) * 4 // size].tolist()

        trainer._generate_single_turn = generate
        trainer.train()
    return [[float(row[name]) for name in ("loss", "grad_norm")] for row in trainer.state.log_history[:-1]]


def sharded_heads() -> list[dict]:
    """TRL's loss and ours, and their gradients, with heads that FSDP2 has cut."""
    tensor = importlib.import_module("torch.distributed.tensor")
    torch.distributed.init_process_group("gloo")
    mesh, found = torch.distributed.init_device_mesh("cpu", (2,)), []
    for loss in (distillation_trainer._chunked_divergence_loss, trl_distillation.chunked_divergence_loss):
        case = distillation_case(bias=True)
        for name in ("weight", "bias", "teacher_weight", "teacher_bias"):
            case[name] = tensor.distribute_tensor(case[name], mesh, [tensor.Shard(0)])
        leaves = {name: case[name].requires_grad_() for name in ("hidden", "weight", "bias")}
        heads = [case[name] for name in ("hidden", "teacher_hidden", "weight", "teacher_weight")]
        biases = {"student_lm_head_bias": case["bias"], "teacher_lm_head_bias": case["teacher_bias"]}
        value, *_ = loss(*heads, some_mask(), 0.3, **biases)
        value.backward()
        slopes = {name: x.grad for name, x in leaves.items()}
        whole = {name: x.full_tensor() if name != "hidden" else x for name, x in slopes.items()}
        found.append({"loss": value.item()} | {name: x.tolist() for name, x in whole.items()})
    return found


@pytest.mark.slow
def test_heads_that_fsdp2_has_cut():
    for outcome in processes.run(sharded_heads, 2, seconds=300):
        assert not outcome.error, outcome.error
        stock, ours = ({name: torch.tensor(x) for name, x in found.items()} for found in outcome.result)
        torch.testing.assert_close(ours, stock)


@pytest.mark.slow
@pytest.mark.parametrize("zero3", [False, True], ids=["DDP", "ZeRO-3"])
def test_two_processes_distill_as_one(zero3, tmp_path):
    if zero3 and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: make test-integrations")
    expected = distilled(tmp_path, patched=False)
    assert len(expected) == 3
    for outcome in processes.run(distilled, 2, tmp_path, zero3, seconds=300):
        assert outcome.exit_code == 0, outcome.error
        for row, wanted in zip(outcome.result, expected, strict=True):
            assert row == pytest.approx(wanted, rel=1e-4, abs=1e-6)


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
