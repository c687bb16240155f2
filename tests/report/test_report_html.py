"""The report stands alone, survives any state of the run directory, and never trusts a text."""

import hashlib
import json
import re
import shutil
from importlib.resources import files
from pathlib import Path

import pytest

from tests.report.made import make_run, write
from tests.report.page import assert_loads_nothing, chart_data
from turbolm.report.charts import curve, kept_indices, line_chart
from turbolm.report.html import write_report
from turbolm.report.metrics import read_metrics
from turbolm.report.run_charts import run_charts
from turbolm.report.runs import read_run

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
    for row in (["1", "node1", "–", "–", "1 to 60", "–"], ["2", "node2", "–", "–", "51 to 100", "–"]):
        assert "".join(f"<td>{cell}</td>" for cell in [*row, "no end recorded", "–"]) in page
    assert_loads_nothing(page)


def test_the_charts_hold_the_logged_values(run_dir):
    """Each step's loss by tokens, the evaluation, and where the second attempt took over."""
    (run_dir / "results.json").write_text(json.dumps({"unigram_entropy": 5.5}))
    charts = chart_data(write_report(run_dir).read_text())
    assert list(charts) == ["Loss", "Learning rate", "Gradient norm", "Tokens per second"]
    curves = {curve["name"]: curve for curve in charts["Loss"]["curves"]}
    assert {name: one["style"] for name, one in curves.items()} == {
        "train": "noisy", "held out": "points", "unigram entropy": "dashed",
    }  # fmt: skip
    assert curves["train"]["x"] == [step * 1000 for step in range(1, 101)]
    assert curves["train"]["y"] == [pytest.approx(9 / step, rel=1e-4) for step in range(1, 101)]
    assert curves["train"]["others"] == {"steps": list(range(1, 101))}, "no batch sizes, no times"
    assert (curves["held out"]["x"], curves["held out"]["y"]) == ([100_000], [0.5])
    assert (curves["unigram entropy"]["x"], curves["unigram entropy"]["y"]) == ([1000, 100_000], [5.5, 5.5])
    resumes = charts["Loss"]["resumes"]
    assert (resumes["x"], resumes["others"], resumes["texts"]) == ([51_000], {"steps": [51]}, ["attempt 2"])
    assert charts["Learning rate"]["curves"][0]["y"] == [1e-3] * 100


def test_a_run_of_an_earlier_version_has_a_report(tmp_path):
    run = shutil.copytree(Path(__file__).parents[1] / "fixtures/runs/zero1", tmp_path / "old")
    losses = [line["train/loss"] for line in read_metrics(run / "metrics.jsonl") if "train/loss" in line]
    (curve,) = chart_data(write_report(run).read_text())["Loss"]["curves"]
    assert list(curve["others"]) == ["steps", "time"]
    assert curve["y"] == pytest.approx(losses, rel=1e-4) and len(losses) == 6


def test_a_spike_does_not_flatten_the_rest():
    points = [(float(step), 1.0) for step in range(100)]
    points[50] = (50.0, 1e6)
    assert line_chart("norm", [curve("norm", "blue", points)], clip_spikes=True)["clip_above"] == 2
    assert line_chart("norm", [curve("norm", "blue", points)])["clip_above"] is None
    assert line_chart("norm", [curve("norm", "blue", [])], clip_spikes=True)["curves"] == []


def test_the_vendored_files_are_the_published_ones():
    assets = files("turbolm.report") / "assets"
    sums = re.findall(r"^([0-9a-f]{64})  (\S+)$", (assets / "README.md").read_text(), re.MULTILINE)
    assert len(sums) == 3
    for digest, name in sums:
        assert hashlib.sha256((assets / name).read_bytes()).hexdigest() == digest


def test_every_page_carries_the_license_of_what_it_includes(run_dir):
    assert "Copyright (c) 2022 Leon Sorokin" in write_report(run_dir).read_text()


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
    assert_loads_nothing(page)


@pytest.mark.parametrize("metrics", [None, "", "{", json.dumps({"step": 1, "train/loss": 3.0, "tokens_seen": 10})])
def test_a_run_that_barely_started_has_a_report(tmp_path, metrics):
    if metrics is not None:
        (tmp_path / "metrics.jsonl").write_text(metrics)
    (tmp_path / "results.json").write_text("{ damaged")
    assert "</html>" in write_report(tmp_path).read_text()


def test_thinning_keeps_ends_and_spikes():
    values = [1.0] * 100_000
    values[54_321], values[77_777] = 99.0, -5.0
    kept = kept_indices(values)
    assert len(kept) < 1_000 and kept == sorted(set(kept))
    assert {0, 54_321, 77_777, 99_999} <= set(kept)
    assert kept_indices(values[:800]) == list(range(800))


def test_a_long_run_is_smoothed_by_its_means_and_not_by_its_extremes():
    """9 of 10 steps have a loss of 1, the tenth one of 11: their mean is 2, the middle of the extremes 6."""
    points = [(float(step), 11.0 if step % 10 == 0 else 1.0) for step in range(100_000)]
    found = curve("train", "blue", points, "noisy", {"steps": [at for at, _ in points]})
    assert set(found["y"]) == {1.0, 11.0} and len(found["y"]) < 1_000
    mean = found["mean"]
    assert mean["size"] == 125 and mean["y"][:-1] == pytest.approx([2.0] * (len(mean["y"]) - 1), abs=0.1)
    assert mean["x"][:2] == mean["others"]["steps"][:2] == [124, 249] and mean["x"][-1] == 99_999
    assert "mean" not in curve("train", "blue", points[:800], "noisy") | curve("lr", "blue", points)


