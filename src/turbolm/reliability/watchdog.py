"""The process beside the ranks of a host that ends a hung job and says where it hangs. Torch-free.

    python -m turbolm.reliability.watchdog FOLDER RUN HANG_SEC STARTUP_SEC NUM_RANKS WORLD_SIZE

Local rank 0 starts it before anything large is imported, however the ranks were launched; it is in a session of its own
and ends when the ranks have ended. It reads their heartbeats. When one is silent for too long it has all of
them write their stacks, finds out which one hangs (`hang`), records that and kills them: the launcher does the rest.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from turbolm.errors import EXIT_REQUEUE
from turbolm.files import load_json, write_json
from turbolm.reliability import heartbeat
from turbolm.reliability.hang import RankState, Verdict, judge, main_thread_frames
from turbolm.reliability.heartbeat import Sign, read_signs, stacks_file
from turbolm.reliability.late import name_ranks
from turbolm.reliability.outcome import FINISHED, HUNG, Outcome, read_outcome, write_outcome
from turbolm.reliability.processes import descendants, living, process_state, start_time
from turbolm.units import format_duration

_PATIENT = (heartbeat.STARTING, heartbeat.COMPILING, heartbeat.EXPORTING, heartbeat.SAVED_HERE)
_MAX_LINES = 16
_POLL_SEC = 0.5
_SHARED_POLL_SEC = 5.0  # how often the shared folder is asked whether another host has found a hang
_STACKS_SEC = 3.0  # for the ranks to write their stacks, and for the other hosts to tell of theirs
_GRACE_SEC = 5.0  # between TERM and KILL: a rank that was only stopped may still save
_WRITE_SEC = 10.0  # the run's file system may be what hangs


def watch_over(run_folder: Path, hang_sec: int | None, startup_sec: int | None, attempt: int | None) -> None:
    """Write heartbeats from now on; local rank 0 starts this host's watchdog too. Without `hang_sec` nobody watches."""
    if hang_sec is None:
        return
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    try:
        folder = heartbeat.host_folder()
        heartbeat.start(folder, rank)
    except OSError as error:
        print(f"turbolm: no watchdog: {error}", file=sys.stderr, flush=True)
        return
    heartbeat.set_attempt(attempt or 0)
    if local_rank == 0:
        sizes = [os.environ.get(name, "1") for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE")]
        settings = [str(folder), str(run_folder), str(hang_sec), str(startup_sec or "inf"), *sizes]
        command = [sys.executable, "-m", "turbolm.reliability.watchdog", *settings]
        # Do not hold the terminal's pipe open: its messages go where the launcher's errors go.
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)


