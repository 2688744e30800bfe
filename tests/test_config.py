import dataclasses
import inspect
import json
import math
import pickle
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
import tiny

from safe_train.cli import main
from safe_train.config import CONFIGS, ConfigError, SafeConfig, parse
from safe_train.settings import other_names
from safe_train.trainer import SafeTrainer


def test_scientific_notation_in_yaml_is_a_number(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 1e-5\ntotal_steps: 7\nlora_last_layers: null\n")
    config = SafeConfig.load(file, ["beta=2e-3", "window=4"])
    assert (config.learning_rate, config.total_steps, config.beta, config.window) == (1e-5, 7, 2e-3, 4)


def test_overrides_win_over_the_file():
    assert SafeConfig.load("demo.yaml", ["total_steps=3"]).total_steps == 3


def test_text_is_taken_as_it_stands():
    config = SafeConfig.load(None, ["output_dir=007", "model=a: b #c", "eval_dataset=null"])
    assert (config.output_dir, config.model, config.eval_dataset) == ("007", "a: b #c", None)


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_shipped_configs_load(name):
    SafeConfig.load(name)


def test_saved_config_loads_back_the_same(tmp_path):
    config = SafeConfig(beta=0.5, reward=["vader"], total_steps=9)
    config.save(tmp_path / "config.yaml")
    assert SafeConfig.load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lerning_rate=1", "unknown setting 'lerning_rate'; did you mean 'learning_rate'"),
        ("zzz=1", "unknown setting 'zzz'"),
        ("beta", "expected key=value, got 'beta'"),
        ("beta=much", "beta must be float, got 'much'"),
        ("total_steps=1.5", "total_steps must be int, got 1.5"),
        ("use_cpu=3", "use_cpu must be bool, got 3"),
        ("total_steps=true", "total_steps must be int, got True"),
        ("beta=-1", "beta must be at least 0, got -1.0"),
        ("beta=.nan", "beta must be at least 0, got nan"),
        ("alpha=0", "alpha must be positive"),
        ("temperature=0", "temperature must be a finite number of at least 0.01, got 0"),
        ("temperature=.inf", "temperature must be a finite number of at least 0.01, got inf"),
        ("top_p=0", "top_p must be in (0, 1], got 0"),
        ("typical_p=0.9", "unknown setting 'typical_p'; here: not offered: top_k, top_p and min_p are"),
        ("repetition_penalty=1.1", "not offered: the policy is sampled as it is scored; temperature is"),
        ("dtype=float16", "dtype must be one of auto, float32, bfloat16, got 'float16'"),
        ("kl_estimator=k1", "zero gradient"),
        ("algorithm=dpo", "algorithm must be one of safe, ppo"),
        ("algorithm=grpo", "completions_per_prompt must be at least 2 for grpo"),
        ("critic=none", "critic must be soft_min, mean or single for safe"),
        ("minibatch_size=99", "minibatch_size must be at most the 16 of a rollout"),
        ("reward=[vader", "reward must be a YAML value, got '[vader'"),
        ("kl_threshold=.nan", "kl_threshold must be at least 0, got nan"),
        ("kl_threshold=0.9", "kl_threshold must be from kl_threshold_min 0.1 to kl_threshold_max 0.6, got 0.9"),
        ("kl_threshold_min=0.4", "kl_threshold must be from kl_threshold_min 0.4 to kl_threshold_max 0.6, got 0.3"),
        ("seed=-1", "seed must be from 0 to 4294967295, as NumPy's seeds are, got -1"),
        ("seed=4294967296", "seed must be from 0 to 4294967295"),
        ("learning_rate=.inf", "learning_rate must be a finite number, got inf"),
        ("save_best=true", "save_best must be false without eval_every"),
        ("lora_target_modules=[]", "lora_target_modules must be null for all linear layers"),
        ("adam_beta1=1", "adam_beta1 must be in [0, 1), got 1.0"),
        ("stop_kl=-1", "stop_kl must be at least 0"),
        ("gate_min=9", "gate_min must be at most gate_max"),
    ],
)
def test_impossible_settings_are_named(override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        SafeConfig.load(None, [override])


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("total_steps: 0100", "total_steps", 100),
        ("total_steps: 1_000", "total_steps", 1000),
        ("total_steps: 1e3", "total_steps", 1000),
        ("beta: 010", "beta", 10.0),
        ("critic_max_grad_norm: .inf", "critic_max_grad_norm", math.inf),
        ("window: ~", "window", None),
        ("eval_dataset:", "eval_dataset", None),
        ("use_cpu: yes", "use_cpu", True),
        ("output_dir: 007", "output_dir", "007"),
        ("output_dir: 2024-01-01", "output_dir", "2024-01-01"),
        ("model: no", "model", "no"),
        ("model: 1e5", "model", "1e5"),
        ("reward: [on, 3:4]", "reward", ["on", "3:4"]),
        ("reward_weights: [1, 08, 1e-1]", "reward_weights", [1.0, 8.0, 0.1]),
        ("liger_kernel: True", "liger_kernel", "true"),
        ('eval_dataset: "null"', "eval_dataset", "null"),
        ("reward: null", "reward", []),
        ("a: &rows rows.jsonl\ndataset: *rows".replace("a:", "model:"), "dataset", "rows.jsonl"),
    ],
)
def test_a_setting_is_read_as_it_was_written(text, name, value, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8-sig")  # with a byte order mark
    found = getattr(SafeConfig.load(file), name)
    assert found == value and type(found) in (type(value), type(None))
    if "\n" not in text and not text.endswith('"null"'):
        key, _, said = text.partition(":")
        assert getattr(SafeConfig.load(None, [f"{key}={said.strip()}"]), name) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("total_steps: 1:30", "total_steps must be int, got '1:30'"),
        ("beta: 1:30", "beta must be float, got '1:30'"),
        ("total_steps: 0x10", "total_steps must be int, got '0x10'"),
        ("use_cpu: 1", "use_cpu must be bool, got 1"),
        ('total_steps: "3"', "got '3'; write total_steps: 3, without quotes"),
        ("output_dir:", "output_dir must be str, got None"),
        ("beta: 1\ngamma: 1\n'beta': 2", "beta is set twice, in lines 1 and 3"),
        ("reward: {a: 1, b: 2, a: 3}", "a is set twice, in lines 1 and 1"),
        ("model:\n  total_steps: 3", "settings are flat: no line is indented under another"),
        ("beta: 1\n  gamma: 1", "is not YAML: mapping values are not allowed here"),
        ("beta: 1\n---\ngamma: 1", "is not YAML: expected a single document"),
        ("- beta", "must hold `setting: value` lines, got ['beta']"),
        ("? [beta]\n: 1", "the name in line 1 is a sequence"),
        ("<<: {beta: 1}", "unknown setting '<<'"),
        ("output_dir: ~nobody-here/run", "output_dir '~nobody-here/run' is in the home folder of a user"),
    ],
)
def test_what_yaml_would_guess_or_drop_is_refused(text, message, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        SafeConfig.load(tmp_path / "run.yaml")


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"model: \xff\xfe")
    with pytest.raises(ConfigError, match="run.yaml is not a text file in UTF-8"):
        SafeConfig.load(tmp_path / "run.yaml")


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("model", "dataset", "eval_dataset", "output_dir")
    (tmp_path / "run.yaml").write_text("".join(f"{name}: ~/{name}\n" for name in names) + "reward: [~/r.py:f, vader]")
    config = SafeConfig.load("~/run.yaml")
    assert [getattr(config, name) for name in names] == [str(tmp_path / name) for name in names]
    assert config.reward == [f"{tmp_path}/r.py:f", "vader"]
    assert SafeConfig.load(None, ["output_dir=~"]).output_dir == str(tmp_path)
    assert SafeConfig(output_dir="a~b").output_dir == "a~b"
    assert main(["report", "~/nothing"]) == 2 and main(["run", "--resume-from", "~/nothing/checkpoints/step-1"]) == 2


