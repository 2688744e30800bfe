"""bench/gpu.py without a GPU: the rehearsal of every part, and what is left when a part fails or is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu
from bench.gpu_session import page as gpu_page
from bench.gpu_session import parts as gpu_parts
from bench.gpu_session import process, session, speed
from bench.gpu_session.place import Place
from bench.gpu_session.session import append, read, started_items, unfinished
from bench.measurement.machine import ROOT

COMMAND = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--rehearse", "--commit", "abc"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def records(folder, part, kind=None):
    found = read(folder / f"{part}.jsonl")
    return found if kind is None else [r for r in found if r["record"] == kind]


@pytest.mark.slow
def test_the_rehearsal_runs_every_part(tmp_path):
    done = subprocess.run([*COMMAND, "--out", str(tmp_path)], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    summary = (tmp_path / "summary.md").read_text()
    assert done.stdout.endswith(summary + "\n") and "A rehearsal on a CPU" in summary
    assert len(list(tmp_path.iterdir())) <= 8 and all(path.is_file() for path in tmp_path.iterdir())
    for part in session.SHARES:
        start, *_, end = records(tmp_path, part)
        assert (start["record"], start["part"], start["commit"]) == ("start", part, "abc")
        assert (end["record"], end["status"]) == ("end", "done")
        items = gpu_page.items(records(tmp_path, part))
        assert items and set(items.values()) == {"done"}, items
    checks = [r for part in ("smoke", "correctness") for r in records(tmp_path, part, "check")]
    assert len(checks) == 18 and all(r["status"] == "green" and r["errors"] for r in checks)
    assert all(records(tmp_path, part, "versions")[0]["versions"]["torch"] in summary for part in session.SHARES)
    assert records(tmp_path, "correctness", "test") and records(tmp_path, "launches", "line")
    timed = {r["provider"] for r in records(tmp_path, "rows", "row") if r["seconds"]}
    assert {"pytorch", "safe-kernels triton", "safe-kernels triton, in place"} <= timed
    assert {r["name"] for r in records(tmp_path, "roof", "kernel")} == set(speed.RATES)
    assert [r["name"] for r in records(tmp_path, "roof", "least")] == ["gradient"] and " ms, at least 1.19)" in summary
    (step,) = records(tmp_path, "step", "step")
    assert step["time/update_s"] > 0 and step["memory/peak_gb"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("part", "number"), [("correctness", signal.SIGKILL), ("roof", signal.SIGTERM)])
def test_a_command_that_is_killed_leaves_a_page_and_no_process(part, number, tmp_path):
    out = tmp_path / "out"
    parts = [name for name in session.SHARES if name in ("smoke", part)] if part == "correctness" else [part]
    command = [*COMMAND, "--out", str(out), "--parts", *parts]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: records(out, part, "item"))
    children = children_of(process.pid)
    process.send_signal(number)
    process.wait(20)
    assert children and wait_until(lambda: not any(map(is_running, children)))
    summary = (out / "summary.md").read_text()
    state = "started, and did not end" if number == signal.SIGKILL else "cut"
    assert f"| {part} | {state} |" in summary
    assert all(f"| {name} | done |" in summary for name in parts if name != part)


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
    return True


def children_of(pid):
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


PARTS_THAT_FAIL = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from bench.gpu_session import parts, process
import torch

def raises():
    yield {{"record": "note", "text": "before"}}
    raise ValueError("no such thing")

def runs_out():
    raise torch.OutOfMemoryError("out of memory: 80 GiB")

def crashes():
    os.kill(os.getpid(), signal.SIGSEGV)

def lost(place):
    return not os.environ.pop("LOSE", "")

def hangs():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    time.sleep(1000)

functions = dict(raises=raises, runs_out=runs_out, crashes=crashes, hangs=hangs, last=lambda: [{{"record": "note"}}])
items = [parts.Item(name, 0.0, function) for name, function in functions.items()]
parts.PARTS["smoke"] = lambda place: items
process.TINY_SLACK = 1.0
sys.exit(process.main())
"""


# The processes of parts


def run(tmp_path, *scripts, seconds=120):
    """Each script is a part."""
    parts = []
    for i, text in enumerate(scripts):
        path = tmp_path / f"part{i}.py"
        path.write_text(text)
        parts.append(session.Part(f"part{i}", 1.0, (sys.executable, str(path), "smoke", "--rehearse")))
    found = session.Session(parts, tmp_path / "out", seconds, ("abc", None), True, tmp_path / "site")
    found.start()
    return found


def test_what_fails_costs_itself_alone(tmp_path, capfd):
    bad = PARTS_THAT_FAIL.format(root=str(ROOT))
    found = run(tmp_path, bad, "print('all is well')")
    first = records(tmp_path / "out", "part0")
    statuses = {"raises": "failed", "runs_out": "out of memory", "crashes": "crashed", "hangs": "hung", "last": "done"}
    assert gpu_page.items(first) == statuses
    assert [r["record"] for r in first].count("note") == 2
    reasons = {r["item"]: r["reason"] for r in first if r["record"] == "item" and r["status"] == "failed"}
    assert reasons == {"raises": "ValueError: no such thing"}
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "| part0 | done |" in summary and "| part1 | done |" in summary
    assert "- raises: failed: ValueError: no such thing" in summary and "- hangs: hung" in summary
    assert found.failed()


