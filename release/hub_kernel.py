"""`python -m release.hub_kernel FOLDER`: `safe_kernels` as a kernel of the Hugging Face Hub, for the package `kernels`.

FOLDER gets `build.toml` and `torch-ext/safe_kernels/`, which is what the Hub's builder reads, and
`build/torch-cpu`, `build/torch-cuda` and `build/torch-rocm`, which is what it makes of them and users load:

    from kernels import get_local_kernel

    safe_kernels = get_local_kernel(Path("FOLDER"))

Nothing is compiled before a user's first call, so a build is a copy of the sources with `metadata.json` beside them.
`kernels` imports it under the `id` in there, next to an installed safe_kernels or another version's build. So the
package imports its own modules relatively, and its ops have a namespace named after the package.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BACKENDS = ("cpu", "cuda", "rocm")
VERSION = 1  # of the kernel's interface, as `get_kernel(..., version=1)` asks for it: another one when a call breaks
LEFT_OUT = ("integrations", "__main__.py", "inspect.py", "machine_code.py")  # patches of trainers, and commands

BUILD = f"""\
[general]
name = "safe-kernels"
version = {VERSION}
edition = 5
license = "Apache-2.0"
backends = {json.dumps(BACKENDS)}

[torch-noarch]
"""
CARD = """\
---
library_name: kernels
license: apache-2.0
---

# safe-kernels

Log-prob, entropy and exact KL of a language-model policy without its logits, forward and backward: on GPUs in Triton,
on CPUs in PyTorch. The functions are those of the Python package `safe-kernels`, without its patches of trainers.
"""


def sources() -> list[Path]:
    """The files of the kernel, below `safe_kernels`."""
    package = ROOT / "safe_kernels"
    paths = (path.relative_to(package) for path in sorted(package.rglob("*.py")))
    return [path for path in paths if path.parts[0] not in LEFT_OUT]


def copy_sources(to: Path) -> None:
    for path in sources():
        (to / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "safe_kernels" / path, to / path)


def digest() -> str:
    """Of the sources: two builds have one `id` only if they are the same."""
    content = hashlib.sha256()
    for path in sources():
        content.update(path.as_posix().encode() + b"\0" + (ROOT / "safe_kernels" / path).read_bytes() + b"\0")
    return content.hexdigest()[:12]


def metadata(backend: str) -> dict[str, object]:
    return {
        "id": f"_safe_kernels_{backend}_{digest()}",
        "name": "safe-kernels",
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
    }


def write(folder: Path) -> None:
    """`folder` must be new or empty: a file that an older version left behind would be published too."""
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; name a new folder")
    copy_sources(folder / "torch-ext" / "safe_kernels")
    (folder / "build.toml").write_text(BUILD)
    (folder / "README.md").write_text(CARD)
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
    for backend in BACKENDS:
        build = folder / "build" / f"torch-{backend}"
        copy_sources(build)
        (build / "metadata.json").write_text(json.dumps(metadata(backend), indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m release.hub_kernel FOLDER")
    write(Path(sys.argv[1]))
