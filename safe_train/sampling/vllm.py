"""Sampling by vLLM, in the trainer's process and on its GPU (`generation: vllm`, the extra `safe-kernels[vllm]`).

Each rollout wakes the engine, writes the policy's weights into it, samples, and puts it to sleep again, so that the
update has the GPU's memory to itself. The calls are those of vLLM's offline class `LLM`:

- `apply_model(function)` runs a function on the engine's model; its `load_weights` takes (name, tensor) pairs as a
  checkpoint has them. https://docs.vllm.ai/en/stable/api/vllm/entrypoints/llm/
- `sleep` and `wake_up` give the GPU's memory back and take it again. https://docs.vllm.ai/en/stable/features/sleep_mode/
- `VLLM_ENABLE_V1_MULTIPROCESSING=0` keeps the engine in this process, so tensors are handed over without a copy.
  https://docs.vllm.ai/en/stable/usage/reproducibility/

Checked against a stand-in with this interface; it has not been run with vLLM itself. Under FSDP2 and DDP each rank has
an engine of its own. For dense models without quantisation: their parameters are named and laid out as in checkpoints.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from safe_kernels import KeptIds
from safe_train import parallel
from safe_train.config import ConfigError, SafeConfig
from safe_train.data.batches import TokenBatch
from safe_train.data.prompts import Prompt
from safe_train.models.adapters import is_cut_up, is_wrapper
from safe_train.models.policy import Policy
from safe_train.models.scoring import logprobs
from safe_train.sampling.rollout import Rollout, end_tokens, filters_of
from safe_train.settings.limits import PAPER

# Nats on average between two ways to compute the same log-probs. Rounding makes 0.04 of it in bfloat16 and 1e-5 in
# float32; one matrix or norm of two layers that is left out makes 0.6 to 2.2.
MAX_GAP = {torch.float32: 0.02, torch.bfloat16: 0.2, torch.float16: 0.2}


class VLLMSampler:
    """Samples from the policy as it is when called; see `safe_train.sampling.samplers.make_sampler`."""

    def __init__(self, policy: Policy, tokenizer: Any, args: SafeConfig):
        check_merging(policy)
        self.policy, self.tokenizer, self.args = policy, tokenizer, args
        self.weights_are_checked = False
        self.vllm = import_vllm()
        if returns_sets(args):
            check_sets(self.vllm)
        self.engine = start_engine(self.vllm, policy, args)
        self.sleep()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], greedy: bool = False) -> Rollout:
        eos_ids = end_tokens(self.policy, self.tokenizer, self.args)
        # One seed a completion, from the run's own random numbers: a resumed run samples the same.
        seeds = torch.randint(2**31, (len(prompts),)).tolist()
        with self.awake():
            requests = self.engine.generate(
                [{"prompt_token_ids": prompt.ids} for prompt in prompts],
                [self.sampling_params(eos_ids, seed, greedy) for seed in seeds],
                use_tqdm=False,
            )
        outputs = [request.outputs[0] for request in requests]
        tokens = [list(output.token_ids) for output in outputs]
        logprobs = [token_logprobs(output) for output in outputs]
        rollout = Rollout.build(
            *(self.tokenizer, prompts, tokens, logprobs, eos_ids),
            skip_special_tokens=self.args.reward_skip_special_tokens,
            kept=[sampled_from(output) for output in outputs] if returns_sets(self.args) and not greedy else (),
        )
        for output, completion, ended in zip(outputs, rollout.completions, rollout.ended, strict=True):
            if not ended and len(completion) < self.args.max_new_tokens:
                raise RuntimeError(
                    f"vLLM stopped a completion after {len(completion)} of {self.args.max_new_tokens} tokens without "
                    f"an end token {eos_ids} (finish reason {output.finish_reason!r}, last tokens {completion[-5:]})"
                )
        if not self.weights_are_checked:
            check_weights(self.policy, rollout)
            self.weights_are_checked = True
        return rollout

    def sampling_params(self, eos_ids: list[int], seed: int, greedy: bool) -> Any:
        args = self.args
        return self.vllm.SamplingParams(
            **self.drawn_from(greedy),
            max_tokens=args.max_new_tokens,
            stop_token_ids=eos_ids,
            logprobs=0,  # of the sampled token alone
            detokenize=False,
            seed=seed,
        )

    def drawn_from(self, greedy: bool) -> dict[str, Any]:
        """With `greedy` temperature 0; an engine that returns sets does not take that, and draws from the best one."""
        if greedy and returns_sets(self.args):
            return {"temperature": self.policy.temperature, "top_k": 1}
        return {"temperature": 0.0 if greedy else self.policy.temperature} | filters_of(self.args)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """The engine with its memory, and with the policy's weights of now."""
        torch.cuda.empty_cache()  # vLLM's memory is not PyTorch's
        self.engine.wake_up()
        try:
            self.engine.apply_model(lambda model: load(model, self.policy))
            self.engine.reset_prefix_cache()
            yield
        finally:
            self.sleep()

    def sleep(self) -> None:
        # Level 2 drops the weights instead of moving them to the CPU, but some models then wake up with other state
        # missing too and write gibberish (vLLM issue 29341).
        self.engine.sleep(level=1)


