"""Resume a run whose folder is empty from its mirror (`checkpoint.mirror`), and start copying to it. Torch-free.

What is fetched is checked against the hashes of its record in a folder of its own, and moved into the run folder when
all of it is there, the checkpoint last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from turbolm.checkpoint.manifest import checkpoint_name, list_checkpoints, remove_folder
from turbolm.checkpoint.mirror import (
    KEY,
    RECORD,
    RUN_FILES,
    Mirror,
    adopt,
    claim,
    mirror_root,
    read_current,
    read_local,
    renew,
    wrote_last,
)
from turbolm.checkpoint.mirror_upload import UploadJob, is_run_file
from turbolm.checkpoint.mirroring import Mirroring
from turbolm.errors import UserError
from turbolm.plan.plan import Plan
from turbolm.recipe.contract import changed_keys, comparable, contract_of
from turbolm.recipe.paths import make_folder
from turbolm.recipe.schema import Recipe
from turbolm.reliability.run_lock import RunLock
from turbolm.report.attempts import attempt_numbers
from turbolm.storage import StorageError, download_all
from turbolm.train.run_contract import as_recorded
from turbolm.train.run_directory import RunDirectory, run_directory
from turbolm.units import format_bytes

_STAGING = ".from-mirror"
_THREADS = 8
_ANY_PRECISION = ("train.precision", "auto")  # the training machine decides it


def fetch_run(recipe: Recipe) -> None:
    """Fetch the newest intact checkpoint of the recipe's mirror, if the run folder has none. For one process.

    A folder whose run has been continued elsewhere since gets what is newer there. Raises UserError where a run without
    a checkpoint cannot read the mirror, and where it holds a run with another learning contract or checkpoints none of
    which is intact: a run that silently started over would be worse.
    """
    url, run = recipe.checkpoint.mirror, run_directory(recipe)
    if url is None:
        return
    root, has_state = mirror_root(url, recipe.name), has_own_state(run)
    try:
        current = read_current(root)
    except StorageError as error:
        if not has_state:
            raise _unreachable(error) from None
        print(f"{KEY}: {error}. Whether it has newer checkpoints than {run.path} is not known", flush=True)
        return
    mine = read_local(run.path)
    if current is None or has_state and (mine.get("id") != current["id"] or wrote_last(mine, current)):
        return  # what belongs to another run is refused when this one would write there
    if mine.get("id", current["id"]) != current["id"]:
        raise UserError(f"{KEY}: {root.url} holds the checkpoints of another run than {run.path}, which was begun here")
    make_folder(run.path, "execution.runs_dir")
    lock = RunLock(run.path)
    lock.acquire()
    try:
        _fetch_newest(Mirror(root, current["id"]), run, recipe)
        adopt(run.path, current)
    except StorageError as error:
        raise _unreachable(error) from None
    finally:
        lock.release()


def has_own_state(run: RunDirectory) -> bool:
    """Whether the folder has checkpoints to resume from, or random restarts that are under way."""
    return bool(list_checkpoints(run.checkpoints)) or run.random_restarts.is_dir()


def renew_mirror(recipe: Recipe) -> None:
    """Mirror the recipe's run, which begins anew, under another id. Raises UserError."""
    url, run = recipe.checkpoint.mirror, run_directory(recipe)
    if url is None:
        return
    root = mirror_root(url, recipe.name)
    make_folder(run.path, "execution.runs_dir")
    try:
        before = read_current(root)
        renew(root, run.path)
    except StorageError as error:
        raise _unreachable(error) from None
    if before is not None:
        print(f"{KEY}: the checkpoints of the former run stay in {root.url}/{before['id']}")


def start_mirroring(plan: Plan, attempt: int) -> UploadJob | None:
    """Claim the mirror for this attempt, and return how its checkpoints are copied; None without a mirror.

    For rank 0, which holds the run's lock.

    Raises UserError where the mirror holds another run, or cannot be written by a run that begins; one that has
    checkpoints trains on, and tries again with its next one.
    """
    recipe, settings, run = plan.recipe, plan.recipe.checkpoint, run_directory(plan.recipe)
    every = settings.mirror_keep_every
    if settings.mirror is None:
        return None
    mirror_id, writer = None, ""
    try:
        mirror = claim(mirror_root(settings.mirror, recipe.name), run.path)
        mirror_id, writer = mirror.id, mirror.writer
    except StorageError as error:
        if not has_own_state(run):
            raise UserError(f"{KEY}: {error}") from None
        print(f"{KEY}: {error}. Training goes on, and the next checkpoint tries again", flush=True)
    return UploadJob(
        run=str(run.path),
        name=recipe.name,
        url=settings.mirror,
        step=0,
        attempt=attempt,
        id=mirror_id,
        writer=writer,
        keep_last=settings.mirror_keep_last,
        keep_every_tokens=every.tokens(recipe.train.budget, plan.batch.global_batch_tokens) if every else None,
        keep_best=settings.keep_best,
        parent=os.getpid(),
    )


