"""Chat templates: what ends a turn, where the BOS token is, and how a long chat is cut."""

import pytest
import tiny
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from safe_train.config import ConfigError
from safe_train.data.chat import Chat, cut_chat, text_tokens, turn_end
from safe_train.data.formats import PromptFormat
from safe_train.data.prompts import PromptDataset

SPECIAL = ["<s>", "</s>", "[INST]", "[/INST]", "<start>", "<end>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|user|>"]
# Shortened, with what matters here: who writes a BOS token, and what stands behind an answer.
FAMILIES = {
    "llama 3": (
        True,
        "{{ bos_token }}{% for m in messages %}<start> {{ m.role }} <end> {{ m.content | trim }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<start> assistant <end>{% endif %}",
        "<|end|>",
    ),
    "gemma": (
        True,
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}<start>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end>\n{% endfor %}{% if add_generation_prompt %}<start>model\n{% endif %}",
        "<end>",
    ),
    "qwen": (
        False,
        "{% if messages[0].role != 'system' %}<|im_start|>system\nthe good<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
    ),
    "mistral": (
        True,
        "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}"
        "{% endif %}{% endfor %}",
        "</s>",
    ),
    "phi": (
        False,
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        "<|end|>",
    ),
}


def tokenizer_with(template, begins_texts=False):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    if begins_texts:
        bos = [("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=bos)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chat_has_the_bos_token_that_its_family_writes_and_ends_its_turns_with_the_familys_token(family):
    begins_texts, template, end = FAMILIES[family]
    tokenizer = tokenizer_with(template, begins_texts)
    chat = [{"role": "user", "content": "the cat"}]
    prompt = PromptDataset([{"prompt": chat}], tokenizer, 99)[0]
    assert prompt.ids == tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    bos = tokenizer.bos_token_id
    assert prompt.ids.count(bos) == (prompt.ids[0] == bos) == begins_texts
    assert tokenizer.decode(turn_end(tokenizer)) == end
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    again = PromptDataset([{"prompt": rendered}], tokenizer, 99)[0]  # as people store it
    assert again.ids == prompt.ids
    text = PromptDataset([{"prompt": "the cat"}], tokenizer, 99)[0]
    assert text.ids.count(bos) == begins_texts and text.ids == tokenizer("the cat")["input_ids"]
    turns = [{"role": ("user", "assistant")[i % 2], "content": "the cat sat"} for i in range(9)]
    cut = PromptDataset([{"prompt": turns}], tokenizer, 25)[0]
    assert cut.is_cut and cut.ids.count(bos) == (cut.ids[0] == bos) == begins_texts


def test_a_text_that_does_not_begin_with_the_bos_token_keeps_the_one_that_the_tokenizer_adds():
    tokenizer = tokenizer_with(None, begins_texts=True)
    bos = tokenizer.bos_token_id
    assert (
        text_tokens(tokenizer, "<s> the")
        == [bos, tokenizer.convert_tokens_to_ids("the")]
        == text_tokens(tokenizer, "the")
    )
    assert text_tokens(tokenizer_with(None), "<s> <s>") == [bos, bos]


def test_a_template_without_the_bos_token_of_texts_is_mentioned():
    tokenizer = tokenizer_with(FAMILIES["phi"][1], begins_texts=True)
    chat = PromptDataset([{"prompt": [{"role": "user", "content": "the cat"}]}], tokenizer, 99)
    assert "writes no '<s>', the BOS token" in chat.summary("dataset")


NEEDS_SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('a system message') }}{% endif %}"
EACH = "{% for m in messages %}<start> {{ m.role }} "


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (EACH + "{{ m.content | lower | trim }}\n<end>{% endfor %}", ["<end>"]),
        (EACH + "{{ m.content | reverse }}<end>{% endfor %}", ["<end>"]),
        (EACH + "{% for part in m.content %}{{ part['text'] }}{% endfor %}<end>{% endfor %}", ["<end>"]),
        (EACH + "{{ m.content[0]['text'] | upper }}<end>{% endfor %}", ["<end>"]),
        (NEEDS_SYSTEM + EACH + "{{ m.content }}<end>{% endfor %}", ["<end>"]),
        (EACH + "{{ m.content }} the{% endfor %}", []),
        (EACH + "{{ m.content }}{% endfor %}", []),
        (EACH + "<end>{% endfor %}", []),  # it writes no words
        ("{{ messages[0].content.no.such.thing }}", []),
        ("{{ raise_exception('no') }}", []),
        ("{% if think %}" + EACH + "{{ m.content }}<|end|>{% endfor %}{% endif %}", ["<|end|>"]),
        (None, []),
    ],
)  # fmt: skip
def test_the_token_that_ends_a_turn_is_found(template, end):
    tokenizer = tokenizer_with(template)
    assert [tokenizer.decode([token]) for token in turn_end(tokenizer, {"think": True})] == end


