"""Called by the batch shell of a Slurm job: open an attempt, and decide what its end means.

    python -m turbolm.launch.job open --recipe FILE --hosts a,b     prints the attempt's number
    python -m turbolm.launch.job settle --recipe FILE --attempt N   exit code 75: start the job again
    python -m turbolm.launch.job unprepared --recipe FILE --code N FILE...     the same of a job that prepares data

An attempt is started again when it stopped cleanly because Slurm asked (its outcome says 75), or when it lost a
node: some rank or node launcher is gone, or could not reach the others, and none has an error of its own.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from turbolm.checkpoint.manifest import list_checkpoints
from turbolm.errors import EXIT_FAILED, EXIT_OK, EXIT_REQUEUE, EXIT_SIGNAL, EXIT_STOPPED, UserError, exit_code_of
from turbolm.files import read_json, write_json
from turbolm.launch.prepare_job import prepared_bytes
from turbolm.launch.slurm import SEEN, STARTED, copy_script
from turbolm.recipe.load import load_recipe
from turbolm.recipe.paths import make_folder
from turbolm.recipe.schema import Recipe
from turbolm.reliability.outcome import (
    FAILED,
    OUTCOME,
    STOPPED,
    Outcome,
    explain,
    outcome_of,
    read_outcome,
    write_outcome,
)
from turbolm.reliability.run_lock import RunLock
from turbolm.reliability.stop import Seen, asked_since, look, read_seen
from turbolm.report.attempts import attempt_numbers
from turbolm.train.run_directory import (
    RunDirectory,
    open_attempt,
    refuse_links_out,
    run_directory,
    stop_seen,
)

PREPARED = "prepare.json"  # beside a job's recipe: bytes prepared whenever a start of its prepare job was stopped
JOB = "slurm.json"  # of an attempt: which start of which job it is, and from which step


def open_job_attempt(run: RunDirectory, recipe: Recipe, recipe_file: Path, hosts: str) -> int:
    """Start an attempt of this job; returns its number, or raises UserError when it should not start."""
    job_id = os.environ["SLURM_JOB_ID"]
    restarts = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    make_folder(run.path, "execution.runs_dir")
    seen = seen_by(recipe_file, run)
    if asked_since(run.stop_file, seen):
        raise UserError(
            f"{run.path} was asked to stop after job {job_id} was submitted, so it does not train; submit it anew with "
            f"`turbolm submit`, or remove {run.stop_file}"
        )
    refuse_links_out(run)
    RunLock(run.path).wait_until_free()
    refuse_without_progress(run, recipe, job_id)
    attempt = open_attempt(run, seen)
    record = {"job_id": job_id, "restarts": restarts, "start_step": newest_step(run), "hosts": hosts.split(",")}
    write_json(run.attempt(attempt) / JOB, record)
    copy_script(recipe_file, run.attempt(attempt))
    if is_of_job(recipe_file):
        write_json(recipe_file.with_name(STARTED), {"attempt": attempt})
    return attempt


def seen_by(recipe_file: str | Path, run: RunDirectory) -> Seen:
    """What had been asked of the run when this start of it began: for a job's recipe, when it was submitted."""
    recipe_file = Path(recipe_file)
    return read_seen(recipe_file.with_name(SEEN)) if is_of_job(recipe_file) else look(run.stop_file)


def is_of_job(recipe_file: Path) -> bool:
    """Whether `turbolm submit` wrote this recipe."""
    return recipe_file.with_name(SEEN).is_file()


@contextmanager
def told_to_job(recipe_file: str | Path) -> Iterator[None]:
    """What ends the block is written beside a job's recipe: the job has no attempt yet whose folder could tell."""
    recipe_file = Path(recipe_file)
    if is_of_job(recipe_file):  # what ended an earlier start of the job
        (recipe_file.parent / OUTCOME).unlink(missing_ok=True)
    try:
        yield
    except BaseException as error:
        if is_of_job(recipe_file) and not recipe_file.with_name(STARTED).exists():
            write_outcome(recipe_file.parent, outcome_of(error))
        raise


def refuse_without_progress(run: RunDirectory, recipe: Recipe, job_id: str) -> None:
    """Raise UserError when the last starts of this job all ended where they began."""
    assert recipe.cluster.slurm is not None
    limit, step = recipe.cluster.slurm.max_attempts_without_progress, newest_step(run)
    jobs = [read_json(run.attempt(number) / JOB) for number in attempt_numbers(run.path)]
    idle = 0
    for job in reversed([job for job in jobs if job is not None and job["job_id"] == job_id]):
        if int(job["start_step"]) < step:
            break
        idle += 1
    if idle >= limit:
        raise UserError(
            f"giving up: the last {idle} starts of job {job_id} ended without a checkpoint after step {step} "
            f"(cluster.slurm.max_attempts_without_progress is {limit}); logs: {run.attempt(0).parent}"
        )


