"""One process at a time writes a run; a lock whose holder is gone does not keep the next one out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from turbolm.errors import UserError
from turbolm.reliability import run_lock
from turbolm.reliability.run_lock import Holder, RunLock, is_gone, this_process

HOLD = """
import sys, time
from pathlib import Path
from turbolm.reliability.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""
CONTEND = """
import sys
from pathlib import Path
from turbolm.errors import UserError
from turbolm.reliability import run_lock
run_lock.ENDING_SEC = 0.5
lock = run_lock.RunLock(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
try:
    lock.acquire()
    print("held", flush=True)
except UserError:
    print("refused", flush=True)
sys.stdin.readline()
"""


def start(script: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def says(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def write_lock(folder: Path, holder: Holder, age_sec: float = 0) -> Path:
    path = folder / "lock.json"
    path.write_text(json.dumps(asdict(holder)))
    os.utime(path, (time.time() - age_sec,) * 2)
    return path


def test_a_running_holder_keeps_others_out_and_a_killed_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "ENDING_SEC", 0.3)
    holder = start(HOLD, tmp_path)
    assert says(holder) == "held"
    os.utime(tmp_path / "lock.json", (0, 0))  # on this host the process counts, not its last sign
    with pytest.raises(UserError, match=f"in use by process {holder.pid} on "):
        RunLock(tmp_path).acquire()
    monkeypatch.setattr(run_lock, "ENDING_SEC", 30.0)
    holder.kill()  # left a zombie until the wait below
    lock = RunLock(tmp_path)
    lock.acquire()
    holder.wait()
    assert lock.is_held()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_it_waits_for_a_holder_that_is_ending(tmp_path: Path) -> None:
    holder = start(HOLD, tmp_path)
    assert says(holder) == "held"
    subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {holder.pid}"])
    RunLock(tmp_path).acquire()
    holder.wait()


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path: Path) -> None:
    write_lock(tmp_path, replace(this_process(), pid=2**22, started="1"))
    contenders = [start(CONTEND, tmp_path) for _ in range(6)]
    assert [says(process) for process in contenders] == ["ready"] * 6
    for process in contenders:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [says(process) for process in contenders]
    assert sorted(answers) == ["held"] + ["refused"] * 5
    for process in contenders:
        process.kill()
        process.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["lock.json"]


def test_who_is_gone() -> None:
    me = this_process({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"})
    assert is_gone(me, me) is False
    assert is_gone(replace(me, pid=2**22), me) is True
    assert is_gone(replace(me, started="1"), me) is True, "another process got the number"
    assert is_gone(replace(me, boot="before"), me) is True, "the host was started anew"
    other = replace(me, host="other", boot="its own", space="its own")
    assert is_gone(other, me) is None
    assert is_gone(replace(me, space="a container's"), me) is None
    assert is_gone(replace(other, job_restarts="0"), me) is True, "the start of this job before its requeue"
    assert is_gone(replace(other, job="8", job_restarts="0"), me) is None
    assert is_gone(replace(other, job=None), me) is None
    assert this_process({"SLURM_JOB_ID": "7"}).job_restarts == "0"
    assert this_process({}).job is None


def test_a_requeued_job_starts_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    before = this_process()
    write_lock(tmp_path, replace(before, host="the node that was lost", boot="x", space="y"))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    start = time.monotonic()
    lock = RunLock(tmp_path)
    lock.acquire()
    assert time.monotonic() - start < 20  # the other case waits for SILENT_SEC, 90 s
    lock.release()


@pytest.mark.parametrize("age_sec", [0.0, 3600.0, -3600.0, 1.7e9], ids=["now", "back", "ahead", "1970"])
@pytest.mark.parametrize("garbage", [False, True])
def test_another_host_that_is_silent_is_given_up_by_the_clock_of_who_waits(
    garbage: bool, age_sec: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_lock, "SILENT_SEC", 0.6)
    path = write_lock(tmp_path, replace(this_process(), host="other", boot="x", space="y"), age_sec)
    if garbage:
        path.write_text("{")
        os.utime(path, (time.time() - age_sec,) * 2)
    start = time.monotonic()
    lock = RunLock(tmp_path)
    lock.acquire()
    assert 0.5 < time.monotonic() - start < 60, "whatever the file's time says, it was silent only while watched"
    lock.release()
    (line,) = capsys.readouterr().err.splitlines()
    assert "is locked by process" in line and ("unknown host" if garbage else "on other") in line


@pytest.mark.parametrize("stamp", ["1", "4000000000"])
def test_another_host_that_gives_a_sign_keeps_its_lock_and_a_wait_says_for_whom_at_once(
    stamp: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_lock, "SILENT_SEC", 60.0)
    path = write_lock(tmp_path, replace(this_process(), host="other", boot="x", space="y"), age_sec=5000)
    touch = subprocess.Popen(["sh", "-c", f"sleep 1; touch -d @{stamp} {path}"])
    told_at: list[float] = []
    monkeypatch.setattr("builtins.print", lambda *_, **__: told_at.append(time.monotonic()))
    start = time.monotonic()
    with pytest.raises(UserError, match="in use by process .* on other"):
        RunLock(tmp_path).acquire()
    assert len(told_at) == 1 and told_at[0] - start < 0.5
    touch.wait()


def test_a_holder_notices_that_it_was_taken_for_dead(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.check()
    taker = replace(this_process(), host="other")
    write_lock(tmp_path, taker)
    with pytest.raises(RuntimeError, match="taken over by process .* on other"):
        lock.check()
    lock.release()
    assert (tmp_path / "lock.json").exists(), "the other's lock stays"


def test_the_holder_gives_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "HEARTBEAT_SEC", 0.05)
    lock = RunLock(tmp_path)
    lock.acquire()
    os.utime(tmp_path / "lock.json", (0, 0))
    deadline = time.monotonic() + 5
    while (tmp_path / "lock.json").stat().st_mtime < 1 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert time.time() - (tmp_path / "lock.json").stat().st_mtime < 5
    lock.release()
