import json

import pytest
import tiny
import torch

from safe_train.config import ConfigError
from safe_train.data import PromptDataset, TokenBatch, load_rows, microbatches, through_first_eos

PROMPTS, COMPLETIONS = [[5, 6, 7], [8], [9, 10]], [[11, 12], [13, 14, 1], [1]]


def dataset(rows, max_prompt_tokens=8, seed=0):
    return PromptDataset(rows, tiny.tokenizer(), max_prompt_tokens, seed)


def test_pack_shifts_labels_and_chooses_response_tokens():
    batch = TokenBatch.pack(PROMPTS, COMPLETIONS)
    assert batch.input_ids_N.tolist() == [5, 6, 7, 11, 12, 8, 13, 14, 1, 9, 10, 1]
    assert batch.position_ids_N.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 5, 9, 12] and batch.cu_seqlens.dtype == torch.int32
    assert batch.targets_L.tolist() == [11, 12, 13, 14, 1, 1]
    assert batch.input_ids_N[batch.predict_L].tolist() == [7, 11, 8, 13, 14, 10]
    assert batch.response_cu_seqlens.tolist() == [0, 2, 5, 6]


def test_empty_completion_holds_its_place_and_predicts_nothing():
    batch = TokenBatch.pack([[5, 6], [7], [8]], [[9], [], [1]])
    assert batch.targets_L.tolist() == [9, 1]
    assert batch.response_cu_seqlens.diff().tolist() == [1, 0, 1]


def test_all_completions_empty():
    assert TokenBatch.pack([[5, 6]], [[]]).targets_L.shape == (0,)


def test_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        TokenBatch.pack([[]], [[3]])


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([4, 1, 1, 5], ([4, 1], True)), ([1], ([1], True)), ([4, 5], ([4, 5], False)), ([], ([], False))],
)
def test_the_first_end_token_is_kept(tokens, expected):
    """The published code masks the end token away (it equals the padding), so stopping is never trained."""
    assert through_first_eos(tokens, [1]) == expected


def test_any_of_several_end_tokens_ends():
    assert through_first_eos([3, 9, 4], [1, 9]) == ([3, 9], True)


def test_microbatches_keep_the_order_and_the_budget():
    lengths = [4, 4, 4, 20, 1, 1, 7]
    groups = microbatches(lengths, 8)
    assert groups == [[0, 1], [2], [3], [4, 5], [6]]
    assert sum(groups, []) == list(range(7))


def test_prompt_stream_is_a_pure_function_of_its_position():
    data, again = dataset(tiny.PROMPTS), dataset(tiny.PROMPTS)
    stream = [p.text for p in data.at(0, 20)]
    assert stream[7:13] == [p.text for p in again.at(7, 6)]
    assert all(sorted(stream[i : i + 5]) == sorted(row["prompt"] for row in tiny.PROMPTS) for i in (0, 5, 10))
    assert stream != [p.text for p in dataset(tiny.PROMPTS, seed=1).at(0, 20)]


def test_long_prompts_lose_their_beginning():
    assert dataset([{"prompt": "the cat sat on a mat"}], 2)[0].ids == tiny.tokenizer()("a mat")["input_ids"]


def test_chat_prompts_use_the_chat_template():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} and {% endfor %}"
    data = PromptDataset([{"prompt": [{"role": "user", "content": "the cat"}], "answer": "dog"}], tokenizer, 8)
    assert data[0].ids == tokenizer("the cat and")["input_ids"] and data[0].columns == {"answer": "dog"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        ([{"text": "a"}], "needs a 'prompt' field"),
        ([{"prompt": ""}], "prompt 0 of the data set is empty"),
    ],
)
def test_unusable_prompts_are_errors(rows, message):
    with pytest.raises(ValueError, match=message):
        dataset(rows)[0]


def test_rows_from_a_file_name_the_bad_line(tmp_path):
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text('{"prompt": "the"}\n\n{"prompt": "a\u2028b"}\n', encoding="utf-8")
    bad.write_text('{"prompt": "the"}\n{"prompt"\n')
    assert [row["prompt"] for row in load_rows(str(good))] == ["the", "a\u2028b"]
    with pytest.raises(ConfigError, match="line 2"):
        load_rows(str(bad))
    with pytest.raises(ConfigError, match="no prompt file"):
        load_rows(str(tmp_path / "none.jsonl"))


def test_demo_prompts_do_not_overlap():
    sets = [{json.dumps(row) for row in load_rows(f"demo_{name}.jsonl")} for name in ("train", "dev", "eval")]
    assert all(sets) and not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
