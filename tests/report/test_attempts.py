"""What is recorded of each attempt for its row in the report."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest

from turbolm.report.attempts import read_attempts
from turbolm.train import run_directory
from turbolm.train.run_directory import RunDirectory, git_commit, open_attempt


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_is_that_of_the_code_and_of_nothing_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("git") is None:
        pytest.skip("no git here")
    own = tmp_path / "src"
    own.mkdir()
    code = Path(shutil.copy(run_directory.__file__, own))
    assert git_commit(own) is None, "no repository"
    git(tmp_path, "init", "--quiet")
    (tmp_path / "theirs").write_text("")
    git(tmp_path, "add", "theirs")
    git(tmp_path, "commit", "--quiet", "--message", "theirs")
    assert git_commit(own) is None, "installed below somebody's checkout"
    git(tmp_path, "add", "src")
    git(tmp_path, "commit", "--quiet", "--message", "ours")
    git(tmp_path, "tag", "v1")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_commit(own) == commit
    code.write_text("changed")
    assert git_commit(own) == f"{commit}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit(own) is None, "no git"


def test_an_attempt_records_when_it_began(tmp_path: Path) -> None:
    before = time.time()
    open_attempt(RunDirectory(tmp_path))
    (attempt,) = read_attempts(tmp_path, [])
    assert attempt.started_unix_sec is not None and before <= attempt.started_unix_sec <= time.time()
    minutes = [time.strftime("%Y-%m-%d %H:%M", time.gmtime(at)) for at in (before, time.time())]
    assert attempt.row()[2] in minutes and attempt.duration_sec is None
