"""verl's own functions, model forwards and training step on our kernels: the same numbers, the same gradients."""

import functools
import importlib
import os
import subprocess
import sys
import types
from pathlib import Path

import cases
import memory
import processes
import pytest
import tiny
import torch

import safe_kernels
from safe_kernels import TokenStats
from safe_kernels.integrations import verl

pytest.importorskip("verl", reason="verl is not installed: make test-integrations")

FUSED = importlib.import_module("verl.utils.experimental.torch_functional")
CROSS_ENTROPY = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
LOGITS = importlib.import_module("verl.utils.torch_functional")
MODELS = importlib.import_module("verl.models.transformers.monkey_patch")
DISTILLATION = importlib.import_module("verl.trainer.distillation.fsdp.losses")
ENGINE = importlib.import_module("verl.workers.engine.fsdp.transformer_impl")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """How often each of our functions was called."""
    counts = dict.fromkeys(("linear_token_stats", "token_stats"), 0)

    def counted(name, function):
        def call(*arguments, **options):
            counts[name] += 1
            return function(*arguments, **options)

        return call

    for name in counts:
        monkeypatch.setattr(verl, name, counted(name, getattr(safe_kernels, name)))
    yield counts
    verl.revert()


def hold_patched(of_verl, of_ours, case, wrt):
    """By the rule for our functions; in float32 also beside verl's own, which in bfloat16 rounds more than ours."""

    def op(backend, **arguments):
        return of_verl(**arguments) if backend == "verl" else of_ours(**arguments, backend=backend)

    with verl.apply():
        found = cases.hold_to_reference(op, case, "verl", wrt)
    if case[wrt[0]].dtype == torch.float32:
        torch.testing.assert_close(found, cases.evaluate(op, case, "verl", wrt), rtol=1e-5, atol=1e-5)


def fused(hidden, weight, tokens, temperature):
    of_verl = FUSED.FusedLinearForPPO(chunk_size=4)
    return TokenStats(*of_verl.forward(hidden, weight, tokens, temperature=temperature), None, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(11,), (1, 11), (3, 5)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_fused_linear_for_ppo(calls, shape, dtype, temperature):
    case = cases.linear_case(shape, dtype=dtype, reference=None, temperature=temperature)
    hold_patched(fused, safe_kernels.linear_token_stats, case, ("hidden", "weight"))
    assert calls["linear_token_stats"] == 1


@pytest.mark.parametrize("hidden_shape, labels_shape", [((11,), (11,)), ((1, 11), (1, 11)), ((11, 1), (1, 11))])
def test_linear_cross_entropy_is_flat(calls, hidden_shape, labels_shape):
    """Megatron's hidden states are [T, 1, H] beside labels [1, T]. verl's own function runs on GPUs only."""

    def op(backend, hidden, weight, tokens, temperature):
        if backend == "reference":
            return safe_kernels.linear_token_stats(hidden, weight, tokens, temperature=temperature, backend=backend)
        hidden, labels = hidden.view(*hidden_shape, -1), tokens.view(labels_shape)
        return TokenStats(*CROSS_ENTROPY.linear_cross_entropy(hidden, weight, labels, temperature, "none"), None, None)

    with verl.apply():
        cases.hold_to_reference(
            op, cases.linear_case((11,), reference=None, temperature=0.7), "verl", ("hidden", "weight")
        )
    assert calls["linear_token_stats"] == 1


@pytest.mark.parametrize("reduction, size, ours", [("none", 1, True), ("none", 2, False), ("sum", 1, False)])
def test_sharded_vocabularies_and_reductions_stay_with_verl(calls, monkeypatch, reduction, size, ours):
    theirs = []
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: size)
    case = cases.linear_case((11,), reference=None)
    arguments = (case["hidden"], case["weight"], case["tokens"], 0.7, reduction, "a group")
    verl._linear_cross_entropy(lambda *given: theirs.append(given))(*arguments)
    assert calls["linear_token_stats"] == ours
    assert theirs == ([] if ours else [arguments])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(11,), (3, 5)])
