"""Rewards: summed, checked and named; from functions, files, models and servers."""

import functools
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import tiny
import torch

from safe_train.config import ConfigError, SafeConfig
from safe_train.rewards.rewards import Rewards, load_reward, text_of
from safe_train.rewards.server import RewardServer


def constant(value):
    def reward(prompts, completions, **columns):
        return [value] * len(completions)

    return reward


def test_rewards_are_summed_with_their_weights():
    def ones(completions, **columns):
        return [1.0] * len(completions)

    def twos(completions, **columns):
        return [2.0] * len(completions)

    scores = Rewards([ones, twos], [1.0, -0.25])(["a", "b"], ["c", "d"], {})
    assert scores["reward"].tolist() == [0.5, 0.5] and scores["twos"].tolist() == [2.0, 2.0]
    with pytest.raises(ConfigError, match="reward_weights must be one number for each reward"):
        Rewards([ones, twos], [1.0])


def test_a_reward_called_reward_does_not_take_the_place_of_the_sum():
    def other(completions, **columns):
        return [2.0] * len(completions)

    def scores(functions, weights=None):
        return {name: x.tolist() for name, x in Rewards(functions, weights)(["a"], ["b"], {}).items()}

    reward = constant(3.0)
    assert scores([reward]) == {"reward": [3.0]}
    assert scores([reward], [0.5]) == {"reward_2": [3.0], "reward": [1.5]}
    assert scores([reward, other]) == {"reward_2": [3.0], "other": [2.0], "reward": [5.0]}


@pytest.mark.parametrize(
    ("reward", "error", "message"),
    [
        (constant(float("nan")), ValueError, "reward 'reward' returned nan for the completion 'b'"),
        (constant("good"), ValueError, "reward 'reward' returned 'good' for the completion 'b'"),
        (constant([1.0]), ValueError, r"reward 'reward' returned \[1.0\] for the completion 'b'"),
        (constant(10**400), ValueError, "reward 'reward' returned 1000"),
        (lambda **kwargs: [1.0, 2.0], ValueError, "returned 2 values for 1 completions"),
        (lambda **kwargs: 0.5, ValueError, "reward '<lambda>' must return a list of one number .*, got 0.5"),
        (lambda **kwargs: None, ValueError, "must return a list .*, got None"),
        (lambda **kwargs: "7", ValueError, "must return a list .*, got '7'"),
        (lambda **kwargs: (x for x in [1.0]), ValueError, "must return a list .*, got <generator"),
        (lambda **kwargs: torch.tensor(0.5), ValueError, "must return a list .*, got 0.5"),
        (lambda **kwargs: torch.ones(1, 1), ValueError, r"returned \[1.0\] for the completion 'b'"),
        (lambda **kwargs: 1 / 0, RuntimeError, "raised ZeroDivisionError"),
    ],
)
def test_a_reward_that_fails_is_named(reward, error, message):
    with pytest.raises(error, match=message):
        Rewards([reward])(["a"], ["b"], {})


