"""What the figures depend on: commit, versions, and the machine. To import it, nothing has to be installed."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
PACKAGES = (
    *("torch", "triton", "numpy", "transformers", "peft", "accelerate", "pytest", "hypothesis", "flash-attn"),
    *("trl", "liger-kernel", "verl", "cut-cross-entropy", "quack-kernels"),
)
GPU_STATE = ("name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")


def commit(given: str | None) -> tuple[str, bool | None]:
    """The commit of this tree, and whether files that matter differ from it; `given` serves a tree without git."""
    if given is not None:
        return given, None
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        changed = [line for line in _git("status", "--porcelain").splitlines() if "bench/results/" not in line]
    except (OSError, subprocess.CalledProcessError):
        sys.exit("This tree is not a git repository: name its commit with --commit, so that rows can be traced.")
    return head, bool(changed)


@functools.cache
def versions() -> dict[str, str]:
    """Of Python, the system, and those of PACKAGES that are installed."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def gpu_state() -> dict[str, str]:
    """Name, driver, memory, clocks, temperature and power of the first GPU, by nvidia-smi; {} without one."""
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_STATE)}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(GPU_STATE, (part.strip() for part in answer.splitlines()[0].split(",")), strict=True))


def identity(device: str) -> dict[str, str]:
    """Of the rows; the value of "name" is that of the results file."""
    import torch

    from safe_train.run import hardware

    known = versions()
    found = {"python": known["python"], "torch": torch.__version__}
    if "triton" in known:
        found["triton"] = known["triton"]
    if device == "cuda":
        processor = torch.cuda.get_device_name()
        found |= {"cuda": str(torch.version.cuda), "driver": gpu_state().get("driver_version", "unknown")}
    else:
        processor = hardware.processor()
        found["threads"] = str(torch.get_num_threads())
    name = re.sub(r"[^a-z0-9]+", "-", processor.lower()).strip("-")
    return {"name": name, "processor": processor, "system": known["system"], **found}


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