@pytest.mark.parametrize("inplace_backward", [True, False])
def test_logprobs_from_logits(calls, shape, dtype, inplace_backward):
    def of_verl(logits, tokens):  # in place needs logits that something computed
        return LOGITS.logprobs_from_logits(logits * 1, tokens, inplace_backward=inplace_backward)

    def of_ours(logits, tokens, backend):
        return safe_kernels.token_stats(logits, tokens, backend=backend).logprob

    hold_patched(of_verl, of_ours, cases.logits_case(shape, dtype=dtype, reference=False), ("logits",))
    assert calls["token_stats"] == 1


def test_logits_that_are_a_leaf_are_not_overwritten():
    case = cases.logits_case(reference=False)
    logits = case["logits"].requires_grad_()
    before = logits.detach().clone()
    with verl.apply():
        LOGITS.logprobs_from_logits(logits, case["tokens"]).sum().backward()
    assert torch.equal(logits.detach(), before)
    assert not torch.equal(logits.grad, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name, options", [("entropy_from_logits", {}), ("entropy_from_logits_with_chunking", {"chunk_size": 4})]
)
def test_entropy_from_logits(calls, name, options, dtype):
    def of_verl(logits):
        return getattr(LOGITS, name)(logits, **options)

    def of_ours(logits, backend):
        return safe_kernels.token_stats(logits, logits.new_zeros(len(logits)).long(), backend=backend).entropy

    case = {"logits": cases.logits_case((11,), dtype=dtype, reference=False)["logits"]}
    hold_patched(of_verl, of_ours, case, ("logits",))
    assert calls["token_stats"] == 1


def test_forbidden_tokens_leave_the_entropy_finite():
    logits = cases.logits_case((5,), reference=False)["logits"]
    logits[:, 3] = -torch.inf
    assert LOGITS.entropy_from_logits(logits).isnan().all()
    with verl.apply():
        assert LOGITS.entropy_from_logits(logits).isfinite().all()


@pytest.mark.slow
def forward_kl_topk(logits, found, chunked):
    """verl's loss, what it logs, and the gradient, for the teacher's `found` ids and log-probs [1, N, K]."""
    settings = types.SimpleNamespace(use_chunked_topk=chunked, chunked_topk_chunk_size=4, log_prob_min_clamp=-3.0)
    packed = (torch.nested.nested_tensor([x[0, :4], x[0, 4:]], layout=torch.jagged) for x in found)
    config, leaf = types.SimpleNamespace(distillation_loss=settings), logits.detach().requires_grad_()
    results = DISTILLATION.compute_forward_kl_topk(leaf, *packed, config, "thd")
    (gradient,) = torch.autograd.grad((results["distillation_losses"] + results["student_mass"]).sum(), leaf)
    return {name: x.detach() for name, x in results.items()} | {"d logits": gradient}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_forward_kl_over_a_teacher_s_best_k(calls, dtype):
    """With `use_chunked_topk=True`. A token of padding may have one id K times."""
    case = cases.logits_case((1, 9), dtype=dtype)
    best = case["ref_logits"].float().log_softmax(-1).topk(5)
    ids = best.indices.clone()
    ids[0, 0] = 0
    exact, theirs = (forward_kl_topk(x, (best.values, ids), True) for x in (case["logits"].double(), case["logits"]))
    with verl.apply():
        forward_kl_topk(case["logits"], (best.values, ids), False)
        assert not any(calls.values())
        ours = forward_kl_topk(case["logits"], (best.values, ids), True)
    assert calls["token_stats"] == 1 and ours["d logits"].dtype == dtype
    assert torch.equal(ours["overlap_count"], theirs["overlap_count"])
    for name in ("distillation_losses", "student_mass", "overlap_token_advantage", "d logits"):
        cases.hold(name, ours[name], theirs[name], exact[name].double(), 37)


