"""Runs compared: figures worked out by hand, folders from anywhere, and what is no run."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.report.made import made_loss, make_run, step_line, write, write_lines
from tests.report.page import assert_loads_nothing, chart_data
from turbolm.cli import app
from turbolm.errors import UserError
from turbolm.report.compare import compare_runs
from turbolm.report.compare_page import render_html, render_table

OLD = Path(__file__).parents[1] / "fixtures/runs"  # of an earlier version


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """100 steps of 2 s, and 60 of 1 s with twice the learning rate at another ZeRO stage."""
    fast = make_run(tmp_path / "fast", 60, lr=2e-3, zero_stage=3, **{"perf/tokens_per_sec": 1000.0, "perf/mfu": None})
    write(fast / "attempts/1/environment.json", {"host": "node2", "turbolm": "0.4.0", "torch": "2.13.0"})
    return [make_run(tmp_path / "slow"), fast]


def rows(table: str) -> dict[str, list[str]]:
    """The cells of each line by its first, from a table whose columns stand two spaces apart."""
    lines = [[cell.strip() for cell in line.strip().split("  ") if cell.strip()] for line in table.splitlines()]
    return {line[0]: line[1:] for line in lines if line}


def test_the_table_of_two_runs(runs: list[Path]) -> None:
    found = rows(render_table(compare_runs(runs)))

    def mean(steps: range) -> str:
        return f"{statistics.fmean(map(made_loss, steps)):.4f}"

    at_60 = mean(range(58, 61))  # the last 5% of 60k tokens: steps whose tokens are above 57,000
    assert found["steps"] == ["100", "60"] and found["tokens"] == ["100k", "60k"]
    assert found["training time, steps alone"] == ["3m20s", "1m00s"]
    assert found["training loss, last 5% of the tokens"] == [mean(range(96, 101)), at_60]
    assert found["training loss at 60k tokens"] == found["training loss at step 60"] == [at_60, at_60]
    # After 60 s the first run has done 30 steps: those that ended after 57 s are 29 and 30.
    assert found["training loss at 1m00s of training"] == [mean(range(29, 31)), at_60]
    assert found["held-out loss"] == [f"{made_loss(step) + 0.1:.4f}" for step in (100, 60)]
    between = (made_loss(20) + made_loss(40)) / 2 + 0.1  # step 30, between two evaluations
    assert found["held-out loss at 1m00s of training"] == [f"{between:.4f}", f"{made_loss(60) + 0.1:.4f}"]
    assert found["held-out loss of code"] == [f"{made_loss(step):.4f}" for step in (100, 60)]
    assert found["tokens/s, median"] == ["500", "1k"] and found["step, median"] == ["2.0s", "1.0s"]
    assert found["MFU, median"] == ["30.0%", "–"]
    assert found["planned / measured: step"] == ["1.6s / 2.0s (+25.0%)", "1.6s / 1.0s (-37.5%)"]
    assert found["planned / measured: peak memory"] == ["2 GiB / 3 GiB (+50.0%)"] * 2


def test_only_what_differs_is_listed(runs: list[Path]) -> None:
    found = compare_runs(runs)
    assert {f"{one.section} {one.key}": one.values for one in found.differences} == {
        "contract train.budget": [100_000, 60_000],
        "contract optimizer.lr": [1e-3, 2e-3],
        "execution execution.zero_stage": [2, 3],
        "environment host": ["node1", "node2"],
        "environment turbolm": ["0.5.0", "0.4.0"],
        "environment git_commit": ["0123456789abcdef", None],
    }
    assert found.notes == []
    recipe = runs[0] / "recipe.yaml"
    of_first_source = recipe.read_text()
    recipe.write_text(of_first_source.replace("evaluation:\n", "evaluation:\n  from_each_source: true\n"))
    assert [note.partition(":")[0] for note in compare_runs(runs).notes] == [
        "their held-out losses are of different text or other sequences, and do not compare", "web", "code",
    ]  # fmt: skip


def test_entries_that_only_some_runs_have_are_told_once(runs: list[Path]) -> None:
    for run, evaluation in zip(runs, ({"tasks": [], "of": []}, {"tasks": [{"name": "py"}], "of": ["a"]}), strict=True):
        write(run / "recipe.yaml", {"evaluation": evaluation})  # JSON is YAML
    found = {one.key: one.values for one in compare_runs(runs).differences if one.section == "execution"}
    assert found == {"evaluation.tasks.0.name": [None, "py"], "evaluation.of": [None, ["a"]]}


def change(path: Path, **values: Any) -> None:
    write(path, json.loads(path.read_text()) | values)


ORIGIN = {"run": "plateau", "checkpoint": "step-00000005", "fingerprint": "f", "step": 5, "tokens_seen": 5000}


@pytest.mark.parametrize(
    "different",
    [
        {},
        {"fingerprint": "of another lr"},
        {"store_fingerprint": "other documents"},
        {"budgets_tokens": [5000, 10_000], "former_fingerprints": ["of 5000"]},  # its schedule went on anew
        {"budgets_tokens": None},  # damaged
        {"origin": ORIGIN},
        {"origin": {**ORIGIN, "checkpoint": "step-00000006"}},
    ],
    ids=str,
)
def test_runs_that_must_have_one_curve_are_said_to(tmp_path: Path, different: dict[str, Any]) -> None:
    one, other = make_run(tmp_path / "one", 10), make_run(tmp_path / "other", 10)
    change(other / "contract.json", **different)
    found = [note for note in compare_runs([one, other]).notes if "one loss curve" in note]
    assert len(found) == (not different)
    assert compare_runs([one]).notes == [], "one run has nothing to be compared with"
    if different:  # the same in both is no difference
        change(one / "contract.json", **different)
        found = [note for note in compare_runs([one, other]).notes if "one loss curve" in note]
        assert len(found) == (different != {"budgets_tokens": None})


def test_anomalies_that_were_changed_on_the_way_leave_the_curve_open(tmp_path: Path) -> None:
    """Both began alike and end alike; at which step each was changed is not recorded."""
    runs = [make_run(tmp_path / name, 10) for name in ("one", "other")]
    for run in runs:
        change(run / "contract.json", former_fingerprints=["of other anomalies"])
    assert compare_runs(runs).notes == []


@pytest.mark.parametrize(
    ("settings", "size", "is_same"),
    [
        ({}, None, True),
        ({}, 500, True),
        ({"path": ["other.txt"]}, 500, False),
        ({"type": "jsonl"}, 500, False),
        ({}, 501, False),  # a file of the same name, such as on another machine
    ],
)
def test_sets_of_one_label_and_other_files_are_told(
    tmp_path: Path, settings: dict[str, Any], size: int | None, is_same: bool
) -> None:
    runs = [make_run(tmp_path / name, 20) for name in ("one", "other")]
    for run, changes, targets in zip(runs, ({}, settings), (500, size), strict=True):
        recipe = yaml.safe_load((run / "recipe.yaml").read_text())
        recipe["evaluation"]["sets"] = [{"label": "web", "type": "text", "path": ["web.txt"]} | changes]
        (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        if targets is not None:
            change(run / "results.json", eval_losses={"web": {"loss": 1.0, "targets": targets}})
    told = [note for note in compare_runs(runs).notes if "does not compare" in note]
    assert [note.partition(":")[0] for note in told] == ([] if is_same else ["web"])


def test_sets_and_tasks_by_tokenizer_length_and_questions(tmp_path: Path) -> None:
    """A loss per token needs one tokenizer; bits per byte of an answer do not. Both are cut at data.seq_len."""
    settings = {"sets": [{"label": "web", "type": "text", "path": ["w"]}], "tasks": [{"name": "py", "path": "q"}]}
    for name, tokenizer, seq_len, questions in (
        ("a", "x", 64, 7), ("b", "y", 64, 7), ("c", "x", 32, 7), ("d", "x", 64, 6), ("e", "x", 64, None)
    ):  # fmt: skip
        run, line = tmp_path / name, {"step": 1, "attempt": 1, "tokens_seen": 1000}
        write_lines(run, [step_line(1), {**line, "eval/loss/web": 2.0, "eval/py/bits_per_byte": 1.0}])
        contract = {"data": {"seq_len": seq_len}}
        write(run / "contract.json", {"contract": contract, "store_fingerprint": name})
        write(run / "model/tokenizer.json", tokenizer)
        write(run / "results.json", {"eval_tasks": {"py": {"questions": questions}}} if questions else {})
        (run / "recipe.yaml").write_text(yaml.safe_dump({"name": name, "evaluation": settings}))

    def told(*names: str) -> list[str]:
        notes = compare_runs([tmp_path / name for name in names]).notes
        return [note.partition(":")[0] for note in notes if "does not compare" in note]

    assert [told("a", name) for name in "bcde"] == [["web"], ["web", "py"], ["py"], []]
    (tmp_path / "a/model/tokenizer.json").unlink()
    assert told("a", "e") == ["web"], "which tokenizer it was is not known"


def test_long_values_show_where_they_differ(runs: list[Path]) -> None:
    for index, run in enumerate(runs):
        write(run / "attempts/1/environment.json", {"host": "h", "platform": f"Linux-{'x' * 60}-{index}-end"})
    found = rows(render_table(compare_runs(runs)))
    assert [cell[-6:] for cell in found["platform"]] == ["-0-end", "-1-end"]


def test_runs_of_other_machines_and_versions(runs: list[Path], tmp_path: Path) -> None:
    """Of an earlier version, unfinished, not started, damaged: what is known is shown, and what is not is said."""
    old = Path(shutil.copytree(OLD / "zero1", tmp_path / "elsewhere/old"))
    running = tmp_path / "running"
    write_lines(running, [step_line(step) for step in range(1, 4)])
    with (running / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "atte')
    empty = tmp_path / "empty"
    (empty / "attempts").mkdir(parents=True)
    broken = make_run(tmp_path / "broken")
    (broken / "contract.json").write_text('{"contract": {"train": [1], "model": "x", "optimizer": 3}}')
    (broken / "recipe.yaml").write_text("name: broken\nname: twice\n")
    for name in ("plan.json", "environment.json", "outcome.json", "start.json"):
        (broken / "attempts/1" / name).write_text("{ damaged")
    found = compare_runs([old, running, empty, broken, runs[0]])
    shown = rows(render_table(found))
    assert shown["state"] == ["no end recorded", "no end recorded", "nothing trained", "finished", "finished"]
    assert shown["steps"] == ["6", "3", "–", "100", "100"]
    # The old run has the fewest tokens, 6 steps of 256; the one that runs has the fewest steps.
    assert {"training loss at 1.54k tokens", "training loss at step 3"} <= set(shown)
    told = "\n".join(found.notes)
    for text in (
        "empty: no step in its metrics",
        "broken: contract.json",
        "broken: recipe.yaml",
        "running: recipe.yaml",
    ):
        assert text in told
    assert_loads_nothing(render_html(found))
    both = compare_runs([OLD / "zero1", OLD / "zero3"])
    assert {one.key: one.values for one in both.differences}["optimizer.name"] == ["adamw", "muon"]


def test_what_is_no_run_is_refused_by_name(runs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    write(tmp_path / "abl/ablation.json", {})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as refused:
        compare_runs([runs[0], tmp_path / "typo", tmp_path / "notes", tmp_path / "abl", tmp_path / "file", runs[0]])
    lines = str(refused.value).splitlines()
    assert [Path(line.partition(":")[0]).name for line in lines] == ["typo", "notes", "abl", "file", "slow"]
    assert "no such folder" in lines[0] and "an ablation, not a run" in lines[2] and "named twice" in lines[4]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / machine / "run", 10) for machine in ("a", "b")]
    assert compare_runs(runs).labels == list(map(str, runs))


def test_the_page_has_every_curve_by_tokens_steps_and_time(runs: list[Path]) -> None:
    page = render_html(compare_runs(runs))
    assert_loads_nothing(page)
    charts = chart_data(page)
    assert {"Training loss", "Held-out loss", "Held-out loss by set: web", "Tokens per second"} <= set(charts)
    slow, fast = charts["Training loss"]["curves"]
    assert (slow["name"], fast["name"]) == ("slow", "fast") and slow["color"] != fast["color"]
    assert fast["x"][-1] == 60_000 and fast["others"] == {
        "steps": list(range(1, 61)), "time": [float(step) for step in range(1, 61)],
    }  # fmt: skip


def test_the_command(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["compare", "slow", "fast"])
    assert done.exit_code == 0 and "page: compare.html" in done.output
    assert Path("compare.html").read_text().startswith("<!doctype html>")
    told = json.loads(CliRunner().invoke(app, ["compare", "slow", "fast", "--json"]).output)
    assert [one["steps"] for one in told["runs"]] == [100, 60] and told["common"] == {
        "tokens": 60_000, "steps": 60, "time": 60.0,
    }  # fmt: skip
    assert {"section": "contract", "key": "optimizer.lr", "values": [1e-3, 2e-3]} in told["differences"]
    with pytest.raises(UserError, match="typo"):
        CliRunner().invoke(app, ["report", "typo"], catch_exceptions=False)
    assert not Path("typo").exists(), "a report of nothing makes no folder"


def test_options_of_a_report_that_would_do_nothing_are_refused(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def invoke(*options: str) -> None:
        CliRunner().invoke(app, ["report", str(runs[0]), *options], catch_exceptions=False)

    monkeypatch.setattr("turbolm.report.live.follow", lambda *_: pytest.fail("served"))
    with pytest.raises(UserError, match="^--out: --follow serves the page and writes none"):
        invoke("--follow", "--out", "page.html")
    for port in ("0", "8788"):  # the default too
        with pytest.raises(UserError, match="^--port: nothing is served without --follow"):
            invoke("--port", port)
    assert not (runs[0] / "report.html").exists()
    served: list[tuple[Path, int]] = []
    monkeypatch.setattr("turbolm.report.live.follow", lambda *given: served.append(given))
    invoke("--follow", "--port", "0")
    invoke("--follow")
    assert served == [(runs[0], 0), (runs[0], 8788)]
    monkeypatch.setitem(sys.modules, "turbolm.report.live", None)  # its import fails
    invoke("--out", str(runs[0] / "elsewhere.html"))
    assert (runs[0] / "elsewhere.html").exists()
