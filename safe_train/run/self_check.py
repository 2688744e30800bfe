"""The check that a run pays for once: the trainer's own path against the model's own forward, on a few tokens.

It comes before the first rollout, and again after `--resume`. Each part has a bound of its own, since the rounding of
one would hide the faults of another; on several processes all measure the same, and all stop together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from safe_train import parallel
from safe_train.config import ConfigError, SafeConfig
from safe_train.data.batches import TokenBatch
from safe_train.data.prompts import PromptDataset
from safe_train.engines import sharding
from safe_train.models import scoring
from safe_train.models.attention import as_published
from safe_train.models.checks import LARGEST_HEAD_GAP, head_gap
from safe_train.models.layout import ROWS, largest_gap
from safe_train.randomness import python_generators, seeded, torch_generators
from safe_train.run.metrics import sampler_metrics
from safe_train.settings.limits import LARGEST_SAMPLER_GAP

if TYPE_CHECKING:
    from safe_train.models.policy import Policy
    from safe_train.sampling.experience import Experience
    from safe_train.trainer import SafeTrainer

LENGTHS = (9, 16)  # of the sequences: with two, padding and packing show
PROMPTS = 8  # from whose text they are cut


class Part(NamedTuple):
    """What was compared, by how much it differs in nats, and what is rounding."""

    gap: float
    largest: float
    message: str


def self_check(trainer: SafeTrainer) -> None:
    """Raises a ConfigError if the trainer's log-probs are not the model's. The run's random numbers are left alone."""
    policy, args = trainer.policy, trainer.args
    name, limit = type(policy.causal_lm).__name__, largest_gap(policy.compute_dtype, policy.temperature)
    sequences = sequences_of(trainer.prompts)
    with seeded(0), torch.no_grad():
        batch = batch_of(sequences).to(trainer.device)
        together, ref_together, kl = log_probs(policy, batch)
        with alone(policy):
            found = [log_probs(policy, batch_of([ids]).to(trainer.device)) for ids in sequences]
        sharding.reshard(policy)
        own, ref_own = (torch.cat([each[i] for each in found]) for i in range(2))
        with trainer.engine.gathered():
            parts = [
                Part(head_gap(policy, sequences[:1]), LARGEST_HEAD_GAP, HEAD),
                Part(mean_gap(together, own), limit, LAYOUT),
                Part(mean_gap(ref_together, ref_own), limit, REFERENCE_LAYOUT),
            ]
    if trainer.step == 0 and args.reference == "initial":
        parts.append(Part(kl.mean().item(), limit, REFERENCE))
    worst = parallel.maxima({part.message: part.gap for part in parts})
    for part in parts:
        if not worst[part.message] <= part.largest:
            raise ConfigError(
                part.message.format(model=name, layout=policy.layout, gap=worst[part.message], largest=part.largest)
            )


def check_bad_steps(count: int, args: SafeConfig, loss: Tensor, norm: Tensor, critic_norm: Tensor) -> None:
    """Raises FloatingPointError after `max_bad_steps` optimizer steps in a row that were not finite."""
    if count >= args.max_bad_steps:
        raise FloatingPointError(
            f"{count} optimizer steps in a row had a non-finite loss or gradient (loss {loss:.4g}, "
            f"policy gradient {norm:.4g}, critic gradient {critic_norm:.4g}); none of them reached the weights. "
            f"The last checkpoint in {args.output_dir} is intact; a lower learning_rate may help."
        )


HEAD = (
    "the head of {model}: on the same hidden states its own log-probs differ by {gap:.2g} nats from the kernels', at "
    "most {largest:g} is rounding; take a model whose logits are a scale or softcap of its head's"
)
LAYOUT = (
    "layout {layout}: log-probs of {model} on sequences together differ by {gap:.2g} nats on average from those of "
    "each alone, at most {largest:g} is rounding: sequences see one another. Set layout to rows, or "
    "attn_implementation to sdpa or eager"
)
REFERENCE_LAYOUT = "the reference, " + LAYOUT
REFERENCE = (
    "the reference is not the policy that was handed over: before the first step its KL is {gap:.2g} nats on average, "
    "at most {largest:g} is rounding. Load {model} anew, and pass it as it is; or set reference to base, if an adapter "
    "was trained before and KL is to be counted from the model without it"
)


