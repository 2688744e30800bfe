"""The page of `safe-train watch` in a real Chromium.

    apt-get install --no-install-recommends chromium && pip install playwright

It waits by locators: the page's content security policy refuses functions from outside.
"""

import os
import re
import shutil

import pytest
import tiny
from watching import metrics, served, write_run

MUST_RUN = "SAFE_TRAIN_TEST_CHROMIUM"  # in the environment: a missing browser is then a failure
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 120_000  # that an expectation waits at most, in milliseconds: CI may be slow
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>%{x}"


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    try:
        from playwright.sync_api import expect, sync_playwright
    except ImportError:
        found = None
    if found is None:
        (pytest.fail if os.environ.get(MUST_RUN) else pytest.skip)("needs Chromium and playwright")
    expect.set_options(timeout=SECONDS)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def open_page(browser):
    """Opens what a port serves, and fails at the end if the page's own script failed or a dialog came up."""
    page, wrong = browser.new_page(viewport={"width": 1200, "height": 1000}), []
    page.set_default_timeout(SECONDS)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))

    def start(port):
        page.goto(f"http://127.0.0.1:{port}", wait_until="commit")
        return page

    yield start
    page.close()
    assert wrong == []


def expect(found):
    from playwright.sync_api import expect

    return expect(found)


def curves(page, key):
    return page.locator(f'.panel[data-key="{key}"] .scatterlayer .js-line')


def test_a_run_opens_with_its_panels_and_its_warnings(open_page, tmp_path):
    rows = [metrics(step, kl=0.01 * step, kl_threshold=0.3, mine=0.25) for step in range(1, 31)]
    safe = write_run(tmp_path / "safe", rows, kl_budget=0.3)
    grpo = write_run(tmp_path / "grpo", rows, algorithm="grpo", controller="fixed", critic="none", kl_budget=0.26)
    with served(safe, grpo) as port:
        page = open_page(port)
        table = page.get_by_role("table", name="runs")
        expect(table.get_by_role("row").nth(1)).to_contain_text("safe")
        expect(table.get_by_role("row").nth(2)).to_contain_text("30 of 30")
        said = page.get_by_role("list", name="warnings").get_by_role("listitem")
        expect(said).to_have_count(1)
        expect(said).to_have_text(re.compile(r"^grpo: The KL stands at its budget: 0.255 of 0.26 nats a token"))
        expect(curves(page, "kl")).to_have_count(6)  # KL, threshold, budget of each
        page.get_by_label("draw grpo").uncheck()
        expect(curves(page, "kl")).to_have_count(3)
        expect(page.locator('.panel[data-key="kl"] output')).to_have_text("0.3")
        page.locator("#smooth").select_option("5")
        expect(curves(page, "kl")).to_have_count(4)  # and the raw behind
        page.get_by_text("every other number").click()
        expect(page.locator('.panel[data-key="metric:mine"] output')).to_have_text("0.25")
        page.get_by_text("settings", exact=True).click()
        expect(page.locator("#settings tr").filter(has_text="kl_budget")).to_contain_text("0.3")


def test_a_curve_moves_while_a_run_trains(open_page, tmp_path):
    trainer, seen = tiny.trainer(tmp_path / "run", total_steps=4, algorithm="grpo"), []

    def look(trainer, values):
        table = page.get_by_role("table", name="runs")
        if trainer.step == 1:
            page.reload()
        expect(table).to_contain_text(f"{trainer.step} of 4")
        expect(table).to_contain_text("finished" if trainer.step == 4 else "running")
        if trainer.step >= 2:
            path = curves(page, "reward").last
            if seen:
                expect(path).not_to_have_attribute("d", seen[-1])
            seen.append(path.get_attribute("d"))

    trainer.callbacks = [look]
    with served(tmp_path / "run") as port:
        page = open_page(port)
        trainer.train()
        expect(page.locator("#count")).to_have_text("32 completions")
        expect(page.locator("#rows .sample").first.locator(".token").first).to_be_visible()
    assert len(set(seen)) == 3