def import_vllm() -> Any:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise ConfigError(
            f"generation vllm needs a package ({error}): pip install 'safe-kernels[vllm]', or set generation to hf"
        ) from error


def start_engine(vllm: Any, policy: Policy, args: SafeConfig) -> Any:
    """An engine of the policy's architecture, with dummy weights: the first rollout brings the real ones."""
    config = copy.deepcopy(policy.causal_lm.config)
    config.architectures = [type(policy.causal_lm).__name__]
    # One engine a process, within the group of processes that the launcher started.
    backend = {"distributed_executor_backend": "external_launcher"} if parallel.size() > 1 else {}
    device = policy.causal_lm.device
    devices = [device] if device.type == "cuda" else []
    sets = {"return_sampling_mask": True} if returns_sets(args) else {}
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices):  # vLLM seeds the process it runs in
        config.save_pretrained(folder)
        return vllm.LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            generation_config="vllm",
            # Of what is drawn from: with the temperature, and with all that the engine might add. The published
            # algorithms draw from the top k, and score the whole policy.
            logprobs_mode="raw_logprobs" if args.top_k and not sets else "processed_logprobs",
            dtype=str(policy.compute_dtype).removeprefix("torch."),
            seed=args.seed,
            max_model_len=args.max_prompt_tokens + args.max_new_tokens,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            enable_sleep_mode=True,
            trust_remote_code=args.trust_remote_code,
            **backend,
            **sets,
        )


def returns_sets(args: SafeConfig) -> bool:
    """Whether the engine has to say which ids a token was drawn from."""
    return args.top_k > 0 and args.algorithm not in PAPER


def check_sets(vllm: Any) -> None:
    if "return_sampling_mask" not in inspect.signature(vllm.EngineArgs).parameters:
        raise ConfigError(
            f"vLLM {vllm.__version__} does not say which tokens top_k and top_p left, which log-probs within them need "
            "(0.28 does): set top_k 0, or generation hf"
        )


def sampled_from(output: Any) -> KeptIds:
    """Its engine returns them by token, or in one list with offsets."""
    mask = output.sampling_mask
    if (offsets := getattr(mask, "offsets", None)) is not None:
        return KeptIds(torch.as_tensor(mask.token_ids).long(), torch.as_tensor(offsets).long())
    counts = torch.tensor([0, *map(len, mask.token_ids)])
    return KeptIds(torch.tensor([token for ids in mask.token_ids for token in ids]).long(), counts.cumsum(0))


def token_logprobs(output: Any) -> list[float]:
    """The log-prob of each token of a vLLM completion."""
    return [logprobs[token].logprob for token, logprobs in zip(output.token_ids, output.logprobs, strict=True)]


