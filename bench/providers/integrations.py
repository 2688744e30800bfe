"""What a patch of another trainer changes: each function that it replaces, as that trainer calls it, before and after.

    trl selective_log_softmax                    the trainer's own
    safe-kernels in trl selective_log_softmax    what stands there while the patch is active

Both are judged and timed like every provider, beside plain PyTorch. A new function needs an entry of TABLE, no more.
"""

from __future__ import annotations

import functools
import importlib
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

from bench.measurement.workloads import Workload, of
from bench.providers import providers
from bench.providers.provider import STATS, Case, Provider, Results


class Function(NamedTuple):
    package: str  # also the name of the module in safe_kernels.integrations
    module: str
    name: str
    entrance: str  # "hidden" or "logits": what it starts from
    outputs: tuple[str, ...]
    call: Callable[[Any, Case], Any]  # of the function, whoever wrote it: its outputs, in their order

    def provider(self, patched: bool) -> Provider:
        name = f"{'safe-kernels in ' if patched else ''}{self.package} {self.name}"

        def run(case: Case) -> Results:
            return dict(zip(self.outputs, self.call(_both(self)[patched], case), strict=True))

        return Provider(name, self.entrance, self.outputs, run, self.package)


@functools.cache
def _both(function: Function) -> tuple[Any, Any]:
    """(the trainer's own, ours)."""
    module, attribute = importlib.import_module(function.module), operator.attrgetter(function.name)
    own = attribute(module)
    with importlib.import_module(f"safe_kernels.integrations.{function.package}").apply() as patch:
        if f"{function.module}.{function.name}" not in patch.replaced:
            raise NotImplementedError(f"{function.package} is not patched: {', '.join(patch.replaced) or 'not at all'}")
        return own, attribute(module)


def integration_workloads(device: str, quick: bool) -> list[Workload]:
    if device == "cuda":
        return [of(e, "Qwen2.5-3B", 2048 if quick else 8192, dtype="bfloat16") for e in ("hidden", "logits")]
    return [of(e, "SmolLM2-135M", 64 if quick else 256) for e in ("hidden", "logits")]


def offered(workload: Workload) -> list[Provider]:
    """The baseline, then each function of this entrance, its own and ours."""
    pairs = [f.provider(patched) for f in TABLE if f.entrance == workload.entrance for patched in (False, True)]
    return providers(workload)[:1] + pairs


def trl_chunked(function: Any, case: Case) -> Any:
    """As `add_fused_lm_head` calls it for GRPO."""
    chunk = importlib.import_module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE
    head = (case["hidden"], case["weight"], None, case["tokens"])
    return function.apply(*head, 1.0, chunk, None, 1.0, ("log_probs", "entropy"))[:2]


def verl_fused(function: Any, case: Case) -> Any:
    """As its models call it; a method that uses nothing of its module but the size of a chunk."""
    own = importlib.import_module(_VERL_FUSED).FusedLinearForPPO()
    return function(own, case["hidden"], case["weight"], case["tokens"], 1.0)


def on(*operands: str, then: tuple[Any, ...] = (), in_sequences: bool = False) -> Callable[[Any, Case], Any]:
    """The function of these tensors, as [sequences, time, ...] where it loops over the first axis."""

    def call(function: Any, case: Case) -> Any:
        tensors = [case[name] for name in operands]
        if in_sequences:
            tensors = [x.unflatten(0, (4 if len(x) % 4 == 0 else 1, -1)) for x in tensors]
        found = function(*tensors, *then)
        return [x.flatten() for x in (found if isinstance(found, tuple) else (found,))]

    return call


_TRL, _VERL, _OPENRLHF = "trl.trainer.utils", "verl.utils.torch_functional", "openrlhf.models.utils"
_VERL_FUSED = "verl.utils.experimental.torch_functional"
LOGPROB, ENTROPY = ("logprob",), ("entropy",)
AT_TOKENS, AT_TOKENS_OF_TRL = on("logits", "tokens"), on("logits", "tokens", in_sequences=True)
TABLE = [
    Function("trl", _TRL, "_ChunkedLogProbFunction", "hidden", STATS, trl_chunked),
    Function("trl", _TRL, "selective_log_softmax_and_entropy", "logits", STATS, AT_TOKENS_OF_TRL),
    Function("trl", _TRL, "selective_log_softmax", "logits", LOGPROB, AT_TOKENS_OF_TRL),
    Function("trl", _TRL, "entropy_from_logits", "logits", ENTROPY, on("logits", in_sequences=True)),
    Function("verl", _VERL_FUSED, "FusedLinearForPPO.forward", "hidden", STATS, verl_fused),
    Function("verl", _VERL, "logprobs_from_logits", "logits", LOGPROB, on("logits", "tokens", then=(False,))),
    Function("verl", _VERL, "entropy_from_logits", "logits", ENTROPY, on("logits")),
    Function("openrlhf", _OPENRLHF, "log_probs_from_logits", "logits", LOGPROB, AT_TOKENS),
    Function("openrlhf", _OPENRLHF, "compute_entropy", "logits", ENTROPY, on("logits")),
]
