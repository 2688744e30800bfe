"""The command `safe-train`: check, run, demo, eval, export, report, config."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path
from time import perf_counter

try:
    import yaml

    from safe_train.config import HINTS, ConfigError, SafeConfig
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
    try:
        check_versions()
        arguments.command(arguments)
    except ConfigError as error:
        print(f"safe-train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("safe-train: interrupted; continue with --resume", file=sys.stderr)
        return 130
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; `key=value` pairs may stand before and after options."""
    top = parser()
    arguments, rest = top.parse_known_args(argv)
    strange = [word for word in rest if word.startswith("-") or not hasattr(arguments, "overrides")]
    if strange:
        top.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        arguments.overrides += rest
    return arguments


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="safe-train", description="Train language models with SAFE, PPO or GRPO.", epilog=EXIT_STATUSES
    )
    top.add_argument("--version", action="version", version=f"safe-train {own_version()}")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="train", description="Train with settings from a file and key=value pairs.")
    run.add_argument("--config", help="YAML file, or the name of a shipped one")
    run.add_argument("--resume", action="store_true", help="continue the run in output_dir, with its settings")
    run.add_argument(
        "--resume-from", type=home_path, metavar="CHECKPOINT", help="continue its run from this checkpoint"
    )
    run.add_argument("--overwrite", action="store_true", help="replace the run in output_dir")
    run.add_argument("overrides", nargs="*", metavar="key=value")
    run.set_defaults(command=command_run)

    check = commands.add_parser(
        "check",
        help="all that a run does before its first step",
        description="Check settings, folder, prompts, rewards and tokenizer, then the model, as `run` would; print "
        "what the run would do, with the memory that it needs and the reward of one completion; and stop.",
    )
    check.add_argument("words", nargs="*", metavar="CONFIG key=value", help="the arguments of `run`")
    check.add_argument("--config", help="YAML file, or the name of a shipped one")
    check.add_argument("--overwrite", action="store_true", help="as if for a run that replaces the one in output_dir")
    check.set_defaults(command=command_check, overrides=[])

    demo = commands.add_parser("demo", help="train a small model on this computer, in minutes")
    demo.add_argument("--model", help="a Hub model instead of the one that is installed with the demo")
    demo.add_argument("--control", action="store_true", help="the control experiment: shuffled advantages")
    demo.add_argument("overrides", nargs="*", metavar="key=value")
    demo.set_defaults(command=command_demo)

    evaluation = commands.add_parser(
        "eval",
        help="evaluate a run, a checkpoint or any model on held-out prompts",
        description="Evaluate on the prompts of eval_dataset: a run's newest checkpoint, one of its checkpoints, or, "
        "without a run, a model or an adapter (a folder, or a name of the Hub) with the settings given.",
    )
    evaluation.add_argument("what", metavar="RUN|CHECKPOINT|MODEL")
    evaluation.add_argument("--checkpoint", metavar="STEP", help="of the run: a step's number, or best")
    evaluation.add_argument("--config", help="settings for what is no run: YAML file, or the name of a shipped one")
    evaluation.add_argument("--output", type=home_path, help="folder to write (default: eval/..., in the run if any)")
    evaluation.add_argument("overrides", nargs="*", metavar="key=value")
    evaluation.set_defaults(command=command_eval)

    export = commands.add_parser(
        "export",
        help="write a checkpoint as a folder that transformers and vLLM load",
        description="Write the policy of a run's newest checkpoint as a folder that transformers and vLLM load, with "
        "tokenizer, chat template and generation config. It is loaded again and compared before it gets its name.",
    )
    export.add_argument("run", metavar="RUN|CHECKPOINT")
    export.add_argument("output", type=home_path, metavar="OUT")
    export.add_argument("--checkpoint", metavar="STEP", help="a step's number, or best (default: the newest)")
    export.add_argument("--merge", action="store_true", help="a whole model, with the adapter added to its weights")
    export.add_argument("--dtype", choices=DTYPES, help="of a whole model (default: as in training)")
    export.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as model=NAME, for another base's place"
    )
    export.set_defaults(command=command_export)

    report = commands.add_parser("report", help="draw one run, or several overlaid")
    report.add_argument("runs", type=home_path, nargs="+")
    report.add_argument("--output", type=home_path, help="picture to write (default: report.png in the first run)")
    report.set_defaults(command=command_report)

    config = commands.add_parser("config", help="print every setting, its default and its meaning")
    config.add_argument("--format", choices=("text", "yaml"), default="text", help="yaml: a file to begin with")
    config.set_defaults(command=command_config)
    return top


