"""Render a recipe's Slurm job from launch/slurm.sbatch.j2 and submit it.

The recipe reaches the job as a file, fully resolved, so that neither a later edit nor a shell on the way can change it.
Only what Slurm or the batch shell must know stands in the script: directives whose grammar needs no quoting
(`recipe.slurm_values`), and quoted words. Where data have to be prepared, a job before it does so (`prepare_job`).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from turbolm.checkpoint.push import check_token
from turbolm.environment import sbatch_environment, tell_dropped
from turbolm.errors import UserError
from turbolm.files import write_json
from turbolm.launch.prepare_job import divide_dependency, is_prepared, is_wanted, recipe_of_job
from turbolm.plan.batch import plan_batch
from turbolm.plan.count import check_model
from turbolm.plan.machine import cpu_request_note
from turbolm.plan.summary import memory_request_note
from turbolm.recipe.execution import Slurm
from turbolm.recipe.load import dump_recipe, load_recipe
from turbolm.recipe.paths import make_folder
from turbolm.recipe.schema import Recipe
from turbolm.recipe.slurm_values import slurm_clock
from turbolm.reliability.stop import look, write_seen
from turbolm.shipped import read_shipped
from turbolm.train.fresh import start_fresh
from turbolm.train.from_mirror import fetch_run
from turbolm.train.run_contract import as_started, check_contract
from turbolm.train.run_directory import RunDirectory, run_directory

SCRIPT = "submit.slurm"
PREPARE_SCRIPT = "prepare.slurm"
RECIPE = "recipe.yaml"
SEEN = "stop-seen.json"  # beside them: what had been asked of the run before
SUBMITTED = "job.json"  # the number of the job, and of the one that prepares its data
STARTED = "started.json"  # the number of the job's first attempt
_PREPARE_HINT = (
    "This job prepares the data first; its partition, account, qos, time, mem and cpus_per_task can be set below "
    "cluster.slurm.prepare, and with cluster.slurm.prepare.separate=false the training job prepares."
)
_MAX_NAME_WITH_SEED = 100 - len("-seed4294967295")


@dataclass(frozen=True)
class PrepareStep:
    """The rendered job that prepares the data first."""

    script: Path
    directives: tuple[str, ...]
    log: str  # with %j for the job's number
    stays: tuple[str, ...]  # of the user's dependency: what the training job itself waits for

    def options(self, job_id: str) -> list[str]:
        """The options of sbatch with which the training job waits for this one; they replace its script's dependency.

        Slurm takes it out of the queue when this one fails.
        """
        return [f"--dependency={','.join([f'afterok:{job_id}', *self.stays])}", "--kill-on-invalid-dep=yes"]

    def log_of(self, job_id: str) -> str:
        """The path of the job's log."""
        folder, _, name = self.log.rpartition("/")
        return f"{folder}/{name.replace('%j', job_id)}"

    def describe(self, submission: Submission) -> str:
        """Return what would be submitted before the training job of `submission`, and how that one would wait."""
        runs = ", ".join(str(folder / RECIPE) for folder in submission.folders)
        return "\n".join(
            [
                "turbolm: the data are not prepared, so two jobs would be submitted:",
                f"  1. sbatch {shlex.quote(str(self.script))}",
                f"     one node without GPUs: `turbolm prepare` (token store and plan tables) of {runs}",
                f"  2. sbatch {shlex.join(self.options('ID'))} {shlex.quote(str(submission.script))}",
                "     the script above, once job 1 (ID) has succeeded; if it fails, Slurm cancels this one",
            ]
        )


@dataclass(frozen=True)
class Submission:
    """A rendered job: its script, and the run directories that it trains in, one for each seed."""

    script: Path
    runs: tuple[RunDirectory, ...]
    directives: tuple[str, ...]  # the options of sbatch that it sets
    folders: tuple[Path, ...]  # of each run, with its recipe
    prepare: PrepareStep | None = None  # None where there is nothing to prepare, or the training job does

    @property
    def text(self) -> str:
        """The script."""
        return self.script.read_text(encoding="utf-8")


@dataclass(frozen=True)
class Submitted:
    """The numbers of the jobs."""

    job_id: str
    prepare_id: str | None = None


def write_submission(
    recipe_file: str | Path, overrides: Sequence[str] = (), *, fresh: bool = False, fetch: bool = False
) -> Submission:
    """Write the job's script and each run's resolved recipe into new folders of the run directories.

    With `fresh` runs of these names are moved aside; with `fetch` those whose folders are empty are fetched from their
    mirror. Raises UserError where a run was started with another contract.
    """
    recipe = load_recipe(recipe_file, overrides)
    if recipe.cluster.slurm is None:
        raise UserError(
            f"{recipe_file} says nothing about Slurm; add a `slurm` mapping below `cluster`, if only `{{}}`"
        )
    _check_batch(recipe)
    if recipe.export.push_to is not None:
        check_token("export.push_to")
    notes = (*check_model(recipe, recipe_file), cpu_request_note(recipe), memory_request_note(recipe, recipe_file))
    for note in filter(None, notes):
        print(f"turbolm: {note}", file=sys.stderr)
    recipes = _recipes_of_seeds(recipe, recipe.cluster.slurm.seeds)
    if fresh:
        for one in recipes:
            start_fresh(one)
    if fetch:
        for one in recipes:
            fetch_run(one)
    recipes = [as_started(one)[0] for one in recipes]
    for one in recipes:
        check_contract(run_directory(one), one, None)
    needs_job = is_wanted(recipe) and not all(is_prepared(one) for one in recipes)
    job = recipe_of_job(recipe) if needs_job else None
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
    files, paths = [str(folder / RECIPE) for folder in folders], [str(run.path) for run in runs]
    prepare = None if job is None else _write_prepare_step(recipe, job, folders, paths)
    text = render_script(recipe, files, paths, _log_name(recipe, paths))
    for folder in folders:
        (folder / SCRIPT).write_text(text, encoding="utf-8")
    directives = tuple(_directives(recipe, recipe.cluster.slurm, ""))
    return Submission(folders[0] / SCRIPT, runs, directives, tuple(folders), prepare)


