"""How fast: rows of the field, rates of kernels beside a copy and a product, host time, launches, a training step."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.gpu_session.page import Record
from bench.gpu_session.place import SECONDS, Place
from bench.measurement import timing
from bench.measurement.backbones import BACKBONES, random_model
from bench.measurement.cost import itemsize
from bench.measurement.machine import ROOT
from bench.measurement.rows import record
from bench.measurement.workloads import Workload, make_case
from bench.providers.provider import OPERATIONS, Case, Provider
from bench.suites import host, launch_choices
from bench.suites.kernels import measured
from safe_kernels import linear_token_stats, token_stats
from safe_kernels.machine_code import GPUS

FEW_SECONDS = 0.1  # of a candidate in a sweep


def timed(place: Place, workload: Workload, passes: tuple[str, ...], offered: list[Provider]) -> Iterator[Record]:
    settings = place.settings(workload, passes=passes)
    found = measured(workload, settings, offer=lambda _: offered)
    yield from ({"record": "row"} | record(place.run, "gpu", workload, row) for row in found)


def kernel_calls(place: Place, workload: Workload) -> dict[str, tuple[Callable[[], Any], float, float]]:
    """By kernel: one call of it, the FLOPs and the bytes that it has to move."""
    dtype, device = getattr(torch, workload.dtype), place.device
    N, H, V, size = workload.N, workload.H, workload.V, itemsize(workload)
    draw = torch.Generator(device).manual_seed(0)
    hidden, ref_hidden = torch.randn(2, N, H, generator=draw, device=device).to(dtype)
    weight = (torch.randn(V, H, generator=draw, device=device) * (2 / H**0.5)).to(dtype)
    logits, ref_logits = hidden @ weight.T, ref_hidden @ weight.T
    out = torch.empty_like(logits)
    common = {"tokens": torch.randint(V, (N,), generator=draw, device=device), "backend": "triton"}
    alone = {"logits": logits} | common
    fused = {"hidden": hidden, "weight": weight, "batch_invariant": True} | common
    both, fused_both = alone | {"ref_logits": ref_logits}, fused | {"ref_hidden": ref_hidden}
    NV, U = float(N) * V, 2.0 * N * H * V
    return {
        "plain copy of the logits": (lambda: out.copy_(logits), 0, 2 * size * NV),
        "plain product of the head": (lambda: torch.mm(hidden, weight.T, out=out), U, size * NV),
        "statistics": (lambda: token_stats(**alone), 0, size * NV),
        "statistics with a reference": (lambda: token_stats(**both), 0, 2 * size * NV),
        "gradient": (gradient(alone), 0, 2 * size * NV),
        "gradient with KL": (gradient(both), 0, 3 * size * NV),
        "fused statistics": (lambda: linear_token_stats(**fused), U, 0),
        "fused statistics with a reference": (lambda: linear_token_stats(**fused_both), 2 * U, 0),
    }


def gradient(case: Case) -> Callable[[], Any]:
    """A backward alone, of all statistics that `case` has."""
    logits = case["logits"].detach().requires_grad_()
    found = token_stats(**case | {"logits": logits})
    results = [x for x in (found.logprob, found.entropy, found.kl) if x is not None]
    incoming = [torch.ones_like(x) for x in results]
    return lambda: torch.autograd.grad(results, logits, incoming, retain_graph=True)


RATES = (
    *("plain copy of the logits", "statistics", "statistics with a reference", "gradient", "gradient with KL"),
    *("plain product of the head", "fused statistics", "fused statistics with a reference"),
)
_calls = functools.cache(kernel_calls)


def kernel_rate(place: Place, workload: Workload, name: str) -> Iterator[Record]:
    call, flops, moved = _calls(place, workload)[name]
    taken = timing.timed({name: [call]}, place.device, 0.0 if place.tiny else SECONDS)[name]
    if isinstance(taken, Exception):
        raise taken
    yield {"record": "kernel", "name": name, "workload": str(workload), "seconds": taken.median, "flops": flops,
           "bytes": moved, "repeats": taken.repeats}  # fmt: skip


def least_times(place: Place) -> Iterator[Record]:
    """By row kernel: the least time that its machine code allows on this GPU, at the shape of `kernel_rate`."""
    command = [sys.executable, "-m", "safe_kernels.inspect", "--counts", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    one = ["--only", "^gradient$"] if place.tiny else []
    done = subprocess.run([*command, *one], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    gpu = next((name for name in GPUS if name in ("H200" if place.tiny else torch.cuda.get_device_name())), None)
    for row in json.loads(done.stdout) if gpu is not None else []:
        least = {name.removesuffix("_ms"): 1e-3 * ms for name, ms in row[gpu].items()}
        yield {"record": "least", "name": row["counted"], "instructions": row["instructions"], "seconds": least}


def host_times(place: Place) -> Iterator[Record]:
    """Seconds of the host for a call, its launches included, on inputs so small that it never waits for the device."""
    count, repeats = (1, 1) if place.tiny else (host.QUICK_CALLS, host.REPEATS)
    for workload in host.host_workloads(place.device, quick=True):
        case = make_case(place.shrink(workload), place.device)
        name = f"{OPERATIONS[workload.entrance]}{' with KL' * workload.kl}"
        calls = {f"{name}, {part}": call for part, call in host.calls(workload, case).items()}
        if workload.entrance == "logits":
            calls["torch.log_softmax, forward"] = functools.partial(torch.log_softmax, case["logits"], -1)
        for call, taken in host.best(calls, count, repeats).items():
            yield {"record": "host", "call": call, "seconds": taken.median}


def sweep(place: Place, knob: launch_choices.Knob, passes: tuple[str, ...]) -> Iterator[Record]:
    settings = place.settings(knob.workloads[0], FEW_SECONDS, passes)
    found = launch_choices.search(knob, settings, time.time() + 60)
    yield from ({"record": "row"} | record(place.run, "tune", workload, row) for workload, row, _ in found)
    ranking = launch_choices.ranked(found)
    print(launch_choices.listing(found, ranking), flush=True)
    yield {"record": "line", "text": launch_choices.line(knob, ranking, knob.current())}


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
        dtype = torch.float32 if place.tiny else torch.bfloat16
        model = random_model(config, dtype, place.device, eos_token_id=1, pad_token_id=0)
        trainer = SafeTrainer(model, number_of_words, args, rows, processing_class=word_tokenizer(words))
        last = trainer.train()[-1]
    attention = trainer.policy.causal_lm.config._attn_implementation
    shown = ("time/", "memory/", "tokens_per", "sampler")
    numbers = {key: value for key, value in last.items() if key.startswith(shown)}
    yield {"record": "step", "model": name, "attention": attention, **numbers}


def word_tokenizer(words: list[str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token=words[0], eos_token=words[1])


def number_of_words(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]
