"""The same workloads at another revision: a process of its own in a temporary worktree, with the bench of this tree.

The revision runs each workload right after this tree has. Plain PyTorch is timed in both processes: where its ratio is
not 1, the machine has drifted, by that much.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.measurement import OURS
from bench.measurement.cost import Roofs
from bench.measurement.machine import ROOT
from bench.measurement.rows import Row
from bench.measurement.workloads import Workload
from bench.suites.kernels import Settings, measured

# In the folder of the revision, whose safe_kernels comes first; all else is this tree's.
START = "import sys, safe_kernels; sys.path.insert(0, sys.argv[1]); from bench.compare import serve; serve()"


class Revision:
    """A context; `measured` gives the revision's rows of plain PyTorch and of this project."""

    def __init__(self, revision: str, settings: Settings) -> None:
        self.revision, self.settings = revision, settings
        self.folder = tempfile.TemporaryDirectory(prefix="safe-kernels-")
        self.tree = Path(self.folder.name) / "tree"

    def __enter__(self) -> Revision:
        command = ["git", "-C", str(ROOT), "worktree", "add", "--detach", "--quiet", str(self.tree), self.revision]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"--compare {self.revision}: {done.stderr.strip()}")
        command = [sys.executable, "-c", START, str(ROOT), json.dumps(dataclasses.asdict(self.settings))]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=self.tree, text=True, stdin=pipe, stdout=pipe)
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait()
        subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(self.tree)], check=True)
        self.folder.cleanup()

    def measured(self, workload: Workload) -> list[Row]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(dataclasses.asdict(workload)) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"--compare {self.revision}: its process ended, code {self.process.wait()}; see its error above")
        return [Row(**{**row, "provider": f"{row['provider']} @{self.revision}"}) for row in json.loads(line)]


def serve() -> None:
    """In the process of the revision: a workload a line in, its rows a line out."""
    import safe_kernels

    given: dict[str, Any] = json.loads(sys.argv[2])
    if not Path(safe_kernels.__file__).is_relative_to(Path.cwd()):
        sys.exit(f"safe_kernels was imported from {safe_kernels.__file__}, not from the revision in {Path.cwd()}")
    settings = Settings(**{**given, "roofs": {dtype: Roofs(**x) for dtype, x in given["roofs"].items()}})
    answers, sys.stdout = sys.stdout, sys.stderr  # what the kernels print is no answer
    for line in sys.stdin:
        rows = measured(Workload(**json.loads(line)), settings, only=("pytorch", OURS))
        print(json.dumps([dataclasses.asdict(row) for row in rows]), file=answers, flush=True)
