"""The benchmark's own promises: no speed on a red gate, whole rows, right counts. No time is judged here."""

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys

import pytest
import torch

from bench import compare, head_precision, providers, report, run, tune
from bench.measurement import cost, machine, rows, timing, workloads
from bench.providers import integrations, provider, pytorch
from bench.suites import gate, host, kernels, launch_choices, trainer
from safe_train.models.attention import use_attention

TOY = workloads.Workload("hidden", "toy", 24, 32, 203)
FIELDS = {f.name for part in (rows.Run, rows.Row, workloads.Workload) for f in dataclasses.fields(part)} | {"suite"}


def settings(timed=True):
    return kernels.Settings("cpu", 0.0, {"float32": cost.Roofs(1e11, 1e10)} if timed else {})


def one_provider(function, outputs=("logprob", "entropy"), **options):
    return provider.Provider("one", "hidden", outputs, function, **options)


def judged(one, workload=TOY, timed=True):
    case = workloads.make_case(workload, "cpu")
    return kernels.rows_of([one], gate.Gate(workload, case), settings(timed))


@pytest.fixture
def few(monkeypatch):
    """Toy workloads, and the providers that need neither a compiler nor seconds to import."""
    offered = [p for p in providers.PROVIDERS if p.package is None and not p.slow]
    monkeypatch.setattr(providers, "PROVIDERS", offered)
    cases = [dataclasses.replace(TOY, kl=True), dataclasses.replace(TOY, entrance="logits", masked=0.3)]
    kept = run.SUITES["kernels"]._replace(workloads=lambda device, quick: [*cases, workloads.gae(3, 20)])
    monkeypatch.setattr(run, "SUITES", {"kernels": kept})
    monkeypatch.setattr(run, "QUICK_SECONDS", 1e-6)
    monkeypatch.setattr(timing, "roofs", lambda dtype, device: cost.Roofs(1e11, 1e10))


