"""One run a folder, with real processes."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time

import processes
import pytest
import tiny
from test_checkpoint import metrics, prepare, rows_written

from safe_train.cli import main
from safe_train.config import ConfigError
from safe_train.run import folder_lock
from safe_train.run.folder_lock import FolderLock

HOLD = """
import os, sys, time
from pathlib import Path
from safe_train.run.folder_lock import FolderLock

lock = FolderLock(Path(sys.argv[1]))
lock.acquire()
child = os.fork() if len(sys.argv) > 2 else 1
if child:
    print(child, flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds the folder `run`, and returns it with what it printed."""
    started = []

    def start(*options):
        command = [sys.executable, "-c", HOLD, str(tmp_path / "run"), *options]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1], int(started[-1].stdout.readline())

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_folder_in_use_is_refused_whichever_way_with_its_owners_host_and_pid(holder, tmp_path, capsys):
    run = tmp_path / "run"
    settings = [*prepare(tmp_path, total_steps=2, save_every=1), f"output_dir={run}"]
    assert main(["run", *settings]) == 0
    files = ["checkpoints", "config.yaml", "environment.json", "metrics.jsonl", "samples.jsonl", "tokens.jsonl"]
    assert sorted(path.name for path in run.iterdir()) == files
    before = metrics(run)
    owner, _ = holder()
    capsys.readouterr()
    for options in ([], ["--resume"], ["--overwrite"], ["--resume-from", str(run / "checkpoints" / "step-1")]):
        assert main(["run", *settings, "total_steps=3", *options]) == 2
        said = capsys.readouterr().err
        if options:  # else the finished run is reason enough
            assert f"run that is going on, of process {owner.pid} on {os.uname().nodename}, since 20" in said
    assert metrics(run) == before
    assert main(["eval", str(run), f"eval_dataset={tmp_path / 'prompts.jsonl'}", "eval_completions=4"]) == 0
    owner.kill()
    owner.wait()
    assert (run / folder_lock.NAME).exists()  # left behind, and no lock any more
    assert main(["run", *settings, "total_steps=3", "--resume"]) == 0 and rows_written(run) == 3
    assert not (run / folder_lock.NAME).exists()


def test_a_new_folder_in_use_is_refused_before_its_first_step(holder, tmp_path, capsys):
    holder()
    for options in ([], ["--overwrite"]):
        assert main(["run", *prepare(tmp_path), f"output_dir={tmp_path / 'run'}", *options]) == 2
        assert "belongs to a run that is going on" in capsys.readouterr().err


@pytest.mark.parametrize("left_behind", ["", "killed"])
def test_a_refused_run_waits_until_the_owner_has_signed(left_behind, holder, tmp_path):
    run = tmp_path / "run"
    if left_behind:
        killed, _ = holder()
        killed.kill()
        killed.wait()
    run.mkdir(exist_ok=True)
    descriptor = os.open(run / folder_lock.NAME, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    signing = threading.Timer(0.2, folder_lock.sign, [descriptor])
    signing.start()
    with pytest.raises(ConfigError, match=f"of process {os.getpid()} on {os.uname().nodename}, since 20"):
        FolderLock(run).acquire()
    signing.join()
    os.close(descriptor)


def test_a_forked_child_does_not_keep_the_folder_when_its_parent_is_killed(holder, tmp_path):
    parent, child = holder("fork")
    try:
        with pytest.raises(ConfigError, match=f"process {parent.pid} on"):
            FolderLock(tmp_path / "run").acquire()
        parent.kill()
        parent.wait()
        os.kill(child, 0)  # alive
        lock = FolderLock(tmp_path / "run")
        lock.acquire()
        lock.release()
    finally:
        os.kill(child, signal.SIGKILL)


def test_of_two_runs_started_together_one_runs_and_after_kill_9_the_next_goes_on(tmp_path):
    run = tmp_path / "run"
    settings = [*prepare(tmp_path, seconds=0.2, total_steps=40, save_every=1), f"output_dir={run}"]
    both = [processes.Command(main, ["run", *settings], tmp_path / f"{i}.txt") for i in range(2)]
    deadline = time.monotonic() + 120
    while all(process.poll() is None for process in both) and time.monotonic() < deadline:
        time.sleep(0.05)
    refused, owner = sorted(both, key=lambda process: process.poll() is None)
    output, _ = refused.communicate(timeout=60)
    assert refused.returncode == 2 and f"process {owner.pid} on" in output, output
    while rows_written(run) < 2 and owner.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    step = rows_written(run)
    assert 2 <= step < 40
    assert main(["run", *settings, "--resume", f"total_steps={step + 2}"]) == 0
    assert [row["step"] for row in metrics(run)] == list(range(1, step + 3))


def test_locks_of_one_process_are_released_one_by_one(tmp_path):
    first, second = FolderLock(tmp_path / "new" / "run"), FolderLock(tmp_path / "new" / "run")
    first.acquire()
    second.acquire()
    first.release()
    assert json.loads((tmp_path / "new" / "run" / folder_lock.NAME).read_text())["pid"] == os.getpid()
    del second
    assert not (tmp_path / "new" / "run").exists() and not FolderLock.descriptors  # nothing was written there


def test_a_lock_that_lives_as_long_as_the_interpreter_is_released_without_a_word(tmp_path):
    script = "import sys, pathlib\nfrom safe_train.run.folder_lock import FolderLock\n"
    script += "lock = FolderLock(pathlib.Path(sys.argv[1]))\nlock.acquire()\nlock.itself = lock\n"  # a cycle
    ended = subprocess.run([sys.executable, "-c", script, tmp_path / "run"], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "") and not (tmp_path / "run").exists()


def test_a_trainer_that_could_not_be_made_leaves_no_lock(tmp_path):
    with pytest.raises(ConfigError):
        tiny.trainer(tmp_path / "run", prompts=[])
    assert not (tmp_path / "run").exists() and not FolderLock.descriptors
    (tmp_path / "mine").mkdir()
    with pytest.raises(ConfigError):
        tiny.trainer(tmp_path / "mine", prompts=[])
    assert (tmp_path / "mine").exists() and not list((tmp_path / "mine").iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot write in output_dir .*run.*Permission denied"):
        FolderLock(tmp_path / "run").acquire()


def test_a_file_in_the_folders_place_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="cannot write in output_dir .*run"):
        FolderLock(tmp_path / "run").acquire()


def own_locks(folder) -> int:
    trainer = tiny.trainer(folder)
    found = len(FolderLock.descriptors)
    del trainer
    return found


def refused(folder) -> str:
    try:
        tiny.trainer(folder)
    except ConfigError as error:
        return str(error)
    return "ran"


def test_of_several_processes_only_the_first_takes_the_folder_and_all_are_told(holder, tmp_path):
    held = [outcome.result for outcome in processes.run(own_locks, 2, tmp_path / "free")]
    owner, _ = holder()
    told = [outcome.result for outcome in processes.run(refused, 2, tmp_path / "run")]
    assert held == [1, 0]
    assert all(f"process {owner.pid} on" in each for each in told), told
