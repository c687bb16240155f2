"""The attempts of a run: where each ran, when, how long, and how it ended. Torch-free."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbolm.files import read_json
from turbolm.report.metrics import Line, is_number, step_seconds
from turbolm.units import format_duration

HEAD = ("attempt", "host", "started (UTC)", "duration", "steps", "in steps", "outcome", "turbolm")


@dataclass(frozen=True)
class Attempt:
    """One start of a run; None where its files do not tell, as those of earlier versions."""

    number: int
    hosts: tuple[str, ...]
    started_unix_sec: float | None
    ended_unix_sec: float | None
    status: str | None  # None while it runs, and where it was killed
    message: str
    first_step: int | None
    last_step: int | None
    training_sec: float  # of its steps
    environment: dict[str, Any]

    @property
    def code(self) -> str:
        """Return the version of turbolm and the git commit it ran from."""
        commit, dash, dirty = str(self.environment.get("git_commit") or "").partition("-")
        return f"{self.environment.get('turbolm') or ''} {commit[:12]}{dash}{dirty}".strip() or "–"

    @property
    def duration_sec(self) -> float | None:
        """Return how long it ran."""
        if self.started_unix_sec is None or self.ended_unix_sec is None:
            return None
        return max(0.0, self.ended_unix_sec - self.started_unix_sec)

    def row(self) -> list[str]:
        """Return its cells under `HEAD`."""
        started = "–"
        if self.started_unix_sec is not None:
            started = time.strftime("%Y-%m-%d %H:%M", time.gmtime(self.started_unix_sec))
        steps = "none logged" if self.first_step is None else f"{self.first_step:,} to {self.last_step:,}"
        outcome = ": ".join(filter(None, [self.status, self.message.partition("\n")[0]])) or "no end recorded"
        return [
            str(self.number),
            ", ".join(self.hosts) or "–",
            started,
            "–" if self.duration_sec is None else format_duration(self.duration_sec),
            steps,
            format_duration(self.training_sec) if self.training_sec else "–",
            outcome,
            self.code,
        ]


def read_attempts(run_dir: Path, lines: Sequence[Line]) -> list[Attempt]:
    """The attempts of a run, oldest first; `lines` are those of its metrics.jsonl, repeated steps included."""
    steps: dict[int, list[int]] = {number: [] for number in attempt_numbers(run_dir)}
    seconds: dict[int, float] = {}
    for line in lines:
        if "train/loss" in line:
            number = line["attempt"]
            steps.setdefault(number, []).append(line["step"])
            seconds[number] = seconds.get(number, 0.0) + (step_seconds(line) or 0.0)
    return [
        _read(run_dir / "attempts" / str(number), number, logged, seconds.get(number, 0.0))
        for number, logged in sorted(steps.items())
    ]


def attempt_numbers(run_dir: Path) -> list[int]:
    """The numbers of the attempts that have a folder, oldest first."""
    return sorted(int(path.name) for path in (run_dir / "attempts").glob("*") if path.name.isdecimal())


def hosts_of(folder: Path) -> list[str]:
    """The hosts of the attempt in this folder: those of its Slurm job, or the one that it was started on."""
    of_job = (read_json(folder / "slurm.json") or {}).get("hosts")
    if isinstance(of_job, list) and of_job:
        return list(map(str, of_job))
    starter = (read_json(folder / "start.json") or {}).get("starter")
    known = [(read_json(folder / "environment.json") or {}).get("host")]
    known.append(starter.get("host") if isinstance(starter, dict) else None)
    return [str(host) for host in known if host][:1]


def _read(folder: Path, number: int, steps: Sequence[int], training_sec: float) -> Attempt:
    start, outcome = (read_json(folder / name) or {} for name in ("start.json", "outcome.json"))
    environment = read_json(folder / "environment.json") or {}
    started = start.get("unix_time", (read_json(folder / "start-up.json") or {}).get("begun"))
    ended, status = outcome.get("unix_time"), outcome.get("status")
    return Attempt(
        number=number,
        hosts=tuple(hosts_of(folder)),
        started_unix_sec=float(started) if is_number(started) and 0 <= started < 2**40 else None,
        ended_unix_sec=float(ended) if is_number(ended) else None,
        status=str(status) if status else None,
        message=str(outcome.get("message") or ""),
        first_step=min(steps, default=None),
        last_step=max(steps, default=None),
        training_sec=training_sec,
        environment=environment,
    )