def test_a_part_that_never_comes_to_an_item_ends_at_its_limit(tmp_path, capfd):
    run(tmp_path, "import time; print('importing', flush=True); time.sleep(1000)", "raise SystemExit(3)", seconds=4)
    ends = [records(tmp_path / "out", f"part{i}", "end")[0] for i in range(2)]
    assert [end["status"] for end in ends] == ["over its limit", "failed"]
    assert "importing" in ends[0]["output"] and 1 < ends[0]["seconds"] < 4


def test_a_lost_device_is_taken_up_in_a_new_process(tmp_path, monkeypatch):
    items = [gpu_parts.Item(name, 0.0, lambda: []) for name in ("first", "second")]
    place = Place(tiny=True, file=tmp_path / "part.jsonl")
    end = time.monotonic() + 60
    monkeypatch.setattr(process, "is_alive", lambda place: False)
    assert process.run_items(items, place, end, set()) == session.LOST
    assert started_items(place.file) == ["first"] and unfinished(place.file) is None
    monkeypatch.undo()
    assert process.run_items(items, place, end, set(started_items(place.file))) == 0
    assert gpu_page.items(read(place.file)) == {"first": "done", "second": "done"}


def test_an_item_that_does_not_fit_the_time_left_is_named(tmp_path):
    place = Place(file=tmp_path / "part.jsonl")
    items = [gpu_parts.Item("long", 50.0, lambda: [])]
    process.run_items(items, place, time.monotonic() + 20, set())
    record, *_ = read(place.file)
    assert record["status"] == "left out" and "20 s were left, it needs 50" in record["reason"]


@pytest.mark.parametrize("part", session.SHARES)
def test_a_part_is_predicted_to_take_half_of_its_limit(part):
    assert 0 < gpu_parts.part_seconds(part) <= session.SHARES[part] / 2
    assert sum(session.SHARES.values()) == 8 * 60


def test_a_line_that_was_cut_short_costs_itself_alone(tmp_path):
    path = tmp_path / "part.jsonl"
    append(path, {"a": 1})
    with path.open("a") as file:
        file.write('{"b": ')
    append(path, {"c": 3})
    assert read(path) == [{"a": 1}, {"c": 3}]