@pytest.mark.parametrize(
    "values",
    [
        np.array([1.0, 2.0], np.float32),
        torch.tensor([1, 2]),
        (np.float32(1), torch.tensor(2.0)),
        torch.tensor([1.0, 2.0]).bfloat16(),
    ],
    ids=["array", "tensor", "tuple", "bfloat16"],
)
def test_a_reward_may_return_an_array_or_a_tensor_of_one_axis(values):
    assert Rewards([lambda **kwargs: values])(["a", "b"], ["c", "d"], {})["reward"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("value", [1e39, -3.5e38, 2**200, float("inf"), np.float64(1e300)])
def test_a_number_that_float32_does_not_hold_is_refused_with_its_row(value):
    def judge(completions, **columns):
        return [0.0, value]

    with pytest.raises(ValueError, match=r"reward 'judge' returned .* for the completion 'd' \(row 1\); .* float32"):
        Rewards([judge])(["a", "b"], ["c", "d"], {})


def test_a_weighted_sum_that_float32_does_not_hold_is_refused():
    def large(completions, **columns):
        return [0.0, 3e38]

    scores = Rewards([large], [-1.0])(["a", "b"], ["c", "d"], {})
    assert scores["reward"].tolist() == [0.0, -3e38]
    for weight in (2.0, 1e30):
        with pytest.raises(ValueError, match=r"weighted sum .* for the completion 'd' \(row 1\).*'large': 3e\+38"):
            Rewards([large], [weight])(["a", "b"], ["c", "d"], {})


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_a_weight_that_is_not_a_number_is_refused_before_the_run(weight, tmp_path):
    with pytest.raises(ConfigError, match="reward_weights must be finite numbers"):
        tiny.trainer(tmp_path, reward_weights=[weight])
    assert not list(tmp_path.iterdir())


def test_scores_keep_differences_that_float32_would_lose():
    values = [1e8, 1e8 + 1, 0.1]
    assert Rewards([lambda **columns: values])(["a"] * 3, ["b"] * 3, {})["reward"].tolist() == values


def test_what_a_reward_does_to_its_arguments_stays_with_it():
    messages, facts = [{"role": "user", "content": "the cat"}], {"words": ["a"], "array": np.zeros(2)}
    prompts, completions = [messages, messages], [[{"role": "assistant", "content": "sat"}] for _ in range(2)]
    columns, seen = {"facts": [facts, facts], "lock": [threading.Lock()] * 2}, []

    def meddler(prompts, completions, facts, lock):
        for prompt, completion, fact in zip(prompts, completions, facts, strict=True):
            seen.append((len(prompt), completion[0]["content"], len(fact["words"]), fact["array"].sum()))
            prompt.extend(completion)
            completion[0]["content"] = "changed"
            fact["words"].append("b")
            fact["array"] += 1
        prompts.clear()
        return [0.0] * len(completions)

    def second(prompts, completions, facts, lock):
        return meddler(prompts, completions, facts, lock)

    Rewards([meddler, second])(prompts, completions, columns)
    assert seen == [(1, "sat", 1, 0.0)] * 4 and len(prompts) == 2
    assert messages == [{"role": "user", "content": "the cat"}] and facts["words"] == ["a"]
    assert [c[0]["content"] for c in completions] == ["sat", "sat"] and not facts["array"].any()


def test_a_reward_that_exits_does_not_end_the_run_as_if_it_were_done():
    with pytest.raises(RuntimeError, match="reward 'leaves' raised SystemExit: 0"):

        def leaves(**columns):
            raise SystemExit(0)

        Rewards([leaves])(["a"], ["b"], {})


def test_rewards_of_one_name_are_numbered():
    def far(completions, target):
        return [float(target)] * len(completions)

    class Judge:
        def __call__(self, completions):
            return [5.0] * len(completions)

    def far_2(completions):
        return [4.0] * len(completions)

    near = functools.partial(far, target=1)
    functions = [near, functools.partial(near, target=2), functools.partial(far, target=3), far_2, Judge(), Judge()]
    scores = Rewards(functions)(["a"], ["b"], {})
    expected = {"far": 1.0, "far_2": 2.0, "far_3": 3.0, "far_2_2": 4.0, "Judge": 5.0, "Judge_2": 5.0, "reward": 20.0}
    assert {name: x.item() for name, x in scores.items()} == expected


def test_reward_from_a_file(tmp_path):
    source = tmp_path / "mine.py"
    source.write_text("def length(completions, **columns):\n    return [float(len(c)) for c in completions]\n")
    assert load_reward(f"{source}:length")(completions=["abc"]) == [3.0]


STATEFUL = """
from __future__ import annotations

import dataclasses
import pickle
import typing

calls = []


@dataclasses.dataclass
class Point:
    x: float
    label: typing.ClassVar[str] = "point"


def first(completions, **columns):
    calls.append(1)
    assert typing.get_type_hints(Point)["x"] is float
    return [pickle.loads(pickle.dumps(Point(float(len(calls))))).x for _ in completions]


def second(completions, **columns):
    return [float(len(calls)) for _ in completions]
"""


@pytest.mark.parametrize("name", ["pickle", "random", "tiny", "__main__"])
def test_a_reward_file_replaces_no_module_and_works_as_one(name, tmp_path):
    before = sys.modules[name]
    (tmp_path / f"{name}.py").write_text(STATEFUL)
    first, second = (load_reward(f"{tmp_path}/{name}.py:{function}") for function in ("first", "second"))
    assert sys.modules[name] is before
    assert first(completions=["a"]) == second(completions=["a"]) == [1.0], "of one file there is one module"
    (tmp_path / f"{name}.py").write_text(STATEFUL + "\ncalls.append(0)")
    assert load_reward(f"{tmp_path}/{name}.py:second")(completions=["a"]) == [1.0], "a changed file is loaded anew"


@pytest.mark.parametrize("code", ["1 / 0", "def f(:", "raise SystemExit(0)", "import no_such_module"])
def test_a_reward_file_that_fails_is_an_error_before_the_run(code, tmp_path):
    (tmp_path / "mine.py").write_text(code)
    for _ in range(2):
        with pytest.raises(ConfigError, match="cannot load the reward .*mine.py:f': [A-Z]"):
            load_reward(f"{tmp_path}/mine.py:f")


@pytest.mark.parametrize("name", ["{tmp}/none.py:f", "{tmp}/empty.py:f", "no_such_package:f", "{tmp}/no-model"])
def test_a_reward_that_does_not_load_is_an_error(name, tmp_path):
    """The published code falls back to counting words, silently, and its best score is near that count's ceiling."""
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ConfigError, match="cannot load the reward"):
        load_reward(name.format(tmp=tmp_path))


