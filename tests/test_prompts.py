import datasets
import pytest
import tiny
from tokenizers.processors import TemplateProcessing

from safe_train.config import ConfigError
from safe_train.data.datasets_io import from_python
from safe_train.data.formats import PromptFormat, transcript_messages
from safe_train.data.prompts import PromptDataset, PromptStream


def dataset(rows, max_prompt_tokens=8, seed=0):
    return PromptDataset(rows, tiny.tokenizer(), max_prompt_tokens, seed)


def test_prompt_stream_is_a_pure_function_of_its_position():
    data, again = dataset(tiny.PROMPTS), dataset(tiny.PROMPTS)
    stream = [p.text for p in data.at(0, 20)]
    assert stream[7:13] == [p.text for p in again.at(7, 6)]
    assert all(sorted(stream[i : i + 5]) == sorted(row["prompt"] for row in tiny.PROMPTS) for i in (0, 5, 10))
    other = [p.text for p in dataset(tiny.PROMPTS, seed=1).at(0, 20)]
    assert stream != other and stream[5:] != other[:15], "seed 1 is not seed 0 an epoch later"


def test_long_prompts_lose_their_beginning():
    """In what the rewards are given, too."""
    cut, whole = dataset([{"prompt": "the cat sat on <eos> tree"}, {"prompt": "<eos> tree"}], 2).at(0, 2)
    cut, whole = sorted((cut, whole), key=lambda prompt: not prompt.is_cut)
    assert cut.text == whole.text == "<eos> tree" and cut.ids == whole.ids and cut.is_cut and not whole.is_cut


def chat(*turns):
    """The system's message, and turns of user and assistant, of which the last is a tool's."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    messages[-1:] = [{**message, "role": "tool"} for message in messages[-1:]]
    return [{"role": "system", "content": "very good"}, *messages]


LONG = chat("the cat", "a dog", "the tree is bad", "it")


@pytest.mark.parametrize(
    ("limit", "left"), [(17, LONG), (16, chat("the tree is bad", "it")), (11, chat("the tree is bad", "it")),
                        (10, chat("tree is bad", "it")), (8, chat("bad", "it"))]
)  # fmt: skip
def test_long_chats_lose_their_first_turns_and_then_the_beginning_of_the_users_last(limit, left):
    """The template says of each turn who speaks, and once more who is to answer; the system's message stays."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<eos> {{ m['content'] }} {% endfor %}<eos>"
    found, whole = (PromptDataset([{"prompt": x}], tokenizer, n)[0] for x, n in ((LONG, limit), (left, 99)))
    assert found.text == left and found.ids == whole.ids and found.is_cut == (limit < 17)


@pytest.mark.parametrize("content", ["the tree is bad", [{"type": "text", "text": "the tree is bad"}]])
def test_where_nothing_else_fits_the_tokens_lose_their_beginning(content):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<eos> {{ m['content'] }} {% endfor %}<eos>"
    messages = [*chat(), {"role": "user", "content": content}]
    (prompt,) = PromptDataset([{"prompt": messages}], tokenizer, 4).at(0, 1)
    assert prompt.text == messages and len(prompt.ids) == 4 and prompt.ids[-1] == 1 and prompt.is_cut


def with_bos():
    tokenizer = tiny.tokenizer()
    tokenizer.bos_token = "<eos>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<eos> $A", special_tokens=[("<eos>", 1)])
    return tokenizer


@pytest.mark.parametrize(
    ("length", "kept"), [(1, ""), (3, "a mat"), (7, "the cat sat on a mat"), (9, "the cat sat on a mat")]
)
def test_long_prompts_keep_their_first_token_where_it_is_bos(length, kept):
    data = PromptDataset([{"prompt": "the cat sat on a mat"}], with_bos(), length)
    assert data[0].ids == [1, *tiny.tokenizer()(kept)["input_ids"]]


