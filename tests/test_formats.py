"""Rows as people have them: the public formats, and what the model is given of them."""

import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import tiny

from safe_train.cli import main
from safe_train.config import ConfigError
from safe_train.data.formats import PromptFormat
from safe_train.data.prompts import PromptDataset
from safe_train.run.report import read_rows

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


DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "trainer.md").read_text()
COMMANDS = re.findall(r"^    (safe-train run .*'?dataset=.*reward=rewards.*)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_runs_of_the_page_start_from_the_files_beside_it(command, tmp_path, monkeypatch, capsys):
    shutil.copytree(DOCS / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path / "examples")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE + "<eos>"
    tiny.model(max_position_embeddings=1024).save_pretrained("model")
    tokenizer.save_pretrained("model")
    arguments = shlex.split(command)[1:]
    small = "use_cpu=true total_steps=2 prompts_per_step=2 max_new_tokens=4 eval_completions=2 lora_r=4".split()
    small += ["eval_every=1"] if "eval_every" in command else []
    assert main([*(a.replace("Qwen/Qwen2.5-0.5B-Instruct", "model") for a in arguments), *small]) == 0
    said = capsys.readouterr().out
    assert re.search(r"dataset: \d+ rows; prompts from '(messages|question|chosen)'.* rendered", said)
    assert "the first prompt as the model sees it:\n" in said and "prompt_as=user makes" not in said
    rows = read_rows(next(Path("runs").glob("*/metrics.jsonl")))
    assert len(rows) == 2 and ("eval/reward" in rows[0]) == ("eval_every" in command)


def test_the_rewards_beside_the_page():
    namespace = runpy.run_path(str(DOCS / "examples" / "rewards.py"))
    answers = ["6 * 12 = 72\n#### 22", "1200 - 200\n#### 1,000", "3 - 8\n#### -5", "#### 9"]
    said = ["72, and then 22.", [{"role": "assistant", "content": "1000 litres"}], "5", "nine"]
    assert namespace["correct"](completions=said, answer=answers) == [1, 1, 0, 0]
    assert namespace["brief"](prompts=[], completions=["a " * 20, [{"content": "a " * 10}]]) == [0, -0.5]


def test_the_page_has_three_runs():
    assert len(COMMANDS) == 3 and {path.name for path in (DOCS / "examples").iterdir() if path.is_file()} == {
        "chats.parquet",
        "questions.csv",
        "transcripts.jsonl",
        "rewards.py",
    }