def test_reward_model_scores_prompt_and_completion(tmp_path):
    from tokenizers.processors import TemplateProcessing
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    settings = {"vocab_size": len(tiny.WORDS), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    for labels in (1, 3):
        config = LlamaConfig(**settings, **heads, num_labels=labels)
        LlamaForSequenceClassification(config).save_pretrained(tmp_path / str(labels))
        tiny.tokenizer().save_pretrained(tmp_path / str(labels))
    reward = load_reward(str(tmp_path / "1"))
    together = reward(["the cat", "a"], [" sat", " dog is good"])
    alone = reward(["the cat"], [" sat"]) + reward(["a"], [" dog is good"])
    assert together == pytest.approx(alone, abs=1e-5) and together[0] != together[1]
    reward.tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<eos> $A", special_tokens=[("<eos>", 1)])
    reward.tokenizer.chat_template = "<eos>{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chat = [[{"role": role, "content": text}] for role, text in (("user", "the cat"), ("assistant", " sat"))]
    assert reward(chat[:1], chat[1:]) == pytest.approx(reward(["the cat"], [" sat"]), abs=1e-5)
    reward.tokenizer.model_max_length = 3
    assert reward(["the cat sat on"], [" a mat"]) == pytest.approx(reward([""], ["a mat"]), abs=1e-5)
    with pytest.raises(ConfigError, match=r"has 3 outputs \(LABEL_0, LABEL_1, LABEL_2\), it must have 1: take"):
        load_reward(str(tmp_path / "3"))
    model = LlamaForSequenceClassification(LlamaConfig(**settings, **heads, num_labels=1)).model
    model.save_pretrained(tmp_path / "no head")  # of a reward: transformers would make one up
    config = json.loads((tmp_path / "no head" / "config.json").read_text())
    (tmp_path / "no head" / "config.json").write_text(json.dumps(config | {"architectures": None, "num_labels": 1}))
    tiny.tokenizer().save_pretrained(tmp_path / "no head")
    with pytest.raises(ConfigError, match="no weights for 1 of its tensors, such as score.weight"):
        load_reward(str(tmp_path / "no head"))


def test_vader_prefers_praise():
    reward = load_reward("vader")
    good, bad = reward(["", ""], ["a wonderful, lovely day", [{"role": "assistant", "content": "a horrible day"}]])
    assert good > 0.5 > -0.4 > bad
    assert text_of([{"role": "assistant", "content": "x"}]) == "x"


class Server:
    """Answers POST requests on loopback as `reply` says: (status, body), or None to say nothing until the end."""

    def __init__(self):
        self.requests, self.reply, self.over = [], None, threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(request)
                reply = outer.reply(len(outer.requests), request)
                if reply is None:
                    outer.over.wait()
                    return
                status, body = reply
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/score"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.over.set()
        self.http.shutdown()
        self.http.server_close()

    def reward(self, retries=2, timeout=20.0, **settings):
        args = SafeConfig(reward_retries=retries, reward_timeout=timeout)
        return RewardServer(self.url, args, first_delay=0.001, **settings)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = Server()
    yield server
    server.close()


def lengths(number, request):
    return 200, {"scores": [float(len(text)) for text in request["completions"]]}


def test_a_server_scores_in_batches_and_sees_the_columns(server):
    server.reply = lengths
    texts = [str(10**i) for i in range(5)]
    reward = server.reward(batch_size=2)
    assert reward(["p"] * 5, texts, answer=list(range(5))) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [request["columns"]["answer"] for request in server.requests] == [[0, 1], [2, 3], [4]]
    assert server.requests[2] == {"prompts": ["p"], "completions": [texts[4]], "columns": {"answer": [4]}}


def test_a_server_is_named_by_its_address_among_the_rewards(server):
    server.reply = lambda number, request: (200, {"rewards": [2, 3]})
    reward = load_reward(server.url)
    assert isinstance(reward, RewardServer)
    scores = Rewards([reward])(["a", "b"], ["c", "d"], {})
    assert scores[server.url.removeprefix("http://")].tolist() == scores["reward"].tolist() == [2.0, 3.0]


def test_a_run_is_rewarded_by_a_server(server, tmp_path):
    server.reply = lengths
    rows = [{"prompt": "the cat", "answer": "dog"}] * 4
    metrics = tiny.trainer(tmp_path, server.url, prompts=rows, total_steps=1, max_new_tokens=3).train()[0]
    assert metrics["reward"] > 0 and server.requests[1]["columns"] == {"answer": ["dog"] * 8}
    assert server.requests[0]["columns"] == {"answer": ["dog"] * 2}  # tried once, before the model was made


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server, status):
    server.reply = lambda number, request: lengths(number, request) if number == 3 else (status, {})
    assert server.reward()(["p"], ["four"]) == [4.0] and len(server.requests) == 3


