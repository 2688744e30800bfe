"""Adapters of every kind and history: the reference is what was handed over, and a checkpoint is what was trained."""

import json
from pathlib import Path

import peft
import pytest
import tiny
import torch
from architectures import needs_current, tiny_kind, tiny_of
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from safe_train import SafeTrainer
from safe_train.config import ConfigError, SafeConfig
from safe_train.data.batches import TokenBatch
from safe_train.engines.zero import Zero2Engine
from safe_train.models import adapters
from safe_train.models.policy import make_policy

BATCH = TokenBatch.pack([[2, 3, 4], [9]], [[5, 6, 7, 8], [10, 1]])
IDS = torch.tensor([[2, 3, 4, 5, 6, 7]])


def config(method="Lora", **settings):
    values = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return getattr(peft, f"{method}Config")(**values | settings)


def lora(**settings):
    return config(**{"r": 4} | settings)


def loftq():
    made = lora()
    made.init_lora_weights = "loftq"  # at once, it asks for scipy
    return made


def base(**settings):
    return tiny.model(attention_bias=True, **settings)


def trainer(run, model, peft_config=None, tokenizer=None, rows=tiny.PROMPTS, **settings):
    args = tiny.settings(run, **{"total_steps": 2, "save_every": 1, "keep_checkpoints": 9} | settings)
    return SafeTrainer(model, tiny.good_words, args, rows, None, tokenizer or tiny.tokenizer(), peft_config)


@torch.no_grad()
def logits(model, ids=IDS):
    return model.eval()(input_ids=ids).logits


def policy_folder(run: Path, step=2) -> Path:
    return run / "checkpoints" / f"step-{step}" / "policy"


def metrics(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("time/", "memory/", "tokens_per_second")
    return [{k: v for k, v in row.items() if not k.startswith(clock)} for row in rows]


def move(model, by=0.1):
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn(parameter.shape, generator=draw))


METHODS = {
    "rsLoRA": lambda: lora(use_rslora=True, lora_alpha=3),
    "DoRA": lambda: lora(use_dora=True),
    "PiSSA": lambda: lora(init_lora_weights="pissa"),
    "OLoRA": lambda: lora(init_lora_weights="olora"),
    "orthogonal": lambda: lora(init_lora_weights="orthogonal"),
    "MiCA": lambda: lora(init_lora_weights="mica"),
    "random factors": lambda: lora(init_lora_weights=False),
    "a bias of LoRA's own": lambda: lora(lora_bias=True),
    "bias lora_only": lambda: lora(bias="lora_only"),
    "ranks of their own": lambda: lora(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 5}),
    "a parameter": lambda: lora(target_modules=[], target_parameters=["q_proj.weight"]),
    "repeated layers": lambda: lora(layer_replication=[[0, 2], [1, 2]]),
    "embeddings": lambda: lora(target_modules=["q_proj", "embed_tokens"]),
    "whole embeddings": lambda: lora(modules_to_save=["embed_tokens"]),
    "tokens": lambda: lora(trainable_token_indices=[3, 4]),
    "IA3": lambda: config("IA3", feedforward_modules=["down_proj"]),
    "LOHA": lambda: config("LoHa"),
    "LOKR": lambda: config("LoKr"),
    "OFT": lambda: config("OFT", oft_block_size=8),
    "BOFT": lambda: config("BOFT", boft_block_size=4),
    "HRA": lambda: config("HRA", r=4),
    "MISS": lambda: config("Miss", r=4),
    "LN_TUNING": lambda: config("LNTuning", target_modules=["input_layernorm"]),
    "TRAINABLE_TOKENS": lambda: config("TrainableTokens", target_modules=["embed_tokens"], token_indices=[3, 4]),
    "VERA": lambda: config("Vera", r=4),
    "FOURIERFT": lambda: config("FourierFT", n_frequency=10),
    "VBLORA": lambda: config("VBLoRA", r=2, num_vectors=8, vector_length=8, topk=2),
    "RANDLORA": lambda: config("RandLora", r=4),
    "C3A": lambda: config("C3A", block_size=4),
    "SHIRA": lambda: config("Shira", r=4),
    "ROAD": lambda: config("Road", group_size=16),
    "HIRA": lambda: config("Hira"),
    "DELORA": lambda: config("Delora", r=4),
    "GRALORA": lambda: config("Gralora", r=4),
    "WAVEFT": lambda: config("WaveFT", n_frequency=10),
    "PSOFT": lambda: config("Psoft", r=4),
    "TINYLORA": lambda: config("TinyLora"),
}


