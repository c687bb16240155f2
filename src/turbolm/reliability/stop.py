"""Requests to stop: who asks, which starts of a run a request counts for, how a rank notices. Torch-free.

    <run>/stop               `turbolm stop` (or `touch`): every start of the run there is, queued jobs included
    <run>/attempts/<n>/stop  that attempt alone: Ctrl-C or TERM at its launcher, Slurm's warning of a time limit

Nobody removes <run>/stop: another job of the run may have yet to see it. Each start notes what the file was when the
start began (`Seen`) and obeys only what came later. A job begins when it is submitted.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from turbolm.files import read_json, write_json

# INT: Ctrl-C. TERM: schedulers and launchers. USR2: Slurm's warning before the time limit (NCCL uses USR1 itself).
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
_ONE_REQUEST_SEC = 1.0  # a signal to a process group reaches a process twice where its parent passes it on
_BY_USER = "user\n"


@dataclass(frozen=True)
class Seen:
    """What a stop file was at some time: size, and time of change by its file system's clock; -1: not there."""

    size: int = -1
    mtime_ns: int = -1


def look(stop_file: Path) -> Seen:
    """What the stop file is now."""
    try:
        status = stop_file.stat()
    except OSError:
        return Seen()
    return Seen(status.st_size, status.st_mtime_ns)


def asked_since(stop_file: Path, seen: Seen) -> bool:
    """Whether somebody asked after the file was `seen`.

    Neither size nor time ever go back, so a host whose network file system still shows an older state is not misled.
    """
    now = look(stop_file)
    return now.size > seen.size or (now.mtime_ns > seen.mtime_ns and now.size >= 0)


def ask_to_stop(stop_file: Path) -> None:
    """Ask all starts of a run that there are to save and stop for good. Raises OSError."""
    with stop_file.open("a", encoding="utf-8") as file, suppress(OSError):
        file.write(_BY_USER)  # nothing can be written to a full disk, but the time of change counts as well
        file.flush()
    os.utime(stop_file)


def write_seen(path: Path, seen: Seen) -> None:
    """Keep beside a job's script what had been asked before the job was submitted."""
    write_json(path, asdict(seen))


def read_seen(path: Path) -> Seen:
    """What `write_seen` kept; for a job of an earlier version, that nothing had been asked."""
    try:
        return Seen(**(read_json(path) or {}))
    except TypeError:
        return Seen()


class StopRequest:
    """Whether this process was asked to stop. A second request does not interrupt the saving that follows the first."""

    def __init__(self, run_stop_file: Path, seen: Seen):
        self._run_stop_file, self._seen = run_stop_file, seen
        self._own_stop_file: Path | None = None
        self._signalled: str | None = None

    def listen(self) -> None:
        """Take the signals over from whatever handled them before."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def join(self, seen: Seen, attempt_stop_file: Path) -> None:
        """From now on obey what all ranks of the attempt obey."""
        self._seen, self._own_stop_file = seen, attempt_stop_file

    def request(self, reason: str) -> None:
        """Ask from within the process; from any thread."""
        self._signalled = self._signalled or reason

    @property
    def seen(self) -> Seen:
        """What had been asked of the run when this start of it began."""
        return self._seen

    @property
    def reason(self) -> str | None:
        """What asked this process to stop, or None."""
        if self._signalled:
            return self._signalled
        if self._own_stop_file is not None and self._own_stop_file.exists():
            return f"the file {self._own_stop_file}"
        return f"the file {self._run_stop_file}" if asked_since(self._run_stop_file, self._seen) else None

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._signalled = signal.Signals(number).name


class SignalRequests:
    """Within `with`: stop signals call `first` with the signal's number, and `again` at every further request."""

    def __init__(self, first: Callable[[int], None], again: Callable[[int], None]):
        self._first, self._again = first, again
        self._asked_sec: float | None = None

    def __enter__(self) -> SignalRequests:
        self._before = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_sec is None:
            self._asked_sec = now
            self._first(number)
        elif now - self._asked_sec > _ONE_REQUEST_SEC:
            self._again(number)