def test_a_server_that_hangs_is_asked_again(server):
    server.reply = lambda number, request: lengths(number, request) if number >= 2 else None
    assert server.reward(timeout=0.5)(["p"], ["four"]) == [4.0]


@pytest.mark.parametrize(
    ("status", "timeout", "cause"),
    [(None, 0.2, "TimeoutError: timed out"), (503, 20.0, "status 503 Service Unavailable")],
)
def test_a_server_that_never_answers_stops_the_run_and_is_named(server, status, timeout, cause):
    server.reply = lambda number, request: None if status is None else (status, {})
    message = rf"{server.url} gave no answer in 3 attempts of {timeout:g} s \(last error: {cause}"
    with pytest.raises(RuntimeError, match=message):
        server.reward(timeout=timeout)(["p"], ["c"])
    assert len(server.requests) == 3


def test_a_server_that_is_not_there_stops_the_run_too(server):
    reward = server.reward()
    server.close()
    with pytest.raises(RuntimeError, match=r"reward '127.*/score' raised RuntimeError: http.* no answer in 3 attempts"):
        Rewards([reward])(["p"], ["c"], {})


@pytest.mark.parametrize("status", [301, 302, 400, 404])
def test_a_refusal_stops_at_once(server, status):
    server.reply = lambda number, request: (status, {"detail": "no such model"})
    with pytest.raises(RuntimeError, match=rf"refused: status {status} .*no such model"):
        server.reward()(["p"], ["c"])
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>hello</html>", "must answer .*scores.*got b'<html>"),
        (b"[1.0]", "must answer .*scores"),
        (b"3", "must answer .*scores"),
        ({"score": [1.0]}, "must answer .*scores"),
        ({"scores": 1.0}, "list of numbers, got 1.0"),
        ({"scores": ["good"]}, "list of numbers, got .*good"),
        ({"scores": [1.0, 2.0]}, "answered 2 scores for 1 completions"),
        ({"scores": [float("nan")]}, "returned nan for the completion 'c'"),
    ],
)
def test_a_wrong_answer_is_shown(server, body, message):
    server.reply = lambda number, request: (200, body)
    with pytest.raises((RuntimeError, ValueError), match=message):
        Rewards([server.reward()])(["p"], ["c"], {})
    assert len(server.requests) == 1


@pytest.mark.parametrize("url", ["http://", "https:///score", "http://me:secret@host/score"])
def test_an_unusable_server_address_is_an_error(url):
    with pytest.raises(ConfigError, match="must be http.*host.*without a user or password"):
        load_reward(url)


def test_waiting_leaves_the_random_numbers_of_the_run_alone(server):
    import random

    server.reply = lambda number, request: lengths(number, request) if number == 3 else (503, {})
    state = random.getstate()
    server.reward()(["p"], ["c"])
    assert random.getstate() == state