def test_each_supported_method_is_tried():
    assert set(adapters.SUPPORTED) - {"LORA"} <= METHODS.keys()


@pytest.mark.parametrize("method", METHODS)
def test_the_reference_and_the_checkpoint_of_each_method(method, tmp_path):
    """The reference is what was handed over, whatever is trained after; what is saved loads as what is in memory."""
    model = peft.get_peft_model(base(), METHODS[method]())
    move(model)
    handed_over = logits(model)
    policy = make_policy(model, SafeConfig())
    first = policy(BATCH).detach()
    assert torch.equal(policy.reference(BATCH), first)
    move(policy, by=0.2)
    now = logits(policy.model)
    assert (now - handed_over).abs().max() > 1e-3, "nothing was trained"
    assert torch.equal(policy.reference(BATCH), first) and torch.equal(logits(policy.model), now)
    adapters.save(policy.model, tmp_path, policy.model.state_dict(), embeddings=False)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base(), tmp_path)), now)


RUNS = {
    "a new adapter": (lambda: lora(), False),
    "DoRA and a norm": (lambda: lora(use_dora=True, modules_to_save=["norm"]), True),
    "PiSSA": (lambda: lora(init_lora_weights="pissa"), True),
    "biases": (lambda: lora(bias="all"), True),
    "tokens": (lambda: lora(trainable_token_indices=[3, 4]), True),
    "IA3": (lambda: config("IA3", feedforward_modules=["down_proj"]), True),
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_starts_at_its_reference_resumes_and_exports(kind, tmp_path):
    make, is_kept = RUNS[kind]
    run = trainer(tmp_path, base(), make())
    assert (run.policy.handed_over is not None) == is_kept
    assert run.train()[0]["kl"] == 0
    whole, now, reference = metrics(tmp_path), logits(run.policy.model), run.policy.reference(BATCH)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base(), policy_folder(tmp_path))), now)
    resumed = trainer(tmp_path, base(), make())
    resumed.train(resume_from_checkpoint=tmp_path / "checkpoints" / "step-1")
    assert metrics(tmp_path) == whole and torch.equal(resumed.policy.reference(BATCH), reference)


@pytest.mark.parametrize("make", [base, lambda: tiny.trained_adapter(base())], ids=["base", "trained adapter"])
def test_a_run_may_be_resumed_from_a_model_that_holds_what_it_trained(make, tmp_path):
    """The policy is read from the checkpoint, and so is the reference: it stays what the run began with."""
    trainer(tmp_path, make(), lora() if make is base else None).train()
    whole = metrics(tmp_path)
    trained = peft.PeftModel.from_pretrained(base(), policy_folder(tmp_path), is_trainable=True)
    trainer(tmp_path, trained).train(resume_from_checkpoint=tmp_path / "checkpoints" / "step-1")
    assert metrics(tmp_path) == whole and whole[1]["kl"] > 1e-3


@pytest.mark.parametrize("lora_r", [0, 4])
def test_a_run_is_not_resumed_on_another_model(lora_r, tmp_path):
    trainer(tmp_path, base(), lora_r=lora_r, total_steps=1).train()
    other = base()
    with torch.no_grad():
        other.model.embed_tokens.weight[3, 5] += 1e-6
    with pytest.raises(
        ConfigError, match=r"1 of the weights .* not those of the run's beginning, such as .*embed_tokens"
    ):
        trainer(tmp_path, other, lora_r=lora_r).train(resume_from_checkpoint=True)


HEADS = {
    "LoRA": lambda: lora(target_modules=["q_proj", "lm_head"]),
    "a copy": lambda: lora(modules_to_save=["lm_head"]),
    "tokens of tied embeddings": lambda: lora(trainable_token_indices=[3, 4]),
}


def with_head(kind, is_active):
    model = peft.get_peft_model(base(tie_word_embeddings=kind.startswith("tokens")), HEADS[kind](), adapter_name="old")
    if not is_active:
        model.add_adapter("rl", lora())
        model.set_adapter("rl")
    move(model, by=0.2)
    return model


