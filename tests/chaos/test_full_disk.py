"""A disk that fills up or turns read-only costs the checkpoint being written, and nothing else."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoint.toy import CONTRACT, Engine, build_saver, one_process
from turbolm.checkpoint.manifest import list_checkpoints
from turbolm.checkpoint.verify import find_newest_valid, verify_checkpoint
from turbolm.plan.curriculum import Curriculum, Segment
from turbolm.train.evaluation import EvaluationResult
from turbolm.train.metrics import MetricsLog
from turbolm.train.pace import Pace

pytestmark = pytest.mark.chaos
DISK_BYTES = 256 * 1024


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    with one_process():
        yield


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, left_bytes: int) -> Path:
    """Leave so many bytes free."""
    space = os.statvfs(disk)
    ballast = disk / "ballast"
    ballast.write_bytes(b"x" * max(0, space.f_bavail * space.f_frsize - left_bytes))
    return ballast


@pytest.mark.parametrize("left_bytes", [0, 4096, 8192, 12288, 16384])
def test_the_disk_is_full_at_any_point_of_a_save(left_bytes: int, disk: Path) -> None:
    reported: list[str] = []
    engine, folder = Engine(), disk / "checkpoints"
    saver = build_saver(folder, engine, report=reported.append)
    engine.train(1)
    saver.save(1, {"step": 1, "order_digest": ""})
    saver.finish()
    ballast = fill(disk, left_bytes)
    engine.train(1, first=1)
    saver.save(2, {"step": 2, "order_digest": ""})
    saver.wait()
    assert len(reported) == 1 and "No space left on device" in reported[0] and "step 2" in reported[0]
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]
    assert verify_checkpoint(folder / "step-00000001", {CONTRACT}) == []
    ballast.unlink()
    losses = engine.train(2, first=2)
    saver.save(4, {"step": 4, "order_digest": ""})
    saver.finish()
    assert find_newest_valid(folder, {CONTRACT}) == (folder / "step-00000004", [])
    assert losses == Engine().train(4)[2:], "training was not disturbed"


def test_the_folder_turns_read_only(disk: Path) -> None:
    reported: list[str] = []
    engine, folder = Engine(), disk / "checkpoints"
    saver = build_saver(folder, engine, report=reported.append)
    saver.save(1, {"step": 1, "order_digest": ""})
    saver.finish()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    saver.save(2, {"step": 2, "order_digest": ""})
    saver.wait()
    assert len(reported) == 1 and "Read-only file system" in reported[0]
    assert [step for step, _ in list_checkpoints(folder)] == [1]
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    saver.save(3, {"step": 3, "order_digest": ""})
    saver.finish()
    assert find_newest_valid(folder, {CONTRACT}) == (folder / "step-00000003", [])


def test_metrics_of_the_time_without_space_are_written_later(disk: Path, tmp_path: Path) -> None:
    terminal, result = (tmp_path / "terminal").open("w"), EvaluationResult(1.0, 1.0, 10)
    curriculum = Curriculum((Segment(0, 0, (10,), 100),), (1000,))
    log = MetricsLog(disk / "metrics.jsonl", 1, curriculum, None, None, terminal, Pace(["here"]))
    log.add_evaluation(1, result)
    ballast = fill(disk, 0)
    whole = (disk / "metrics.jsonl").stat().st_size
    for step in range(2, 60):
        log.add_evaluation(step, result)
    assert (disk / "metrics.jsonl").read_bytes().endswith(b"\n") and whole > 0, "no torn line"
    ballast.unlink()
    log.add_evaluation(60, result)
    lines = (disk / "metrics.jsonl").read_text().splitlines()
    assert [line.split('"step": ')[1].split(",")[0] for line in lines] == [str(step) for step in range(1, 61)]
    assert (tmp_path / "terminal").read_text().count("cannot write metrics") == 1
