"""Read the status of a run from its directory: attempts, progress, remaining time. Torch-free, without Slurm."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from turbolm.errors import UserError
from turbolm.files import read_json
from turbolm.launch.job import JOB, newest_step
from turbolm.reliability.outcome import COMPLETE, FINISHED, read_outcome
from turbolm.report.metrics import read_lines
from turbolm.train.run_directory import RunDirectory, list_attempts
from turbolm.units import align_columns, format_count, format_duration

_SILENT_SEC = 900  # an attempt that neither ended nor wrote anything for that long was probably killed
_RATE_STEPS = 50  # steps whose median speed gives the remaining time


@dataclass(frozen=True)
class RunStatus:
    """One run. `state`: new, running, silent (it may have been killed), stopped, failed or finished."""

    name: str
    path: str
    state: str
    step: int
    num_steps: int | None
    saved_step: int
    loss: float | None
    tokens_per_sec: float | None
    eta_sec: float | None
    last_sign_unix_sec: float | None
    attempts: list[dict[str, Any]]


def find_runs(runs_dir: Path) -> list[Path]:
    """The run directories in a folder, by name."""
    if not runs_dir.is_dir():
        raise UserError(f"{runs_dir} is not there; name the folder of the runs with --runs")
    return sorted(path for path in runs_dir.iterdir() if _is_run(path))


def read_status(path: Path, now: float | None = None) -> RunStatus:
    """The status of the run in `path`. Raises UserError when there is none."""
    if not _is_run(path):
        raise UserError(f"{path} is not a run directory")
    run = RunDirectory(path)
    attempts = [_read_attempt(run, number) for number in list_attempts(run)]
    steps = [line for line in read_lines(run.metrics) if "train/loss" in line]
    last = steps[-1] if steps else {}
    plan = next(
        (one for one in (read_json(run.attempt(a["attempt"]) / "plan.json") for a in attempts[::-1]) if one), {}
    )
    num_steps = plan.get("num_steps")
    step, saved = int(last.get("step", 0)), newest_step(run)
    rates = [line["perf/tokens_per_sec"] for line in steps[-_RATE_STEPS:] if line.get("perf/tokens_per_sec")]
    rate = median(rates) if rates else None
    sign = _last_sign(run, attempts)
    state = _state(run, attempts, step, num_steps, sign, time.time() if now is None else now)
    eta = None
    if state == "running" and rate and num_steps:
        eta = (plan["num_tokens"] - last["tokens_seen"]) / rate
    return RunStatus(
        name=path.resolve().name,
        path=str(path),
        state=state,
        step=step,
        num_steps=num_steps,
        saved_step=saved,
        loss=last.get("train/loss"),
        tokens_per_sec=rate,
        eta_sec=eta,
        last_sign_unix_sec=sign,
        attempts=attempts,
    )


def format_status(runs: Sequence[RunStatus], *, detailed: bool) -> str:
    """A table of the runs, and with `detailed` their attempts below."""
    if not runs:
        return "no runs"
    rows = [("RUN", "STATE", "STEP", "SAVED", "LOSS", "TOKENS/S", "ETA", "ATTEMPTS")]
    for run in runs:
        rows.append(
            (
                run.name,
                run.state,
                f"{run.step}/{run.num_steps}" if run.num_steps else str(run.step),
                str(run.saved_step),
                f"{run.loss:.4f}" if isinstance(run.loss, float) else "-",
                format_count(round(run.tokens_per_sec)) if run.tokens_per_sec else "-",
                format_duration(run.eta_sec) if run.eta_sec is not None else "-",
                str(len(run.attempts)),
            )
        )
    lines = [align_columns(rows)]
    if detailed:
        lines += [_attempt_line(attempt) for run in runs for attempt in run.attempts]
    return "\n".join(lines)


def _attempt_line(attempt: dict[str, Any]) -> str:
    job = f"  job {attempt['job_id']}, start {attempt['restarts'] + 1}" if attempt["job_id"] else ""
    hosts = f"  on {','.join(attempt['hosts'])}" if attempt["hosts"] else ""
    code = f" (exit code {attempt['exit_code']})" if attempt["exit_code"] is not None else ""
    return f"  attempt {attempt['attempt']}: {attempt['status'] or 'no end'}{code}{job}{hosts}"


def _read_attempt(run: RunDirectory, number: int) -> dict[str, Any]:
    folder = run.attempt(number)
    outcome, job = read_outcome(folder), read_json(folder / JOB) or {}
    environment = read_json(folder / "environment.json") or {}
    host = environment.get("host")
    return {
        "attempt": number,
        "status": outcome and outcome.status,
        "exit_code": outcome and outcome.exit_code,
        "ended_unix_sec": outcome and outcome.unix_time,
        "job_id": job.get("job_id"),
        "restarts": job.get("restarts", 0),
        "hosts": job.get("hosts") or ([host] if host else []),
    }


def _state(
    run: RunDirectory, attempts: list[dict[str, Any]], step: int, num_steps: int | None, sign: float | None, now: float
) -> str:
    if not attempts:
        return "new"
    status = attempts[-1]["status"]
    if status in (FINISHED, COMPLETE) or (read_json(run.results) is not None and step == num_steps):
        return "finished"
    if status is not None:
        return str(status)
    return "running" if sign is not None and now - sign < _SILENT_SEC else "silent"


def _last_sign(run: RunDirectory, attempts: list[dict[str, Any]]) -> float | None:
    """When the newest attempt last wrote something."""
    if not attempts:
        return None
    folder = run.attempt(attempts[-1]["attempt"])
    paths = [folder, run.metrics, run.checkpoints, *folder.glob("*"), *folder.glob("nodes/*")]
    times = [path.stat().st_mtime for path in paths if path.exists()]
    return max(times, default=None)


def _is_run(path: Path) -> bool:
    return any((path / name).exists() for name in ("attempts", "submissions", "contract.json"))
