"""Rows as people have them: the public formats, and what the model is given of them."""

import csv
import dataclasses
import json
import re
import shlex
from pathlib import Path

import datasets
import pytest
import tiny

from safe_train import SafeTrainer
from safe_train.config import ConfigError, SafeConfig
from safe_train.formats import PromptFormat
from safe_train.prompts import PromptDataset

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
ASK, ANSWER = {"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}
SYSTEM = {"role": "system", "content": "good"}


def data(rows, template=TEMPLATE, limit=99, columns=None, on_bad_row="error", visits=None, **settings):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    options = {"columns": columns, "on_bad_row": on_bad_row, "visits": visits}
    return PromptDataset(rows, tokenizer, limit, format=PromptFormat(**settings), **options)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "the cat", "completion": "sat"}, "the cat"),  # TRL's, in text and chat
        ({"prompt": [ASK], "chosen": [ANSWER], "rejected": [ANSWER]}, [ASK]),
        ({"messages": [SYSTEM, ASK, ANSWER]}, [SYSTEM, ASK]),
        ({"messages": [ASK]}, [ASK]),
        ({"chosen": [ASK, ANSWER], "rejected": [ASK, ANSWER]}, [ASK]),
        ({"chosen": "\n\nHuman: the cat\n\nAssistant: sat", "rejected": ""}, [ASK]),  # hh-rlhf
        ({"question": "the cat", "answer": "#### 42"}, "the cat"),  # GSM8K
        ({"instruction": "the cat", "input": "", "output": "sat"}, "the cat"),  # Alpaca
        ({"instruction": "the cat", "input": "a dog", "output": "sat"}, "the cat\n\na dog"),
        (
            {"conversations": [{"from": "human", "value": "the cat"}, {"from": "gpt", "value": "sat"}]},
            [ASK],
        ),  # ShareGPT
        ({"conversations": [{"from": "system", "value": "good"}, {"from": "user", "value": "the cat"}]}, [SYSTEM, ASK]),
        ({"conversations": [ASK, ANSWER]}, [ASK]),
        ({"messages": [ASK, ANSWER], "question": "other", "prompt": "first"}, "first"),
        ({"prompt": None, "messages": [ASK, ANSWER]}, [ASK]),
    ],
)
def test_public_formats_work_as_they_are(row, prompt):
    found = data([row])[0]
    assert found.text == prompt
    assert found.columns == {k: v for k, v in row.items() if k != data([row]).format.prompt_column}


def test_a_conversation_that_ends_with_a_tools_result_is_whole():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    turns = [ASK, call, {"role": "tool", "content": "bad"}]
    assert data([{"messages": turns}])[0].text == turns


def test_the_prompt_column_and_the_others_can_be_chosen():
    rows = [{"prompt": "other", "problem": "the cat", "answer": "1", "id": 7}]
    found = data(rows, prompt_column="problem", columns=["answer"])[0]
    assert found.text == "the cat" and found.columns == {"answer": "1"}
    with pytest.raises(ConfigError, match="prompt_column 'problen' is no column of .*; did you mean 'problem'"):
        data(rows, prompt_column="problen")
    with pytest.raises(ConfigError, match="columns solution: not in the data set, which has prompt, problem"):
        data(rows, columns=["solution"])


def test_text_becomes_a_users_turn_and_chats_get_a_systems_message():
    row = {"question": "the cat"}
    assert data([row], prompt_as="user")[0].text == [ASK]
    assert data([row], prompt_as="user", system_prompt="good")[0].text == [SYSTEM, ASK]
    assert data([{"prompt": [ASK]}], system_prompt="good")[0].text == [SYSTEM, ASK]
    own = [{"role": "system", "content": "bad"}, ASK]
    assert data([{"prompt": own}], system_prompt="good")[0].text == own
    with pytest.raises(ConfigError, match="system_prompt needs chats.* set prompt_as=user"):
        data([row], system_prompt="good")


def test_an_answer_that_was_begun_is_continued_when_the_settings_or_the_row_say_so():
    template = TEMPLATE + "{% if add_generation_prompt %}assistant{% endif %}"
    chat, words = [ASK, ANSWER], tiny.tokenizer()("user the cat assistant sat")["input_ids"]
    with pytest.raises(ConfigError, match="prompt 0 .* ends with an assistant's message: set continue_final_message"):
        data([{"prompt": chat}], template)
    for row, setting in (({}, True), ({"continue_final_message": True}, False)):
        found = data([{"prompt": chat, **row}], template, continue_final_message=setting)[0]
        assert found.ids == words and found.text == chat
    whole = data([{"messages": chat}], template, continue_final_message=True)[0]
    assert whole.ids == words
    asked = data([{"prompt": [ASK]}], template, continue_final_message=True)[0]
    assert asked.ids == tiny.tokenizer()("user the cat assistant")["input_ids"]


