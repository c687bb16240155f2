"""A build that was killed holds nobody up; one that goes on is left alone."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from turbolm.reliability import build_locks
from turbolm.reliability.build_locks import clear_stale_locks, extensions_root

# torch's own lock, without the rest of torch.
HOLD = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("file_baton", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
baton = module.FileBaton(sys.argv[2])
acquired = baton.try_acquire()
print(acquired, flush=True)
if sys.argv[3:]:
    time.sleep(600)
if acquired:
    baton.release()
"""


def file_baton() -> str:
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    return str(Path(found.origin).parent / "utils" / "file_baton.py")


def build(lock: Path, *until_killed: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, file_baton(), str(lock), *until_killed]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def acquires(process: subprocess.Popen[str]) -> bool:
    assert process.stdout is not None
    return process.stdout.readline().strip() == "True"


def cleared(root: Path) -> list[str]:
    said: list[str] = []
    clear_stale_locks(root, said.append)
    return said


def test_the_lock_of_a_killed_build_is_removed_and_that_of_a_live_one_kept(tmp_path: Path) -> None:
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    builder = build(lock, "hold it")
    assert acquires(builder)
    assert cleared(tmp_path) == [f"process {builder.pid} builds {lock.parent} just now; what needs it waits"]
    assert lock.exists()
    builder.kill()
    builder.wait()
    next_one = build(lock)
    assert not acquires(next_one)  # what every later start would see
    assert next_one.wait() == 0 and lock.exists()
    (message,) = cleared(tmp_path)
    assert message.startswith(f"removed {lock}")
    last = build(lock)
    assert acquires(last)
    assert last.wait() == 0
    assert cleared(tmp_path) == []


# 1970 and 2096: a clock that was set back, one that is ahead
@pytest.mark.parametrize(("why", "changed"), [("another host", 1.0), ("another host", 4e9), ("another user", 4e9)])
def test_a_builder_that_may_be_out_of_sight_gets_time_by_the_clock_of_who_waits(
    why: str, changed: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "fused_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (changed, changed))
    monkeypatch.setattr(build_locks, "_SILENT_SEC", 0.5)
    monkeypatch.setattr(build_locks, "_LOOK_SEC", 0.05)
    monkeypatch.setattr(build_locks, "_RELEASE_SEC", 0.0)
    if why == "another host":
        monkeypatch.setattr(build_locks.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="nfs\n"))
    else:
        monkeypatch.setattr(build_locks.os, "geteuid", lambda: os.getuid() + 1)
    said: list[str] = []
    start = time.monotonic()
    clear_stale_locks(tmp_path, said.append)
    assert str(lock) in said[0] and "remove that file" in said[0]
    for number in range(10):  # something is being compiled, for longer than the limit
        (lock.parent / "adam.o").write_bytes(bytes(number))
        os.utime(lock.parent / "adam.o", (changed, changed + number))
        time.sleep(0.1)
        assert lock.exists()
    while lock.exists():
        assert time.monotonic() - start < 20
        time.sleep(0.02)
    while len(said) < 2:
        time.sleep(0.01)
    assert said[1].startswith(f"removed {lock}")


def test_the_watch_ends_with_whoever_needed_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "fused_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    monkeypatch.setattr(build_locks, "_SILENT_SEC", 0.1)
    monkeypatch.setattr(build_locks, "_LOOK_SEC", 0.05)
    monkeypatch.setattr(build_locks.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="nfs\n"))
    ended = threading.Event()
    ended.set()
    clear_stale_locks(tmp_path, lambda message: None, ended)
    time.sleep(0.3)
    assert lock.exists()


def test_where_torch_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert extensions_root({}) == Path("/home/me/.cache/torch_extensions")
    assert extensions_root({"XDG_CACHE_HOME": "/fast"}) == Path("/fast/torch_extensions")
    assert extensions_root({"TORCH_EXTENSIONS_DIR": "/x"}) == Path("/x")
    assert cleared(Path("/nowhere")) == []
