"""Requests to stop: signals and a stop file, noticed by any rank, agreed on by all."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

# INT: Ctrl-C. TERM: schedulers and launchers. USR2: Slurm's warning before the time limit (NCCL uses USR1 itself).
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class StopRequest:
    """Whether this process was asked to stop. A second request does not interrupt the saving that follows the first."""

    def __init__(self, stop_file: Path):
        self._stop_file = stop_file
        self._signalled: str | None = None

    def listen(self) -> None:
        """Take the signals over from whatever handled them before."""
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    @property
    def reason(self) -> str | None:
        """What asked this process to stop, or None."""
        if self._signalled:
            return self._signalled
        return f"the file {self._stop_file}" if self._stop_file.exists() else None

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._signalled = signal.Signals(number).name
