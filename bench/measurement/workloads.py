"""What is measured: operations, shapes, inputs and passes, as frozen data, and the tensors made from them.

Shapes: N tokens, H hidden width, V vocabulary; soft_min_gae takes [N / T, T].
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

MODELS = {"Qwen2.5-3B": (2048, 151_936), "Llama-3-8B": (4096, 128_256), "SmolLM2-135M": (576, 49_152)}
FORWARD, BACKWARD = "forward", "forward+backward"
FROZEN, TRAINED = f"{BACKWARD}, head frozen", f"{BACKWARD}, head trained"
PASSES = {
    "logits": (FORWARD, BACKWARD),
    "hidden": (FORWARD, FROZEN, TRAINED),
    "loss": (FROZEN, TRAINED),
    "distill": (FROZEN, TRAINED),
    "kept": (FORWARD, FROZEN, TRAINED),
    "best": (FROZEN, TRAINED),
    "gae": (FORWARD,),
    "step": ("rollout", "score", "update", "loss part", "budget"),
}
WITH_KL = ("logprob", "entropy", "kl")
POLICY, VALUES = ("loss", *WITH_KL), ("value", "advantage", "returns")
OUTPUTS = {"logits": WITH_KL, "hidden": WITH_KL, "loss": POLICY, "distill": ("loss", "divergence"), "gae": VALUES}
OUTPUTS |= {"kept": WITH_KL, "best": ("loss", "divergence")}
TEACHER_WIDTH = 5 / 3  # of a distillation's teacher, times the student's, as SmolLM2's 360M has it to 135M
SEED = 0


@dataclass(frozen=True)
class Workload:
    """One operation on one set of inputs; its passes are timed one by one."""

    entrance: str  # a key of PASSES: what is called, and with what
    model: str
    N: int
    H: int
    V: int
    T: int = 0  # tokens of a sequence, for gae
    kl: bool = False
    dtype: str = "float32"
    masked: float = 0.0  # share of tokens left out
    field: bool = True  # everyone, or plain PyTorch and this project alone
    inputs: str = "random"  # or SmolLM2: its hidden states of text, its head, the text's tokens
    divergence: str = ""  # of a distillation
    ids: int = 0  # of each token: what its sampler kept, or the best of a served teacher

    @property
    def teacher_width(self) -> int:
        return round(TEACHER_WIDTH * self.H / 8) * 8

    @property
    def passes(self) -> tuple[str, ...]:
        return PASSES[self.entrance]

    @property
    def outputs(self) -> tuple[str, ...]:
        """What a provider returns here if it lacks nothing."""
        return tuple(name for name in OUTPUTS[self.entrance] if name != "kl" or self.kl)

    def graded(self, outputs: tuple[str, ...]) -> list[str]:
        """The outputs that receive a gradient."""
        return [name for name in outputs if name == "loss" or self.entrance in ("logits", "hidden", "kept")]

    def leaves(self, part: str) -> list[str]:
        """The arguments whose gradient is asked for in a pass."""
        if part == FORWARD:
            return []
        return ["logits"] if self.entrance == "logits" else ["hidden", *(["weight"] if part == TRAINED else [])]

    def __str__(self) -> str:
        shape = f"[{self.N // self.T}, {self.T}]" if self.T else f"N={self.N} H={self.H} V={self.V}"
        extras = (
            [self.divergence] * bool(self.divergence)
            + [f"{self.ids} ids"] * bool(self.ids)
            + ["with KL"] * self.kl
            + [f"{self.masked:.0%} masked"] * (self.masked > 0)
        )
        return " ".join([self.entrance, *extras, self.model, shape, self.dtype, f"({self.inputs} inputs)"])


def of(entrance: str, model: str, tokens: int, **options: Any) -> Workload:
    width, vocabulary = MODELS[model]
    return Workload(entrance, model, tokens, width, vocabulary, **options)


def gae(sequences: int, time: int) -> Workload:
    return Workload("gae", "two critics", sequences * time, 0, 0, T=time, masked=0.1)


def kernel_workloads(device: str, quick: bool) -> list[Workload]:
    """The most important first: a run that reaches its time limit leaves out the last ones."""
    if quick:
        return _quick(device)
    return _on_gpu() if device == "cuda" else _on_cpu()


def _quick(device: str) -> list[Workload]:
    dtype, tokens = ("bfloat16", 2048) if device == "cuda" else ("float32", 64)
    pairs = [("logits", True), ("hidden", False), ("loss", True)]
    return [of(e, "SmolLM2-135M", tokens, kl=kl, dtype=dtype) for e, kl in pairs] + [gae(64, 256)]


def _on_cpu() -> list[Workload]:
    small, large = "SmolLM2-135M", "Qwen2.5-3B"
    main = [of("logits", large, 256, kl=kl) for kl in (False, True)]
    main += [of("hidden", small, 256, kl=kl, inputs="SmolLM2") for kl in (False, True)]
    main += [of("hidden", small, 256)] + [of("loss", small, 256, kl=kl) for kl in (False, True)]
    main += [of("distill", small, 256, divergence=name) for name in ("reverse_kl", "jsd")]
    main += [of("kept", small, 256, ids=50, inputs="SmolLM2"), of("kept", small, 256, ids=50, kl=True)]
    main += [of("best", small, 256, ids=20, divergence="reverse_kl")]
    main += [gae(64, 1024), gae(16, 16_384)]
    entrances = [("hidden", False), ("loss", True)]
    curves = [of(e, small, n, kl=kl, field=False) for n in (1024, 64) for e, kl in entrances]
    variants = [of("hidden", small, 256, masked=0.4, field=False), of("logits", small, 256, dtype="bfloat16")]
    return main + curves + variants


def _on_gpu() -> list[Workload]:
    qwen = functools.partial(of, model="Qwen2.5-3B", dtype="bfloat16")
    main = [qwen(e, tokens=8192, kl=kl) for e in ("hidden", "loss", "logits") for kl in (False, True)]
    main += [qwen("distill", tokens=8192, divergence=name) for name in ("reverse_kl", "jsd")]
    main += [gae(64, 1024), gae(16, 16_384), qwen("hidden", tokens=8192, masked=0.4)]
    main += [qwen("best", tokens=8192, ids=20, divergence="reverse_kl"), qwen("kept", tokens=8192, ids=50)]
    others = [of(e, "Llama-3-8B", 8192, kl=kl, dtype="bfloat16") for e in ("hidden", "loss") for kl in (False, True)]
    real = [of("hidden", "SmolLM2-135M", 8192, kl=kl, dtype="bfloat16", inputs="SmolLM2") for kl in (False, True)]
    real += [of("kept", "SmolLM2-135M", 8192, ids=50, dtype="bfloat16", inputs="SmolLM2")]
    curves = [qwen("hidden", tokens=n, kl=kl) for n in (512, 2048, 32_768) for kl in (False, True)]
    curves += [qwen(e, tokens=n) for e in ("loss", "logits") for n in (512, 2048, 32_768)]
    return main + others + real + curves


def gate_workloads(dtypes: tuple[str, ...]) -> list[Workload]:
    """Toy sizes that Triton's interpreter can walk; a vocabulary that no block divides, a width that verl takes."""
    toy = Workload("hidden", "toy", 16, 128, 1000)
    pairs = [(entrance, kl) for entrance in ("logits", "hidden", "loss") for kl in (False, True)]
    cases = [replace(toy, entrance=e, kl=kl, dtype=dtype) for dtype in dtypes for e, kl in pairs]
    cases += [replace(toy, entrance="distill", divergence=name) for name in ("reverse_kl", "forward_kl", "jsd", "tv")]
    cases += [replace(toy, entrance="kept", ids=9, kl=kl) for kl in (False, True)]
    cases += [
        replace(toy, entrance="best", ids=9, divergence=name) for name in ("reverse_kl", "forward_kl", "jsd", "tv")
    ]
    masked = [replace(toy, masked=0.4), replace(toy, entrance="logits", masked=0.4)]
    return cases + masked + [Workload("gae", "toy", 4 * 40, 0, 0, T=40, masked=0.1)]