def test_tools_parts_and_arguments_reach_the_template():
    """Tables give each object the keys of all objects: a template is not shown those without a value."""
    template = (
        "{% for t in tools or [] %}{{ t.name }} {% for k in t.parameters %}{{ k }} {% endfor %}{% endfor %}"
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
        "{{ part.text }}{% endfor %}{% endif %} {% endfor %}"
        "{% if enable_thinking is defined %}{{ 'happy' if enable_thinking else 'sad' }}{% endif %}"
    )
    parts = [{"role": "user", "content": [{"type": "text", "text": "the cat", "image": None}]}]
    tools = [{"name": "dog", "parameters": {"tree": {"type": "int"}, "under": None}}]

    def seen(row, **settings):
        return data([row], template, **settings)[0].ids

    def words(text):
        return tiny.tokenizer()(text)["input_ids"]

    assert seen({"prompt": parts}) == words("the cat")
    for given in (tools, '[{"name": "dog", "parameters": {"tree": {"type": "int"}}}]'):
        assert seen({"prompt": parts, "tools": given}) == words("dog tree the cat")
    assert seen({"prompt": [ASK]}, tools=tools) == words("dog tree the cat")
    assert seen({"prompt": [ASK]}, template_kwargs={"enable_thinking": False}) == words("the cat sad")
    assert seen({"prompt": [ASK], "chat_template_kwargs": {"enable_thinking": True}}) == words("the cat happy")
    with pytest.raises(ConfigError, match="tools must be a list, or one written as JSON"):
        seen({"prompt": parts, "tools": "dog"})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": [ASK]}, {"prompt": [{"role": "user", "content": ""}]}], "prompt 1 .* it is empty"),
        ([{"conversations": [{"from": "narrator", "value": "a"}]}], "'narrator' is no speaker of ShareGPT's"),
        ([{"prompt": [ASK]}, {"prompt": [SYSTEM, ASK]}], "prompt 1 .* template refuses it: .*no system message"),
        ([{"chosen": [{"role": "assistant", "content": "a"}]}], "no turn of a user"),
    ],
)
def test_rows_that_cannot_be_rendered_are_errors_or_left_out(rows, message):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}" + TEMPLATE
    with pytest.raises(ConfigError, match=message):
        data(rows, template)
    good = {"conversations" if "conversations" in rows[0] else next(iter(rows[0])): [ASK]}
    kept = data([*rows, good], template, on_bad_row="skip")
    assert len(kept) == len(rows) and len(kept.seen.skipped) == 1 and re.search(message, kept.seen.skipped[0])
    assert all(prompt.text == [ASK] for prompt in (*kept.at(0, 9), *kept.in_turn(0, 9)))


DOCS = Path(__file__).parents[1] / "docs" / "trainer.md"
COMMANDS = re.findall(r"^    (safe-train run .*'?dataset=.*reward=rewards.*)$", DOCS.read_text(), re.MULTILINE)


def public_files(folder):
    """Small files in the shapes that the page names."""
    questions = [("the cat and the dog is", "1"), ("the tree, or a mat", "2"), ("is a dog happy", "3")] * 2
    chats = [{"messages": [ASK, ANSWER, {"role": "user", "content": text}, ANSWER]} for text, _ in questions]
    datasets.Dataset.from_list(chats).to_parquet(str(folder / "chats.parquet"))
    with (folder / "questions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("question", "answer"), *questions])
    turns = [f"\n\nHuman: {text}\n\nAssistant: the cat\n\nHuman: the dog\n\nAssistant: " for text, _ in questions * 3]
    lines = [json.dumps({"chosen": turn + "good", "rejected": turn + "bad"}) + "\n" for turn in turns]
    (folder / "transcripts.jsonl").write_text("".join(lines))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_runs_of_the_page_start_from_public_formats(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    public_files(tmp_path)
    (tmp_path / "rewards.py").write_text(
        "def mine(prompts, completions, **columns):\n"
        "    assert all(prompt[-1]['role'] == 'user' for prompt in prompts)\n"
        "    return [float(len(completion[-1]['content'])) for completion in completions]\n"
    )
    pairs = [pair for pair in shlex.split(command) if "=" in pair]
    small = {
        k: v
        for k, v in dataclasses.asdict(tiny.settings("runs/tiny")).items()
        if k not in dict(p.split("=", 1) for p in pairs)
    }
    changed = [f"{k}={json.dumps(v)}" for k, v in small.items() if v != getattr(SafeConfig(), k) and k != "output_dir"]
    args = SafeConfig.load(None, [*changed, *pairs, "total_steps=1"])
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE + "<eos>"
    monkeypatch.setattr("safe_train.trainer.load_tokenizer", lambda args: tokenizer)
    monkeypatch.setattr("safe_train.trainer.load_model", lambda *_: tiny.model())
    run = SafeTrainer(args=args)
    assert len(run.train()) == 1
    said = capsys.readouterr().out
    assert re.search(r"dataset: \d+ rows; prompts from '(messages|question|chosen)'.* rendered.*repeat another", said)
    assert "the first prompt as the model sees it:\n" in said and "prompt_as=user makes" not in said
    if args.eval_dataset:
        assert run.evaluate().reward >= 0


def test_the_page_has_three_runs():
    assert len(COMMANDS) == 3