def home_path(text: str) -> Path:
    return Path(text).expanduser()


def command_run(arguments: argparse.Namespace) -> None:
    from safe_train import parallel
    from safe_train.paper import make_trainer
    from safe_train.run.run_folder import refuse_existing, refuse_foreign, remove_run

    resume = arguments.resume_from or arguments.resume
    args = run_settings(arguments)
    replaces = arguments.overwrite and not resume
    if not resume:  # before the model is loaded
        (refuse_foreign if replaces else refuse_existing)(Path(args.output_dir))
    trainer = make_trainer(args)
    if replaces:
        remove_run(Path(args.output_dir))
    trainer.train(resume_from_checkpoint=resume)
    parallel.say(f"report: {Path(args.output_dir) / 'report.png'}")


def command_check(arguments: argparse.Namespace) -> None:
    from safe_train import parallel
    from safe_train.commands.check import check
    from safe_train.paper import make_trainer
    from safe_train.run.run_folder import refuse_existing, refuse_foreign

    words, config = [*arguments.words, *arguments.overrides], arguments.config
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


def command_demo(arguments: argparse.Namespace) -> None:
    from safe_train.paper import make_trainer
    from safe_train.run.evaluation import comparison
    from safe_train.run.run_folder import refuse_existing, refuse_foreign, remove_run

    chosen = [f"model={arguments.model}"] if arguments.model else []
    control = ["shuffle_advantages=true", "output_dir=runs/demo-control"] if arguments.control else []
    own = SafeConfig.load("demo.yaml", [*chosen, *control])
    args = SafeConfig.load("demo.yaml", [*chosen, *control, *arguments.overrides])
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
    print(f"\n{comparison({'before': before, 'after': after})}\n")
    for prompt, text in list(zip(after.rollout.prompts, after.rollout.texts, strict=True))[:4]:
        print(f"  {prompt.text!r} ->{text!r}")
    print(f"\n{perf_counter() - started:.0f} s; report: {folder / 'report.png'}")


def command_eval(arguments: argparse.Namespace) -> None:
    from safe_train import parallel
    from safe_train.commands import subject
    from safe_train.paper import make_trainer
    from safe_train.run.evaluation import comparison, save

    found = subject.find(arguments.what, arguments.checkpoint, arguments.config, arguments.overrides)
    with tempfile.TemporaryDirectory() as elsewhere:  # the run may be going on, and goes on
        trainer = make_trainer(subject.for_evaluation(found, elsewhere), **found.objects())
        evaluations, step = {"before" if found.run else "now": trainer.evaluate()}, 0
        if found.run is not None:
            step = found.restore(trainer)
            evaluations["after"] = trainer.evaluate()
    name = f"step-{step}" if found.run is not None else found.name
    folder = arguments.output or (found.run or Path()) / "eval" / name
    save(folder, evaluations, step)
    parallel.say(comparison(evaluations), str(folder / "evaluation.jsonl"))


def command_export(arguments: argparse.Namespace) -> None:
    from safe_train.commands import subject
    from safe_train.commands.export import export

    found = subject.find(arguments.run, arguments.checkpoint, None, arguments.overrides)
    print(export(found, arguments.output, merge=arguments.merge, dtype=arguments.dtype))


def command_report(arguments: argparse.Namespace) -> None:
    from safe_train.run.report import write_report

    target = arguments.output or arguments.runs[0] / "report.png"
    write_report(arguments.runs, target)
    print(target)


def command_config(arguments: argparse.Namespace) -> None:
    defaults, lines = SafeConfig(), []
    for field in dataclasses.fields(SafeConfig):
        default, kind, help = field.default, HINTS[field.name], field.metadata["help"]
        if default is dataclasses.MISSING:
            default = getattr(defaults, field.name)
        if arguments.format == "yaml":
            lines.append(f"# {help}\n{yaml.safe_dump({field.name: default}, sort_keys=False)}")
        else:
            lines.append(f"{field.name}: {json.dumps(default)}  # {help} [{getattr(kind, '__name__', kind)}]")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
