"""One writer for each run directory. Torch-free.

The lock is a file that names its holder and that the holder touches every few seconds. It is made by linking a
finished file to its name, which is atomic on network file systems as well. Whoever waits measures, on a clock of its
own that nobody sets, how long the file's time has not changed. What that time is does not matter: no clock need be
right.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from turbolm.errors import UserError
from turbolm.files import load_json, write_json
from turbolm.reliability.processes import start_time

HEARTBEAT_SEC = 10.0
SILENT_SEC = 90.0  # longer than a network file system may show an old time (NFS: 60 s)
ENDING_SEC = 10.0  # a holder on this host may be ending just now
_POLL_SEC = 0.2


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. `started` tells a process from a later one of the same number; `space` is its pid namespace."""

    token: str
    host: str
    boot: str
    space: str
    pid: int
    started: str
    job: str | None = None
    job_restarts: str | None = None

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


class RunLock:
    """The lock of a run directory, held by this process from `acquire` to `release`."""

    def __init__(self, run_folder: Path):
        self.path = run_folder / "lock.json"
        self._me = this_process()
        self._ended = threading.Event()
        self._others_since: dict[Path, float] = {}  # when another one was first seen to clear a stale lock

    def acquire(self) -> None:
        """Take the lock, clearing a stale one. Raises UserError when another process holds it."""
        while not self._link(self.path):
            stale = self.wait_until_free()
            if stale is not None:
                self._take_over(stale)
        self._ended.clear()
        threading.Thread(target=self._touch, name="turbolm-lock", daemon=True).start()

    def wait_until_free(self) -> Holder | None:
        """Return when nobody holds the lock; with the one that left it behind, if it is there. Raises UserError.

        Where only silence could show that the holder is gone, this waits until it has seen no sign for long enough.
        """
        since, first_sign, told = time.monotonic(), self._sign(), False
        while True:
            sign, holder = self._sign(), self.holder()
            if sign is None or holder is None:
                return None
            gone, waited_sec = is_gone(holder, self._me), time.monotonic() - since
            if gone or (gone is None and sign == first_sign and waited_sec > SILENT_SEC):
                return holder
            if sign != first_sign if gone is None else waited_sec > ENDING_SEC:
                run = self.path.parent
                raise UserError(f"{run} is in use by {holder}; stop that run first (`turbolm stop {run}`)")
            if not told:
                limit_sec = SILENT_SEC if gone is None else ENDING_SEC
                print(
                    f"turbolm: {self.path.parent} is locked by {holder}; waiting up to {limit_sec:.0f} s for it to end "
                    "or to give a sign of life",
                    file=sys.stderr,
                    flush=True,
                )
                told = True
            time.sleep(_POLL_SEC)

    def holder(self) -> Holder | None:
        """Who holds the lock; None when it is not there."""
        return _holder_in(self.path)

    def release(self) -> None:
        """Give the lock back, unless another process took it over."""
        self._ended.set()
        if self.is_held():
            self.path.unlink(missing_ok=True)

    def is_held(self) -> bool:
        """Whether the lock is still this process's own."""
        holder = _read(self.path)
        return holder is not None and holder.token == self._me.token

    def check(self) -> None:
        """Raise RuntimeError when another process took the lock over, taking this one for dead."""
        if not self.is_held():
            holder = _read(self.path)
            raise RuntimeError(f"the run directory was taken over by {holder or 'someone who removed its lock'}")

    def _touch(self) -> None:
        while not self._ended.wait(HEARTBEAT_SEC):
            with contextlib.suppress(OSError):
                if self.is_held():
                    os.utime(self.path)

    def _link(self, target: Path) -> bool:
        """Make `target` with this process's record, whole or not at all; False when it is there already."""
        with self._record() as record:
            try:
                os.link(record, target)
            except FileExistsError:
                return False
            return True

    @contextmanager
    def _record(self) -> Iterator[Path]:
        record = self.path.with_name(f".lock-{self._me.token}")
        write_json(record, asdict(self._me))
        try:
            yield record
        finally:
            record.unlink(missing_ok=True)

    def _sign(self) -> int | None:
        """What changes with every sign of life of the holder; None when there is no lock."""
        try:
            return self.path.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _take_over(self, stale: Holder) -> None:
        """Remove the lock of a holder that is gone. Of several processes that judged the same lock, one does it."""
        right = self.path.with_name(f".lock-from-{stale.token or 'unknown'}")
        if not self._link(right):
            other, since = _holder_in(right), self._others_since.setdefault(right, time.monotonic())
            if other is None or is_gone(other, self._me) or time.monotonic() - since > SILENT_SEC:
                right.unlink(missing_ok=True)
            time.sleep(_POLL_SEC)
            return
        try:
            current = _read(self.path)
            if current is None or current.token == stale.token:
                self.path.unlink(missing_ok=True)
        finally:
            right.unlink(missing_ok=True)


def this_process(environment: Mapping[str, str] = os.environ) -> Holder:
    """The record of this process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = space = ""
    return Holder(
        token=uuid.uuid4().hex,
        host=platform.node(),
        boot=boot,
        space=space,
        pid=os.getpid(),
        started=start_time(os.getpid()) or "",
        job=environment.get("SLURM_JOB_ID"),
        job_restarts=environment.get("SLURM_RESTART_COUNT", "0") if "SLURM_JOB_ID" in environment else None,
    )


def is_gone(holder: Holder, me: Holder) -> bool | None:
    """Whether the holder has ended; None when only its silence could tell."""
    if holder.job is not None and holder.job == me.job and holder.job_restarts != me.job_restarts:
        return True  # an earlier start of this very job, of which Slurm runs one at a time
    if not holder.boot or holder.host != me.host:
        return None
    if holder.boot != me.boot:
        return True  # the host was started anew
    if holder.space != me.space:
        return None  # in another container, whose processes cannot be seen from here
    return start_time(holder.pid) != holder.started


def _holder_in(path: Path) -> Holder | None:
    """Who left a lock file; None when it is not there."""
    if not path.exists():
        return None
    return _read(path) or Holder(token="", host="an unknown host", boot="", space="", pid=0, started="")


def _read(path: Path) -> Holder | None:
    try:
        return Holder(**load_json(path))
    except (OSError, ValueError, TypeError):
        return None
