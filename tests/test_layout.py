"""Rows and packed sequences: the same numbers as alone, the layout that `auto` takes, and what is refused."""

import json
import subprocess
import sys

import pytest
import tiny
import torch
from architectures import tiny_kind, tiny_of
from torch.nn.functional import linear

from safe_kernels.integrations.transformers import head_inputs, logit_transform, own_logits
from safe_train.config import ConfigError, SafeConfig
from safe_train.data.batches import TokenBatch, balanced_rows, padded_microbatches
from safe_train.models import layout
from safe_train.models.attention import use_attention
from safe_train.models.checks import check_vocabulary, head_gap
from safe_train.models.layout import check_causal, choose_layout, layout_gap
from safe_train.models.policy import make_policy

SEQUENCES = ([[5, 6, 7, 2], [8], [9, 10]], [[11, 12], [13, 14, 3, 1], [1]])


def settings(**changes):
    return SafeConfig(**{"lora_r": 0, "max_prompt_tokens": 16, "max_new_tokens": 16} | changes)


def test_rows_hold_the_packed_tokens_and_the_same_predictions():
    batch = TokenBatch.pack(*SEQUENCES)
    ids_BT, mask_BT, predict_L = batch.rows()
    assert ids_BT.tolist() == [[5, 6, 7, 2, 11, 12], [8, 13, 14, 3, 1, 0], [9, 10, 1, 0, 0, 0]]
    assert mask_BT.sum(1).tolist() == [6, 5, 3] and mask_BT[2].tolist() == [1, 1, 1, 0, 0, 0]
    assert ids_BT.flatten()[predict_L].tolist() == [2, 11, 8, 13, 14, 3, 10]
    assert TokenBatch.pack([[0]], [[]]).rows()[0].tolist() == [[0]]


@pytest.mark.parametrize("most", [1, 7, 20, 1000])
def test_padded_micro_batches_hold_every_sequence_once_within_the_budget(most):
    lengths = torch.randint(1, 12, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    groups = padded_microbatches(lengths, most)
    assert sorted(i for group in groups for i in group) == list(range(30))
    assert all(len(group) == 1 or len(group) * max(lengths[i] for i in group) <= most for group in groups)
    in_order = [lengths[i] for group in groups for i in group]
    assert in_order == sorted(lengths, reverse=True)
    by_rank = balanced_rows(lengths, 3, most)
    assert sorted(i for groups in by_rank for group in groups for i in group) == list(range(30))
    assert all(len(group) == 1 or len(group) * max(lengths[i] for i in group) <= most for g in by_rank for group in g)


def test_auto_packs_where_attention_reads_boundaries_and_no_state_runs_on(monkeypatch):
    model, mamba = tiny.model(), tiny_kind("jamba")
    reading_boundaries = ("varlen", "flash_attention_2", "flash_attention_3")
    for attention in ("sdpa", "eager", *reading_boundaries):
        for each in (model, mamba):
            monkeypatch.setattr(each.config, "_attn_implementation_internal", attention)
        assert choose_layout(settings(), model) == ("packed" if attention in reading_boundaries else "rows")
        if attention != "varlen":
            assert choose_layout(settings(), mamba) == choose_layout(settings(layout="rows"), model) == "rows"
        else:
            with pytest.raises(ConfigError, match="on padded rows, and JambaForCausalLM carries a state"):
                choose_layout(settings(), mamba)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_by_name_is_what_rows_are_where_it_passes(attention):
    states = []
    for name in ("packed", "rows"):
        policy = make_policy(tiny.model(), settings(layout=name, attn_implementation=attention))
        assert policy.layout == name
        states.append(policy(TokenBatch.pack(*SEQUENCES)))
    torch.testing.assert_close(*states, **tiny.FORWARDS)


@pytest.mark.parametrize("kind", ["bloom", "biogpt", "mpt", "roformer"])
def test_a_model_that_mixes_packed_sequences_is_refused_by_the_number(kind):
    """Each is right in rows; none of them takes the bounds of sequences from `position_ids` alone."""
    model = tiny_kind(kind)
    policy = make_policy(model, settings())
    assert policy.layout == "rows" and layout_gap(policy.causal_lm, "rows") < 1e-5
    gap = layout_gap(policy.causal_lm, "packed")
    if gap < 1e-4:
        pytest.skip(f"{kind} keeps them apart here")
    with pytest.raises(
        ConfigError, match=f"layout packed: on .* attention the log-probs of .* differ by {gap:.2g} nats"
    ):
        make_policy(tiny_kind(kind), settings(layout="packed"))


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("mistral", "sliding_window 4"),
        ("gemma3_text", "sliding_attention"),
        ("llama4_text", "chunked_attention"),
        ("mamba", "carries a state"),
    ],
)
def test_packed_is_refused_for_windows_and_states(kind, found):
    with pytest.raises(ConfigError, match=f"layout packed: .*{found}"):
        make_policy(tiny_kind(kind), settings(layout="packed"))
    policy = make_policy(tiny_kind(kind), settings())
    assert layout_gap(policy.causal_lm, policy.layout) < 1e-5


