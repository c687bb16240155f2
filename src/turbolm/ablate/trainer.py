"""The runs of an ablation or of a transfer: the recipe of each, the file that holds it, and training what is left.

Each run is an ordinary training in its own run directory: a finished one is not repeated, and an interrupted one
resumes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from turbolm.ablate.measure import TIMING, loss_at, read_timing
from turbolm.ablate.runner import Done, Runner, Task, is_interruption
from turbolm.errors import EXIT_OK, EXIT_REQUEUE, UserError
from turbolm.files import write_json
from turbolm.recipe.contract import changed_keys
from turbolm.recipe.load import RecipeError, dump_recipe, load_recipe
from turbolm.recipe.optimizers import Optimizer
from turbolm.recipe.schema import Recipe
from turbolm.train.run_directory import is_finished, run_directory
from turbolm.units import Span, format_count, format_duration

Say = Callable[[str], None]


def run_recipe(
    recipe: Recipe, folder: Path, name: str, *, seed: int, optimizer: Optimizer, stop_tokens: int | None = None
) -> Recipe:
    """Return the recipe of a run in `folder`, or of a start that stops after `stop_tokens`.

    It keeps only its last checkpoint, here alone, and generates no sample.
    """
    stop_after = None if stop_tokens is None else Span(stop_tokens, "tokens")
    kept = {"keep_last": 1, "keep_every": None, "keep_best": False, "mirror": None}
    return recipe.model_copy(
        update={
            "name": name,
            "train": recipe.train.model_copy(update={"seed": seed}),
            "optimizer": optimizer,
            "execution": recipe.execution.model_copy(update={"runs_dir": str(folder), "stop_after": stop_after}),
            "checkpoint": recipe.checkpoint.model_copy(update=kept),
            "export": recipe.export.model_copy(update={"push_to": None}),
            "logging": recipe.logging.model_copy(update={"sample_tokens": 0}),
        }
    )


def recipe_file(folder: Path, run_name: str) -> Path:
    """Return where the recipe of a run is written."""
    return folder / "recipes" / f"{run_name}.yaml"


def check_runs(folder: Path, recipes: Iterable[Recipe]) -> None:
    """Raise UserError when runs in the folder were made with other recipes than would be written now."""
    changes = {}
    for recipe in recipes:
        if not run_directory(recipe).path.exists():
            continue
        try:
            old = load_recipe(recipe_file(folder, recipe.name))  # keys that are new since then get their defaults
        except RecipeError as error:
            changes[recipe.name] = f"  {error}"
            continue
        old = run_recipe(old, folder, old.name, seed=old.train.seed, optimizer=old.optimizer)  # as written by now
        for key, before, after in changed_keys(old.model_dump(mode="json"), recipe.model_dump(mode="json")):
            if not key.startswith("logging."):
                changes[key] = f"  {key}: {json.dumps(before)} -> {json.dumps(after)}"
    if changes:
        raise UserError(
            f"{folder} holds runs of another recipe; changed:\n" + "\n".join(changes.values()) + "\n"
            "Restore these values, choose another --name, or delete that folder."
        )


def is_trained(recipe: Recipe) -> bool:
    """Return whether the run has trained its budget, or as far as `execution.stop_after` says."""
    run, after = run_directory(recipe), recipe.execution.stop_after
    if is_finished(run, recipe.train.budget):
        return True
    return after is not None and not math.isnan(loss_at(run.path, after.amount, missing=math.nan))


@dataclass
class Trainer:
    """Trains runs, records what each start took, and says how far it is of `num_starts`.

    `failures` gets the exit codes of runs that failed, by name: they do not stop the others, and an interruption does.
    """

    folder: Path
    runner: Runner
    say: Say
    num_starts: int
    failures: dict[str, int]
    num_jobs: int = 1
    reached: set[tuple[str, object]] = field(default_factory=set)  # starts, those at work included

    def train(self, recipes: Sequence[Recipe], after_each: Callable[[], None] = lambda: None) -> int:
        """Train what is left of the runs; returns the exit code of what interrupted it, or 0."""
        interrupted = EXIT_OK
        for done in self.runner(self._tasks(recipes)):
            self._record(done)
            if is_interruption(done.exit_code):
                interrupted = interrupted or done.exit_code
            else:
                after_each()
        left = [one for one in recipes if one.name not in self.failures and not is_trained(one)]
        return interrupted or (EXIT_REQUEUE if left else EXIT_OK)

    def _tasks(self, recipes: Sequence[Recipe]) -> Iterator[Task]:
        for recipe in recipes:
            self.reached.add((recipe.name, recipe.execution.stop_after))
            if is_trained(recipe):
                continue
            path = recipe_file(self.folder, recipe.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = recipe.model_copy(update={"execution": recipe.execution.model_copy(update={"stop_after": None})})
            path.write_text(dump_recipe(whole), encoding="utf-8")
            self._say_progress(recipe)
            yield Task(recipe, path)

    def _record(self, done: Done) -> None:
        recipe, code = done.task.recipe, done.exit_code
        run = run_directory(recipe)
        if run.path.is_dir():
            took = {"whole_sec": done.whole_sec, "cpu_sec": done.cpu_sec, "neighbors": done.neighbors}
            write_json(run.path / TIMING, [*read_timing(run.path), {**took, "exit_code": code}])
        self.failures.pop(recipe.name, None)
        if code not in (EXIT_OK, EXIT_REQUEUE):
            self.failures[recipe.name] = code
        if code == EXIT_OK and not is_trained(recipe):
            raise UserError(f"{run.path}: the run ended well, but {run.metrics} and {run.results} do not tell its loss")

    def _say_progress(self, recipe: Recipe) -> None:
        finished = [path.parent for path in self.folder.glob("*-seed*/results.json")]
        took = [sum(one["whole_sec"] for one in timing) for path in finished if (timing := read_timing(path))]
        number, after = len(self.reached), recipe.execution.stop_after
        left = (self.num_starts - number + 1) / self.num_jobs
        eta = f", about {format_duration(fmean(took) * left)} left" if took and after is None else ""
        until = f" until {format_count(after.amount)} tokens" if after is not None else ""
        self.say(f"[{number}/{self.num_starts}] {recipe.name}{until}{eta}")
