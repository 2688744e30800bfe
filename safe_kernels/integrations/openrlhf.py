"""OpenRLHF on these kernels: `python -m safe_kernels.integrations.openrlhf train_ppo_ray ...` instead of
`python -m openrlhf.cli.train_ppo_ray ...`, or `apply()` in each process that runs an `Actor`.

`Actor.forward` gets log-probs and entropy from the hidden states, inside its model's own call of the head: float32
logits are never made, and the hooks that gather a sharded head around that call (ZeRO-3) gather it for us too, in
the forward and in the backward. OpenRLHF still runs these calls, with our functions of logits in them:

- those that ask for the logits themselves, or bring images;
- a head that is not a plain Linear layer (LoRA on it, 4 bits, tensor parallel), or that others have wrapped;
- a model that changes its logits after the head (Gemma 2, Cohere, Granite): its first call finds out, and warns;
- an engine compiled by DeepSpeed.

As in OpenRLHF, the temperature divides the logits of both the log-probs and the entropy.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.util
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from safe_kernels import linear_token_stats, token_stats
from safe_kernels.integrations.patch import Patch, Replacement

ACTOR, UTILS = "openrlhf.models.actor", "openrlhf.models.utils"


def _actor_forward(original: Any) -> Callable[..., Any]:
    change_logits: WeakSet[nn.Module] = WeakSet()  # models whose logits are not what their head returned

    def forward(
        self: Any,
        sequences: Tensor,
        action_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_output: bool = False,
        allgather_logits: bool = False,
        return_logprobs: bool = False,
        ring_attn_group: Any = None,
        packed_seq_lens: list[int] | None = None,
        return_entropy: bool = False,
        **mm_inputs: Any,
    ) -> Any:
        """Log-probs of the actions [B, A], or of every token but the first [B, T - 1] with `return_logprobs`.

        With `return_output` also the model's output, whose `logits` are None, and whose `entropy` is [B, T - 1] with
        `return_entropy`.
        """
        theirs = functools.partial(
            original,
            self,
            sequences,
            action_mask,
            attention_mask,
            return_output,
            allgather_logits,
            return_logprobs,
            ring_attn_group,
            packed_seq_lens,
            return_entropy,
            **mm_inputs,
        )
        model = getattr(self.model, "module", self.model)  # inside DeepSpeed's engine
        head = model.get_output_embeddings()
        wants_logits = (action_mask is None and not return_logprobs) or (return_entropy and not return_output)
        images = bool(mm_inputs) or getattr(self, "is_vlm", False)
        compiled = getattr(self.model, "is_compiled", False)
        if wants_logits or images or compiled or not _is_plain_linear(head) or model in change_logits:
            return theirs()
        inputs, labels, whole = _layout(self.packing_samples, sequences, attention_mask, ring_attn_group)
        with _head_returns_statistics(head, labels, self.temperature) as returned:
            output = self.model(**inputs)
        if not _is_untouched(output["logits"], returned):
            change_logits.add(model)
            name = type(model).__name__
            warnings.warn(f"safe_kernels leaves {name} to OpenRLHF: it changes its logits after the head", stacklevel=2)
            return theirs()
        logprob, entropy = output["logits"].unbind(-1)
        output["logits"] = None
        if return_entropy:
            output.entropy = whole(entropy)[:, :-1]
        logprob = whole(logprob)[:, :-1]
        if action_mask is not None:
            logprob = logprob[:, -action_mask.shape[1] :] * action_mask.float()
        return (logprob, output) if return_output else logprob

    return forward


def _is_plain_linear(head: nn.Module | None) -> bool:
    return type(head) is nn.Linear and "forward" not in vars(head)


def _layout(
    packing: bool, sequences: Tensor, attention_mask: Any, ring_attn_group: Any
) -> tuple[dict[str, Any], Tensor, Callable[[Tensor], Tensor]]:
    """The model's arguments, the token that each position predicts, and the function that makes a result [B, T]."""
    if not packing:
        position_ids = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
        inputs = {"input_ids": sequences, "attention_mask": attention_mask, "position_ids": position_ids}
        return inputs, sequences.roll(-1, dims=1), lambda x: x
    actor = importlib.import_module(ACTOR)
    packed, position_ids, labels, padding, indices = actor.unpad_and_slice_tensor(
        sequences, attention_mask, ring_attn_group
    )

    def whole(x: Tensor) -> Tensor:
        return actor.gather_and_pad_tensor(x, ring_attn_group, padding, indices, *sequences.shape)

    return {"input_ids": packed, "attention_mask": None, "position_ids": position_ids}, labels, whole


