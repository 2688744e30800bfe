"""DeepSpeed's ZeRO-2 and ZeRO-3: the same steps as on one process without it, and the same checkpoints."""

import importlib.util
import os
import sys
import traceback

import numpy as np
import processes
import pytest
import tiny
import torch
from test_distributed import (
    ACCELERATE,
    FULL,
    HANDED_OVER,
    arrays,
    close,
    resumed_with_another_adapter,
    trainer_on,
    without_clock,
)

from safe_train import parallel
from safe_train.config import ConfigError
from safe_train.engines import zero
from safe_train.engines.engine import Engine

CASES = {
    "LoRA": {},
    "a bad gradient on one process": {"bad_gradient": True},
    "tied head, one rank got no response token": {
        "kind": "one rank got no response token", "model": {"tie_word_embeddings": True}, "learning_rate": 1e-3
    },
    "full fine-tuning": {"algorithm": "ppo", "max_preview_kl": 0.01, **FULL},
    "full fine-tuning, a KL budget": {"kl_budget": 0.01, "algorithm": "grpo", **FULL},
    "LoRA, a KL budget": {"kl_budget": 0.01},
    "a trained adapter, a KL budget": {"kl_budget": 0.003, **HANDED_OVER},
    "tied head, checkpointing": {"gradient_checkpointing": True, "model": {"tie_word_embeddings": True}, **FULL},
    "biased head, LoRA on the last layer": {"model": {"bias": True}, "lora_last_layers": 1},
    "a trained adapter": HANDED_OVER,
    "trained tokens": {"adapter": {"trainable_token_indices": [3, 4]}, "learning_rate": 1e-3},
    "trained biases, the head's too": {
        "model": {"bias": True, "attention_bias": True}, "adapter": {"bias": "all"}, "learning_rate": 1e-3
    },
}  # fmt: skip
STAGES = (2, 3)
INSTALLED = importlib.util.find_spec("deepspeed") is not None
SETTINGS = {"total_steps": 3, "save_every": 1, "keep_checkpoints": 9, "eval_every": 3, "window": 2, "kl_budget": 0.003}


def needs_deepspeed(test):
    return pytest.mark.slow(pytest.mark.skipif(not INSTALLED, reason="needs DeepSpeed, which is not installed")(test))


def whole(trainer, name) -> list[np.ndarray]:
    """What DeepSpeed's function of this name gathers of each trained parameter."""
    return arrays(map(getattr(importlib.import_module("deepspeed.utils"), name), trainer.trainable))


def weights(trainer) -> list[np.ndarray]:
    with trainer.engine.gathered():
        found = arrays(trainer.trainable)
    if type(trainer.engine) is not Engine:
        close(whole(trainer, "safe_get_full_fp32_param"), found, "the optimizer's copy", tolerance=0)
    return found


def steps(folder, bad_gradient=False, **case) -> dict:
    """Two steps: their metrics, the gradients of every optimizer step, and everything that they leave behind."""
    trainer, gradients = trainer_on(folder, save_every=2, **case), []
    take_step, backward = trainer.take_step, trainer.engine.backward

    def poisoned(loss) -> None:
        trainer.engine.backward = backward
        backward(loss * float("nan"))

    def recorded() -> None:
        own = type(trainer.engine) is Engine
        found = arrays(p.grad for p in trainer.trainable) if own else whole(trainer, "safe_get_full_grad")
        gradients.append(found)
        take_step()

    trainer.take_step = recorded
    if bad_gradient and parallel.rank() == parallel.size() - 1:
        trainer.engine.backward = poisoned
    history = trainer.train()
    return {
        "metrics": [without_clock(row) for row in history],
        "gradients": gradients,
        "weights": weights(trainer),
        "critic": [] if trainer.critic is None else arrays(trainer.critic.state_dict().values()),
        "controller": trainer.controller.state_dict(),
    }


