import pytest
import tiny
from tokenizers.processors import TemplateProcessing

from safe_train.config import ConfigError
from safe_train.formats import transcript_messages
from safe_train.prompts import PromptDataset


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