def test_chat_prompts_use_the_chat_template():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} and {% endfor %}"
    data = PromptDataset([{"prompt": [{"role": "user", "content": "the cat"}], "answer": "dog"}], tokenizer, 8)
    assert data[0].ids == tokenizer("the cat and")["input_ids"] and data[0].columns == {"answer": "dog"}


# Rows as Anthropic/hh-rlhf has them: one turn, three turns, and one speaker twice in a row.
TRANSCRIPTS = {
    "\n\nHuman: Is a cat good?\n\nAssistant: It is.": [{"role": "user", "content": "Is a cat good?"}],
    "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHow are you?\n\nHuman: Human: is a word\n\nAssistant:": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello.\n\nHow are you?"},
        {"role": "user", "content": "Human: is a word"},
    ],
    "\n\nHuman: One\n\nHuman: Two \n\nAssistant: \n\nAssistant: Yes": [{"role": "user", "content": "One\n\nTwo"}],
}


@pytest.mark.parametrize("transcript", TRANSCRIPTS)
def test_transcripts_become_chat_messages_up_to_the_last_human_turn(transcript):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    data = PromptDataset([{"chosen": transcript, "rejected": "no"}], tokenizer, 64)
    assert data[0].text == TRANSCRIPTS[transcript] and data[0].columns == {"rejected": "no"}
    assert data[0].ids == tokenizer(" ".join(f"{m['role']} {m['content']}" for m in data[0].text))["input_ids"]


def test_all_turns_of_a_transcript_are_kept():
    messages = transcript_messages("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d")
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert [m["content"] for m in messages] == ["a", "b", "c", "d"]


def test_messages_lose_the_answer_that_would_be_copied():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    turns = [("system", "the"), ("user", "cat"), ("assistant", "sat"), ("user", "on"), ("assistant", "a mat")]
    messages = [{"role": role, "content": content} for role, content in turns]
    for field in ("messages", "chosen"):
        prompt = PromptDataset([{field: messages}], tokenizer, 9)[0]
        assert prompt.text == messages[:4] and prompt.ids == tokenizer("the cat sat on")["input_ids"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty"),
        ([{"text": "a"}], "needs a 'prompt' field"),
        ([{"prompt": ""}], "prompt 0 of the data set: it is empty"),
        ([{"prompt": [{"role": "user", "content": "a"}]}], "prompt 0 .* chat messages need a chat template"),
        ([{"chosen": "a cat"}], "prompt 0 .* not a transcript that starts with"),
        ([{"chosen": "\n\nAssistant: a cat"}], "prompt 0 .* no turn of a user"),
        (["the prompt"], "needs a 'prompt' field .* got 'the prompt' in row 0"),
        ([{"prompt": "the"}, "a"], "prompt 1 .* a row must have the field 'prompt', got 'a'"),
        ([{"prompt": "the"}, {"text": "a"}], "prompt 1 .* a row must have the field 'prompt', got {'text': 'a'}"),
        ([{"prompt": "the"}, {"prompt": " "}], "prompt 1 of the data set: it is empty: ' '"),
        ([{"prompt": "the"}, {"prompt": None}], "prompt 1 .* must be text, or chat messages .* got None"),
        ([{"prompt": "the"}, {"prompt": []}], r"prompt 1 .* must be text, or chat messages .* got \[\]"),
        ([{"messages": [{"content": "a"}]}], "prompt 0 .* must be text, or chat messages with a role"),
        ({"train": [{"prompt": "the"}]}, "must be a list of rows, .* got a dict"),
        (iter([{"prompt": "the"}]), "must be a list of rows, .* got a list_iterator"),
    ],
)
def test_unusable_prompts_are_errors_before_the_run(rows, message):
    with pytest.raises(ConfigError, match=message):
        dataset(rows)


def test_an_empty_prompt_is_usable_where_the_tokenizer_begins_every_text():
    assert PromptDataset([{"prompt": ""}], with_bos(), 8)[0].ids == [1]