def stopped_and_resumed(folder, foreign) -> dict:
    """Three steps of real sampling in one go, and three with a resume after the second; then, on fixed rollouts, from
    the checkpoint of one process."""
    whole = tiny.trainer(folder / "whole", **SETTINGS).train()
    tiny.trainer(folder / "cut", **SETTINGS | {"total_steps": 2}).train()
    resumed = tiny.trainer(folder / "cut", **SETTINGS).train(resume_from_checkpoint=True)
    trainer = trainer_on(folder / "foreign", total_steps=4, window=2, lora_r=0)
    continued = trainer.train(resume_from_checkpoint=foreign)
    rows = {"whole": whole, "resumed": resumed, "foreign": continued}
    return {name: [without_clock(row) for row in found] for name, found in rows.items()} | {"weights": weights(trainer)}


def in_two_dtypes(folder) -> list[dict]:
    trainer = tiny.trainer(folder, policy=tiny.model().to(torch.bfloat16), total_steps=2)
    assert {p.dtype for p in trainer.policy.parameters()} == {torch.bfloat16, torch.float32}
    return [without_clock(row) for row in trainer.train()]


def refused(folder) -> str:
    with pytest.raises(ConfigError, match="the trained weights must be float32, got torch.bfloat16"):
        tiny.trainer(folder, policy=tiny.model().to(torch.bfloat16), lora_r=0)
    return "refused"


def everything(folder, foreign, adapter) -> dict:
    """All that needs DeepSpeed, in one start of the processes: results, or what was raised, by stage and name."""
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    # Without the C++ extension that exchanges through shared memory on a CPU, and takes a minute to compile.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    config, found = zero.config, {}

    def for_tiny_models(stage, device):
        """There are weights larger than a bucket."""
        settings = config(stage, device)
        settings["zero_optimization"]["reduce_bucket_size"] = 1000
        settings["zero_optimization"]["allgather_bucket_size"] = 1000
        return settings

    zero.config = for_tiny_models
    todo = {name: (steps, case) for name, case in CASES.items()} | {
        "resume": (stopped_and_resumed, {"foreign": foreign}),
        "handed over": (resumed_with_another_adapter, {"environment": {}, "checkpoint": adapter}),
        "bfloat16": (in_two_dtypes, {}),
        "refused": (refused, {}),
    }
    for stage in STAGES:
        os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(stage)
        for name, (function, arguments) in todo.items():
            try:
                found[stage, name] = function(folder / str(stage) / name, **arguments)
            except Exception:
                found[stage, name] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    found = {name: steps(folder / name, **case) for name, case in CASES.items()}
    history = trainer_on(folder / "foreign", total_steps=4, window=2, lora_r=0).train()
    adapted = trainer_on(folder / "adapter", total_steps=4, window=2, **HANDED_OVER).train()
    rows = {"foreign": history, "handed over": adapted}
    return found | {name: [without_clock(row) for row in run] for name, run in rows.items()} | {"folder": folder}


