"""What a person sees: bars and tables on a screen, a plain line a step in a file, and nothing that a text commands."""

import fcntl
import functools
import os
import re
import select
import struct
import sys
import termios
from pathlib import Path

import processes
import pytest
import tiny
import torch
from rich.console import Console

from safe_train import screen
from safe_train.cli import main
from safe_train.config import SafeConfig
from safe_train.data.prompts import Prompt
from safe_train.rewards.rewards import Scores
from safe_train.run import terminal
from safe_train.sampling.rollout import Rollout

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def row(step: int = 1, **changes) -> dict:
    times = {
        "time/rollout_s": 1.0,
        "time/reward_s": 0.5,
        "time/score_s": 0.25,
        "time/update_s": 2.0,
        "time/step_s": 4.0,
    }
    found = {"step": step, "reward": 0.25, "reward_std": 0.125, "kl": 0.0625, "kl_threshold": 0.3, "entropy": 3.5}
    found |= {"kl_coef": 0.1, "phase": "warmup", "tokens_per_second": 1234.5, "memory/peak_gb": 1.5}
    return (
        found
        | {"completions/mean_length": 12.0, "completions/clipped_fraction": 0.5, "grad_norm": 1.0}
        | times
        | changes
    )


def printed(capsys, table) -> str:
    Console(width=200, file=sys.stdout).print(table)
    return capsys.readouterr().out


def rollout(text: str) -> Rollout:
    prompts = [Prompt("a prompt", [2], {}), Prompt([{"role": "user", "content": "the question"}], [2], {})]
    return Rollout(prompts, [[3], [4]], ["dull", text], [True, True], [[-1.0], [-1.0]], [])


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"algorithm": "grpo"}, ["KL", "0.062"]),
        ({"algorithm": "safe"}, ["KL / threshold", "0.062 / 0.30"]),
        ({"algorithm": "grpo", "kl_budget": 0.1}, ["KL / budget", "0.062 / 0.10"]),
    ],
)
def test_the_kl_stands_beside_what_bounds_it(settings, expected, capsys):
    args = SafeConfig(completions_per_prompt=2, **settings)
    title, value = expected
    cells = [
        re.split(r"\s{2,}", line.strip())
        for line in printed(capsys, terminal.table_of([row()], args, 200)).splitlines()
    ]
    at = cells[0].index(title)
    assert cells[2][at] == value
    assert f"KL {value}  " in terminal.line_of(row(), args)
    assert ("(warmup)" in terminal.line_of(row(), args)) == (args.controller == "safe")


def test_a_table_has_what_the_screen_has_room_for(capsys):
    args, rows = SafeConfig(), [row(step, reward=step / 7) for step in (998, 999, 1000)]
    narrow, wide = (printed(capsys, terminal.table_of(rows, args, width)) for width in (80, 200))
    assert max(map(len, narrow.splitlines())) <= 80
    for text in (narrow, wide):
        assert "142.857" in text and "update 50%" in text and "1.5 GB" in text
    assert "phase" in wide and "phase" not in narrow and "held-out" not in wide


def test_a_completion_cannot_command_the_terminal(capsys):
    hostile = "good\x1b[2J\x1b]0;title\x07\r\n[bold]not markup[/bold] \u202egood"
    scores = Scores({"reward": torch.tensor([0.5, 1.0])})
    text = printed(capsys, terminal.sample_of(rollout(hostile), scores, 80))
    assert "reward 1.000: the question good" in text and "[bold]not markup[/bold]" in text
    assert not any(mark in text for mark in "\x1b\x07\r\u202e")
    assert terminal.sample_of(rollout("x"), Scores({"reward": torch.full((2,), torch.nan)}), 80) is None


def test_a_run_is_summed_up_by_its_ends(capsys):
    history = [
        row(step, reward=step / 10, **{"eval/reward": step / 100} if step % 4 == 0 else {}) for step in range(1, 12)
    ]
    lines = printed(capsys, terminal.summary(history)).splitlines()
    assert re.split(r"\s{2,}", lines[0].strip()) == ["mean", "first 5 steps", "last 5 steps"]
    found = {cells[0]: cells[1:] for cells in (re.split(r"\s{2,}", line.strip()) for line in lines[2:])}
    assert found["reward"] == ["0.300", "0.900"] and found["held-out reward"] == ["0.040", "0.080"]
    assert terminal.summary(history[:1]) is None