def test_all_that_a_run_recorded_is_on_its_page(tmp_path):
    shares = {"experts/max_share": [0.5, 0.3], "experts/min_share": [0.1, 0.2]}
    run = make_run(tmp_path / "run", **shares, **{"train/lr/matrices": 0.25})
    write(run / "attempts/1/profile/rank0.summary.json", {"step_sec": 2.0, "shares": {"attention": 0.75, "host": 0.25}})
    write(run / "attempts/1/start-up.json", {"begun": 1.0, "seconds": {"imports": 3.0, "first step": 1.0}})
    page = write_report(run).read_text()
    charts = chart_data(page)
    sets = {one["name"]: one["y"][-1] for one in charts["Held-out loss by set"]["curves"]}
    assert (
        sets == {"web": pytest.approx(3.8, abs=0.2), "code": pytest.approx(3.6, abs=0.2)} and sets["web"] > sets["code"]
    )
    assert [(one["name"], one["y"][0]) for one in charts["Learning rate"]["curves"]] == [
        ("learning rate", 1e-3), ("of matrices", 0.25),
    ]  # fmt: skip
    load = {one["name"]: one["y"][0] for one in charts["Expert load, share of a layer's tokens"]["curves"]}
    assert load == {"busiest of any layer": 0.5, "busiest, mean of layers": 0.4, "idlest of any layer": 0.1}
    (spike,) = [one for one in charts["Loss"]["curves"] if one["style"] == "marks"]
    assert (spike["x"], spike["y"], spike["texts"]) == ([50_000], [40.0], ["50 skip"])
    assert spike["others"] == {"steps": [50], "time": [100.0]} and charts["Loss"]["clip_above"] < 20
    dashed = {
        title: [one["name"] for one in chart["curves"] if one["style"] == "dashed"] for title, chart in charts.items()
    }
    assert dashed["Gradient norm"] == ["clipped above"] and dashed["Seconds per step"] == [
        "planned, of the longest sequences"
    ]
    assert {one["name"]: one["y"][0] for one in charts["Peak memory of a process, GiB"]["curves"]} == {
        "peak memory of a process": 3, "planned tensors": 2,
    }  # fmt: skip
    cells = ["1", "node1", "2025-10-09 08:53", "12m34s", "1 to 100", "3m20s", "finished", "0.5.0 0123456789ab"]
    assert "".join(f"<td>{cell}</td>" for cell in cells) in page
    for text in ("matrix products", "starting operators", "1.2s, 75.0%", "attention", "1.5s, 75.0%", "imports",
                 "3.0s, 75.0%", "fp32 master weights", "1.5 GiB, 75.0%", "planned by hand"):  # fmt: skip
        assert text in page
    assert_loads_nothing(page)


def test_averaged_weights_have_curves_of_their_own():
    figures = {"loss": 2.0, "average_loss": 1.0, "loss/web": 4.0, "average_loss/web": 3.0}
    figures |= {"greek/accuracy": 0.5, "average/greek/accuracy": 0.75, "average/accuracy": 0.25}
    line = {"step": 1, "attempt": 1, "tokens_seen": 1000, **{f"eval/{key}": value for key, value in figures.items()}}
    charts = {one["title"]: [(c["name"], c["y"]) for c in one["curves"]] for one in run_charts([line], [], {})}
    assert charts["Loss"] == [("held out", [2.0]), ("held out, averaged weights", [1.0])]
    assert charts["Held-out loss by set"] == [("web", [4.0]), ("web, averaged weights", [3.0])]
    assert charts["Accuracy"] == [("greek", [0.5]), ("greek, averaged weights", [0.75]), ("average", [0.25])]


def test_the_recipe_is_read_as_recipes_are(tmp_path: Path) -> None:
    """YAML 1.2: `1e-1` is a number and `off` a text, which PyYAML's own loader takes for a text and for false."""
    run = make_run(tmp_path / "run")
    path = run / "recipe.yaml"
    path.write_text("train: {max_grad_norm: 1e-1, fp8: off}\n")
    found = read_run(run)
    assert found.recipe == {"train": {"max_grad_norm": 0.1, "fp8": "off"}}
    assert found.levels["Gradient norm"] == ("clipped above", 0.1)
    bomb = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 20))]
    for damaged in ("a: [", "a: 1\na: 2\n", "[]", "a: &a [*a]", "\n".join(bomb), f"a: {'x' * 2**20}"):
        path.write_text(damaged)
        assert read_run(run).recipe == {}


def test_damaged_evaluations_are_counted_and_the_others_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    metrics = {"acc": {"value": 0.25, "stderr": 0.125}}
    task = {"version": 1, "num_fewshot": 0, "examples": 12, "of": 13, "metrics": metrics}
    record = {"model": "step-1", "command": "turbolm evaluate x", "lm_eval": "0.4", "tasks": {"arc": task}}
    damaged = [None, {**record, "tasks": {"arc": {**task, "metrics": {"acc": 1}}}}, {"model": "x"}]
    write(run / "results.json", {"evaluations": [damaged[0], record, *damaged[1:]]})
    page = write_report(run).read_text()
    assert "<td>step-1</td><td>arc</td><td>acc</td><td>0.2500</td>" in page
    assert "Damaged evaluations in the results, which are not shown: 3<" in page
    write(run / "results.json", {"evaluations": [record]})
    assert "Damaged evaluations" not in write_report(run).read_text()
    for damaged_whole in ("text", {"model": "x"}):
        write(run / "results.json", {"evaluations": damaged_whole})
        assert "which are not shown: 1<" in write_report(run).read_text()
