"""Classifiers as rewards: the score of each text is that of the text alone, read at its last real token."""

import json
import warnings

import pytest
import tiny
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    FNetConfig,
    FNetForSequenceClassification,
    Gemma3Config,
    Gemma3ForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

from safe_train.config import ConfigError, SafeConfig
from safe_train.rewards.rewards import Rewards, load_reward

PROMPTS = ["the cat <eos>", "a dog sat on", "the", "<pad> a tree", "a"]
COMPLETIONS = [" sat <eos>", " very bad and sad <pad>", " <eos>", " is good", ""]
WIDTH = {"vocab_size": len(tiny.WORDS), "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
LAYERS = {"num_hidden_layers": 2, "num_labels": 1, "initializer_range": 0.3}
SIZES_OF_BART = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}
POSITIONS = {"max_position_embeddings": 16}


def llama(**changes):
    heads = {"num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    return LlamaForSequenceClassification(LlamaConfig(**WIDTH | LAYERS | heads | changes))


def gpt2(**changes):
    sizes = {"vocab_size": len(tiny.WORDS), "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
    rest = {"initializer_range": 0.3, "num_labels": 1, "bos_token_id": None, "eos_token_id": 1}
    return GPT2ForSequenceClassification(GPT2Config(**sizes | rest | changes))


def opt(**changes):
    sizes = {"vocab_size": len(tiny.WORDS), "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48}
    rest = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 1, "init_std": 0.3}
    return OPTForSequenceClassification(OPTConfig(**sizes | rest | POSITIONS | changes))


def gemma3(**changes):
    """The settings of the text model are in `text_config`, beside those of a vision tower."""
    text = WIDTH | LAYERS | {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 1, "eos_token_id": 1}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}, **changes)
    config.num_labels = 1
    return Gemma3ForSequenceClassification(config)


def bert(**changes):
    return BertForSequenceClassification(BertConfig(**WIDTH | LAYERS | POSITIONS | changes))


def roberta(**changes):
    return RobertaForSequenceClassification(RobertaConfig(**WIDTH | LAYERS | POSITIONS | {"pad_token_id": 1} | changes))


def bart(**changes):
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in SIZES_OF_BART.items()}
    rest = {"d_model": 32, "init_std": 0.3, "num_labels": 1, "eos_token_id": 1, "pad_token_id": 0}
    return BartForSequenceClassification(BartConfig(vocab_size=len(tiny.WORDS), **sizes | rest | POSITIONS | changes))


