"""Compares another trainer with and without its patch, in an environment of its own.

    .venv/bin/python tests/integrations/run.py ms_swift [arguments of pytest]

The trainer and what it imports come from the pins in ms_swift.txt, without their own dependencies, into
build/integrations/ms_swift, on top of the packages of the Python that runs this, which stay as they are.
"""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TESTS = {
    "ms_swift": ["test_ms_swift.py"],
    "axolotl": ["test_axolotl.py"],
    "llamafactory": ["test_functions_of_logits.py", "-k", "llamafactory"],
    "areal": ["test_functions_of_logits.py", "-k", "areal"],
    "skyrl": ["test_functions_of_logits.py", "-k", "skyrl"],
}
# transformers and others are newer than the trainers' own bounds: what is compared is the same trainer twice.
VARIABLES = {"DISABLE_VERSION_CHECK": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def environment(name: str) -> Path:
    """The interpreter of a virtual environment with these pins, made anew when they change."""
    pins, folder = HERE / f"{name}.txt", ROOT / "build" / "integrations" / name
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    if stamp.exists() and stamp.read_text() == pins.read_text():
        return python
    run(sys.executable, "-m", "venv", "--clear", "--without-pip", folder)
    site = Path(subprocess.check_output([python, "-c", PURELIB], text=True).strip())
    (site / "project.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    options = ["--quiet", "--no-input", "--no-compile", "--no-deps", "--ignore-requires-python"]
    run(sys.executable, "-m", "pip", "install", *options, "--target", site, "--requirement", pins)
    stamp.write_text(pins.read_text())
    return python


PURELIB = "import sysconfig; print(sysconfig.get_path('purelib'))"


def run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True)


def main() -> int:
    name, *arguments = sys.argv[1:] or [""]
    if name not in TESTS:
        sys.exit(
            f"usage: python tests/integrations/run.py NAME [arguments of pytest]\nNAME is one of {', '.join(TESTS)}"
        )
    file, *selection = TESTS[name]
    python = environment(name)
    scratch = python.parents[1] / "scratch"  # pytest's own would go away when others run tests meanwhile
    command = [python, "-m", "pytest", "-n", "0", f"--basetemp={scratch}", HERE / file, *selection, *arguments]
    variables = {**os.environ, **VARIABLES, "PYTHONPATH": str(ROOT)}  # this checkout, in every process
    return subprocess.run([str(part) for part in command], cwd=ROOT, env=variables, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
