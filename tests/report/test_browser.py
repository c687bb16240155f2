"""The pages in Chromium: they draw without an error, and their controls change what is drawn."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.report.browser import Browser, Page, start_browser
from tests.report.made import made_loss, make_run, step_line, write, write_lines
from turbolm.ablate.render import _RUN_COLUMNS
from turbolm.ablate.render import render_html as render_ablation
from turbolm.report.compare import compare_runs
from turbolm.report.compare_page import render_html as render_comparison
from turbolm.report.html import write_report
from turbolm.report.live import ReportServer

EVIL = '<img src=x onerror="window.hurt=1"></script><script>window.hurt=1</script>\'&'
LOSS = "document.querySelector('.chart').plot"  # the first chart of every page
SHOWN = f"{LOSS}.series.map(one => one.label)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    started = start_browser(tmp_path_factory.mktemp("chromium"))
    yield started
    started.close()


def drawn(page: Page, name: str) -> dict[float, float]:
    """The points of a series of the first chart."""
    names = page.ask(SHOWN)
    x, y = page.ask(f"[{LOSS}.data[0], [...{LOSS}.data[{names.index(name)}]]]")
    return {at: value for at, value in zip(x, y, strict=True) if value is not None}


def averaged(values: list[float], weight: float) -> list[float]:
    """TensorBoard's smoothing, as a weighted mean of all values so far instead of step by step."""
    found = []
    for end in range(1, len(values) + 1):
        weights = [weight ** (end - 1 - index) for index in range(end)]
        found.append(sum(map(math.prod, zip(weights, values, strict=False))) / sum(weights))
    return found


def test_the_controls_of_a_run_change_what_is_drawn(browser: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    page = browser.open(f"file://{write_report(run)}")
    assert page.ask("['.chart', '.chart canvas'].map(one => document.querySelectorAll(one).length)") == [9, 9]
    losses = [made_loss(step) for step in range(1, 101)]
    assert list(drawn(page, "train, each step").items()) == [
        (1000 * step, pytest.approx(made_loss(step), rel=1e-4)) for step in range(1, 101)
    ]
    assert list(drawn(page, "train, smoothed").values()) == pytest.approx(averaged(losses, 0.6), rel=1e-4)
    assert drawn(page, "not applied") == {50_000: 40}

    page.choose("smoothing", "0.5")
    assert list(drawn(page, "train, smoothed").values()) == pytest.approx(averaged(losses, 0.5), rel=1e-4)
    page.choose("smoothing", "0")
    assert page.ask(SHOWN)[:3] == ["tokens seen", "train", "held out"]

    page.choose("axis", "steps")
    assert list(drawn(page, "train")) == list(range(1, 101))
    page.choose("axis", "time")
    assert page.ask(f"{SHOWN}[0]") == "training time, minutes"
    assert list(drawn(page, "train")) == pytest.approx([2 * step / 60 for step in range(1, 101)])
    assert list(drawn(page, "held out")) == pytest.approx([2 * step / 60 for step in range(20, 101, 20)])

    assert page.ask(f"{LOSS}.scales.y.distr") == 1
    page.choose("scale", "xy")
    assert page.ask(f"[{LOSS}.scales.x.distr, {LOSS}.scales.y.distr]") == [3, 3]
    page.choose("scale", "")
    page.drag(".chart .u-over", 0.25, 0.5)
    ends = "[card.plot.scales.x.min, card.plot.scales.x.max]"
    zoomed = page.ask(f"[...document.querySelectorAll('.chart')].map(card => {ends})")
    assert all(0.7 < low < 1 and 1.5 < high < 1.8 for low, high in zoomed), "all charts zoom together"
    page.choose("smoothing", "0.8")  # drawn anew, and still zoomed
    assert page.ask(f"{LOSS}.scales.x.min") == pytest.approx(zoomed[0][0])
    page.ask("document.querySelector('#controls button').click()")
    assert page.ask(f"{LOSS}.scales.x.max") == pytest.approx(200 / 60)
    assert "axis=time&smoothing=0.8&scale=" in page.ask("location.hash")
    assert page.errors() == []
    page.ask("new Promise(done => { setTimeout(done, 50); setTimeout(() => { throw new Error('thrown') }); })")
    page.ask("void fetch('https://example.org').catch(() => 0)")
    assert "thrown" in page.errors()[0] and "Content Security Policy" in page.errors()[1], "errors are heard"


def test_a_page_that_others_named_runs_none_of_it(browser: Browser, tmp_path: Path) -> None:
    names = [tmp_path / "a", tmp_path / "b"]
    for index, run in enumerate(names):
        make_run(run, lr=1e-3 * (1 + index))
        write_lines(run, [{"step": 100, "attempt": 1, "tokens_seen": 100_000, f"eval/loss/{EVIL}": 3.0}])
        write(run / "attempts/1/environment.json", {"host": EVIL, EVIL: f"{EVIL}{index}"})
        (run / "recipe.yaml").write_text(json.dumps({"name": EVIL, "execution": {EVIL: EVIL + str(index)}}))
    other = tmp_path / "compare.html"
    other.write_text(render_comparison(compare_runs(names)))
    for path in (write_report(names[0]), other):
        page = browser.open(f"file://{path}")
        assert page.ask("[window.hurt, document.images.length, document.scripts.length > 5]") == [None, 0, True]
        assert EVIL in page.ask("document.body.innerText") and page.errors() == []
        legends = page.ask("[...document.querySelectorAll('.u-legend th')].map(one => one.textContent)")
        assert any(EVIL in legend for legend in legends) or path == other


def test_three_runs_and_an_ablation(browser: Browser, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, num_steps=steps) for name, steps in (("one", 100), ("two", 80), ("three", 60))]
    path = tmp_path / "compare.html"
    path.write_text(render_comparison(compare_runs(runs)))
    page = browser.open(f"file://{path}")
    labels = [f"{name}, {kind}" for name in ("one", "two", "three") for kind in ("each step", "smoothed")]
    assert page.ask(SHOWN) == ["tokens seen", *labels]
    page.choose("axis", "steps")
    assert max(drawn(page, "two, smoothed")) == 80
    page.ask("document.querySelectorAll('.u-legend tr')[4].querySelector('th').click()")  # "two, smoothed"
    hides_two = [True] * 3 + [False] * 2 + [True] * 2
    assert page.ask(f"{LOSS}.series.map(one => one.show)") == hides_two, "each step goes with it"
    page.choose("smoothing", "0.5")
    assert page.ask(f"{LOSS}.series.map(one => one.show)") == hides_two, "drawn anew, it stays hidden"
    assert page.errors() == []

    steps = (10, 20, 30)
    evaluations = [{"tokens": 1e3 * step, "steps": step, "sec": 2 * step, "loss": 5 - step / 100} for step in steps]
    page = browser.open(f"file://{_ablation_page(tmp_path, evaluations)}")
    before = page.ask(f"{LOSS}.data[0]")
    page.choose("axis", "steps")
    assert (before, page.ask(f"{LOSS}.data[0]")) == ([1e4, 2e4, 3e4], [10, 20, 30])
    page.choose("axis", "time")
    assert page.ask(f"{LOSS}.data[0]") == [20, 40, 60]
    page.choose("scale", "y")
    assert page.ask(f"{LOSS}.scales.y.distr") == 3
    assert page.errors() == []


