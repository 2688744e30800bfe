"""`algorithm: distill`: the policy takes on a teacher's distribution at the states that its own samples pass."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tiny
import torch

from safe_train import SafeTrainer
from safe_train.algorithms import losses
from safe_train.cli import main
from safe_train.commands.check import check, memory
from safe_train.config import ConfigError, SafeConfig
from safe_train.engines.projection import mean_kl


def save(model, folder, tokenizer=None):
    model.save_pretrained(folder)
    (tokenizer or tiny.tokenizer()).save_pretrained(folder)
    return str(folder)


def wide(seed=5, **changes):
    """A teacher of another width."""
    return tiny.model(seed, hidden_size=48, num_attention_heads=6, **changes)


def trainer(tmp_path, model=None, name="run", reward=None, policy=None, **settings):
    teacher = save(wide() if model is None else model, tmp_path / "teacher")
    args = tiny.settings(tmp_path / name, algorithm="distill", teacher=teacher, **settings)
    given = {"train_dataset": tiny.PROMPTS, "eval_dataset": tiny.PROMPTS, "processing_class": tiny.tokenizer()}
    return SafeTrainer(tiny.model() if policy is None else policy, reward, args, **given)


def logp(model, batch, temperature, size=None):
    rows, mask, place = batch.rows()
    logits = model(rows, attention_mask=mask).logits.flatten(0, 1)[place] / temperature
    return logits[:, :size].log_softmax(-1)


def divergence(name, p, q, beta):
    def kl(a, b):
        return (a.exp() * (a - b)).sum(-1)

    if name == "tv":
        return (p.exp() - q.exp()).abs().sum(-1) / 2
    if name == "jsd":
        m = (beta * q.exp() + (1 - beta) * p.exp()).log()
        return beta * kl(q, m) + (1 - beta) * kl(p, m)
    return kl(p, q) if name == "reverse_kl" else kl(q, p)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "tv"])
def test_the_loss_is_the_divergence_of_the_models_and_so_is_its_gradient(name, tmp_path):
    """Both from the models' own logits in float64, by autograd; with an entropy bonus and a KL to the reference."""
    settings = {"temperature": 1.3, "lora_r": 0, "minibatch_size": None, "divergence": name, "jsd_beta": 0.3}
    run = trainer(tmp_path, max_tokens_per_microbatch=10_000, beta=0.2, entropy_coef=0.1, **settings)
    experience = collected(run)
    (micro,), control = experience, run.update_controller(experience, torch.full((8,), math.nan))
    weights = losses.token_weights(micro, losses.Totals(len(micro.logprob_L), len(micro.indices)), run.args)
    with torch.no_grad():  # away from the reference, so that the KL is not 0
        for parameter in run.trainable:
            parameter.add_(0.05 * torch.randn_like(parameter))
    hidden = run.engine.forward(micro.batch)
    found = losses.policy_loss(hidden, run.policy.head(), micro, weights, control, run.args)
    found.loss.backward()

    models = tiny.model().double(), tiny.model().double(), wide().double()
    models[0].load_state_dict(run.policy.causal_lm.state_dict())
    p = logp(models[0], micro.batch, 1.3)
    with torch.no_grad():
        reference, teacher = (logp(model, micro.batch, 1.3) for model in models[1:])
    kl, entropy = divergence("reverse_kl", p, reference, 0), -(p.exp() * p).sum(-1)
    loss = (weights * (divergence(name, p, teacher, 0.3) + 0.2 * kl - 0.1 * entropy)).sum()
    loss.backward()
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(found.kl.double(), kl.detach(), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found.entropy.double(), entropy.detach(), atol=1e-5, rtol=0)
    for own, right in zip(run.policy.causal_lm.parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(own.grad.double(), right.grad, atol=2e-6, rtol=1e-4)


def collected(run):
    from safe_train.sampling.experience import Experience

    return Experience(run.policy, None, run.sample(0), run.args, run.device, run.teacher)


@pytest.mark.parametrize("name", ["reverse_kl", "jsd"])
def test_a_run_without_a_reward_comes_nearer_to_its_teacher_and_resumes_exactly(name, tmp_path):
    settings = {"divergence": name, "lora_r": 0, "learning_rate": 5e-3, "completions_per_prompt": 4, "save_every": 20}
    whole = trainer(tmp_path, name="whole", total_steps=40, **settings).train()
    assert whole[-1]["policy_loss"] < 0.5 * whole[0]["policy_loss"]
    assert whole[-1]["kl"] > 0.05
    trainer(tmp_path, name="parts", total_steps=20, **settings).train()
    rest = trainer(tmp_path, name="parts", total_steps=40, **settings).train(resume_from_checkpoint=True)
    names = ("policy_loss", "kl", "entropy")
    assert [[row[x] for x in names] for row in rest] == [[row[x] for x in names] for row in whole[20:]]


def test_a_reward_is_logged_and_teaches_nothing(tmp_path):
    plain, judged = (
        trainer(tmp_path, name=str(reward), reward=reward, total_steps=2).train() for reward in (None, tiny.good_words)
    )
    assert [row["policy_loss"] for row in plain] == [row["policy_loss"] for row in judged]
    assert all(0 <= row["reward"] <= 1 for row in judged)
    run = trainer(tmp_path, name="evaluated")
    assert run.evaluate().kl == pytest.approx(0, abs=1e-6)


def test_a_kl_budget_holds_while_the_teacher_pulls(tmp_path):
    settings = {"learning_rate": 2e-2, "total_steps": 8, "completions_per_prompt": 4}
    free = trainer(tmp_path, name="free", **settings).train()
    held = trainer(tmp_path, name="held", kl_budget=0.05, **settings).train()
    assert max(row["kl"] for row in free) > 0.1
    assert all(row["budget/kl"] <= 0.05 for row in held if "budget/kl" in row)


def test_a_step_is_bounded_by_the_kl_of_now(tmp_path, monkeypatch):
    """Not by that of the rollout, which later steps of the update have left."""
    run = trainer(tmp_path, inner_epochs=3, learning_rate=0.02, max_preview_kl=0.02, total_steps=1)
    told, apply = [], run.preview.apply

    def noted(minibatch, kl_before):
        line, now = run.preview.line, [p.detach().clone() for p in run.trainable]
        with torch.no_grad():
            for parameter, before in zip(run.trainable, line.origins, strict=True):
                parameter.copy_(before)
            told.append((kl_before, mean_kl(run.policy, minibatch)))
            for parameter, after in zip(run.trainable, now, strict=True):
                parameter.copy_(after)
        return apply(minibatch, kl_before)

    monkeypatch.setattr(run.preview, "apply", noted)
    run.train()
    assert len(told) > 3 and max(true for _, true in told) > 1e-3
    assert all(kl == pytest.approx(true, rel=1e-3, abs=1e-6) for kl, true in told)


def test_a_head_with_more_rows_is_cut_to_the_ids_of_both(tmp_path, capsys):
    run = trainer(tmp_path, wide(vocab_size=len(tiny.WORDS) + 5), lora_r=0, max_tokens_per_microbatch=10_000)
    assert run.teacher.shared_vocabulary == len(tiny.WORDS)
    size = len(tiny.WORDS)
    assert f"have {size} and {size + 5} rows for one tokenizer: the divergence is over the first {size}" in (
        capsys.readouterr().out
    )
    (micro, *_), teacher = collected(run), wide(vocab_size=size + 5).double()
    weights = torch.full((len(micro.logprob_L),), 1 / len(micro.logprob_L))
    control = run.controller.update(0.0, 1.0, 0.0, 1.0)
    with torch.no_grad():
        found = losses.policy_loss(run.policy(micro.batch), run.policy.head(), micro, weights, control, run.args).loss
        p, q = logp(tiny.model().double(), micro.batch, 1.0), logp(teacher, micro.batch, 1.0, size)
    assert found.item() == pytest.approx((weights * divergence("reverse_kl", p, q, 0)).sum().item(), rel=1e-5)


def test_an_adapter_teaches_as_what_it_was_trained_on(tmp_path):
    base = save(tiny.model(), tmp_path / "base")
    adapted = tiny.trained_adapter()
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(tmp_path / "adapter")
    given = {"train_dataset": tiny.PROMPTS, "processing_class": tiny.tokenizer()}
    args = tiny.settings(tmp_path / "run", algorithm="distill", teacher=str(tmp_path / "adapter"))
    run = SafeTrainer(tiny.model(), None, args, **given)
    (micro, *_) = collected(run)
    with torch.no_grad():
        expected = logp(tiny.trained_adapter(), micro.batch, 1.0)
        hidden, head = micro.teacher["teacher_hidden"], micro.teacher["teacher_weight"]
    torch.testing.assert_close((hidden @ head.T).log_softmax(-1), expected, **tiny.FORWARDS)


def test_another_tokenizer_is_refused_by_name(tmp_path):
    other = tiny.tokenizer()
    other.add_tokens(["horse"])
    folder = save(wide(vocab_size=len(tiny.WORDS) + 1), tmp_path / "other", other)
    args = tiny.settings(tmp_path / "run", algorithm="distill", teacher=folder)
    with pytest.raises(ConfigError, match=r"other' has another tokenizer .*: 1 tokens have other ids, such as 'horse'"):
        SafeTrainer(tiny.model(), None, args, tiny.PROMPTS, processing_class=tiny.tokenizer()).train()
    assert not list((tmp_path / "run").glob("*"))
    adapter = tiny.trained_adapter()  # peft writes no tokenizer beside it: that of its base counts
    adapter.peft_config["default"].base_model_name_or_path = folder
    adapter.save_pretrained(tmp_path / "adapter")
    args = tiny.settings(tmp_path / "run", algorithm="distill", teacher=str(tmp_path / "adapter"))
    with pytest.raises(ConfigError, match=r"adapter' has another tokenizer .*: 1 tokens have other ids"):
        SafeTrainer(tiny.model(), None, args, tiny.PROMPTS, processing_class=tiny.tokenizer()).train()


def test_a_teacher_with_fewer_rows_than_the_policy_is_refused(tmp_path):
    policy = tiny.model()
    policy.resize_token_embeddings(len(tiny.WORDS) + 3)
    size = len(tiny.WORDS)
    with pytest.raises(ConfigError, match=rf"head has {size + 3} rows and the teacher's {size}: .*sample an id"):
        trainer(tmp_path, model=wide(), policy=policy).train()


def test_an_evaluation_and_an_export_ask_no_teacher(served, tmp_path):
    base = save(tiny.model(), tmp_path / "base")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.PROMPTS))
    prompts, run = str(tmp_path / "prompts.jsonl"), tmp_path / "run"
    settings = {"model": base, "dataset": prompts, "eval_dataset": prompts, "eval_completions": 4, "total_steps": 2}
    SafeTrainer(args=tiny.settings(run, algorithm="distill", teacher=served.url, **settings)).train()
    served.shutdown()
    served.server_close()
    assert main(["eval", str(run), "--kl", "0.001"]) == 0
    assert main(["export", str(run), str(tmp_path / "moved"), "--kl", "0.001"]) == 0


