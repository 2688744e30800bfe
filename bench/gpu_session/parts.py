"""The parts of bench/gpu.py: each is a list of items, with the seconds that an item should take on an H100.

A prediction is the work that cost.py counts, at the rates below; COMPILE for each variant of a kernel that is new to
Triton's cache; and the time set aside for repeats. A part is predicted to take half of its limit at most, with START.
Items that are `extra` come last and use the other half: peers that are installed, torch.compile, and the 3B step.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch

from bench.gpu_session import correctness as checks
from bench.gpu_session import packages, speed
from bench.gpu_session.page import VERSIONS, Record
from bench.gpu_session.place import SECONDS, Place
from bench.gpu_session.session import SHARES
from bench.measurement.cost import Roofs, cost, itemsize, products
from bench.measurement.machine import ROOT, versions
from bench.measurement.workloads import BACKWARD, FORWARD, FROZEN, TRAINED, Workload, gae, of
from bench.providers import providers
from bench.providers.provider import Case, Provider
from bench.suites.launch_choices import Knob, knobs
from safe_kernels.triton_backend import launch

H100 = Roofs(600e12, 3.0e12)  # three quarters of the 798e12 that a large bfloat16 product reached; a copy, both ways
WIDE_FLOPS = 30e12  # float64 and float32 products; the datasheet has 67e12 for both
PLAIN_PASSES = 40  # times that plain PyTorch reads or writes a tensor of N x V, forward and backward
COMPILE = 0.4  # the mean of 29 kernels with Triton 3.6 for sm_90, on two cores: 11.3 s in all
START, START_TRAINER = 5.0, 12.0  # to import torch, or transformers and peft as well, and to open the device
SMALL = 2048  # tokens that a check of an option takes
ODD = 50_257  # a vocabulary that no block and no 16 bytes divide


class Item(NamedTuple):
    name: str
    seconds: float  # predicted on an H100
    run: Callable[[], Iterable[Record]]
    extra: bool = False


# Parts: lists of items, most important first.


def smoke(place: Place) -> list[Item]:
    """Each kernel once, small, against float64."""
    toy = Workload("hidden", "toy", 64, 128, 1000, kl=True, dtype="bfloat16")
    return [
        Item(VERSIONS, 0.1, lambda: checks.check_versions(place)),
        check(place, "statistics and gradient of logits", replace(toy, entrance="logits")),
        check(place, "tiles of hidden states", toy),
        check(place, "fused products", toy, batch_invariant=True),
        check(place, "closed form of the policy loss", replace(toy, entrance="loss")),
        check(place, "soft-min GAE", gae(4, 300), kernels=1),
        Item("one-step terms", 2 * COMPILE, lambda: checks.check_terms(place)),
    ]


def correctness(place: Place) -> list[Item]:
    """What only a GPU can run: sizes, dtypes and options, each over all rows; then tests of the suite."""
    qwen = functools.partial(of, model="Qwen2.5-3B", dtype="bfloat16")
    odd = functools.partial(Workload, model="odd", N=SMALL, H=2048, V=ODD)
    cap = {"softcap": 30.0}
    return [
        check(place, "logits past 2^31, with KL", qwen("logits", tokens=16_384, kl=True)),
        check(place, "hidden states, with KL", qwen("hidden", tokens=16_384, kl=True)),
        check(place, "closed form, with KL", qwen("loss", tokens=16_384, kl=True)),
        check(place, "hidden states, softcap, masks, odd V", odd("hidden", kl=True, masked=0.4, dtype="bfloat16"), cap),
        check(place, "logits in place, float16, odd V", odd("logits", kl=True, dtype="float16"), inplace_backward=True),
        check(place, "fused products, bfloat16", qwen("hidden", tokens=SMALL, kl=True), batch_invariant=True),
        check(place, "logits, float32, odd V", odd("logits", kl=True)),
        check(place, "hidden states, float32, softcap, odd V", odd("hidden", kl=True), cap),
        check(place, "hidden states, float16", qwen("hidden", tokens=SMALL, kl=True, dtype="float16")),
        check(place, "fused products, float32", odd("hidden"), batch_invariant=True),
        check(place, "closed form, float32", odd("loss", kl=True)),
        check(place, "soft-min GAE, 64 x 1024", gae(64, 1024)),
        Item("tests", 25.0, lambda: checks.suite_tests(place)),
    ]


def rows(place: Place) -> list[Item]:
    """The field at N = 8192, H = 2048, V = 151,936, most important row first."""
    qwen = functools.partial(of, model="Qwen2.5-3B", tokens=8192, dtype="bfloat16")
    timed = [
        (qwen("hidden", kl=True), (FROZEN, FORWARD)),
        (qwen("logits"), (BACKWARD, FORWARD)),
        (qwen("hidden"), (FROZEN, FORWARD)),
        (qwen("logits", kl=True), (BACKWARD, FORWARD)),
        (qwen("loss", kl=True), (FROZEN,)),
    ]
    fields = [each for each in timed if installed_peers(each[0])]
    compiled = timed[1:3]
    if place.tiny:
        timed, fields, compiled = timed[:2], fields[:1], compiled[:1]
    return (
        [row_item(place, *each, "ours and PyTorch", is_plain) for each in timed]
        + [row_item(place, *each, "peers", is_peer, extra=True) for each in fields]
        + [row_item(place, *each, "torch.compile", is_compiled, 30, extra=True) for each in compiled]
    )


def roof(place: Place) -> list[Item]:
    """Each kernel beside a plain copy and a plain product of the same shapes, in the same minute."""
    case = place.shrink(of("hidden", "Qwen2.5-3B", 8192, kl=True, dtype="bfloat16"))
    seconds = COMPILE + 2 * SECONDS
    rates = [Item(name, seconds, functools.partial(speed.kernel_rate, place, case, name)) for name in speed.RATES]
    return [*rates, Item("least times", 10.0, lambda: speed.least_times(place), extra=True)]


def launches(place: Place) -> list[Item]:
    """What a call costs the host, and a few launch choices beside the shipped ones."""
    found = [Item("host time", 5.0, lambda: speed.host_times(place))]
    for knob, passes in few_choices(place):
        tried = 1 + len(knob.choices)
        each = 2 * COMPILE + 0.3 + len(passes) * 3 * speed.FEW_SECONDS
        seconds = tried * len(knob.workloads) * each
        found.append(Item(str(knob), seconds, functools.partial(speed.sweep, place, knob, passes)))
    return found


def step(place: Place) -> list[Item]:
    """One SAFE step of the trainer on random models, after one that warms up."""
    small = Item("Qwen2.5-0.5B, LoRA", 16.0, lambda: speed.train(place, "Qwen2.5-0.5B"))
    large = Item("Qwen2.5-3B, LoRA", 25.0, lambda: speed.train(place, "Qwen2.5-3B"), extra=True)
    return [small] if place.tiny else [small, large]


def install(place: Place) -> list[Item]:
    """Wheels that travel with the checkout, for this run alone."""
    wheels = map(str, place.wheels.glob("*.whl"))
    return [Item("wheels", 20.0, lambda: packages.pip(place, "--no-index", "--no-deps", *wheels))]


BESIDE = ("triton==3.6.0", "transformers==5.17.0", "huggingface_hub==1.33.0", "numpy<2.4")  # as on a GPU machine


def beside(place: Place) -> list[Item]:
    """What a GPU machine has, before the project's own; PyTorch stays."""
    return [Item(" ".join(BESIDE), 600.0, lambda: packages.pip(place, *BESIDE))]


