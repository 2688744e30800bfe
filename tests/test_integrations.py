"""What patches have in common: one call for the trainers that are loaded, their status, `python -m safe_kernels`."""

import subprocess
import sys
import types

import pytest

from safe_kernels import integrations
from safe_kernels.integrations.patch import Patch, Replacement


@pytest.fixture
def trainers(monkeypatch):
    """Two made-up trainers: one that is loaded, with its patch, and one that is not."""
    loaded = types.ModuleType("made_up_trainer")
    loaded.__version__ = "1.2"
    exec("def double(x): return 2 * x", vars(loaded))
    known = Replacement("made_up_trainer", "double", [("x",)], lambda original: lambda x: 200 * x)
    patch = Patch("made_up_trainer", [known])
    ours = types.ModuleType("safe_kernels.integrations.made_up")
    ours.PATCHES, ours.apply, ours.revert = (patch,), patch.apply, patch.revert
    monkeypatch.setitem(sys.modules, "made_up_trainer", loaded)
    monkeypatch.setitem(sys.modules, ours.__name__, ours)
    monkeypatch.setattr(integrations, "MODULES", {"made_up_trainer": "made_up", "not_loaded_trainer": "not_loaded"})
    yield loaded
    patch.revert()


def test_what_is_loaded_is_patched_and_told(trainers, capsys):
    integrations.apply()
    assert trainers.double(1) == 200
    line = "safe_kernels in made_up_trainer 1.2: made_up_trainer.double\n"
    assert capsys.readouterr().err == line
    assert integrations.status() == {"made_up_trainer": ["made_up_trainer.double"]}
    integrations.apply()  # once more
    assert trainers.double(1) == 200 and capsys.readouterr().err == line
    integrations.revert()
    assert trainers.double(1) == 2 and integrations.status() == {"made_up_trainer": []}


def test_one_process_of_a_machine_tells(trainers, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    integrations.apply()
    assert trainers.double(1) == 200 and capsys.readouterr().err == ""


def test_an_unknown_version_is_told(trainers, capsys):
    exec("def double(x, y): return x + y", vars(trainers))
    with pytest.warns(UserWarning, match="leaves made_up_trainer as it is, whose version it does not know"):
        integrations.apply()
    assert capsys.readouterr().err == "safe_kernels in made_up_trainer 1.2: nothing replaced\n"
    assert trainers.double(1, 2) == 3


def test_nothing_is_loaded(trainers, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "made_up_trainer")
    integrations.apply()
    told = "nothing patched: import your trainer first (made_up_trainer, not_loaded_trainer)\n"
    assert capsys.readouterr().err == told


def test_every_trainer_has_what_these_functions_call():
    for name in ("verl", "openrlhf", "llamafactory", "areal", "skyrl"):  # the others import TRL
        module = __import__(f"safe_kernels.integrations.{name}", fromlist=["PATCHES"])
        assert integrations.MODULES[name] == name
        assert [type(patch) for patch in module.PATCHES] == [Patch] and callable(module.apply)
    assert len(integrations.MODULES) == len(integrations.DISTRIBUTIONS)


def test_the_report_for_a_bug():
    command = [sys.executable, "-m", "safe_kernels"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"SAFE_KERNELS_DEBUG": "1"})
    lines = dict(line.partition(": ")[::2] for line in done.stdout.splitlines() if ": " in line)
    assert lines["device"] == "cpu" and lines["backend"] == "torch"
    assert lines["environment"] == "SAFE_KERNELS_DEBUG=1" and lines["patches"].startswith("none in this process")
    assert "torch " in done.stdout and "triton " in lines["beside it"]


def test_the_report_for_a_bug_ends_though_the_setting_is_the_bug():
    command = [sys.executable, "-m", "safe_kernels"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"SAFE_KERNELS_BACKEND": "tritn"})
    assert "backend: none: the environment variable SAFE_KERNELS_BACKEND is 'tritn'" in done.stdout
    assert "environment: SAFE_KERNELS_BACKEND=tritn" in done.stdout