def test_a_pair_is_a_value_that_any_file_may_hold():
    pairs = {"use_cpu": "yes", "total_steps": "0100", "beta": "1e-2", "reward": "[a.py:f, vader]", "window": "null"}
    found = json.loads(json.dumps({name: parse(name, text) for name, text in pairs.items()}))
    assert found == {"use_cpu": True, "total_steps": 100, "beta": 0.01, "reward": ["a.py:f", "vader"], "window": None}
    assert SafeConfig.from_dict(found).total_steps == 100


def decided(config):
    return config.critic, config.controller, config.beta


def test_what_follows_from_the_algorithm_follows_it_to_another(tmp_path):
    safe, ppo = SafeConfig(), SafeConfig(algorithm="ppo")
    for copy in (dataclasses.replace(safe, seed=1), copy_of(safe), pickle.loads(pickle.dumps(safe))):
        assert decided(copy) == decided(safe)
        assert decided(dataclasses.replace(copy, algorithm="ppo")) == decided(ppo) == ("single", "fixed", 0.1)
        there = dataclasses.replace(copy, algorithm="ppo_two_heads")
        assert decided(dataclasses.replace(there, algorithm="safe")) == decided(safe)
    assert decided(SafeConfig.from_dict(dataclasses.asdict(safe) | {"algorithm": "ppo"})) == decided(ppo)
    chosen = SafeConfig(beta=0.01, critic="soft_min")  # the same values, but somebody's choice
    assert decided(dataclasses.replace(chosen, algorithm="ppo_two_heads")) == ("soft_min", "fixed", 0.01)
    ppo.save(tmp_path / "config.yaml")
    assert "beta: 0.1\n" in (tmp_path / "config.yaml").read_text()


