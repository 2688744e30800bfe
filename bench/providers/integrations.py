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
    call: Callable[[Any, Case], Results]  # of the function, whoever wrote it

    def provider(self, patched: bool) -> Provider:
        name = f"{'safe-kernels in ' if patched else ''}{self.package} {self.name}"

        def run(case: Case) -> Results:
            return self.call(_both(self)[patched], case)

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


def trl_chunked(function: Any, case: Case) -> Results:
    """As `add_fused_lm_head` calls it for GRPO."""
    chunk = importlib.import_module("trl.trainer.utils")._CHUNKED_LOGPROB_CHUNK_SIZE
    head = (case["hidden"], case["weight"], None, case["tokens"])
    logprob, entropy, *_ = function.apply(*head, 1.0, chunk, None, 1.0, ("log_probs", "entropy"))
    return {"logprob": logprob, "entropy": entropy}


def trl_both(function: Any, case: Case) -> Results:
    return dict(zip(STATS, _in_sequences(function, case["logits"], case["tokens"]), strict=True))


def trl_logprob(function: Any, case: Case) -> Results:
    return {"logprob": _in_sequences(function, case["logits"], case["tokens"])[0]}


def trl_entropy(function: Any, case: Case) -> Results:
    return {"entropy": _in_sequences(function, case["logits"])[0]}


def verl_fused(function: Any, case: Case) -> Results:
    """As its models call it; a method that uses nothing of its module but the size of a chunk."""
    own = importlib.import_module(_VERL_FUSED).FusedLinearForPPO()
    return dict(zip(STATS, function(own, case["hidden"], case["weight"], case["tokens"], 1.0), strict=True))


def logprob_at(function: Any, case: Case) -> Results:
    return {"logprob": function(case["logits"], case["tokens"])}


def verl_logprob(function: Any, case: Case) -> Results:
    return {"logprob": function(case["logits"], case["tokens"], False)}


def entropy_of(function: Any, case: Case) -> Results:
    return {"entropy": function(case["logits"])}


def _in_sequences(function: Any, *tensors: Any) -> list[Any]:
    """Of [sequences, time, ...], over whose first axis TRL loops."""
    sequences = 4 if len(tensors[0]) % 4 == 0 else 1
    found = function(*(x.unflatten(0, (sequences, -1)) for x in tensors))
    return [x.flatten() for x in (found if isinstance(found, tuple) else (found,))]


_TRL, _VERL, _OPENRLHF = "trl.trainer.utils", "verl.utils.torch_functional", "openrlhf.models.utils"
_VERL_FUSED = "verl.utils.experimental.torch_functional"
TABLE = [
    Function("trl", _TRL, "_ChunkedLogProbFunction", "hidden", STATS, trl_chunked),
    Function("trl", _TRL, "selective_log_softmax_and_entropy", "logits", STATS, trl_both),
    Function("trl", _TRL, "selective_log_softmax", "logits", ("logprob",), trl_logprob),
    Function("trl", _TRL, "entropy_from_logits", "logits", ("entropy",), trl_entropy),
    Function("verl", _VERL_FUSED, "FusedLinearForPPO.forward", "hidden", STATS, verl_fused),
    Function("verl", _VERL, "logprobs_from_logits", "logits", ("logprob",), verl_logprob),
    Function("verl", _VERL, "entropy_from_logits", "logits", ("entropy",), entropy_of),
    Function("openrlhf", _OPENRLHF, "log_probs_from_logits", "logits", ("logprob",), logprob_at),
    Function("openrlhf", _OPENRLHF, "compute_entropy", "logits", ("entropy",), entropy_of),
]
