"""The rendered script under bash: what it starts, how it takes signals, when it asks for a requeue."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from .harness import Shell, make_programs, render, run_script

REQUEUE = ["requeue", "7"]


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    make_programs(tmp_path)

    def run(slurm: dict[str, Any] | None = None, **behaviour: Any) -> Shell:
        submission = render(tmp_path, monkeypatch, cluster={"num_nodes": 2, "slurm": slurm or {}})
        (tmp_path / "runs/tiny/attempts/3").mkdir(parents=True, exist_ok=True)
        return run_script(submission.script, tmp_path, run=str(submission.runs[0].path), **behaviour)

    return run


def test_it_prepares_once_then_starts_one_task_a_node(shell: Any, tmp_path: Path) -> None:
    done = shell()
    assert done.code == 0, done.stderr
    recipe = str(tmp_path / "runs/tiny/submissions/1/recipe.yaml")
    python = str(tmp_path / "bin/python")
    assert done.of("python") == [
        ["-m", "turbolm.cli", "prepare", recipe],
        ["-m", "turbolm.launch.job", "open", "--recipe", recipe, "--hosts", "n1,n2"],
        ["-m", "turbolm.launch.job", "settle", "--recipe", recipe, "--attempt", "3"],
    ]
    assert done.of("srun") == [
        ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
        + [python, "-m", "turbolm.launch.node", "--recipe", recipe, "--attempt", "3", "--hosts", "n1,n2"]
    ]
    assert REQUEUE not in done.of("scontrol")


def test_it_requeues_on_75_only(shell: Any) -> None:
    done = shell(settle=75)
    assert done.code == 75
    assert done.of("scontrol")[-1] == REQUEUE
    for code in (1, 2, 130):
        done = shell(settle=code)
        assert done.code == code
        assert REQUEUE not in done.of("scontrol")


def test_a_cancelled_job_and_one_without_requeue_stay_ended(shell: Any) -> None:
    assert REQUEUE not in shell(settle=75, state="COMPLETING").of("scontrol")
    done = shell({"requeue": False}, settle=75)
    assert done.code == 75
    assert REQUEUE not in done.of("scontrol")


def test_a_failed_prepare_or_a_refused_attempt_starts_no_ranks(shell: Any) -> None:
    for behaviour in ({"prepare": 2}, {"open": 2}):
        done = shell(**behaviour)
        assert done.code == 2
        assert done.of("srun") == []
        assert REQUEUE not in done.of("scontrol")


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_becomes_the_stop_file_and_the_shell_waits(shell: Any, tmp_path: Path, number: int) -> None:
    done = shell(signal_while_training=number, settle=75)
    assert (tmp_path / "runs/tiny/attempts/3/stop").read_text() == "slurm\n"
    assert not (tmp_path / "runs/tiny/stop").exists(), "which another job of the run would obey"
    assert [arguments[2] for arguments in done.of("python")][-1] == "settle"  # after the ranks ended, not before
    assert done.of("scontrol")[-1] == REQUEUE


def test_a_signal_ends_prepare_and_requeues(shell: Any) -> None:
    done = shell(signal_while_preparing=signal.SIGUSR2)
    assert done.code == 75
    assert done.of("srun") == []
    assert done.of("scontrol")[-1] == REQUEUE