def test_only_the_rows_that_the_run_visits_are_rendered():
    rows = [{"prompt": f"the {word}"} for word in tiny.WORDS[2:]]
    good = dataset(rows, seed=3)
    visited = {prompt.text for prompt in good.at(0, 6)}
    unvisited = next(i for i, row in enumerate(rows) if row["prompt"] not in visited)
    first = next(i for i, row in enumerate(rows) if row["prompt"] == good.at(0, 1)[0].text)

    def with_bad(index, **options):
        spoilt = [{"prompt": ""} if i == index else row for i, row in enumerate(rows)]
        return PromptDataset(spoilt, tiny.tokenizer(), 8, 3, visits=6, **options)

    assert {prompt.text for prompt in with_bad(unvisited).at(0, 6)} == visited
    with pytest.raises(ConfigError, match=f"prompt {first} of the data set: it is empty"):
        with_bad(first)
    skipping = with_bad(first, on_bad_row="skip")
    assert [p.text for p in skipping.at(0, 5)] == [p.text for p in good.at(1, 5)] and skipping.seen.prompts == 6


def test_the_summary_says_what_was_found_and_shows_the_first_prompt():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<eos> {{ m.content }}{% endfor %}"
    rows = [{"question": text} for text in ("the cat", "the cat", "a dog sat on", "")]
    text = PromptDataset(rows, tokenizer, 3, on_bad_row="skip").summary("dataset")
    assert text.startswith("dataset: 4 rows; prompts from 'question': 3 rendered, 1 of them cut to 3 tokens, 1 of them")
    assert "1 rows skipped, such as prompt 3 of the data set: it is empty" in text and "prompt_as=user" in text
    chats = PromptDataset(rows[:1], tokenizer, 9, format=PromptFormat(prompt_as="user")).summary("dataset")
    assert chats.endswith("as the model sees it:\n<eos> the cat") and "prompt_as=user" not in chats


def stream(rows, **options):
    table = datasets.Dataset.from_list(rows).to_iterable_dataset()
    return PromptStream(from_python(table), tiny.tokenizer(), 8, **options)


def test_a_stream_is_read_as_it_goes_and_a_resumed_run_skips_ahead():
    rows = [{"prompt": f"the {word}", "n": i} for i, word in enumerate(tiny.WORDS[2:9])]
    texts = [prompt.text for prompt in stream(rows).at(0, 20)]
    assert texts == [rows[i % 7]["prompt"] for i in range(20)]
    for start in (0, 3, 7, 12):
        resumed = stream(rows)
        assert [p.text for p in resumed.at(start, 4)] == texts[start : start + 4]
        assert [p.columns["n"] for p in resumed.at(start + 4, 2)] == [(start + 4) % 7, (start + 5) % 7]
        assert [p.text for p in resumed.at(1, 2)] == texts[1:3], "a position that was passed"
    bad = [rows[0], {"prompt": "", "n": 9}, *rows[1:]]
    with pytest.raises(ConfigError, match="prompt 1 of the data set: it is empty"):
        stream(bad).at(0, 3)
    for start in (0, 4, 9):
        assert [p.text for p in stream(bad, on_bad_row="skip").at(start, 9)] == texts[start : start + 9]
    with pytest.raises(ConfigError, match="no row of the data set can be used"):
        stream(bad[1:2], on_bad_row="skip").at(0, 1)


def test_a_run_on_a_stream_that_is_resumed_equals_one_that_was_not(tmp_path):
    rows = [{"prompt": f"the {word}"} for word in tiny.WORDS[2:9]]
    table = datasets.Dataset.from_list(rows).to_iterable_dataset()
    whole = tiny.trainer(tmp_path / "a", prompts=table, total_steps=4).train()
    tiny.trainer(tmp_path / "b", prompts=table, total_steps=2).train()
    rest = tiny.trainer(tmp_path / "b", prompts=table, total_steps=4).train(resume_from_checkpoint=True)
    assert [m["reward"] for m in whole[2:]] == [m["reward"] for m in rest]
    assert [m["policy_loss"] for m in whole[2:]] == [m["policy_loss"] for m in rest]
