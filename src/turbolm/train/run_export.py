"""Whose weights a run's export has, the commands that make and push it, and the push (`export.push_to`). Torch-free."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turbolm.checkpoint.export_folder import Origin, read_origin
from turbolm.checkpoint.push import push_export
from turbolm.errors import UserError
from turbolm.files import read_json, write_json
from turbolm.recipe.schema import Recipe
from turbolm.train.run_directory import RunDirectory

_KEY = "export.push_to"


def is_average_wanted(recipe: Recipe) -> bool:
    """Return whether the recipe asks for an export of the mean of the weights."""
    average = recipe.evaluation.weight_average
    return average is not None and average.export


def exports_average(recipe: Recipe, results: Mapping[str, Any]) -> bool:
    """Return whether the export of the run with these results is to have the mean of the weights."""
    return is_average_wanted(recipe) and bool(results.get("weight_average"))


def exported_name(run: RunDirectory) -> str | None:
    """Return whose weights a run's export has; one that does not say has those that results.json says were exported.

    None where that may be an export of an earlier budget.
    """
    if origin := read_origin(run.export):
        return str(origin)
    results = read_json(run.results) or {}
    if results.get("export", "") is None or "export_command" in results:
        return None
    is_averaged = bool(results.get("weight_average", {}).get("exported"))
    return str(Origin(run.path.name, Path(str(results.get("checkpoint", "export"))).name, is_averaged))


def export_command(checkpoint: Path, out: object, *, averaged: bool) -> str:
    """Return the command that exports a checkpoint."""
    return shlex.join(["turbolm", "export", str(checkpoint), str(out), *(["--average"] if averaged else [])])


def push_command(recipe: Recipe, export: object) -> str:
    """Return the command that uploads an export to where the recipe says."""
    settings = recipe.export
    return shlex.join(
        ["turbolm", "push", str(export), str(settings.push_to), *(["--private"] if settings.private else [])]
    )


def lacks_push(recipe: Recipe, results: Mapping[str, Any]) -> bool:
    """Return whether a finished run has yet to be pushed: that failed, was interrupted, or is asked for since."""
    name, address = recipe.export.push_to, results.get("pushed_to", "")
    return name is not None and not address.endswith(f"/{name}")


def push_run(run: RunDirectory, recipe: Recipe) -> str:
    """Upload a finished run's export, and note that in results.json; return its address on the hub.

    Raises UserError, also where the export is not there or has other weights than those of the run's end.
    """
    assert recipe.export.push_to is not None
    results = read_json(run.results) or {}
    checkpoint, averaged = run.checkpoints / Path(results["checkpoint"]).name, exports_average(recipe, results)
    wanted = Origin(run.path.name, checkpoint.name, averaged)
    if not run.export.is_dir() or exported_name(run) != str(wanted):
        command = export_command(checkpoint, run.export, averaged=averaged)
        raise UserError(
            f"{_KEY}: {run.export} is not the export of {wanted}; run `{command}` on one node, then "
            f"`{push_command(recipe, run.export)}`"
        )
    try:
        address = push_export(run.export, recipe.export.push_to, private=recipe.export.private, key=_KEY)
    except UserError as error:
        again = push_command(recipe, run.export)
        raise UserError(f"{error}; `{again}` tries again, and so does the same start of the run") from None
    write_json(run.results, {**(read_json(run.results) or results), "pushed_to": address})
    return address