def _ablation_page(folder: Path, evaluations: list[dict[str, float]]) -> Path:
    """The page of an ablation of two arms."""
    run = {**dict.fromkeys(_RUN_COLUMNS, 1.0), "path": "runs/one", "evaluations": evaluations}
    run["target_at_first_evaluation"] = False
    arm = {"tricks": [], "lr": 1e-3, "runs": [run], "mean": {}, "spread": {}, "versus_baseline": {}, "sweep": None}
    arms = [{**arm, "arm": name, "rungs": [], "verdict": None, "verdict_text": "?"} for name in ("baseline", "+muon")]
    results = {"name": "abl", "arms": arms, "clock": "wall", "target_loss": 4.8, "target_source": "as asked for"}
    results |= {"seeds": [0], "budget_tokens": 30_000, "test": "t", "noise": {"relative": 0.05, "loss": 0.005}}
    path = folder / "ablation.html"
    path.write_text(render_ablation({**results, "complete": True, "notes": [], "command": "-", "versions": {}}))
    return path


@pytest.mark.slow
def test_a_live_page_follows_its_run(browser: Browser, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run / "attempts/1/start.json", {"unix_time": time.time()})
    write_lines(run, [step_line(step) for step in range(1, 11)])
    with ReportServer(run, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            page = browser.open(server.address)
            page.ask("window.first = true")
            page.choose("axis", "time")
            assert page.ask(f"{LOSS}.data[0].length") == 10
            write_lines(run, [step_line(step) for step in range(11, 31)])
            with (run / "metrics.jsonl").open("a") as file:
                file.write('{"step": 31, "attempt": 1, "tok')
            page.wait_until(f"{LOSS}.data[0].length === 30")
            assert list(drawn(page, "train, each step")) == pytest.approx([2 * step for step in range(1, 31)])
            losses = [made_loss(step) for step in range(1, 31)]
            assert list(drawn(page, "train, smoothed").values()) == pytest.approx(averaged(losses, 0.6), rel=1e-4)
            assert page.ask("[...document.querySelectorAll('.tiles dd')].some(one => one.textContent === '30')")
            assert page.ask("window.first") is True, "it was not loaded anew"
            # The next attempt goes on behind the torn line, from step 21 on.
            write(run / "attempts/2/start.json", {"unix_time": time.time()})
            write_lines(run, [step_line(step, 2) for step in range(21, 26)])
            page.wait_until(f"window.first === undefined && {LOSS}.data[0].length === 25")
            assert page.ask(f"{SHOWN}[0]") == "training time, seconds", "the controls are as they were"
            write(run / "attempts/2/outcome.json", {"status": "finished", "unix_time": 1.0})
            page.wait_until("document.getElementById('told').textContent.includes('attempt 2: finished')")
            assert page.errors() == []
        finally:
            server.shutdown()
