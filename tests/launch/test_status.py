"""`turbolm status` and `turbolm stop`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from turbolm.cli import app
from turbolm.files import write_json
from turbolm.launch.status import read_status
from turbolm.reliability.outcome import Outcome, write_outcome
from turbolm.train.run_directory import RunDirectory, open_attempt


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run whose second attempt is at step 3 of 10."""
    run = RunDirectory(tmp_path / "runs" / "demo")
    for _ in range(2):
        attempt = open_attempt(run)
        write_json(run.attempt(attempt) / "plan.json", {"num_steps": 10, "num_tokens": 1000})
        job = {"job_id": "7", "restarts": attempt - 1, "start_step": 0, "hosts": ["n1", "n2"]}
        write_json(run.attempt(attempt) / "slurm.json", job)
    write_outcome(run.attempt(1), Outcome("stopped", 75))
    lines: list[dict[str, Any]] = [
        {"step": s, "attempt": 2, "tokens_seen": 100 * s, "train/loss": 4.0 - s, "perf/tokens_per_sec": 50.0}
        for s in (1, 2, 3)
    ]
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run.checkpoints / "step-00000002").mkdir(parents=True)
    return run


def invoke(*arguments: str) -> Any:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return done.output


def test_a_run_under_way(run: RunDirectory) -> None:
    status = read_status(run.path)
    assert (status.state, status.step, status.num_steps, status.saved_step) == ("running", 3, 10, 2)
    assert status.eta_sec == 7 * 100 / 50
    assert invoke("status", "--runs", str(run.path.parent)).splitlines() == [
        "RUN   STATE    STEP  SAVED  LOSS    TOKENS/S  ETA  ATTEMPTS",
        "demo  running  3/10  2      1.0000  50        14s  2",
    ]
    assert invoke("status", str(run.path)).splitlines()[2:] == [
        "  attempt 1: stopped (exit code 75)  job 7, start 1  on n1,n2",
        "  attempt 2: no end  job 7, start 2  on n1,n2",
    ]
    found = json.loads(invoke("status", "--json", str(run.path)))
    assert found[0]["attempts"][0]["exit_code"] == 75
    assert found[0]["state"] == "running"


def test_a_silent_run_and_an_ended_one(run: RunDirectory) -> None:
    for path in run.path.rglob("*"):
        os.utime(path, (1, 1))
    assert read_status(run.path).state == "silent"
    write_outcome(run.attempt(2), Outcome("finished", 0))
    assert read_status(run.path).state == "finished"


def test_stop_leaves_a_stop_file_that_says_who_asked(run: RunDirectory) -> None:
    assert "asked to stop" in invoke("stop", str(run.path))
    assert run.stop_file.read_text() == "user\n"


def test_what_is_not_a_run_is_said(tmp_path: Path) -> None:
    for arguments in (["status", str(tmp_path)], ["status", "--runs", str(tmp_path / "none")], ["stop", str(tmp_path)]):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code != 0
        assert "turbolm" in type(done.exception).__module__
    assert invoke("status", "--runs", str(tmp_path)).strip() == "no runs"
