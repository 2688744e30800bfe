"""Other projects, each imported when it is first called. One that knows no mask gets the live rows alone."""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
from typing import Any

import torch

from bench.measurement.workloads import WITH_KL
from bench.providers.provider import KERNELS, PER_TOKEN, STATS, Case, Compute, Provider, Results
from bench.providers.pytorch import with_policy_loss

HEAD = ("hidden", "weight", "tokens")


def on_live_rows(stats: Compute) -> Compute:
    """And puts the results back in their places."""

    @functools.wraps(stats)
    def run(case: Case) -> Results:
        mask = case["mask"]
        if mask is None:
            return stats(case)
        found = stats({name: x[mask] if name in PER_TOKEN and x is not None else x for name, x in case.items()})
        return {name: x.new_zeros(mask.shape).masked_scatter(mask, x) for name, x in found.items()}

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
    return {"logprob": logprob, "entropy": entropy, **(trl_kl(case) if "ref_hidden" in case else {})}


def trl_kl(case: Case) -> Results:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    reverse_kl = 1.0
    head = case["weight"]
    arguments = (case["hidden"], head, None, case["ref_hidden"], head, None, reverse_kl)
    return {"kl": ChunkedDivergenceFunction.apply(*arguments)[0]}


def trl_distill(case: Case) -> Results:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    if case["divergence"] == "tv":
        raise ValueError("TRL has no total variation")
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0}.get(case["divergence"], 0.5)
    heads = (case["hidden"], case["weight"], None, case["teacher_hidden"], case["teacher_weight"], None)
    divergence = ChunkedDivergenceFunction.apply(*heads, beta)[0]
    return {"loss": (case["weights"] * divergence).sum(), "divergence": divergence.detach()}


def liger_distill(case: Case) -> Results:
    from liger_kernel.transformers import LigerFusedLinearJSD

    if case["divergence"] != "jsd":
        raise ValueError("only jsd is the same function of both")
    loss = LigerFusedLinearJSD(jsd_beta=0.5)(
        case["hidden"], case["weight"], case["teacher_hidden"], case["teacher_weight"]
    )
    return {"loss": loss}  # the mean over the tokens, which are all weighed alike


def interpret_trl() -> None:
    """Make TRL take its Triton kernels for CPU tensors, too, which Triton's interpreter then runs."""
    if importlib.util.find_spec("trl"):
        for name in ("chunked_logprob", "chunked_divergence"):
            importlib.import_module(f"trl.kernels.{name}")._use_triton = lambda device: True  # type: ignore[attr-defined]


def cross_entropy(module: str, function: str, *operands: str, **options: Any) -> Compute:
    """Log-prob alone, by a function that returns the loss of each row."""

    @on_live_rows
    def run(case: Case) -> Results:
        found = getattr(importlib.import_module(module), function)
        return {"logprob": -found(*(case[name] for name in operands), reduction="none", **options)}

    return run


@on_live_rows
def liger(case: Case) -> Results:
    """On sm_90 its CuTe kernels, elsewhere its chunked PyTorch."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    arguments = (case["hidden"], case["weight"], case["tokens"], 1.0, -100, 1, True)
    nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(*arguments)
    return {"logprob": -nll, "entropy": entropy}


@on_live_rows
def verl_torch(case: Case) -> Results:
    module = without_package_init("verl.utils.experimental.torch_functional", "verl", "verl.utils")
    return dict(zip(STATS, module.FusedLinearForPPO()(case["hidden"], case["weight"], case["tokens"]), strict=True))


@on_live_rows
def verl_triton(case: Case) -> Results:
    module = without_package_init("verl.utils.kernel.linear_cross_entropy", "verl", "verl.utils")
    found = module.linear_cross_entropy(case["hidden"], case["weight"], case["tokens"], 1.0, "none", None)
    return dict(zip(STATS, found, strict=True))


@functools.cache
def without_package_init(module: str, *packages: str) -> types.ModuleType:
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
    options = torch.nn.LinearCrossEntropyOptions()
    return cross_entropy("torch.nn.functional", "linear_cross_entropy", *HEAD, options=options)(case)


def peer_providers() -> list[Provider]:
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
    quack = cross_entropy("quack.cross_entropy", "cross_entropy", "logits", "tokens")
    liger_nll = cross_entropy("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy", *HEAD)
    cce = functools.partial(cross_entropy, "cut_cross_entropy", "linear_cross_entropy", *HEAD)
    logprob: dict[str, Any] = {"entrance": "hidden", "outputs": ("logprob",)}
    cut: dict[str, Any] = logprob | {"package": "cut-cross-entropy"}
    on_gpus: dict[str, Any] = {"needs_gpu": KERNELS, "interpreted": True}
    return [
        Provider("trl", "logits", STATS, trl_logits, "trl", **on_gpus),
        Provider("quack", "logits", ("logprob",), quack, "quack-kernels", needs_gpu="CuTe kernels, which need a GPU"),
        *stats,
        *losses,
        Provider("trl", "distill", ("loss", "divergence"), trl_distill, "trl"),
        Provider("liger", "distill", ("loss",), liger_distill, "liger-kernel", **on_gpus),
        Provider("trl divergence", "hidden", ("kl",), on_live_rows(trl_kl), "trl"),
        Provider("liger cross-entropy", run=liger_nll, package="liger-kernel", **logprob, **on_gpus),
        Provider("cce", run=cce(), needs_gpu=autotuned, **cut),
        Provider("cce, no filter", run=cce(filter_eps=None), needs_gpu=autotuned, **cut),
        Provider("cce torch_compile", run=cce(impl="torch_compile"), slow=True, **cut),
        Provider("torch linear_cross_entropy", run=torch_chunked, slow=True, **logprob),
    ]