def copy_of(config):
    return SafeConfig.from_dict(dataclasses.asdict(config))


def test_lora_settings_without_lora_are_refused():
    with pytest.raises(ConfigError, match="lora_last_layers must be null with lora_r 0, which trains all"):
        SafeConfig(lora_r=0, lora_last_layers=8)


def test_another_algorithm_than_the_files_brings_its_own_critic_controller_and_beta(tmp_path):
    file = tmp_path / "config.yaml"
    SafeConfig(algorithm="safe").save(file)
    loaded = SafeConfig.load(file, ["algorithm=ppo"])
    assert (loaded.critic, loaded.controller, loaded.beta) == ("single", "fixed", 0.1)
    SafeConfig(algorithm="safe", beta=0.02).save(file)
    assert SafeConfig.load(file, ["algorithm=ppo"]).beta == 0.02
    SafeConfig(algorithm="safe", critic="mean").save(file)
    assert SafeConfig.load(file, ["algorithm=ppo"]).critic == "mean"  # a choice, not the algorithm's own
    assert SafeConfig.load(file, ["algorithm=ppo", "controller=safe"]).controller == "safe"


@pytest.mark.parametrize("algorithm, beta", [("safe", 0.01), ("ppo", 0.1), ("ppo_two_heads", 0.1), ("grpo", 0.1)])
def test_without_the_controller_the_anchor_is_firmer(algorithm, beta, tmp_path):
    settings = {"algorithm": algorithm, "completions_per_prompt": 2}
    assert SafeConfig(**settings).beta == beta
    assert SafeConfig(**settings, beta=None).beta == beta  # `beta: null` in YAML
    assert SafeConfig(**settings, beta=0.3).beta == 0.3
    SafeConfig(**settings, beta=0.01).save(tmp_path / "config.yaml")
    assert SafeConfig.load(tmp_path / "config.yaml").beta == 0.01  # a run of before goes on as it was


def test_missing_config_file_lists_the_shipped_ones():
    with pytest.raises(ConfigError, match=r"no config file 'none\.yaml'; shipped ones are: .*demo\.yaml"):
        SafeConfig.load("none.yaml")


def test_every_setting_is_read_by_a_run(tmp_path, monkeypatch):
    """By code outside the file that declares it, in runs that differ in what is switched on."""
    names, read = {field.name for field in dataclasses.fields(SafeConfig)}, set()
    plain = object.__getattribute__

    def watched(config, name):
        reader = sys._getframe(1).f_globals.get("__name__", "")
        if name in names and reader.startswith("safe_train.") and reader != "safe_train.config":
            read.add(name)
        return plain(config, name)

    monkeypatch.setattr(SafeConfig, "__getattribute__", watched, raising=False)
    for i, changes in enumerate(({}, {"algorithm": "ppo"}, {"algorithm": "grpo"})):
        tiny.trainer(tmp_path / str(i), total_steps=1, **changes).train()
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.PROMPTS))
    names_of_files = {"model": str(tmp_path / "model")}
    names_of_files |= {name: str(tmp_path / "prompts.jsonl") for name in ("dataset", "eval_dataset")}
    args = tiny.settings(tmp_path / "files", total_steps=1, eval_every=1, **names_of_files)
    SafeTrainer(args=args, reward_funcs=tiny.good_words).train()
    taught = {"algorithm": "distill", "teacher": str(tmp_path / "model")}
    tiny.trainer(tmp_path / "taught", total_steps=1, **taught).train()
    assert names - read == set()


def test_every_setting_is_explained(capsys):
    assert main(["config", "--all"]) == 0
    printed = capsys.readouterr().out
    for field in dataclasses.fields(SafeConfig):
        assert len(field.metadata["help"]) > 5
        assert re.search(rf"^{field.name}: .*# \S", printed, re.MULTILINE), field.name


def test_without_all_a_dozen_settings_are_printed_under_their_groups(tmp_path, capsys):
    assert main(["config"]) == 0
    printed = capsys.readouterr().out
    names = re.findall(r"^(\w+): ", printed, re.MULTILINE)
    assert len(names) == 12 and {"model", "dataset", "reward", "learning_rate", "beta"} <= set(names)
    groups = [field.metadata["group"] for field in dataclasses.fields(SafeConfig)]
    assert len(set(groups)) == len(
        [a for a, b in zip(groups, [None, *groups], strict=False) if a != b]
    )  # each in one place
    assert re.findall(r"^## (.+)$", printed, re.MULTILINE) == list(
        dict.fromkeys(field.metadata["group"] for field in dataclasses.fields(SafeConfig) if field.name in names)
    )
    assert f"{len(groups) - 12} more settings: safe-train config --all" in printed
    assert main(["config", "--format", "yaml"]) == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    assert SafeConfig.load(tmp_path / "run.yaml") == SafeConfig()