@pytest.mark.parametrize("limit", [30, 77, 400])
def test_a_chat_of_many_turns_is_cut_in_few_renderings(limit, monkeypatch):
    """What is left is the longest that fits, as if each beginning had been tried."""
    tokenizer = tokenizer_with(FAMILIES["qwen"][1])
    words = ("the cat", "a dog sat on the mat", "very good")
    turns = [{"role": ("user", "assistant")[i % 2], "content": words[i % 3]} for i in range(1201)]
    chat, renderings = Chat([{"role": "system", "content": "good"}, *turns]), []
    ids = chat.tokens(tokenizer)

    def left(first):
        return [chat.messages[0], *turns[first:]]

    def length(first):
        return len(tokens(Chat(left(first)), tokenizer))

    tokens = Chat.tokens
    monkeypatch.setattr(Chat, "tokens", lambda self, tokenizer: renderings.append(1) or tokens(self, tokenizer))
    messages, found = cut_chat(tokenizer, chat, ids, limit)
    first = len(turns) + 1 - len(messages)
    assert messages == left(first) and messages[1]["role"] == "user" and len(renderings) < 16
    assert len(found) == length(first) <= limit < length(first - 2)


def test_a_last_turn_of_many_words_is_cut_in_few_renderings(monkeypatch):
    tokenizer, renderings = tokenizer_with(FAMILIES["qwen"][1]), []
    chat = Chat([{"role": "user", "content": "the cat sat on a mat " * 500}])
    ids, tokens = chat.tokens(tokenizer), Chat.tokens
    monkeypatch.setattr(Chat, "tokens", lambda self, tokenizer: renderings.append(1) or tokens(self, tokenizer))
    messages, found = cut_chat(tokenizer, chat, ids, 40)
    assert len(found) == 40 and messages[0]["content"].endswith("on a mat") and len(renderings) < 20


def test_templates_from_a_file_and_tools_from_a_file(tmp_path, capsys):
    template = "{% for t in tools %}{{ t.name }} {% endfor %}{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
    (tmp_path / "chat.jinja").write_text(template)
    (tmp_path / "tools.json").write_text('[{"name": "dog"}]')
    settings = {"chat_template": str(tmp_path / "chat.jinja"), "tools": str(tmp_path / "tools.json"), "total_steps": 1}
    rows = [{"prompt": [{"role": "user", "content": "the cat"}]}]
    run = tiny.trainer(tmp_path / "run", prompts=rows, **settings)
    assert run.prompts[0].ids == tiny.tokenizer()("dog the cat <eos>")["input_ids"]
    said = capsys.readouterr().out
    assert "dataset: the first prompt as the model sees it:\ndog the cat <eos>" in said
    assert "a completion ends with '<eos>' (1)" in said
    for name in ("chat_template", "tools"):
        with pytest.raises(ConfigError, match=f"cannot read {name} '{tmp_path}/none', which must be a file"):
            tiny.trainer(tmp_path / "other", prompts=rows, **{**settings, name: f"{tmp_path}/none"})


def test_a_text_prompt_never_touches_the_template():
    tokenizer = tokenizer_with("{{ raise_exception('no chat here') }}")
    assert PromptDataset([{"prompt": "the cat"}], tokenizer, 9)[0].ids == tokenizer("the cat")["input_ids"]
    with pytest.raises(ConfigError, match="prompt 0 .*the chat template refuses it: .*no chat here"):
        PromptDataset([{"prompt": "the cat"}], tokenizer, 9, format=PromptFormat(prompt_as="user"))
