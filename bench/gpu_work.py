"""What the parts of bench/gpu.py do: each function here measures one thing and yields records of it."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import measure
import torch
import tune
from gate import Error, Gate
from gpu import append
from machine import ROOT, versions
from model import Roofs, itemsize
from peers import Case, Provider, Results, ours, over_the_logits
from rows import Run, record
from suite import Settings, measured
from workloads import Workload, gae, make_case

import safe_kernels
from safe_kernels import reference, triton_backend
from safe_kernels.inputs import LinearInputs, LogitsInputs
from safe_kernels.triton_backend import launch

SECONDS = 0.3  # of repeats for each pass of each provider
FEW_SECONDS = 0.1  # of a candidate in a sweep
Record = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where the parts run: on the GPU at full size, or tiny on a CPU in Triton's interpreter."""

    tiny: bool = False
    file: Path = Path()
    commit: str = ""
    site: Path = Path()
    wheels: Path = Path()

    @property
    def device(self) -> str:
        return "cpu" if self.tiny else "cuda"

    @property
    def target(self) -> str:
        """The class of launch choices; Hopper's where a plan is made without a GPU."""
        has_device = self.tiny or torch.cuda.is_available()
        return launch.architecture(torch.device(self.device)) if has_device else "sm_90"

    @functools.cached_property
    def run(self) -> Run:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return Run(stamp, measure.machine(self.device), self.commit, None, self.device)

    def shrink(self, workload: Workload) -> Workload:
        """Itself on the GPU; in the interpreter toy sizes, and no bfloat16, in which it is wrong."""
        if not self.tiny:
            return workload
        if workload.T:
            return replace(workload, N=2 * 40, T=40)
        dtype = "float16" if workload.dtype == "bfloat16" else workload.dtype
        return replace(workload, model="toy", N=3, H=16, V=37, dtype=dtype)

    @functools.cache  # noqa: B019
    def roofs(self, dtype: str) -> Roofs:
        return Roofs(1e11, 1e10) if self.tiny else measure.roofs(dtype, self.device)

    def settings(self, workload: Workload, seconds: float = SECONDS, passes: tuple[str, ...] = ()) -> Settings:
        roofs = {workload.dtype: self.roofs(workload.dtype)}
        return Settings(self.device, 0.0 if self.tiny else seconds, roofs, self.tiny, only_passes=passes)


# Correctness


def judged(place: Place, name: str, workload: Workload, options: Case, own: Case) -> Iterator[Record]:
    gate = Gate(workload, make_case(workload, place.device) | options)
    run = ours(workload.entrance, "triton", **own)
    run = over_the_logits(run) if "inplace_backward" in own else run
    at_once = workload.N // workload.T if workload.T else max(1, (1 << 26) // workload.V)
    verdict = gate.judge_all_rows(run, at_once)
    yield check_record(f"{name}: {workload}", verdict.errors)


def check_record(name: str, errors: dict[str, Error]) -> Record:
    status = "green" if all(error.excess <= 1 for error in errors.values()) else "red"
    return {"record": "check", "name": name, "status": status, "errors": {k: e._asdict() for k, e in errors.items()}}


def check_terms(place: Place) -> Iterator[Record]:
    """`safe_terms`, whose kernel no workload calls."""
    draw = torch.Generator(place.device).manual_seed(0)
    logits, ref_logits = torch.randn(2, 4, 30, 97, generator=draw, device=place.device)
    values = dict(zip(("v1", "v2", "rewards"), torch.randn(3, 4, 30, generator=draw, device=place.device), strict=True))
    tokens = torch.randint(97, (4, 30), generator=draw, device=place.device)
    constants = {"ref_logits": ref_logits, "kl_threshold": 0.1, "alpha": 0.3, "gamma": 0.9}

    def terms(dtype: torch.dtype, function: Callable[..., Any], **backend: Any) -> Results:
        case = {name: x.to(dtype) if isinstance(x, torch.Tensor) else x for name, x in (values | constants).items()}
        return {
            k: x for k, x in function(logits.to(dtype), tokens, **case, **backend)._asdict().items() if x is not None
        }

    exact, plain = terms(torch.float64, reference.safe_terms), terms(torch.float32, reference.safe_terms)
    found, errors = terms(torch.float32, safe_kernels.safe_terms, backend="triton"), {}
    for name, x in exact.items():
        error, own = ((y[name].double() - x).abs().max().item() for y in (found, plain))
        errors[name] = Error.of(error, own, torch.float32, max(1.0, x.abs().max().item()))
    yield check_record("safe_terms", errors)


