"""What became of the jobs that `turbolm submit` queued and that have not started to train. Torch-free.

Their files tell, except where Slurm ended a job without a word: a time limit, a lost node, `scancel`. So Slurm is asked
about jobs that left neither a start nor an end, where it can be; elsewhere they are taken to wait.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from turbolm.errors import EXIT_REQUEUE
from turbolm.files import read_json
from turbolm.launch.slurm import SCRIPT, SEEN, STARTED, SUBMITTED
from turbolm.reliability.outcome import OUTCOME, read_outcome
from turbolm.reliability.stop import asked_since, read_seen
from turbolm.train.run_directory import RunDirectory

_GONE = "GONE"  # Slurm does not know the job any more: minutes after its end it forgets it (MinJobAge)
_PREPARED = "COMPLETED"
_ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT",
    "REVOKED", _GONE,
}  # fmt: skip
_ASK_TIMEOUT_SEC = 10
_LOG_TAIL_BYTES = 64 * 1024
_LAST_WORD = re.compile(
    r"^slurmstepd\S*: error: (\*\*\* .* CANCELLED .* \*\*\*|.*oom.kill.*)$", re.MULTILINE | re.IGNORECASE
)


@dataclass(frozen=True)
class _Queued:
    """A submission: its folder and its jobs; `prepare` is the job that prepares its data, if there is one."""

    folder: Path
    job: str | None
    prepare: str | None
    prepare_log: str | None

    @property
    def name(self) -> str:
        return f"job {self.job}" if self.job else f"a job of {self.folder / SCRIPT}, if there is one,"


def find_queued(run: RunDirectory) -> tuple[list[str], str | None]:
    """Return the jobs of a run that wait to start, in words, and why the newest one will not, or None."""
    folders = _submissions(run)
    open_ones = [one for one in map(_read, folders) if _may_wait(one, run)]
    states = ask_slurm({job for one in open_ones for job in (one.job, one.prepare) if job})
    waiting, trouble = [], None
    for one in open_ones:
        why = _why_not(one, states)
        if why is None:
            waiting.append(one.name + _waits_for(one, states))
        elif one.folder == folders[-1]:
            trouble = why
    return waiting, _told(folders[-1], states) or trouble if folders else None


def ask_slurm(jobs: Collection[str]) -> dict[str, str]:
    """Return the state of each job as squeue has it, `GONE` for one that it does not know; empty if it cannot be asked.

    A job array is in the state of one of its tasks that has not ended, if there is one.
    """
    if not jobs:
        return {}
    command = ["squeue", "--noheader", "--states=all", "--format=%F %T", f"--jobs={','.join(sorted(jobs))}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}  # filters
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_ASK_TIMEOUT_SEC, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    if done.returncode and "Invalid job id" not in done.stderr:
        return {}
    states = dict.fromkeys(jobs, _GONE)
    for job, _, state in (line.partition(" ") for line in done.stdout.splitlines()):
        if states.get(job) in (None, _GONE) or states[job] in _ENDED:
            states[job] = state.strip()
    return states


def _read(folder: Path) -> _Queued:
    record = read_json(folder / SUBMITTED) or {}
    prepare = record.get("prepare")
    prepare = prepare if isinstance(prepare, dict) else {}

    def number(value: object) -> str | None:
        return value if isinstance(value, str) and value.isdigit() else None

    log = prepare.get("log")
    return _Queued(folder, number(record.get("job_id")), number(prepare.get("job_id")), log and str(log))


def _may_wait(one: _Queued, run: RunDirectory) -> bool:
    """Whether its files tell neither that it started nor that it is over; one that was stopped may start again."""
    outcome = read_outcome(one.folder)
    is_over = (one.folder / OUTCOME).exists() and (outcome is None or outcome.exit_code != EXIT_REQUEUE)
    return not (is_over or (one.folder / STARTED).exists() or asked_since(run.stop_file, read_seen(one.folder / SEEN)))


def _why_not(one: _Queued, states: dict[str, str]) -> str | None:
    """Why Slurm will not start the job, or None while it may."""
    state, prepared = states.get(one.job or ""), states.get(one.prepare or "")
    if prepared in _ENDED - {_PREPARED, _GONE}:
        return f"{one.name} will not start: prepare job {one.prepare} ended as {prepared}{_last_words(one)}"
    if state not in _ENDED:
        return None
    how = "is not known to Slurm any more" if state == _GONE else f"ended as {state}"
    before = f", and neither is prepare job {one.prepare}" if prepared == _GONE == state else ""
    return f"{one.name} {how}{before}, and did not start to train{_last_words(one)}"


def _waits_for(one: _Queued, states: dict[str, str]) -> str:
    prepared = states.get(one.prepare or "")
    if one.prepare is None or prepared in (_PREPARED, _GONE):
        return ""
    return f" (after prepare job {one.prepare}{f', {prepared}' if prepared else ''})"


def _told(folder: Path, states: dict[str, str]) -> str | None:
    """What ended the job of a submission before it started, as it told itself, unless Slurm will start it again."""
    one, outcome = _read(folder), read_outcome(folder)
    if outcome is None or (folder / STARTED).exists():
        return None
    if outcome.exit_code == EXIT_REQUEUE and states.get(one.job or "", _GONE) not in _ENDED:
        return None
    log = f"\n  log: {one.prepare_log}" if outcome.message.startswith(f"prepare job {one.prepare}:") else ""
    name = one.name if one.job else f"job of {folder}"
    return f"{name} {outcome.status} before it started: {outcome.message}{log}"


def _last_words(one: _Queued) -> str:
    """What Slurm wrote at the end of the log of the job that prepares, and where that is."""
    if one.prepare_log is None:
        return ""
    try:
        with open(one.prepare_log, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - _LOG_TAIL_BYTES))
            found = _LAST_WORD.findall(file.read().decode("utf-8", errors="replace"))
    except OSError:
        found = []
    return "".join(f"\n  {line}" for line in [*found[-1:], f"log: {one.prepare_log}"])


def _submissions(run: RunDirectory) -> list[Path]:
    folders = [path for path in (run.path / "submissions").glob("[0-9]*") if path.name.isdigit()]
    return sorted(folders, key=lambda path: int(path.name))
