"""A rank that hangs is found in time, named, its stack written, and nothing is left of the job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.chaos.fake_rank import HANG_AFTER
from tests.chaos.test_kills import Run, make_folder
from tests.train.harness import BINS_PER_BATCH, SEQ_LEN
from turbolm.errors import EXIT_REQUEUE
from turbolm.reliability.hang import RankState, judge, main_thread_frames
from turbolm.reliability.heartbeat import COMPILING, EXPORTING, SAVED_HERE, SAVING, STARTING, STEP, Sign
from turbolm.reliability.watchdog import Watchdog

ROOT = Path(__file__).parents[2]
HANG_SEC, STARTUP_SEC = 2, 3
REAL_HANG_SEC = 8  # no step, evaluation or save of a tiny model takes so long, even where much else runs
WORLD_SIZE = 2
# Where rank 1 hangs: what is said of it, the function its stacks must show, the limit that holds there.
CASES = {
    "signal": ("it is stopped (SIGSTOP", "fake_rank.py", HANG_SEC),
    "interpreter": ("it runs no Python code: a thread holds the GIL", "hold_the_interpreter", HANG_SEC),
    "evaluation": ("it has not come as far as the others", "evaluate_for_ever", HANG_SEC),
    "saving": ("it is saving, and the others wait for it", "write_to_a_dead_disk", HANG_SEC),
    "start-up": ("it has not come as far as the others", "import_for_ever", STARTUP_SEC),
    "two hosts": ("it has not come as far as the others", "evaluate_for_ever", HANG_SEC),
}


@dataclass
class Job:
    """Two ranks that a launcher could have started, and what was seen of their end."""

    folder: Path
    ranks: list[subprocess.Popen[bytes]]
    hung_at: float = 0.0
    found_at: float = 0.0

    @property
    def outcome(self) -> Path:
        return self.folder / "run" / "attempts" / "1" / "outcome.json"

    def watchdogs(self) -> list[int]:
        """The watchdogs of this job that live."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if b"turbolm.reliability.watchdog" in command and os.fsencode(self.folder) in command:
                found.append(int(process.name))
        return found


