"""What is said of an attempt on one machine that left no outcome (tests/launch/test_job.py has those of Slurm jobs)."""

from __future__ import annotations

from pathlib import Path

import pytest

from turbolm.errors import RunError, UserError
from turbolm.reliability.outcome import Outcome, classify, explain, read_outcome, record_rank_end, write_outcome


def end_rank(folder: Path, rank: int, *end: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(rank))
        record_rank_end(folder, *end)  # type: ignore[arg-type]


def test_the_rank_that_failed_is_named_and_not_its_peers(tmp_path: Path) -> None:
    end_rank(tmp_path, 0, *classify(RuntimeError("Connection closed by peer")))
    end_rank(tmp_path, 1, *classify(ValueError("first line\nsecond line")))
    outcome = explain(tmp_path, launcher_code=1)
    assert (outcome.status, outcome.exit_code) == ("failed", 1)
    assert "rank 1 on" in outcome.message
    assert outcome.message.splitlines()[1].endswith("ValueError: first line")
    assert "Connection closed" not in outcome.message
    assert outcome.message.endswith(f"logs: {tmp_path}")


def test_what_the_user_must_change_comes_before_all_else(tmp_path: Path) -> None:
    end_rank(tmp_path, 0, *classify(UserError("another contract")))
    end_rank(tmp_path, 1, *classify(ValueError("as a consequence")))
    assert explain(tmp_path, 1) == Outcome("refused", 2, "another contract", unix_time=pytest.approx(0, abs=1e12))


@pytest.mark.parametrize(("launcher_code", "exit_code"), [(-9, 137), (0, 1), (2, 1), (3, 3)])
def test_ranks_that_left_nothing_have_the_launchers_last_words(
    tmp_path: Path, launcher_code: int, exit_code: int
) -> None:
    (tmp_path / "launcher.log").write_text("\n".join(f"line {number}" for number in range(40)))
    outcome = explain(tmp_path, launcher_code)
    assert outcome.exit_code == exit_code
    assert "line 24" not in outcome.message
    assert "line 25\n" in outcome.message
    assert "line 39\n" in outcome.message


def test_an_error_of_the_run_itself_is_told_without_its_type() -> None:
    assert classify(RunError("the disk is full")) == (1, "error", "the disk is full")


def test_outcomes_are_read_back_and_foreign_ones_ignored(tmp_path: Path) -> None:
    assert read_outcome(tmp_path) is None
    write_outcome(tmp_path, Outcome("stopped", 75))
    found = read_outcome(tmp_path)
    assert found is not None
    assert (found.status, found.exit_code, found.message) == ("stopped", 75, "")
    (tmp_path / "outcome.json").write_text('{"other": 1}')
    assert read_outcome(tmp_path) is None
