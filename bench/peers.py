"""Who is measured: every provider takes the same arguments, does the same work, and returns outputs by name.

A function here gets the arguments of the public function (`case`) and returns {output: tensor}. Peers are imported when
they are first called. One that knows no mask gets the live rows alone, and its results are put back in their places.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from workloads import Workload

import safe_kernels
from safe_kernels import reference

Case = dict[str, Any]
Results = dict[str, Tensor]
OPERATIONS = {
    "logits": "token_stats",
    "hidden": "linear_token_stats",
    "loss": "linear_policy_loss",
    "gae": "soft_min_gae",
}
PER_TOKEN = ("logits", "ref_logits", "hidden", "ref_hidden", "tokens", "mask", "old_logprob", "advantage",
             "loss_weight", "v1", "v2", "rewards")  # fmt: skip
STATS = ("logprob", "entropy")
WITH_KL = (*STATS, "kl")
POLICY = ("loss", *WITH_KL)
NO_KL = "no exact KL"
VALUES = ("value", "advantage", "returns")


@dataclass(frozen=True)
class Provider:
    name: str
    entrance: str
    outputs: tuple[str, ...]  # what it offers; a workload may ask for less
    run: Callable[[Case], Results]
    package: str | None = None  # distribution whose version goes into the rows; None: PyTorch, or this project
    needs_gpu: str = ""  # why it cannot run on a CPU, "" where it can
    interpreted: bool = False  # its kernels run on a CPU in Triton's interpreter, for correctness alone
    low_precision_only: bool = False  # the same as another provider for float32 inputs
    slow: bool = False  # compiles for most of a minute at each shape, or takes seconds a call: not in --quick

    def refusal(self, workload: Workload, device: str, interpreter: bool, quick: bool) -> str:
        """Why it has no place in a workload on this device; "" where it has."""
        if quick and self.slow:
            return "too slow for --quick"
        if workload.kl and "kl" not in self.outputs:
            return NO_KL
        if device == "cpu" and self.needs_gpu and not (self.interpreted and interpreter):
            return self.needs_gpu
        return ""

    def version(self) -> str:
        """Raises PackageNotFoundError where the peer is not installed."""
        return torch.__version__ if self.package is None else importlib.metadata.version(self.package)


def providers(workload: Workload) -> list[Provider]:
    """All that have an operation like this one; the first is the baseline of the ratios."""
    offered = [p for p in PROVIDERS if p.entrance == workload.entrance]
    if not workload.kl:
        offered = [p for p in offered if set(p.outputs) != {"kl"}]
    if not workload.field:
        offered = [p for p in offered if p.name.startswith(("pytorch", "safe-kernels"))]
    return [p for p in offered if not (p.low_precision_only and workload.dtype in ("float32", "float64"))]


def by_name(result: Any) -> Results:
    """The fields of a named tuple that are there."""
    return {name: x for name, x in result._asdict().items() if x is not None}


def ours(entrance: str, backend: str, **options: Any) -> Callable[[Case], Results]:
    return lambda case: by_name(getattr(safe_kernels, OPERATIONS[entrance])(**case, **options, backend=backend))


class Computed(torch.autograd.Function):
    """The leaf's memory, as what an operation returned: a trainer's logits are no leaf."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def over_the_logits(run: Callable[[Case], Results]) -> Callable[[Case], Results]:
    return lambda case: run(case | {"logits": Computed.apply(case["logits"])})


def plain(entrance: str) -> Callable[[Case], Results]:
    return lambda case: by_name(operation(entrance)(**case))


def operation(entrance: str) -> Callable[..., Any]:
    return gae_loop if entrance == "gae" else getattr(reference, OPERATIONS[entrance])


