"""`safe-train export`: what is written is the checkpoint's policy, for anyone who loads it."""

import errno
import json
import shutil

import peft
import pytest
import tiny
import torch
from architectures import IS_CURRENT
from test_checkpoint import prepare
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from safe_train import SafeTrainer, cli
from safe_train.cli import main
from safe_train.commands.export import DTYPES

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% if m.role == 'assistant' %}<end>{% endif %}{% endfor %}"
)
PROBES = torch.tensor([[2, 9, 4, 7, 12, 3, 8, 15, 6, 11]])


def logits(model):
    with torch.no_grad():
        return model.eval()(PROBES).logits.float().log_softmax(-1)


def policy_of(trainer):
    """The log-probs of the policy in memory, by its own forward."""
    return logits(trainer.policy.model)


def trained(folder, policy=None, **settings):
    """A run on a model of a folder, and its trainer."""
    pairs = dict(pair.split("=", 1) for pair in prepare(folder))
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<end>"], special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    base = policy or tiny.model(vocab_size=len(tokenizer))
    base.generation_config = GenerationConfig(do_sample=True, temperature=0.7, top_k=20, eos_token_id=1, pad_token_id=0)
    base.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    args = tiny.settings(folder / "run", total_steps=2, learning_rate=0.1, save_every=1, **settings)
    trainer = SafeTrainer(pairs["model"], tiny.good_words, args, tiny.PROMPTS)
    trainer.train()
    return trainer


def export(folder, *options):
    return main(["export", str(folder / "run"), str(folder / "out"), *options])


@pytest.mark.parametrize(
    ("settings", "options"),
    [({}, []), ({"temperature": 0.5}, ["--merge"]), ({"lora_r": 0}, []), ({}, ["--merge", "--dtype", "bf16"])],
    ids=str,
)
def test_the_folder_is_the_policy_with_its_tokenizer_template_and_generation_config(
    settings, options, tmp_path, capsys
):
    trainer = trained(tmp_path, **settings)
    assert export(tmp_path, *options) == 0
    said = capsys.readouterr().out
    is_adapter = not options and not settings
    assert ("--enable-lora" in said) == is_adapter and "differ by" in said
    out = tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    half = "bf16" in options
    right = policy_of(trainer)
    base = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    assert (base - right).abs().max() > 1
    if half:  # merged first, rounded after
        merged = dict(trainer.policy.model.merge_and_unload().named_parameters())
        assert all(torch.equal(x, merged[name].bfloat16()) for name, x in model.named_parameters())
    else:
        assert model.dtype == torch.float32
        torch.testing.assert_close(logits(model), right, atol=1e-5, rtol=0)
    tokenizer, generation = AutoTokenizer.from_pretrained(out), GenerationConfig.from_pretrained(out)
    assert tokenizer.chat_template == TEMPLATE and tokenizer("the cat")["input_ids"] == [2, 4]
    assert (generation.eos_token_id, generation.top_k, generation.do_sample) == ([1, 22], 20, True)
    assert generation.temperature == trainer.args.temperature  # not the 0.7 of the model that was trained
    assert f"sample at temperature {generation.temperature:g}" in said and "the model's own top_k 20," in said
    assert (out / "adapter_config.json").exists() == is_adapter and not list(tmp_path.glob("*.unfinished"))


def test_the_checkpoint_that_is_named_is_written(tmp_path, capsys):
    trained(tmp_path)
    assert export(tmp_path, "--checkpoint", "1", "--merge") == 0
    first = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    step = tmp_path / "run" / "checkpoints" / "step-1"
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(first, logits(peft.PeftModel.from_pretrained(base, step / "policy")), atol=1e-5, rtol=0)
    assert main(["export", str(step), str(tmp_path / "again"), "--merge"]) == 0
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), first)
    assert main(["export", str(step), str(tmp_path / "third"), "--checkpoint", "2"]) == 2
    assert "is one checkpoint, and --checkpoint 2 another" in capsys.readouterr().err


