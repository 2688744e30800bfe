"""The training step: this project's layout beside the published one, on the same model, tokens and advantages.

    safe-kernels       packed sequences, the reference is the policy without its adapters, no logits are stored
    published layout   padded sequences, a second copy of the model as the reference, plain PyTorch on float32 logits

The passes: rollout (generation, which both share), score (statistics under policy and reference), update (forward and
backward of one pass of optimisation), loss part (the update behind the backbone: from hidden states to their gradient)
and budget (one measurement for `kl_budget`, which the published step has not). The model is built from its
configuration with random weights, and nothing is downloaded.

Shapes: B sequences of T tokens, half of them prompt; L response tokens, H hidden width, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.measurement import timing
from bench.measurement.backbones import BACKBONES, random_model
from bench.measurement.rows import ALL_PASSES, BASELINES, Row
from bench.measurement.timing import Timing
from bench.measurement.workloads import SEED, Workload
from bench.suites.gate import Error
from bench.suites.kernels import Settings, first_line
from safe_kernels import reference
from safe_train.algorithms import losses
from safe_train.algorithms.critic import Critic
from safe_train.config import SafeConfig
from safe_train.data.batches import TokenBatch
from safe_train.data.prompts import Prompt
from safe_train.engines.projection import mean_kl
from safe_train.models import scoring
from safe_train.models.attention import use_attention
from safe_train.models.policy import Policy, make_policy, use_tensor_cores
from safe_train.sampling.samplers import make_sampler

ROLLOUT, SCORE, UPDATE, LOSS, BUDGET = "rollout", "score", "update", "loss part", "budget"
STATISTICS = ("logprob", "entropy", "ref_logprob", "kl")
KL_COEF, KL_THRESHOLD = 0.1, 0.01
LONGEST = 10.0  # seconds of a pass that is worth repeating


def trainer_workloads(device: str, quick: bool) -> list[Workload]:
    """16 completions of 128 tokens to prompts of 128; on a CPU the vocabulary is a real one and the backbone is not."""
    if device == "cuda":
        return [Workload("step", "Qwen2.5-3B", 16 * 256, 2048, 151_936, T=256, kl=True, dtype="bfloat16")]
    return [Workload("step", "two layers", (4 if quick else 16) * 64, 256, 49_152, T=64, kl=True)]


class Inputs(NamedTuple):
    prompts: list[list[int]]
    completions: list[list[int]]
    old_logprob_L: Tensor
    advantage_L: Tensor
    returns_L: Tensor
    old_values_KL: Tensor


class Layout:
    """One way to lay out the same step. `hidden` and `loss` are differentiable; their sum of work is the update."""

    name: str
    score: Callable[..., tuple[Any, ...]]  # () -> STATISTICS of the response tokens
    hidden: Callable[..., Tensor]
    response_states: Callable[..., Tensor]  # (hidden) -> [L, H]: the states that predict response tokens
    loss: Callable[..., Tensor]  # (hidden)
    extra_bytes = 0  # of weights that only this layout holds

    def __init__(self, policy: Policy, inputs: Inputs, args: SafeConfig, device: str):
        self.policy, self.inputs, self.args = policy, inputs, args
        torch.manual_seed(SEED)
        self.critic = Critic(policy.hidden_size, args).to(device)
        self.trained = [p for p in (*policy.parameters(), *self.critic.heads.parameters()) if p.requires_grad]
        self.micro: Any = SimpleNamespace(
            logprob_L=inputs.old_logprob_L,
            sampler_logprob_L=inputs.old_logprob_L,
            advantage_L=inputs.advantage_L,
            is_scored_L=torch.ones_like(inputs.advantage_L, dtype=torch.bool),
            returns_L=inputs.returns_L,
            values_KL=inputs.old_values_KL[: len(self.critic.heads)],
        )
        self.weight_L = torch.full_like(inputs.old_logprob_L, 1 / len(inputs.old_logprob_L))

    def update(self) -> tuple[Tensor, ...]:
        """The loss, and the gradients of the adapters and the critic."""
        hidden = self.hidden()
        values_KL = self.critic(self.response_states(hidden))
        value_loss = losses.value_loss(values_KL, self.micro, self.weight_L, self.args)
        total = self.loss(hidden) + self.args.value_coef * value_loss
        return total.detach(), *torch.autograd.grad(total, self.trained)

    def loss_part(self) -> Callable[[], Tensor]:
        with torch.no_grad():
            hidden = self.hidden()
        hidden.requires_grad_()
        return lambda: torch.autograd.grad(self.loss(hidden), hidden)[0]


class Ours(Layout):
    name = "safe-kernels"

    def __init__(self, policy: Policy, inputs: Inputs, args: SafeConfig, device: str):
        super().__init__(policy, inputs, args, device)
        self.micro.batch = TokenBatch.pack(inputs.prompts, inputs.completions).to(torch.device(device))
        self.micro.ref_hidden_LH = policy.reference(self.micro.batch)
        self.control: Any = SimpleNamespace(kl_coef=KL_COEF, kl_threshold=KL_THRESHOLD)

    @torch.no_grad()
    def score(self) -> tuple[Any, ...]:
        batch = self.micro.batch
        ref_hidden_LH = self.policy.reference(batch)
        found = scoring.statistics(self.policy(batch), self.policy.head(), batch, ref_hidden_LH)
        return found.logprob, found.entropy, found.ref_logprob, found.kl

    def hidden(self) -> Tensor:
        return self.policy(self.micro.batch)

    def response_states(self, hidden: Tensor) -> Tensor:
        return hidden

    def loss(self, hidden: Tensor) -> Tensor:
        head = self.policy.head()
        return losses.policy_loss(hidden, head, self.micro, self.weight_L, self.control, self.args).loss

    def measure_kl(self) -> float:
        return mean_kl(self.policy, [self.micro])


class OursAsPPO(Ours):
    """One critic instead of two: what SAFE costs beyond PPO."""

    name = "safe-kernels, ppo"

    def __init__(self, policy: Policy, inputs: Inputs, args: SafeConfig, device: str):
        super().__init__(policy, inputs, SafeConfig(algorithm="ppo", kl_penalty_coef=args.kl_penalty_coef), device)


class Published(Layout):
    """Logits of whole padded sequences, under two copies of the model."""

    name = BASELINES[1]

    def __init__(self, policy: Policy, inputs: Inputs, args: SafeConfig, device: str, base: Any):
        super().__init__(policy, inputs, args, device)
        self.reference = copy.deepcopy(base).requires_grad_(False)
        self.extra_bytes = sum(p.nbytes for p in self.reference.parameters())
        rows = [prompt + completion for prompt, completion in zip(inputs.prompts, inputs.completions, strict=True)]
        self.ids_BT = torch.tensor(rows, device=device)
        self.first = len(inputs.prompts[0]) - 1  # predicts the first response token
        with torch.no_grad():
            self.ref_hidden = self.states(self.reference)

    @torch.no_grad()
    def score(self) -> tuple[Any, ...]:
        return self.statistics(self.hidden(), self.states(self.reference))

    def hidden(self) -> Tensor:
        return self.states(self.policy.causal_lm)

    def response_states(self, hidden: Tensor) -> Tensor:
        return hidden[:, self.first : -1].flatten(0, 1)

    def loss(self, hidden: Tensor) -> Tensor:
        logprob, entropy, _, kl = self.statistics(hidden, self.ref_hidden)
        ratio, advantage_L = (logprob - self.inputs.old_logprob_L).exp(), self.inputs.advantage_L
        clipped = ratio.clamp(1 - self.args.clip_low, 1 + self.args.clip_high)
        token_loss = -torch.minimum(ratio * advantage_L, clipped * advantage_L) - self.args.entropy_coef * entropy
        penalty = (kl - KL_THRESHOLD).relu() ** 2
        return (token_loss + KL_COEF * kl + self.args.kl_penalty_coef * penalty).mean()

    def statistics(self, hidden: Tensor, ref_hidden: Tensor) -> tuple[Any, ...]:
        logits = self.policy.causal_lm.get_output_embeddings()(hidden)[:, :-1]
        with torch.no_grad():
            ref_logits = self.reference.get_output_embeddings()(ref_hidden)[:, :-1]
        found = reference.token_stats(logits, self.ids_BT[:, 1:], ref_logits=ref_logits)
        return tuple(getattr(found, name)[:, self.first :].flatten() for name in STATISTICS)

    def states(self, model: Any) -> Tensor:
        packed = model.config._attn_implementation
        use_attention(model, "sdpa")  # an implementation for packed sequences would need their bounds
        try:
            return model.model(input_ids=self.ids_BT, use_cache=False).last_hidden_state
        finally:
            use_attention(model, packed)


@contextmanager
def multiplied_in(precision: str) -> Iterator[None]:
    """The precision of float32 products, which the trainer lowers beside bfloat16 weights."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def measured(workload: Workload, settings: Settings, title: str = "") -> list[Row]:
    """Rows of all layouts, or one that says that the memory is too small for them."""
    try:
        with multiplied_in("highest"):  # until the policy is there, and again for the rows of others
            return rows_of(workload, settings)
    except torch.OutOfMemoryError as error:
        return [Row(ALL_PASSES, "all", None, "out of memory", first_line(error))]