def check_versions(place: Place) -> Iterator[Record]:
    """Raises where PyTorch or Triton is too old; says what else this machine lacks, and what follows."""
    found = versions()
    for name, least in (("torch", (2, 9)), ("triton", (3, 5))):
        if tuple(int(part) for part in found.get(name, "0.0").split(".")[:2]) < least:
            raise RuntimeError(f"{name} {found.get(name)} is too old: {'.'.join(map(str, least))} or newer is needed")
    if not place.tiny and not torch.cuda.is_available():
        raise RuntimeError("PyTorch finds no CUDA device: a CPU build of it, or no driver")
    lacks = {
        **dict.fromkeys(("pytest", "hypothesis"), "no tests of the suite in part correctness"),
        "transformers": "no training step",
        "peft": "no training step",
        "datasets": "no training step",
        "flash-attn": "the step takes PyTorch's varlen attention",
        **dict.fromkeys(("trl", "liger-kernel", "verl", "cut-cross-entropy", "quack-kernels"), "no row of it"),
    }
    for name, consequence in lacks.items():
        if name not in found:
            yield {"record": "adjusted", "text": f"{name} is not installed: {consequence}"}
    if not place.tiny and torch.cuda.get_device_capability() != (9, 0):
        yield {"record": "adjusted", "text": "this is no H100 or H200: predictions and limits were made for one"}


GPU_TESTS = (
    *("test_rows_past_two_to_the_31", "test_two_runs_have_the_same_bits", "test_a_row_has_the_same_bits_in_any_batch"),
    *("test_memory_with_a_frozen_head", "test_scan_holds_to_the_reference", "test_safe_terms_hold_to_the_reference"),
    "test_policy_loss_holds_to_the_reference",
)