def test_a_commented_file_of_all_settings_has_the_defaults(tmp_path, capsys):
    assert main(["config", "--all", "--format", "yaml"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "run.yaml").write_text(text)
    loaded = SafeConfig.load(tmp_path / "run.yaml")
    assert loaded == SafeConfig() and decided(dataclasses.replace(loaded, algorithm="ppo")) == ("single", "fixed", 0.1)
    for field in dataclasses.fields(SafeConfig):
        assert f"# {field.metadata['help']}\n{field.name}:" in text


def test_the_version_and_the_exit_statuses_are_said(capsys):
    for option, said in (("--version", f"safe-train {metadata.version('safe-kernels')}"), ("--help", "143 SIGTERM")):
        with pytest.raises(SystemExit) as stopped:
            main([option])
        assert stopped.value.code == 0 and said in " ".join(capsys.readouterr().out.split())


def test_cli_reports_a_bad_setting_without_a_traceback(capsys):
    assert main(["run", "betta=1"]) == 2
    assert "did you mean 'beta'" in capsys.readouterr().err


ROWS = [pytest.param(row, id=other_names.names(row)[0]) for row in other_names.TABLE]


@pytest.mark.parametrize("row", ROWS)
def test_a_name_from_another_trainer_is_answered_with_settings_that_work(row):
    value = other_names.example(row)
    pairs = other_names.settings(row, value).split()
    if pairs:
        needed = {"save_best": ["eval_every=1"], "algorithm": ["completions_per_prompt=8"]}
        needed["teacher"] = ["algorithm=distill"]
        loaded = SafeConfig.load(None, [*pairs, *needed.get(pairs[0].partition("=")[0], [])])
        for pair in pairs:
            name, _, said = pair.partition("=")
            assert getattr(loaded, name) == getattr(SafeConfig.load(None, [pair, *needed.get(name, [])]), name)
            assert said and getattr(loaded, name) is not None
    for name in other_names.names(row):
        with pytest.raises(ConfigError) as refused:
            SafeConfig.load(None, [f"{name}={value}"])
        said = str(refused.value)
        assert (
            said.startswith(f"unknown setting {name!r}; here") and (row.note in said) and all(p in said for p in pairs)
        )


def test_the_table_has_no_name_twice_and_none_of_ours():
    theirs = [name for row in other_names.TABLE for name in other_names.names(row)]
    assert len(set(theirs)) == len(theirs) and not set(theirs) & set(SafeConfig.__dataclass_fields__)
    for row in other_names.TABLE:
        for ours in row.ours.values() if isinstance(row.ours, dict) else [row.ours]:
            assert {pair.partition("=")[0] for pair in ours.split()} <= set(SafeConfig.__dataclass_fields__)
        assert row.ours or row.note


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("actor_rollout_ref.actor.clip_ratio", "0.3", "here it is clip_low=0.3 clip_high=0.3"),
        ("actor_rollout_ref.rollout.n", "5", "here it is completions_per_prompt=5"),
        ("critic.optim.lr", "1e-5", "here it is critic_learning_rate=1e-5"),
        ("bf16", "True", "here it is dtype=bfloat16"),
        ("loss_type", "dr_grpo", "here it is loss_aggregation=constant_length"),
        ("lora_dropout", "0.1", "here: refused: the policy that is scored would not be the one that was sampled"),
        ("adv_estimator", "rloo", "here there is no such choice"),
        ("trainer", "{total_epochs: 3}", "settings are flat"),
    ],
)
def test_names_and_values_of_other_trainers(name, value, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        SafeConfig.load(None, [f"{name}={value}"])


def test_all_unknown_settings_are_named_at_once_also_in_python():
    with pytest.raises(ConfigError) as refused:
        SafeConfig(num_generations=8, beta=0.1, lerning_rate=1)
    assert str(refused.value).splitlines() == [
        "unknown setting 'num_generations'; here it is completions_per_prompt=8",
        "unknown setting 'lerning_rate'; did you mean 'learning_rate'?",
    ]
    assert list(inspect.signature(SafeConfig).parameters)[:2] == ["algorithm", "model"]  # what editors and help() show


def test_the_documentation_has_the_table_of_other_names():
    text = (Path(__file__).parents[1] / "docs" / "trainer.md").read_text()
    table = "\n".join(other_names.markdown())
    assert table in text, f"docs/trainer.md needs this table:\n{table}"
