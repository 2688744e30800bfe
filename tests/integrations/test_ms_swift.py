"""ms-swift's own commands train the same with and without the plugin; its loss of GKD beside ours."""

import importlib.util
import json
import subprocess
import sys

import pytest
import tiny
import torch
from cases import hold, logits_case

if importlib.util.find_spec("swift") is None:
    pytest.skip("ms-swift is not installed: python tests/integrations/run.py ms_swift", allow_module_level=True)

from swift.rlhf_trainers import gkd_loss  # noqa: E402

from safe_kernels.integrations import ms_swift  # noqa: E402

REWARD = """
from swift.rewards import ORM, orms

class Happy(ORM):
    def __call__(self, completions, **kwargs):
        return [sum(word in ("good", "happy") for word in text.split()) / 4 + len(text) / 1000 for text in completions]

orms["happy"] = Happy
"""
COUNTER = """
import atexit
from safe_kernels.integrations import {module} as ours

calls, original = [], ours.{name}
ours.{name} = lambda *a, **k: calls.append(0) or original(*a, **k)
atexit.register(lambda: print("calls of ours:", len(calls)))
"""
SAMPLED = ["--reward_funcs", "happy", "--num_generations", "2", "--max_completion_length", "6", "--temperature", "0.9"]
COMMANDS = {  # what is counted, and the arguments
    "dpo": ("trl", "token_stats", []),
    "grpo": ("trl", "token_stats", [*SAMPLED, "--beta", "0.1", "--log_entropy", "true"]),
    "gkd": ("ms_swift", "distillation_loss", ["--teacher_model_type", "llama", "--lmbda", "0", "--temperature", "0.9"]),
}
OPTIONS = {
    "model_type": "llama",
    "template": "dummy",
    "tuner_type": "full",
    "torch_dtype": "float32",
    "use_cpu": "true",
    "max_steps": 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": "false",
    "learning_rate": 1e-3,
    "split_dataset_ratio": 0,
    "save_strategy": "no",
    "report_to": "none",
    "add_version": "false",
    "seed": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and another as its teacher, data, a reward, and the counters."""
    folder = tmp_path_factory.mktemp("swift")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    for seed, name in enumerate(("model", "teacher")):
        tiny.model(seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    asked = [[{"role": "user", "content": row["prompt"]}] for row in tiny.PROMPTS]
    answered = [[*messages, {"role": "assistant", "content": "good happy"}] for messages in asked]
    rows = {
        "grpo": [{"messages": messages} for messages in asked],
        "dpo": [{"messages": messages, "rejected_response": "bad sad not"} for messages in answered],
        "gkd": [{"messages": messages} for messages in answered],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "reward.py").write_text(REWARD)
    for module, name, _ in COMMANDS.values():
        (folder / f"count_{name}.py").write_text(COUNTER.format(module=module, name=name))
    return folder


def trained(kind, folder, plugins):
    """What `swift rlhf` logged in each step, and what it printed."""
    out = folder / f"{kind}-{len(plugins)}"
    options = {**OPTIONS, "rlhf_type": kind, "model": "model", "dataset": f"{kind}.jsonl", "output_dir": out}
    options |= {"teacher_model": "teacher"} if kind == "gkd" else {}
    command = [sys.executable, "-m", "swift.cli.rlhf", *COMMANDS[kind][2]]
    command += [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    command += ["--external_plugins", "reward.py", *plugins]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = map(json.loads, (out / "logging.jsonl").read_text().splitlines())
    return [line for line in lines if "grad_norm" in line], done.stdout + done.stderr


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", COMMANDS)
def test_its_own_command_trains_as_before(kind, folder):
    """Losses, gradient norms, KL, entropy and every other number that it logs."""
    name = COMMANDS[kind][1]
    plugin = subprocess.check_output([sys.executable, "-m", "safe_kernels.integrations.ms_swift"], text=True).strip()
    expected, _ = trained(kind, folder, [])
    actual, printed = trained(kind, folder, [f"count_{name}.py", plugin])
    assert "safe_kernels in trl" in printed and "safe_kernels in swift" in printed
    assert int(printed.partition("calls of ours: ")[2].split()[0]) >= 2
    assert len(actual) == len(expected) == 2
    for step, wanted in zip(actual, expected, strict=True):
        numbers = {key for key, value in wanted.items() if isinstance(value, float) and "time" not in key}
        numbers -= {"train_speed(s/it)"}
        assert {"loss", "grad_norm"} <= numbers and numbers <= step.keys()
        for key in numbers:
            assert step[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-5), key


def test_the_plugin_s_folder_hides_no_package():
    """ms-swift puts it first on sys.path."""
    names = {path.stem for path in ms_swift.PLUGIN.parent.glob("*.py")}
    assert names == {"__init__", "safe_kernels_plugin"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", [0, 0.5, 0.3, 1])
def test_the_loss_of_gkd(beta, dtype, kernels):
    case = logits_case((21,), 37, dtype=dtype, scale=2.0)
    names, draw = ("logits", "ref_logits"), {}
    own = gkd_loss.jsd_loss
    for name, function, kind in (("plain", own, dtype), ("exact", own, torch.float64), ("ours", None, dtype)):
        student, teacher = (case[x].to(kind, copy=True) for x in names)
        student.requires_grad_()
        with ms_swift.PATCH:
            loss = (function or gkd_loss.jsd_loss)(student, teacher, beta)
        loss.backward()
        draw[name] = {"loss / tokens": loss.detach() / 21, "d logits": student.grad}
    for key, x in draw["ours"].items():
        hold(key, x, draw["plain"][key], draw["exact"][key], 37)
    assert draw["ours"]["loss / tokens"].dtype == torch.float32


def test_what_is_not_ours_is_still_computed():
    """No tokens, a teacher with a gradient, and functions of the caller's, as Megatron's are."""
    student, teacher = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    wanted = gkd_loss.jsd_loss(student, teacher, 0.5)
    with ms_swift.PATCH:
        ours = gkd_loss.jsd_loss(student, teacher, 0.5)
        ours.backward()
        assert torch.equal(ours, wanted) and teacher.grad.abs().max() > 0
        assert gkd_loss.jsd_loss(student[:0], teacher[:0].detach(), 0.5) == 0
        zero = gkd_loss.jsd_loss(student, teacher.detach(), 0.0, kl_div_fn=lambda s, t: s.sum(-1) * 0)
        assert zero == 0
