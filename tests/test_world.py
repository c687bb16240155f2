"""The ranks that tests fork: a process group of their own, results by rank, and an end at the first error."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.world import run_world


def add_ranks(base: int) -> tuple[float, str, str]:
    dist.init_process_group("gloo")
    total = torch.tensor(float(base + dist.get_rank()))
    dist.all_reduce(total)
    return float(total), os.environ["RANK"], os.environ["WORLD_SIZE"]


def fail_on_one() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("no such thing")
    time.sleep(600)


def die() -> None:
    os.kill(os.getpid(), 9)


def test_every_rank_answers_and_worlds_follow_each_other() -> None:
    for world_size in (1, 3, 2):
        total = 10 * world_size + sum(range(world_size))
        assert run_world(world_size, add_ranks, 10) == [(total, str(r), str(world_size)) for r in range(world_size)]
    assert "WORLD_SIZE" not in os.environ


def test_the_first_error_ends_all() -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"rank 1 failed:[\s\S]*ValueError: no such thing"):
        run_world(2, fail_on_one)
    assert time.monotonic() - start < 60
    with pytest.raises(AssertionError, match="rank 0 failed"):
        run_world(1, die)
    with pytest.raises(AssertionError, match=r"ranks \[0\] did not end within 0.5 s"):
        run_world(1, time.sleep, 600, timeout_sec=0.5)


def test_logs_of_a_failing_world_are_kept_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for keeps in ("", "1"):
        monkeypatch.setenv("KEEP_LOGS", keeps)
        with pytest.raises(AssertionError, match="rank 1 failed") as caught:
            run_world(2, fail_on_one)
        notes = getattr(caught.value, "__notes__", [])
        assert len(notes) == len(keeps)
        for note in notes:
            folder = Path(note.removeprefix("logs of the ranks: "))
            assert "ValueError: no such thing" in (folder / "rank1.log").read_text()
            shutil.rmtree(folder)
