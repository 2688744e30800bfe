"""A policy at KLs of one's choice: what `eval --kl` evaluates and `export --kl` writes, and what both refuse."""

import math
import os
import shutil

import peft
import processes
import pytest
import tiny
import torch
from test_adapters import METHODS
from test_budget import CURVES, Curve
from test_budget import KINDS as BUDGET_KINDS
from test_evaluation import files, results, run
from transformers import AutoModelForCausalLM

from safe_train import SafeTrainer
from safe_train.cli import main
from safe_train.commands.at_kl import LEAST, TOLERANCE, Mover, Place, kls_of, one_kl
from safe_train.config import ConfigError
from safe_train.engines.projection import MOVES, walk_to

AT_ONCE = {"eval_completions": 32, "completions_per_prompt": 8, "max_tokens_per_microbatch": 512}
MANY = [f"{name}={value}" for name, value in AT_ONCE.items()]


@pytest.mark.parametrize("wanted", [1e-4, 0.01, 0.1, 0.3])
@pytest.mark.parametrize("name", CURVES)
def test_the_walk_ends_at_the_kl_that_was_asked_for(name, wanted):
    curve = Curve(CURVES[name])
    walk = walk_to(curve.shrink, curve.measure, curve.kl_at(1.0), wanted, TOLERANCE)
    assert walk.kl == pytest.approx(wanted, rel=TOLERANCE) and walk.kl == pytest.approx(curve.kl_at(curve.scale))
    assert walk.scale == pytest.approx(curve.scale) and walk.forwards == curve.forwards <= MOVES


def test_a_walk_that_finds_no_such_kl_ends_below_it_and_says_so():
    curve = Curve(lambda s: 0.5 if s > 0.5 else 0.01)  # a step
    walk = walk_to(curve.shrink, curve.measure, 0.5, 0.1, TOLERANCE)
    assert walk.kl == 0.01 and curve.forwards <= MOVES and curve.scale == pytest.approx(walk.scale)
    place = Place(0.1, walk.kl, walk.scale, walk.forwards)
    assert f"{walk.forwards} moves did not bring it within 5% of 0.1" in str(place)
    assert "did not bring" not in str(Place(0.1, 0.104, 0.5, 2))
    flat = Curve(lambda s: 0.5)
    assert walk_to(flat.shrink, flat.measure, 0.5, 0.1, TOLERANCE).kl == 0.5 and flat.forwards <= MOVES


def test_kls_are_numbers_each_taken_once():
    assert kls_of("0.1, 0.2,0.05,0.1,-0.0") == [0.2, 0.1, 0.05, 0.0] and math.copysign(1, kls_of("-0")[0]) == 1
    assert kls_of(None) == [] and one_kl(None) is None and one_kl("0.1,0.1") == 0.1
    with pytest.raises(ConfigError, match="one number for an export, got 0.1,0.2"):
        one_kl("0.1,0.2")


@pytest.mark.parametrize("text", ["-0.1", "nan", "inf", "x", "0.1;0.2", "0.1,,0.2", "", "1e-9"])
def test_what_is_no_kl_is_refused_before_anything_is_loaded(text, capsys):
    for command in (["eval", "nothing"], ["export", "nothing", "out"]):
        assert main([*command, f"--kl={text}"]) == 2
        assert "--kl must be " in capsys.readouterr().err