def suite_tests(place: Place) -> Iterator[Record]:
    """Tests that matter most and that no check repeats, each written when it ends; test_gpu.py has more."""
    import pytest

    tests = ROOT / "tests"
    chosen = [f"{tests / 'test_gpu.py'}::{name}" for name in GPU_TESTS] + ["-m", "gpu"]
    if place.tiny:
        chosen = [str(tests / "test_online_softmax.py")]
    recorder = Recorder(place.file)
    # Our own alarm ends what hangs; the plugin would take the signal away from it.
    options = ["-q", "-o", "addopts=", "-p", "no:timeout", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    code = pytest.main([*options, *chosen], plugins=[recorder])
    yield from ()
    if recorder.count == 0 or code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with exit code {int(code)} after {recorder.count} tests")


class Recorder:
    """A plugin of pytest that appends a record a test."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.count += 1
            reason = "" if report.outcome == "passed" else str(report.longrepr)[-300:]
            name = report.nodeid.rpartition("/")[2]
            append(self.path, {"record": "test", "name": name, "status": report.outcome, "reason": reason})


def timed(place: Place, workload: Workload, passes: tuple[str, ...], offered: list[Provider]) -> Iterator[Record]:
    settings = place.settings(workload, passes=passes)
    found = measured(workload, settings, offer=lambda _: offered)
    yield from ({"record": "row"} | record(place.run, "gpu", workload, row) for row in found)


# Rates of kernels


def kernel_calls(place: Place, workload: Workload) -> dict[str, tuple[Callable[[], Any], float, float]]:
    """By kernel: one call of it, the FLOPs and the bytes that it has to move."""
    dtype, device = getattr(torch, workload.dtype), place.device
    N, H, V, size = workload.N, workload.H, workload.V, itemsize(workload)
    draw = torch.Generator(device).manual_seed(0)
    hidden, ref_hidden = torch.randn(2, N, H, generator=draw, device=device).to(dtype)
    weight = (torch.randn(V, H, generator=draw, device=device) * (2 / H**0.5)).to(dtype)
    logits, ref_logits = hidden @ weight.T, ref_hidden @ weight.T
    tokens, out = torch.randint(V, (N,), generator=draw, device=device), torch.empty_like(logits)
    slopes = torch.randn(3, N, generator=draw, device=device)
    alone, both = (
        LogitsInputs.of(logits, tokens, ref_logits=x, temperature=1.0, mask=None) for x in (None, ref_logits)
    )
    stats, stats_both = (triton_backend.logits_statistics(x, None)[0] for x in (alone, both))
    options: dict[str, Any] = dict.fromkeys(("bias", "ref_weight", "ref_bias", "mask", "softcap"))
    options |= {"temperature": 1.0, "logit_scale": 1.0, "batch_invariant": True}
    fused, fused_both = (LinearInputs.of(hidden, weight, tokens, ref_hidden=x, **options) for x in (None, ref_hidden))
    NV, U = float(N) * V, 2.0 * N * H * V
    return {
        "plain copy of the logits": (lambda: out.copy_(logits), 0, 2 * size * NV),
        "plain product of the head": (lambda: torch.mm(hidden, weight.T, out=out), U, size * NV),
        "statistics": (lambda: triton_backend.logits_statistics(alone, None), 0, size * NV),
        "statistics with a reference": (lambda: triton_backend.logits_statistics(both, None), 0, 2 * size * NV),
        "gradient": (
            lambda: triton_backend.logits_gradient(alone, stats, (*slopes[:2], None), out), 0, 2 * size * NV),
        "gradient with KL": (
            lambda: triton_backend.logits_gradient(both, stats_both, tuple(slopes), out), 0, 3 * size * NV),
        "fused statistics": (lambda: triton_backend.linear_statistics(fused, None), U, 0),
        "fused statistics with a reference": (lambda: triton_backend.linear_statistics(fused_both, None), 2 * U, 0),
    }  # fmt: skip


RATES = (
    *("plain copy of the logits", "statistics", "statistics with a reference", "gradient", "gradient with KL"),
    *("plain product of the head", "fused statistics", "fused statistics with a reference"),
)
_calls = functools.cache(kernel_calls)


def kernel_rate(place: Place, workload: Workload, name: str) -> Iterator[Record]:
    call, flops, moved = _calls(place, workload)[name]
    timing = measure.timed({name: [call]}, place.device, 0.0 if place.tiny else SECONDS)[name]
    if isinstance(timing, Exception):
        raise timing
    yield {"record": "kernel", "name": name, "workload": str(workload), "seconds": timing.median, "flops": flops,
           "bytes": moved, "repeats": timing.repeats}  # fmt: skip


# Launches


def host_times(place: Place) -> Iterator[Record]:
    """Seconds that the host spends on a call before the device is done, on inputs so small that it never waits."""
    toy = Workload("hidden", "toy", 8, 64, 512, kl=True)
    cases = {e: make_case(replace(toy, entrance=e), place.device) for e in ("logits", "hidden", "loss")}
    cases["gae"] = make_case(gae(2, 64), place.device)
    names = {
        "logits": "token_stats",
        "hidden": "linear_token_stats",
        "loss": "linear_policy_loss",
        "gae": "soft_min_gae",
    }
    for entrance, case in cases.items():
        call = functools.partial(ours(entrance, "triton"), case)
        yield {"record": "host", "call": f"{names[entrance]}, forward", "seconds": host_seconds(place, call)}
        leaf = {"logits": "logits", "gae": None}.get(entrance, "hidden")
        if leaf is not None:
            call = functools.partial(forward_and_backward, entrance, case, leaf)
            yield {"record": "host", "call": f"{names[entrance]}, and backward", "seconds": host_seconds(place, call)}
    call = functools.partial(torch.log_softmax, cases["logits"]["logits"], -1)
    yield {"record": "host", "call": "torch.log_softmax, forward", "seconds": host_seconds(place, call)}


def forward_and_backward(entrance: str, case: Case, leaf: str) -> None:
    x = case[leaf].detach().requires_grad_()
    found = ours(entrance, "triton")(case | {leaf: x})
    total = found["loss"] if entrance == "loss" else found["logprob"].sum() + found["entropy"].sum() + found["kl"].sum()
    total.backward()


def host_seconds(place: Place, call: Callable[[], Any]) -> float:
    """The median of batches of calls, the device's queue emptied between them."""
    batches, size = (1, 1) if place.tiny else (10, 20)
    call()
    found = []
    for _ in range(batches):
        if place.device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(size):
            call()
        found.append((time.perf_counter() - started) / size)
    return sorted(found)[len(found) // 2]


def sweep(place: Place, knob: tune.Knob, passes: tuple[str, ...]) -> Iterator[Record]:
    settings = place.settings(knob.workloads[0], FEW_SECONDS, passes)
    found = tune.search(knob, settings, time.time() + 60)
    yield from ({"record": "row"} | record(place.run, "tune", workload, row) for workload, row, _ in found)
    ranking = tune.ranked(found)
    print(tune.listing(found, ranking), flush=True)
    yield {"record": "line", "text": tune.line(knob, ranking, knob.current())}


# A training step

BACKBONES: dict[str, dict[str, int]] = {  # as the models' own configurations have them
    "Qwen2.5-0.5B": {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
                     "intermediate_size": 4864, "vocab_size": 151_936},
    "Qwen2.5-3B": {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
                   "intermediate_size": 11_008, "vocab_size": 151_936},
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 48, "vocab_size": 97},
}  # fmt: skip


def train(place: Place, name: str) -> Iterator[Record]:
    """16 completions of 64 tokens to prompts of 64; the second step's times."""
    from safe_train import SafeConfig, SafeTrainer

    config = BACKBONES["tiny" if place.tiny else name]
    tokens = 4 if place.tiny else 64
    words = [f"w{i}" for i in range(config["vocab_size"])]
    rows = [{"prompt": " ".join(words[i + 2 :: len(words) // (tokens + 1)][:tokens])} for i in range(16)]
    with tempfile.TemporaryDirectory() as folder:
        args = SafeConfig(
            output_dir=folder, use_cpu=place.tiny, total_steps=2, prompts_per_step=16, max_prompt_tokens=tokens,
            max_new_tokens=tokens, cache_implementation="dynamic", save_every=1000, samples_every=1000,
        )  # fmt: skip
        trainer = SafeTrainer(
            random_model(config, place.device), number_of_words, args, rows, processing_class=word_tokenizer(words)
        )
        last = trainer.train()[-1]
    attention = trainer.policy.causal_lm.config._attn_implementation
    numbers = {
        key: value for key, value in last.items() if key.startswith(("time/", "memory/", "tokens_per", "sampler"))
    }
    yield {"record": "step", "model": name, "attention": attention, **numbers}


def random_model(config: dict[str, int], device: str) -> Any:
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    settings = Qwen2Config(**config, tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(settings, dtype=dtype)


def word_tokenizer(words: list[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token=words[0], eos_token=words[1])


def number_of_words(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


# Packages


def pip(place: Place, *arguments: str) -> Iterator[Record]:
    done([sys.executable, "-m", "pip", "install", "-q", "--no-input", "--target", str(place.site), *arguments])
    found = sorted(path.name.removesuffix(".dist-info") for path in place.site.glob("*.dist-info"))
    yield {"record": "installed", "packages": found}


def done(command: list[str]) -> list[Record]:
    """Runs it; raises with the end of what it printed."""
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run(command, cwd=ROOT, env=compiling, capture_output=True, text=True)
    print(finished.stdout[-2000:], finished.stderr[-2000:], flush=True)
    if finished.returncode:
        lines = (finished.stdout + finished.stderr).strip().splitlines() or [""]
        raise RuntimeError(f"exit code {finished.returncode}: {lines[-1]}")
    return []


def compile_for_hopper(knobs: list[tune.Knob]) -> Iterator[Record]:
    """Each choice as the kernels that take it compile for sm_90; one that spills is a fact, one that fails an error."""
    from safe_kernels import inspect

    for knob in knobs:
        for choice in knob.choices:
            for resources in inspected(inspect, knob, choice):
                yield {"record": "compiled", "choice": f"{knob} = {choice}", **resources}


def inspected(inspect: Any, knob: tune.Knob, choice: Any) -> list[Record]:
    with contextlib.ExitStack() as stack:
        if knob.name == "ROWS":
            cases = list(inspect.row_cases(choice))
        elif knob.name == "SCAN":
            stack.enter_context(mock.patch.object(inspect, "SCAN", choice))
            cases = list(inspect.scan_cases())[:1]
        elif knob.name in ("GEMMS", "PLAIN"):
            stack.enter_context(mock.patch.dict(getattr(inspect, knob.name), {knob.key: choice}))
            work = knob.key[1]
            cases = list(inspect.product_cases("sm_90") if work == "product" else inspect.fused_cases("sm_90"))
            wanted = {"statistics": ("none",), "with reference": ("shared", "own"), "product": (None,)}[work]
            cases = [case for case in cases if case.label["bits"] == 16 and case.label.get("reference") in wanted]
            cases = [case for case in cases if case.label.get("plain", False) == (knob.name == "PLAIN")]
        else:
            return []  # a size of memory or an order: no kernel's constant that could fail
        return [inspect.measured("sm_90", case, optional) for case in cases for optional in case.optional]