def rows_of(workload: Workload, settings: Settings) -> list[Row]:
    """Ours behind a gate: statistics, loss and gradients as exact as the published layout's."""
    device, args = settings.device, SafeConfig(kl_penalty_coef=0.1, lora_r=128)
    policy, base = build(workload, args, device)
    use_tensor_cores(policy.causal_lm.device, policy.causal_lm.dtype)
    inputs = make_inputs(workload, device)
    ours = [layout(policy, inputs, args, device) for layout in (Ours, OursAsPPO)]
    verdicts = {layout.name: gate(layout, policy, base, inputs, device) for layout in ours}
    rows = [verdict for verdict in verdicts.values() if verdict.status == "red"]
    right: list[Layout] = [layout for layout in ours if verdicts[layout.name].status == "ok"]
    right.append(Published(policy, inputs, args, device, base))
    calls = {part: {layout.name: call(layout) for layout in right} for part, call in PASSES.items()}
    calls[ROLLOUT] = {Ours.name: generation(policy, inputs, workload)}  # which all share
    calls[BUDGET] = {layout.name: layout.measure_kl for layout in right if type(layout) is Ours}
    for part, by_name in calls.items():
        one_each = {name: [call] for name, call in by_name.items()}
        timings = timing.timed(one_each, device, settings.seconds, longest=LONGEST)
        for layout in right:
            if layout.name in timings:
                first = Row(part, layout.name, None, "ok")
                if part != ROLLOUT and layout.name in verdicts:
                    first = replace(verdicts[layout.name], part=part)
                rows.append(timed_row(first, timings[layout.name], by_name[layout.name], device, layout.extra_bytes))
    return rows