def test_the_layout_check_sees_a_model_that_ignores_its_mask():
    """Bidirectional attention: a padded row's tokens would see the padding, and tokens those that come after them."""
    with pytest.raises(ConfigError, match="BertLMHeadModel is not causal: the log-probs of 13 tokens change by"):
        make_policy(tiny_kind("bert", is_decoder=False), settings())
    check_causal(tiny_kind("bert"))
    with pytest.raises(ConfigError, match="XLNetLMHeadModel is not causal"):
        make_policy(tiny_kind("xlnet"), settings())


@pytest.mark.parametrize(("kind", "rope"), [("llama", "dynamic"), ("phi3", "longrope"), ("gemma3_text", "dynamic")])
def test_a_rope_that_depends_on_the_batch_is_refused_beyond_its_limit(kind, rope):
    parameters = {"rope_type": rope, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    if rope == "longrope":
        parameters |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    given = {"full_attention": parameters, "sliding_attention": parameters} if kind == "gemma3_text" else parameters
    changes = {"rope_parameters": given, "max_position_embeddings": 128, "original_max_position_embeddings": 32}
    model = tiny_kind(kind, **changes)
    make_policy(model, settings(max_prompt_tokens=16, max_new_tokens=16))
    with pytest.raises(ConfigError, match=rf"must be at most 32 for {type(model).__name__}: its rope_type {rope}"):
        make_policy(model, settings(max_prompt_tokens=17, max_new_tokens=16))


READINGS = {  # what the sizes of tests/architectures.py ask for
    "falcon_h1": {"logit_scale": 0.5, "softcap": None},
    "recurrent_gemma": {"logit_scale": 1.0, "softcap": 3.0},
    "nanochat": {"logit_scale": 1.0, "softcap": 3.0},
    "granitemoe": {"logit_scale": 0.25, "softcap": None},
    "cohere2": {"logit_scale": 0.25, "softcap": None},
    "hyperclovax": {"logit_scale": 4.0, "softcap": None},
    "llama": {"logit_scale": 1.0, "softcap": None},
}


@pytest.mark.parametrize("kind", READINGS)
def test_what_a_model_does_to_its_logits_is_measured(kind):
    assert logit_transform(tiny_kind(kind)) == READINGS[kind]


class Scaled(type(tiny.model())):
    """A model with a scale that its config does not name."""

    def forward(self, **inputs):
        output = super().forward(**inputs)
        output.logits = 1.01 * output.logits
        return output


def test_an_unknown_scale_is_refused_with_both_numbers():
    model = Scaled(tiny.model().config).eval()
    with pytest.raises(ConfigError, match=r"Scaled does something .* of -30.* it makes -30.3.* and the nearest .* -30"):
        make_policy(model, settings())


def test_a_head_that_the_kernels_do_not_reproduce_is_refused(monkeypatch):
    policy = make_policy(tiny.model(), settings())
    assert head_gap(policy) < 2e-5
    policy.logit_transform["logit_scale"] = 1.01
    assert head_gap(policy) > 1e-3
    reading = {"logit_scale": 1.01, "softcap": None}
    monkeypatch.setattr("safe_train.models.checks.logit_transform", lambda model: reading)
    with pytest.raises(ConfigError, match="the head of LlamaForCausalLM: on the same hidden states its own"):
        make_policy(tiny.model(), settings())


def test_the_head_agrees_for_bfloat16_weights_too():
    assert head_gap(make_policy(tiny.model().to(torch.bfloat16), settings(lora_r=2))) < 2e-5


def test_hidden_states_are_what_the_head_receives():
    """MiniCPM divides them and OPT projects them between the backbone and the head."""
    for kind in ("minicpm3", "opt"):
        model = tiny_kind(kind)
        ids = torch.tensor([[5, 6, 7, 3]])
        hidden = head_inputs(model, input_ids=ids)
        head = model.get_output_embeddings()
        torch.testing.assert_close(linear(hidden, head.weight, head.bias), model(input_ids=ids).logits)
        torch.testing.assert_close(own_logits(model, input_ids=ids)[0], hidden)
        assert "forward" not in vars(head)


def test_a_head_that_is_called_otherwise_is_refused():
    with pytest.raises(ConfigError, match=r"ProphetNetForCausalLM must call its output head once.*\(1, 2, 16, 32\)"):
        make_policy(tiny_kind("prophetnet"), settings())


def test_tokens_without_a_row_and_rows_without_a_token(tmp_path, capsys):
    tokenizer = tiny.tokenizer()
    assert check_vocabulary(tiny.model(), tokenizer) == ""
    tiny.trainer(tmp_path, policy=tiny.model(vocab_size=len(tiny.WORDS) + 3))
    assert (
        f"has {len(tiny.WORDS) + 3} rows, the tokenizer {len(tiny.WORDS)} tokens: the other 3"
        in capsys.readouterr().out
    )
    with pytest.raises(
        ConfigError, match=rf"the tokenizer has {len(tiny.WORDS)} tokens, .* has rows for 20: 'was' would"
    ):
        tiny.trainer(tmp_path, policy=tiny.model(vocab_size=20))


@pytest.mark.parametrize("name", ["rows", "packed"])
def test_the_layout_is_in_the_environment_and_in_every_row(name, tmp_path):
    rows = tiny.trainer(tmp_path, layout=name, total_steps=2).train()
    assert [row["layout"] for row in rows] == [name, name]
    assert json.loads((tmp_path / "environment.json").read_text())["layout"] == name
    assert rows[0]["sampler_gap"] < 1e-5 and rows[0]["kl"] < 1e-6


def test_a_run_in_rows_is_the_packed_run(tmp_path):
    """To rounding, with the same samples: `llama` runs on a CPU were packed before."""
    runs = [tiny.trainer(tmp_path / name, layout=name, learning_rate=1e-4).train() for name in ("rows", "packed")]
    for rows, packed in zip(*runs, strict=True):
        for name in ("reward", "kl", "entropy", "policy_loss", "value_loss", "grad_norm", "explained_variance"):
            assert rows[name] == pytest.approx(packed[name], rel=1e-3, abs=1e-5), name


def test_varlen_and_rows_exclude_each_other(monkeypatch):
    model = tiny.model()
    use_attention(model, "varlen")
    with pytest.raises(ConfigError, match="varlen cannot run on padded rows, and layout is rows"):
        choose_layout(settings(layout="rows"), model)
    assert choose_layout(settings(), model) == "packed"


def test_the_bounds_of_the_layout_check_follow_the_weights():
    assert layout.largest_gap(torch.float32) == 1e-4 and layout.largest_gap(torch.bfloat16) == 0.15
    assert layout_gap(tiny_of("Qwen2").to(torch.bfloat16), "rows") < 0.15


def test_the_integration_imports_no_transformers():
    code = "import sys, safe_kernels.integrations.transformers as m; assert 'transformers' not in sys.modules, m"
    subprocess.run([sys.executable, "-c", code], check=True)
