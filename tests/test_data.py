import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safe_train.data.batches import (
    TokenBatch,
    balanced,
    microbatches,
    through_first_eos,
)

PROMPTS, COMPLETIONS = [[5, 6, 7], [8], [9, 10]], [[11, 12], [13, 14, 1], [1]]


def test_pack_shifts_labels_and_chooses_response_tokens():
    batch = TokenBatch.pack(PROMPTS, COMPLETIONS)
    assert batch.input_ids_N.tolist() == [5, 6, 7, 11, 12, 8, 13, 14, 1, 9, 10, 1]
    assert batch.position_ids_N.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 5, 9, 12] and batch.cu_seqlens.dtype == torch.int32
    assert batch.targets_L.tolist() == [11, 12, 13, 14, 1, 1]
    assert batch.input_ids_N[batch.predict_L].tolist() == [7, 11, 8, 13, 14, 10]
    assert batch.response_cu_seqlens.tolist() == [0, 2, 5, 6]


def test_the_longest_length_stays_on_the_host():
    batch = TokenBatch.pack(PROMPTS, COMPLETIONS).to(torch.device("cpu"))
    assert type(batch.max_seqlen) is int and batch.max_seqlen == batch.cu_seqlens.diff().max() == 5


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


@given(lengths=st.lists(st.integers(1, 300), max_size=40), ranks=st.integers(1, 9), max_tokens=st.integers(1, 600))
def test_balanced_places_every_sequence_once_within_the_budget(lengths, ranks, max_tokens):
    cuts = balanced(lengths, ranks, max_tokens)
    assert cuts == balanced(lengths, ranks, max_tokens)
    assert sorted(i for cut in cuts for group in cut for i in group) == list(range(len(lengths)))
    assert len(cuts) == ranks and len({len(cut) for cut in cuts}) == 1 and cuts[0]
    assert all(len(group) == 1 or sum(lengths[i] for i in group) <= max_tokens for cut in cuts for group in cut)


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40), ranks=st.integers(1, 9))
def test_balanced_ranks_differ_by_at_most_one_sequence(lengths, ranks):
    """A rank's last sequence went where there were fewest tokens, so without it the rank is the lightest of all."""
    loads = [sum(lengths[i] for group in cut for i in group) for cut in balanced(lengths, ranks, 10**9)]
    assert max(loads) - min(loads) <= max(lengths)


def test_balanced_micro_batches_share_the_tokens():
    assert balanced([9, 1, 1, 1, 9, 1, 1, 1], ranks=2, max_tokens=7) == [
        [[0], [1, 3, 6]],
        [[4], [2, 5, 7]],
    ]
    assert balanced([3, 2], ranks=3, max_tokens=8) == [[[0]], [[1]], [[]]]  # the third rank has none
