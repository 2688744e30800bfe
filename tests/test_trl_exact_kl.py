"""apply(kl="exact"): TRL's GRPO and RLOO with the KL over the vocabulary, beside the same KL in plain PyTorch."""

import contextlib
import inspect
import itertools
import re

import peft
import pytest
import tiny
import torch

pytest.importorskip("trl", reason="TRL is not installed; it needs Python 3.11: pip install 'safe-kernels[test]'")

import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from trl.trainer import utils  # noqa: E402

from safe_kernels.integrations import trl as patch  # noqa: E402
from safe_kernels.integrations.trl_exact_kl import METHODS  # noqa: E402

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]
BETA, TEMPERATURE = 0.3, 0.9
POLICIES = ["full", "LoRA", "a trained LoRA"]  # the last keeps what it was as the adapter "ref"


@pytest.fixture(autouse=True)
def as_it_was():
    methods = {what.name: getattr(getattr(trl, what.name.split(".")[0]), what.name.split(".")[1]) for what in METHODS}
    function = utils._ChunkedLogProbFunction
    yield
    patch.revert()
    assert utils._ChunkedLogProbFunction is function
    for name, method in methods.items():
        assert getattr(getattr(trl, name.split(".")[0]), name.split(".")[1]) is method


def policy_and_settings(policy, folder):
    base = tiny.model(tie_word_embeddings=policy == "LoRA")
    if not (folder / "config.json").exists():  # another process may be reading it
        base.save_pretrained(folder)
    base.config._name_or_path = str(folder)  # where TRL loads a reference from
    if policy == "full":
        return base, {}
    if policy == "LoRA":
        return base, {"peft_config": peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])}
    return tiny.trained_adapter(base), {}


def trainer_of(kind, folder, policy="full", rows=tiny.PROMPTS[:4], reward=tiny.good_words, model=None, **options):
    model, settings = policy_and_settings(policy, folder) if model is None else (model, {})
    values = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 6,
        "num_iterations": 2,
        "beta": BETA,
        "temperature": TEMPERATURE,
        "learning_rate": 1e-2,
        "max_steps": 3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": 1,
    }
    return getattr(trl, f"{kind}Trainer")(
        model,
        args=getattr(trl, f"{kind}Config")(**values | options),
        reward_funcs=reward,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny.tokenizer(),
        **settings,
    )


def moved(trainer):
    """Away from its reference."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for x in trainer.model.parameters():
            if x.requires_grad:
                x.add_(0.1 * torch.randn(x.shape, generator=draw))
    return trainer


def plain_logits(trainer, inputs, reference=False):
    """[B, C, V], tempered."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    seen = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    context, model = contextlib.nullcontext(), trainer.model
    if reference and trainer.ref_model is not None:
        model = trainer.ref_model
    elif reference:
        context = utils.use_adapter(model, "ref" if "ref" in model.peft_config else None)
    with context:
        logits = model(input_ids=ids, attention_mask=seen).logits
    return logits[:, -inputs["completion_ids"].shape[1] - 1 : -1] / TEMPERATURE


def plain_kl(trainer, inputs):
    """[B, C], through log_softmax."""
    with torch.no_grad():
        logq = plain_logits(trainer, inputs, reference=True).log_softmax(-1)
    logp = plain_logits(trainer, inputs).log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1)


def per_sequence(kl, mask, trainer, inputs):
    return ((kl * mask).sum(-1) / mask.sum(-1)).mean() / trainer.current_gradient_accumulation_steps


def per_batch(kl, mask, trainer, inputs):
    return (kl * mask).sum() / mask.sum() / trainer.current_gradient_accumulation_steps


def per_length(kl, mask, trainer, inputs):
    return (kl * mask).sum() / (len(kl) * 6) / trainer.current_gradient_accumulation_steps


def per_step(kl, mask, trainer, inputs):
    steps = trainer.current_gradient_accumulation_steps / trainer.args.steps_per_generation
    return (kl * mask).sum() / (inputs["num_items_in_batch"] * steps)


def sums(kl, mask, trainer, inputs):
    return (kl * mask).sum(-1).mean() / trainer.current_gradient_accumulation_steps


AGGREGATES = {
    "grpo": per_sequence,
    "sapo": per_sequence,
    "bnpo": per_batch,
    "dr_grpo": per_length,
    "dapo": per_step,
    "cispo": per_step,
    "vespo": per_step,
    "luspo": sums,
}


def test_every_loss_type_of_the_installed_version_is_tested():
    source = inspect.getsource(trl.GRPOTrainer._compute_loss)
    found = re.findall(r"loss_type (?:in \[(.*?)\]|== (\".*?\"))", source)
    assert {name for groups in found for name in re.findall(r"\w+", " ".join(groups))} == set(AGGREGATES)


