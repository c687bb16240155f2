"""Train every arm with every seed, and sweep learning rates first if asked.

Each run is an ordinary training in its own run directory: a finished one is not repeated, and an interrupted one
resumes. Runs go seed by seed, not arm by arm, so that other load on the machine disturbs all arms alike.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean

from turbolm.ablate.design import Arm
from turbolm.ablate.measure import TIMING, loss_at, read_timing
from turbolm.ablate.results import write_results
from turbolm.ablate.runner import Done, Runner, Task, is_interruption
from turbolm.ablate.settings import Ablation
from turbolm.ablate.sweep import count_starts, rung_tokens, sweep, sweep_runs, swept_arms
from turbolm.errors import EXIT_FAILED, EXIT_OK, EXIT_REQUEUE, UserError
from turbolm.files import write_json
from turbolm.recipe.contract import changed_keys
from turbolm.recipe.load import RecipeError, dump_recipe, load_recipe
from turbolm.recipe.schema import Recipe
from turbolm.train.run_directory import is_finished, run_directory
from turbolm.units import format_count, format_duration

Say = Callable[[str], None]


def run_ablation(ablation: Ablation, runner: Runner, say: Say) -> int:
    """Train what is left to train; returns an exit code. Writes the results so far after every run.

    Raises UserError when the folder holds runs of another recipe or setting.
    """
    check_folder(ablation)
    trainer = _Trainer(ablation, runner, say)
    if ablation.options.sweep:
        if code := sweep(ablation, trainer.train, say):
            return code
        _check_runs(ablation, _seed_runs(ablation))
    recipes = [recipe for recipe, _ in _seed_runs(ablation)]
    code = trainer.train(recipes, lambda: write_results(ablation))
    if code == EXIT_OK:
        write_results(ablation)
        code = EXIT_FAILED if any(recipe.name in ablation.failures for recipe in recipes) else EXIT_OK
    return code


def check_folder(ablation: Ablation) -> None:
    """Raises UserError when runs in the folder were made with other recipes than would be written now."""
    if ablation.options.halving:
        for arm in swept_arms(ablation):
            rung_tokens(ablation, arm)
    _check_runs(ablation, sweep_runs(ablation) if ablation.options.sweep else _seed_runs(ablation))


def _check_runs(ablation: Ablation, runs: Iterable[tuple[Recipe, Arm]]) -> None:
    changes = {}
    for recipe, _ in runs:
        if not run_directory(recipe).path.exists():
            continue
        try:
            old = load_recipe(ablation.recipe_file(recipe.name))  # keys that are new since then get their defaults
        except RecipeError as error:
            changes[recipe.name] = f"  {error}"
            continue
        for key, before, after in changed_keys(old.model_dump(mode="json"), recipe.model_dump(mode="json")):
            if not key.startswith("logging."):
                changes[key] = f"  {key}: {json.dumps(before)} -> {json.dumps(after)}"
    if changes:
        raise UserError(
            f"{ablation.folder} holds runs of another recipe; changed:\n" + "\n".join(changes.values()) + "\n"
            "Restore these values, choose another --name, or delete that folder."
        )


def _seed_runs(ablation: Ablation) -> Iterator[tuple[Recipe, Arm]]:
    for seed in ablation.seeds:
        for arm in ablation.arms:
            yield ablation.recipe(arm, seed, ablation.lr(arm)), arm


def _is_trained(recipe: Recipe) -> bool:
    """Whether the run has trained its budget, or as far as `execution.stop_after` says."""
    run, after = run_directory(recipe), recipe.execution.stop_after
    if is_finished(run, recipe.train.budget):
        return True
    return after is not None and not math.isnan(loss_at(run.path, after.amount, missing=math.nan))


class _Trainer:
    """Trains runs, records what each start took, and says how far the ablation is."""

    def __init__(self, ablation: Ablation, runner: Runner, say: Say) -> None:
        self.ablation, self.runner, self.say = ablation, runner, say
        self.reached: set[tuple[str, object]] = set()  # starts, those at work included
        num_swept = len(swept_arms(ablation)) if ablation.options.sweep else 0
        # An arm's first seed at its best learning rate is a run of the sweep.
        self.num_starts = count_starts(ablation) + len(ablation.arms) * len(ablation.seeds) - num_swept

    def train(self, recipes: Sequence[Recipe], after_each: Callable[[], None] = lambda: None) -> int:
        """Train what is left of the runs; returns the exit code of what interrupted it, or 0."""
        interrupted = EXIT_OK
        for done in self.runner(self._tasks(recipes)):
            self._record(done)
            if is_interruption(done.exit_code):
                interrupted = interrupted or done.exit_code
            else:
                after_each()
        left = [one for one in recipes if one.name not in self.ablation.failures and not _is_trained(one)]
        return interrupted or (EXIT_REQUEUE if left else EXIT_OK)

    def _tasks(self, recipes: Sequence[Recipe]) -> Iterator[Task]:
        for recipe in recipes:
            self.reached.add((recipe.name, recipe.execution.stop_after))
            if _is_trained(recipe):
                continue
            path = self.ablation.recipe_file(recipe.name)
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
        self.ablation.failures.pop(recipe.name, None)
        if code not in (EXIT_OK, EXIT_REQUEUE):
            self.ablation.failures[recipe.name] = code
        if code == EXIT_OK and not _is_trained(recipe):
            raise UserError(f"{run.path}: the run ended well, but {run.metrics} and {run.results} do not tell its loss")

    def _say_progress(self, recipe: Recipe) -> None:
        finished = [path.parent for path in self.ablation.folder.glob("*-seed*/results.json")]
        took = [sum(one["whole_sec"] for one in timing) for path in finished if (timing := read_timing(path))]
        number, after = len(self.reached), recipe.execution.stop_after
        left = (self.num_starts - number + 1) / self.ablation.options.num_jobs
        eta = f", about {format_duration(fmean(took) * left)} left" if took and after is None else ""
        until = f" until {format_count(after.amount)} tokens" if after is not None else ""
        self.say(f"[{number}/{self.num_starts}] {recipe.name}{until}{eta}")