def load(model: Any, policy: Policy) -> None:
    """Writes the policy's weights into vLLM's model, which says what it took (or None, for some architectures)."""
    loaded = model.load_weights(merged_weights(policy))
    missing = sorted({name for name, _ in model.named_parameters()} - loaded) if loaded is not None else []
    if missing:
        raise RuntimeError(
            f"vLLM's {type(model).__name__} got no weights for {len(missing)} of its parameters, such as {missing[0]}; "
            "it names them differently, so set generation to hf for this model"
        )


def merged_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """The policy's parameters under their checkpoint names, one at a time, with all that is trained beside them.

    They are whole: the trainer samples with the policy gathered.
    The policy's own weights keep their bits and addresses: adding and subtracting an adapter would round them.
    """
    model = policy.causal_lm
    wrappers = {name: module for name, module in model.named_modules() if policy.is_lora and is_wrapper(module)}
    inside = tuple(f"{name}." for name in wrappers)
    for name, wrapper in wrappers.items():
        if name.startswith(inside):  # a part of another wrapper
            continue
        with merged(wrapper) as module:
            for part, parameter in module.named_parameters():
                yield f"{name}.{part}", parameter.detach()
    for name, parameter in model.named_parameters():
        if not name.startswith(inside):
            yield name, parameter.detach()


@contextmanager
def merged(wrapper: Any) -> Iterator[nn.Module]:
    """The plain layer that does what the wrapped one does."""
    if hasattr(wrapper, "modules_to_save"):
        yield wrapper.modules_to_save[wrapper.active_adapters[0]]
        return
    layer = getattr(wrapper, "token_adapter", wrapper)
    base = layer.get_base_layer()
    saved = [(parameter, parameter.data) for parameter in base.parameters()]
    try:
        for parameter, data in saved:
            parameter.data = data.clone()
        merge(layer)
        yield base
    finally:
        for parameter, data in saved:
            parameter.data = data
        layer.merged_adapters.clear()


def merge(layer: Any) -> None:
    try:
        layer.merge()
    except (NotImplementedError, RuntimeError) as error:
        raise ConfigError(
            f"generation vllm needs adapters that can be merged into the weights, which peft cannot do here ({error}); "
            "set generation to hf"
        ) from error


def check_merging(policy: Policy) -> None:
    """Refuses adapters that the engine's model has no place for."""
    model = policy.causal_lm
    tied = model.config.get_text_config().tie_word_embeddings
    if policy.is_lora and tied and is_wrapper(model.get_input_embeddings()):
        raise ConfigError(
            "generation vllm cannot take an adapter on embeddings that are tied to the head: vLLM would change the "
            "head with them; leave the embeddings out of the adapter, or set generation to hf"
        )
    if not is_cut_up(model):
        for _ in merged_weights(policy):  # raises where they cannot be merged
            pass


def check_weights(policy: Policy, rollout: Rollout) -> None:
    """Compares the log-probs of the first completions as the engine saw them with the policy's own."""
    rows = sorted(range(len(rollout.completions)), key=lambda i: len(rollout.prompts[i].ids))[:3]
    kept = [rollout.kept[i] for i in rows] if rollout.kept else None
    batch = TokenBatch.pack([rollout.prompts[i].ids for i in rows], [rollout.completions[i] for i in rows], kept)
    batch = batch.to(policy.causal_lm.device)
    hidden_LH = policy(batch)
    own = logprobs(hidden_LH, policy.head(), batch.targets_L, kept=batch.kept).float().cpu()
    limit = MAX_GAP[hidden_LH.dtype]
    seen = torch.tensor([x for i in rows for x in rollout.sampler_logprobs[i]])
    gap = max(parallel.gather_objects((own - seen).abs().mean().item() if len(seen) else 0.0))
    if not gap <= limit:
        raise ConfigError(
            f"the log-probs of vLLM's first completions differ from the policy's by {gap:.3g} nats on average, more "
            f"than the {limit} that rounding explains: vLLM computes {type(policy.causal_lm).__name__} in another way, "
            "or did not take all of its weights; set generation to hf"
        )
