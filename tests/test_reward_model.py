"""Classifiers as rewards: the score of each text is that of the text alone, read at its last real token."""

import warnings

import pytest
import tiny
import torch
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
)

from safe_train.config import ConfigError
from safe_train.rewards import load_reward

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


def test_a_classifier_that_cannot_score_is_refused_before_the_run(tmp_path):
    """BART reads the state of the end token, which this tokenizer does not write."""
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in SIZES_OF_BART.items()}
    config = BartConfig(vocab_size=len(tiny.WORDS), d_model=32, num_labels=1, eos_token_id=1, pad_token_id=0, **sizes)
    with pytest.raises(ConfigError, match="'model' cannot score a text: Each example must contain .* <eos> token"):
        load_reward(saved(tmp_path / "model", BartForSequenceClassification(config)))