TRAINER_TESTS = ("trainer", "models", "rollout", "attention", "checkpoint", "gpu_host")


def versions_beside(place: Place) -> list[Item]:
    """The compiler and transformers of a GPU machine: every shipped choice, every candidate, the trainer's tests."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in TRAINER_TESTS]
    commands = {
        "import both packages": [sys.executable, "-c", "import safe_kernels, safe_train.trainer"],
        "compile every shipped choice": [*pytest, str(ROOT / "tests" / "test_triton_compile.py")],
        "compile every candidate for sm_90": [sys.executable, "-m", "bench.gpu_session.process", "candidates"],
        "the trainer's tests": [*pytest, *files],
    }
    return [Item(name, 600.0, functools.partial(packages.done, command)) for name, command in commands.items()]


def candidates() -> None:
    """What part `launches` and bench/tune.py try on Hopper, compiled without it."""
    tried = [knob for knob, _ in few_choices(Place())]
    with mock.patch.object(launch, "architecture", lambda device: "sm_90"):
        tried += knobs(torch.device("cpu"))
    for found in packages.compile_for_hopper(tried):
        print(json.dumps(found), flush=True)


PARTS: dict[str, Callable[[Place], list[Item]]] = {
    **{"smoke": smoke, "correctness": correctness, "rows": rows, "roof": roof, "launches": launches, "step": step},
    **{"install": install, "beside": beside, "versions": versions_beside},
}


ROWS = ((1024, 8), (2048, 4))  # columns and warps of a row kernel
TILES = {  # rows, columns, inner, warps and stages of the fused kernel
    "statistics": ((128, 128, 64, 8, 4), (256, 128, 64, 8, 3)),
    "with reference": ((128, 64, 64, 8, 4), (64, 128, 64, 4, 4)),
}
TINY_TILES = {"statistics": ((16, 16, 16, 1, 1),)}


def few_choices(place: Place) -> list[tuple[Knob, tuple[str, ...]]]:
    """Of bench/tune.py's search what is likeliest to win, with the passes that it is timed on."""
    qwen = functools.partial(of, model="Qwen2.5-3B", tokens=8192, dtype="bfloat16")
    logits, hidden = (
        [place.shrink(qwen(entrance, kl=kl)) for kl in (False, True)] for entrance in ("logits", "hidden")
    )
    rows = [launch.RowChoice(1, columns, warps) for columns, warps in (ROWS[:1] if place.tiny else ROWS)]
    logits = logits[1:] if place.tiny else logits
    found: list[tuple[Knob, tuple[str, ...]]] = [(Knob("ROWS", None, tuple(rows), tuple(logits)), (FORWARD, BACKWARD))]
    for (kind, tiles), workload in zip((TINY_TILES if place.tiny else TILES).items(), hidden, strict=False):
        key, names = (place.target, kind, 16), ("rows", "columns", "inner", "num_warps", "num_stages")
        table = "PLAIN" if key in launch.PLAIN else "GEMMS"
        tried = [replace(getattr(launch, table)[key], **dict(zip(names, tile, strict=True))) for tile in tiles]
        knob = Knob(table, key, tuple(tried), (workload,), (("batch_invariant", True),))
        found.append((knob, (FORWARD,)))
    return found