KINDS = {
    "dora": {"use_dora": True},
    "norms": {"modules_to_save": ["norm"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "pissa": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [[], ["--merge"]], ids=str)
def test_adapters_of_other_kinds(kind, options, tmp_path, capsys):
    prepare(tmp_path)
    config = peft.LoraConfig(
        **{"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | KINDS[kind]
    )
    args = tiny.settings(tmp_path / "run", total_steps=2, learning_rate=0.1, save_every=2)
    trainer = SafeTrainer(f"{tmp_path}/model", tiny.good_words, args, tiny.PROMPTS, peft_config=config)
    trainer.train()
    # transformers itself leaves out the magnitudes, and that of before 5.24 modules_to_save
    if not options and (kind == "dora" or kind == "norms" and not IS_CURRENT):
        assert export(tmp_path) == 2 and "gets other log-probs than peft: --merge" in capsys.readouterr().err
        return
    assert export(tmp_path, *options) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(model), policy_of(trainer), atol=1e-4, rtol=0)


def test_trained_embeddings_of_a_tied_model_leave_its_head_alone(tmp_path):
    tiny.model(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    args = tiny.settings(tmp_path / "run", total_steps=2, learning_rate=0.1, save_every=2)
    trainer = SafeTrainer(f"{tmp_path}/model", tiny.good_words, args, tiny.PROMPTS, peft_config=config)
    trainer.train()
    assert export(tmp_path, "--merge") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not model.config.tie_word_embeddings
    torch.testing.assert_close(logits(model), policy_of(trainer), atol=1e-5, rtol=0)


def test_a_vocabulary_that_was_resized_needs_a_whole_model(tmp_path, capsys):
    prepare(tmp_path)
    base, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tiny.tokenizer()
    tokenizer.add_tokens(["<end>"])
    base.resize_token_embeddings(len(tokenizer))
    args = tiny.settings(tmp_path / "run", total_steps=1)
    trainer = SafeTrainer(base, tiny.good_words, args, tiny.PROMPTS, processing_class=tokenizer)
    trainer.train()
    named = f"model={tmp_path}/model"
    assert export(tmp_path) == 2 and "model is <python object" in capsys.readouterr().err
    assert export(tmp_path, named) == 2
    assert "cannot be loaded" in capsys.readouterr().err and not list(tmp_path.glob("out*"))
    assert export(tmp_path, named, "--merge") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == len(tokenizer)
    torch.testing.assert_close(logits(model), policy_of(trainer), atol=1e-5, rtol=0)


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def other_base(folder):
    tiny.model(seed=5, vocab_size=23).save_pretrained(folder / "model")


def wrong_merge(monkeypatch):
    import safe_train.commands.export as module

    own = module.merged

    def merged(model):
        whole = own(model)
        with torch.no_grad():
            whole.model.layers[0].mlp.up_proj.weight.mul_(1.1)
        return whole

    monkeypatch.setattr(module, "merged", merged)


def test_what_would_not_be_the_policy_is_refused_and_leaves_no_folder(tmp_path, capsys, monkeypatch):
    trained(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    run = str(tmp_path / "run")
    for arguments, message in (
        ([run, str(tmp_path / "full")], "full exists already: name a new folder"),
        ([run, str(tmp_path / "no" / "out")], "no is no folder"),
        ([run, str(tmp_path / "out"), "--dtype", "bf16"], "an adapter stays in float32, or add --merge"),
        ([str(tmp_path / "model"), str(tmp_path / "out")], "is not a run folder"),
    ):
        assert main(["export", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert set(cli.DTYPES) == set(DTYPES)
    with monkeypatch.context() as patch:
        patch.setattr("safe_train.commands.export.shutil.copy", full_disk)
        assert export(tmp_path) == 2 and "cannot write" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        wrong_merge(patch)
        assert export(tmp_path, "--merge") == 2
        assert "has log-probs that differ by" in capsys.readouterr().err
    weights = tmp_path / "run" / "checkpoints" / "step-1" / "policy" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert export(tmp_path, "--checkpoint", "1") == 2
    assert "cut short or damaged" in capsys.readouterr().err
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / "model", kept)
    other_base(tmp_path)
    assert export(tmp_path, "--merge") == 2
    assert "are not those of the run's beginning" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
    assert export(tmp_path, f"model={kept}") == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(kept)