@dataclass
class Watchdog:
    """Watches the ranks whose heartbeats are in `folder`. `num_ranks` are expected on this host."""

    folder: Path
    run: Path
    hang_sec: float
    startup_sec: float
    num_ranks: int
    world_size: int
    _started: dict[int, str | None] = field(default_factory=dict)  # when the process of each rank was started
    _watched_since: float = field(default_factory=time.monotonic)
    _next_shared_look: float = 0.0

    def watch(self) -> Verdict | None:
        """Return when all ranks have ended by themselves, or the verdict after it has ended them."""
        begun = last = time.monotonic()
        while True:
            now = time.monotonic()
            if now - last > _POLL_SEC + 3:  # this process was stopped itself, with the job (`scontrol suspend`)
                self._watched_since = now
            last = now
            signs, living = read_signs(self.folder), self.living()
            if not living:
                return None
            missing = self.num_ranks - len(signs) if now - begun > self.startup_sec else 0
            if missing > 0 or self._overdue(living) or self._others_found_a_hang(living):
                return self._end_job(signs, missing)
            time.sleep(_POLL_SEC)

    def living(self) -> list[Sign]:
        """The last signs of the ranks that have not ended."""
        return [sign for sign in read_signs(self.folder) if self._lives(sign)]

    def silence(self, sign: Sign) -> float:
        """Seconds since a rank's last sign that this process could have seen."""
        return time.monotonic() - max(sign.time_sec, self._watched_since)

    def limit(self, sign: Sign) -> float:
        """How long the rank may be silent where it is."""
        return self.startup_sec if sign.phase in _PATIENT else self.hang_sec

    def _overdue(self, living: list[Sign]) -> bool:
        """Whether a rank is silent for too long, and not because another one compiles meanwhile."""
        overdue = [sign for sign in living if self.silence(sign) > self.limit(sign)]
        compiling = any(sign.phase == heartbeat.COMPILING and sign not in overdue for sign in living)
        return any(not compiling or sign.phase in _PATIENT for sign in overdue)

    def _lives(self, sign: Sign) -> bool:
        started = start_time(sign.pid)
        return sign.phase != heartbeat.ENDED and started is not None and self._started.setdefault(
            sign.pid, started
        ) == started  # fmt: skip

    def _others_found_a_hang(self, living: list[Sign]) -> bool:
        now = time.monotonic()
        if self.world_size <= self.num_ranks or now < self._next_shared_look:
            return False
        self._next_shared_look = now + _SHARED_POLL_SEC
        attempt = max(sign.attempt for sign in living)
        return attempt > 0 and any(self._shared_folder(attempt).glob("*.json"))

    def _end_job(self, signs: list[Sign], missing: int) -> Verdict:
        """Stacks, verdict, outcome; then end the ranks of this host. The launchers of all hosts notice."""
        here = self._examine(signs)
        attempt = max(sign.attempt for sign in signs)
        everyone: list[RankState] = []
        # Writing may hang like everything else: nothing that follows depends on it.
        _within(_WRITE_SEC, lambda: everyone.extend(self._share(attempt, here)))
        verdict = judge(everyone or here)
        if missing > 0:
            verdict = Verdict((), f"{missing} of {self.num_ranks} ranks of {platform.node()} never gave a sign")
        text = report(verdict, everyone or here)
        print(f"turbolm: {text}", file=sys.stderr, flush=True)
        own_culprit = missing > 0 or any(state.rank in verdict.culprits for state in here)
        _within(_WRITE_SEC, lambda: self._record(attempt, text, own_culprit))
        self._kill([sign for sign in signs if self._lives(sign)])
        _within(_WRITE_SEC, lambda: self._record(attempt, text, own_culprit))  # a rank may have stopped cleanly
        return verdict

    def _examine(self, signs: list[Sign]) -> list[RankState]:
        """The state of this host's ranks; has those that live write their stacks."""
        now = time.monotonic()
        silent = {sign.rank: (self.silence(sign), now - sign.python_ran_sec) for sign in signs}
        states = {sign.rank: process_state(sign.pid) if self._lives(sign) else "" for sign in signs}
        living = [sign for sign in signs if states[sign.rank]]
        with contextlib.suppress(OSError):
            (self.folder / heartbeat.ASK).touch()
        for sign in living:
            for number in (heartbeat.STACKS_SIGNAL, signal.SIGCONT):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(sign.pid, number)
        deadline, sizes, unchanged = time.monotonic() + _STACKS_SEC, [-1], 0
        answers = [heartbeat.collectives_file(self.folder, sign.rank) for sign in living]
        # A rank on a busy host may pause between two lines; one whose interpreter is held does not answer.
        while time.monotonic() < deadline and (unchanged < 3 or not all(path.exists() for path in answers)):
            time.sleep(0.2)
            before, sizes = sizes, [stacks_file(self.folder, sign.rank).stat().st_size for sign in living]
            unchanged = unchanged + 1 if all(sizes) and sizes == before else 0
        found = []
        for sign in signs:
            frames = main_thread_frames(self._stacks(sign))
            about = (platform.node(), sign.pid, sign.phase, sign.step, sign.progress)
            sign_sec, python_sec = silent[sign.rank]
            if sign.phase != heartbeat.ENDED:
                holds = _read_list(heartbeat.collectives_file(self.folder, sign.rank))
                found.append(RankState(sign.rank, *about, sign_sec, states[sign.rank], frames, python_sec, holds))
        return found

    def _share(self, attempt: int, here: list[RankState]) -> list[RankState]:
        """Leave what is known here in the run directory, and return it with what other hosts left there."""
        folder = self._shared_folder(attempt)
        folder.mkdir(parents=True, exist_ok=True)
        for state in here:
            source, target = stacks_file(self.folder, state.rank), folder / f"stacks.rank{state.rank}.txt"
            target.write_bytes(source.read_bytes())
        write_json(folder / f"ranks-{here[0].rank}.json", [asdict(state) for state in here])
        deadline = time.monotonic() + _STACKS_SEC
        while True:
            everyone = [state for path in folder.glob("ranks-*.json") for state in _read_states(path)]
            if len(everyone) >= self.world_size or self.world_size <= self.num_ranks or time.monotonic() > deadline:
                return sorted(everyone, key=lambda state: state.rank)
            time.sleep(0.2)

    def _record(self, attempt: int, text: str, own_culprit: bool) -> None:
        """Leave the attempt's outcome; the host of the rank that hangs knows best."""
        folder = self._attempt_folder(attempt)
        known = read_outcome(folder)
        if known is not None and (known.status == FINISHED or (known.status == HUNG and not own_culprit)):
            return
        message = f"{text}\nstacks of all ranks: {self._shared_folder(attempt)}"
        write_outcome(folder, Outcome(HUNG, EXIT_REQUEUE, message))

    def _kill(self, ranks: list[Sign]) -> None:
        """End these ranks and all they have started, such as compilers."""
        pids = {sign.pid for sign in ranks}
        started = {pid: start_time(pid) for pid in pids | descendants(pids) - {os.getpid()}}
        for number in (signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + _GRACE_SEC
            for pid in living(started):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            while living(started) and time.monotonic() < deadline:
                time.sleep(0.05)

    def _stacks(self, sign: Sign) -> str:
        with contextlib.suppress(OSError):
            return stacks_file(self.folder, sign.rank).read_text(encoding="utf-8", errors="replace")
        return ""

    def _attempt_folder(self, attempt: int) -> Path:
        return self.run / "attempts" / str(attempt) if attempt else self.run

    def _shared_folder(self, attempt: int) -> Path:
        return self._attempt_folder(attempt) / HUNG


def report(verdict: Verdict, ranks: list[RankState]) -> str:
    """The report of a hang: which rank, how that is known, and where every rank is."""
    names = ", ".join(f"rank {rank}" for rank in verdict.culprits)
    first = (
        f"{names} hangs: it {verdict.reason}" if len(verdict.culprits) == 1 else f"{names} hang: each {verdict.reason}"
    )
    if not verdict.culprits:
        longest = max((rank.silent_sec for rank in ranks), default=0.0)
        first = f"the job hangs, without a sign for {format_duration(longest)}: {verdict.reason}"
    return "\n".join([first, *(f"  {line}" for line in _lines(verdict, ranks))])


def _lines(verdict: Verdict, ranks: list[RankState]) -> list[str]:
    """A line for each rank; of many ranks one for each that hangs, and one for all that are at the same place."""
    if len(ranks) <= _MAX_LINES:
        return [str(rank) for rank in ranks]
    lines = [str(rank) for rank in ranks if rank.rank in verdict.culprits][:_MAX_LINES]
    places: dict[str, list[int]] = {}
    for rank in ranks:
        if rank.rank not in verdict.culprits:
            where = f", at {rank.frames[0]}" if rank.frames else ""
            places.setdefault(f"{rank.phase}, after step {rank.step}{where}{rank.holds}", []).append(rank.rank)
    common = sorted(places, key=lambda place: len(places[place]), reverse=True)
    lines += [f"{name_ranks(places[place])}: {place}" for place in common[:_MAX_LINES]]
    more = sum(len(places[place]) for place in common[_MAX_LINES:])
    return lines + ([f"{more} ranks at other places"] if more else [])


def _within(limit_sec: float, action: Callable[[], None]) -> None:
    """Run `action`, but wait no longer than this; print what goes wrong."""

    def attempt() -> None:
        try:
            action()
        except (OSError, ValueError) as error:
            print(f"turbolm: watchdog: {error}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(limit_sec)


def _read_list(path: Path) -> list[dict[str, Any]]:
    with contextlib.suppress(OSError, ValueError):
        found = load_json(path)
        return found if isinstance(found, list) else []
    return []


def _read_states(path: Path) -> list[RankState]:
    with contextlib.suppress(OSError, ValueError, TypeError):
        return [RankState(**{**entry, "frames": tuple(entry["frames"])}) for entry in load_json(path)]
    return []


def main() -> None:
    """Watch until the ranks have ended, then leave nothing behind."""
    folder, run, hang_sec, startup_sec, num_ranks, world_size = sys.argv[1:]
    dog = Watchdog(Path(folder), Path(run), float(hang_sec), float(startup_sec), int(num_ranks), int(world_size))
    with (dog.folder / "watchdog").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one at a time: ranks without a LOCAL_RANK each start one
        dog.watch()
        if not dog.living():
            heartbeat.remove(dog.folder)
    os._exit(0)  # a thread may still be writing to a file system that hangs


if __name__ == "__main__":
    main()