@pytest.mark.parametrize("kind", HEADS)
def test_an_adapter_on_the_head_is_refused_and_what_the_message_says_helps(kind, tmp_path):
    model = base(tie_word_embeddings=kind.startswith("tokens"))
    message = "the output head must be a plain Linear layer, and the adapter '{}' is on it, as a .*: leave it out of"
    with pytest.raises(ConfigError, match=message.format("default")):
        trainer(tmp_path, model, HEADS[kind]())
    trained = with_head(kind, is_active=True)
    with pytest.raises(ConfigError, match=message.format("old")):
        trainer(tmp_path, trained)
    before = logits(trained)
    run = trainer(tmp_path, trained.merge_and_unload(), lora(), total_steps=1)
    torch.testing.assert_close(logits(run.policy.model), before, atol=1e-5, rtol=0)
    assert run.train()[0]["kl"] == 0


@pytest.mark.parametrize("is_deleted", [False, True])
@pytest.mark.parametrize("kind", list(HEADS)[:2])
def test_an_adapter_on_the_head_that_is_not_active_is_refused_as_such(kind, is_deleted, tmp_path):
    model = with_head(kind, is_active=False)
    if is_deleted:
        model.delete_adapter("old")
    whose = "layer of a deleted adapter" if is_deleted else "adapter 'old'"
    with pytest.raises(ConfigError, match=f"the {whose} is on it, .*not active, but peft leaves its layer there"):
        trainer(tmp_path, model)
    model.save_pretrained(tmp_path / "saved", selected_adapters=["rl"])
    alone = peft.PeftModel.from_pretrained(
        base(tie_word_embeddings=False), tmp_path / "saved" / "rl", is_trainable=True
    )
    assert trainer(tmp_path / "run", alone, total_steps=1).train()[0]["kl"] == 0


BUFFERS = {  # that a checkpoint holds, in layers that a token passes
    "glm4_moe": "e_score_correction_bias",  # decides which experts compute, as in DeepSeek's
    "apertus": "act_fn.beta",
}


def with_buffers(kind, by=0.0):
    model = tiny_kind(kind, vocab_size=len(tiny.WORDS))
    next(buffer for name, buffer in model.named_buffers() if BUFFERS[kind] in name).add_(by)
    return model


@pytest.mark.parametrize(
    ("kind", "lora_r"),
    [
        ("glm4_moe", 0),
        pytest.param("glm4_moe", 2, marks=needs_current),
        pytest.param("apertus", 0, marks=needs_current),
        ("apertus", 2),
    ],
)
def test_a_run_is_not_resumed_on_other_buffers(kind, lora_r, tmp_path):
    settings = {"lora_r": lora_r, "total_steps": 1, "max_prompt_tokens": 16}
    trainer(tmp_path, with_buffers(kind), **settings).train()
    trainer(tmp_path, with_buffers(kind), **settings).train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="1 of the weights that are not trained, or of the reference, are not those"):
        trainer(tmp_path, with_buffers(kind, by=0.25), **settings).train(resume_from_checkpoint=True)
    path = tmp_path / "checkpoints" / "step-1" / "reference.json"  # as an earlier version wrote it
    path.write_text(json.dumps({name: x for name, x in json.loads(path.read_text()).items() if name != "buffers"}))
    trainer(tmp_path, with_buffers(kind, by=0.25), **settings).train(resume_from_checkpoint=True)


def swapped_rows():
    model = base()
    rows = model.model.embed_tokens.weight.data
    rows[[3, 4]] = rows[[4, 3]]
    return model


def another_tokenizer():
    words = tiny.tokenizer().backend_tokenizer.to_str().replace('"dog"', '"cow"')
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(words), pad_token="<pad>", eos_token="<eos>")


