"""Render a recipe's Slurm job from launch/slurm.sbatch.j2 and submit it.

The recipe reaches the job as a file, fully resolved, so that neither a later edit nor a shell on the way can change it.
Only what Slurm or the batch shell must know stands in the script: directives whose grammar needs no quoting
(`recipe.slurm_values`), and quoted words.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from turbolm.environment import sbatch_environment, tell_dropped
from turbolm.errors import UserError
from turbolm.files import write_json
from turbolm.plan.batch import plan_batch
from turbolm.plan.count import check_model
from turbolm.plan.machine import cpu_request_note
from turbolm.recipe.execution import Slurm
from turbolm.recipe.load import dump_recipe, load_recipe
from turbolm.recipe.paths import make_folder
from turbolm.recipe.schema import Recipe
from turbolm.recipe.slurm_values import slurm_clock
from turbolm.reliability.stop import look, write_seen
from turbolm.shipped import read_shipped
from turbolm.train.run_contract import as_started, check_contract, start_fresh
from turbolm.train.run_directory import RunDirectory, run_directory

SCRIPT = "submit.slurm"
RECIPE = "recipe.yaml"
SEEN = "stop-seen.json"  # beside them: what had been asked of the run before
SUBMITTED = "job.json"  # the number of the job
STARTED = "started.json"  # the number of the job's first attempt
_MAX_NAME_WITH_SEED = 100 - len("-seed4294967295")


@dataclass(frozen=True)
class Submission:
    """A rendered job: its script, and the run directories that it trains in, one for each seed."""

    script: Path
    runs: tuple[RunDirectory, ...]
    directives: tuple[str, ...]  # the options of sbatch that it sets
    folders: tuple[Path, ...]  # of each run, with its recipe

    @property
    def text(self) -> str:
        """The script."""
        return self.script.read_text(encoding="utf-8")


def write_submission(recipe_file: str | Path, overrides: Sequence[str] = (), *, fresh: bool = False) -> Submission:
    """Write the job's script and each run's resolved recipe into new folders of the run directories.

    With `fresh` runs of these names are moved aside. Raises UserError where a run was started with another contract.
    """
    recipe = load_recipe(recipe_file, overrides)
    if recipe.cluster.slurm is None:
        raise UserError(
            f"{recipe_file} says nothing about Slurm; add a `slurm` mapping below `cluster`, if only `{{}}`"
        )
    _check_batch(recipe)
    for note in filter(None, (*check_model(recipe, recipe_file), cpu_request_note(recipe))):
        print(f"turbolm: {note}", file=sys.stderr)
    recipes = _recipes_of_seeds(recipe, recipe.cluster.slurm.seeds)
    if fresh:
        for one in recipes:
            start_fresh(one)
    recipes = [as_started(one)[0] for one in recipes]
    for one in recipes:
        check_contract(run_directory(one), one, None)
    runs = tuple(RunDirectory(Path.cwd() / run_directory(one).path) for one in recipes)
    for run in runs:
        if not str(run.path).isprintable() or "\\" in str(run.path):
            raise UserError(f"{str(run.path)!r}: Slurm writes no output to a path with backslashes or line breaks")
    for run in runs:
        make_folder(run.path, "execution.runs_dir")
    folders = [_new_folder(run.path / "submissions") for run in runs]
    for one, run, folder in zip(recipes, runs, folders, strict=True):
        (folder / RECIPE).write_text(dump_recipe(one), encoding="utf-8")
        write_seen(folder / SEEN, look(run.stop_file))  # what is asked from now on counts for this job
    text = render_script(recipe, [str(folder / RECIPE) for folder in folders], [str(run.path) for run in runs])
    for folder in folders:
        (folder / SCRIPT).write_text(text, encoding="utf-8")
    return Submission(folders[0] / SCRIPT, runs, tuple(_directives(recipe, recipe.cluster.slurm, [""])), tuple(folders))


def submit(submission: Submission) -> str:
    """Hand the script to sbatch; returns the job's id."""
    environment, dropped = sbatch_environment(os.environ, submission.directives)
    tell_dropped(dropped)
    command = ["sbatch", "--parsable", str(submission.script)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError("sbatch is not on PATH: submit from a login node of the cluster, or use --dry-run") from None
    if done.returncode:
        raise UserError(f"sbatch refused {submission.script}:\n{done.stderr.strip()}")
    job_id = done.stdout.strip().split(";")[0]  # JOB or JOB;CLUSTER
    for folder in submission.folders:
        write_json(folder / SUBMITTED, {"job_id": job_id})
    return job_id


def render_script(recipe: Recipe, recipe_files: Sequence[str], runs: Sequence[str]) -> str:
    """The text of the job's script; `recipe_files` and `runs` have one entry for each seed, or one."""
    import jinja2

    slurm = recipe.cluster.slurm
    assert slurm is not None
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["quote"] = shlex.quote
    return environment.from_string(read_shipped("launch", "slurm.sbatch.j2")).render(
        title=recipe.name,
        num_nodes=recipe.cluster.num_nodes,
        directives=_directives(recipe, slurm, runs),
        folder=os.getcwd(),
        recipes=recipe_files,
        runs=runs,
        python=sys.executable,
        gpus_per_node=recipe.cluster.gpus_per_node,
        **dict(slurm),
    )


def _directives(recipe: Recipe, slurm: Slurm, runs: Sequence[str]) -> dict[str, object]:
    """The `#SBATCH` options that have a value; the template adds the others."""
    log = f"{runs[0]}/slurm-%j.out" if len(runs) == 1 else f"{Path(runs[0]).parent}/{recipe.name}-slurm-%A_%a.out"
    parent, _, name = log.rpartition("/")
    options: dict[str, object] = {
        "job-name": recipe.name,
        "nodes": recipe.cluster.num_nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": slurm.cpus_per_task,
        # `--exclusive` gives all CPUs of a node, but no more memory than is asked for.
        "mem": "0" if slurm.mem is None and slurm.exclusive else slurm.mem,
        **{name: getattr(slurm, name) for name in ("partition", "account", "qos")},
        "time": None if slurm.time is None else slurm_clock(slurm.time),
        **{name: getattr(slurm, name) for name in ("constraint", "exclude", "nodelist", "reservation", "dependency")},
        "array": f"0-{len(slurm.seeds) - 1}" if slurm.seeds else None,
        "signal": f"B:USR2@{slurm.stop_grace}",
        "open-mode": "append",
        "output": _directive_text(parent.replace("%", "%%") + "/" + name),
    }
    return {key: value for key, value in options.items() if value is not None}


def _directive_text(value: str) -> str:
    """A value as sbatch reads it back: it strips quotes and backslashes, and takes a bare `#` for a comment."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _recipes_of_seeds(recipe: Recipe, seeds: Sequence[int]) -> list[Recipe]:
    """The recipe itself, or one for each seed with a name and a run directory of its own."""
    if not seeds:
        return [recipe]
    if len(recipe.name) > _MAX_NAME_WITH_SEED:
        raise UserError(f"name: at most {_MAX_NAME_WITH_SEED} characters with cluster.slurm.seeds, got {recipe.name}")
    return [
        recipe.model_copy(
            update={"name": f"{recipe.name}-seed{seed}", "train": recipe.train.model_copy(update={"seed": seed})}
        )
        for seed in seeds
    ]


def _check_batch(recipe: Recipe) -> None:
    """Find a batch that does not fit the job now, not after it has waited in the queue."""
    cluster = recipe.cluster
    each = cluster.processes_per_node if cluster.processes_per_node != "auto" else cluster.gpus_per_node
    if each:
        plan_batch(recipe, cluster.num_nodes * each)


def _new_folder(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    numbers = [int(path.name) for path in parent.iterdir() if path.name.isdigit()]
    folder = parent / str(max(numbers, default=0) + 1)
    folder.mkdir()
    return folder


def copy_script(recipe_file: Path, attempt_folder: Path) -> None:
    """Keep the script that an attempt runs under beside its logs."""
    script = recipe_file.with_name(SCRIPT)
    if script.is_file():
        shutil.copyfile(script, attempt_folder / SCRIPT)
