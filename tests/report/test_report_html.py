"""The report stands alone, survives any state of the run directory, and never trusts a text."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from turbolm.report.html import loss_curve_svg, write_report
from turbolm.report.metrics import read_metrics
from turbolm.report.svg import Series, line_chart, smooth, thin, tick_labels

EVIL = "</script><script>alert(1)</script><img src=x onerror='alert(2)'>&\""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    run = tmp_path / "tiny"
    lines = []
    for attempt, steps in ((1, range(1, 61)), (2, range(51, 101))):
        (run / "attempts" / str(attempt)).mkdir(parents=True)
        (run / "attempts" / str(attempt) / "environment.json").write_text(json.dumps({"host": f"node{attempt}"}))
        for step in steps:
            line = {
                "step": step,
                "attempt": attempt,
                "tokens_seen": step * 1000,
                "train/loss": 9 / step,
                "train/lr": 1e-3,
            }
            lines.append(line | {"train/grad_norm": 1.0, "perf/tokens_per_sec": 1e4, "perf/mfu": None})
    lines.append({"step": 100, "tokens_seen": 100_000, "eval/loss": 0.5, "eval/bits_per_byte": 0.25})
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return run


def test_the_page_shows_the_whole_run_and_loads_nothing(run_dir):
    (run_dir / "results.json").write_text(json.dumps({"unigram_entropy": 5.5, "wall_sec": 75, "status": "finished"}))
    (run_dir / "recipe.yaml").write_text("name: tiny\n")
    path = write_report(run_dir)
    page = path.read_text()
    assert path == run_dir / "report.html"
    assert [file.name for file in run_dir.iterdir() if "report" in file.name] == ["report.html"]
    for text in (
        "Gradient norm",
        "Learning rate",
        "Tokens per second",
        "unigram entropy",
        "1m15s",
        "name: tiny",
        "node2",
    ):
        assert text in page
    assert "node1" not in page
    assert "<td>1</td><td>1</td><td>60</td>" in page
    assert "<td>2</td><td>51</td><td>100</td>" in page
    without_namespace = page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?://|@import|url\((?!#)|<link|<img|\bsrc=", without_namespace)


def test_anomalies_are_shown_even_of_steps_that_were_taken_back(run_dir):
    path = run_dir / "metrics.jsonl"
    assert "Anomalies" not in write_report(run_dir).read_text()
    events = [
        {"step": 57, "anomaly": "nan", "anomaly/loss": None, "anomaly/decision": "skip"},
        {
            "step": 60, "anomaly": "spike", "anomaly/loss": 12.5, "anomaly/grad_norm": 3.0, "anomaly/limit": 7.25,
            "anomaly/decision": "rollback", "anomaly/to_step": 50, "anomaly/skipped_batches": [50, 60],
        },
        {"step": 61, "anomaly": EVIL, "anomaly/skipped_batches": EVIL},
    ]  # fmt: skip
    path.write_text("\n".join([path.read_text(), *(json.dumps({"attempt": 1, **event}) for event in events)]))
    page = write_report(run_dir).read_text()
    row = ("<td>60</td><td>1</td><td>spike</td><td>12.5</td><td>3</td><td>7.25</td><td>rollback</td>"
           "<td>50 to 59</td>")  # fmt: skip
    assert row in page
    assert "<td>57</td><td>1</td><td>nan</td><td>–</td><td>–</td><td>–</td><td>skip</td><td>–</td>" in page
    assert "<script>alert" not in page


def test_everything_that_a_user_named_is_escaped(run_dir):
    (run_dir / "results.json").write_text(json.dumps({EVIL: EVIL, "nested": {EVIL: [EVIL, 1]}}))
    (run_dir / "recipe.yaml").write_text(f"name: {EVIL}\n")
    (run_dir / "attempts/2/environment.json").write_text(json.dumps({EVIL: {"a": EVIL}}))
    page = write_report(run_dir).read_text()
    assert "alert(1)" in page
    assert "<script>alert" not in page
    assert "<img" not in page


@pytest.mark.parametrize("metrics", [None, "", "{", json.dumps({"step": 1, "train/loss": 3.0, "tokens_seen": 10})])
def test_a_run_that_barely_started_has_a_report(tmp_path, metrics):
    if metrics is not None:
        (tmp_path / "metrics.jsonl").write_text(metrics)
    (tmp_path / "results.json").write_text("{ damaged")
    assert "</html>" in write_report(tmp_path).read_text()


def test_the_loss_curve_is_a_picture_of_its_own(run_dir):
    svg = loss_curve_svg(read_metrics(run_dir / "metrics.jsonl"), unigram_entropy=5.5, title="a <b> & c")
    texts = [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert "a <b> & c" in texts
    assert "unigram entropy" in texts
    assert "100k" in texts
    assert "prefers-color-scheme" in svg
    assert "<script" not in svg
    assert svg == loss_curve_svg(read_metrics(run_dir / "metrics.jsonl"), unigram_entropy=5.5, title="a <b> & c")


@pytest.mark.parametrize("value", [0.0, 1e-12, 3.0, 1e12, -5.0])
def test_a_constant_curve_can_be_drawn(value):
    chart = line_chart("constant", [Series("one", "blue", [(0, value), (10, value)])], standalone=True)
    assert "nan" not in chart
    ElementTree.fromstring(chart)


def test_thinning_keeps_ends_and_spikes():
    points = [(float(step), 1.0) for step in range(100_000)]
    points[54_321] = (54_321.0, 99.0)
    kept = thin(points)
    assert len(kept) < 1_500
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    assert (54_321.0, 99.0) in kept
    assert kept == sorted(kept)


def test_smoothing_ignores_single_spikes_and_follows_the_trend():
    points = [(float(step), 100.0 - step) for step in range(100)]
    points[50] = (50.0, 1e6)
    smoothed = dict(smooth(points, share=0.2))
    assert smoothed[0.0] == 100.0
    assert smoothed[30.0] == pytest.approx(70)
    assert smoothed[50.0] == pytest.approx(50, abs=1)


def test_ticks_of_one_axis_look_alike():
    assert tick_labels([0, 0.5, 1.0]) == ["0.0", "0.5", "1.0"]
    assert tick_labels([0, 2, 4]) == ["0", "2", "4"]
    assert tick_labels([0, 0.25, 0.5]) == ["0.00", "0.25", "0.50"]
    assert tick_labels([0, 10_000, 20_000]) == ["0", "10k", "20k"]
    assert tick_labels([0, 0.0001, 0.0002]) == ["0", "1e-4", "2e-4"]