KINDS = {
    **{name: each for name, each in BUDGET_KINDS.items() if name not in METHODS},
    **{name: BUDGET_KINDS[name] for name in ("DoRA", "PiSSA", "IA3", "OFT", "whole embeddings", "tokens")},
    "beta 0": (tiny.model, {"algorithm": "grpo", "beta": 0.0}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_is_moved_to_each_kl_and_to_its_reference(kind, tmp_path):
    make, settings = KINDS[kind]
    trainer = tiny.trainer(tmp_path, policy=make(), **AT_ONCE | settings)
    draw = torch.Generator().manual_seed(3)
    while (mover := Mover(trainer)).reached < 0.05:
        with torch.no_grad(), trainer.engine.moving():
            for p in trainer.trainable:
                p.add_(0.05 * torch.randn(p.shape, generator=draw))
    scales = [1.0]
    for part in (0.6, 0.2):
        place = mover.move(part * mover.reached)
        found = trainer.evaluate()
        assert place.kl == found.kl == pytest.approx(part * mover.reached, rel=TOLERANCE)
        assert found.kl == pytest.approx(kl_of_samples(trainer, found), rel=1e-3)
        scales.append(place.scale)
    assert mover.move(0.0).scale == 0 and scales == sorted(scales, reverse=True) and scales[-1] > 0
    reference = trainer.evaluate()
    assert reference.kl == pytest.approx(0, abs=LEAST)
    assert [row["logprob"] for row in reference.completions] == pytest.approx(
        [row["reference_logprob"] for row in reference.completions], abs=1e-4
    )


def kl_of_samples(trainer, evaluation):
    """Of the completions that were kept, mean over their tokens."""
    rows = [row for row in evaluation.completions if row["how"] == "sampled"]
    return sum(row["kl"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of LoRA with a KL of some tenths, and this KL."""
    folder = tmp_path_factory.mktemp("run")
    return run(folder, *MANY), reached_by(folder / "run")


def reached_by(folder):
    output = folder.parent / "reached"
    assert main(["eval", str(folder), "--output", str(output)]) == 0
    return results(output)[0]["after"]["kl"]


def test_eval_writes_the_moved_policies_beside_before_and_after(trained, tmp_path, capsys):
    folder, reached = trained
    kls = 0.7 * reached, 0.2 * reached
    assert main(["eval", str(folder), "--kl", f"{kls[0]},0,{kls[1]},{kls[0]}"]) == 0
    printed = capsys.readouterr().out
    (written,) = (folder / "eval").glob("step-2-kl-0-kl-*")
    numbers, rows = results(written)
    names = ["before", "kl 0", f"kl {kls[1]}", f"kl {kls[0]}", "after"]
    assert list(numbers) == ["step", *names] and numbers["after"]["kl"] == reached
    scales = [numbers[name]["scale"] for name in names]
    assert scales == sorted(scales) and scales[:2] == [0, 0] and scales[-1] == 1 and 0 < scales[2] < scales[3] < 1
    for name, wanted in (("kl 0", 0), (names[2], kls[1]), (names[3], kls[0])):
        assert numbers[name]["kl"] == pytest.approx(wanted, rel=TOLERANCE, abs=LEAST)
        own = [row for row in rows if row["scale"] == numbers[name]["scale"] and row["step"] == 2]
        assert len(own) == 32 + 5 and {row["policy_kl"] for row in own} == {numbers[name]["kl"]}
        rewards = [row["reward"] for row in own if row["how"] == "sampled"]
        assert sum(rewards) / 32 == pytest.approx(numbers[name]["reward"])
        assert f"KL {numbers[name]['kl']:.4g} nats a token at" in printed
    assert numbers["kl 0"]["reward"] == numbers["before"]["reward"] and "scale: 0 the reference" in printed
    alone = str(tmp_path / "alone")
    assert main(["eval", str(folder), "--kl", str(kls[1]), "--output", alone]) == 0
    again = results(tmp_path / "alone")[0][names[2]]
    assert again == pytest.approx(numbers[names[2]], rel=1e-4)  # whatever else is asked for


def test_a_kl_above_what_was_reached_is_refused_with_its_number(trained, tmp_path, capsys):
    folder, reached = trained
    assert main(["eval", str(folder), "--kl", f"0.001,{1.1 * reached}"]) == 2
    assert f"is above the KL of the policy, {reached:.4g} nats a token" in capsys.readouterr().err
    assert main(["export", str(folder), str(tmp_path / "out"), "--kl", "30"]) == 2
    assert f"--kl 30 is above the KL of the policy, {reached:.4g}" in capsys.readouterr().err
    assert not list(tmp_path.glob("out*"))
    model, settings = str(tmp_path / "model"), files(tmp_path)
    assert main(["eval", model, *settings, "--kl", "0.1", "--output", str(tmp_path / "now")]) == 2
    assert "is above the KL of the policy, 0 nats" in capsys.readouterr().err


def test_an_adapter_without_a_run_is_moved_toward_its_model(trained, tmp_path, monkeypatch):
    folder, reached = trained
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "checkpoints" / "step-2" / "policy", "adapter")
    assert main(["eval", "adapter", *files(tmp_path), *MANY, "--kl", str(reached / 2)]) == 0
    numbers = results(tmp_path / "eval" / f"adapter-kl-{reached / 2:g}")[0]
    assert list(numbers) == ["step", f"kl {reached / 2}", "now"]
    assert numbers[f"kl {reached / 2}"]["kl"] == pytest.approx(reached / 2, rel=TOLERANCE)


def test_the_evaluation_before_is_of_the_adapter_that_the_run_began_with(tmp_path):
    settings = dict(pair.split("=", 1) for pair in files(tmp_path))
    args = tiny.settings(tmp_path / "run", learning_rate=0.1, total_steps=2, eval_dataset=settings["eval_dataset"])
    model = tiny.trained_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    trainer = SafeTrainer(model, settings["reward"], args, tiny.PROMPTS, processing_class=tiny.tokenizer())
    right = trainer.evaluate().numbers()
    trainer.train()
    given = [str(tmp_path / "run"), f"model={tmp_path}/model"]
    assert main(["eval", *given, "--kl", "0"]) == 0
    numbers = results(tmp_path / "run" / "eval" / "step-2-kl-0")[0]
    for name in ("before", "kl 0"):
        assert {key: numbers[name][key] for key in right} == pytest.approx(right, abs=1e-5)
    assert numbers["after"]["kl"] > 1e-3


@pytest.mark.parametrize("options", [[], ["--merge"], ["lora_r=0"]], ids=str)
def test_export_writes_the_moved_policy(options, trained, tmp_path, capsys):
    folder, reached = trained
    if options == ["lora_r=0"]:
        folder, options = run(tmp_path, *MANY, *options), []
        reached = reached_by(folder)
    wanted = reached / 3
    assert main(["export", str(folder), str(tmp_path / "out"), "--kl", str(wanted), *options]) == 0
    said = capsys.readouterr().out
    assert "step-2, moved: KL " in said and "of the way from the reference" in said
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]
    sizes = AT_ONCE | {"lora_r": 0, "prompts_per_step": 2, "max_new_tokens": 4, "max_prompt_tokens": 32}
    trainer = tiny.trainer(tmp_path / "other", **sizes)
    trainer.policy.model.load_state_dict(whole(tmp_path / "out").state_dict())
    assert trainer.evaluate().kl == pytest.approx(wanted, rel=TOLERANCE)


def whole(out):
    """The model in a folder, with its adapter added if it is one."""
    if (out / "adapter_config.json").exists():
        return peft.AutoPeftModelForCausalLM.from_pretrained(out).merge_and_unload()
    return AutoModelForCausalLM.from_pretrained(out)


def test_export_needs_no_reward_but_held_out_prompts(trained, tmp_path, capsys):
    folder, reached = trained
    given = [str(folder), str(tmp_path / "out"), "reward=gone.py:gone", "--kl"]
    assert main(["export", *given, str(reached / 2)]) == 0
    given[1] = str(tmp_path / "more")
    assert main(["export", *given, "0.1", "eval_dataset=null"]) == 2
    assert "set eval_dataset" in capsys.readouterr().err and not list(tmp_path.glob("more*"))


@pytest.mark.parametrize("case", ["DELORA", "DoRA, base"])
def test_an_adapter_that_cannot_be_scaled_is_refused_by_name(case, tmp_path, capsys):
    settings = dict(pair.split("=", 1) for pair in files(tmp_path))
    kind = METHODS["DELORA"]() if case == "DELORA" else METHODS["DoRA"]()
    more = {} if case == "DELORA" else {"reference": "base"}
    args = tiny.settings(tmp_path / "run", total_steps=1, eval_dataset=settings["eval_dataset"], **more)
    SafeTrainer(
        settings.get("model", f"{tmp_path}/model"), settings["reward"], args, tiny.PROMPTS, peft_config=kind
    ).train()
    message = (
        "--kl cannot be used with the peft method DELORA" if case == "DELORA" else "--kl with reference base needs"
    )
    for command in (["eval"], ["export"]):
        out = [str(tmp_path / "out")] if command == ["export"] else []
        assert main([*command, str(tmp_path / "run"), *out, "--kl", "0.01"]) == 2
        assert message in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(("reference", "name"), [("initial", "before"), ("base", "base")])
def test_what_stands_before_a_run_from_a_trained_adapter_is_called_what_it_is(reference, name, tmp_path, capsys):
    """Of the adapter that was handed over a copy is kept where it is the reference, and beside the base none."""
    settings = dict(pair.split("=", 1) for pair in files(tmp_path))
    args = tiny.settings(
        tmp_path / "run", learning_rate=0.01, total_steps=2, eval_dataset=settings["eval_dataset"], reference=reference
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    trainer = SafeTrainer(
        tiny.trained_adapter(model), settings["reward"], args, tiny.PROMPTS, processing_class=tiny.tokenizer()
    )
    began = trainer.evaluate()
    trainer.train()
    assert main(["eval", str(tmp_path / "run"), f"model={tmp_path}/model", "--kl", "0"]) == 0
    (folder,) = (tmp_path / "run" / "eval").iterdir()
    numbers, rows = results(folder)
    assert list(numbers)[1:4] == [name, "kl 0", "after"] and name in capsys.readouterr().out
    assert (numbers[name]["reward"] == began.numbers()["reward"]) == (reference == "initial")
    assert (
        numbers[name]["scale"] == 0
        and numbers[name]["kl"] == pytest.approx(0, abs=1e-6)
        and numbers["after"]["kl"] > 1e-3
    )
    assert {row["step"] for row in rows} == {0, 2}


def at_half(folder, environment, settings):
    os.environ.update(environment)
    trainer = tiny.trainer(folder, **AT_ONCE, **settings, total_steps=2)
    trainer.train()
    mover = Mover(trainer, trainer.evaluate().kl)  # whose sampling leaves a sharded policy gathered
    return mover.reached, tuple(mover.move(mover.reached / 2)), trainer.evaluate().kl


@pytest.mark.parametrize(
    ("environment", "settings"),
    [
        ({}, {"learning_rate": 0.1}),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {"learning_rate": 0.01, "lora_r": 0}),
    ],
    ids=["DDP, LoRA", "FSDP2, full"],
)
def test_processes_move_the_policy_to_one_place(environment, settings, tmp_path):
    first, second = processes.run(at_half, 2, tmp_path / "two", environment, settings)
    assert first.error == second.error == "" and first.result == second.result
    reached, place, kl = first.result
    assert place[1] == kl == pytest.approx(reached / 2, rel=TOLERANCE)
