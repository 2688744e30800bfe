"""OpenRLHF's `Actor` and its functions on our kernels: the same numbers, gradients and training, without logits."""

import contextlib
import importlib
import importlib.util
import os
import runpy
import subprocess
import sys
import textwrap
import types
import warnings
from pathlib import Path

import cases
import memory
import processes
import pytest
import tiny
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import safe_kernels
from safe_kernels.integrations import openrlhf

pytest.importorskip("openrlhf", reason="OpenRLHF is not installed: make test-integrations")

SEQUENCES = torch.randint(2, 20, (3, 9), generator=torch.Generator().manual_seed(0))
ATTENTION = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0, 0, 0, 0]])
ACTIONS = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]])


def flash_attn():
    """What OpenRLHF imports of flash-attn, which is built for GPUs only; in plain PyTorch."""

    def unpad_input(x, mask):
        lengths = mask.sum(-1)
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        indices = mask.flatten().nonzero().flatten()
        return x.flatten(0, 1)[indices], indices, bounds, int(lengths.max()), lengths

    def pad_input(x, indices, batch, length):
        empty = x.new_zeros(batch * length, *x.shape[1:])
        return empty.index_put((indices,), x).unflatten(0, (batch, length))

    def all_gather(x, group):
        return torch.cat(torch.distributed.nn.functional.all_gather(x, group))

    padding = {"index_first_axis": lambda x, i: x[i], "rearrange": lambda x, _: x.flatten(0, 1)}
    return {
        "flash_attn": {},
        "flash_attn.utils": {},
        "flash_attn.bert_padding": {**padding, "pad_input": pad_input, "unpad_input": unpad_input},
        "flash_attn.utils.distributed": {"all_gather": all_gather},
    }


def import_actor():
    """openrlhf.models.actor; where flash-attn is not installed, beside one that only it sees."""
    if "openrlhf.models.actor" in sys.modules or importlib.util.find_spec("flash_attn"):
        return importlib.import_module("openrlhf.models.actor")
    for name in ("deepspeed", "peft", "transformers.integrations.deepspeed"):  # these look for flash-attn
        importlib.import_module(name)
    for name, functions in flash_attn().items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(functions)
    try:
        return importlib.import_module("openrlhf.models.actor")
    finally:
        for name in flash_attn():
            del sys.modules[name]


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """How often each of our functions was called. OpenRLHF compiles its entropy, which would take half a minute."""
    import_actor()
    counts = {}
    for name in ("linear_token_stats", "token_stats"):
        monkeypatch.setattr(openrlhf, name, counted(counts, name))
    with torch.compiler.set_stance("force_eager"):
        yield counts
    openrlhf.revert()


def counted(counts, name):
    counts[name] = 0

    def call(*arguments, **options):
        counts[name] += 1
        return getattr(safe_kernels, name)(*arguments, **options)

    return call


def actor(model, packing=False, temperature=0.7):
    """As OpenRLHF loads it; given a model, its constructor leaves out what is set here."""
    made = import_actor().Actor(model, temperature=temperature)
    made.packing_samples, made.model.config.use_cache = packing, False
    return made


OPTIONS = {
    "actions": {"action_mask": ACTIONS},
    "actions and entropy": {"action_mask": ACTIONS, "return_output": True, "return_entropy": True},
    "every token": {"return_logprobs": True},
    "every token and entropy": {"return_logprobs": True, "return_output": True, "return_entropy": True},
}


def step(actor, options, group=None):
    """Log-probs, entropy if asked for, and the gradients of a random sum of them."""
    actor.zero_grad()
    found = actor(SEQUENCES, attention_mask=ATTENTION, ring_attn_group=group, **options)
    logprob, output = found if options.get("return_output") else (found, None)
    fields = {"logprob": logprob} | ({"entropy": output.entropy} if options.get("return_entropy") else {})
    return fields | gradients(actor.model, fields)