def settings(folder: Path) -> list[str]:
    tiny.model().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    (folder / "prompts.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "a dog sat on"}\n')
    (folder / "own.py").write_text("def reward(completions, **columns):\n    return list(map(len, completions))\n")
    values = {"model": folder / "model", "dataset": folder / "prompts.jsonl", "reward": f"{folder / 'own.py'}:reward"}
    values |= {"prompts_per_step": 2, "completions_per_prompt": 2, "save_every": 100}
    values |= {"output_dir": folder / "run", "total_steps": 11, "use_cpu": "true", "lora_r": 2, "max_new_tokens": 4}
    return [
        "run",
        "algorithm=grpo",
        "prompts_per_step=2",
        "completions_per_prompt=2",
        "save_every=100",
        *(f"{k}={v}" for k, v in values.items()),
    ]


def within(environment: dict[str, str], arguments: list[str]) -> int:
    os.environ |= environment
    return main(arguments)


def on_a_screen(arguments: list[str], width: int, **environment: str) -> str:
    """What a terminal of this width shows of `safe-train`."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    called = functools.partial(within, {"TERM": "xterm-256color", "COLUMNS": str(width), "CI": "", **environment})
    command = processes.Command(called, arguments, Path(os.ttyname(theirs)))
    found = b""
    while command.poll() is None or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.1)[0]:
            found += os.read(ours, 65536)
    os.close(ours)
    os.close(theirs)
    assert command.returncode == 0, found.decode()
    return found.decode().replace("\r\n", "\n")


def test_a_screen_shows_a_bar_and_each_step_once(tmp_path):
    arguments = settings(tmp_path)
    shown = on_a_screen(arguments, 80)
    lines = [ESCAPE.sub("", line.split("\r")[-1]) for line in shown.splitlines()]
    assert [int(line.split()[0]) for line in lines if re.match(r" *\d+ +\d+\.\d{3} ", line)] == list(range(1, 12))
    assert "11/11" in shown and "best completion, reward" in shown and "\x1b[" in shown
    assert not any(re.match(r"step +\d+  reward", line) for line in lines)  # no plain lines beside
    after = shown[shown.index("first 5 steps") :]
    assert str(tmp_path / "run" / "report.png") in after and f"safe-train export {tmp_path / 'run'} OUT" in after
    colourless = on_a_screen([*arguments, "--overwrite"], 200, NO_COLOR="1")
    assert "gradient norm" in ESCAPE.sub("", colourless) and not re.search(r"\x1b\[[0-9;]*(3[0-7]|38)[;m]", colourless)


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"CI": "true"}], ids=["a dumb terminal", "CI"])
def test_where_no_line_can_be_drawn_over_each_step_is_a_plain_line(environment, tmp_path):
    shown = on_a_screen(settings(tmp_path), 80, **environment)
    assert [int(n) for n in re.findall(r"^step +(\d+)  reward", shown, re.MULTILINE)] == list(range(1, 12))
    assert "step/s" not in shown and "sampling" not in shown and ("\x1b" not in shown or "CI" in environment)


def test_a_file_gets_plain_lines_and_quiet_gets_the_result_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(screen.QUIET, "0")  # to be restored
    arguments = settings(tmp_path)
    assert main(arguments) == 0
    said = capsys.readouterr()
    steps = re.findall(r"^step +\d+  reward +[-\d.]+ ± [\d.]+  KL [\d.]+  entropy .*$", said.out, re.MULTILINE)
    assert len(steps) == 11 and "\x1b" not in said.out + said.err and "step/s" not in said.err
    assert main([*arguments, "--overwrite", "--quiet"]) == 0
    said = capsys.readouterr()
    assert "reward" in said.out and "report.png" in said.out and not re.search(r"^step +\d", said.out, re.MULTILINE)