def make_case(workload: Workload, device: str) -> dict[str, Any]:
    """Arguments of the public function; the same for every provider."""
    draw = torch.Generator(device).manual_seed(SEED)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, device=device)

    if workload.entrance == "gae":
        shape = (workload.N // workload.T, workload.T)
        return {**{name: normal(*shape) for name in ("v1", "v2", "rewards")}, **_mask(workload, draw, shape)}
    if workload.entrance == "distill":
        return _teacher(workload, _head(workload, normal, device), normal)
    case = _head(workload, normal, device) if workload.entrance != "logits" else _logits(workload, normal)
    case.setdefault("tokens", torch.randint(workload.V, (workload.N,), generator=draw, device=device))
    if workload.entrance == "best":
        return case | _best(workload, case, normal)
    case |= _mask(workload, draw, (workload.N,))
    if workload.entrance == "kept":
        return case | _kept(workload, case, draw)
    return case | _policy(workload, case, normal) if workload.entrance == "loss" else case


def _mask(workload: Workload, draw: torch.Generator, shape: tuple[int, ...]) -> dict[str, Tensor | None]:
    if workload.masked == 0:
        return {"mask": None}
    return {"mask": torch.rand(shape, generator=draw, device=draw.device) >= workload.masked}


def _logits(workload: Workload, normal: Any) -> dict[str, Any]:
    dtype = getattr(torch, workload.dtype)
    logits = (2 * normal(workload.N, workload.V)).to(dtype)
    if not workload.kl:
        return {"logits": logits}
    return {"logits": logits, "ref_logits": (logits + 0.3 * normal(workload.N, workload.V)).to(dtype)}


def _head(workload: Workload, normal: Any, device: str) -> dict[str, Any]:
    """Random weights whose logits have a standard deviation of 2; the reference is the policy with noise."""
    dtype = getattr(torch, workload.dtype)
    if workload.inputs == "SmolLM2":
        hidden, weight, tokens = (x.to(device) for x in smollm2_states(workload.N))
        case = {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "tokens": tokens}
    else:
        weight = normal(workload.V, workload.H).mul_(2 / workload.H**0.5)
        case = {"hidden": normal(workload.N, workload.H).to(dtype), "weight": weight.to(dtype)}
    if workload.kl:
        noise = 0.3 * case["hidden"].float().std() * normal(workload.N, workload.H)
        case["ref_hidden"] = (case["hidden"] + noise).to(dtype)
    return case


def _teacher(workload: Workload, case: dict[str, Any], normal: Any) -> dict[str, Any]:
    """A wider teacher; its logits and the student's are independent, with one standard deviation."""
    width, dtype = workload.teacher_width, case["hidden"].dtype
    weight = normal(workload.V, width).mul_(2 / width**0.5)
    teacher = {"teacher_hidden": normal(workload.N, width).to(dtype), "teacher_weight": weight.to(dtype)}
    weights = torch.full((workload.N,), 1 / workload.N, device=weight.device)
    return {**case, **teacher, "weights": weights, "divergence": workload.divergence, "reduction": "sum"}


def _likeliest(workload: Workload, case: dict[str, Any]) -> Tensor:
    """[N, ids]: the likeliest ids of each token under the student, a sampler's top-k."""
    weight = case["weight"].float()
    rows = (x.float() @ weight.T for x in case["hidden"].split(256))
    return torch.cat([logits.topk(workload.ids).indices for logits in rows])


def _kept(workload: Workload, case: dict[str, Any], draw: torch.Generator) -> dict[str, Tensor]:
    """Top-k sets, and tokens from them."""
    kept = _likeliest(workload, case)
    place = torch.randint(workload.ids, (workload.N, 1), generator=draw, device=draw.device)
    return {"kept": kept, "tokens": kept.gather(1, place)[:, 0]}


def _best(workload: Workload, case: dict[str, Any], normal: Any) -> dict[str, Any]:
    """Ids and log-probs as a server says them: here of a teacher that shares most of the student's likeliest ids."""
    ids, vocabulary = _likeliest(workload, case), case["weight"].shape[0]
    scores = torch.cat([2 * normal(workload.N, workload.ids), math.log(workload.ids) * torch.ones_like(ids[:, :1])], 1)
    weights = torch.full((workload.N,), 1 / workload.N, device=ids.device)
    served = {"tokens": ids, "teacher_logprob": scores.log_softmax(-1)[:, :-1].contiguous()}
    return served | {"vocabulary": vocabulary, "weights": weights, "divergence": workload.divergence}


def _policy(workload: Workload, case: dict[str, Any], normal: Any) -> dict[str, Any]:
    """Ratios on both sides of the clip, advantages of both signs; weights that a part of the rows can take along."""
    from safe_kernels import linear_token_stats

    with torch.no_grad():
        head = {name: case[name] for name in ("hidden", "weight", "tokens", "mask")}
        logprob = linear_token_stats(**head, backend="torch").logprob
    terms = {"kl_coef": 0.1, "kl_penalty_coef": 0.1, "kl_threshold": 0.01} if workload.kl else {}
    return {
        "old_logprob": logprob + 0.3 * normal(workload.N),
        "advantage": normal(workload.N),
        "loss_weight": torch.full_like(logprob, 1 / workload.N),
        "entropy_coef": 0.01,
        **terms,
    }


@functools.cache
def smollm2_states(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Final hidden states [N, H] of the demo's texts, the head's weight [V, H], and the token that follows each."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from safe_train.config import CONFIGS
    from safe_train.models.pretrained import smollm2_folder

    folder = smollm2_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = CONFIGS / "demo_train.jsonl"
    lines = [" ".join(map(str, json.loads(line).values())) for line in texts.read_text().splitlines()]
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)("\n".join(lines)).input_ids)
    ids = ids.repeat(-(-(tokens + 1) // len(ids)))
    context = 512
    with torch.no_grad():
        parts = [model.model(part[None]).last_hidden_state[0] for part in ids[:tokens].split(context)]
    return torch.cat(parts), model.lm_head.weight.detach(), ids[1 : tokens + 1]