def newest_step(run: RunDirectory) -> int:
    """The step of the newest complete checkpoint, or 0; in random restarts, how many candidates are done."""
    checkpoints = list_checkpoints(run.checkpoints)
    if not checkpoints:
        losses = (read_json(run.random_restarts / "candidates.json") or {}).get("losses")
        return len(losses) if isinstance(losses, list) else 0
    return checkpoints[-1][0]


def settle(run: RunDirectory, recipe: Recipe, attempt: int) -> tuple[int, str]:
    """The job's exit code and what to tell the user. `EXIT_REQUEUE` means: worth starting again now."""
    folder = run.attempt(attempt)
    outcome = read_outcome(folder)
    by_user = asked_since(run.stop_file, stop_seen(folder))
    if outcome is None:
        outcome = explain(folder)
        write_outcome(folder, outcome)
        message = outcome.message
    else:
        message = ": ".join(filter(None, [f"attempt {attempt}", outcome.status, outcome.message]))
    if outcome.exit_code != EXIT_REQUEUE:
        return outcome.exit_code, message
    if by_user:
        return EXIT_STOPPED, f"attempt {attempt}: stopped by `turbolm stop`; submit it again to go on"
    try:
        refuse_without_progress(run, recipe, os.environ.get("SLURM_JOB_ID", ""))
    except UserError as error:
        return EXIT_FAILED, f"{message}\nturbolm: {error}"
    return EXIT_REQUEUE, message


def settle_prepare(recipe: Recipe, recipe_file: Path, code: int, recipe_files: Sequence[Path]) -> Outcome:
    """Tell beside every recipe of a job that prepares why it ended, after `recipe_file` with exit code `code`.

    Returns the end of the job; with `EXIT_REQUEUE` it is worth starting again now.
    """
    assert recipe.cluster.slurm is not None
    limit = recipe.cluster.slurm.max_attempts_without_progress
    prefix = f"prepare job {os.environ.get('SLURM_JOB_ID', '')}: "
    outcome = read_outcome(recipe_file.parent) or _end_of_prepare(code)
    if outcome.exit_code == EXIT_REQUEUE:
        sizes = [*((read_json(recipe_file.with_name(PREPARED)) or {}).get("bytes", [])), prepared_bytes(recipe)]
        write_json(recipe_file.with_name(PREPARED), {"bytes": sizes})
        if len(sizes) > limit and len(set(sizes[-limit - 1 :])) == 1:
            text = f"giving up: its last {limit} starts prepared nothing more, and were stopped by Slurm"
            outcome = Outcome(FAILED, EXIT_FAILED, f"{text} (cluster.slurm.max_attempts_without_progress is {limit})")
    outcome = replace(outcome, message=prefix + outcome.message.removeprefix(prefix))
    for file in recipe_files:
        write_outcome(file.parent, outcome)
    return outcome


def _end_of_prepare(code: int) -> Outcome:
    """The end of a prepare that has told none: it was killed, or not started."""
    if code == EXIT_REQUEUE:
        return Outcome(STOPPED, code, "stopped by Slurm")
    if code <= EXIT_SIGNAL:
        return Outcome(FAILED, code, f"ended with exit code {code}; its log tells more")
    message = f"was killed by signal {code - EXIT_SIGNAL}"
    if code == EXIT_SIGNAL + signal.SIGKILL:
        message += (
            ", possibly by the out-of-memory killer; raise cluster.slurm.prepare.mem or lower execution.prepare_workers"
        )
    return Outcome(FAILED, code, message)


def _open(recipe_file: Path, hosts: str) -> int:
    recipe = load_recipe(recipe_file)
    with told_to_job(recipe_file):
        print(open_job_attempt(run_directory(recipe), recipe, recipe_file, hosts))
    return EXIT_OK


def _settle(recipe_file: Path, attempt: str) -> int:
    recipe = load_recipe(recipe_file)
    code, message = settle(run_directory(recipe), recipe, int(attempt))
    print(f"turbolm: {message}", file=sys.stderr)
    return code


def _unprepared(recipe_file: Path, code: int, recipe_files: Sequence[Path]) -> int:
    outcome = settle_prepare(load_recipe(recipe_file), recipe_file, code, recipe_files)
    print(f"turbolm: {outcome.message}", file=sys.stderr)
    return outcome.exit_code


def main() -> int:
    """Run one of the three commands."""
    parser = argparse.ArgumentParser(prog="python -m turbolm.launch.job", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, option, action in (("open", "--hosts", _open), ("settle", "--attempt", _settle)):
        command = commands.add_parser(name)
        command.add_argument("--recipe", type=Path, required=True)
        command.add_argument(option, dest="value", required=True)
        command.set_defaults(run=lambda given, action=action: action(given.recipe, given.value))
    command = commands.add_parser("unprepared")
    command.add_argument("--recipe", type=Path, required=True)
    command.add_argument("--code", type=int, required=True)
    command.add_argument("recipes", type=Path, nargs="+")
    command.set_defaults(run=lambda given: _unprepared(given.recipe, given.code, given.recipes))
    given = parser.parse_args()
    return exit_code_of(lambda: given.run(given))


if __name__ == "__main__":
    sys.exit(main())
