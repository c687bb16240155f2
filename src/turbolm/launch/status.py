"""Read the status of a run from its directory: attempts, progress, remaining time. Torch-free.

Slurm is asked only about jobs that have neither started nor ended, where it can be (`queue`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from turbolm.errors import EXIT_REQUEUE, UserError, explain_os_error
from turbolm.files import read_json
from turbolm.launch.job import JOB, newest_step
from turbolm.launch.queue import find_queued
from turbolm.reliability.outcome import COMPLETE, FINISHED, REFUSED, read_outcome
from turbolm.reliability.run_lock import RunLock, is_gone, this_process
from turbolm.reliability.stop import ask_to_stop
from turbolm.report.attempts import attempt_numbers, hosts_of
from turbolm.report.metrics import is_number, read_lines
from turbolm.report.runs import is_run
from turbolm.train.run_directory import RunDirectory, starter_of
from turbolm.units import align_columns, format_count, format_duration

_SILENT_SEC = 900  # an attempt that neither ended nor wrote anything for that long was probably killed
_RATE_STEPS = 50  # steps whose median speed gives the remaining time


@dataclass(frozen=True)
class RunStatus:
    """One run. `state`: new, running, finished; killed; silent (on another host; it may have been killed); or how its
    last attempt ended: stopped, failed, hung, lost, refused."""

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
    waiting_jobs: list[str]
    job_trouble: str | None  # why the newest job ended before it opened an attempt


def find_runs(runs_dir: Path) -> list[Path]:
    """The run directories in a folder, by name."""
    if not runs_dir.is_dir():
        raise UserError(f"{runs_dir} is not there; name the folder of the runs with --runs")
    return sorted(path for path in runs_dir.iterdir() if is_run(path))


def read_status(path: Path, now: float | None = None) -> RunStatus:
    """The status of the run in `path`. Raises UserError when there is none."""
    if not is_run(path):
        raise UserError(f"{path} is not a run directory")
    run = RunDirectory(path)
    attempts = [_read_attempt(run, number) for number in attempt_numbers(path)]
    steps = [line for line in read_lines(run.metrics) if "train/loss" in line]
    last = steps[-1] if steps else {}
    plans = (read_json(run.attempt(one["attempt"]) / "plan.json") for one in attempts[::-1])
    plan = next((one for one in plans if one and is_number(one.get("num_steps"))), {})
    num_steps = plan.get("num_steps")
    step, saved = int(last.get("step", 0)), newest_step(run)
    rates = [rate for line in steps[-_RATE_STEPS:] if is_number(rate := line.get("perf/tokens_per_sec")) and rate > 0]
    rate = median(rates) if rates else None
    sign, (waiting, trouble) = _last_sign(run, attempts), find_queued(run)
    silent_sec = (time.time() if now is None else now) - (sign or 0.0)
    state = _state(run, attempts, step == num_steps, trouble, silent_sec)
    total, seen, eta = plan.get("num_tokens"), last.get("tokens_seen"), None
    if state == "running" and rate and is_number(total) and is_number(seen):
        eta = (total - seen) / rate
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
        waiting_jobs=waiting,
        job_trouble=trouble,
    )


def stop_run(path: Path) -> str:
    """Ask every start of a run that there is to save and stop; returns what to tell. Raises UserError.

    Refused where nothing could obey: no process trains the run, and no job waits to.
    """
    status = read_status(path)
    last = status.attempts[-1] if status.attempts else None
    comes_back = last is not None and last["exit_code"] == EXIT_REQUEUE and last["job_id"] is not None
    if status.state not in ("running", "silent") and not status.waiting_jobs and not comes_back:
        how = f"; its last attempt: {status.state}" if last else ""
        raise UserError(f"{path}: nothing to stop: no process trains it and no job waits{how}")
    stop_file = RunDirectory(path).stop_file
    try:
        ask_to_stop(stop_file)
    except OSError as error:
        raise UserError(f"{stop_file} cannot be written: {explain_os_error(error)}") from None
    lines = []
    if status.state in ("running", "silent"):
        lines.append(f"{path}: asked to stop after the current step (last seen: {status.state}, step {status.step})")
    elif comes_back and last is not None:
        lines.append(f"{path}: job {last['job_id']} will not train when Slurm starts it again")
    for job in status.waiting_jobs:
        lines.append(f"{path}: {job} will not train when Slurm starts it; `scancel` takes it out of the queue now")
    return "\n".join(lines)


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
        lines += [f"  {job} waits in the queue" for run in runs for job in run.waiting_jobs]
    lines += [line for run in runs for line in _trouble_lines(run)]
    return "\n".join(lines)


def _attempt_line(attempt: dict[str, Any]) -> str:
    job = f"  job {attempt['job_id']}, start {attempt['restarts'] + 1}" if attempt["job_id"] else ""
    hosts = f"  on {','.join(attempt['hosts'])}" if attempt["hosts"] else ""
    code = f" (exit code {attempt['exit_code']})" if attempt["exit_code"] is not None else ""
    return f"  attempt {attempt['attempt']}: {attempt['status'] or 'no end'}{code}{job}{hosts}"


def _trouble_lines(run: RunStatus) -> list[str]:
    """Why the last attempt did not go well, and where it logged; or why a job ended before it opened one."""
    if run.job_trouble is not None and run.state != "running":
        return [f"{run.name}: {run.job_trouble}"]
    if run.state in ("new", "running", "finished", "stopped") or not run.attempts:
        return []
    last = run.attempts[-1]
    reason = [line for line in str(last["reason"] or "").splitlines() if not line.startswith("logs: ")]
    first = ": ".join([f"{run.name}: attempt {last['attempt']} {run.state}", *reason[:1]])
    return [first, *(f"  {line}" for line in reason[1:]), f"  log: {last['log']}"]


def _read_attempt(run: RunDirectory, number: int) -> dict[str, Any]:
    folder = run.attempt(number)
    outcome, job = read_outcome(folder), read_json(folder / JOB) or {}
    restarts = job.get("restarts", 0)
    return {
        "attempt": number,
        "status": outcome and outcome.status,
        "exit_code": outcome and outcome.exit_code,
        "ended_unix_sec": outcome and outcome.unix_time,
        "job_id": job.get("job_id"),
        "restarts": restarts if isinstance(restarts, int) else 0,
        "hosts": hosts_of(folder),
        "reason": outcome and outcome.message,
        "log": str(_log_of(folder)),
    }


def _log_of(folder: Path) -> Path:
    """The log to read first: of rank 0, or of the launcher where no rank has begun."""
    logs = [folder / "log.rank0.txt", folder / "launcher.log", folder / "launcher.node0.log"]
    return next((path for path in logs if path.exists()), folder)


def _state(
    run: RunDirectory,
    attempts: list[dict[str, Any]],
    is_trained: bool,
    trouble: str | None,
    silent_sec: float,
) -> str:
    if not attempts:
        return "new" if trouble is None else REFUSED
    status, me = attempts[-1]["status"], this_process()
    holder = RunLock(run.path).holder()
    gone = None if holder is None else is_gone(holder, me)
    if gone is False:
        return "running"
    if status in (FINISHED, COMPLETE) or (read_json(run.results) is not None and is_trained):
        return "finished"
    if status is not None:
        return str(status)
    starter = starter_of(run.attempt(attempts[-1]["attempt"]))
    starter_gone = None if starter is None else is_gone(starter, me)
    if starter_gone is False:
        return "running"  # preparing, starting, or just ended
    if gone or starter_gone:
        return "killed"
    return "running" if silent_sec < _SILENT_SEC else "silent"


def _last_sign(run: RunDirectory, attempts: list[dict[str, Any]]) -> float | None:
    """When the newest attempt last wrote something."""
    if not attempts:
        return None
    folder = run.attempt(attempts[-1]["attempt"])
    paths = [RunLock(run.path).path, folder, run.metrics, run.checkpoints, *folder.glob("*"), *folder.glob("nodes/*")]
    times = []
    for path in paths:
        with suppress(OSError):  # gone meanwhile
            times.append(path.stat().st_mtime)
    return max(times, default=None)