def loss_and_gradients(trainer, compute):
    trained = {name: x for name, x in trainer.model.named_parameters() if x.requires_grad}
    loss = compute()
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    return {"loss": loss.detach()} | {name: x for name, x in zip(trained, gradients, strict=True) if x is not None}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("loss_type", AGGREGATES)
def test_grpo_has_the_exact_kl_in_its_loss(loss_type, policy, tmp_path):
    """TRL's loss without a KL, plus the KL in plain PyTorch, averaged as that loss type averages."""
    trainer = moved(trainer_of("GRPO", tmp_path, policy, loss_type=loss_type, gradient_accumulation_steps=2))
    trainer.current_gradient_accumulation_steps = 2
    patch.apply(kl="exact")
    trainer.model.train()
    inputs = trainer._prepare_inputs(tiny.PROMPTS[:4] * 2)
    assert "ref_per_token_logps" not in inputs and inputs["completion_mask"].shape == (4, 6)
    inputs["completion_mask"][1, 3:] = 0
    actual = loss_and_gradients(trainer, lambda: trainer.compute_loss(trainer.model, inputs))
    logged = trainer._metrics["train"]["kl"]
    trainer.beta, kls = 0.0, []

    def expected():
        kls.append(plain_kl(trainer, inputs))
        added = AGGREGATES[loss_type](kls[0], inputs["completion_mask"], trainer, inputs)
        return trainer.compute_loss(trainer.model, inputs) + BETA * added

    wanted = loss_and_gradients(trainer, expected)
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)
    mask = inputs["completion_mask"]
    assert logged == [pytest.approx(((kls[0] * mask).sum() / mask.sum()).item(), rel=1e-4)] and logged[0] > 0.05
    assert trainer._metrics["train"]["kl"] is logged  # nothing is logged, or computed, at beta = 0


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_a_beta_of_zero_is_trl_as_it_was(kind, tmp_path):
    trainer = trainer_of(kind, tmp_path, beta=0.0)
    patch.apply(kl="exact")
    trainer.train()
    assert trainer.ref_model is None and not any("kl" in step for step in trainer.state.log_history)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_whole_runs(kind, policy, tmp_path):
    """Checkpointed and in micro-batches; the KL is 0 in the first step, and an evaluation has the exact one."""
    options = {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "num_iterations": 1}
    with patch.apply(kl="exact"):
        trainer = trainer_of(kind, tmp_path, policy, **options)
        trainer.train()
        kls = [step["kl"] for step in trainer.state.log_history[:-1]]
        trainer.eval_dataset, seen = trainer.train_dataset, []
        score = trainer._prepare_inputs
        trainer._prepare_inputs = lambda batch: seen.append(score(batch)) or seen[-1]
        evaluation = trainer.evaluate()
    assert kls[0] == pytest.approx(0, abs=1e-6) and len(kls) == 3 and min(kls[1:]) > 1e-5
    with torch.no_grad():
        found = [(plain_kl(trainer, inputs) * inputs["completion_mask"]).sum() for inputs in seen]
    if kind == "GRPO":
        means = [kl / inputs["completion_mask"].sum() for kl, inputs in zip(found, seen, strict=True)]
        assert evaluation["eval_kl"] == pytest.approx(sum(means).item() / len(means), rel=1e-4)


@pytest.mark.parametrize("kind, passes", [("GRPO", [4, 4]), ("RLOO", [4, 8])])
def test_how_often_the_reference_s_backbone_runs(kind, passes, tmp_path):
    found = []
    for kl in (None, "exact"):
        with patch.apply(kl=kl):
            trainer, calls = (
                trainer_of(kind, tmp_path, num_iterations=1, gradient_accumulation_steps=2, max_steps=2),
                [],
            )
            trainer.ref_model.model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            trainer.ref_model.lm_head.register_forward_hook(lambda *_: pytest.fail("its head ran"))
            trainer.train()
        found.append(len(calls))
    assert found == passes


def test_a_trainer_with_a_loss_of_its_own(tmp_path, monkeypatch):
    """GMPO, whose class computes the KL by GRPO's expression."""
    gmpo = pytest.importorskip("trl.experimental.gmpo")
    monkeypatch.setattr(trl, "GMPOTrainer", gmpo.GMPOTrainer, raising=False)
    monkeypatch.setattr(trl, "GMPOConfig", gmpo.GMPOConfig, raising=False)
    trainer = moved(trainer_of("GMPO", tmp_path))
    with patch.apply(kl="exact"):
        inputs = trainer._prepare_inputs(tiny.PROMPTS[:4])
        trainer.compute_loss(trainer.model, inputs)
    kl, mask = plain_kl(trainer, inputs), inputs["completion_mask"]
    (logged,) = (x["kl"] for x in trainer._metrics.values() if x["kl"])
    assert logged == [pytest.approx(((kl * mask).sum() / mask.sum()).item(), rel=1e-4)]


