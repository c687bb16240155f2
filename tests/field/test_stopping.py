"""A request to stop counts whenever it was given, for the starts it was meant for, or is refused with the reason."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.launch.harness import write_recipe
from turbolm.errors import UserError
from turbolm.files import write_json
from turbolm.launch import local, store
from turbolm.launch.attempt import attempt_of, stoppable
from turbolm.launch.job import open_job_attempt, seen_by
from turbolm.launch.local import Ranks, start_ranks, wait_for_ranks
from turbolm.launch.slurm import Submission, write_submission
from turbolm.launch.status import read_status, stop_run
from turbolm.recipe.load import load_recipe
from turbolm.recipe.schema import Recipe
from turbolm.reliability.outcome import Outcome, read_outcome, write_outcome
from turbolm.reliability.run_lock import this_process
from turbolm.reliability.stop import Seen, SignalRequests, StopRequest, ask_to_stop, asked_since, look
from turbolm.train.run_directory import RunDirectory, open_attempt, run_directory


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    return load_recipe(write_recipe(tmp_path))


@pytest.fixture
def run(recipe: Recipe) -> RunDirectory:
    run = run_directory(recipe)
    run.path.mkdir(parents=True)
    return run


# ------------------------------------------------------------------------------------ which starts a request is for


def test_a_request_is_for_the_starts_that_there_are(run: RunDirectory) -> None:
    before = look(run.stop_file)
    first, second = StopRequest(run.stop_file, before), StopRequest(run.stop_file, before)
    assert first.reason is None
    ask_to_stop(run.stop_file)
    assert first.reason and second.reason, "two starts of one run: neither takes the request from the other"
    later = StopRequest(run.stop_file, look(run.stop_file))
    assert later.reason is None, "a start after the request was not meant"
    ask_to_stop(run.stop_file)
    assert later.reason


@pytest.mark.parametrize("by", ["turbolm stop", "touch", "echo", "turbolm stop on a full disk"])
def test_however_the_file_is_written_it_counts(by: str, run: RunDirectory) -> None:
    for seen in (look(run.stop_file), None):  # not there before; there, and of an earlier request
        seen = seen or look(run.stop_file)
        if by == "echo":
            with run.stop_file.open("a") as file:
                file.write("\n")
        elif by == "touch" or "full" in by:
            time.sleep(0.01)  # longer than the step of a file system's clock
            run.stop_file.touch()
        else:
            ask_to_stop(run.stop_file)
        assert asked_since(run.stop_file, seen)
        assert not asked_since(run.stop_file, look(run.stop_file))


def test_a_host_that_still_sees_an_older_file_is_not_misled(run: RunDirectory) -> None:
    ask_to_stop(run.stop_file)
    old = look(run.stop_file)
    ask_to_stop(run.stop_file)
    new = look(run.stop_file)
    run.stop_file.write_text("user\n")  # what a network file system may show for a while
    os.utime(run.stop_file, ns=(old.mtime_ns, old.mtime_ns))
    assert not asked_since(run.stop_file, new)
    run.stop_file.unlink()
    assert not asked_since(run.stop_file, new)
    assert not asked_since(run.stop_file, Seen())


def test_a_signal_to_one_attempt_does_not_stop_another(run: RunDirectory) -> None:
    requests = []
    for _ in range(2):
        attempt = open_attempt(run)
        request = StopRequest(run.stop_file, look(run.stop_file))
        request.join(request.seen, run.attempt_stop_file(attempt))
        requests.append(request)
    run.attempt_stop_file(1).touch()
    assert requests[0].reason and not requests[1].reason


# ---------------------------------------------------------------------------------------------------- queued jobs


def submission(tmp_path: Path) -> Submission:
    write_recipe(tmp_path, cluster={"slurm": {}})
    return write_submission(tmp_path / "recipe.yaml")


def start_job(made: Submission, job_id: int, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("SLURM_JOB_ID", str(job_id))
    recipe_file = made.folders[0] / "recipe.yaml"
    recipe = load_recipe(recipe_file)
    return open_job_attempt(run_directory(recipe), recipe, recipe_file, "n1")


def test_a_job_stopped_while_queued_never_trains_and_a_later_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = submission(tmp_path)
    write_json(made.folders[0] / "job.json", {"job_id": "7"})
    other = submission(tmp_path)
    assert read_status(made.runs[0].path).waiting_jobs[0] == "job 7"
    assert "job 7 will not train when Slurm starts it" in stop_run(made.runs[0].path)
    with (
        pytest.raises(SystemExit) as end,
        stoppable(made.runs[0], seen_by(made.folders[0] / "recipe.yaml", made.runs[0])),
    ):
        time.sleep(20)  # its prepare
    assert end.value.code == 130
    for job_id, one in ((7, made), (8, other), (7, made)):
        with pytest.raises(UserError, match=f"asked to stop after job {job_id} was submitted"):
            start_job(one, job_id, monkeypatch)
    assert read_status(made.runs[0].path).attempts == []
    assert start_job(submission(tmp_path), 9, monkeypatch) == 1, "submitted after the request"


def test_a_job_that_slurm_starts_again_obeys_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = submission(tmp_path)
    attempt = start_job(made, 7, monkeypatch)
    write_outcome(made.runs[0].attempt(attempt), Outcome("lost", 75, "a node was lost"))
    assert "job 7 will not train when Slurm starts it again" in stop_run(made.runs[0].path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(UserError, match="asked to stop"):
        start_job(made, 7, monkeypatch)


@pytest.mark.parametrize(("ended", "reason"), [("killed", "killed"), ("failed", "failed"), ("new", "no job waits")])
def test_a_request_that_nothing_could_obey_is_refused(ended: str, reason: str, run: RunDirectory) -> None:
    if ended == "new":
        write_json(run.contract, {})
    else:
        gone = subprocess.Popen(["true"])
        gone.wait()
        attempt = _attempt_of(run, gone.pid)
        if ended == "failed":
            write_outcome(run.attempt(attempt), Outcome("failed", 1, "no such thing"))
    with pytest.raises(UserError, match=f"nothing to stop.*{reason}"):
        stop_run(run.path)
    assert not run.stop_file.exists()


def _attempt_of(run: RunDirectory, pid: int) -> int:
    return open_attempt(run, starter=replace(this_process(), pid=pid, started="1"))


# ---------------------------------------------------------------------------------------- before the ranks are there


@pytest.mark.parametrize("how", ["turbolm stop", signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_a_start_that_prepares_is_stopped_and_tells(how: Any, run: RunDirectory) -> None:
    seen = look(run.stop_file)

    def ask() -> None:
        time.sleep(0.2)
        if how == "turbolm stop":
            assert "asked to stop" in stop_run(run.path), "a start that prepares is seen to run"
        else:
            os.kill(os.getpid(), how)

    def prepare() -> None:
        asking.start()
        time.sleep(20)

    asking = threading.Thread(target=ask)
    with pytest.raises(SystemExit) as end, attempt_of(run, seen) as attempt, stoppable(run, seen):
        prepare()
    asking.join()
    code = 130 if how in ("turbolm stop", signal.SIGINT) else 75
    assert end.value.code == code
    outcome = read_outcome(run.attempt(attempt))
    assert outcome is not None and (outcome.status, outcome.exit_code) == ("stopped", code)
    assert read_status(run.path).state == "stopped"


@pytest.mark.parametrize(
    ("error", "status"),
    [(UserError("bad data"), "refused"), (OSError(28, "full"), "refused"), (KeyError("x"), "failed")],
)
def test_whatever_ends_a_start_its_attempt_tells_why(error: Exception, status: str, run: RunDirectory) -> None:
    with pytest.raises(type(error)), attempt_of(run, Seen()):
        raise error
    found = read_status(run.path)
    assert found.state == status and found.attempts[0]["reason"]


# ----------------------------------------------------------------------------------------------- signals and ranks


def test_a_signal_to_the_whole_group_is_one_request_and_a_second_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    with SignalRequests(lambda number: heard.append("first"), lambda number: heard.append("again")):
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):  # the group, its parent, and a wrapper's INT
            os.kill(os.getpid(), number)
        assert heard == ["first"]
        monkeypatch.setattr("turbolm.reliability.stop._ONE_REQUEST_SEC", 0.0)
        os.kill(os.getpid(), signal.SIGINT)
    assert heard == ["first", "again"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def launched(run: RunDirectory, recipe: Recipe, *command: str) -> tuple[subprocess.Popen[bytes], Ranks]:
    attempt = open_attempt(run)
    process = start_ranks(command, dict(os.environ), run.attempt(attempt) / "launcher.log")
    return process, Ranks(run, attempt, range(2), recipe.execution)


def signals(*after: tuple[float, int]) -> None:
    def send() -> None:
        for delay_sec, number in after:
            time.sleep(delay_sec)
            os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


def test_the_first_signal_ends_what_has_no_rank_yet(run: RunDirectory, recipe: Recipe) -> None:
    process, ranks = launched(run, recipe, "sleep", "600")
    signals((0.3, signal.SIGINT))
    outcome = wait_for_ranks(process, ranks)
    assert outcome is not None and (outcome.status, outcome.exit_code) == ("stopped", 130)
    assert "nothing had been trained" in outcome.message
    assert not run.attempt_stop_file(1).exists()


def test_the_second_signal_says_what_was_lost(
    run: RunDirectory, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("turbolm.reliability.stop._ONE_REQUEST_SEC", 0.2)
    run.metrics.write_text("".join(f'{{"step": {n}, "train/loss": 1.0, "tokens_seen": {n}}}\n' for n in range(1, 58)))
    (run.checkpoints / "step-00000040").mkdir(parents=True)
    process, ranks = launched(run, recipe, "sleep", "600")
    (run.attempt(1) / "log.rank0.txt").touch()  # the world has formed
    signals((0.3, signal.SIGTERM), (0.6, signal.SIGTERM))
    outcome = wait_for_ranks(process, ranks)
    assert run.attempt_stop_file(1).exists() and not run.stop_file.exists()
    assert "saving after this step" in capsys.readouterr().err
    assert outcome is not None and outcome.exit_code == 130
    assert outcome.message == "ended at once; steps 41 to 57 lost, the newest checkpoint is of step 40"


@pytest.mark.parametrize("ranks_started", [0, 1])
def test_a_world_that_does_not_form_ends_with_the_reason(
    ranks_started: int, run: RunDirectory, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ranks' own watchdog gets a while longer: where there is one, it knows more."""
    monkeypatch.setattr(local, "_WATCHDOG_SEC", 0.6)
    execution = recipe.execution.model_copy(update={"startup_timeout": 1})
    rank = "[sys.executable, '-c', 'import time; time.sleep(600)', 'turbolm.train']"
    child = f"import subprocess, sys; subprocess.Popen({rank})"
    idle = "import time; time.sleep(600)"
    process, ranks = launched(run, recipe, sys.executable, "-c", f"{child if ranks_started else 'pass'}; {idle}")
    begun = time.monotonic()
    outcome = wait_for_ranks(process, Ranks(run, ranks.attempt, ranks.numbers, execution))
    assert 1 <= time.monotonic() - begun < 100
    assert outcome is not None and (outcome.status, outcome.exit_code) == ("failed", 1)
    assert "2 ranks of this machine did not meet within" in outcome.message
    assert f"(execution.startup_timeout): {ranks_started} of them were started" in outcome.message


def test_a_rank_whose_launcher_died_between_fork_and_start_ends_itself() -> None:
    rank = "from turbolm.reliability.orphans import end_with_launcher; end_with_launcher({}); print('lives')"
    for launcher, ends in ((os.getppid(), False), (2**22, True)):
        # This process stands for `accelerate launch`: its parent is the launcher, or has ended.
        done = subprocess.run(
            [sys.executable, "-c", rank.format(launcher)], capture_output=True, text=True, check=False
        )
        assert (done.returncode == -signal.SIGKILL, done.stdout) == (ends, "" if ends else "lives\n")


def test_a_stop_during_prepare_is_one_request_for_its_workers_too(
    run: RunDirectory, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TERM to the process group may end a worker that has only begun: that is the stop, and no lack of memory."""

    def broken(*_: Any, **__: Any) -> Path:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except KeyboardInterrupt:
            raise UserError("A worker process of prepare was killed") from None
        raise AssertionError

    monkeypatch.setattr(store, "prepare", broken)
    monkeypatch.setattr(store, "finished_shards", lambda recipe: (0, 0))
    with pytest.raises(SystemExit) as end:
        store.prepare_store(recipe)
    assert end.value.code == 75