def start_job(folder: Path, case: str, port: int) -> Job:
    """Two ranks of one host; or each with a watchdog of its own, which share the run directory as two hosts do."""
    (folder / "run" / "attempts" / "1").mkdir(parents=True)
    is_split = case == "two hosts"
    where = "evaluation" if is_split else case
    shared = {**os.environ, "WORLD_SIZE": str(WORLD_SIZE), "LOCAL_WORLD_SIZE": str(1 if is_split else WORLD_SIZE)}
    command = [sys.executable, "-m", "tests.chaos.fake_rank", str(folder), where, "1", str(HANG_SEC), str(STARTUP_SEC)]
    with (folder / "log").open("wb") as log:
        ranks = [
            subprocess.Popen(
                command, cwd=ROOT, stderr=log, stdout=log,
                env={
                    **shared, "RANK": str(rank), "LOCAL_RANK": str(0 if is_split else rank),
                    "MASTER_PORT": str(port + rank * is_split),
                },
            )
            for rank in range(WORLD_SIZE)
        ]  # fmt: skip
    return Job(folder, ranks)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    """All cases at once, each to its end."""
    found = {case: start_job(tmp_path_factory.mktemp(case), case, 100 + i) for i, case in enumerate(CASES)}
    stopped = found["signal"]
    deadline = time.monotonic() + 60
    while any(not job.found_at or job.watchdogs() for job in found.values()):
        assert time.monotonic() < deadline, {case: (job.folder / "log").read_text() for case, job in found.items()}
        place = stopped.folder / "1.place"
        if not stopped.hung_at and place.exists() and float(place.read_text()) > HANG_AFTER:
            stopped.ranks[1].send_signal(signal.SIGSTOP)
            stopped.hung_at = time.time()
        for job in found.values():
            if not job.hung_at and (job.folder / "hanging").exists() and job is not stopped:
                job.hung_at = (job.folder / "hanging").stat().st_mtime
            if not job.found_at and job.outcome.exists():
                job.found_at = job.outcome.stat().st_mtime
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_hang_is_found_in_time_and_explained(case: str, jobs: dict[str, Job]) -> None:
    job, (reason, function, limit_sec) = jobs[case], CASES[case]
    outcome = json.loads(job.outcome.read_text())
    assert (outcome["status"], outcome["exit_code"]) == ("hung", EXIT_REQUEUE)
    assert outcome["message"].startswith(f"rank 1 hangs: {reason}"), outcome["message"]
    assert limit_sec <= job.found_at - job.hung_at + 0.6 <= limit_sec + 5.6  # a sign may be as old as a wait is long
    stacks = job.outcome.with_name("hung") / "stacks.rank1.txt"
    assert function in stacks.read_text(), stacks.read_text()
    # Only of a thread that stands still is the stack exact: the main one, in which the signal's handler runs.
    waiting = main_thread_frames(stacks.with_name("stacks.rank0.txt").read_text())
    # Where the saves of both are under way it waits for its own writer; a rank that is stopped may be at either place.
    places = {"interpreter": ("wait_for_all ",), "start-up": ("wait_for_all ",), "signal": ("wait_for_all ", "join ")}
    assert any(frame.startswith(places.get(case, ("join ",))) for frame in waiting), waiting
    assert str(stacks.parent) in outcome["message"]


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left_of_a_job_that_hung(case: str, jobs: dict[str, Job]) -> None:
    job = jobs[case]
    for rank in job.ranks:
        assert rank.wait(timeout=1) < 0  # by a signal
    assert not job.watchdogs()
    assert "Traceback" not in (job.folder / "log").read_text()
    assert not list(Path("/dev/shm").glob(f"turbolm-{os.geteuid()}-{os.getpid()}-*"))


def state(rank: int, **changes: Any) -> RankState:
    """A rank that waits in a collective operation of step 8."""
    waiting = ("all_reduce (/env/torch/distributed/distributed_c10d.py:3252)", "train (/src/loop.py:60)")
    values = {"host": "a", "pid": 100 + rank, "phase": "step", "step": 7, "progress": 40, "silent_sec": 20.0}
    return RankState(rank, **{**values, "process_state": "S", "frames": waiting, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"process_state": ""}, "has died"),
        ({"process_state": "T", "progress": 41}, "is stopped"),
        ({"python_silent_sec": 9.0}, "runs no Python code"),
        ({"progress": 39}, "has not come as far"),
        ({"frames": ("forward (/src/model.py:3)", "train (/src/loop.py:60)")}, "waits for no other rank"),
        ({"process_state": "D"}, "waits for a device"),
    ],
)
def test_the_rank_that_hangs_is_told_from_those_that_wait(changes: dict[str, Any], reason: str) -> None:
    verdict = judge([state(0), state(1, host="b"), state(2, host="b", **changes), state(3)])
    assert verdict.culprits == (2,) and verdict.reason.startswith(reason)


def test_nobody_is_blamed_without_a_sign_of_guilt() -> None:
    assert judge([state(0), state(1)]).culprits == ()
    assert judge([state(0, phase=SAVED_HERE), state(1, phase=SAVING)]).culprits == (1,)
    assert judge([state(5)]).culprits == (5,)