PROMPT, WORDS = [2, 3], 7  # of a vocabulary so small that all completions of two tokens can be listed
ALL = [list(pair) for pair in itertools.product(range(WORDS), repeat=2)]


def reward_of_ids(completion_ids, **columns):
    return [((5 * first + 3 * second) % 11) / 11 for first, second in completion_ids]


@pytest.mark.parametrize("kl", [None, "exact"])
def test_the_expected_gradient_of_rloo_is_that_of_reward_minus_kl(kl, tmp_path):
    """Summed over all completions: by TRL's log-ratio in the reward, and by the exact KL in reward and loss."""
    small = tiny.model(vocab_size=WORDS)
    small.save_pretrained(tmp_path)
    small.config._name_or_path = str(tmp_path)
    sizes = {"num_generations": len(ALL), "per_device_train_batch_size": len(ALL), "max_completion_length": 2}
    trainer = moved(trainer_of("RLOO", tmp_path, model=small, reward=reward_of_ids, num_iterations=1, **sizes))
    trainer._generate = lambda prompts: ([PROMPT] * len(ALL), ALL, [""] * len(ALL))
    parameters = list(trainer.model.train().parameters())
    with patch.apply(kl=kl):
        inputs = trainer._generate_and_score_completions(tiny.PROMPTS[:1] * len(ALL))
        logp = plain_logits(trainer, inputs).log_softmax(-1).gather(-1, inputs["completion_ids"][..., None]).sum((1, 2))
        logq = plain_logits(trainer, inputs, True).log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])
        gain = torch.tensor(reward_of_ids(ALL)) - BETA * (logp - logq.sum((1, 2)).detach())
        expected = torch.autograd.grad(-(logp.exp() * gain).sum(), parameters)
        found = [torch.zeros_like(x) for x in parameters]
        leave_one_out = (len(ALL) - 1) / len(ALL)  # the baseline of a group without its own reward
        for i, chance in enumerate(logp.detach().exp()):
            one = {name: x[i : i + 1] for name, x in inputs.items()}
            one["advantages"] = one["advantages"] * leave_one_out
            gradients = torch.autograd.grad(trainer.compute_loss(trainer.model, one), parameters)
            for total, x in zip(found, gradients, strict=True):
                total += chance * x
    torch.testing.assert_close(found, list(expected), rtol=1e-3, atol=1e-5)
    assert logp.exp().sum().item() == pytest.approx(1, abs=1e-5)
    if kl == "exact":
        mean = plain_kl(trainer, inputs).mean().item()
        assert trainer._metrics["train"]["kl"] == [pytest.approx(mean, rel=1e-4)] and mean > 0.05


def test_what_is_replaced_and_how_it_comes_back():
    with patch.apply(kl="exact") as active:
        assert active.replaced[0] == "trl.trainer.utils._ChunkedLogProbFunction" and len(active.replaced) == 12
        assert {f"{what.module}.{what.name}" for what in METHODS} <= set(active.replaced)
        assert patch.apply() is patch.apply(kl="exact") is active
    assert not active.replaced
    with patch.apply(), pytest.raises(RuntimeError, match="call revert\\(\\) in between"):
        patch.apply(kl="exact")
    with pytest.raises(ValueError, match="kl must be None, for TRL's own estimate, or 'exact'; not 'k3'"):
        patch.apply(kl="k3")
    patch.apply(kl="exact")
    patch.revert()
    assert not active.replaced and not patch.PATCH.replaced


def test_a_version_without_one_of_the_methods_is_left_alone(monkeypatch):
    monkeypatch.delattr(trl.RLOOTrainer, "_generate_and_score_completions")
    with pytest.warns(UserWarning, match="RLOOTrainer._generate_and_score_completions is not there"):
        assert patch.apply(kl="exact").replaced == []
    monkeypatch.undo()


def test_what_does_not_work_is_refused(tmp_path):
    patch.apply(kl="exact")
    trainer = trainer_of("RLOO", tmp_path, normalize_advantages=True)
    with pytest.raises(ValueError, match="does not work with normalize_advantages=True in RLOO"):
        trainer.train()
    model, _ = policy_and_settings("full", tmp_path)
    tuned = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="does not work with prompt learning"):
        trainer_of("GRPO", tmp_path, model=tuned).train()