def gradients(model, fields):
    draw = torch.Generator().manual_seed(7)
    sum((x * torch.randn(x.shape, generator=draw).to(x)).sum() for x in fields.values()).backward()
    return {f"d {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def exact(model, options, packing):
    """The same in float64, from logits."""
    model = model.double()
    model.zero_grad()
    positions = (ATTENTION.cumsum(1) - 1).masked_fill(ATTENTION == 0, 1)
    logits = model(SEQUENCES, attention_mask=ATTENTION, position_ids=positions).logits[:, :-1]
    stats = safe_kernels.token_stats(logits, SEQUENCES[:, 1:], temperature=0.7, backend="reference")
    exists = ATTENTION[:, :-1] if packing else 1
    fields = {"logprob": stats.logprob * exists}
    if "action_mask" in options:
        fields["logprob"] = fields["logprob"][:, -ACTIONS.shape[1] :] * ACTIONS
    if options.get("return_entropy"):
        fields["entropy"] = stats.entropy * exists
    return fields | gradients(model, fields)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward(calls, options, packing, dtype):
    model = tiny.model().to(dtype)
    plain = step(actor(model, packing), options)
    with openrlhf.apply():
        found = step(actor(model, packing), options)
    assert calls == {"linear_token_stats": 1, "token_stats": 0}
    assert found.keys() == plain.keys()
    truth = exact(model, options, packing)
    for name, x in found.items():
        assert x.dtype == plain[name].dtype and x.shape == plain[name].shape, name
        cases.hold(name, x.detach(), plain[name].detach(), truth[name].detach(), model.config.vocab_size)
    if dtype == torch.float32:
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


def test_float32_logits_are_never_made():
    """Log-probs of a batch take less memory than its logits; more than twice the logits without the patch."""
    length, vocabulary = 1024, 32768
    sequences, options = torch.arange(length)[None], OPTIONS["every token and entropy"]
    peaks = []
    for patch in (contextlib.nullcontext(), openrlhf.PATCH):
        model = tiny.model(vocab_size=vocabulary)
        with patch, memory.Allocations() as allocations:
            logprob, output = actor(model)(sequences, attention_mask=torch.ones_like(sequences), **options)
            logprob.sum().backward()
        peaks.append(allocations.peak / (length * vocabulary * 4))
    assert output.logits is None
    assert peaks[0] > 2 > 1 > peaks[1]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_functions_of_logits(calls, temperature, dtype):
    utils, case = importlib.import_module("openrlhf.models.utils"), cases.logits_case((3, 7), dtype=dtype)

    def op(backend, logits, tokens):
        if backend == "reference":
            stats = safe_kernels.token_stats(logits, tokens, temperature=temperature, backend=backend)
            entropy = safe_kernels.token_stats(logits, tokens, backend=backend).entropy
            return safe_kernels.TokenStats(stats.logprob, entropy, None, None)
        entropy = utils.compute_entropy(logits)
        logprob = utils.log_probs_from_logits(logits * 1, tokens, temperature)  # it divides in place
        return safe_kernels.TokenStats(logprob, entropy, None, None)

    case = {name: case[name] for name in ("logits", "tokens")}
    with openrlhf.apply():
        found = cases.hold_to_reference(op, case, "openrlhf", ("logits",))
    assert calls["token_stats"] == 2
    if dtype == torch.float32:
        torch.testing.assert_close(found, cases.evaluate(op, case, "openrlhf", ("logits",)), rtol=1e-5, atol=1e-5)


def with_lora(target):
    peft = importlib.import_module("peft")
    model = peft.get_peft_model(tiny.model(), peft.LoraConfig(target_modules=[target], r=2, init_lora_weights=False))
    return actor(model)


def with_a_compiled_engine():
    made = actor(tiny.model())
    made.model.is_compiled = True
    return made


def with_a_wrapped_head():
    made = actor(tiny.model())
    linear = made.model.lm_head.forward
    made.model.lm_head.forward = lambda hidden: linear(hidden) + 1
    return made


def with_images():
    made = actor(tiny.model())
    made.is_vlm = True
    return made


THEIRS = {
    "LoRA on the head": lambda: with_lora("lm_head"),
    "compiled engine": with_a_compiled_engine,
    "wrapped head": with_a_wrapped_head,
    "images": with_images,
}


@pytest.mark.parametrize("make", THEIRS.values(), ids=THEIRS)
def test_what_stays_with_openrlhf(calls, make):
    options = OPTIONS["actions and entropy"]
    plain = step(make(), options)
    with openrlhf.apply():
        found = step(make(), options)
    assert calls == {"linear_token_stats": 0, "token_stats": 2}
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


def test_a_call_for_logits_gets_them(calls):
    made, options = actor(tiny.model()), {"return_output": True, "return_entropy": True}
    plain = made(SEQUENCES, attention_mask=ATTENTION, **options)
    with openrlhf.apply():
        found = made(SEQUENCES, attention_mask=ATTENTION, **options)
    assert calls == {"linear_token_stats": 0, "token_stats": 1}
    torch.testing.assert_close(found.logits, plain.logits)
    torch.testing.assert_close(found.entropy, plain.entropy)


SIZES = {
    "vocab_size": 22,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


class InPlace(LlamaForCausalLM):
    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        output.logits.mul_(0.5)
        return output


@pytest.mark.parametrize(
    "make",
    [
        lambda: InPlace(LlamaConfig(**SIZES)),
        lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=2.0)),
        lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.5)),
    ],
    ids=["in place", "softcap", "scale"],
)
def test_logits_that_change_after_the_head_are_found_out_once(calls, make):
    torch.manual_seed(0)
    made, options = actor(make().eval()), OPTIONS["actions and entropy"]
    plain = step(made, options)
    with openrlhf.apply():
        with pytest.warns(UserWarning, match="to OpenRLHF: it changes its logits"):
            first = step(made, options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            second = step(made, options)
    assert calls == {"linear_token_stats": 1, "token_stats": 4}
    for found in (first, second):
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


def with_experts():
    torch.manual_seed(0)
    return actor(MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True)).eval())