OTHERS = {
    "bfloat16": (lambda: base().to(torch.bfloat16), {}, "is in bfloat16, at the run's beginning it was in float32"),
    "order": (swapped_rows, {}, "1 of the weights .* such as .*embed_tokens"),
    "rope": (
        lambda: base(rope_parameters={"rope_theta": 50.0, "rope_type": "default"}), {}, "its config has rope_parameters"
    ),
    "norm": (lambda: base(rms_norm_eps=0.1), {}, "its config has rms_norm_eps 0.1, at the run's beginning 1e-06"),
    "reference": (base, {"reference": "base"}, "a run with reference initial, this one has base"),
    "vocabulary": (base, {"tokenizer": another_tokenizer()}, "does not fit the tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_a_run_is_not_resumed_on_what_would_move_its_reference(case, tmp_path):
    make, changes, message = OTHERS[case]
    trainer(tmp_path, base(), lora(), total_steps=1).train()
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, make(), lora(), total_steps=1, **changes).train(resume_from_checkpoint=True)


def test_a_run_is_resumed_on_its_model_from_files(tmp_path):
    base().save_pretrained(tmp_path / "base")
    trainer(tmp_path / "run", base(), total_steps=1).train()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainer(tmp_path / "run", loaded, total_steps=1).train(resume_from_checkpoint=True)


def test_one_of_several_adapters_is_trained_and_saved(tmp_path):
    model = tiny.trained_adapter(base(), name="sft", modules_to_save=["norm"])
    model.add_adapter("rl", lora(target_modules=["o_proj", "q_proj"]))
    model.set_adapter("rl")
    sft = {name: p.clone() for name, p in model.named_parameters() if ".sft." in name}
    run = trainer(tmp_path, model)
    run.train()
    assert all(torch.equal(p, dict(model.named_parameters())[name]) for name, p in sft.items())
    loaded = peft.PeftModel.from_pretrained(base(), policy_folder(tmp_path))
    assert set(loaded.peft_config) == {"default"} and torch.equal(logits(loaded), logits(run.policy.model))
    assert not [path for path in policy_folder(tmp_path).iterdir() if path.is_dir()]


def test_what_the_user_froze_stays_frozen(tmp_path):
    model = peft.get_peft_model(base(), lora())
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    run = trainer(tmp_path, model)
    frozen = {name: p.clone() for name, p in model.named_parameters() if "lora_A" in name}
    run.train()
    assert all(not p.requires_grad and torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base(), policy_folder(tmp_path))), logits(model))


def test_a_second_stage_starts_from_the_first_ones_policy(tmp_path):
    first = trainer(tmp_path / "first", base(), gradient_checkpointing=True, total_steps=1)
    first.train()
    second = trainer(tmp_path / "second", first.policy.model, total_steps=1)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in second.policy.modules())
    assert second.train()[0]["kl"] == 0
    full = trainer(tmp_path / "full", base(), lora_r=0, total_steps=1)
    full.train()
    assert trainer(tmp_path / "again", full.policy.model, lora_r=0, total_steps=1).train()[0]["kl"] == 0


def test_the_reference_may_be_the_base(tmp_path):
    run = trainer(tmp_path, tiny.trained_adapter(base()), reference="base")
    assert run.train()[0]["kl"] > 1e-2
    plain = make_policy(base(), SafeConfig(lora_r=0))
    assert torch.equal(run.policy.reference(BATCH), plain(BATCH))
    run = trainer(tmp_path, tiny.trained_adapter(base()), reference="base")
    run.train(resume_from_checkpoint=tmp_path / "checkpoints" / "step-1")
    assert torch.equal(run.policy.reference(BATCH), plain(BATCH))


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary_is_exported_and_resumed(tied, tmp_path):
    """With spare rows, as when it is padded to a multiple of 8."""
    base(hidden_size=16, head_dim=8, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["[think]"], special_tokens=True)

    def resized():
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8, mean_resizing=False)
        return model

    rows = [{"prompt": "the cat [think]"}, {"prompt": "a dog"}]
    run = trainer(tmp_path / "run", resized(), tokenizer=tokenizer, rows=rows)
    run.train()
    whole = metrics(tmp_path / "run")
    ids = torch.tensor([[2, 4, len(tokenizer) - 1, 5]])
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    fresh.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8)
    loaded = peft.PeftModel.from_pretrained(fresh, policy_folder(tmp_path / "run"))
    assert torch.equal(logits(loaded, ids), logits(run.policy.model, ids))
    again = trainer(tmp_path / "run", resized(), tokenizer=tokenizer, rows=rows)
    again.train(resume_from_checkpoint=tmp_path / "run" / "checkpoints" / "step-1")
    assert metrics(tmp_path / "run") == whole


