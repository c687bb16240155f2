"""Where the time between the start of a rank's process and its first step goes. Rank 0 leaves it in the attempt."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from turbolm.files import write_json
from turbolm.reliability.processes import start_time

START_TIMES = "start-up.json"  # of an attempt
_marks: list[tuple[str, float]] = []  # what ended, and when
_begun: list[float] = []  # a process that trains several runs begins once


def mark(part: str) -> None:
    """Note that a part of the start-up has ended."""
    if not _begun:
        _begun.append(_process_start())
    _marks.append((part, time.time()))


def first_step_done(attempt_folder: Path, rank: int) -> None:
    """End the last part with the first step of this start; costs nothing after later ones."""
    if not _marks:
        return
    mark("first step")
    times = [_begun[0], *(when for _, when in _marks)]
    parts: dict[str, float] = {}
    for (part, end), begin in zip(_marks, times, strict=False):  # random restarts build several engines
        parts[part] = parts.get(part, 0.0) + end - begin
    _begun[0] = times[-1]
    _marks.clear()
    if rank == 0:
        with contextlib.suppress(OSError):  # a full disk: training goes on
            write_json(attempt_folder / START_TIMES, {"begun": times[0], "ended": times[-1], "seconds": parts})


def _process_start() -> float:
    """When this process was started, in Unix time; now where /proc does not tell."""
    ticks = start_time(os.getpid())
    if ticks is None:
        return time.time()
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + int(ticks) / os.sysconf("SC_CLK_TCK")
