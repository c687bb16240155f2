"""What is recorded of each attempt for its row in the report."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.report.made import write
from turbolm.errors import UserError
from turbolm.launch.status import find_runs, read_status
from turbolm.report.attempts import read_attempts
from turbolm.report.runs import check_runs
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


def test_attempts_and_their_hosts_are_the_same_everywhere(tmp_path: Path) -> None:
    """Of a Slurm job, a recorded environment, a process that started it, and none of these; and what is no attempt."""
    attempts = tmp_path / "run" / "attempts"
    write(attempts / "10/environment.json", {"host": "b"})
    write(attempts / "10/start.json", {"starter": {"host": "launcher"}})
    write(attempts / "2/slurm.json", {"job_id": "7", "hosts": ["a", "b"]})
    write(attempts / "2/environment.json", {"host": "a"})
    write(attempts / "11/start.json", {"starter": {"host": "launcher"}})
    write(attempts / "12/start.json", {"starter": None})
    write(attempts / "\N{SUPERSCRIPT TWO}/start.json", {})
    write(attempts / "notes/start.json", {})
    hosts = {2: ["a", "b"], 10: ["b"], 11: ["launcher"], 12: []}
    assert {one.number: list(one.hosts) for one in read_attempts(tmp_path / "run", [])} == hosts
    status = read_status(tmp_path / "run")
    assert {one["attempt"]: one["hosts"] for one in status.attempts} == hosts
    assert open_attempt(RunDirectory(tmp_path / "run")) == 13


@pytest.mark.parametrize("sign", ["attempts", "submissions", "contract.json", "metrics.jsonl"])
def test_what_is_a_run_is_one_for_every_command(tmp_path: Path, sign: str) -> None:
    run = tmp_path / "run"
    (run / sign).mkdir(parents=True)
    assert find_runs(tmp_path) == [run]
    check_runs([run])
    with pytest.raises(UserError, match="not a run directory"):
        check_runs([tmp_path])
    with pytest.raises(UserError, match="not a run directory"):
        read_status(tmp_path)