@pytest.mark.parametrize(
    ("ranks", "is_hang"),
    [
        ([(STEP, 5), (STEP, 5)], False),
        ([(STEP, 5), (STEP, 15)], True),
        ([(COMPILING, 50), (STEP, 55)], False),  # it waits for one that compiles
        ([(COMPILING, 150), (STEP, 155)], True),
        ([(COMPILING, 50), (STARTING, 101)], True),
        ([(SAVING, 5), (SAVED_HERE, 55)], False),  # it waits for one that goes on writing
        ([(SAVING, 15), (SAVED_HERE, 55)], True),
        ([(EXPORTING, 50)], False),
        ([(EXPORTING, 150)], True),
    ],
)
def test_a_rank_that_takes_long_does_not_hang(ranks: list[tuple[str, float]], is_hang: bool, tmp_path: Path) -> None:
    """Limits of 10 s, and 100 s where it may take longer; by rank the phase and the seconds of silence."""
    dog = Watchdog(tmp_path, tmp_path, hang_sec=10, startup_sec=100, num_ranks=len(ranks), world_size=len(ranks))
    dog._watched_since = 0.0
    now = time.monotonic() + 1000
    signs = [Sign(1, rank, 0, 0, now - silent_sec, 1, phase) for rank, (phase, silent_sec) in enumerate(ranks)]
    with patch("turbolm.reliability.watchdog.time.monotonic", lambda: now):
        assert dog._overdue(signs) == is_hang


def test_the_main_thread_is_the_last_one_that_faulthandler_writes() -> None:
    stacks = (
        'Current thread 0x7f01 (most recent call first):\n  File "/a/queue.py", line 3 in put\n\n'
        'Thread 0x7f00 (most recent call first):\n  File "/b c/loop.py", line 7 in main\n  File "x", line 1 in run\n'
    )
    assert main_thread_frames(stacks) == ("main (/b c/loop.py:7)", "run (x:1)")
    assert main_thread_frames("") == ()


HOLD_THE_INTERPRETER = """
import ctypes, os, pathlib, threading, time

def hold_the_interpreter():
    while not pathlib.Path(os.environ["HOLD_WHEN"]).exists():
        time.sleep(0.02)
    libc = ctypes.PyDLL(None)
    pathlib.Path(os.environ["HOLD_WHEN"] + "ing").touch()
    while True:
        libc.sleep(600)

if os.environ.get("RANK") == "1":
    threading.Thread(target=hold_the_interpreter, daemon=True).start()
"""


@pytest.mark.slow
@pytest.mark.chaos
def test_a_run_that_hangs_ends_and_goes_on_as_if_it_had_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way through `accelerate launch`: a rank that is stopped, one whose interpreter is held by a thread."""
    (tmp_path / "sitecustomize.py").write_text(HOLD_THE_INTERPRETER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("HOLD_WHEN", str(tmp_path / "hold"))
    num_steps = 80
    settings = (f"execution.hang_timeout={REAL_HANG_SEC}s", f"train.budget={num_steps * BINS_PER_BATCH * SEQ_LEN}")
    run = Run(make_folder(tmp_path, zero_stage=2), "hangs", settings)
    for attempt, how in enumerate(("stopped", "held"), start=1):
        process, before = run.start(), len(run.lines())
        while len(run.lines()) < before + 10:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        ranks = run.ranks()
        begun = time.time()
        if how == "stopped":
            os.kill(ranks[1], signal.SIGSTOP)
        else:
            (tmp_path / "hold").touch()
        output = process.communicate(timeout=120)[0]
        assert how == "stopped" or (tmp_path / "holding").exists(), f"the fault did not take: {output}"
        assert process.returncode == EXIT_REQUEUE, output
        assert f"turbolm: rank 1 hangs: it {'is stopped' if how == 'stopped' else 'runs no Python code'}" in output
        folder = run.path / "attempts" / str(attempt)
        assert json.loads((folder / "outcome.json").read_text())["status"] == "hung"
        stacks = folder / "hung" / "stacks.rank1.txt"
        assert ("loop.py" if how == "stopped" else "hold_the_interpreter") in stacks.read_text()
        assert stacks.stat().st_mtime - begun < REAL_HANG_SEC + 5
        assert not run.ranks()
    (tmp_path / "hold").unlink()
    run.finish_on_ranks()
    assert sorted(run.learned()) == list(range(1, num_steps + 1))  # and none of them otherwise when done again
