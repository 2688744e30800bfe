"""`safe-train watch` without a browser: what is read, what is said, and what the server answers."""

import http.client
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import time
from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st
from watching import metrics, served, write_rows, write_run

from safe_train.cli import main
from safe_train.config import ConfigError
from safe_train.run.advice import advice
from safe_train.run.panels import smoothed
from safe_train.watch import plots
from safe_train.watch.curves import thinned
from safe_train.watch.runs import LOCK, SILENT_SECONDS, Metrics, WatchedRun, find_runs
from safe_train.watch.samples import PAGE, Query, Samples


def needs_server():
    for package in ("starlette", "uvicorn", "plotly"):
        pytest.importorskip(package, reason="the extra [watch] is not installed")


# Files that grow


def test_a_half_written_line_waits_for_its_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    found = Metrics(path)
    found.refresh()
    assert found.steps == []
    path.write_text('{"step": 1, "kl": 0.5}\n{"step": 2, "k')
    found.refresh()
    assert found.steps == [1]
    with path.open("a") as file:
        file.write('l": null, "phase": "climbing"}\n{"step": 3, "reward": 1}\n')
    found.refresh()
    assert found.steps == [1, 2, 3] and found.texts == {"phase": "climbing"}
    assert found.columns["kl"][0] == 0.5 and list(map(math.isnan, found.columns["kl"])) == [False, True, True]
    assert found.columns["reward"][2] == 1.0 and all(map(math.isnan, found.columns["reward"][:2]))


@pytest.mark.parametrize("line", ["{", "[1]", "{}", '{"step": "1"}', '{"step": 1.5}', "\x00\x00\x00", "\udcff"])
def test_a_line_that_is_no_row_is_left_out_and_counted(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n'.encode(errors="surrogateescape"))
    run = WatchedRun(tmp_path, "run")
    run.refresh()
    assert run.metrics.steps == [1, 3]
    assert run.warnings("") == ["metrics.jsonl has lines that are not JSON rows with a step: 1 are left out."]


@pytest.mark.parametrize("count", [2, 4, 9])
def test_a_file_that_was_replaced_is_read_anew(tmp_path, count):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, [metrics(step) for step in range(1, 5)])
    found = Metrics(path)
    found.refresh()
    write_rows(tmp_path / "new", [metrics(step, kl=0.7) for step in range(1, 1 + count)])
    (tmp_path / "new").replace(path)
    found.refresh()
    assert found.steps == list(range(1, 1 + count)) and set(found.columns["kl"]) == {0.7} and found.generation == 1


def test_a_file_that_cannot_be_read_is_said(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    run = WatchedRun(tmp_path, "run")
    run.refresh()
    assert any("metrics.jsonl cannot be read" in warning for warning in run.warnings(""))


# Curves


@given(st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan)), max_size=300), st.integers(6, 40))
def test_a_thinned_curve_keeps_ends_and_extremes(y, most):
    places = thinned(y, most)
    assert len(places) <= most and places == sorted(set(places))
    known = [value for value in y if not math.isnan(value)]
    kept = [y[i] for i in places if not math.isnan(y[i])]
    assert (min(known), max(known)) == (min(kept), max(kept)) if known else not kept
    assert not y or (places[0], places[-1]) == (0, len(y) - 1)


