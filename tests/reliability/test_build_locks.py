"""A build that was killed holds nobody up; one that goes on is left alone."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
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


def test_the_lock_of_a_killed_build_is_removed_and_that_of_a_live_one_kept(tmp_path: Path) -> None:
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    builder = build(lock, "hold it")
    assert acquires(builder)
    assert clear_stale_locks(tmp_path) == [f"process {builder.pid} builds {lock.parent} just now; what needs it waits"]
    assert lock.exists()
    builder.kill()
    builder.wait()
    next_one = build(lock)
    assert not acquires(next_one)  # what every later start would see
    assert next_one.wait() == 0 and lock.exists()
    (message,) = clear_stale_locks(tmp_path)
    assert message.startswith(f"removed {lock}")
    last = build(lock)
    assert acquires(last)
    assert last.wait() == 0
    assert clear_stale_locks(tmp_path) == []


@pytest.mark.parametrize("why", ["another host", "another user"])
def test_a_builder_that_may_be_out_of_sight_gets_time(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "fused_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    if why == "another host":
        monkeypatch.setattr(build_locks.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="nfs\n"))
    else:
        monkeypatch.setattr(build_locks.os, "geteuid", lambda: os.getuid() + 1)
    (message,) = clear_stale_locks(tmp_path)
    assert str(lock) in message and "remove that file" in message and lock.exists()
    long_ago = time.time() - 3600
    os.utime(lock, (long_ago, long_ago))
    (lock.parent / "adam.o").touch()  # something is being compiled
    assert len(clear_stale_locks(tmp_path)) == 1 and lock.exists()
    os.utime(lock.parent / "adam.o", (long_ago, long_ago))
    assert "removed" in clear_stale_locks(tmp_path)[0] and not lock.exists()


def test_where_torch_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert extensions_root({}) == Path("/home/me/.cache/torch_extensions")
    assert extensions_root({"XDG_CACHE_HOME": "/fast"}) == Path("/fast/torch_extensions")
    assert extensions_root({"TORCH_EXTENSIONS_DIR": "/x"}) == Path("/x")
    assert clear_stale_locks(Path("/nowhere")) == []