def test_a_check_counts_and_names_the_teacher(tmp_path):
    run = trainer(tmp_path, wide())
    without, policy = memory(tiny.trainer(tmp_path / "grpo", algorithm="grpo")), memory(run)
    teacher = sum(p.nbytes for p in run.teacher.parameters())
    assert policy.weights - teacher == without.weights
    assert f"teacher: {run.args.teacher}; divergence reverse_kl" in check(run)


class Served(BaseHTTPRequestHandler):
    """Scores prompts as vLLM's server does: the best ids of each token, and the one that stands there."""

    def do_GET(self):
        self.say({"data": [{"id": name} for name in self.server.names]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert (self.path, asked["model"], asked["max_tokens"]) == ("/v1/completions", "wide", 1)
        if self.server.busy:
            self.server.busy -= 1
            self.send_error(503)
            return
        choices = [
            {"index": i, "prompt_logprobs": self.scores(ids, asked["prompt_logprobs"])}
            for i, ids in enumerate(asked["prompt"])
        ]
        self.say({"choices": choices[:: self.server.order]})

    def scores(self, ids, count):
        with torch.no_grad():
            rows = self.server.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found = [None]
        for row, token in zip(rows, ids[1:], strict=False):
            kept = dict.fromkeys([*row.topk(count).indices.tolist(), token])
            texts = [self.server.tokenizer.decode([i]) for i in kept]
            found.append(
                {str(i): {"logprob": row[i].item(), "decoded_token": text} for i, text in zip(kept, texts, strict=True)}
            )
        return found

    def say(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def served():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Served)
    server.names, server.busy, server.order = ["wide"], 0, -1
    server.model, server.tokenizer = wide(), tiny.tokenizer()
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def pupil(tmp_path, url, name="run", **settings):
    args = tiny.settings(tmp_path / name, algorithm="distill", teacher=url, **settings)
    return SafeTrainer(tiny.model(), None, args, tiny.PROMPTS, processing_class=tiny.tokenizer())


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "tv"])
def test_a_served_teacher_gives_a_lower_bound_that_all_ids_reach(name, served, tmp_path):
    losses_of = {}
    for count in (2, 6, len(tiny.WORDS)):
        settings = {"teacher_top_k": count, "divergence": name, "jsd_beta": 0.3, "beta": 0.1, "entropy_coef": 0.05}
        run = pupil(tmp_path, served.url, str(count), lora_r=0, max_tokens_per_microbatch=10_000, **settings)
        (micro, *_) = collected(run)
        control = run.controller.update(0.0, 1.0, 0.0, 1.0)
        weights = torch.full_like(micro.logprob_L, 1 / len(micro.logprob_L))
        hidden = run.engine.forward(micro.batch)
        losses_of[count] = losses.policy_loss(hidden, run.policy.head(), micro, weights, control, run.args)
    with torch.no_grad():
        p, q = (logp(model.double(), micro.batch, 1.0) for model in (tiny.model(), wide()))
    entropy = -(p.exp() * p).sum(-1)
    exact = (weights * (divergence(name, p, q, 0.3) - 0.05 * entropy)).sum().item()
    few, more, every = (found.loss.item() for found in losses_of.values())
    assert few < more < every == pytest.approx(exact, rel=1e-4)
    found = losses_of[len(tiny.WORDS)]
    torch.testing.assert_close(found.logprob, micro.logprob_L, **tiny.FORWARDS)
    torch.testing.assert_close(found.entropy.double(), entropy, atol=1e-5, rtol=0)
    assert found.loss.requires_grad