def wait_at_stop_sec(recipe: Recipe) -> float:
    """How many seconds a run that was asked to stop waits for the last copy: a Slurm job has a limit."""
    wait, slurm = recipe.checkpoint.mirror_wait, recipe.cluster.slurm
    return min(wait, slurm.stop_grace / 2) if slurm is not None and "SLURM_JOB_ID" in os.environ else wait


def copy_last(plan: Plan, job: UploadJob | None = None, say: Callable[[str], None] = print) -> None:
    """Finish the copy of a complete run, which may have ended before its last checkpoint had arrived.

    `job`: of a start that has claimed the mirror already.
    """
    run = run_directory(plan.recipe)
    checkpoints, attempt = list_checkpoints(run.checkpoints), max(attempt_numbers(run.path), default=0)
    job = job or (start_mirroring(plan, attempt) if checkpoints else None)
    if job is not None and checkpoints:
        mirroring = Mirroring(job, say)
        mirroring.request(checkpoints[-1][0])
        mirroring.finish(plan.recipe.checkpoint.mirror_wait)


def _fetch_newest(mirror: Mirror, run: RunDirectory, recipe: Recipe) -> None:
    """Fetch the newest checkpoint that is intact, with what the run folder needs."""
    problems, here = [], max((step for step, _ in list_checkpoints(run.checkpoints)), default=-1)
    for step in reversed(mirror.steps()):
        if step <= here:
            return
        record = mirror.record(step)
        if record is None:
            print(f"{KEY}: {mirror.checkpoint(step).url} is not complete", flush=True)
            continue
        problem = _fetch(mirror, step, record, run, recipe)
        if problem is None:
            return
        problems.append(problem)
        print(f"{KEY}: passed over {problem}", flush=True)
    if problems and here < 0:
        raise UserError(
            f"{KEY}: none of the {len(problems)} checkpoints in {mirror.folder.url} is intact ({problems[0]}); restore "
            "them, or start over with --fresh"
        )


def _fetch(mirror: Mirror, step: int, record: dict[str, Any], run: RunDirectory, recipe: Recipe) -> str | None:
    """Fetch one checkpoint into the run folder; returns what is wrong with it, or None. Raises UserError."""
    remote, staging = mirror.checkpoint(step), run.path / _STAGING / checkpoint_name(step)
    for other in staging.parent.glob("*"):
        if other != staging:
            remove_folder(other)
    if not record:
        return f"{remote.at(RECORD).url}: damaged, or of another version"
    wanted = {name: file for name, file in record["files"].items() if _is_wanted(name)}
    contract = f"{RUN_FILES}/{run.contract.name}"
    if contract not in wanted:
        return f"{remote.url}: its record names no {contract}"
    if problem := remote.at(contract).download_checked(staging / contract, wanted[contract]):
        return f"{remote.url}/{contract}: {problem}"
    _check_contract(staging / contract, recipe, mirror)
    total = sum(file["bytes"] for file in wanted.values())
    print(f"{KEY}: fetching {remote.url} ({format_bytes(total)}) into {run.path}", flush=True)
    if problems := download_all(remote, wanted, staging, _THREADS):
        remove_folder(staging)
        return problems[0]
    _take_over(staging, run, int(record["attempt"]))
    return None


def _is_wanted(name: str) -> bool:
    """Whether a file of a record is one of a checkpoint, or one that belongs into a run folder."""
    below = name.removeprefix(f"{RUN_FILES}/")
    return is_run_file(below) if below != name else "/" not in name and name != RECORD and not name.startswith(".")


def _check_contract(path: Path, recipe: Recipe, mirror: Mirror) -> None:
    """Raise UserError with every key in which the mirrored run's learning contract differs from the recipe's."""
    old = json.loads(path.read_text(encoding="utf-8"))["contract"]
    changes = changed_keys(comparable(old), comparable(contract_of(as_recorded(recipe, old)[0])))
    changes = [one for one in changes if one[0].partition(".")[0] != "anomalies" and (one[0], one[2]) != _ANY_PRECISION]
    if [key for key, *_ in changes] == ["train.budget"] and changes[0][2] > changes[0][1]:
        changes = []  # `check_contract` decides whether the run may be extended
    if changes:
        what = ", ".join(f"{key}: {json.dumps(before)} -> {json.dumps(after)}" for key, before, after in changes)
        raise UserError(
            f"{KEY}: {mirror.root.url} holds a run with another learning contract ({what}); restore these values, give "
            "this run another `name`, or start over with --fresh"
        )


def _take_over(staging: Path, run: RunDirectory, attempt: int) -> None:
    """Move what was fetched into the run folder; with the checkpoint, which comes last, the run has a state."""
    for path in sorted((staging / RUN_FILES).rglob("*")):
        target = run.path / path.relative_to(staging / RUN_FILES)
        if path.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    if max(attempt_numbers(run.path), default=0) < attempt:
        run.attempt(attempt).mkdir(parents=True)  # the next one is counted from there
    remove_folder(staging / RUN_FILES)
    run.checkpoints.mkdir(exist_ok=True)
    os.rename(staging, run.checkpoints / staging.name)
    remove_folder(staging.parent)


def _unreachable(error: StorageError) -> UserError:
    return UserError(
        f"{KEY}: {error}; check the network and the credentials, or start over without it: checkpoint.mirror=null"
    )