def sequences_of(prompts: PromptDataset) -> list[list[int]]:
    """Consecutive tokens of the first prompts, from the first again where there are too few."""
    ids = [token for prompt in prompts.at(0, PROMPTS) for token in prompt.ids]
    ids = ids * -(-sum(LENGTHS) // len(ids))
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    return [ids[start : start + length] for start, length in zip(starts, LENGTHS, strict=True)]


def sampled_prompts(prompts: PromptDataset) -> list[list[int]]:
    """Of two lengths, so that padding shows, and two of one length, so that a batch of them does."""
    first, second = sequences_of(prompts)
    return [first[:7], second[:3], second[3:6]]


def batch_of(sequences: Sequence[list[int]]) -> TokenBatch:
    """Each with all of its tokens but the first as the response."""
    return TokenBatch.pack([ids[:1] for ids in sequences], [ids[1:] for ids in sequences])


def log_probs(policy: Policy, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """[L] log-probs of policy and reference, and the KL between them, as a rollout is scored."""
    ref_hidden_LH, hidden_LH = policy.reference(batch), policy(batch)  # whose head stays gathered
    stats = scoring.statistics(hidden_LH, policy.head(), batch, ref_hidden_LH)
    assert stats.ref_logprob is not None and stats.kl is not None
    return stats.logprob, stats.ref_logprob, stats.kl


@contextmanager
def alone(policy: Policy) -> Iterator[None]:
    """Inside, a sequence runs as in sampling: in a row, in evaluation mode, with an attention that takes masks."""
    layout = policy.layout
    with ExitStack() as stack:
        for model in (policy.causal_lm, *policy.frozen_copies):
            stack.enter_context(as_published(model))
        policy.layout = ROWS
        try:
            yield
        finally:
            policy.layout = layout


def mean_gap(x: Tensor, y: Tensor) -> float:
    return (x - y).abs().mean().item()


FORWARDS = 32  # of a model that draws random numbers


@torch.no_grad()
def check_deterministic(policy: Policy, device: torch.device) -> None:
    """Refuses a model whose forward, in the mode that the update runs it in, is random.

    On a CPU the bits tell; some sums of a GPU have no fixed order. A model that draws random numbers is tried more
    often: it may leave out a layer once in ten times, or multiply by 1.
    """
    vocabulary = policy.causal_lm.config.get_text_config().vocab_size
    batch = TokenBatch.pack([[i % vocabulary for i in range(8)]], [[1, 0]]).to(device)
    with seeded(0):
        before, numbers = torch_generators(), python_generators()
        first_LH = policy(batch)
        after = torch_generators()
        is_same = all(torch.equal(before[name], after[name]) for name in before)
        is_drawing = not is_same or numbers != python_generators()
        gap = max((policy(batch) - first_LH).abs().max().item() for _ in range(FORWARDS if is_drawing else 1))
    sharding.reshard(policy)
    rounding = 0.0 if device.type == "cpu" else 8 * torch.finfo(first_LH.dtype).eps * first_LH.abs().max().item()
    if not gap <= rounding:
        raise ConfigError(
            f"two forwards of {type(policy.causal_lm).__name__} on the same tokens differ by {gap:.3g}: something in "
            "it is random in training, and is named neither dropout, jitter nor noise; switch it off in its config, "
            "or set gradient_checkpointing to false, which runs it in evaluation mode"
        )


class SampledElsewhere(ConfigError, parallel.StoppedTogether):
    """Found in a rollout, by all processes at the same place."""


def check_sampler_gap(experience: Experience, dtype: torch.dtype, args: SafeConfig) -> None:
    """Stops the run, on all processes together, when a rollout was not sampled from the policy that trains."""
    gap = sampler_metrics(experience.tokens("logprob_L"), experience.tokens("sampler_logprob_L"))["sampler_gap"]
    largest = args.max_sampler_gap
    if largest is None:
        own = "float32" if dtype in (torch.float32, torch.float64) else "bfloat16"
        largest = LARGEST_SAMPLER_GAP["vllm" if args.generation == "vllm" else own]
    if not gap <= largest:
        raise SampledElsewhere(
            f"the rollout's log-probs differ by {gap:.3g} nats on average from the policy's (sampler_gap), at most "
            f"{largest:g} is rounding: it was sampled from another distribution than the one that trains. Likely "
            "causes: weights that were not handed to the sampling engine, a temperature or a filter in its settings, a "
            "model that is wrong with padding or a cache at these lengths (cache_implementation, "
            "generation_batch_size). If the gap is rounding after all, raise max_sampler_gap, and see importance_cap"
        )
