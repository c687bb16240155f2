"""The table of planned and measured figures, from metrics made by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from turbolm.report.html import write_report
from turbolm.report.planned import Row, compare, planned_line

EXPECTED = {
    "device": "cuda",
    "seq_len": 1000,
    "batch_tokens": 8000,
    "step_sec": 2.0,
    "tokens_per_sec": 4000.0,
    "mfu": 0.40,
    "peak_bytes": 40 * 2**30,
    "collective_bytes": 10 * 2**20,
    "notes": ["planned times: not calibrated: assumed for <H100>"],
}


def line(step: int, rate: float, **changes: Any) -> dict[str, Any]:
    values = {"step": step, "attempt": 2, "tokens_seen": 8000 * step, "train/loss": 1.0, "data/seq_len": 1000}
    values |= {"data/batch_tokens": 8000, "perf/tokens_per_sec": rate, "perf/mfu": rate / 1e4}
    return {**values, "memory/peak_bytes": 30 * 2**30 + step * 2**30, **changes}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose second attempt trained: two slow first steps, then 5000, 3000 and 3200 tokens a second."""
    lines = [
        line(1, 9999.0, attempt=1),
        line(1, 1.0),
        line(2, 1.0),
        line(3, 77.0, **{"data/seq_len": 500}),  # of another shape: not what was planned
        line(4, 5000.0),
        line(5, 3000.0),
        line(6, 3200.0),
        {"step": 6, "attempt": 2, "tokens_seen": 48_000, "eval/loss": 2.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    for attempt in (1, 2, 3):  # the third had nothing left to train
        (tmp_path / f"attempts/{attempt}").mkdir(parents=True)
        (tmp_path / f"attempts/{attempt}/plan.json").write_text(json.dumps({"num_steps": 6, "planned": EXPECTED}))
    (tmp_path / "attempts/2/measured.json").write_text(json.dumps({"step": 5, "collective_bytes": 11 * 2**20}))
    return tmp_path


def test_the_report_sets_what_happened_beside_the_plan(run: Path) -> None:
    page = write_report(run).read_text()
    for label, planned, measured, difference in (
        ("time, median of 3 steps", "2.0s", "2.5s", "+25.0%"),  # 8000 tokens at 3200 a second
        ("tokens per second, median", "4000", "3200", "-20.0%"),
        ("MFU, median", "40.0%", "32.0%", "-20.0%"),
        ("peak of a GPU&#39;s tensors (torch.cuda.max_memory_allocated)", "40 GiB", "36 GiB", "-10.0%"),
        ("collectives of rank 0, counted in step 5", "10 MiB", "11 MiB", "+10.0%"),
    ):
        row = "".join(f"<td>{cell}</td>" for cell in (label, planned, measured, difference))
        assert row in page, row
    assert "<p>planned times: not calibrated: assumed for &lt;H100&gt;</p>" in page


def test_the_last_line_of_a_run_has_the_same(run: Path) -> None:
    rows, notes = compare(run)
    found = {row.figure: {"planned": row.planned, "measured": row.measured} for row in rows}
    assert planned_line({**found, "notes": notes}) == (
        "step 2.0s / 2.5s (+25.0%), tokens/s 4000 / 3200 (-20.0%), MFU 40.0% / 32.0% (-20.0%), "
        "peak memory 40 GiB / 36 GiB (-10.0%), collectives 10 MiB / 11 MiB (+10.0%); "
        "planned times: not calibrated: assumed for <H100>"
    )


def test_memory_of_a_cpu_is_named_as_what_it_is(run: Path) -> None:
    """It is a rise: of 36 GiB, 4 were there before the model. MFU is against a measured peak, which no plan knows."""
    for attempt in (1, 2, 3):
        path = run / f"attempts/{attempt}/plan.json"
        path.write_text(json.dumps({"planned": {**EXPECTED, "device": "cpu", "mfu": None, "step_sec": None}}))
    once = {"step": 5, "collective_bytes": None, "memory_before_bytes": 4 * 2**30}
    (run / "attempts/2/measured.json").write_text(json.dumps(once))
    rows, notes = compare(run)
    shown = {row.figure: row.texts for row in rows}
    assert shown["resident_bytes"] == ("40 GiB", "32 GiB", "-20.0%") and "peak_bytes" not in shown
    assert shown["step_sec"] == ("–", "2.5s", "–") and "mfu" not in shown
    assert shown["collective_bytes"] == ("10 MiB", "–", "–")
    assert notes[-1].startswith("collectives were not counted")
    small = [Row("resident_bytes", "", 200e6, 500e6), Row("resident_bytes", "", 400e6, 500e6)]
    assert [row.texts[2] for row in small] == ["–", "+25.0%"], "a few MB of a model are lost among the libraries"
    (run / "attempts/2/measured.json").unlink()
    assert {row.figure: row.texts for row in compare(run)[0]}["resident_bytes"] == ("40 GiB", "–", "–")


def test_runs_without_a_plan_have_a_report(run: Path, tmp_path: Path) -> None:
    for attempt in (1, 2, 3):
        (run / f"attempts/{attempt}/plan.json").write_text('{"num_steps": 6}')
    assert compare(run) == ([], [])
    assert "Planned / measured" not in write_report(run).read_text()
    old = shutil.copytree(Path(__file__).parents[1] / "fixtures/runs/zero1", tmp_path / "old")
    assert compare(old) == ([], []) and "Planned / measured" not in write_report(old).read_text()
