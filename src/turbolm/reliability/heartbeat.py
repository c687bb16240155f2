"""Heartbeats: each rank records where it is, on its own host, and the watchdog beside it reads that. Torch-free.

Only the main thread writes a heartbeat, so a process that is stopped, or whose interpreter is held, falls silent by
itself. It is a record in a memory-mapped file and costs a few microseconds. Beside it a thread records that Python code
runs at all, which tells a rank whose interpreter is held from one that waits.
"""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import os
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TextIO

from turbolm.files import temporary, write_json
from turbolm.reliability.collectives import recorded
from turbolm.reliability.processes import start_time

STARTING = "start-up"  # until the first step is done
STEP = "step"
EVALUATION = "evaluation"
SAVING = "saving"
SAVED_HERE = "waiting for the other ranks to save"
COMPILING = "compiling"
EXPORTING = "exporting"
ENDED = "ended"

# Writes the Python stacks of all threads. A real-time signal that nothing else uses: NCCL has USR1, Slurm USR2, and
# glibc the first two of these.
STACKS_SIGNAL = signal.SIGRTMIN + 11

_RECORD = struct.Struct("<IIQQdI44s")
_PYTHON_RUNS = struct.Struct("<d")  # after the record
_PYTHON_RUNS_SEC = 0.5
ASK = "ask"  # a file by which the watchdog asks all ranks what their flight recorders hold


@dataclass(frozen=True)
class Sign:
    """The last heartbeat of a rank. `progress` counts places that all ranks pass in the same order."""

    pid: int
    rank: int
    progress: int
    step: int  # finished ones
    time_sec: float  # on the host's monotonic clock
    attempt: int  # 0 while it is not known
    phase: str
    python_ran_sec: float = 0.0  # when a thread of it last ran, on the same clock


@dataclass
class _Heartbeat:
    """This rank's heartbeat; it goes to private memory while nobody watches."""

    memory: bytearray | mmap.mmap = field(default_factory=lambda: bytearray(_RECORD.size + _PYTHON_RUNS.size))
    rank: int = 0
    progress: int = 0
    step: int = 0
    attempt: int = 0
    phase: str = STARTING
    stacks: TextIO | None = None

    def write(self) -> None:
        place = (self.progress, self.step, time.monotonic(), self.attempt, self.phase.encode())
        _RECORD.pack_into(self.memory, 0, os.getpid(), self.rank, *place)


_own = _Heartbeat()
_notes = 0  # of threads beside the main one
_others_awaited = False  # whether such a thread waits for other ranks
_JOIN_SEC = 0.5


def start(folder: Path, rank: int) -> None:
    """Write heartbeats to `folder` from now on, and stacks when asked."""
    place = _with_room(folder)
    _own.stacks = stacks_file(place, rank).open("w", encoding="utf-8")
    faulthandler.register(STACKS_SIGNAL, file=_own.stacks, all_threads=True, chain=False)
    path = place / f"{rank}.sign"
    with temporary(path).open("w+b") as file:
        _reserve(file)
        _own.memory, _own.rank = mmap.mmap(file.fileno(), 0), rank
    beat()
    threading.Thread(target=_answer, args=(folder, rank), name="turbolm-heartbeat", daemon=True).start()
    temporary(path).replace(path)  # whoever reads finds a whole one
    if place != folder:
        for file_there in (stacks_file(place, rank), path):
            link = folder / file_there.name
            temporary(link).unlink(missing_ok=True)
            temporary(link).symlink_to(file_there)
            temporary(link).replace(link)


def _with_room(folder: Path) -> Path:
    """Return the folder, or a new one among the temporary files, with a line that says why. Raises OSError.

    A link takes no room in a full tmpfs, so the folder can still name the files.
    """
    probe = folder / f"{os.getpid()}.probe"
    try:
        with probe.open("wb") as file:
            _reserve(file)
        return folder
    except OSError as error:
        place = Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))
        print(
            f"turbolm: heartbeats are in {place}: {folder} has no room: {error.strerror}", file=sys.stderr, flush=True
        )
        return place
    finally:
        probe.unlink(missing_ok=True)


def _reserve(file: IO[bytes]) -> None:
    """Give the file its size and its room: where a full disk has a hole, writing to the map kills the process."""
    os.posix_fallocate(file.fileno(), 0, len(_own.memory))


