"""TRL on these kernels: its GRPO, RLOO, DPO, KTO, SFT and distillation trainers, and its functions on logits.

    from safe_kernels.integrations import trl as trl_patch
    trl_patch.apply()

or, for TRL's own scripts, `python -m safe_kernels.integrations.trl grpo --model_name_or_path ...` instead of
`trl grpo ...`, and `accelerate launch -m safe_kernels.integrations.trl grpo ...` on several GPUs.

Shapes: N tokens, V vocabulary, H hidden width, K tokens that are asked for in one row.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
import runpy
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks, linear
from ..inputs import Head, LinearInputs, RowStats, StatsGrad, compute_dtype
from ..logits import flat_inputs, token_stats, token_stats_backward_op, token_stats_op
from . import trl_distillation, trl_exact_kl
from .patch import Patch, Replacement
from .trl_calls import UTILS, autocast_dtype, fast_backend, gathered

METRICS = ("log_sum_sq_probs", "mean_logits", "is_top1")  # one number a token, without gradient
TIE = 4  # ulps: two log-probs so close are equal
MEAN_COLUMNS, MEAN_ROWS = 8192, 4096  # of the weight and of tokens at a time, where a mean over V is taken


def apply(kl: str | None = None) -> Patch:
    """Replace what this version of TRL has of these functions, in this process; see `Patch` for what it refuses.

    Call it before or after `import trl` and the packages of DOWNSTREAM, and before your own code imports these names.
    The result is a context manager; its `replaced` lists the functions, its `status()` every name that leads to ours.

    Args:
        kl: None leaves the KL as TRL estimates it. "exact" changes the loss: GRPO and RLOO get the exact KL, see
            `trl_exact_kl`.
    """
    if kl not in (None, "exact"):
        raise ValueError(f"kl must be None, for TRL's own estimate, or 'exact'; not {kl!r}")
    if kl == "exact" and PATCH.replaced:
        raise RuntimeError("apply() was called before apply(kl='exact'): call revert() in between, or the second alone")
    return EXACT_KL.apply() if kl == "exact" or EXACT_KL.replaced else PATCH.apply()


def revert() -> None:
    """TRL as it was."""
    EXACT_KL.revert()
    PATCH.revert()


class LinearLogprob(torch.autograd.Function):
    """Replaces TRL's chunked log-prob: `linear_token_stats` and the quantities of TRL's metrics. Equivalent to

        z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature       (softcap None: none)
        logprob = log_softmax(z)[targets];  entropy = -(p * log p).sum(-1), with p = softmax(z)
        log_sum_sq_probs = log((p**2).sum(-1));  mean_logits = z.mean(-1);  is_top1 = z[targets] == z.max(-1)

    with float32 logits, of which only one tile is ever in memory. With a reference, whose z_ref has the same settings,
    also kl = (p * (log p - log softmax(z_ref))).sum(-1). Under autocast hidden and weight are rounded to its dtype
    first, and their gradients are still summed in float32. ZeRO-3 takes the weights away between forward and backward:
    the backward gathers them again.

    Args:
        hidden, weight, bias: [N, H], [V, H] and [V] or None.
        targets: [N]. An id outside 0..V-1 has a NaN log-prob; TRL removes or replaces -100 first.
        outputs: the results to return besides the log-prob; the others are None.
        chunk_size: unused.
        ref_hidden, ref_weight, ref_bias: the reference's, with no gradient; no ref_weight shares weight and bias.

    Returns:
        (logprob, entropy, log_sum_sq_probs, mean_logits, is_top1), each [N], and with a reference kl [N]; the first two
        and kl are differentiable. If several tokens tie for the most likely, each of them is_top1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", *METRICS),
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        head = (hidden, weight, targets, bias, ref_hidden, ref_weight, ref_bias)
        device = hidden.device.type
        ctx.rounded = autocast_dtype(hidden)
        ctx.backend = fast_backend(hidden, weight)
        with gathered(ref_weight, ref_bias):
            checked = checks.require_head(
                Head(*head)._replace(temperature=temperature, softcap=final_logit_softcapping, logit_scale=logit_scale)
            )
            ctx.options = {name: getattr(checked, name) for name in ("temperature", "softcap", "logit_scale")}
            inputs = _linear_inputs(head, ctx.options, ctx.rounded)
            logprob, entropy, _, kl, *_, stats, _ = linear.linear_token_stats_op(*inputs, 0, None, None, ctx.backend)
        ctx.save_for_backward(*head, stats)
        with torch.autocast(device, enabled=False):
            metrics = [
                _log_sum_sq_probs(inputs, stats, ctx.backend) if "log_sum_sq_probs" in outputs else None,
                _mean_logits(inputs) if "mean_logits" in outputs else None,
                _is_top1(logprob, stats) if "is_top1" in outputs else None,
            ]
        ctx.mark_non_differentiable(*(x for x in metrics if x is not None))
        return logprob, entropy if "entropy" in outputs else None, *metrics, *([] if ref_hidden is None else [kl])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *head, stats = ctx.saved_tensors
        hidden, weight, _, bias, _, ref_weight, ref_bias = head
        given, needed = StatsGrad(grads[0], grads[1], *(grads[5:] or [None])), ctx.needs_input_grad[:3]
        dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        found: list[Tensor | None] = [None, None, None]
        if any(needed) and any(x is not None for x in given):
            with gathered(weight, bias, ref_weight, ref_bias):
                inputs = _linear_inputs(head, ctx.options, ctx.rounded)
                found = linear.linear_gradients(inputs, stats, given, needed, None, ctx.backend, dtypes)
        return *found, *[None] * 9


