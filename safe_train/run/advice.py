"""What in a run's numbers asks for a hand, as sentences, each with what to do."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safe_train.settings.limits import LARGEST_SAMPLER_GAP

LONGEST, SHORTEST = 10, 3  # rollouts at the run's end, and at its beginning, that a sentence is about
AT_BUDGET = 0.9  # of the budget
MOVED_BACK = 0.5  # of the updates
RUNAWAY_KL = 1.0  # nats per token, where nothing bounds it
OVER_THRESHOLD = 1.5  # times it
COLLAPSED, DISSOLVED = 0.2, 1.5  # times the entropy at the beginning
NO_SPREAD = 0.02  # times the spread of rewards at the beginning
CUT_OFF, CUT = 0.5, 0.1  # of completions, of prompts
SAMPLER_GAP = 0.5  # of the gap at which the run stops

Columns = Mapping[str, Sequence[float]]  # metrics by name, a number a step


class Course:
    """Means over a run's first rollouts and over its last ones, as many of both; nan where there are none."""

    def __init__(self, columns: Columns, settings: Mapping[str, Any], device: str = "cpu"):
        self.columns, self.settings, self.device = columns, settings, device
        self.count = min(LONGEST, max(map(len, columns.values()), default=0) // 2)

    def now(self, name: str) -> float:
        return mean(self.columns.get(name, ())[-self.count :])

    def first(self, name: str) -> float:
        return mean(self.columns.get(name, ())[: self.count])


def mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return statistics.fmean(known) if known else math.nan


def advice(columns: Columns, settings: Mapping[str, Any], device: str = "cpu") -> list[str]:
    """The sentences, the gravest first; none before the run has twice `SHORTEST` rollouts.

    Args:
        settings: of config.yaml; without them some cannot be told.
        device: that the run is on, "cpu" or "cuda..."
    """
    course = Course(columns, settings, device)
    if course.count < SHORTEST:
        return []
    return [sentence for rule in RULES if (sentence := rule(course))]


def bad_steps(course: Course) -> str:
    share = course.now("bad_steps")
    if not share > 0:
        return ""
    return (
        f"In the last {course.count} rollouts {share:.0%} of the optimizer steps were left out, as their loss or "
        "gradient was not finite. Try a lower learning_rate, or warmup_steps."
    )


def budget(course: Course) -> str:
    limit, kl = course.settings.get("kl_budget"), course.now("kl")
    if limit is None or not kl > AT_BUDGET * limit:
        return ""
    moved = course.now("budget/projected_fraction")
    if moved > MOVED_BACK:
        return (
            f"The KL stands at its budget ({kl:.3g} of {limit:g} nats a token), and {moved:.0%} of the updates were "
            "moved back into it. A lower learning_rate learns more within the same budget."
        )
    return (
        f"The KL stands at its budget: {kl:.3g} of {limit:g} nats a token. If the reward no longer rises, this is what "
        "the budget buys; a higher kl_budget allows more."
    )


def kl(course: Course) -> str:
    if course.settings.get("kl_budget") is not None:
        return ""
    kl, threshold = course.now("kl"), course.now("kl_threshold")
    if course.settings.get("controller", "safe") == "safe" and kl > OVER_THRESHOLD * threshold:
        return (
            f"The KL is {kl:.3g} nats a token, and the controller's threshold {threshold:.3g}: its coefficient does "
            f"not hold it. Try a higher beta, or bound it by kl_budget={threshold:.1g}."
        )
    if kl > RUNAWAY_KL:
        return (
            f"The KL is {kl:.3g} nats a token, and nothing bounds it: read the samples, the text may dissolve. Try a "
            "higher beta, or bound it by kl_budget=0.3."
        )
    return ""


def entropy(course: Course) -> str:
    now, first = course.now("entropy"), course.first("entropy")
    if now < COLLAPSED * first:
        return (
            f"The entropy fell from {first:.3g} to {now:.3g} nats a token: the policy gives nearly the same answer to "
            "everything. Try a higher beta or entropy_coef, or a lower learning_rate."
        )
    if now > DISSOLVED * first:
        return (
            f"The entropy rose from {first:.3g} to {now:.3g} nats a token: read the samples, the text may dissolve. "
            "Try a higher beta, or kl_budget."
        )
    return ""


def spread(course: Course) -> str:
    if course.settings.get("algorithm") == "distill":  # whose rewards are only logged
        return ""
    if course.now("rewards/none_fraction") == 1:
        return "Every reward is None: the run learns from KL and entropy alone. Does the reward find its columns?"
    now, first = course.now("reward_std"), course.first("reward_std")
    if not (now == 0 or now < NO_SPREAD * first):
        return ""
    return (
        f"All completions of the last {course.count} rollouts earned nearly the same reward (standard deviation "
        f"{now:.3g}): there is nothing to learn from. Try other prompts, or a reward with more steps; a higher "
        "temperature makes completions differ."
    )


def sampler(course: Course) -> str:
    settings, gap = course.settings, course.now("sampler_gap")
    largest = settings.get("max_sampler_gap") or LARGEST_SAMPLER_GAP[kind_of(settings, course.device)]
    if not gap > SAMPLER_GAP * largest:
        return ""
    return (
        f"The sampler's log-probs differ from the trainer's by {gap:.3g} nats on average; the run stops at "
        f"{largest:g}. Is the engine given the weights, and sampled at the run's temperature? If this is rounding, "
        "importance_cap corrects for it."
    )


def kind_of(settings: Mapping[str, Any], device: str) -> str:
    if settings.get("generation") == "vllm":
        return "vllm"
    if (dtype := settings.get("dtype", "auto")) != "auto":
        return dtype
    return "bfloat16" if device.startswith("cuda") and settings.get("lora_r") != 0 else "float32"


def unfinished(course: Course) -> str:
    share = course.now("completions/clipped_fraction")
    if not share > CUT_OFF:
        return ""
    return (
        f"{share:.0%} of the completions never end: the reward judges text that is cut off. Try a higher "
        "max_new_tokens, or charge it by missing_eos_penalty."
    )


def prompts(course: Course) -> str:
    share = course.now("prompts/cut_fraction")
    return f"{share:.0%} of the prompts lose their beginning. Try a higher max_prompt_tokens." if share > CUT else ""


def critic(course: Course) -> str:
    if course.settings.get("critic") == "none" or course.count < LONGEST or not course.now("explained_variance") < 0:
        return ""
    return (
        "The critic explains less of the returns than a constant would (explained variance "
        f"{course.now('explained_variance'):.2g} over the last rollouts). Try another critic_learning_rate."
    )


RULES: tuple[Callable[[Course], str], ...] = (
    bad_steps, kl, spread, entropy, sampler, budget, unfinished, prompts, critic,
)  # fmt: skip