def test_a_run_learns_from_a_server_that_is_busy_at_times(served, tmp_path, monkeypatch):
    monkeypatch.setattr("safe_train.rewards.server.time.sleep", lambda _: None)
    served.busy = 2
    settings = {"teacher_top_k": 8, "total_steps": 25, "lora_r": 0, "learning_rate": 5e-3, "completions_per_prompt": 4}
    rows = pupil(tmp_path, served.url, **settings).train()
    assert rows[-1]["policy_loss"] < 0.6 * rows[0]["policy_loss"] and served.busy == 0


def test_a_server_of_another_kind_is_refused(served, tmp_path, monkeypatch):
    served.names = ["wide", "other"]
    with pytest.raises(ConfigError, match="has the models wide, other, and teacher names none: name one behind a #"):
        pupil(tmp_path, served.url).train()
    assert pupil(tmp_path, f"{served.url}#wide").teacher.model == "wide"
    served.tokenizer = tiny.tokenizer()
    served.tokenizer.decode = lambda ids: f"word {ids[0]}"
    with pytest.raises(ConfigError, match="has another tokenizer than the policy: id"):
        collected(pupil(tmp_path, f"{served.url}#wide", "tokenizer"))
    with pytest.raises(ConfigError, match="temperature must be 1 with a served teacher"):
        pupil(tmp_path, served.url, temperature=0.7)
    served.tokenizer = tiny.tokenizer()
    run, scores = pupil(tmp_path, f"{served.url}#wide", "partly"), Served.scores
    assert run.teacher is not None
    monkeypatch.setattr(Served, "scores", lambda *a: [None if i < 3 else x for i, x in enumerate(scores(*a))])
    with pytest.raises(ValueError, match="answered null for a token of a response; only the first of a prompt"):
        collected(run)
    monkeypatch.setattr(Served, "scores", lambda *_: None)
    with pytest.raises(ValueError, match="it must score prompts, as vLLM's server does"):
        pupil(tmp_path, f"{served.url}#wide", "silent").train()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"algorithm": "ppo"}, "teacher must be null for ppo"),
        ({"divergence": "kl"}, "divergence must be one of reverse_kl, forward_kl, jsd, tv"),
        ({"jsd_beta": 1.5}, "jsd_beta must be in"),
        ({"critic": "single"}, "critic must be none for distill"),
        ({"top_p": 0.9}, "top_p must be 1 for distill"),
        ({"kl_gradient": "return"}, "kl_gradient must be token for distill"),
        ({"kl_estimator": "k3"}, "kl_estimator must be exact for distill"),
        ({"missing_eos_penalty": 1.0}, "missing_eos_penalty must be left alone for distill"),
        ({"clip_low": 0.1}, "clip_low must be left alone for distill"),
        ({"importance_cap": 2.0}, "importance_cap must be left alone for distill"),
        ({"shuffle_advantages": True}, "shuffle_advantages must be left alone for distill"),
    ],
)
def test_what_it_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        SafeConfig(**{"algorithm": "distill", "teacher": "org/model"} | changes)


def test_what_is_missing_is_named(tmp_path):
    assert SafeConfig(algorithm="distill").missing() == ["model", "dataset", "teacher"]
    given = {"train_dataset": tiny.PROMPTS, "processing_class": tiny.tokenizer()}
    with pytest.raises(ConfigError, match="a run needs teacher"):
        SafeTrainer(tiny.model(), None, tiny.settings(tmp_path, algorithm="distill"), **given)
    with pytest.raises(ConfigError, match="cannot load the model .*nothing"):
        args = tiny.settings(tmp_path, algorithm="distill", teacher=str(tmp_path / "nothing"))
        SafeTrainer(tiny.model(), None, args, **given).train()


def test_the_records_of_a_run_have_no_reward(tmp_path):
    trainer(tmp_path, total_steps=1).train()
    (row,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert row["reward"] is None and row["policy_loss"] > 0
