"""Which checkpoints stay: decided by what their manifests say, once the new one is in place."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.checkpoint.toy import Engine, build_saver, write_checkpoint
from turbolm.checkpoint import manifest
from turbolm.checkpoint.ranks import ALONE, Agree
from turbolm.checkpoint.retention import Kept, Retention, remove_old
from turbolm.checkpoint.verify import find_newest_valid, hash_ahead, verify_checkpoint
from turbolm.files import sha256_file


def kept(retention: Retention, checkpoints: list[tuple[int, int, float | None]]) -> list[int]:
    """The steps that stay of (step, tokens seen, loss), given in any order."""
    known = [Kept(step, tokens, loss, Path(f"step-{step:08d}")) for step, tokens, loss in checkpoints]
    assert retention.keeps(known) == retention.keeps(known[::-1])
    return sorted(one.step for one in known if one.path in retention.keeps(known))


def test_the_rules() -> None:
    saved = [(step, 40 * step, loss) for step, loss in zip(range(1, 9), (5, 4, None, 2, 3, None, 2, 9), strict=True)]
    assert kept(Retention(3), saved) == [6, 7, 8]
    # Tokens 40, 80, ..., 320: the first at or after 100, 200 and 300.
    assert kept(Retention(1, keep_every_tokens=100), saved) == [3, 5, 8]
    assert kept(Retention(1, keep_every_tokens=1000), saved) == [8]
    assert kept(Retention(1, keep_best=True), saved) == [4, 8], "of two equal losses the earlier"
    assert kept(Retention(2, keep_every_tokens=200, keep_best=True), saved) == [4, 5, 7, 8]
    assert kept(Retention(1, keep_best=True), [(1, 40, None)]) == [1]


def test_milestones_and_the_best_stay_along_a_run(tmp_path: Path, process_group: None) -> None:
    """Removing as one goes leaves what removing at the end would."""
    engine, losses = Engine(), {2: 3.0, 4: 1.0, 6: 2.0}
    saver = build_saver(tmp_path, engine, retention=Retention(2, keep_every_tokens=300, keep_best=True))
    for step in range(1, 10):
        saver.save(step, {"step": step, "order_digest": "", "tokens_seen": 100 * step}, losses.get(step))
        saver.wait()
        assert tmp_path / f"step-{step:08d}" in [path for _, path in manifest.list_checkpoints(tmp_path)]
    assert [step for step, _ in manifest.list_checkpoints(tmp_path)] == [3, 4, 6, 8, 9]


def test_a_later_or_unreadable_checkpoint_counts_for_nothing(tmp_path: Path, process_group: None) -> None:
    """A run that went back because its newest was damaged must not remove what it went back to."""
    for step in (1, 2, 3, 7):
        write_checkpoint(tmp_path, step)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000002.copy")
    (tmp_path / "step-00000003" / "manifest.json").write_text("{")
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000004")  # of step 1 by its content
    assert remove_old(tmp_path, Retention(keep_last=1), newest_step=5) == []
    left = [step for step, _ in manifest.list_checkpoints(tmp_path)]
    assert left == [2, 3, 4, 7]
    write_checkpoint(tmp_path, 5)
    assert [path.name for path in remove_old(tmp_path, Retention(keep_last=1), newest_step=5)] == ["step-00000002"]


def test_neither_time_nor_the_order_of_names_matters(tmp_path: Path, process_group: None) -> None:
    newest = write_checkpoint(tmp_path, 7)
    write_checkpoint(tmp_path, 3)
    os.utime(newest, (0, 0))
    (tmp_path / ".tmp-step-00000009").mkdir()
    (tmp_path / ".old-step-00000008").mkdir()
    (tmp_path / "step-9").mkdir()
    assert [step for step, _ in manifest.list_checkpoints(tmp_path)] == [3, 7]
    assert find_newest_valid(tmp_path) == (newest, [])
    assert find_newest_valid(tmp_path / "nothing") == (None, [])
    assert manifest.checkpoint_name(123_456_789) < manifest.checkpoint_name(23_456_789), "as names"
    (tmp_path / manifest.checkpoint_name(123_456_789)).mkdir()
    assert manifest.list_checkpoints(tmp_path)[-1][0] == 123_456_789
    manifest.clear_leftovers(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_a_step_can_be_saved_again(tmp_path: Path, process_group: None) -> None:
    """The newest was damaged, the run went back and comes to the same step."""
    write_checkpoint(tmp_path, 1)
    damaged = write_checkpoint(tmp_path, 2)
    values = json.loads((damaged / "manifest.json").read_text())
    (damaged / "manifest.json").write_text(json.dumps({**values, "files": {}}))
    assert verify_checkpoint(damaged) != []
    write_checkpoint(tmp_path, 2)
    assert verify_checkpoint(damaged) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_processes_share_the_hashing_and_agree(tmp_path: Path, process_group: None) -> None:
    """Each looks at its own files; a fault in any of them makes all pass the checkpoint over."""
    older, newer = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    files = json.loads((newer / "manifest.json").read_text())["files"]
    for name in files:
        content = (newer / name).read_bytes()
        (newer / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
        problem = f"{name}: content changed (SHA-256 differs)"
        answers: dict[int, tuple[Path | None, list[str]]] = {}
        meeting = Meeting(3)

        def find(rank: int, answers: dict[int, Any] = answers, meeting: Meeting = meeting) -> None:
            answers[rank] = find_newest_valid(tmp_path, None, Member(meeting, rank))

        threads = [threading.Thread(target=find, args=(rank,)) for rank in range(3)]
        with patch("turbolm.checkpoint.verify.sha256_file", wraps=sha256_file) as hashing:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
        assert list(answers.values()) == [(older, [f"{newer}: {problem}"])] * 3
        hashed = sorted(call.args[0] for call in hashing.call_args_list)
        assert hashed == sorted(path / file for path in (older, newer) for file in files), "each file by one process"
        (newer / name).write_bytes(content)


class Meeting:
    """Where threads leave values for each other."""

    def __init__(self, size: int):
        self.barrier, self.values = threading.Barrier(size), [None] * size  # type: ignore[var-annotated]

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait(30)
        everything = list(self.values)
        self.barrier.wait(30)
        return everything


class Member(Agree):
    """A thread that agrees as a rank does."""

    def __init__(self, meeting: Meeting, rank: int):
        self.meeting, self.rank, self.num_ranks = meeting, rank, meeting.barrier.parties

    def gather(self, value: Any) -> list[Any] | None:
        everything = self.meeting.exchange(self.rank, value)
        return everything if self.rank == 0 else None

    def scatter(self, values: Sequence[Any] | None) -> Any:
        return self.meeting.exchange(self.rank, values)[0][self.rank]


def test_what_was_hashed_ahead_is_not_hashed_again(
    tmp_path: Path, process_group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, newer = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    hashed = hash_ahead(tmp_path, ALONE)
    assert hashed(newer) == []
    assert hashed(older) is None, "only the newest is looked at"
    with monkeypatch.context() as patch:
        patch.setattr("turbolm.checkpoint.verify._hash_files", lambda *_: pytest.fail("hashed again"))
        assert find_newest_valid(tmp_path, hashed=hashed) == (newer, [])
    content = (newer / "trainer.json").read_bytes()
    (newer / "trainer.json").write_bytes(content.replace(b"2", b"3"))
    found, rejected = find_newest_valid(tmp_path, hashed=hash_ahead(tmp_path, ALONE))
    assert found == older
    assert rejected == [f"{newer}: trainer.json: content changed (SHA-256 differs)"]
    assert hash_ahead(tmp_path / "nothing", ALONE)(newer) is None