def test_the_engine_may_compile_the_entropy(calls):
    """As FSDPEngine does when it is built, if the patch is there by then."""
    logits = cases.logits_case((11,), reference=False)["logits"]
    with verl.apply():
        compiled = torch.compile(LOGITS.entropy_from_logits, dynamic=True)
        torch.testing.assert_close(compiled(logits), LOGITS.entropy_from_logits(logits))


@pytest.mark.parametrize("kernels", ["torch", "liger", "triton"])
def test_a_patched_model_never_has_logits(calls, monkeypatch, kernels):
    """The forward that verl gives a model with use_fused_kernels; its three backends are ours now."""
    tokens = torch.arange(512).remainder(tiny.model().config.vocab_size)[None]
    model = tiny.model(vocab_size=4096)
    monkeypatch.setattr(type(model), "forward", type(model).forward)  # verl replaces it; put back after the test
    MODELS.patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend=kernels)
    with verl.apply(), memory.Allocations() as allocations:
        output = model(input_ids=tokens, temperature=0.7, return_dict=True, use_cache=False)
        (output.log_probs.sum() + output.entropy.sum()).backward()
    assert calls["linear_token_stats"] == 1
    assert allocations.peak < 2 * tokens.numel() * 4096 * 4


def micro_batch(use_fused_kernels, use_remove_padding, calculate_entropy):
    """Three sequences as verl's trainer hands them to an actor."""
    utilities = importlib.import_module("verl.utils.tensordict_utils")
    padding = importlib.import_module("verl.workers.utils.padding")
    draw = torch.Generator().manual_seed(0)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 0]])
    ids = torch.randint(2, 20, mask.shape, generator=draw)
    per_token = {name: torch.randn(3, 5, generator=draw) for name in ("old_log_probs", "advantages", "ref_log_prob")}
    batch = importlib.import_module("tensordict").TensorDict(
        {
            "input_ids": ids,
            "prompts": ids[:, :4],
            "responses": ids[:, 4:],
            "attention_mask": mask,
            "response_mask": mask[:, 4:],
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            **per_token,
        },
        batch_size=3,
    )
    batch = padding.left_right_2_no_padding(batch)
    settings = {"temperature": 0.7, "dp_size": 1, "batch_num_tokens": int(mask[:, 4:].sum()), "global_batch_size": 3}
    switches = {"use_remove_padding": use_remove_padding, "calculate_entropy": calculate_entropy}
    utilities.assign_non_tensor(batch, use_fused_kernels=use_fused_kernels, **switches, **settings)
    return batch


def engine(model):
    """verl's FSDP engine around a model on one CPU, without what its set-up builds for many GPUs."""
    made = ENGINE.FSDPEngineWithLMHead.__new__(ENGINE.FSDPEngineWithLMHead)
    made.module, made.pad_to_length, made.ulysses_sequence_parallel_size = model, False, 1
    made.use_ulysses_sp, made._autocast_dtype, made.get_data_parallel_group = False, torch.float32, lambda: None
    made.engine_config = types.SimpleNamespace(entropy_checkpointing=False, entropy_from_logits_with_chunking=False)
    made.compute_entropy_from_logits = LOGITS.entropy_from_logits
    return made