def test_a_compiled_model_is_trained_without_the_compiler(tmp_path):
    model = base()
    model.compile()
    run = trainer(tmp_path, torch.compile(model), lora_r=0, total_steps=1)
    assert run.policy.model is model and model._compiled_call_impl is None
    run.train()
    loaded = AutoModelForCausalLM.from_pretrained(policy_folder(tmp_path, 1))
    assert torch.equal(logits(loaded), logits(run.policy.model))


def two_active():
    model = tiny.trained_adapter(base(), name="sft")
    model.add_adapter("rl", lora())
    model.base_model.set_adapter(["sft", "rl"])
    return model


def switched_off():
    model = tiny.trained_adapter(base())
    model.base_model.disable_adapter_layers()
    return model


def merged():
    model = tiny.trained_adapter(base())
    model.merge_adapter()
    return model


def frozen():
    model = tiny.trained_adapter(base())
    model.set_adapter("default", inference_mode=True)
    return model


def thawed():
    model = tiny.trained_adapter(base())
    model.get_base_model().model.norm.weight.requires_grad_(True)
    return model


def injected():
    """As `model.add_adapter` of transformers does it; that of 5.24 asks for a peft that is not out yet."""
    return peft.inject_adapter_in_model(lora(), base())


def compiled_inside():
    model = base()
    model.model.layers[0] = torch.compile(model.model.layers[0])
    return model