def test_the_router_loss_of_experts_is_kept(calls):
    made, options = with_experts(), {"return_logprobs": True, "return_output": True}
    _, plain = made(SEQUENCES, attention_mask=ATTENTION, **options)
    with openrlhf.apply():
        _, found = made(SEQUENCES, attention_mask=ATTENTION, **options)
    assert calls["linear_token_stats"] == 1
    assert found.aux_loss.requires_grad
    torch.testing.assert_close(found.aux_loss, plain.aux_loss)


def test_with_gradient_checkpointing(calls):
    made, options = actor(tiny.model().train()), OPTIONS["actions and entropy"]
    plain = step(made, options)
    made.gradient_checkpointing_enable()
    with openrlhf.apply():
        found = step(made, options)
    assert calls["linear_token_stats"] == 1
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: actor(tiny.model()), lambda: with_lora("q_proj")], ids=["whole", "LoRA"])
def test_training_is_the_same(calls, make):
    """OpenRLHF's policy loss and an entropy bonus, for as many steps as it takes to move the policy."""

    def train():
        made, losses = make(), []
        optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
        policy_loss = importlib.import_module("openrlhf.models").PolicyLoss()
        advantages = torch.randn(ACTIONS.shape, generator=torch.Generator().manual_seed(1))
        old = None
        for _ in range(5):
            logprob, output = made(SEQUENCES, ACTIONS, ATTENTION, return_output=True, return_entropy=True)
            old = logprob.detach() if old is None else old
            bonus = (output.entropy[:, -ACTIONS.shape[1] :] * ACTIONS).sum() / ACTIONS.sum()
            loss = policy_loss(logprob, old, advantages, action_mask=ACTIONS)[0] - 0.01 * bonus
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, logprob.detach(), old

    plain, logprob_plain, _ = train()
    with openrlhf.apply():
        found, logprob, old = train()
    assert calls["linear_token_stats"] == 5
    assert (logprob - old).abs().max() > 0.1
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logprob, logprob_plain, rtol=1e-3, atol=1e-3)


def test_the_command_reaches_the_workers_of_ray(monkeypatch):
    """Beside what OpenRLHF itself gives to ray.init."""
    ray, given = pytest.importorskip("ray"), []
    monkeypatch.setattr(ray, "init", lambda **options: given.append(options))
    monkeypatch.setattr(openrlhf, "apply", lambda: given.append("applied"))
    monkeypatch.setattr(runpy, "run_module", lambda name, **_: given.append(name) or ray.init(runtime_env={"a": 1}))
    monkeypatch.setattr(sys, "argv", ["openrlhf.py", "train_ppo_ray", "--option"])
    openrlhf.main()
    hook = {"worker_process_setup_hook": "safe_kernels.integrations.openrlhf.apply_when_imported"}
    assert given == ["applied", "openrlhf.cli.train_ppo_ray", {"runtime_env": {"a": 1, **hook}}]
    assert sys.argv == ["openrlhf.py", "--option"]


def test_an_unknown_command_is_refused(monkeypatch):
    for arguments in (["train_rm"], [], ["--local_rank=0"]):
        monkeypatch.setattr(sys, "argv", ["openrlhf.py", *arguments])
        with pytest.raises(SystemExit, match="train_dpo, train_ppo_ray, train_sft"):
            openrlhf.main()


def test_the_command_starts_under_the_launcher_of_deepspeed(monkeypatch):
    """Which puts the rank before the arguments."""
    given = []
    monkeypatch.setattr(openrlhf, "apply_when_imported", lambda: given.append("applied"))
    monkeypatch.setattr(runpy, "run_module", lambda name, **_: given.append(name))
    monkeypatch.setattr(sys, "argv", ["openrlhf.py", "--local_rank=3", "train_sft", "--option"])
    openrlhf.main()
    assert given == ["applied", "openrlhf.cli.train_sft"]
    assert sys.argv == ["openrlhf.py", "--local_rank=3", "--option"]


