"""tokens.jsonl: what the policy made of each token, beside the model's own logits, and the text of each token."""

import json
import math

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from safe_train.run.tokens import pieces, spread


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_tokens_have_the_numbers_of_the_models_own_logits(tmp_path):
    policy, tokenizer = tiny.trained_adapter(), tiny.tokenizer()
    tiny.trainer(tmp_path, policy=policy, reference="base", total_steps=2, samples_every=2, learning_rate=1e-30).train()
    rows, samples = rows_of(tmp_path / "tokens.jsonl"), rows_of(tmp_path / "samples.jsonl")
    assert [row["row"] for row in rows] == list(range(8)) and {row["step"] for row in rows} == {2}
    model = tiny.trained_adapter().double()
    for row in rows:
        sample = samples[row["row"]]
        words = "".join(row["tokens"])
        assert [word for word in words.split() if word not in ("<eos>", "<pad>")] == sample["completion"].split()
        prompt, response = (tokenizer(text).input_ids for text in (sample["prompt"], words))
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            log_p = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            with model.disable_adapter():
                log_q = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = {
            "logprob": log_p.gather(1, torch.tensor(response)[:, None])[:, 0],
            "entropy": -(log_p.exp() * log_p).sum(-1),
            "kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        }
        for name, values in expected.items():  # written with four digits
            assert row[name] == pytest.approx(values.tolist(), rel=6e-4, abs=tiny.FORWARDS["atol"]), name
        assert max(row["kl"]) > 0.01


def test_the_tokens_of_a_step_are_those_of_lowest_to_highest_rewards():
    reward_B = torch.tensor([5.0, math.nan, *range(20), -1.0, 30.0])
    found = spread(reward_B)
    assert len(found) == 8 and reward_B[found].sort().values.tolist()[::7] == [-1.0, 30.0]
    assert spread(torch.tensor([2.0, 1.0])) == [0, 1] and len(spread(torch.full((9,), math.nan))) == 8
    assert spread(torch.tensor([math.nan] * 20 + [1.0, 2.0]))[-2:] == [20, 21]


def byte_tokenizer():
    """A token a byte, so that most characters of the world take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


BYTES = byte_tokenizer()


@given(st.text(max_size=12))
def test_the_texts_of_tokens_are_together_the_text(text):
    ids = BYTES(text).input_ids
    found = pieces(BYTES, ids)
    assert len(found) == len(ids) and "".join(found) == text


@given(st.lists(st.integers(0, 255), max_size=40))
def test_bytes_that_are_no_text_have_a_text_a_token_as_well(ids):
    found = pieces(BYTES, ids)
    assert len(found) == len(ids)
    assert "".join(found).replace("\ufffd", "") == BYTES.decode(ids).replace("\ufffd", "")


def test_a_character_is_the_text_of_its_last_token():
    assert pieces(BYTES, BYTES("aé😀").input_ids) == ["a", "", "é", "", "", "", "😀"]
    assert pieces(tiny.tokenizer(), tiny.tokenizer()("the cat sat").input_ids) == ["the", " cat", " sat"]