def t5(**changes):
    sizes = {"vocab_size": len(tiny.WORDS), "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    rest = {"num_labels": 1, "decoder_start_token_id": 0, "initializer_factor": 2.0}
    return T5ForSequenceClassification(T5Config(**sizes | rest | changes))


def fnet(**changes):
    """It mixes tokens without a mask, so that padding changes its scores."""
    sizes = {name: value for name, value in WIDTH.items() if name != "num_attention_heads"}
    return FNetForSequenceClassification(FNetConfig(**sizes | LAYERS | POSITIONS | changes))


def saved(folder, model, tokenizer_pad="<pad>"):
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer_pad
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def at_the_last_token(model, text):
    """A decoder's head on the state of the last token of the text alone, without padding."""
    ids = torch.tensor([tiny.tokenizer()(text)["input_ids"]])
    return model.score(getattr(model, model.base_model_prefix)(input_ids=ids).last_hidden_state[0, -1]).item()


@pytest.mark.parametrize("tokenizer_pad", ["<pad>", "<eos>", None])
@pytest.mark.parametrize("pad", [None, 0, 1])
@pytest.mark.parametrize("make", [llama, gpt2, opt])
def test_a_decoder_is_read_at_the_last_token_whatever_the_pad(make, pad, tokenizer_pad, tmp_path):
    torch.manual_seed(0)
    reward = load_reward(saved(tmp_path / "model", make(pad_token_id=pad), tokenizer_pad))
    right = [at_the_last_token(reward.model, p + c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert reward.batch_size > 1 and reward(PROMPTS, COMPLETIONS) == pytest.approx(right, abs=1e-4)
    reward.tokenizer.padding_side, reward.batch_size = "left", 2
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(right, abs=1e-4)
    assert max(right) - min(right) > 0.1


def test_a_classifier_with_a_config_of_parts(tmp_path):
    torch.manual_seed(0)
    reward = load_reward(saved(tmp_path / "model", gemma3(), "<eos>"))
    model = reward.model.model.language_model
    right = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        ids = torch.tensor([tiny.tokenizer()(prompt + completion)["input_ids"]])
        with torch.no_grad():
            right.append(reward.model.score(model(input_ids=ids).last_hidden_state[0, -1]).item())
    assert reward.batch_size > 1 and reward(PROMPTS, COMPLETIONS) == pytest.approx(right, abs=1e-4)


@pytest.mark.parametrize("spread", [0.02, 0.3])
@pytest.mark.parametrize(("make", "batch_size"), [(bert, 16), (roberta, 16), (fnet, 1)])
def test_an_encoder_is_read_as_it_reads_each_text_alone(make, batch_size, spread, tmp_path, capsys):
    torch.manual_seed(0)
    reward = load_reward(saved(tmp_path / "model", make(initializer_range=spread)))
    right = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        ids = torch.tensor([tiny.tokenizer()(prompt + completion)["input_ids"]])
        with torch.no_grad():
            right.append(reward.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item())
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(right, abs=1e-4)
    assert reward.batch_size == batch_size
    assert ("its texts are scored one at a time" in capsys.readouterr().out) == (batch_size == 1)


@pytest.mark.parametrize(("make", "limit"), [(gpt2, 16), (opt, 16), (roberta, 14), (bert, 16), (llama, 2048)])
def test_a_text_longer_than_the_model_loses_its_beginning_and_is_counted(make, limit, tmp_path):
    torch.manual_seed(0)
    reward = load_reward(saved(tmp_path / "model", make()))
    words = [tiny.WORDS[2 + i % 20] for i in range(limit + 5)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a text that just fits is no reason to warn
        right = reward([" ".join(words[-limit:-1])], [f" {words[-1]}"])
    message = f"reward model 'model': 1 of 2 texts are longer than its {limit} tokens .*1 of 3 in this run so far"
    with pytest.warns(UserWarning, match=message):
        found = reward([" ".join(words[:-1]), "the"], [f" {words[-1]}", " cat"])
    assert found[0] == pytest.approx(right[0], abs=1e-4)


def test_texts_that_leave_no_token_to_pad_with(tmp_path):
    torch.manual_seed(0)
    reward = load_reward(saved(tmp_path / "model", llama()))
    texts = [" ".join(tiny.WORDS), "the cat"]
    right = [at_the_last_token(reward.model, text) for text in texts]
    assert reward(["", ""], texts) == pytest.approx(right, abs=1e-4)


def test_a_classifier_and_a_tokenizer_that_are_not_of_one_model(tmp_path):
    reward = load_reward(saved(tmp_path / "model", llama(vocab_size=16)))
    with pytest.raises(ValueError, match="writes 'very' as token 16, and the model has only 16"):
        reward(["the cat"], [" very"])
    with pytest.raises(ValueError, match="a text has no tokens"):
        reward([""], [""])


@pytest.mark.parametrize("make", [bart, t5])
def test_an_encoder_with_a_decoder_is_read_at_its_last_end_token_however_many_there_are(make, tmp_path, monkeypatch):
    """It wants equally many in all texts of a batch, and a policy may write some as well."""
    torch.manual_seed(0)
    monkeypatch.setattr(tiny, "tokenizer", ending(tiny.tokenizer))
    reward = load_reward(saved(tmp_path / "model", make()))
    texts = ["the cat", "a dog <eos> sat on", "the", "a <eos> tree <eos> is", "a dog sat on a tree <eos>", "sad"]
    right = []
    for text in texts:
        ids = torch.tensor([reward.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            right.append(reward.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.item())
    for size in (16, 2):
        reward.batch_size = size
        assert reward([""] * len(texts), texts) == pytest.approx(right, abs=1e-4)
    assert max(right) - min(right) > 1e-3


def ending(make):
    """A tokenizer that ends each text with <eos>, as those of BART and T5 do."""

    def made():
        tokenizer = make()
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 1)])
        return tokenizer

    return made


def test_a_classifier_that_cannot_score_is_refused_before_the_run(tmp_path):
    """BART reads the state of the end token, which this tokenizer does not write."""
    with pytest.raises(ConfigError, match="'model' cannot score a text: .*(must contain .* <eos> token|out of bounds)"):
        load_reward(saved(tmp_path / "model", bart()))


CHATS = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in tiny.PROMPTS]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the prompts are chats, and the tokenizer of the reward model 'model' has no chat template: take"),
        ("{{ raise_exception('no assistant may speak') }}", "no assistant may speak"),
    ],
)
def test_a_classifier_that_cannot_read_the_chats_is_refused_before_the_run(template, message, tmp_path, monkeypatch):
    folder = saved(tmp_path / "model", llama())
    reward = load_reward(folder)
    reward.tokenizer.chat_template = template
    reward.tokenizer.save_pretrained(folder)
    words = tiny.tokenizer()
    words.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    monkeypatch.setattr(tiny, "tokenizer", lambda: words)
    monkeypatch.setattr("safe_train.run.start.make_policy", lambda *_, **__: pytest.fail("the policy was made"))
    with pytest.raises(ConfigError, match=message):
        tiny.trainer(tmp_path / "run", folder, prompts=CHATS)


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "Qwen2ForProcessRewardModel", "BertModel"])
def test_what_is_no_sequence_classifier_is_named_before_its_weights_are_loaded(kind, tmp_path, monkeypatch):
    folder = saved(tmp_path / "model", llama())
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": [kind]}))
    monkeypatch.setattr("safe_train.rewards.classifier.load_weights", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=rf"is a {kind}, not a sequence classifier .*file.py:function.* or a server"):
        load_reward(folder)