def remove(folder: Path) -> None:
    """Remove what the ranks of this host wrote."""
    for path in folder.glob("*.sign"):
        if path.is_symlink():
            shutil.rmtree(path.readlink().parent, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


def _answer(folder: Path, rank: int) -> None:
    """Note that Python code runs, for ever, and write what the flight recorder holds once that is asked for."""
    is_asked = False
    while True:
        _PYTHON_RUNS.pack_into(_own.memory, _RECORD.size, time.monotonic())
        if not is_asked and (folder / ASK).exists():
            is_asked = True
            with contextlib.suppress(Exception):  # whatever torch or a full disk says: the job is being ended
                write_json(collectives_file(folder, rank), recorded())
        time.sleep(_PYTHON_RUNS_SEC)


def beat() -> None:
    """Report progress on this rank. Call it from the main thread only."""
    _own.write()


def advance(phase: str | None = None, step: int | None = None) -> None:
    """Report a place that all ranks pass in the same order; it may start another phase, or end a step."""
    _own.progress += 1
    _own.phase = _own.phase if phase is None else phase
    _own.step = _own.step if step is None else step
    _own.write()


def set_attempt(attempt: int) -> None:
    """Say which attempt of the run this is."""
    _own.attempt = attempt
    _own.write()


def attempt() -> int:
    """Which attempt of the run this is; 0 while that is not known."""
    return _own.attempt


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """A part of the run that may take longer; afterwards the phase before it continues."""
    before = change_phase(name)
    try:
        yield
    finally:
        change_phase(before)


def change_phase(name: str) -> str:
    """Start another phase; returns the one before."""
    before, _own.phase = _own.phase, name
    _own.write()
    return before


def note() -> None:
    """Report progress of this thread, for which the main thread may be waiting."""
    global _notes
    _notes += 1


@contextlib.contextmanager
def awaiting_others() -> Iterator[None]:
    """This thread waits for other ranks, and the main thread may be waiting for it."""
    global _others_awaited
    _others_awaited = True
    try:
        yield
    finally:
        _others_awaited = False


def join(thread: threading.Thread, timeout_sec: float | None = None) -> None:
    """Wait for a saving thread, with a heartbeat whenever that thread has reported progress."""
    end = None if timeout_sec is None else time.monotonic() + timeout_sec
    seen, waited = _notes, _others_awaited
    with phase(SAVED_HERE if waited else SAVING):
        while thread.is_alive() and (end is None or time.monotonic() < end):
            thread.join(_JOIN_SEC if end is None else min(_JOIN_SEC, max(end - time.monotonic(), 0)))
            if (seen, waited) != (_notes, _others_awaited):
                seen, waited = _notes, _others_awaited
                change_phase(SAVED_HERE if waited else SAVING)


def host_folder() -> Path:
    """Where the ranks that one launcher started on this host keep their heartbeats; private to the user.

    They have their parent in common, and nothing needs to be passed on to them; one that is alone needs nobody to find
    it. Raises OSError.
    """
    parent = os.getpid() if os.environ.get("WORLD_SIZE", "1") == "1" else os.getppid()
    name = f"turbolm-{os.geteuid()}-{parent}-{start_time(parent) or 0}-{os.environ.get('MASTER_PORT', '0')}"
    folder = Path("/dev/shm") / name
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError:  # there is none, it is read-only, or it has no room even for a name
        folder = Path(tempfile.gettempdir()) / name
        folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.lstat()
    if folder.is_symlink() or about.st_uid != os.geteuid() or about.st_mode & 0o077:
        raise PermissionError(f"{folder} belongs to somebody else")
    return folder


def read_signs(folder: Path) -> list[Sign]:
    """The last heartbeat of every rank on this host, by rank."""
    signs = []
    for path in folder.glob("*.sign"):
        try:
            content = path.read_bytes()
            pid, rank, progress, step, time_sec, attempt, text = _RECORD.unpack_from(content)
            (python_ran_sec,) = _PYTHON_RUNS.unpack_from(content, _RECORD.size)
        except (OSError, struct.error):
            continue
        phase = text.rstrip(b"\0").decode()
        signs.append(Sign(pid, rank, progress, step, time_sec, attempt, phase, python_ran_sec))
    return sorted(signs, key=lambda sign: sign.rank)


def stacks_file(folder: Path, rank: int) -> Path:
    """Where a rank writes its stacks."""
    return folder / f"{rank}.stacks"


def collectives_file(folder: Path, rank: int) -> Path:
    """Where a rank writes what its flight recorder holds."""
    return folder / f"{rank}.collectives"