def compiled(entrance: str) -> Callable[[Case], Results]:
    def run(case: Case) -> Results:
        if entrance == "gae":
            return by_name(gae_loop(**case, step=_compiled(gae_step)))
        return by_name(_compiled(operation(entrance))(**case))

    return run


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def gae_step(next_value: Tensor, next_advantage: Tensor, value: Tensor, reward: Tensor, live: Tensor,
             gamma: float, lam: float) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One step back in time for all sequences: (value, advantage) of the next live token."""
    advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
    return torch.where(live, value, next_value), torch.where(live, advantage, next_advantage)


def gae_loop(v1: Tensor, v2: Tensor, rewards: Tensor, mask: Tensor | None, *, gamma: float = 1.0, lam: float = 0.95,
             alpha: float = 0.3, step: Callable[..., Any] = gae_step) -> safe_kernels.ValueTargets:  # fmt: skip
    """The loop over time that trainers have, all sequences [S] of a time step at once."""
    value = reference.soft_min(v1, v2, alpha)
    live = torch.ones_like(v1, dtype=torch.bool) if mask is None else mask
    next_value = next_advantage = torch.zeros_like(value[:, 0])
    advantage = torch.empty_like(value)
    for t in reversed(range(value.shape[1])):
        now = value[:, t], rewards[:, t].to(value.dtype), live[:, t]
        next_value, next_advantage = step(next_value, next_advantage, *now, gamma, lam)
        advantage[:, t] = next_advantage
    zeroed = (x.where(live, 0) for x in (value, advantage, advantage + value))
    return safe_kernels.ValueTargets(*zeroed)


def rounded_logits(case: Case) -> Results:
    """What most trainers do: the head in the dtype of the model, then float32."""
    logits = case["hidden"] @ case["weight"].T
    reference_logits = {}
    if "ref_hidden" in case:
        with torch.no_grad():
            reference_logits["ref_logits"] = case["ref_hidden"] @ case["weight"].T
    return by_name(reference.token_stats(logits, case["tokens"], mask=case["mask"], **reference_logits))


def on_live_rows(stats: Callable[[Case], Results]) -> Callable[[Case], Results]:
    @functools.wraps(stats)
    def run(case: Case) -> Results:
        mask = case["mask"]
        if mask is None:
            return stats(case)
        found = stats({name: x[mask] if name in PER_TOKEN and x is not None else x for name, x in case.items()})
        return {name: x.new_zeros(mask.shape).masked_scatter(mask, x) for name, x in found.items()}

    return run


def with_policy_loss(stats: Callable[[Case], Results]) -> Callable[[Case], Results]:
    """The loss of `linear_policy_loss` on the statistics of another provider, as its users write it."""

    def run(case: Case) -> Results:
        found = stats(case)
        ratio = (found["logprob"] - case["old_logprob"]).exp()
        clipped = ratio.clamp(0.8, 1.2) * case["advantage"]
        loss = -torch.minimum(ratio * case["advantage"], clipped) - case["entropy_coef"] * found["entropy"]
        if "kl" in found:
            penalty = (found["kl"] - case["kl_threshold"]).relu() ** 2
            loss = loss + case["kl_coef"] * found["kl"] + case["kl_penalty_coef"] * penalty
        total = (case["loss_weight"] * loss).sum()
        return {"loss": total, **{name: x.detach() for name, x in found.items()}}

    return run


def trl_logits(case: Case) -> Results:
    from trl.kernels import selective_log_softmax_and_entropy

    found = selective_log_softmax_and_entropy(case["logits"], case["tokens"], 1.0, case["mask"])
    return dict(zip(STATS, found, strict=True))


@on_live_rows
def trl_hidden(case: Case) -> Results:
    """Chunked log-prob and entropy; with a reference also the chunked divergence, each with its own sweep."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk

    hidden, weight = case["hidden"], case["weight"]
    arguments = (hidden, weight, None, case["tokens"], 1.0, chunk, None, 1.0, ("entropy",))
    logprob, entropy, *_ = ChunkedLogProbFunction.apply(*arguments)
    return {"logprob": logprob, "entropy": entropy, **(_trl_kl(case) if "ref_hidden" in case else {})}


@on_live_rows
def trl_divergence(case: Case) -> Results:
    return _trl_kl(case)


def _trl_kl(case: Case) -> Results:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    reverse_kl = 1.0
    head = case["weight"]
    arguments = (case["hidden"], head, None, case["ref_hidden"], head, None, reverse_kl)
    return {"kl": ChunkedDivergenceFunction.apply(*arguments)[0]}


def interpret_trl() -> None:
    """Make TRL take its Triton kernels for CPU tensors, too, which Triton's interpreter then runs."""
    if importlib.util.find_spec("trl"):
        for name in ("chunked_logprob", "chunked_divergence"):
            importlib.import_module(f"trl.kernels.{name}")._use_triton = lambda device: True  # type: ignore[attr-defined]


@on_live_rows
def quack(case: Case) -> Results:
    """CuTe kernels for Hopper and newer; log-prob alone."""
    from quack.cross_entropy import cross_entropy

    return {"logprob": -cross_entropy(case["logits"], case["tokens"], reduction="none")}


