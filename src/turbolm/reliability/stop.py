"""Requests to stop: signals and a stop file, noticed by any rank, agreed on by all."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

# INT: Ctrl-C. TERM: schedulers and launchers. USR2: Slurm's warning before the time limit (NCCL uses USR1 itself).
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


_BY_USER = "user\n"  # in the stop file: who asked decides whether a Slurm job starts again


def ask_to_stop(stop_file: Path) -> None:
    """Ask a run to save and stop for good, as `turbolm stop` does."""
    with stop_file.open("a", encoding="utf-8") as file:
        file.write(_BY_USER)


def asked_by_user(stop_file: Path) -> bool:
    """Whether `ask_to_stop` was among those that left the stop file."""
    try:
        return _BY_USER in stop_file.read_text(encoding="utf-8")
    except OSError:
        return False


class StopRequest:
    """Whether this process was asked to stop. A second request does not interrupt the saving that follows the first."""

    def __init__(self, stop_file: Path):
        self._stop_file = stop_file
        self._signalled: str | None = None

    def listen(self) -> None:
        """Take the signals over from whatever handled them before."""
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    def request(self, reason: str) -> None:
        """Ask from within the process; from any thread."""
        self._signalled = self._signalled or reason

    @property
    def reason(self) -> str | None:
        """What asked this process to stop, or None."""
        if self._signalled:
            return self._signalled
        return f"the file {self._stop_file}" if self._stop_file.exists() else None

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._signalled = signal.Signals(number).name