class TwoOutputs:
    """`LinearLogprob` as TRL called it before 1.15, with (logprob, entropy) as the result; at first without a bias."""

    def __init__(self, has_bias: bool):
        self.missing = () if has_bias else (None,)

    def apply(self, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        head = (*self.missing, *rest)  # bias, targets, temperature, chunk_size, and perhaps softcap and scale
        options = (None, 1.0)[len(head) - 4 :]
        logprob, entropy, *_ = LinearLogprob.apply(hidden, weight, *head, *options, ("entropy",))
        return logprob, entropy


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-probs of the tokens `index`, (...) or (..., K). Equivalent to

        (logits / temperature).log_softmax(-1).gather(-1, index).masked_fill(row_mask == 0, 0)

    in float32 (float64 for float64 logits), which TRL's own returns on GPUs; on CPUs it returns the logits' dtype.
    """
    if index.dim() < logits.dim():
        return token_stats(logits, index, temperature=temperature, mask=_live(row_mask)).logprob
    if index.shape[-1] == 0:
        return logits.gather(-1, index.long()).to(compute_dtype(logits))
    logprob = SelectedLogprobs.apply(logits, index.long(), temperature, _live(row_mask))
    return logprob if row_mask is None else logprob.masked_fill(row_mask == 0, 0)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """-(p * log p).sum(-1) with p = softmax(logits), float32 (float64 for float64 logits). `chunk_size` is unused."""
    return token_stats(logits, _first_ids(logits)).entropy


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both in one pass; `index` has one token a row. The gradient of an entropy that requires none costs nothing."""
    stats = token_stats(logits, index, temperature=temperature, mask=_live(row_mask))
    return stats.logprob, stats.entropy if entropy_requires_grad else stats.entropy.detach()


class SelectedLogprobs(torch.autograd.Function):
    """Log-probs of K tokens in each row: of the most likely directly, of the others by their distance to it.

    The gradient to the logits is one tensor: sum(g) * (onehot of that token - p), and in the K places g - sum(g) * p.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor, temperature: float, live: Tensor | None) -> Tensor:
        checks.local_parts(None, logits=logits)
        z = logits.gather(-1, index).to(compute_dtype(logits))
        best = z.argmax(-1, keepdim=True)
        token = index.gather(-1, best).squeeze(-1)
        rows = None if live is None else live.any(-1)
        checks.require_logits(logits, token, None, rows)
        ctx.temperature = checks.require_number("temperature", temperature, above=0)
        ctx.backend = fast_backend(logits)
        inputs = flat_inputs(logits, token, None, ctx.temperature, rows)
        logprob, *_, stats = token_stats_op(*inputs, None, None, False, ctx.backend)
        z_best = z.gather(-1, best)
        gap = ((z - z_best) / ctx.temperature).masked_fill(z == z_best, 0)  # -inf - -inf
        result = logprob.view(token.shape).unsqueeze(-1) + gap
        ctx.save_for_backward(logits, index, token, rows, stats, result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, index, token, rows, stats, result = ctx.saved_tensors
        grad = grad.to(stats.dtype)
        total = grad.sum(-1)
        inputs = flat_inputs(logits, token, None, ctx.temperature, rows)
        found = token_stats_backward_op(*inputs, stats, *StatsGrad(total.reshape(-1)), ctx.backend)
        total = total.unsqueeze(-1)
        share = torch.where(total == 0, 0, total * result.exp())  # a row without gradient may hold NaN
        values = (_sum_of_equal(index, grad) - share) / ctx.temperature
        index_NK, found_NV = index.reshape(-1, index.shape[-1]), found.view(-1, found.shape[-1])
        row_N1 = torch.arange(len(index_NK), device=index.device)[:, None]
        found_NV[row_N1, index_NK] = values.view_as(index_NK).to(found.dtype)  # scatter_ copies to float32 on a CPU
        return found, None, None, None


def _sum_of_equal(index: Tensor, grad: Tensor) -> Tensor:
    """The sum of `grad` over the places of a row that name the same token, in each of these places."""
    index, order = index.sort(-1)
    place = torch.nn.functional.pad(index.diff(dim=-1).ne(0).cumsum(-1), (1, 0))  # one for equal tokens
    sums = torch.zeros_like(grad).scatter_add_(-1, place, grad.gather(-1, order)).gather(-1, place)
    return sums.gather(-1, order.argsort(-1))


def _log_sum_sq_probs(inputs: LinearInputs, stats: Tensor, backend: str) -> Tensor:
    """Squares of probabilities are those of half the temperature: one more pass."""
    halved = inputs._replace(temperature=inputs.temperature / 2)
    *_, squares, _ = linear.linear_token_stats_op(*halved, 0, None, None, backend)
    return RowStats(*squares).log_total - 2 * RowStats(*stats).log_total


def _mean_logits(inputs: LinearInputs) -> Tensor:
    """Without a softcap, the product with the mean row of the weight; with one, each logit has to be made."""
    dtype, scale = compute_dtype(inputs.hidden_NH), inputs.logit_scale
    bias = inputs.weight_VH.new_zeros(()) if inputs.bias_V is None else inputs.bias_V.to(dtype)
    parts = inputs.weight_VH.split(MEAN_COLUMNS)
    product = torch.promote_types(inputs.hidden_NH.dtype, inputs.weight_VH.dtype)
    if inputs.softcap is None:
        row_H = torch.stack([part.sum(0, dtype=dtype) for part in parts]).sum(0) / len(inputs.weight_VH)
        return scale / inputs.temperature * (inputs.hidden_NH.to(dtype) @ row_H + bias.mean())
    totals = []
    for rows_RH in inputs.hidden_NH.split(MEAN_ROWS):
        total_R = rows_RH.new_zeros(len(rows_RH), dtype=dtype)
        for part, bias_C in zip(parts, bias.expand(len(inputs.weight_VH)).split(MEAN_COLUMNS), strict=True):
            u_RC = scale * (torch.mm(rows_RH.to(product), part.T.to(product)).to(dtype) + bias_C)
            total_R += u_RC.div_(inputs.softcap).tanh_().sum(-1)
        totals.append(total_R)
    return inputs.softcap / inputs.temperature / len(inputs.weight_VH) * torch.cat(totals)


def _is_top1(logprob: Tensor, stats: Tensor) -> Tensor:
    best = -RowStats(*stats).log_total  # the most likely token's log-prob
    return logprob >= best - TIE * torch.finfo(best.dtype).eps * best.abs().clamp(min=1)


def _linear_inputs(head: Sequence[Any], options: dict[str, Any], rounded: torch.dtype | None) -> LinearInputs:
    """`rounded` is autocast's dtype, to which hidden states and weights go."""
    given = Head(*head, **options)
    if rounded is not None:
        factors = {name: getattr(given, name) for name in ("hidden", "weight", "ref_hidden", "ref_weight")}
        given = given._replace(**{name: x.to(rounded) for name, x in factors.items() if x is not None})
    return linear.flat_inputs(given)


def _live(row_mask: Tensor | None) -> Tensor | None:
    return None if row_mask is None else row_mask != 0


def _first_ids(logits: Tensor) -> Tensor:
    return torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)