def test_smoke_and_rows_need_pytorch_and_triton_alone(tmp_path):
    blocked = ("transformers", "peft", "accelerate", "tqdm", "pytest", "hypothesis", "matplotlib", "datasets", "yaml")
    script = f"""
import sys
sys.modules.update(dict.fromkeys({blocked!r}))  # as if they were not installed
sys.path.insert(0, {str(ROOT)!r})
from bench.gpu_session import parts, process
place = process.Place(tiny=True, file=process.Path({str(tmp_path / "found.jsonl")!r}))
items = parts.smoke(place) + parts.rows(place)[1:2] + parts.roof(place)[:2] + parts.launches(place)[2:]
sys.exit(process.run_items(items, place, float("inf"), set()))
"""
    command = [sys.executable, "-c", script, "--rehearse"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {r["reason"] for r in records(tmp_path, "found", "item")} == {""}


# The page


START = {"record": "start", "limit_s": 30.0, "rehearsal": False, "commit": "abc", "dirty": False, "gpu": {},
         "time": "now"}  # fmt: skip


END = {"record": "end", "status": "done", "seconds": 3.0, "output": ""}


def row(provider, seconds, **changes):
    found = {
        "record": "row", "suite": "gpu", "item": "one", "provider": provider, "seconds": seconds, "status": "ok",
        "entrance": "hidden", "kl": True, "N": 8, "V": 9, "dtype": "bfloat16", "lacks": [], "reason": "",
        "part": "forward+backward, head frozen", "peak_bytes": 300e6, "gradient_bytes": 0,
    }  # fmt: skip
    return found | changes


def test_the_page_says_which_promise_held():
    errors = {"kl": {"error": 2.0, "allowed": 1.0, "plain": 0.5}}
    kernels = {"plain copy of the logits": 1.0, "statistics": 2.0, "gradient": 1.05}
    parts = {
        "correctness": [{"record": "check", "name": "logits", "status": "green", "errors": {}}],
        "rows": [row("safe-kernels triton", 1.0), row("trl", 2.0), row("pytorch", 3.0)],
        "roof": [
            {"record": "kernel", "name": name, "seconds": x, "bytes": 100, "flops": 0} for name, x in kernels.items()
        ],
    }
    planned = {"record": "planned", "items": ["one"]}
    done = {"record": "item", "item": "one", "status": "done"}
    parts = {name: [START, planned, *found, done, END] for name, found in parts.items()}
    parts["smoke"] = [START, planned, done, END]
    parts["rows"].insert(2, row("safe-kernels triton", 1.0, entrance="loss", peak_bytes=1e9))
    text = gpu_page.summary(parts)
    assert "| exact | yes | 1 of 1 checks and tests |" in text
    assert "| faster than each other | yes | 2 of 2 comparisons |" in text
    assert "| at the roof | no | statistics 50%, gradient 95% |" in text
    assert "| memory | yes | loss 1000 MB of 1200, hidden 300 MB of 400 |" in text
    assert "bench/tune.py" in text and "Wrong or broken" not in text
    parts["correctness"][2] |= {"status": "red", "errors": errors}
    parts["rows"] += [
        row("liger", 0.5, lacks=["kl"]),
        row("safe-kernels triton", None, status="failed", reason="spill"),
    ]
    parts["rows"][3]["peak_bytes"] = 500e6
    text = gpu_page.summary(parts)
    assert "| exact | no | 0 of 1 checks and tests |" in text and "red: logits: kl 2, allowed 1" in text
    assert "| faster than each other | no | 2 of 3 comparisons |" in text and "liger 500.00 ms (lacks kl)" in text
    assert (
        "| memory | no | loss 1000 MB of 1200, hidden 500 MB of 400 |" in text and "failed: safe-kernels triton" in text
    )
    assert "Fix what is wrong" in text and "bench/tune.py" not in text  # first things first


def test_a_promise_is_kept_only_when_all_was_run():
    planned = {"record": "planned", "items": ["one", "two"]}
    one, two = ({"record": "item", "item": name, "status": "done"} for name in ("one", "two"))
    check = {"record": "check", "name": "logits", "status": "green", "errors": {}}
    skipped = {"record": "test", "name": "test", "status": "skipped", "reason": "no tool"}
    smoke = [START, {**planned, "items": ["one"]}, one, check, END]

    def page(*states):
        return gpu_page.summary({"smoke": smoke, "correctness": [START, planned, *states, skipped, END]})

    for states, held in (([one], "so far, not all ran"), ([one, two], "yes")):
        assert f"| exact | {held} | 1 of 1 checks and tests |" in page(*states)
    assert "| exact | so far, not all ran |" in page(one, two | {"status": "left out"})
    cut = [START, planned, one, two | {"status": "started"}, END | {"status": "over its limit"}]
    text = gpu_page.summary({"smoke": smoke, "correctness": cut})
    assert "- correctness: over its limit in two" in text and "--parts correctness --minutes 4" in text
    no_inputs = row("all", None, status="no inputs", reason="out of memory")
    assert gpu_page.problems([START, no_inputs, END]) == ["no inputs: all, hidden with KL 8 x 9 bfloat16, "
                                                         "forward+backward, head frozen: out of memory"]  # fmt: skip


def test_a_rehearsed_part_is_named_beside_measured_ones():
    parts = {"smoke": [START | {"part": "smoke", "rehearsal": True}], "rows": [START | {"part": "rows"}]}
    assert "**smoke: a rehearsal on a CPU" in gpu_page.summary(parts)


def test_a_package_with_a_pth_file_is_found(tmp_path):
    (tmp_path / "behind").mkdir()
    (tmp_path / "behind" / "only_behind_a_pth.py").write_text("")
    (tmp_path / "found.pth").write_text("behind\n")
    script = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from bench.gpu_session import parts, process
parts.PARTS["smoke"] = lambda place: __import__("only_behind_a_pth") and []
sys.exit(process.main())
"""
    command = [sys.executable, "-c", script, "smoke", "--rehearse", "--site", str(tmp_path), "--file"]
    done = subprocess.run([*command, str(tmp_path / "found.jsonl")], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_two_runs_cannot_share_a_folder(tmp_path):
    with session.alone_in(tmp_path), pytest.raises(SystemExit, match="another run writes"), session.alone_in(tmp_path):
        pass


@pytest.mark.parametrize("arguments", [["--minutes", "-1"], ["--full"], ["--install", "."], ["--install", "nowhere"]])
def test_arguments_that_cannot_be_meant(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=arguments[0]):
        gpu.main(["--commit", "abc", *arguments])
    assert not list(tmp_path.iterdir())


def test_without_a_device_nothing_is_tried(tmp_path):
    """A CPU build, or a GPU without its driver: the run ends with the reason, not with its minutes."""
    hidden = ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--commit", "abc", "--out", str(tmp_path)]
    done = subprocess.run(command, env=hidden, capture_output=True, text=True)
    assert done.returncode == 1 and "PyTorch finds no CUDA device" in done.stdout
    assert not records(tmp_path, "correctness") and not records(tmp_path, "smoke", "check")


def test_the_command_itself_needs_nothing_installed():
    """A machine whose PyTorch is broken, too, gets its page."""
    script = "import sys; sys.modules.update(dict.fromkeys(('torch', 'triton', 'numpy'))); import bench.gpu"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_the_page_of_nothing():
    text = gpu_page.summary({name: [] for name in session.SHARES})
    assert text.count("| not started |") == 6 and text.count("| not measured |") == 4
    assert json.dumps(text)