@contextmanager
def _head_returns_statistics(head: nn.Linear, labels: Tensor, temperature: float) -> Iterator[list[Tensor]]:
    """Inside, the head returns log-prob and entropy [..., 2] instead of logits. Yields a list of its results."""
    returned: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        stats = linear_token_stats(hidden, head.weight, labels, bias=head.bias, temperature=temperature)
        returned.append(torch.stack((stats.logprob, stats.entropy), -1))
        return returned[-1]

    head.forward = forward  # type: ignore[assignment, method-assign]
    try:
        yield returned
    finally:
        del head.forward


def _is_untouched(logits: Tensor, returned: list[Tensor]) -> bool:
    """Whether the model's logits are what its head returned, in one call: the same memory, written once."""
    same_memory = [x.data_ptr() for x in returned] == [logits.data_ptr()]
    return same_memory and (logits.is_inference() or logits._version == 0)


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """[...] of logits [..., V], which are left as they are: OpenRLHF's own divides them by the temperature."""
    return token_stats(logits, labels, temperature=temperature).logprob


def compute_entropy(logits: Tensor) -> Tensor:
    any_token = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_stats(logits, any_token).entropy


FORWARD = (
    "sequences",
    "action_mask",
    "attention_mask",
    "return_output",
    "allgather_logits",
    "return_logprobs",
    "ring_attn_group",
    "packed_seq_lens",
    "return_entropy",
    "mm_inputs",
)

PATCH = Patch(
    "openrlhf",
    [
        Replacement(ACTOR, "Actor.forward", [FORWARD], _actor_forward),
        Replacement(
            UTILS,
            "log_probs_from_logits",
            [("logits", "labels", "temperature")],
            lambda original: log_probs_from_logits,
        ),
        Replacement(UTILS, "compute_entropy", [("logits",)], lambda original: compute_entropy),
    ],
    oldest="0.11.1",  # before it the temperature did not divide the logits of the entropy, with the same signatures
)
PATCHES, apply, revert = (PATCH,), PATCH.apply, PATCH.revert


class _AfterImport(importlib.abc.MetaPathFinder):
    """Applies the patch when `openrlhf.models` has been imported."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "openrlhf.models":
            return None
        sys.meta_path.remove(self)
        spec: Any = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            apply()

        spec.loader.exec_module = exec_module
        return spec


def apply_when_imported() -> None:
    """Apply the patch once OpenRLHF's models are imported: they import DeepSpeed, which vLLM's workers must not."""
    if "openrlhf.models" in sys.modules:
        apply()
    else:
        sys.meta_path.insert(0, _AfterImport())


def main() -> None:
    """Apply the patch here and in the workers of Ray, then run OpenRLHF's command."""
    commands = ("train_dpo", "train_ppo_ray", "train_sft")
    place = 2 if sys.argv[1:2] and sys.argv[1].startswith("--local_rank") else 1  # DeepSpeed's launcher puts it first
    if sys.argv[place : place + 1] not in [[command] for command in commands]:
        sys.exit(
            "usage: python -m safe_kernels.integrations.openrlhf COMMAND [arguments of openrlhf.cli.COMMAND]\n"
            f"COMMAND is one of {', '.join(commands)}"
        )
    command, name = sys.argv.pop(place), "safe_kernels.integrations.openrlhf"  # as a script, this module is __main__
    importlib.import_module(name).apply_when_imported()
    if command == "train_ppo_ray":
        ray: Any = importlib.import_module("ray")
        ray.init = _with_setup_hook(ray.init, f"{name}.apply_when_imported")
    runpy.run_module(f"openrlhf.cli.{command}", run_name="__main__", alter_sys=True)


def _with_setup_hook(init: Callable[..., Any], hook: str) -> Callable[..., Any]:
    def init_with_hook(*arguments: Any, runtime_env: dict[str, Any] | None = None, **options: Any) -> Any:
        own = (runtime_env or {}).get("worker_process_setup_hook")
        if own not in (None, hook):
            raise ValueError(
                f"ray.init has the worker_process_setup_hook {own!r}; it must be {hook}, which may call it"
            )
        return init(*arguments, runtime_env={**(runtime_env or {}), "worker_process_setup_hook": hook}, **options)

    return init_with_hook


if __name__ == "__main__":
    main()
