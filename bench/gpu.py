"""The first minutes on a GPU: is it right, how fast is it, and what to do next. One command, most important first.

    python bench/gpu.py                             # eight minutes on a CUDA GPU; files and summary.md go to runs/gpu
    python bench/gpu.py --parts launches step       # some of the parts; they share the minutes
    python bench/gpu.py --rehearse                  # every part on a CPU, tiny: shows that it runs, measures nothing
    python bench/gpu.py --rehearse --full           # also with the versions of a GPU machine, which pip fetches

Each part runs in a process of its own, under a time limit of its own, and appends to its own file line by line: a
crash, a hang or a cut costs what was running, not what came before or after. An item of a part that kills its process
is left out when the part goes on in a new one. bench/results/README.md says what to do with the outcome.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for a checkout that is not installed

from bench.gpu_session.session import SHARES, Session, part, stop_signals
from bench.measurement import machine


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    if args.minutes is None:
        args.minutes = 40 if args.rehearse else 8
    if args.minutes <= 0:
        sys.exit(f"--minutes must be above 0, got {args.minutes:g}")
    if args.install and not any(args.install.glob("*.whl")):
        sys.exit(f"--install {args.install}: there is no wheel in it")
    if args.full and not args.rehearse:
        sys.exit("--full goes with --rehearse: it installs other versions than a GPU machine has")
    options = ["--rehearse"] * args.rehearse
    parts = [part(name, SHARES[name], options) for name in SHARES if name in args.parts]
    installs = []
    if args.install:
        installs.append(part("install", 40, ["--wheels", str(args.install)]))
    if args.full:
        args.minutes += 60
        installs.append(part("beside", 900, options))
        parts.append(part("versions", 2700, options))
    commit = machine.commit(args.commit)
    with tempfile.TemporaryDirectory(prefix="safe-kernels-site-") as site:
        session = Session([*installs, *parts], args.out, args.minutes * 60, commit, args.rehearse, Path(site))
        try:
            with stop_signals():
                session.start()
        except KeyboardInterrupt:
            print(f"cut; what there is: {args.out / 'summary.md'}", file=sys.stderr)
            return 130
        print(session.page())
        return 1 if session.failed() else 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--minutes", type=float, help="for all parts together; default 8, and 40 to rehearse")
    found.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the files; default runs/gpu")
    found.add_argument("--parts", nargs="+", choices=list(SHARES), default=list(SHARES), help="default: all")
    found.add_argument("--commit", help="for a copy of the tree without git: the commit that it is")
    found.add_argument(
        "--install", type=Path, metavar="DIR", help="first install the wheels of this folder, for this run"
    )
    found.add_argument("--rehearse", action="store_true", help="on a CPU, tiny, in Triton's interpreter")
    found.add_argument("--full", action="store_true", help="with --rehearse: Triton 3.6 and transformers 5.17 as well")
    return found


if __name__ == "__main__":
    sys.exit(main())