def test_an_adapter_or_a_damaged_file_is_no_traceback(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    folder = saved(tmp_path / "model", llama())
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    for name, message in ((tmp_path / "adapter", "cannot load the reward model"), (folder, "cut short or damaged")):
        with pytest.raises(ConfigError, match=message):
            load_reward(str(name))


def test_classifiers_of_one_name_are_told_apart(tmp_path):
    torch.manual_seed(0)
    rewards = Rewards([load_reward(saved(tmp_path / owner / "rm", llama())) for owner in "ab"])
    scores = rewards(["the cat"], [" sat"], {})
    assert list(scores) == ["rm", "rm_2", "reward"] and scores["rm"] != scores["rm_2"]


def test_dtype_and_batch_size_are_settings(tmp_path):
    torch.manual_seed(0)
    folder = saved(tmp_path / "model", llama().bfloat16())
    args = SafeConfig(reward_dtype="bfloat16", reward_batch_size=3)
    for settings, dtype, size in ((SafeConfig(), torch.float32, 16), (args, torch.bfloat16, 3)):
        reward = load_reward(folder, args=settings)
        assert reward.model.dtype == dtype and reward.batch_size == size
        seen, score = [], reward.score
        reward.score = lambda rows, score=score, seen=seen: seen.append(len(rows)) or score(rows)
        right = [at_the_last_token(reward.model, p + c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
        found = reward(PROMPTS, COMPLETIONS)
        assert found == pytest.approx(right, abs=1e-4 if dtype == torch.float32 else 0.1) and max(seen) == min(size, 5)