@pytest.fixture(scope="module")
def on_three(alone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    of_one = [alone["folder"] / name / "checkpoints" / "step-2" for name in ("foreign", "adapter")]
    outcomes = processes.run(everything, 3, folder, *of_one, seconds=550)
    assert all(outcome.exit_code == 0 for outcome in outcomes), "".join(outcome.error for outcome in outcomes)
    return [outcome.result for outcome in outcomes], folder


def results(on_three, stage, name) -> list:
    by_rank = [found[stage, name] for found in on_three[0]]
    assert not any(isinstance(result, str) and "Traceback" in result for result in by_rank), by_rank[0]
    return by_rank


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", CASES)
def test_steps_under_zero_equal_those_of_one_process(stage, case, alone, on_three):
    first, *others = results(on_three, stage, case)
    for name, expected in alone[case].items():
        close(first[name], expected, f"{case}: {name}")
    for other in others:
        close(other, first, "ranks differ", tolerance=0)
    assert any(np.abs(gradient).max() > 1e-3 for gradient in first["gradients"][0])
    bad = [row["bad_steps"] for row in first["metrics"]]
    assert bad == ([0.25, 0] if "bad_gradient" in CASES[case] else [0, 0])


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_of_zero_resumes_and_so_does_one_of_a_single_process(stage, alone, on_three, tmp_path):
    first, *others = results(on_three, stage, "resume")
    assert all(first["resumed"] == each["whole"][2:] for each in (first, *others))
    assert any(row["budget/scale"] < 1 for row in first["resumed"])
    close(first["foreign"], alone["foreign"][2:], "from one process to ZeRO")
    back = trainer_on(tmp_path, total_steps=4, window=2, lora_r=0)
    rows = back.train(resume_from_checkpoint=on_three[1] / str(stage) / "resume" / "foreign" / "checkpoints" / "step-3")
    close([without_clock(row) for row in rows], first["foreign"][1:], "from ZeRO to one process")
    close(arrays(back.trainable), first["weights"], "weights")


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_the_reference_of_a_resumed_run_is_the_adapter_it_began_with(stage, alone, on_three):
    for found in results(on_three, stage, "handed over"):
        close(found, alone["handed over"][2:], "from one process to ZeRO")


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_frozen_weights_may_be_bfloat16_under_zero(stage, on_three):
    first, *others = results(on_three, stage, "bfloat16")
    assert others == [first, first] and first[0]["kl"] < 1e-3 < first[0]["grad_norm"]


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_what_zero_cannot_do_is_refused(stage, on_three):
    assert results(on_three, stage, "refused") == ["refused"] * 3


def test_a_cpu_gathers_one_weight_after_another():
    """At once, three processes lost a weight in some thousand writes."""
    for device in ("cpu", "cuda"):
        settings = zero.config(3, torch.device(device))["zero_optimization"]
        assert settings["stage3_allgather_sequential"] == (device == "cpu")


@pytest.fixture
def eight(monkeypatch):
    monkeypatch.setattr("safe_train.parallel.size", lambda: 8)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    return monkeypatch


@pytest.mark.parametrize("stage", STAGES)
def test_the_trainer_takes_the_shipped_configs_of_zero(stage, eight):
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    file, launched = str(ACCELERATE / f"zero{stage}.yaml"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: True)
        patch.setattr("torch.cuda.device_count", lambda: 8)
        patch.setattr(launch, "deepspeed_launcher", launched.append)
        launch.launch_command(launch.launch_command_parser().parse_args(["--config_file", file, "train.py"]))
    (arguments,) = launched
    for variable, value in prepare_deepspeed_cmd_env(arguments)[1].items():
        if variable.startswith("ACCELERATE_"):
            eight.setenv(variable, value)
    assert arguments.num_processes == 8 and zero.stage() == stage


REFUSED = {
    "DEEPSPEED_ZERO_STAGE": ("1", "zero_stage of the accelerate config must be 2 or 3 for DeepSpeed, got 1"),
    "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": ("cpu", "offload_optimizer_device .* must be none for DeepSpeed, got cpu"),
    "DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("nvme", "offload_param_device .* must be none for DeepSpeed, got nvme"),
    "DEEPSPEED_ZERO3_INIT": ("true", "zero3_init_flag .* must be false for DeepSpeed, got true"),
    "DEEPSPEED_CONFIG_FILE": ("ds.json", "deepspeed_config_file .* must be none for DeepSpeed, got ds.json"),
    "DEEPSPEED_MOE_LAYER_CLS_NAMES": ("Experts", "deepspeed_moe_layer_cls_names .* must be none .*, got Experts"),
    "MIXED_PRECISION": ("fp16", "mixed_precision .* must be no for DeepSpeed, got fp16; see dtype"),
    "GRADIENT_CLIPPING": ("1.0", "gradient_clipping .* must be auto .*, got 1.0; see max_grad_norm"),
    "GRADIENT_ACCUMULATION_STEPS": (
        "4",
        "gradient_accumulation_steps .* must be 1 or auto .*, got 4; see minibatch_size",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_would_change_a_run_are_refused(name, eight):
    value, message = REFUSED[name]
    eight.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    eight.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(ConfigError, match=message):
        zero.stage()


def test_without_deepspeed_the_error_says_what_to_install(eight):
    assert zero.stage() == 2
    eight.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"pip install --no-build-isolation 'safe-kernels\[deepspeed\]'"):
        zero.import_deepspeed()


def test_one_process_runs_without_deepspeed(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert zero.stage() is None