def check(
    place: Place, name: str, workload: Workload, options: Case | None = None, kernels: int = 4, **own: Any
) -> Item:
    """`options` are what everybody computes, `own` how this project is called; so many variants of kernels are new."""
    small = place.shrink(workload)
    seconds = kernels * COMPILE + exact_seconds(workload)
    return Item(name, seconds, lambda: checks.judged(place, name, small, options or {}, own))


def exact_seconds(workload: Workload) -> float:
    """Of plain PyTorch over all rows, in float64 and again in the workload's dtype."""
    elements = workload.N * (workload.V or 1) * (2 if workload.kl else 1)
    flops = products(workload, TRAINED) * 2.0 * workload.N * workload.H * workload.V
    passes = 0.0 if workload.entrance == "logits" else flops * (1 / WIDE_FLOPS + 2 / H100.flops)
    loop = 2 * 12 * 1e-5 * workload.T  # of plain PyTorch over time: launches of 10 us
    return passes + loop + PLAIN_PASSES * elements * (8 + itemsize(workload)) / H100.bytes


def is_plain(provider: Provider) -> bool:
    """Of this project what is the default on a GPU."""
    return provider.package is None and not provider.slow and not provider.name.startswith("safe-kernels torch")


def is_peer(provider: Provider) -> bool:
    return provider.name in COMPARED or is_installed_peer(provider)


def is_compiled(provider: Provider) -> bool:
    return provider.name in (*COMPARED, "torch.compile")


COMPARED = ("pytorch", "safe-kernels triton")  # go along wherever others are timed


def is_installed_peer(provider: Provider) -> bool:
    return provider.package is not None and not provider.slow and provider.package in versions()


def installed_peers(workload: Workload) -> list[Provider]:
    return [p for p in providers(workload) if is_installed_peer(p) and not p.refusal(workload, "cuda", False, False)]


def row_item(
    place: Place, workload: Workload, passes: tuple[str, ...], kind: str, wanted: Callable[[Provider], bool],
    compiling: float = 0.0, extra: bool = False,
) -> Item:  # fmt: skip
    offered = [p for p in providers(workload) if wanted(p) and not (place.tiny and p.slow)]
    seconds = 2.0 + compiling + sum(provider_seconds(workload, passes) for _ in offered)
    small = place.shrink(workload)
    name = f"{workload.entrance}{' with KL' * workload.kl}: {kind}"
    return Item(name, seconds, lambda: speed.timed(place, small, passes, offered), extra)


def provider_seconds(workload: Workload, passes: tuple[str, ...]) -> float:
    """The gate, and for each pass two warm-ups, repeats and the run that counts memory, at four times the floor."""
    slowest = 4 * max(cost(workload, part).seconds(H100) for part in workload.passes)
    return 2 * COMPILE + 2 * slowest + len(passes) * (SECONDS + 3 * slowest)


def plan() -> str:
    lines = []
    for name, seconds in SHARES.items():
        items = PARTS[name](Place())
        lines.append(
            f"{name}: limit {seconds} s, predicted {part_seconds(name):.0f}, with extras {part_seconds(name, True):.0f}"
        )
        lines += [f"  {item.seconds:6.1f}  {item.name}{' (extra)' * item.extra}" for item in items]
    return "\n".join(lines)


def part_seconds(name: str, extras: bool = False) -> float:
    start = START_TRAINER if name == "step" else START
    return start + sum(item.seconds for item in PARTS[name](Place()) if extras or not item.extra)
