"""Where the time between the start of a rank's process and its first step goes. Rank 0 leaves it in the attempt."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from turbolm.files import write_json
from turbolm.reliability.processes import start_time

START_TIMES = "start-up.json"  # of an attempt
_marks: list[tuple[str, float, float]] = []  # what ended, when, and the processor time of this process until then
_begun: list[float] = []  # a process that trains several runs begins once


def mark(part: str) -> None:
    """Note that a part of the start-up has ended."""
    if not _begun:
        _begun.extend((_process_start(), 0.0))
    _marks.append((part, time.time(), time.process_time()))


def first_step_done(attempt_folder: Path, rank: int) -> None:
    """End the last part with the first step of this start; costs nothing after later ones."""
    if not _marks:
        return
    mark("first step")
    begun, (before, cpu_before) = _begun[0], _begun
    seconds: dict[str, float] = {}
    cpu_seconds: dict[str, float] = {}
    for part, when, cpu in _marks:  # random restarts build several engines
        seconds[part] = seconds.get(part, 0.0) + when - before
        cpu_seconds[part] = cpu_seconds.get(part, 0.0) + cpu - cpu_before
        before, cpu_before = when, cpu
    _begun[:] = before, cpu_before
    _marks.clear()
    if rank == 0:
        told = {"begun": begun, "ended": before, "seconds": seconds, "cpu_seconds": cpu_seconds}
        with contextlib.suppress(OSError):  # a full disk: training goes on
            write_json(attempt_folder / START_TIMES, told)


def _process_start() -> float:
    """When this process was started, in Unix time; now where /proc does not tell."""
    ticks = start_time(os.getpid())
    if ticks is None:
        return time.time()
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + int(ticks) / os.sysconf("SC_CLK_TCK")