def test_samples_are_filtered_and_their_tokens_colored(open_page, tmp_path):
    samples = [
        {"step": step, "prompt": f"prompt {i % 2}", "completion": f"answer {step} {i}", "reward": float(i)}
        for step in (10, 20)
        for i in range(15)
    ]
    tokens = {"tokens": ["an", "swer"], "logprob": [-3.0, -0.1], "entropy": [1.0, 2.0], "kl": [0.0, 0.5]}
    folder = write_run(tmp_path / "run", [metrics(1)], samples, [{"step": 20, "row": 3, **tokens}])
    with served(folder) as port:
        page = open_page(port)
        count, texts = page.locator("#count"), page.locator("#rows .completion")
        expect(count).to_have_text("30 completions")
        expect(texts.first).to_have_text("answer 20 14")
        page.get_by_role("button", name="after").click()
        expect(texts).to_have_count(10)
        page.get_by_label("order").select_option("highest")
        expect(texts.first).to_have_text("answer 10 14")
        page.get_by_label("reward from").fill("13")
        expect(count).to_have_text("4 completions")
        page.get_by_label("step from").fill("11")
        expect(texts).to_have_text(["answer 20 14", "answer 20 13"])
        page.get_by_label("prompt has").fill("PROMPT 1")
        expect(texts).to_have_text(["answer 20 13"])
        for name in ("reward from", "step from", "prompt has"):
            page.get_by_label(name).fill("")
        page.get_by_label("with tokens").check()
        expect(count).to_have_text("1 completion")
        cheap, dear = page.locator("#rows .token").nth(0), page.locator("#rows .token").nth(1)
        expect(dear).to_have_attribute("title", "log-prob -0.1, entropy 2, KL 0.5")
        expect(cheap).to_have_css("background-color", "rgba(209, 98, 43, 0)")
        expect(dear).to_have_css("background-color", "rgba(209, 98, 43, 0.75)")
        page.get_by_label("color by").select_option("logprob")
        expect(dear).to_have_css("background-color", re.compile(r"rgba\(209, 98, 43, 0\.02"))


def test_a_hostile_completion_is_text(open_page, tmp_path):
    sample = {"step": 10, "prompt": HOSTILE, "completion": HOSTILE, "reward": 1.0, HOSTILE: HOSTILE}
    other = {**sample, "prompt": [{"role": HOSTILE, "content": HOSTILE}], "reward": 2.0}
    tokens = {"step": 10, "row": 0, "tokens": [HOSTILE], "logprob": [-1.0], "entropy": [1.0], "kl": [1.0]}
    names = {f"rewards/{HOSTILE}/mean": 1.0, "rewards/b/mean": 0.0, f"other {HOSTILE}": 1.0}
    rows = [metrics(step, phase=HOSTILE, **names) for step in range(1, 4)]
    folder = write_run(tmp_path / "run <b>name", rows, [sample, other], [tokens], algorithm=HOSTILE, model=HOSTILE)
    with served(folder) as port:
        page = open_page(port)
        expect(page.locator("#rows .completion").nth(0)).to_have_text(HOSTILE)
        expect(page.locator("#rows .completion .token")).to_have_text([HOSTILE])
        expect(page.locator("#rows .prompt").nth(0)).to_have_text(f"{HOSTILE}: {HOSTILE}")
        expect(page.locator('.panel[data-key="rewards"] .legend')).to_contain_text(HOSTILE)
        expect(page.get_by_role("table", name="runs")).to_contain_text("run <b>name")
        page.locator('.panel[data-key="rewards"] .plot').hover()
        expect(page.locator('.panel[data-key="rewards"] .hoverlayer')).to_contain_text("<script>")
        page.get_by_text("every other number").click()
        other = page.locator("#others .panel").filter(has_text=f"other {HOSTILE}")
        expect(other.locator(".js-line")).to_have_count(1)
        expect(page.locator("img, b, #rows script, .plot script")).to_have_count(0)