@pytest.mark.slow
def test_a_process_that_imports_no_model_imports_no_deepspeed():
    """In a new process: nothing of OpenRLHF at first, and the patch as soon as its models are there."""
    script = """
        import sys, test_openrlhf
        from safe_kernels.integrations import openrlhf
        openrlhf.apply_when_imported()
        print([name for name in ("openrlhf.models", "deepspeed") if name in sys.modules], openrlhf.PATCH.replaced)
        test_openrlhf.import_actor()
        print(len(openrlhf.PATCH.replaced), sys.modules["openrlhf.models"].Actor.forward.__module__)
    """
    path = os.pathsep.join(str(folder) for folder in (Path(__file__).parent, Path(__file__).parents[1]))
    run = [sys.executable, "-c", textwrap.dedent(script)]
    printed = subprocess.run(
        run, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert [line for line in printed if "[WARNING]" not in line] == ["[] []", "3 safe_kernels.integrations.openrlhf"]


def in_a_process_of_a_group():
    """Counts of our calls, in a process that imports everything anew."""
    import_actor()
    torch.compiler.set_stance("force_eager")
    counts = {}
    openrlhf.linear_token_stats = counted(counts, "linear_token_stats")
    return counts


def values(tensors):
    return {name: x.detach().tolist() for name, x in tensors.items()}


def hold_close(found, expected):
    for name, x in found.items():
        torch.testing.assert_close(torch.tensor(x), torch.tensor(expected[name]), rtol=1e-4, atol=1e-5)


def of_both_processes(function):
    """[(plain, patched, our calls)] of function() in each of two processes."""
    outcomes = processes.run(function, 2, seconds=300)
    assert not any(x.error for x in outcomes), outcomes
    return [x.result for x in outcomes]


def zero_3():
    """Policies after two steps of an engine that keeps half of each weight on a process."""
    counts, deepspeed = in_a_process_of_a_group(), importlib.import_module("deepspeed")
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # a C++ extension that is built on first use
    deepspeed.init_distributed(dist_backend="gloo")
    plain = zero_3_steps(deepspeed)
    with openrlhf.apply():
        return plain, zero_3_steps(deepspeed), counts["linear_token_stats"]


def zero_3_steps(deepspeed):
    made, rank = actor(tiny.model()), torch.distributed.get_rank()
    limits = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
    made.model, *_ = deepspeed.initialize(
        model=made.model,
        optimizer=torch.optim.SGD(made.model.parameters(), lr=0.1),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 3} | {f"stage3_{name}": 0 for name in limits},
        },
    )
    assert made.model.module.lm_head.weight.numel() == 0
    for _ in range(2):
        mine = (x[rank : rank + 1] for x in (SEQUENCES, ACTIONS, ATTENTION))
        logprob, output = made(*mine, return_output=True, return_entropy=True)
        made.model.backward(-logprob.mean() - 0.1 * output.entropy.mean())
        made.model.step()
    parameters = dict(made.model.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        return values(parameters)


@pytest.mark.slow
def test_a_head_that_zero_3_has_partitioned_is_gathered_for_us():
    """DeepSpeed itself: outside its module's call, the head is empty."""
    before = values(dict(tiny.model().named_parameters()))
    for plain, patched, calls in of_both_processes(zero_3):
        assert calls == 2
        hold_close(patched, plain)
        with pytest.raises(AssertionError, match="not close"):
            hold_close({"lm_head.weight": patched["lm_head.weight"]}, before)


def ring():
    """Steps with the tokens of each sequence spread over the processes, of a model without attention."""
    counts = in_a_process_of_a_group()
    sys.modules["openrlhf.models.ring_attn_utils"].update_ring_attn_params = lambda _: None  # of ring-flash-attn
    torch.distributed.init_process_group("gloo")
    made, options = actor(tiny.model(num_hidden_layers=0), packing=True), OPTIONS["every token and entropy"]
    plain = step(made, options, torch.distributed.group.WORLD)
    with openrlhf.apply():
        patched = step(made, options, torch.distributed.group.WORLD)
    return values(plain), values(patched), counts["linear_token_stats"]


@pytest.mark.slow
def test_ring_attention_gathers_the_tokens_of_all_processes():
    alone = values(step(actor(tiny.model(num_hidden_layers=0), packing=True), OPTIONS["every token and entropy"]))
    for plain, patched, calls in of_both_processes(ring):
        assert calls == 1
        hold_close(patched, plain)
        hold_close({name: patched[name] for name in ("logprob", "entropy")}, alone)
