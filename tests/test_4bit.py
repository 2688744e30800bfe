"""QLoRA: what it needs is named; and, where bitsandbytes is installed, a run on a CPU, which the trainer refuses."""

import importlib.util

import pytest
import tiny
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from safe_train import SafeTrainer
from safe_train.cli import main
from safe_train.config import ConfigError, SafeConfig
from safe_train.data.batches import TokenBatch
from safe_train.models import scoring
from safe_train.models.lora import is_linear
from safe_train.models.pretrained import load_model
from safe_train.run import start


def test_what_4_bits_need_is_named(tmp_path, monkeypatch):
    args, gpu = SafeConfig(load_in_4bit=True), torch.device("cuda")
    with pytest.raises(ConfigError, match="load_in_4bit is for a model that is named"):
        tiny.trainer(tmp_path, load_in_4bit=True)
    with pytest.raises(ConfigError, match="load_in_4bit needs a GPU, the device is cpu"):
        start.check_4bit(args, torch.device("cpu"), is_named=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="load_in_4bit needs a package: pip install 'bitsandbytes"):
        start.check_4bit(args, gpu, is_named=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    start.check_4bit(args, gpu, is_named=True)
    monkeypatch.setattr("safe_train.engines.sharding.settings", lambda: "FSDP")
    with pytest.raises(ConfigError, match="needs whole weights on each GPU, not FSDP"):
        start.check_4bit(args, gpu, is_named=True)
    with pytest.raises(ConfigError, match="load_in_4bit must be false with generation vllm"):
        SafeConfig(load_in_4bit=True, generation="vllm")


class Packed(torch.nn.Linear):
    """A linear layer whose weight is stored as bytes, as bitsandbytes stores it."""

    def __init__(self):
        super().__init__(6, 4)
        self.weight = torch.nn.Parameter(torch.zeros(12, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, x):
        return x[:, :4] + self.bias


def test_a_layer_with_packed_weights_gets_lora():
    assert is_linear(Packed())


def test_weights_are_asked_for_in_4_bits(tmp_path, monkeypatch):
    asked = {}
    tiny.model().save_pretrained(tmp_path)
    monkeypatch.setattr("safe_train.models.pretrained.load_weights", lambda *_, **options: asked.update(options))
    load_model(SafeConfig(model=str(tmp_path), load_in_4bit=True), torch.device("cuda"))
    settings = asked["quantization_config"]
    assert settings.load_in_4bit and settings.bnb_4bit_quant_type == "nf4" and settings.bnb_4bit_use_double_quant
    assert settings.bnb_4bit_compute_dtype == asked["dtype"] == torch.bfloat16
    assert asked["device_map"] == {"": torch.device("cuda")}


@pytest.fixture
def bitsandbytes(monkeypatch):
    package = pytest.importorskip("bitsandbytes")
    # On some CPUs it would round to bfloat16, and lose gradients, in evaluation mode.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    monkeypatch.setattr("safe_train.run.start.check_4bit", lambda *_: None)
    return package


def trainer(folder, **changes):
    tiny.model(hidden_size=64, intermediate_size=128).save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    args = tiny.settings(folder / "run", **{"load_in_4bit": True, "learning_rate": 0.1} | changes)
    return SafeTrainer(f"{folder}/model", tiny.good_words, args, tiny.PROMPTS)


def test_the_gradient_is_that_of_the_dequantised_weights(bitsandbytes, tmp_path):
    quantised, plain = trainer(tmp_path), trainer(tmp_path, load_in_4bit=False)
    layers = dict(plain.policy.model.named_modules())
    count = 0
    for name, module in quantised.policy.model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            layers[name].weight.data.copy_(weight)
            count += 1
    assert count == 14
    gradients = []
    for each in (quantised, plain):
        torch.manual_seed(0)
        with torch.no_grad():
            for p in each.trainable:
                p.copy_(0.1 * torch.randn(p.shape))
        batch = TokenBatch.pack([[2, 9], [4]], [[7, 12, 5], [3, 8]])
        scoring.logprobs(each.policy(batch), each.policy.head(), batch.targets_L).sum().backward()
        gradients.append([p.grad for p in each.trainable])
    for found, right in zip(*gradients, strict=True):
        torch.testing.assert_close(found, right, atol=1e-4, rtol=1e-4)


def test_a_run_in_4_bits_trains_resumes_and_is_exported(bitsandbytes, tmp_path, capsys):
    first = trainer(tmp_path, total_steps=2)
    assert {p.dtype for p in first.policy.parameters()} == {torch.uint8, torch.float32}
    history = first.train()
    assert history[0]["kl"] == pytest.approx(0, abs=1e-6) and history[1]["kl"] > 1e-3
    assert all(row["sampler_gap"] < 1e-4 for row in history)
    again = trainer(tmp_path, total_steps=3)
    assert len(again.train(resume_from_checkpoint=True)) == 1
    with pytest.raises(ConfigError, match="at the run's beginning it was in uint8"):
        trainer(tmp_path, load_in_4bit=False, total_steps=4).train(resume_from_checkpoint=True)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--merge"]) == 2
    assert "--merge is refused with load_in_4bit" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    settings = again.policy.causal_lm.config.quantization_config
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=settings)
    ids = torch.tensor([[2, 9, 4, 7, 12]])
    with torch.no_grad():
        found = PeftModel.from_pretrained(base, tmp_path / "out").eval()(ids).logits
        torch.testing.assert_close(found, again.policy.model.eval()(ids).logits, atol=1e-5, rtol=0)