def _write_prepare_step(recipe: Recipe, job: Recipe, folders: Sequence[Path], runs: Sequence[str]) -> PrepareStep:
    """Write the script of the job that prepares; `job` is the recipe as that job asks for its node."""
    assert recipe.cluster.slurm is not None and job.cluster.slurm is not None
    array = len(runs) > 1
    log = f"{Path(runs[0]).parent}/{job.name}-slurm-%j.out" if array else f"{runs[0]}/slurm-%j-prepare.out"
    text = render_script(job, [str(folder / RECIPE) for folder in folders], runs, log, is_prepare_job=True)
    for folder in folders:
        (folder / PREPARE_SCRIPT).write_text(text, encoding="utf-8")
    stays = divide_dependency(recipe.cluster.slurm.dependency)[1]
    return PrepareStep(folders[0] / PREPARE_SCRIPT, tuple(_directives(job, job.cluster.slurm, "")), log, tuple(stays))


def submit(submission: Submission) -> Submitted:
    """Hand the scripts to sbatch. Raises UserError, and then leaves no job in the queue."""
    prepare = submission.prepare
    environment, dropped = sbatch_environment(os.environ, submission.directives)
    tell_dropped(dropped)
    if prepare is None:
        submitted = Submitted(_sbatch(submission.script, environment))
    else:
        own, _ = sbatch_environment(os.environ, {*submission.directives, *prepare.directives})
        prepare_id = _sbatch(prepare.script, own, hint=_PREPARE_HINT)
        try:
            submitted = Submitted(_sbatch(submission.script, environment, prepare.options(prepare_id)), prepare_id)
        except BaseException:  # Ctrl-C, too
            _cancel(prepare_id)
            raise
    record: dict[str, object] = {"job_id": submitted.job_id}
    if prepare is not None and submitted.prepare_id is not None:
        record["prepare"] = {"job_id": submitted.prepare_id, "log": prepare.log_of(submitted.prepare_id)}
    for folder in submission.folders:
        write_json(folder / SUBMITTED, record)
    return submitted


def _sbatch(script: Path, environment: Mapping[str, str], options: Sequence[str] = (), hint: str = "") -> str:
    """Submit a script; returns the job's number. Raises UserError; `hint` ends what it says of a refusal."""
    command = ["sbatch", "--parsable", *options, str(script)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError("sbatch is not on PATH: submit from a login node of the cluster, or use --dry-run") from None
    if done.returncode:
        raise UserError("\n".join(filter(None, [f"sbatch refused {script}:", done.stderr.strip(), hint])))
    return done.stdout.strip().split(";")[0]  # JOB or JOB;CLUSTER


def _cancel(job_id: str) -> None:
    """Take the prepare job out of the queue again."""
    try:
        done = subprocess.run(["scancel", job_id], capture_output=True, text=True, check=False)
        problem = done.stderr.strip() if done.returncode else ""
    except OSError as error:
        problem = str(error)
    if problem:
        print(f"turbolm: prepare job {job_id} stays in the queue; scancel: {problem}", file=sys.stderr)


def render_script(
    recipe: Recipe, recipe_files: Sequence[str], runs: Sequence[str], log: str, *, is_prepare_job: bool = False
) -> str:
    """The text of a job's script; `recipe_files` and `runs` have one entry for each seed, or one."""
    import jinja2

    slurm = recipe.cluster.slurm
    assert slurm is not None
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["quote"] = shlex.quote
    return environment.from_string(read_shipped("launch", "slurm.sbatch.j2")).render(
        is_prepare_job=is_prepare_job,
        title=recipe.name.removesuffix("-prepare") if is_prepare_job else recipe.name,
        num_nodes=recipe.cluster.num_nodes,
        directives=_directives(recipe, slurm, log),
        folder=os.getcwd(),
        recipes=recipe_files,
        runs=runs,
        python=sys.executable,
        gpus_per_node=recipe.cluster.gpus_per_node,
        **dict(slurm),
    )


def _log_name(recipe: Recipe, runs: Sequence[str]) -> str:
    """The log of the training job, as Slurm names it."""
    return f"{runs[0]}/slurm-%j.out" if len(runs) == 1 else f"{Path(runs[0]).parent}/{recipe.name}-slurm-%A_%a.out"


def _directives(recipe: Recipe, slurm: Slurm, log: str) -> dict[str, object]:
    """The `#SBATCH` options that have a value; the template adds the others."""
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