@given(st.lists(st.one_of(st.floats(-100, 100), st.just(math.nan)), max_size=60), st.integers(1, 20))
def test_a_smoothed_curve_is_the_mean_around_each_step(y, width):
    for i, found in enumerate(smoothed(y, width)):
        near = [x for x in y[max(0, i - width // 2) : max(0, i - width // 2 + width)] if not math.isnan(x)]
        if i < width // 2:
            near = [x for x in y[: i - width // 2 + width] if not math.isnan(x)]
        assert found == pytest.approx(statistics.fmean(near), abs=1e-9) if near else math.isnan(found)


def test_a_long_run_is_sent_as_a_thousand_points_a_curve(tmp_path):
    spike = [metrics(step, kl=5.0 if step == 7777 else 0.1) for step in range(1, 10_001)]
    run = WatchedRun(write_run(tmp_path / "run", spike, kl_budget=0.3), "run")
    run.refresh()
    for panel in plots.panels({0: run}):
        for width in (1, 50):
            for curve in plots.plot(panel.key, {0: run}, width)["curves"]:
                assert max(map(len, (curve["x"], *(edge["x"] for edge in curve.get("band", []))))) <= 1000
    (kl, bound) = plots.plot("kl", {0: run}, 1)["curves"]
    assert max(kl["y"]) == 5.0 and kl["x"][kl["y"].index(5.0)] == 7777 and set(bound["y"]) == {0.3}
    raw, smooth, _ = plots.plot("kl", {0: run}, 50)["curves"]
    assert max(raw["y"]) == 5.0 and max(smooth["y"]) == pytest.approx((49 * 0.1 + 5.0) / 50)


def test_one_run_has_all_curves_of_a_panel_and_several_have_the_first(tmp_path):
    rows = [metrics(step, value_loss=1.0, value_gap=0.1, mine=step) for step in range(1, 4)]
    safe = WatchedRun(write_run(tmp_path / "safe", rows), "safe")
    grpo = WatchedRun(write_run(tmp_path / "grpo", rows, controller="fixed", critic="none"), "grpo")
    for run in (safe, grpo):
        run.refresh()
    labels = [curve["label"] for curve in plots.plot("critic", {0: safe}, 1)["curves"]]
    assert labels == ["value loss", "|V1 - V2|"]
    both = {0: safe, 1: grpo}
    assert [(c["run"], c["label"]) for c in plots.plot("critic", both, 1)["curves"]] == [(0, "value loss")]
    assert [c["run"] for c in plots.plot("metric:mine", both, 1)["curves"]] == [0, 1]
    assert plots.plot("metric:yours", both, 1) is None and plots.plot("critic", {1: grpo}, 1) is None


# Samples

CHAT = [{"role": "user", "content": "What is 2 + 2?"}]
SAMPLES = [
    {"step": step, "prompt": prompt, "completion": f"{step} {reward}", "reward": reward, "rewards/a": 0.123456}
    for step in (10, 20, 30)
    for prompt, reward in (("The cat", 0.5), (CHAT, -1.0), ("the dog", None), ("The cat", 2.0 + step))
]
TOKENS = [
    {"step": step, "row": row, "tokens": ["a", "b"], "logprob": [-1, -2.0], "entropy": [1, 2], "kl": [0, 1]}
    for step, row in ((10, 1), (30, 3))
] + [
    {"step": 20, "row": 0, "tokens": ["a", "b"], "logprob": [-1.0], "entropy": [1], "kl": [0]},
    {"step": 20, "row": []},
]


@pytest.fixture
def samples(tmp_path):
    write_rows(tmp_path / "samples.jsonl", SAMPLES)
    write_rows(tmp_path / "tokens.jsonl", TOKENS)
    found = Samples(tmp_path / "samples.jsonl", tmp_path / "tokens.jsonl")
    found.refresh()
    return found


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        (Query(), SAMPLES[::-1]),
        (Query(order="oldest", first_step=20), SAMPLES[4:]),
        (Query(order="oldest", last_step=10), SAMPLES[:4]),
        (Query(order="highest", last_step=10), [SAMPLES[i] for i in (3, 0, 1)]),
        (Query(order="lowest", first_step=30, prompt="THE CAT"), [SAMPLES[8], SAMPLES[11]]),
        (Query(order="oldest", prompt="2 + 2"), SAMPLES[1::4]),
        (Query(order="oldest", lowest=0.0, highest=20.0), [SAMPLES[i] for i in (0, 3, 4, 8)]),
        (Query(order="oldest", lowest=-1.0, highest=-1.0, last_step=10), [SAMPLES[1]]),
        (Query(order="oldest", has_tokens=True), [SAMPLES[i] for i in (1, 4, 11)]),
        (Query(page=1), []),
    ],
)
def test_samples_are_filtered_and_ordered(samples, query, wanted):
    count, rows = samples.select(query)
    assert [row["completion"] for row in rows] == [row["completion"] for row in wanted]
    assert count == (len(SAMPLES) if query.page else len(wanted)) and len(SAMPLES) <= PAGE


def test_samples_have_their_tokens_and_their_other_columns(samples):
    rows = {row["completion"]: row for row in samples.select(Query())[1]}
    assert rows["10 -1.0"]["prompt"] == "user: What is 2 + 2?" and rows["10 -1.0"]["more"] == {"rewards/a": "0.1235"}
    assert rows["10 -1.0"]["tokens"]["kl"] == [0, 1] and rows["30 32.0"]["tokens"] is not None
    assert rows["20 0.5"]["tokens"] is None  # of which a number is missing


def test_samples_of_a_run_that_went_back_are_those_of_its_new_steps(samples, tmp_path):
    write_rows(tmp_path / "samples.jsonl", [SAMPLES[0]])
    assert samples.select(Query(first_step=20)) == (8, [])  # replaced since the last look
    samples.refresh()
    assert [row["completion"] for row in samples.select(Query())[1]] == ["10 0.5"]


# Warnings and states


def course(count=40, **changes):
    """Columns of a run that is well, but for what is given as (first half, second half)."""
    usual = {
        "kl": (0.1, 0.2), "kl_threshold": (0.3, 0.3), "entropy": (2.0, 1.8), "reward_std": (0.2, 0.1),
        "sampler_gap": (1e-6, 1e-6), "completions/clipped_fraction": (0.1, 0.1), "prompts/cut_fraction": (0, 0.05),
        "explained_variance": (-0.5, 0.5), "rewards/none_fraction": (0, 0), "budget/projected_fraction": (0, 0.1),
        "bad_steps": (0, 0),
    }  # fmt: skip
    return {name: [a] * (count // 2) + [b] * (count // 2) for name, (a, b) in (usual | changes).items()}


SAID = [
    ({"kl": (0.1, 0.29)}, {"kl_budget": 0.3}, "The KL stands at its budget: 0.29 of 0.3"),
    (
        {"kl": (0.1, 0.29), "budget/projected_fraction": (0.5, 0.8)},
        {"kl_budget": 0.3},
        r"80% of the updates were moved back into it. A lower learning_rate",
    ),
    ({"kl": (0.1, 0.5)}, {"controller": "safe"}, "the controller's threshold 0.3: .*kl_budget=0.3"),
    ({"kl": (0.1, 1.5)}, {"controller": "fixed"}, "The KL is 1.5 nats a token, and nothing bounds it"),
    ({"entropy": (2.0, 0.1)}, {}, "The entropy fell from 2 to 0.1"),
    ({"entropy": (2.0, 4.0)}, {}, "The entropy rose from 2 to 4"),
    ({"reward_std": (0.2, 0.0)}, {}, "nothing to learn from"),
    ({"reward_std": (0.2, 0.001)}, {"algorithm": "grpo"}, "nothing to learn from"),
    ({"rewards/none_fraction": (0.0, 1.0)}, {}, "Every reward is None"),
    (
        {"sampler_gap": (0.0, 0.006)},
        {"dtype": "float32"},
        "differ from the trainer's by 0.006 .* the run stops at 0.01",
    ),
    ({"sampler_gap": (0.0, 0.2)}, {"generation": "vllm"}, "the run stops at 0.3"),
    ({"sampler_gap": (0.0, 0.2)}, {"max_sampler_gap": 0.39}, "the run stops at 0.39"),
    ({"bad_steps": (0.0, 0.25)}, {}, "25% of the optimizer steps were left out"),
    ({"completions/clipped_fraction": (0.1, 0.6)}, {}, "60% of the completions never end"),
    ({"prompts/cut_fraction": (0.0, 0.2)}, {}, "20% of the prompts lose their beginning"),
    ({"explained_variance": (0.5, -0.5)}, {}, "The critic explains less"),
]


@pytest.mark.parametrize(("changes", "settings", "sentence"), SAID)
def test_what_asks_for_a_hand_is_said(changes, settings, sentence):
    import re

    (said,) = advice(course(**changes), settings)
    assert re.search(sentence, said)
    swapped = {name: (b, a) for name, (a, b) in changes.items()}  # over by now, but for the change itself
    if not any(name in ("entropy", "reward_std") for name in changes):
        assert advice(course(**swapped), settings) == []


@pytest.mark.parametrize(
    "settings", [{}, {"kl_budget": 0.3}, {"algorithm": "grpo", "controller": "fixed", "critic": "none"}]
)
def test_a_run_that_is_well_is_left_alone(settings):
    assert advice(course(), settings) == [] and advice({}, settings) == []
    assert advice({"kl": [5.0] * 4}, settings) == []  # too few rollouts to tell
    assert advice(course(sampler_gap=(0.0, 0.05)), settings | {"dtype": "bfloat16"}) == []
    assert advice(course(sampler_gap=(0.0, 0.05)), settings, "cuda:0") == []
    assert advice(course(reward_std=(0.2, 0.0)), settings | {"algorithm": "distill"}) == []


def state(folder, seconds=0.0, **lock):
    if lock:
        (folder / LOCK).write_text(json.dumps(lock))
    before = time.time() - seconds
    os.utime(folder / "metrics.jsonl", (before, before))
    run = WatchedRun(folder, "run")
    run.refresh()
    return run.state()


def test_a_run_is_running_finished_stopped_killed_or_silent(tmp_path):
    from safe_train.run import folder_lock

    assert LOCK == folder_lock.NAME
    rows, here = [metrics(step) for step in range(1, 4)], socket.gethostname()
    assert state(write_run(tmp_path / "finished", rows), 1e6) == ("finished", "")
    folder = write_run(tmp_path / "run", rows, total_steps=10)
    assert state(folder, 3600)[0] == "stopped" and f"--resume output_dir={folder}" in state(folder, 3600)[1]
    assert state(folder, 1, host=here, pid=os.getpid()) == ("running", "")
    word, said = state(folder, 2 * SILENT_SECONDS, host="elsewhere", pid=1)
    assert word == "silent" and "No step for 4 min" in said and "elsewhere" in said
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    word, said = state(folder, 1, host=here, pid=gone.pid)
    assert word == "killed" and f"process {gone.pid} is gone, after step 3 of 10" in said
    assert state(write_run(tmp_path / "new", [], total_steps=10)) == ("waiting", "")


def test_folders_of_runs_are_found_and_named(tmp_path):
    for place in ("a/run", "b/run", "b/other"):
        write_run(tmp_path / place, [metrics(1)])
    found = find_runs([tmp_path / "a" / "run", tmp_path / "b"])
    names = [run.name for run in found]
    assert names == [str(tmp_path / "a" / "run"), "other", str(tmp_path / "b" / "run")]
    with pytest.raises(ConfigError, match="holds no run"):
        find_runs([tmp_path])
    assert main(["watch", str(tmp_path / "nowhere")]) == 2


# The server


def get(port, path, host=None, method="GET", **given):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    target = path + ("?" + urlencode(given) if given else "")
    connection.request(method, target, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body, dict(answer.getheaders())


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def test_the_server_answers_reads_and_nothing_else(tmp_path):
    needs_server()
    secret = write_run(tmp_path / "secret", [metrics(1)], model="secret")
    folder = write_run(tmp_path / "run", [metrics(step, kl=math.nan) for step in (1, 2)], SAMPLES, TOKENS, beta=0.7)
    before = contents(tmp_path)
    with served(folder, names=["gpu7"]) as port:
        status, body, headers = get(port, "/api/state")
        (run,) = json.loads(body, parse_constant=pytest.fail)["runs"]
        assert (status, run["name"], run["step"], run["kl"]) == (200, "run", 2, None)
        assert "script-src 'self'" in headers["content-security-policy"] and headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in headers and headers["x-content-type-options"] == "nosniff"
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", ""):
            assert get(port, "/api/state", host)[0] == 400, host
        for host in ("localhost", "127.0.0.1:1", "gpu7", "[::1]:80"):
            assert get(port, "/api/state", host)[0] == 200, host
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            assert get(port, "/api/state", method=method)[0] == 405
        for path in ("/../secret/config.yaml", "/..%2fsecret%2fconfig.yaml", "/page/../../tail.py", str(secret)):
            assert get(port, path)[0] == 404, path
        for given in (
            {"run": 1},
            {"run": -1},
            {"run": "../secret"},
            {"lowest": "x"},
            {"order": "x"},
            {"source": "../x"},
        ):
            status, body, _ = get(port, "/api/samples", **given)
            assert status == 400 and json.loads(body)["error"], given
        assert get(port, "/api/panel", key="kl", runs="0,7")[0] == 400
        assert get(port, "/api/panel", key="../kl", runs="0")[0] == 400
        assert get(port, "/api/panel", key="reward", runs="0", smooth="0")[0] == 400
        settings = json.loads(get(port, "/api/settings", run=0)[1])["settings"]
        assert {"name": "beta", "value": "0.7", "is_changed": True} in settings
        assert {"name": "algorithm", "value": "safe", "is_changed": False} in settings
        found = json.loads(get(port, "/api/samples", run=0, order="highest")[1])
        assert found["count"] == 9 and found["rows"][0]["completion"] == "30 32.0"
        for path, start in (("/", b"<!doctype html>"), ("/page.js", b'"use strict"'), ("/plotly.js", b"/*")):
            status, body, headers = get(port, path)
            assert status == 200 and body.startswith(start) and "content-security-policy" in headers, path
    assert contents(tmp_path) == before


def test_watching_imports_no_pytorch():
    needs_server()
    code = "import sys, safe_train.watch.server as s; s.make_app([]); print({'torch', 'plotly'} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


def test_what_is_not_installed_is_named(tmp_path, monkeypatch, capsys):
    folder = write_run(tmp_path / "run", [metrics(1)])
    monkeypatch.setattr("safe_train.watch.beside.PACKAGES", ("json", "no_such_package"))
    for command in (
        ["watch", str(folder)],
        ["run", "--watch", "--config", "demo.yaml", f"output_dir={tmp_path / 'new'}"],
    ):
        assert main(command) == 2
        assert (
            "watching needs no_such_package, which this brings: pip install 'safe-kernels[watch]'"
            in capsys.readouterr().err
        )
    assert not (tmp_path / "new").exists()


def test_a_name_that_stands_for_all_is_refused(tmp_path, capsys):
    needs_server()
    folder = write_run(tmp_path / "run", [metrics(1)])
    assert main(["watch", str(folder), "--allow-host", "*"]) == 2
    assert "--allow-host takes whole names" in capsys.readouterr().err


def test_a_port_that_is_taken_is_left_to_its_owner():
    from safe_train.watch.server import address, listen

    first = listen("127.0.0.1", 0)
    port = first.getsockname()[1]
    with first, pytest.raises(ConfigError, match=f"cannot listen at 127.0.0.1:{port}"):
        listen("127.0.0.1", port)
    with pytest.raises(ConfigError, match="cannot listen at 127.0.0.1:99999"):
        listen("127.0.0.1", 99999)
    with listen("127.0.0.1", None) as usual, listen("127.0.0.1", None) as other:
        assert address(usual) != address(other)


@pytest.mark.integration
def test_a_page_beside_a_run_ends_with_it(tmp_path, capfd):
    needs_server()
    from safe_train.watch.beside import watched

    with watched(tmp_path / "run"):
        said, deadline = "", time.monotonic() + 120
        while " shows " not in said and time.monotonic() < deadline:
            time.sleep(0.05)
            said += capfd.readouterr().out
        port = int(said.split("http://127.0.0.1:")[1].split()[0])
        (run,) = json.loads(get(port, "/api/state")[1])["runs"]
        assert (run["name"], run["state"]) == ("run", "waiting")
    with pytest.raises(ConnectionRefusedError):
        get(port, "/api/state")
    assert f"safe-train watch {tmp_path / 'run'}" in capfd.readouterr().out
