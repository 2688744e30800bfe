import dataclasses
import re
from pathlib import Path

import pytest

import safe_train
from safe_train.cli import main
from safe_train.config import CONFIGS, ConfigError, SafeConfig


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
        ("temperature=0.7", "temperature must be 1: samples must come from the policy that is scored"),
        ("top_k=50", "top_k must be 0: samples must come from the policy that is scored"),
        ("top_p=0.9", "top_p must be 1"),
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
        ("seed=-1", "seed must be at least 0"),
        ("gate_min=9", "gate_min must be at most gate_max"),
    ],
)
def test_impossible_settings_are_named(override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        SafeConfig.load(None, [override])


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


def test_every_setting_is_read_by_the_trainer_and_explained(capsys):
    sources = [path for path in Path(safe_train.__file__).parent.glob("*.py") if path.name != "config.py"]
    code = "\n".join(path.read_text() for path in sources)
    used = set(re.findall(r"\bargs\.(\w+)", code)) | {"algorithm"}  # which sets critic and controller
    assert main(["config"]) == 0
    printed = capsys.readouterr().out
    for field in dataclasses.fields(SafeConfig):
        assert field.name in used, f"nothing reads {field.name}"
        assert len(field.metadata["help"]) > 5
        assert re.search(rf"^{field.name}: .*# \S", printed, re.MULTILINE), field.name


def test_cli_reports_a_bad_setting_without_a_traceback(capsys):
    assert main(["run", "betta=1"]) == 2
    assert "did you mean 'beta'" in capsys.readouterr().err
