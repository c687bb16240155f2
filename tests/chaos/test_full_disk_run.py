"""A whole run on a disk that fills up: it goes on or stops as its recipe says, and loses nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.test_full_disk import fill
from tests.chaos.test_kills import STEPS, Run, make_folder
from turbolm.checkpoint.verify import find_newest_valid

pytestmark = [pytest.mark.chaos, pytest.mark.slow]


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """What a run printed up to the line that has `text` in it."""
    printed = ""
    assert process.stdout is not None
    for line in process.stdout:
        printed += line
        if text in line:
            return printed
    raise AssertionError(f"it never said {text!r}:\n{printed}")


def read_rest(process: subprocess.Popen[str], timeout_sec: float) -> str:
    """What follows `read_until`, until the run has ended. (`communicate` would leave out what is buffered already.)"""
    assert process.stdout is not None
    watch = threading.Timer(timeout_sec, process.kill)
    watch.start()
    rest = process.stdout.read()
    process.wait()
    watch.cancel()
    return rest


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(make_folder(tmp_path_factory.mktemp("disk"), zero_stage=2), "whole")
    run.finish_on_ranks()
    return run


@pytest.fixture
def disk(whole: Run, request: pytest.FixtureRequest) -> Iterator[tuple[Run, Path]]:
    """A run whose checkpoints are on a file system of their own."""
    run = Run(whole.folder, f"disk-{request.node.callspec.id}", ("checkpoint.keep_last=1", "checkpoint.every=5 steps"))
    folder = run.path / "checkpoints"
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=8M", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield run, folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


# Either policy with either trouble: what a save makes of them is tested in test_full_disk.py.
@pytest.mark.parametrize(("policy", "trouble"), [("continue", "read-only"), ("stop", "full")])
def test_a_run_whose_disk_has_trouble(policy: str, trouble: str, whole: Run, disk: tuple[Run, Path]) -> None:
    run, folder = disk
    run.overrides += (f"checkpoint.on_failure={policy}",)
    process = run.start()
    read_until(process, "step 8/")
    if trouble == "full":
        fill(folder, 4096)
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    printed = read_until(process, "was not written")
    assert ("No space left on device" if trouble == "full" else "Read-only file system") in printed
    if policy == "stop":
        rest = read_rest(process, 120)
        assert process.returncode == 1, rest
        assert "asked to stop by a checkpoint that was not written" in printed + rest and "Traceback" not in rest
        assert find_newest_valid(folder)[0] is not None
    if trouble == "full":
        (folder / "ballast").unlink()
    else:
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
    if policy == "stop":
        run.finish()
    else:
        rest = read_rest(process, 300)
        assert process.returncode == 0, rest
    assert run.learned() == whole.learned()
    newest, rejected = find_newest_valid(folder)
    assert newest is not None and newest.name == f"step-{STEPS:08d}" and not rejected


def test_a_second_process_is_kept_out_of_a_run(whole: Run) -> None:
    run = Run(whole.folder, "locked")
    first = run.start()
    read_until(first, "step 3/")
    ranks = run.ranks().values()
    for rank in ranks:  # else it may be finished before the second one has started
        os.kill(rank, signal.SIGSTOP)
    second = run.start()
    said = second.communicate(timeout=120)[0]
    for rank in ranks:
        os.kill(rank, signal.SIGCONT)
    assert second.returncode == 2 and "is in use by process" in said and "Traceback" not in said
    rest = read_rest(first, 300)
    assert first.returncode == 0, rest
    assert run.learned() == whole.learned()
    assert sorted(path.name for path in (run.path / "attempts").iterdir()) == ["1"]