def training_step(monkeypatch, *switches):
    """Loss and gradients of verl's PPO loss, from its micro-batch to its backward."""
    losses = importlib.import_module("verl.workers.utils.losses")
    config = importlib.import_module("verl.workers.config").ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, use_kl_loss=True, entropy_coeff=0.01
    )
    model = tiny.model()
    with monkeypatch.context() as patch:
        patch.setattr(ENGINE, "get_device_id", lambda: "cpu")
        patch.setattr(ENGINE, "get_device_name", lambda: "cpu")
        patch.setattr(type(model), "forward", type(model).forward)  # verl replaces it; put back after the step
        MODELS.patch_forward_with_backends(model, use_fused_kernels=switches[0], fused_kernels_backend="torch")
        loss, _ = engine(model).forward_step(
            micro_batch(*switches), functools.partial(losses.ppo_loss, config), forward_only=False
        )
    loss.backward()
    return {"loss": loss.detach()} | {f"d {name}": p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "switches, called",
    [
        ((True, True, True), {"linear_token_stats": 1, "token_stats": 0}),
        ((False, True, True), {"linear_token_stats": 0, "token_stats": 2}),
        ((False, True, False), {"linear_token_stats": 0, "token_stats": 1}),
        ((False, False, True), {"linear_token_stats": 0, "token_stats": 2}),
    ],
    ids=["hidden states", "packed logits", "packed logits in place", "padded logits"],
)
def test_a_training_step_of_verl(calls, monkeypatch, switches, called):
    theirs = training_step(monkeypatch, *switches)
    assert not any(calls.values())
    with verl.apply():
        ours = training_step(monkeypatch, *switches)
    assert calls == called
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def fsdp_step():
    """Log-probs and gradients without and with the patch, of a model that FSDP2 has cut as verl's engine does."""
    fully_shard = importlib.import_module("torch.distributed.fsdp").fully_shard
    torch.distributed.init_process_group("gloo")
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    draw = torch.Generator().manual_seed(torch.distributed.get_rank())
    ids, found = torch.randint(2, 20, (1, 12), generator=draw), []
    for _ in range(2):
        model = tiny.model()
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh)
        MODELS.patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")
        output = model(input_ids=ids, temperature=0.7, return_dict=True, use_cache=False)
        (output.log_probs.sum() + output.entropy.sum()).backward()
        gradients = {f"d {name}": p.grad.full_tensor().tolist() for name, p in model.named_parameters()}
        found.append({"logprob": output.log_probs.tolist(), **gradients})
        verl.apply()
    return found


@pytest.mark.slow
def test_a_head_that_fsdp_has_cut_is_whole_in_the_forward():
    for outcome in processes.run(fsdp_step, 2, seconds=300):
        assert not outcome.error, outcome.error
        plain, patched = outcome.result
        assert plain["d lm_head.weight"] != patched["d lm_head.weight"]  # other bits: it is another function
        for name, x in patched.items():
            torch.testing.assert_close(torch.tensor(x), torch.tensor(plain[name]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("switch, applied", [(None, 0), ("0", 0), ("1", 1)])
def test_the_plugin_acts_when_it_is_asked_to(monkeypatch, switch, applied):
    times = []
    monkeypatch.setattr(verl, "apply", lambda: times.append(1))
    monkeypatch.delenv("SAFE_KERNELS_VERL", raising=False)
    if switch is not None:
        monkeypatch.setenv("SAFE_KERNELS_VERL", switch)
    load_plugin(monkeypatch)
    assert len(times) == applied


def test_a_plugin_that_fails_says_so(monkeypatch):
    """verl drops the errors of plugins without a word."""

    def fail():
        raise RuntimeError("another library has replaced it")

    monkeypatch.setattr(verl, "apply", fail)
    monkeypatch.setenv("SAFE_KERNELS_VERL", "1")
    with pytest.warns(UserWarning, match="no effect: another library"), pytest.raises(RuntimeError):
        load_plugin(monkeypatch)


def load_plugin(monkeypatch):
    name = "safe_kernels.integrations.verl_plugin"
    monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.import_module(name)


@pytest.mark.slow
def test_verl_loads_the_plugin_that_is_declared(tmp_path):
    """In a new process, by the entry point of pyproject.toml, while verl itself is half imported."""
    root = Path(__file__).parents[1]
    section = (root / "pyproject.toml").read_text().split('[project.entry-points."verl.plugins"]')[1]
    name, module = section.splitlines()[1].replace('"', "").split(" = ")
    metadata = tmp_path / "declared-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: declared\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(f"[verl.plugins]\n{name} = {module}\n")
    environment = {**os.environ, "SAFE_KERNELS_VERL": "1", "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    script = "import verl.utils.torch_functional as f; print(f.entropy_from_logits.__module__)"
    printed = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert printed.stdout.split()[-1] == "safe_kernels.integrations.verl"
