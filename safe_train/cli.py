"""The command `safe-train`: check, run, demo, watch, eval, export, report, config."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

try:
    import yaml

    from safe_train.config import FIRST, HINTS, ConfigError, SafeConfig
    from safe_train.run.versions import check_versions, own_version
except ModuleNotFoundError as error:
    sys.exit(f"safe-train needs the package {error.name!r}, which this brings: pip install 'safe-kernels[train]'")


DTYPES = ("bf16", "fp16", "fp32", "bfloat16", "float16", "float32")

EXIT_STATUSES = (
    "Exit status: 0 done; 1 failed, with a traceback; 2 a setting, model, data set, reward or folder that cannot be "
    "used, with the reason; 130 Ctrl-C and 143 SIGTERM, after the step and its checkpoint."
)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if getattr(arguments, "quiet", False):
        os.environ["SAFE_TRAIN_QUIET"] = "1"  # which safe_train.screen reads
    status = 0
    try:
        check_versions()
        arguments.command(arguments)
    except ConfigError as error:
        print(f"safe-train: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("safe-train: interrupted; continue with --resume", file=sys.stderr)
        return 130
    except SystemExit:  # by a signal, after a step
        leave_processes()
        raise
    leave_processes()
    return status


def leave_processes() -> None:
    """Ends the group of processes, if the command joined one: left to the interpreter's exit, gloo may abort."""
    if (parallel := sys.modules.get("safe_train.parallel")) is not None:
        parallel.leave()


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; `key=value` pairs may stand before and after options."""
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    takes_pairs = hasattr(arguments, "overrides") or hasattr(arguments, "words")
    strange = [word for word in rest if word.startswith("-") or not takes_pairs]
    if strange:
        top.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        (arguments.words if hasattr(arguments, "words") else arguments.overrides).extend(rest)
    return arguments


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="safe-train", description="Train language models with SAFE, PPO or GRPO.", epilog=EXIT_STATUSES
    )
    top.add_argument("--version", action="version", version=f"safe-train {own_version()}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, help: str, function: Callable[[argparse.Namespace], None], more: str = "") -> Any:
        command = commands.add_parser(name, help=help, description=more or None)
        command.set_defaults(command=function)
        return command.add_argument

    pairs: dict[str, Any] = {"nargs": "*", "metavar": "key=value"}
    settings = {"help": "YAML file, or the name of a shipped one"}
    quiet: dict[str, Any] = {"action": "store_true", "help": "no bar, steps or samples: warnings and results only"}

    option = add("run", "train", command_run, "Train with settings from a file and key=value pairs.")
    option("--config", **settings)
    option("--resume", action="store_true", help="continue the run in output_dir, with its settings")
    option("--resume-from", type=home_path, metavar="CHECKPOINT", help="continue its run from this checkpoint")
    option("--overwrite", action="store_true", help="replace the run in output_dir")
    option("--watch", action="store_true", help="also a local page that shows the run: see `safe-train watch`")
    option("--quiet", **quiet)
    option("overrides", **pairs)

    option = add("check", "all that a run does before its first step", command_check, CHECK)
    option("words", nargs="*", metavar="CONFIG key=value", help="the arguments of `run`")
    option("--config", **settings)
    option("--overwrite", action="store_true", help="as if for a run that replaces the one in output_dir")

    option = add("demo", "train a small model on this computer, in minutes", command_demo)
    option("--model", help="a Hub model instead of the one that is installed with the demo")
    option("--control", action="store_true", help="the control experiment: shuffled advantages")
    option("--distill", action="store_true", help="teach a fresh policy what the demo learned, without its reward")
    option("--quiet", **quiet)
    option("overrides", **pairs)

    option = add("eval", "evaluate a run, a checkpoint or any model on held-out prompts", command_eval, EVAL)
    option("what", metavar="RUN|CHECKPOINT|MODEL")
    option("--checkpoint", metavar="STEP", help="of the run: a step's number, or best")
    option("--config", help="settings for what is no run: " + settings["help"])
    option("--kl", metavar="KL,...", help="also moved toward its reference, to these KLs in nats a token")
    option("--output", type=home_path, help="folder to write (default: eval/..., in the run if any)")
    option("--quiet", **quiet)
    option("overrides", **pairs)

    option = add("export", "write a checkpoint as a folder that transformers and vLLM load", command_export, EXPORT)
    option("run", metavar="RUN|CHECKPOINT")
    option("output", type=home_path, metavar="OUT")
    option("--checkpoint", metavar="STEP", help="a step's number, or best (default: the newest)")
    option("--kl", metavar="KL", help="move it toward its reference first, to this KL on the prompts of eval_dataset")
    option("--merge", action="store_true", help="a whole model, with the adapter added to its weights")
    option("--dtype", choices=DTYPES, help="of a whole model (default: as in training)")
    option("overrides", **pairs, help="such as model=NAME, for another base's place")

    option = add("report", "draw one run, or several overlaid", command_report)
    option("runs", type=home_path, nargs="+")
    option("--output", type=home_path, help="picture to write (default: report.png in the first run)")

    option = add("watch", "a local page that shows runs while they go on", command_watch, WATCH)
    option("runs", type=home_path, nargs="+", metavar="RUN", help="run folder, or a folder of runs")
    option("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine alone)")
    option("--port", type=int, help="default: 8650, or another if that is taken")
    option("--allow-host", action="append", default=[], metavar="NAME", help="a name by which browsers reach --host")
    option("--until-input-ends", action="store_true", help=argparse.SUPPRESS)  # of `run --watch`

    option = add("config", "print the settings that people change first, with their defaults", command_config)
    option("--all", action="store_true", help="every setting")
    option("--format", choices=("text", "yaml"), default="text", help="yaml: a file to begin with")
    return top


CHECK = (
    "Check settings, folder, prompts, rewards and tokenizer, then the model, as `run` would; print what the run would "
    "do, with the memory that it needs and the reward of one completion; and stop."
)
WATCH = (
    "Show runs on a local web page while they go on: plots, samples token by token, warnings and settings. It only "
    "reads the run folders; they may be of runs that are over, and on a network disk."
)
EVAL = (
    "Evaluate on the prompts of eval_dataset: a run's newest checkpoint, one of its checkpoints, or, without a run, a "
    "model or an adapter (a folder, or a name of the Hub) with the settings given."
)
EXPORT = (
    "Write the policy of a run's newest checkpoint as a folder that transformers and vLLM load, with tokenizer, chat "
    "template and generation config. It is loaded again and compared before it gets its name."
)


def home_path(text: str) -> Path:
    return Path(text).expanduser()


def command_run(arguments: argparse.Namespace) -> None:
    from safe_train import parallel
    from safe_train.paper import make_trainer
    from safe_train.run import terminal
    from safe_train.run.run_folder import refuse_existing, refuse_foreign, remove_run
    from safe_train.watch.beside import require_packages, watched

    resume = arguments.resume_from or arguments.resume
    if arguments.watch:
        require_packages()
    args = run_settings(arguments)
    replaces = arguments.overwrite and not resume
    if not resume:  # before the model is loaded
        (refuse_foreign if replaces else refuse_existing)(Path(args.output_dir))
    trainer = make_trainer(args)
    if replaces:
        remove_run(Path(args.output_dir))
    with watched(Path(args.output_dir)) if arguments.watch and parallel.is_main() else nullcontext():
        history = trainer.train(resume_from_checkpoint=resume)
    if parallel.is_main():
        terminal.finished(history, Path(args.output_dir))


def command_check(arguments: argparse.Namespace) -> None:
    from safe_train import parallel
    from safe_train.commands.check import check
    from safe_train.paper import make_trainer
    from safe_train.run.run_folder import refuse_existing, refuse_foreign

    words, config = arguments.words, arguments.config
    if config is None and words and "=" not in words[0]:
        config = words.pop(0)
    args = SafeConfig.load(config, words)
    (refuse_foreign if arguments.overwrite else refuse_existing)(Path(args.output_dir))
    trainer = make_trainer(args, eval_dataset=args.eval_dataset)
    try:
        found = check(trainer)
    finally:
        trainer.folder_lock.release()
    parallel.say(found)


def run_settings(arguments: argparse.Namespace) -> SafeConfig:
    """Settings of the file and of the pairs; on resume without a file, those of the run that is continued."""
    overrides, checkpoint = arguments.overrides, arguments.resume_from
    if arguments.config is not None or not (arguments.resume or checkpoint):
        return SafeConfig.load(arguments.config, overrides)
    given = [pair.partition("=")[2] for pair in overrides if pair.startswith("output_dir=")]
    run = Path(given[-1] if given else checkpoint.parent.parent if checkpoint else SafeConfig.output_dir).expanduser()
    if not (run / "config.yaml").is_file():
        raise ConfigError(
            f"{run} holds no run to resume (no config.yaml): name the run by output_dir=, or its settings by --config"
        )
    return SafeConfig.load(run / "config.yaml", [f"output_dir={run}", *overrides])


# Its rewards are only logged; what the budget held is in the teacher.
DISTILLED = (
    "algorithm=distill",
    "kl_budget=null",
    "prefix_rewards=0",
    "lr_scheduler_type=linear",
    "output_dir=runs/demo-distill",
)


def demo_policy(chosen: Sequence[str]) -> Path:
    """What the demo trained, from its run."""
    from safe_train.run.checkpoints import Checkpoints

    folder = Path(SafeConfig.load("demo.yaml", chosen).output_dir)
    if not (found := Checkpoints(folder, keep=1).complete()):
        raise ConfigError(f"{folder} has no checkpoint to learn from: run `safe-train demo` first")
    return found[-1] / "policy"


DEMO_NEXT = {
    "safe-train demo --control": "the control experiment: the same run with shuffled advantages",
    "safe-train demo --distill": "teaches a fresh model what this one learned, without the reward",
    "safe-train demo total_steps=24": "trains for longer; `safe-train config` lists the settings",
}


def command_demo(arguments: argparse.Namespace) -> None:
    from safe_train import parallel
    from safe_train.paper import make_trainer
    from safe_train.run import terminal
    from safe_train.run.evaluation import comparison, save
    from safe_train.run.report import write_report
    from safe_train.run.run_folder import refuse_existing, refuse_foreign, remove_run

    chosen = [f"model={arguments.model}"] if arguments.model else []
    if arguments.control:
        chosen += ["shuffle_advantages=true", "output_dir=runs/demo-control"]
    elif arguments.distill:
        chosen += [f"teacher={demo_policy(chosen)}", *DISTILLED]
    own = SafeConfig.load("demo.yaml", chosen)
    args = SafeConfig.load("demo.yaml", [*chosen, *arguments.overrides])
    folder = Path(args.output_dir)
    replaces = folder == Path(own.output_dir)
    (refuse_foreign if replaces else refuse_existing)(folder)
    started = perf_counter()
    trainer = make_trainer(args)
    before = trainer.evaluate()
    if replaces:
        remove_run(folder)
    trainer.train()
    after = trainer.evaluate()
    evaluations = {"before": before, "after": after}
    save(folder / "eval" / f"step-{trainer.step}", evaluations, trainer.step)
    if parallel.is_main():
        write_report([folder], folder / "report.png")
        print(f"\n{comparison(evaluations)}\n")
        terminal.show(terminal.side_by_side(before.rollout, after.rollout))
        terminal.show_next(f"{perf_counter() - started:.0f} s; the picture: {folder / 'report.png'}", DEMO_NEXT)


def command_eval(arguments: argparse.Namespace) -> None:
    from safe_train import parallel
    from safe_train.commands import at_kl, subject
    from safe_train.paper import make_trainer
    from safe_train.run.evaluation import comparison, save

    kls = at_kl.kls_of(arguments.kl)
    found = subject.find(arguments.what, arguments.checkpoint, arguments.config, arguments.overrides)
    with tempfile.TemporaryDirectory() as elsewhere:  # the run may be going on, and goes on
        trainer = make_trainer(subject.for_evaluation(found, elsewhere), **found.objects())
        evaluations, places = at_kl.evaluate(found, trainer, kls)
    step = trainer.step
    name = f"step-{step}" if found.run is not None else found.name
    folder = arguments.output or (found.run or Path()) / "eval" / (name + at_kl.suffix(kls))
    save(folder, evaluations, step, arguments.overrides if found.run else ())
    parallel.say(comparison(evaluations), *map(str, places), str(folder / "evaluation.jsonl"))


def command_export(arguments: argparse.Namespace) -> None:
    from safe_train.commands import subject
    from safe_train.commands.at_kl import one_kl
    from safe_train.commands.export import export

    kl = one_kl(arguments.kl)
    found = subject.find(arguments.run, arguments.checkpoint, None, arguments.overrides)
    print(export(found, arguments.output, merge=arguments.merge, dtype=arguments.dtype, kl=kl))


def command_report(arguments: argparse.Namespace) -> None:
    from safe_train.run.report import write_report

    target = arguments.output or arguments.runs[0] / "report.png"
    write_report(arguments.runs, target)
    print(target)


def command_watch(arguments: argparse.Namespace) -> None:
    from safe_train.watch.runs import find_runs, named
    from safe_train.watch.server import serve

    is_beside = arguments.until_input_ends  # a run that has written nothing yet
    runs = named(arguments.runs) if is_beside else find_runs(arguments.runs)
    serve(runs, arguments.host, arguments.port, arguments.allow_host, is_beside)


def command_config(arguments: argparse.Namespace) -> None:
    defaults, group = SafeConfig(), None
    for field in dataclasses.fields(SafeConfig):
        if not (arguments.all or field.name in FIRST):
            continue
        default, kind, help = field.default, HINTS[field.name], field.metadata["help"]
        if default is dataclasses.MISSING:
            default = getattr(defaults, field.name)
        if field.metadata["group"] != group:
            group = field.metadata["group"]
            print(f"\n## {group}\n")
        if arguments.format == "yaml":
            print(f"# {help}\n{yaml.safe_dump({field.name: default}, sort_keys=False)}")
        else:
            print(f"{field.name}: {json.dumps(default)}  # {help} [{getattr(kind, '__name__', kind)}]")
    if not arguments.all:
        print(f"\n# {len(HINTS) - len(FIRST)} more settings: safe-train config --all")


if __name__ == "__main__":
    sys.exit(main())
