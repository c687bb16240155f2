"""What the end of an attempt means for the job: done, hopeless, or worth starting again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from turbolm.errors import UserError
from turbolm.files import read_json, write_json
from turbolm.launch.job import JOB, open_job_attempt, settle
from turbolm.recipe.load import load_recipe
from turbolm.recipe.schema import Recipe
from turbolm.reliability.outcome import Outcome, failure_kind, record_rank_end, write_outcome
from turbolm.reliability.stop import StopRequest, ask_to_stop, asked_since
from turbolm.train.run_directory import RunDirectory, run_directory, stop_seen

from .harness import write_recipe


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    return load_recipe(write_recipe(tmp_path, cluster={"num_nodes": 2, "slurm": {"max_attempts_without_progress": 2}}))


@pytest.fixture
def run(recipe: Recipe) -> RunDirectory:
    return run_directory(recipe)


def start(run: RunDirectory, recipe: Recipe) -> int:
    return open_job_attempt(run, recipe, Path("recipe.yaml"), "n1,n2")


def add_checkpoint(run: RunDirectory, step: int) -> None:
    (run.checkpoints / f"step-{step:08d}").mkdir(parents=True)


def end_rank(run: RunDirectory, attempt: int, rank: int, code: int, kind: str, message: str = "") -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(rank))
        record_rank_end(run.attempt(attempt), code, kind, message)


def end_node(run: RunDirectory, attempt: int, node: int, **values: Any) -> None:
    write_json(run.attempt(attempt) / "nodes" / f"{node}.json", {"node": node, **values})


def test_each_start_opens_an_attempt_and_leaves_an_old_request_to_others(run: RunDirectory, recipe: Recipe) -> None:
    run.path.mkdir(parents=True)
    ask_to_stop(run.stop_file)
    assert start(run, recipe) == 1
    assert run.stop_file.exists()
    assert not asked_since(run.stop_file, stop_seen(run.attempt(1)))
    job = {"job_id": "7", "restarts": 0, "start_step": 0, "hosts": ["n1", "n2"]}
    assert read_json(run.attempt(1) / JOB) == job
    add_checkpoint(run, 5)
    assert start(run, recipe) == 2


def test_an_outcome_decides(run: RunDirectory, recipe: Recipe) -> None:
    for status, code in (("finished", 0), ("stopped", 75), ("refused", 2)):
        attempt = start(run, recipe)
        write_outcome(run.attempt(attempt), Outcome(status, code))
        add_checkpoint(run, attempt)
        assert settle(run, recipe, attempt)[0] == code


def test_a_job_that_hung_starts_again_and_says_on_which_rank(run: RunDirectory, recipe: Recipe) -> None:
    attempt = start(run, recipe)
    write_outcome(run.attempt(attempt), Outcome("hung", 75, "rank 1 hangs: it is stopped"))
    add_checkpoint(run, attempt)
    assert settle(run, recipe, attempt) == (75, "attempt 1: hung: rank 1 hangs: it is stopped")


def test_turbolm_stop_ends_the_job(run: RunDirectory, recipe: Recipe) -> None:
    attempt = start(run, recipe)
    ask_to_stop(run.stop_file)
    assert StopRequest(run.stop_file, stop_seen(run.attempt(attempt))).reason
    write_outcome(run.attempt(attempt), Outcome("stopped", 75))
    assert settle(run, recipe, attempt)[0] == 130


def test_a_lost_node_is_worth_another_start_and_is_named(run: RunDirectory, recipe: Recipe) -> None:
    attempt = start(run, recipe)
    add_checkpoint(run, 1)
    end_rank(run, attempt, 0, 1, "communication", "RuntimeError: Timed out waiting")
    end_node(run, attempt, 0, exit_code=1, lost=["node 1, n2 (10.0.0.2), does not answer"])
    end_node(run, attempt, 1)
    code, message = settle(run, recipe, attempt)
    assert code == 75
    assert "node 1, n2 (10.0.0.2), does not answer" in message
    outcome = read_json(run.attempt(attempt) / "outcome.json")
    assert outcome is not None
    assert outcome["status"] == "lost"  # for `turbolm status`


def test_an_error_of_one_rank_is_not_hidden_by_its_peers(run: RunDirectory, recipe: Recipe) -> None:
    attempt = start(run, recipe)
    end_rank(run, attempt, 0, 1, "communication", "Connection closed by peer")
    end_rank(run, attempt, 1, 1, "error", "ValueError: no such thing")
    end_node(run, attempt, 0, exit_code=1, lost=[])
    code, message = settle(run, recipe, attempt)
    assert code == 1
    assert "rank 1 on" in message
    assert "ValueError: no such thing" in message


def test_bad_input_is_never_tried_again(run: RunDirectory, recipe: Recipe) -> None:
    attempt = start(run, recipe)
    end_node(run, attempt, 1, refused="n2 has 7 GPUs, and cluster.gpus_per_node is 8")
    assert settle(run, recipe, attempt) == (2, "n2 has 7 GPUs, and cluster.gpus_per_node is 8")
    attempt = start(run, recipe)
    end_rank(run, attempt, 0, 2, "refused", "another contract")
    end_node(run, attempt, 0)
    assert settle(run, recipe, attempt) == (2, "another contract")


def test_no_launcher_at_all_is_not_a_lost_node(run: RunDirectory, recipe: Recipe) -> None:
    assert settle(run, recipe, start(run, recipe))[0] == 1


def test_it_gives_up_after_starts_without_a_new_checkpoint(
    run: RunDirectory, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = start(run, recipe)
    write_outcome(run.attempt(attempt), Outcome("stopped", 75))
    assert settle(run, recipe, attempt)[0] == 75  # one, of two
    add_checkpoint(run, 5)
    for expected in (75, 1):
        attempt = start(run, recipe)
        write_outcome(run.attempt(attempt), Outcome("stopped", 75))
        code, message = settle(run, recipe, attempt)
        assert code == expected
    assert "the last 2 starts of job 7 ended without a checkpoint after step 5" in message
    with pytest.raises(UserError, match="giving up"):  # after a crash that left no time to settle
        start(run, recipe)
    monkeypatch.setenv("SLURM_JOB_ID", "8")  # submitted again by the user
    assert start(run, recipe) == 4


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:1"), "communication"),
        (RuntimeError("Timed out waiting 15000ms for recv operation to complete"), "communication"),
        (ConnectionResetError(104, "Connection reset by peer"), "communication"),
        (type("DistBackendError", (RuntimeError,), {})("NCCL error"), "communication"),
        (RuntimeError("CUDA out of memory"), "error"),
        (ValueError("Timed out waiting"), "error"),
    ],
)
def test_which_errors_tell_of_a_lost_peer(error: Exception, kind: str) -> None:
    assert failure_kind(error) == kind