def tied_by_hand():
    model = base()
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def untied_by_hand():
    model = base(tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def with_a_bias():
    model = base()
    model.lm_head.bias = torch.nn.Parameter(torch.ones(len(tiny.WORDS)))
    return model


def without_a_norm():
    model = base()
    model.model.layers[1].input_layernorm = torch.nn.Identity()
    return model


def in_bfloat16():
    return base().to(torch.bfloat16)


TUNING = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
REFUSED = {
    "prefix tuning": (base, lambda: peft.PrefixTuningConfig(**TUNING), {}, "PREFIX_TUNING cannot be trained here"),
    "p-tuning": (base, lambda: peft.PromptEncoderConfig(**TUNING), {}, "P_TUNING cannot be trained here"),
    "handed over": (
        lambda: peft.get_peft_model(base(), peft.PromptTuningConfig(**TUNING)), None, {}, "PROMPT_TUNING cannot be"
    ),
    "AdaLoRA": (base, lambda: config("AdaLora", total_step=9), {}, "ADALORA is not supported, only LORA"),
    "random PiSSA": (base, lambda: lora(init_lora_weights="pissa_niter_4"), {}, "pissa_niter_4' is not supported"),
    "LoftQ": (base, loftq, {}, "'loftq' is not supported: plain peft repeats it"),
    "CorDA": (base, lambda: lora(init_lora_weights="corda"), {}, "'corda' is not supported"),
    "aLoRA": (base, lambda: lora(alora_invocation_tokens=[2]), {}, "LoRA with alora_invocation_tokens is not"),
    "what peft refuses": (base, lambda: lora(target_modules=["none"]), {}, "peft cannot put this adapter on Llama"),
    "two adapters": (lambda: tiny.trained_adapter(base()), lora, {}, "has an adapter and a peft_config was given"),
    "two active": (two_active, None, {}, r"exactly one adapter must be active, .* got \['rl', 'sft'\]"),
    "switched off": (switched_off, None, {}, "exactly one adapter must be active, and be switched on"),
    "merged": (merged, None, {}, r"\['default'\] is merged, so no gradient reaches it; call unmerge_adapter"),
    "frozen": (frozen, None, {}, "no trainable parameter: its adapter 'default' is frozen; .* is_trainable=True"),
    "thawed": (thawed, None, {}, "1 weights are trained that no checkpoint of the adapter 'default' holds, .*norm"),
    "injected": (injected, None, {}, "has adapter layers inside of it"),
    "mixed": (lambda: peft.get_peft_model(base(), lora(), mixed=True), None, {}, "is a PeftMixedModel"),
    "DataParallel": (lambda: torch.nn.DataParallel(base()), None, {}, "is a DataParallel, .* pass its .module"),
    "compiled inside": (compiled_inside, None, {}, "a part of the model is compiled"),
    "nested": (
        lambda: peft.get_peft_model(tiny.trained_adapter(base()), lora()), None, {}, "a PeftModel around a PeftModel"
    ),
    "tied by hand": (tied_by_hand, None, {"lora_r": 0}, "lm_head.weight and .* are one tensor in the model, and not"),
    "untied by hand": (untied_by_hand, None, {"lora_r": 0}, "lm_head.weight and .* are not one tensor in the model"),
    "a bias by hand": (with_a_bias, None, {"lora_r": 0}, r"lm_head.bias is \[22\] in the model, and not in the Llama"),
    "a layer less": (without_a_norm, None, {"lora_r": 0}, r"1.input_layernorm.weight is not in the model, and \[32\]"),
    "bfloat16 modules": (in_bfloat16, lambda: lora(modules_to_save=["norm"]), {}, "such as the layers in modules_to"),
    "bfloat16": (in_bfloat16, None, {"lora_r": 0, "dtype": "bfloat16"}, "must be float32, .*; or train LoRA on it"),
    "base of PiSSA": (
        base, lambda: lora(init_lora_weights="pissa"), {"reference": "base"}, "reference must be initial with init_lora"
    ),
    "base of biases": (base, lambda: lora(bias="all"), {"reference": "base"}, "must be initial with bias 'all'"),
    "base of nothing": (base, None, {"reference": "base", "lora_r": 0}, "must be initial with lora_r 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_before_the_first_rollout(case, tmp_path):
    make, peft_config, settings, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path / "run", make(), peft_config and peft_config(), **settings)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_that_no_gradient_reaches_stops(tmp_path):
    model = base()
    model.unused = torch.nn.Linear(3, 3)
    run = trainer(tmp_path, model, lora(target_modules=["unused"]))
    with pytest.raises(ConfigError, match="no trained parameter receives a gradient"):
        run.train()


def freezes(model):
    for parameter in model.parameters():
        parameter.requires_grad_(not parameter.requires_grad)


MEDDLING = {"another adapter": lambda model: model.set_adapter("other"), "requires_grad": freezes}


@pytest.mark.parametrize("case", MEDDLING)
def test_a_run_stops_when_a_callback_takes_the_gradient_from_what_is_trained(case, tmp_path):
    model = tiny.trained_adapter(base())
    model.add_adapter("other", lora(init_lora_weights=False))
    run = trainer(tmp_path, model)
    run.callbacks = [lambda trainer, _: MEDDLING[case](trainer.policy.model)]
    with pytest.raises(ConfigError, match=r"no trained parameter receives a gradient: .* \(set_adapter\)"):
        run.train()
    assert [row["step"] for row in metrics(tmp_path)] == [1]
    with pytest.raises(ConfigError, match="no trained parameter"):  # before DeepSpeed is asked for anything
        zero = object.__new__(Zero2Engine)
        zero.parameters = run.engine.parameters
        zero.clip(1.0)


class ReadsNumbers(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.rates = torch.linspace(0, 1, 2).tolist()


def test_a_class_that_reads_numbers_when_it_is_made_has_its_head_checked(tmp_path, capsys):
    model = ReadsNumbers(base().config)
    trainer(tmp_path, model, lora_r=0)
    assert "not checked that a checkpoint has all weights: no ReadsNumbers on meta" in capsys.readouterr().out
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(ConfigError, match="the embeddings and the head are one tensor in the model, and not"):
        trainer(tmp_path, model, lora_r=0)


@pytest.mark.parametrize(("lora_r", "frozen"), [(4, True), (0, False)])
def test_what_a_mixture_of_experts_leaves_out_is_said_once(lora_r, frozen, tmp_path, capsys):
    model = tiny_of("Mixtral", num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.02)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    trainer(tmp_path, model, lora_r=lora_r)
    said = [line for line in capsys.readouterr().out.splitlines() if "mixture of experts" in line]
    assert len(said) == 1 and "router's own losses are not trained (router_aux_loss_coef 0.02)" in said[0]
    assert (f"{experts:,} weights of experts are frozen" in said[0]) == frozen
    trainer(tmp_path, base())
    assert "mixture" not in capsys.readouterr().out
