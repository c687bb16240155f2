"""Start a run over: `--fresh`. Torch-free."""

from __future__ import annotations

import time

from turbolm.errors import UserError
from turbolm.plan.spans import check_spans
from turbolm.recipe.schema import Recipe
from turbolm.reliability.run_lock import RunLock
from turbolm.train.from_mirror import renew_mirror
from turbolm.train.run_directory import RunDirectory, run_directory


def start_fresh(recipe: Recipe) -> None:
    """Rename the folder of the recipe's run, if there is one, so that the next start begins a new run, and mirror that
    one apart from the former.

    Raises UserError while a process trains the run, and for a recipe that no new run starts with.
    """
    check_spans(recipe)
    run = run_directory(recipe)
    if recipe.data.starts_at is not None:
        raise UserError("--fresh: a fork has no start of its own; fork the checkpoint again under another --name")
    if run.path.is_dir():
        _move_aside(run)
    renew_mirror(recipe)


def _move_aside(run: RunDirectory) -> None:
    RunLock(run.path).wait_until_free()
    stamp, number = time.strftime("%Y%m%d-%H%M%S"), 1
    aside = run.path.with_name(f"{run.path.name}.{stamp}")
    while aside.exists():
        number += 1
        aside = run.path.with_name(f"{run.path.name}.{stamp}-{number}")
    run.path.rename(aside)
    print(f"{run.path} is moved aside: {aside}")
