"""Find the rank that a job hangs on. Torch-free.

Training is synchronous: when one rank stops, all others wait for it in their next collective operation, and all look
alike from outside. What tells them apart, strongest first: a stopped process, an interpreter that runs no Python code,
a place in the program that the others have passed, a collective operation that the others have entered, a stack that
does not wait for others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from turbolm.reliability.collectives import in_words
from turbolm.reliability.heartbeat import SAVED_HERE
from turbolm.units import format_duration

_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$')
_WAITS_FOR_OTHERS = ("/torch/distributed/", "/deepspeed/comm/")  # where a collective operation is called
_INNERMOST_FRAMES = 12
_HELD_SEC = 2.0  # a thread that only notes the time has not run for so long


@dataclass(frozen=True)
class RankState:
    """A rank as its host's watchdog found it; `frames` are those of its main thread, innermost first."""

    rank: int
    host: str
    pid: int
    phase: str
    step: int  # finished ones
    progress: int
    silent_sec: float
    process_state: str  # as `ps` shows it; "" when the process has died
    frames: tuple[str, ...] = ()
    python_silent_sec: float = 0.0  # since a thread of it has run
    collectives: Sequence[dict[str, Any]] = ()  # by process group, as `collectives.summarize` tells

    def __str__(self) -> str:
        where = f", at {self.frames[0]}" if self.frames else ""
        what = {"": "; the process has died", "T": "; the process is stopped", "t": "; a debugger stopped it"}
        what["D"] = "; the process waits for a device or a file system"
        return (
            f"rank {self.rank} on {self.host} (process {self.pid}): {self.phase}, after step {self.step}, "
            f"no sign for {format_duration(self.silent_sec)}{what.get(self.process_state, '')}{where}{self.holds}"
        )

    @property
    def holds(self) -> str:
        """What its flight recorder holds, to be appended to a line."""
        words = in_words(self.collectives)
        return f"; {words}" if words else ""


@dataclass(frozen=True)
class Verdict:
    """The ranks that hang, or none where nothing tells them apart, and how that is known."""

    culprits: tuple[int, ...]
    reason: str


def judge(ranks: Sequence[RankState]) -> Verdict:
    """Tell the ranks that hang from those that wait for them."""
    furthest, least = max(rank.progress for rank in ranks), min(rank.progress for rank in ranks)
    certain = (
        ("has died", lambda rank: rank.process_state == ""),
        ("is stopped (SIGSTOP, or a debugger)", lambda rank: rank.process_state in ("T", "t")),
        ("runs no Python code: a thread holds the GIL", lambda rank: rank.python_silent_sec > _HELD_SEC),
    )
    differences = (
        ("has not come as far as the others", lambda rank: rank.progress == least < furthest),
        ("has not entered a collective operation that others are in", lambda rank: _is_behind(rank, ranks)),
        ("is saving, and the others wait for it", lambda rank: rank.phase != SAVED_HERE),
        ("waits for no other rank", lambda rank: bool(rank.frames) and not waits_for_others(rank.frames)),
        ("waits for a device or a file system", lambda rank: rank.process_state == "D"),
    )
    for reason, holds in certain:
        if found := tuple(rank.rank for rank in ranks if holds(rank)):
            return Verdict(found, reason)
    if len(ranks) == 1:
        return Verdict((ranks[0].rank,), "goes no further")
    for reason, holds in differences:
        found = tuple(rank.rank for rank in ranks if holds(rank))
        if found and len(found) < len(ranks):
            return Verdict(found, reason)
    return Verdict((), "all these ranks are at the same place, or wait for ranks on other hosts")


def _is_behind(rank: RankState, ranks: Sequence[RankState]) -> bool:
    """Whether others have entered more collective operations of a process group that this rank is in."""
    entered = {group["group"]: group["entered"] for group in rank.collectives}
    return any(
        group["entered"] > entered.get(group["group"], group["entered"])
        for other in ranks
        for group in other.collectives
    )


def waits_for_others(frames: Sequence[str]) -> bool:
    """Whether a stack is inside a collective operation of torch or DeepSpeed."""
    return any(part in frame for frame in frames[:_INNERMOST_FRAMES] for part in _WAITS_FOR_OTHERS)


def main_thread_frames(stacks: str) -> tuple[str, ...]:
    """The frames of the main thread, which faulthandler writes last, as `function (file:line)`, innermost first."""
    frames: list[str] = []
    for line in stacks.splitlines():
        match = _FRAME.match(line)
        if match is not None:
            frames.append(f"{match[3]} ({match[1]}:{match[2]})")
        elif line.strip().endswith("(most recent call first):"):
            frames.clear()
    return tuple(frames)
