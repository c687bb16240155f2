"""`turbolm status` at three in the morning: what it says is so, at once, whatever was killed or damaged."""

from __future__ import annotations

import json
import random
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from turbolm.ablate.measure import measure_run
from turbolm.cli import app
from turbolm.files import write_json
from turbolm.launch.status import read_status
from turbolm.reliability.outcome import Outcome, write_outcome
from turbolm.reliability.run_lock import Holder, this_process
from turbolm.report.html import write_report
from turbolm.report.metrics import read_lines
from turbolm.train.run_directory import RunDirectory, open_attempt


def gone() -> Holder:
    """A process of this host that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return replace(this_process(), pid=process.pid, started="1")


def elsewhere() -> Holder:
    return replace(this_process(), host="other", boot="its own", space="its own")


# (kind, who started the last attempt, how that ended, who holds the run's lock, the right state)
STATES = [
    ("prepares", this_process, None, None, "running"),
    ("trains", this_process, None, this_process, "running"),
    ("launcher killed while it prepared", gone, None, None, "killed"),
    ("launcher and ranks killed", gone, None, gone, "killed"),
    ("rank 0 of a hand-started world killed", None, None, gone, "killed"),
    ("trains on another host, fresh", None, None, elsewhere, "running"),
    ("a second start was refused while the first trains", gone, "refused", this_process, "running"),
    ("failed", gone, "failed", None, "failed"),
    ("hung, and its lock is left", gone, "hung", gone, "hung"),
    ("stopped", gone, "stopped", None, "stopped"),
    ("finished", gone, "finished", None, "finished"),
]


@pytest.mark.parametrize(("kind", "starter", "ended", "holder", "right"), STATES, ids=[row[0] for row in STATES])
def test_the_state_of_a_run(
    kind: str, starter: Any, ended: str | None, holder: Any, right: str, tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path / "demo")
    attempt = open_attempt(run, starter=starter and starter())
    (run.attempt(attempt) / "log.rank0.txt").write_text("words")  # a fresh sign: not what may decide
    if ended:
        write_outcome(run.attempt(attempt), Outcome(ended, 1, "the reason of it\nlogs: here"))
    if holder:
        write_json(run.path / "lock.json", asdict(holder()))
    assert read_status(run.path).state == right
    shown = CliRunner().invoke(app, ["status", "--runs", str(tmp_path)]).output
    if right in ("failed", "hung", "killed", "refused"):
        reason = ": the reason of it" if ended else ""
        assert f"demo: attempt 1 {right}{reason}\n  log: {run.attempt(1) / 'log.rank0.txt'}\n" in shown
    else:
        assert len(shown.splitlines()) == 2, "nothing is wrong, and nothing is said"


def metrics_line(step: int) -> dict[str, Any]:
    return {
        "step": step, "attempt": 1, "tokens_seen": 100 * step, "train/loss": 4.0 / step, "train/lr": 1e-3,
        "train/grad_norm": 1.0, "perf/tokens_per_sec": 50.0, "data/batch_tokens": 100, "perf/cpu_sec": 1.0,
    }  # fmt: skip


DAMAGE: list[tuple[str, bytes]] = [
    ("torn", b'{"step": 3, "attempt": 1, "tok'),
    ("zeros, after a crash of the host", bytes(4096)),
    ("not UTF-8", b"\xff\xfe{}\x80"),
    ("a list", b"[1, 2, 3]"),
    ("another type of step", b'{"step": "3", "train/loss": 1.0, "tokens_seen": 1}'),
    ("a step that is true", b'{"step": true, "attempt": 1, "train/loss": 1.0, "tokens_seen": 1}'),
    ("a step below zero", b'{"step": -3, "attempt": 1, "train/loss": 1.0, "tokens_seen": 1}'),
    ("a step without end", b'{"step": ' + b"9" * 400 + b', "attempt": 1, "train/loss": 1.0, "tokens_seen": 1}'),
    ("no tokens", b'{"step": 3, "attempt": 1, "train/loss": 1.0}'),
    ("another type of tokens", b'{"step": 3, "attempt": 1, "train/loss": 1.0, "tokens_seen": "many"}'),
    ("an attempt that is text", b'{"step": 3, "attempt": "1", "train/loss": 1.0, "tokens_seen": 1}'),
    (
        "a speed that is text",
        b'{"step": 3, "attempt": 1, "train/loss": 1.0, "tokens_seen": 3, "perf/tokens_per_sec": "x"}',
    ),
    ("a loss that is a list", b'{"step": 3, "attempt": 1, "train/loss": [], "tokens_seen": 3}'),
    ("nested without end", b'{"step": 3, "x": ' + b"[" * 100_000),
]


@pytest.mark.parametrize(("kind", "line"), DAMAGE, ids=[kind for kind, _ in DAMAGE])
def test_one_bad_line_of_metrics_breaks_nothing(kind: str, line: bytes, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "demo")
    write_json(run.attempt(open_attempt(run)) / "plan.json", {"num_steps": 10, "num_tokens": 1000})
    good = [json.dumps(metrics_line(step)).encode() for step in (1, 2, 4, 5)]
    held_out = b'{"step": 5, "attempt": 1, "tokens_seen": 500, "eval/loss": 0.9}'
    for place in range(5):
        run.metrics.write_bytes(b"\n".join([*good[:place], line, *good[place:], held_out, b""]))
        status = read_status(run.path)
        assert (status.step, status.loss, status.num_steps) == (5, 0.8, 10) or place == 4
        assert {one["step"] for one in read_lines(run.metrics)} >= {1, 2, 4, 5}
        assert "demo" in write_report(run.path).read_text()
        assert measure_run(run.path, seed=0, lr=1e-3).steps == 5
        assert measure_run(run.path, seed=0, lr=1e-3, clock="cpu").final_loss == 0.9
        assert CliRunner().invoke(app, ["status", str(run.path)]).exit_code == 0


def test_damaged_records_of_attempts_break_nothing(tmp_path: Path) -> None:
    """Every JSON file that status reads, replaced by values of another form; seeded."""
    rng = random.Random(3)
    values: list[Any] = [None, [], 3, "x", {}, {"hosts": 3}, {"job_id": [1], "restarts": "y"}, {"num_steps": "z"}]
    values += [{"status": 3, "exit_code": "x"}, {"stop_seen": [1], "starter": {"pid": 1}}, {"losses": 3}, {"host": [1]}]
    names = ["outcome.json", "slurm.json", "environment.json", "plan.json", "start.json"]
    run = RunDirectory(tmp_path / "demo")
    folder = run.attempt(open_attempt(run))
    (run.path / "submissions" / "1").mkdir(parents=True)
    others = [
        run.results,
        run.path / "lock.json",
        run.random_restarts / "candidates.json",
        run.path / "submissions/1/job.json",
    ]
    for _ in range(60):
        for path in [*(folder / name for name in names), *others]:
            if rng.random() < 0.5:
                write_json(path, rng.choice(values))
            elif rng.random() < 0.2:
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(rng.randbytes(20))
        assert read_status(run.path).name == "demo"
        done = CliRunner().invoke(app, ["status", str(run.path)])
        assert done.exit_code == 0, done.exception