@on_live_rows
def liger(case: Case) -> Results:
    """On sm_90 its CuTe kernels, elsewhere its chunked PyTorch."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    arguments = (case["hidden"], case["weight"], case["tokens"], 1.0, -100, 1, True)
    nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(*arguments)
    return {"logprob": -nll, "entropy": entropy}


@on_live_rows
def liger_cross_entropy(case: Case) -> Results:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    nll = liger_fused_linear_cross_entropy(case["hidden"], case["weight"], case["tokens"], reduction="none")
    return {"logprob": -nll}


def cut_cross_entropy(**options: Any) -> Callable[[Case], Results]:
    @on_live_rows
    def run(case: Case) -> Results:
        from cut_cross_entropy import linear_cross_entropy

        nll = linear_cross_entropy(case["hidden"], case["weight"], case["tokens"], reduction="none", **options)
        return {"logprob": -nll}

    return run


@on_live_rows
def verl_torch(case: Case) -> Results:
    module = _without_package_init("verl.utils.experimental.torch_functional", "verl", "verl.utils")
    return dict(zip(STATS, module.FusedLinearForPPO()(case["hidden"], case["weight"], case["tokens"]), strict=True))


@on_live_rows
def verl_triton(case: Case) -> Results:
    module = _without_package_init("verl.utils.kernel.linear_cross_entropy", "verl", "verl.utils")
    found = module.linear_cross_entropy(case["hidden"], case["weight"], case["tokens"], 1.0, "none", None)
    return dict(zip(STATS, found, strict=True))


@functools.cache
def _without_package_init(module: str, *packages: str) -> types.ModuleType:
    """Import a module whose packages import what it does not need: verl's want ray and tensordict."""
    for name in packages:
        if name not in sys.modules:
            spec = importlib.util.find_spec(name)
            if spec is None or spec.submodule_search_locations is None:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            package = types.ModuleType(name)
            package.__path__ = list(spec.submodule_search_locations)
            sys.modules[name] = package
    return importlib.import_module(module)


@on_live_rows
def torch_chunked(case: Case) -> Results:
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    options = LinearCrossEntropyOptions()
    nll = linear_cross_entropy(case["hidden"], case["weight"], case["tokens"], reduction="none", options=options)
    return {"logprob": -nll}


KERNELS = "Triton kernels, which need a GPU"


def _of_this_project() -> list[Provider]:
    on_gpus: dict[str, Any] = {"needs_gpu": KERNELS, "interpreted": True}
    found = []
    for entrance, outputs in (("logits", WITH_KL), ("hidden", WITH_KL), ("loss", POLICY), ("gae", VALUES)):
        found += [
            Provider("pytorch", entrance, outputs, plain(entrance)),
            Provider("torch.compile", entrance, outputs, compiled(entrance), slow=True),
            Provider("safe-kernels torch", entrance, outputs, ours(entrance, "torch")),
            Provider("safe-kernels triton", entrance, outputs, ours(entrance, "triton"), **on_gpus),
        ]
    for backend, where in (("torch", {}), ("triton", on_gpus)):
        run = over_the_logits(ours("logits", backend, inplace_backward=True))
        found.append(Provider(f"safe-kernels {backend}, in place", "logits", WITH_KL, run, **where))
    fused = ours("hidden", "triton", batch_invariant=True)
    found.append(Provider("safe-kernels triton, batch-invariant", "hidden", WITH_KL, fused, **on_gpus))
    low = {"hidden": rounded_logits, "loss": with_policy_loss(rounded_logits)}
    for entrance, low_run in low.items():
        outputs = WITH_KL if entrance == "hidden" else POLICY
        found.append(Provider("pytorch, low-precision logits", entrance, outputs, low_run, low_precision_only=True))
    return found


def _peers() -> list[Provider]:
    only_cuda = "asserts CUDA tensors"
    autotuned = "Triton kernels tuned on a GPU at their first call"
    stats = [
        Provider("trl", "hidden", WITH_KL, trl_hidden, "trl"),
        Provider("liger", "hidden", STATS, liger, "liger-kernel"),
        Provider("verl torch", "hidden", STATS, verl_torch, "verl"),
        Provider("verl triton", "hidden", STATS, verl_triton, "verl", needs_gpu=only_cuda),
    ]
    losses = [
        Provider(p.name, "loss", ("loss", *p.outputs), with_policy_loss(p.run), p.package, p.needs_gpu) for p in stats
    ]
    cut = "cut-cross-entropy"
    return [
        Provider("trl", "logits", STATS, trl_logits, "trl", needs_gpu=KERNELS, interpreted=True),
        Provider("quack", "logits", ("logprob",), quack, "quack-kernels", needs_gpu="CuTe kernels, which need a GPU"),
        *stats,
        *losses,
        Provider("trl divergence", "hidden", ("kl",), trl_divergence, "trl"),
        Provider(
            *("liger cross-entropy", "hidden", ("logprob",), liger_cross_entropy, "liger-kernel"),
            needs_gpu=KERNELS,
            interpreted=True,
        ),
        Provider("cce", "hidden", ("logprob",), cut_cross_entropy(), cut, needs_gpu=autotuned),
        Provider("cce, no filter", "hidden", ("logprob",), cut_cross_entropy(filter_eps=None), cut, autotuned),
        Provider("cce torch_compile", "hidden", ("logprob",), cut_cross_entropy(impl="torch_compile"), cut, slow=True),
        Provider("torch linear_cross_entropy", "hidden", ("logprob",), torch_chunked, slow=True),
    ]


PROVIDERS = [*_of_this_project(), *_peers()]