def _linear_logprob(original: Any) -> Any:
    names = inspect.signature(original.forward).parameters
    return LinearLogprob if "outputs" in names else TwoOutputs("bias" in names)


_HEAD = ("targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale")
_FROM_1_15 = ("hidden", "weight", "bias", *_HEAD, "outputs")
_MASKED = ("temperature", "row_mask")
_FROM_LOGITS = [
    Replacement(
        UTILS,
        "selective_log_softmax",
        [("logits", "index", *_MASKED), ("logits", "index")],
        lambda original: selective_log_softmax,
    ),
    Replacement(UTILS, "entropy_from_logits", [("logits", "chunk_size")], lambda original: entropy_from_logits),
    Replacement(
        UTILS,
        "selective_log_softmax_and_entropy",
        [("logits", "index", "entropy_requires_grad", *_MASKED)],
        lambda original: selective_log_softmax_and_entropy,
    ),
]
_CHUNKED = (UTILS, "_ChunkedLogProbFunction")
_OLDER = [("last_hidden", "weight", "bias", *_HEAD), ("last_hidden", "weight", *_HEAD)]
_SHARED = [*_FROM_LOGITS, *trl_distillation.REPLACEMENTS]
DOWNSTREAM = ("swift", "axolotl")  # packages whose trainers have bound TRL's functions
PATCH = Patch(
    "trl",
    [Replacement(*_CHUNKED, [_FROM_1_15, *_OLDER], _linear_logprob), *_SHARED],
    downstream=DOWNSTREAM,
)
_EXACT = [
    Replacement(*_CHUNKED, [_FROM_1_15], lambda original: trl_exact_kl.HeadCall(LinearLogprob.apply)),
    *trl_exact_kl.METHODS,
]
EXACT_KL = Patch("trl", [*_EXACT, *_SHARED], needs=_EXACT, downstream=DOWNSTREAM)
PATCHES = (PATCH, EXACT_KL)


def main() -> None:
    """Apply the patch in this process, then run TRL's script as `trl SCRIPT` would in one process."""
    scripts = sorted(
        module.name
        for module in pkgutil.iter_modules(importlib.import_module("trl.scripts").__path__)
        if not module.name.startswith("_") and module.name not in ("utils", "env", "vllm_serve")
    )
    kl = "exact" if "--kl=exact" in sys.argv[1:2] else None
    if kl is not None:
        sys.argv.pop(1)
    if len(sys.argv) < 2 or sys.argv[1] not in scripts:
        sys.exit(
            f"usage: python -m safe_kernels.integrations.trl [--kl=exact] SCRIPT [arguments of `trl SCRIPT`]\n"
            f"SCRIPT is one of {', '.join(scripts)}"
        )
    patch, script = apply(kl), sys.argv.pop(1)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"safe_kernels replaces {', '.join(patch.replaced) or 'nothing'}", file=sys.stderr)
    runpy.run_module(f"trl.scripts.{script}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    from .trl import main as main_of_the_module  # so that there is one patch, not two

    main_of_the_module()