PASSES: dict[str, Callable[[Layout], Callable[[], Any]]] = {
    SCORE: lambda layout: layout.score,
    UPDATE: lambda layout: layout.update,
    LOSS: lambda layout: layout.loss_part(),
}


def timed_row(first: Row, taken: Timing | Exception, call: Any, device: str, extra_bytes: int) -> Row:
    if isinstance(taken, Exception):
        return replace(first, status="cannot run", reason=first_line(taken))
    peak = timing.peak_bytes(call, device) + extra_bytes
    return replace(first.timed(taken), peak_bytes=peak, gradient_bytes=0)


def build(workload: Workload, args: SafeConfig, device: str) -> tuple[Policy, Any]:
    """The policy, with adapters that are not zero, and the model it was made from."""
    shape = {"hidden_size": workload.H, "vocab_size": workload.V}
    base = random_model(BACKBONES[workload.model] | shape, getattr(torch, workload.dtype), device)
    policy = make_policy(copy.deepcopy(base), args)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return policy, base


def make_inputs(workload: Workload, device: str) -> Inputs:
    draw = torch.Generator().manual_seed(SEED)
    half = workload.T // 2
    ids = torch.randint(workload.V, (workload.N // workload.T, workload.T), generator=draw).tolist()
    noise = torch.randn(5, workload.N // 2, generator=draw).to(device)
    uniform = -torch.full_like(noise[0], float(torch.log(torch.tensor(float(workload.V)))))
    prompts, completions = [row[:half] for row in ids], [row[half:] for row in ids]
    return Inputs(prompts, completions, uniform + 0.3 * noise[0], noise[1], noise[2], noise[3:])


def gate(layout: Layout, policy: Policy, base: Any, inputs: Inputs, device: str) -> Row:
    """A row of no pass: score and update judged; exact is the published layout in float64, on a GPU in float32."""
    wide = torch.float64 if device == "cpu" else torch.float32
    widened = inputs._replace(old_logprob_L=inputs.old_logprob_L.to(wide), advantage_L=inputs.advantage_L.to(wide))
    judge = Published(copy.deepcopy(policy).to(wide), widened, layout.args, device, copy.deepcopy(base).to(wide))
    use_attention(judge.policy.causal_lm, "sdpa")  # for good: checkpoints are recomputed when `states` has returned
    judge.policy.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})  # its activations would not fit
    judge.policy.train()
    with multiplied_in("highest"):
        exact = results(judge)
    del judge
    plain, found = results(Published(policy, inputs, layout.args, device, base)), results(layout)
    errors = {}
    for name, e in exact.items():
        error, own = ((x[name].to(wide) - e).abs().max().item() for x in (found, plain))
        scale, dtype = max(e.abs().max().item(), 1e-30), policy.causal_lm.dtype
        if name in STATISTICS:
            scale, dtype = math.log(policy.causal_lm.config.vocab_size), plain[name].dtype
        elif name == "loss":
            scale = max(scale, 1.0)  # it is a mean of terms of about 1
        errors[name] = Error.of(error, own, dtype, scale)
    worst = max((name for name in errors if name.startswith("gradient")), key=lambda name: errors[name].excess)
    red = any(error.excess > 1 for error in errors.values())
    errors["worst gradient"] = errors[worst]
    shown = {name: errors[name]._asdict() for name in (*STATISTICS, "loss", "worst gradient")}
    return Row(ALL_PASSES, layout.name, None, "red" if red else "ok", gate="red" if red else "green", errors=shown)


def results(layout: Layout) -> dict[str, Tensor]:
    loss, *gradients = layout.update()
    found = dict(zip(STATISTICS, layout.score(), strict=True)) | {"loss": loss}
    return found | {f"gradient {i}": gradient for i, gradient in enumerate(gradients)}


def generation(policy: Policy, inputs: Inputs, workload: Workload) -> Callable[[], Any]:
    tokenizer: Any = SimpleNamespace(
        pad_token_id=0, eos_token_id=None, chat_template=None, batch_decode=lambda rows, **_: [""] * len(rows)
    )
    prompts = [Prompt("", ids, {}) for ids in inputs.prompts]
    args = SafeConfig(max_new_tokens=workload.T // 2)
    sampler = make_sampler(policy, tokenizer, args)
    return lambda: sampler(prompts)