def test_a_quick_run_writes_rows_a_table_and_a_picture(few, tmp_path, capsys):
    assert run.main(["--device", "cpu", "--quick", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.jsonl")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(set(row) == FIELDS for row in found)
    timed = [row for row in found if row["status"] == "ok"]
    ours = {f"safe-kernels torch{how}" for how in ("", ", in place", ", keeping 128 MiB")}
    assert {row["provider"] for row in timed} == {"pytorch", *ours}
    for row in timed:
        assert row["seconds_low"] <= row["seconds"] <= row["seconds_high"] and row["repeats"] >= 3
        assert row["gate"] == "green" and row["errors"] and row["peak_bytes"] > 0 and row["roof_share"] > 0
        assert len(row["commit"]) == 10 and row["machine"]["torch"] == torch.__version__
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert "cannot run: Triton kernels, which need a GPU" in capsys.readouterr().out


def test_the_gate_alone_judges_both_backends_and_times_nothing(few, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "gate_workloads", lambda dtypes: [dataclasses.replace(TOY, N=4), workloads.gae(2, 20)])
    monkeypatch.setattr(run, "interpret_trl", lambda: None)  # which would stay
    assert run.main(["--device", "cpu", "--gate-only", "--results", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["suite"] for row in found} == {"gate"} and not any(row["seconds"] for row in found)
    green = {row["provider"] for row in found if row["gate"] == "green"}
    assert {"pytorch", "safe-kernels torch", "safe-kernels triton"} <= green


def test_a_kernel_of_this_project_that_fails_fails_the_run(few, monkeypatch, tmp_path, capsys):
    def fails(case):
        raise RuntimeError("did not compile")

    for name, code in (("other", 0), ("safe-kernels broken", 1)):
        broken = dataclasses.replace(one_provider(fails, ("logprob", "entropy", "kl")), name=name)
        monkeypatch.setattr(providers, "PROVIDERS", [*providers.PROVIDERS[:1], broken])
        options = ["--quick", "--only", "hidden", "--results", str(tmp_path)]
        assert run.main(["--device", "cpu", *options]) == code
    assert "failed: RuntimeError: did not compile" in capsys.readouterr().out


def test_a_wrong_provider_is_red_and_shows_no_speed(capsys):
    def wrong(case):
        found = pytorch.plain("hidden")(case)
        return {**found, "entropy": found["entropy"] * (1 + 1e-4)}

    (row,) = judged(one_provider(wrong))
    assert (row.status, row.gate, row.seconds) == ("red", "red", None)
    assert "entropy: error" in row.reason and "ms" not in report.table(TOY, [row])


@pytest.mark.parametrize("row", [0, -1])
def test_the_gate_sees_one_wrong_gradient(row):
    def wrong(case):
        scale = torch.ones_like(case["hidden"])
        scale[row] = 1.01
        hidden = case["hidden"].detach() + (case["hidden"] - case["hidden"].detach()) * scale
        return pytorch.plain("hidden")({**case, "hidden": hidden})

    (found,) = judged(one_provider(wrong))
    assert found.gate == "red" and "d hidden" in found.reason


def test_the_gate_sees_what_is_wrong_with_all_rows_alone():
    def wrong(case):
        found = pytorch.plain("hidden")(case)
        return found if len(case["tokens"]) < 40 else {**found, "logprob": found["logprob"] + 0.1}

    (found,) = judged(one_provider(wrong), dataclasses.replace(TOY, N=50))
    assert found.gate == "red" and "logprob, all rows" in found.reason


def test_logits_rounded_to_the_inputs_are_named():
    low = dataclasses.replace(TOY, dtype="bfloat16", H=256)
    assert judged(one_provider(pytorch.rounded_logits), low, timed=False)[0].gate == "rounds"
    assert judged(one_provider(pytorch.plain("hidden")), low, timed=False)[0].gate == "green"


def test_what_a_provider_lacks_is_named_and_the_rest_is_judged():
    def logprob(case):
        return {"logprob": pytorch.plain("hidden")(case)["logprob"]}

    found = judged(one_provider(logprob, ("logprob",)))
    assert {row.lacks for row in found} == {("entropy",)} and all(row.seconds for row in found)
    assert "lacks entropy" in report.table(TOY, found)
    assert judged(one_provider(logprob, ("logprob",)), dataclasses.replace(TOY, kl=True))[0].status == "lacks"


def test_a_missing_peer_and_a_failing_one_are_rows():
    def fails(case):
        raise NotImplementedError("no such shape\nsecond line")

    (missing,) = judged(one_provider(fails, package="no-such-distribution"))
    assert (missing.status, missing.seconds) == ("not installed", None) and "no-such-distribution" in missing.reason
    (failing,) = judged(one_provider(fails))
    assert (failing.status, failing.reason) == ("cannot run", "NotImplementedError: no such shape")


@pytest.mark.parametrize(
    ("entrance", "own"),
    [
        *((name, {"kl": True, "masked": 0.3}) for name in ("logits", "hidden", "loss")),
        *((name, {"divergence": "jsd"}) for name in ("distill", "best")),
        ("kept", {"kl": True}),
    ],
)
def test_every_kernel_of_this_project_is_green(entrance, own):
    """As `--gate-only` does, in the interpreter where there is no GPU."""
    own = own | ({"ids": 7} if entrance in ("kept", "best") else {})
    workload = dataclasses.replace(TOY, entrance=entrance, N=6, **own)
    case = workloads.make_case(workload, "cpu")
    gated = kernels.Settings("cpu", 0, {}, interpreter=True)
    known = gate.Gate(workload, case)
    mine = [p for p in providers.providers(workload) if p.name.startswith("safe-kernels")]
    found = kernels.rows_of(mine, known, gated)
    assert {row.gate for row in found} == {"green"}, [row.reason for row in found]


def test_counted_work():
    """By hand, for N = 10 tokens of which half are masked, H = 4, V = 100, in bfloat16."""
    hidden = workloads.Workload("hidden", "toy", 10, 4, 100, dtype="bfloat16", masked=0.5)
    with_kl = dataclasses.replace(hidden, kl=True)
    u = 2 * 5 * 4 * 100
    assert cost.cost(hidden, workloads.FORWARD) == cost.Cost(u, 2 * (5 * 4 + 100 * 4))
    assert cost.cost(hidden, workloads.FROZEN).flops == 3 * u
    assert cost.cost(hidden, workloads.TRAINED).flops == 4 * u
    assert cost.cost(with_kl, workloads.FROZEN).flops == 5 * u
    kept = dataclasses.replace(hidden, entrance="kept", ids=7)  # 35 rows of the head at most
    assert cost.cost(kept, workloads.FROZEN) == cost.Cost(3 * 2 * 5 * 4 * 7, 3 * 2 * 4 * (5 + 35))
    assert cost.cost(dataclasses.replace(hidden, entrance="best", ids=7), workloads.FROZEN).flops == 3 * u
    loss = dataclasses.replace(hidden, entrance="loss")
    assert cost.cost(loss, workloads.FROZEN).flops == 2 * u
    assert cost.cost(dataclasses.replace(loss, kl=True), workloads.FROZEN).flops == 3 * u
    logits = dataclasses.replace(hidden, entrance="logits")
    assert cost.cost(logits, workloads.FORWARD) == cost.Cost(0, 2 * 5 * 100)
    assert cost.cost(logits, workloads.BACKWARD) == cost.Cost(0, 2 * (2 * 5 * 100 + 10 * 100))


def test_the_model_gives_the_floors_of_the_design():
    """Milliseconds at N = 8192, H = 2048, V = 151,936, bf16, 3.0 TB/s, 798 TFLOP/s."""
    roofs = cost.Roofs(798e12, 3.0e12)
    expected = {("hidden", False): (8.05, 23.3), ("hidden", True): (16.1, 39.4)}
    for (entrance, kl), (forward, frozen) in expected.items():
        workload = workloads.of(entrance, "Qwen2.5-3B", 8192, kl=kl, dtype="bfloat16")
        assert 1e3 * cost.plan_seconds(workload, workloads.FORWARD, roofs) == pytest.approx(forward, rel=0.01)
        assert 1e3 * cost.plan_seconds(workload, workloads.FROZEN, roofs) == pytest.approx(frozen, rel=0.01)
    loss = workloads.of("loss", "Qwen2.5-3B", 8192, kl=True, dtype="bfloat16")
    assert 1e3 * cost.plan_seconds(loss, workloads.FROZEN, roofs) == pytest.approx(26.6, rel=0.01)
    eight = [cost.sharded_seconds(loss, workloads.FROZEN, roofs, 8, 1e15, by) for by in ("tokens", "vocabulary")]
    assert eight == pytest.approx([26.6e-3 / 8, 39.4e-3 / 8], rel=0.01)  # without the closed form


@pytest.mark.parametrize("kl", [False, True])
def test_the_model_of_plain_memory_is_what_plain_allocates(kl):
    workload = dataclasses.replace(TOY, N=64, H=8, V=5003, kl=kl)
    for row in judged(one_provider(pytorch.plain("hidden"), workloads.WITH_KL), workload)[:2]:
        found = row.peak_bytes - row.gradient_bytes
        assert found == pytest.approx(cost.plain_bytes(workload, row.part), rel=0.05), row.part


def test_peak_memory_is_counted_inside_operators():
    x = torch.randn(1000, 100)
    assert timing.peak_bytes(lambda: (x + 1) * 2, "cpu") == pytest.approx(2 * x.nbytes, rel=0.01)
    assert timing.peak_bytes(lambda: torch.linalg.svdvals(x), "cpu") > x.nbytes


def test_compare_runs_the_revision_in_its_own_worktree(few):
    with compare.Revision("HEAD", settings()) as other:
        tree = other.tree
        found = other.measured(TOY)
    assert not tree.exists()
    listed = subprocess.run(["git", "worktree", "list"], cwd=machine.ROOT, capture_output=True, text=True, check=True)
    assert str(tree) not in listed.stdout
    timed = [row for row in found if row.seconds is not None]
    ours = {"safe-kernels torch @HEAD", "safe-kernels torch, keeping 128 MiB @HEAD"}
    assert {row.provider for row in timed} == {"pytorch @HEAD", *ours}
    here = [dataclasses.replace(row, provider=row.provider[:-6], seconds=2 * row.seconds) for row in timed]
    assert report.ratios(here + found).count("2.000 of its time at HEAD") == 3 * len(TOY.passes)


def test_compare_refuses_an_unknown_revision(capsys):
    with pytest.raises(SystemExit, match="no-such-revision"), compare.Revision("no-such-revision", settings()):
        pass


def test_tuning_ranks_what_ran_and_keeps_what_failed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(timing, "roofs", lambda dtype, device: cost.Roofs(1e11, 1e10))
    monkeypatch.setattr(tune, "SECONDS", 0.0)
    launch = launch_choices.launch
    good, bad = launch.RowChoice(2, 128, 4), launch.RowChoice(1, 100, 4)  # a block that is no power of two
    shipped = launch.ROWS
    toy = workloads.Workload("logits", "toy", 2, 8, 1100)
    knob = launch_choices.Knob("ROWS", None, (good, bad), (toy,))
    assert tune.tune([knob], "cpu", 1, "abc", tmp_path) == 0
    (path,) = tmp_path.glob("*.jsonl")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    by_choice = {str(c): [r for r in found if r["choice"] == f"ROWS = {c}"] for c in (shipped, good, bad)}
    assert [len(x) for x in by_choice.values()] == [2, 2, 1]
    assert by_choice[str(bad)][0]["status"] == "failed" and "power" in by_choice[str(bad)][0]["reason"]
    assert all(set(row) == FIELDS and row["suite"] == "tune" for row in found)
    assert "ROWS = RowChoice(" in capsys.readouterr().out.splitlines()[-1]
    assert launch.ROWS == shipped


def test_every_launch_choice_that_is_searched_exists():
    for knob in launch_choices.knobs(torch.device("cpu")):
        with knob.set(knob.choices[0]):
            assert knob.current() == knob.choices[0]


STEP = workloads.Workload("step", "two layers", 2 * 16, 64, 301, T=16, kl=True)


def test_both_layouts_take_the_same_step():
    """Loss and gradients of a whole update, behind the same rule; and memory without the logits."""
    found = {(row.provider, row.part): row for row in trainer.measured(STEP, settings())}
    assert {part for _, part in found} == set(workloads.PASSES["step"])
    ours, published = (found[name, "update"] for name in ("safe-kernels", "published layout"))
    assert ours.errors.keys() == {*trainer.STATISTICS, "loss", "worst gradient"}
    judged = [row for row in found.values() if row.provider.startswith("safe-kernels") and row.part != "rollout"]
    assert len(judged) == 7 and all(row.gate == "green" for row in judged)
    assert all(error["error"] <= error["allowed"] for row in judged for error in row.errors.values())
    assert published.peak_bytes > ours.peak_bytes > 0


def test_the_judge_of_a_policy_with_packed_attention_is_padded():
    """As on GPUs, where the attention of packed sequences has no use for padded ones."""
    policy, base = trainer.build(STEP, trainer.SafeConfig(lora_r=4), "cpu")
    inputs = trainer.make_inputs(STEP, "cpu")
    use_attention(policy.causal_lm, "varlen")
    published = trainer.Published(policy, inputs, trainer.SafeConfig(), "cpu", base)
    assert trainer.gate(published, policy, base, inputs, "cpu").gate == "green"
    assert policy.causal_lm.config._attn_implementation == "varlen"


def test_a_wrong_update_is_red(monkeypatch):
    right = trainer.OursAsPPO.loss
    monkeypatch.setattr(trainer.OursAsPPO, "loss", lambda self, hidden: right(self, hidden) * 1.0001)
    rows = trainer.measured(STEP, settings())
    by_name = {name: [row for row in rows if row.provider == name] for name in ("safe-kernels", "safe-kernels, ppo")}
    assert [(row.status, row.seconds) for row in by_name["safe-kernels, ppo"]] == [("red", None)]
    assert all(row.status == "ok" for row in by_name["safe-kernels"])


def test_wrong_statistics_are_red(monkeypatch):
    right = trainer.Ours.score
    monkeypatch.setattr(trainer.Ours, "score", lambda self: tuple(x * 1.0001 for x in right(self)))
    rows = trainer.measured(STEP, settings())
    assert not any(row.provider.startswith("safe-kernels") and row.seconds and row.part != "rollout" for row in rows)


@pytest.mark.parametrize("entrance", ["hidden", "logits"])
def test_functions_of_other_trainers_are_judged_before_and_after_the_patch(entrance):
    pytest.importorskip("trl", reason="TRL is not installed")
    offered = [
        p for p in integrations.offered(dataclasses.replace(TOY, entrance=entrance)) if p.package in (None, "trl")
    ]
    found = kernels.measured(dataclasses.replace(TOY, entrance=entrance), settings(), offer=lambda workload: offered)
    assert all(row.gate == "green" and row.seconds and row.peak_bytes for row in found)
    ours = {
        row.provider.removeprefix("safe-kernels in ") for row in found if row.provider.startswith("safe-kernels in ")
    }
    theirs = {row.provider for row in found if row.provider.startswith("trl ")}
    assert ours == theirs and len(ours) == (1 if entrance == "hidden" else 3)
    assert {row.version for row in found} == {torch.__version__, importlib.metadata.version("trl")}


def test_a_trainer_that_is_not_installed_is_a_row():
    function = integrations.TABLE[0]._replace(package="no-such-trainer")
    found = kernels.measured(
        TOY, settings(), offer=lambda workload: [function.provider(True), function.provider(False)]
    )
    assert [row.status for row in found] == ["not installed"] * 2


COMPILED = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def test_the_host_is_timed_in_empty_launches(tmp_path):
    command = [sys.executable, "bench/run.py", "--suite", "host", "--quick", "--only", "logits with KL|gae"]
    done = subprocess.run([*command, "--results", str(tmp_path)], cwd=machine.ROOT, env=COMPILED, capture_output=True)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    (path,) = tmp_path.iterdir()  # and no picture
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(set(row) == FIELDS and row["status"] == "ok" and row["gate"] is None for row in found)
    empty = {row["entrance"]: row["seconds"] for row in found if row["provider"] == "empty launch"}
    ours = {(row["entrance"], row["part"]): row for row in found if row["provider"] == "safe-kernels triton"}
    assert len(ours) == 6 and all(row["units"] == row["seconds"] / empty[row["entrance"]] for row in ours.values())
    parts = (host.BACKEND[workloads.FORWARD], workloads.FORWARD, workloads.BACKWARD)
    backend, forward, both = (ours["logits", part]["units"] for part in parts)
    assert 1 < backend < forward < both and report.newest(found) == []


def test_without_a_device_kernels_are_launched_and_do_nothing():
    script = """
import torch, safe_kernels
from bench.suites.no_device import empty_launch, no_device
logits, tokens = torch.zeros(2, 8, requires_grad=True), torch.tensor([0, 1])
with no_device() as driver:
    empty_launch()
    assert driver.launches == 1
    found = safe_kernels.token_stats(logits, tokens, backend="triton")
    assert driver.launches == 2
    found.logprob.sum().backward()
    assert driver.launches == 3
try:
    safe_kernels.token_stats(logits, tokens, backend="triton")
except ValueError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=machine.ROOT, env=COMPILED, capture_output=True, text=True
    )
    assert "needs tensors on a GPU" in done.stdout, done.stderr


def test_in_the_interpreter_no_host_time_is_taken():
    (row,) = host.measured(host.host_workloads("cpu", True)[0], settings())
    assert row.status == "failed" and "TRITON_INTERPRET" in row.reason and row.seconds is None


@pytest.mark.parametrize(("precision", "bits"), [("medium", 7), ("high", 10), ("highest", 23)])
def test_factors_are_rounded_as_a_gpu_rounds_them(precision, bits):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    found = head_precision.rounded(x, head_precision.MANTISSA[precision])
    assert head_precision.MANTISSA[precision] == bits and ((found - x).abs() <= x.abs() * 2.0 ** -(bits + 1)).all()
    scaled = found / 2.0 ** found.abs().log2().floor() * 2**bits
    assert torch.equal(scaled, scaled.round())
    if precision == "medium":
        assert torch.equal(found, x.bfloat16().float())
