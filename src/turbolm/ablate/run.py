"""Train every arm with every seed, and sweep learning rates first if asked.

Each run is an ordinary training in its own run directory: a finished one is not repeated, and an interrupted one
resumes. Runs go seed by seed, not arm by arm, so that other load on the machine disturbs all arms alike.
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import fmean

from turbolm.ablate.design import Arm
from turbolm.ablate.measure import TIMING, read_timing
from turbolm.ablate.results import measured, write_results
from turbolm.ablate.settings import Ablation, three_digits
from turbolm.errors import EXIT_FAILED, EXIT_OK, EXIT_REQUEUE, EXIT_SIGNAL, UserError
from turbolm.files import write_json
from turbolm.recipe.contract import changed_keys
from turbolm.recipe.load import RecipeError, dump_recipe, load_recipe
from turbolm.recipe.schema import Recipe
from turbolm.train.run_directory import is_finished, run_directory
from turbolm.units import format_duration

Runner = Callable[[Recipe, Path], int]  # trains the recipe, which is also in the file; returns the run's exit code
Say = Callable[[str], None]


def run_ablation(ablation: Ablation, runner: Runner, say: Say) -> int:
    """Train what is left to train; returns an exit code. Writes the results so far after every run.

    Raises UserError when the folder holds runs of another recipe or setting.
    """
    check_folder(ablation)
    trainer = _Trainer(ablation, runner, say)
    for recipe, arm in _sweep_runs(ablation):
        if _is_interruption(code := trainer.train(recipe)):
            return code
        measures = measured(recipe)
        loss = measures.final_loss if measures else math.inf  # the run failed at this learning rate
        ablation.swept.setdefault(arm.name, []).append((recipe.optimizer.lr, loss))
    if ablation.options.sweep:
        _choose_lrs(ablation, say)
        _check_runs(ablation, _seed_runs(ablation))
    for recipe, _ in _seed_runs(ablation):
        if _is_interruption(code := trainer.train(recipe)):
            return code
        write_results(ablation)
    failed = any(recipe.name in ablation.failures for recipe, _ in _seed_runs(ablation))
    return EXIT_FAILED if failed else EXIT_OK


def check_folder(ablation: Ablation) -> None:
    """Raises UserError when runs in the folder were made with other recipes than would be written now."""
    _check_runs(ablation, _sweep_runs(ablation) if ablation.options.sweep else _seed_runs(ablation))


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


# ---------------------------------------------------------------------------------------------------------------- runs


def _swept_arms(ablation: Ablation) -> list[Arm]:
    """The arms whose best learning rate is unknown: the baseline, and those with a trick that may change it."""
    return [arm for index, arm in enumerate(ablation.arms) if index == 0 or arm.changes_lr]


def _sweep_runs(ablation: Ablation) -> Iterator[tuple[Recipe, Arm]]:
    baseline = ablation.arms[0].recipe.optimizer.lr
    for lr in ablation.options.sweep.lrs if ablation.options.sweep else ():
        for arm in _swept_arms(ablation):
            own = three_digits(lr * arm.recipe.optimizer.lr / baseline)
            yield ablation.recipe(arm, ablation.seeds[0], own), arm


def _seed_runs(ablation: Ablation) -> Iterator[tuple[Recipe, Arm]]:
    for seed in ablation.seeds:
        for arm in ablation.arms:
            yield ablation.recipe(arm, seed, ablation.lr(arm)), arm


def _choose_lrs(ablation: Ablation, say: Say) -> None:
    for name, tried in ablation.swept.items():
        lrs = [lr for lr, _ in tried]
        best, loss = min(tried, key=lambda pair: pair[1])
        if not math.isfinite(loss):
            raise UserError(f"{name}: no learning rate of the sweep {lrs[0]:g} to {lrs[-1]:g} ended with a loss")
        say(f"{name}: best learning rate {best:g} (loss {loss:.4f}) of {', '.join(f'{lr:g}' for lr in lrs)}")
        if best in (min(lrs), max(lrs)):
            warning = f"{name}: the best learning rate, {best:g}, is at the edge of the sweep: widen it"
            ablation.warnings.append(warning)
            say(warning)


def _is_interruption(code: int) -> bool:
    """Whether a run ended because someone or something stopped it: the ablation stops too."""
    return code == EXIT_REQUEUE or code > EXIT_SIGNAL


class _Trainer:
    """Trains one run after another, records what each took, and says how far the ablation is."""

    def __init__(self, ablation: Ablation, runner: Runner, say: Say) -> None:
        self.ablation, self.runner, self.say = ablation, runner, say
        self.reached: set[str] = set()  # names of runs, the current one included
        num_swept = len(_swept_arms(ablation)) if ablation.options.sweep else 0
        # An arm's first seed at its best learning rate is a run of the sweep.
        self.num_runs = len(list(_sweep_runs(ablation))) + len(ablation.arms) * len(ablation.seeds) - num_swept

    def train(self, recipe: Recipe) -> int:
        """Train one run unless it is finished; returns its exit code."""
        run = run_directory(recipe)
        self.reached.add(recipe.name)
        if is_finished(run, recipe.train.budget):
            return EXIT_OK
        path = self.ablation.recipe_file(recipe.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        self._say_progress(recipe.name)
        started, cpu_started = time.monotonic(), _children_cpu_sec()
        code = self.runner(recipe, path)
        took = {"whole_sec": time.monotonic() - started, "cpu_sec": _children_cpu_sec() - cpu_started}
        if run.path.is_dir():
            timing = [*read_timing(run.path), {**took, "exit_code": code}]
            write_json(run.path / TIMING, timing)
        self.ablation.failures.pop(recipe.name, None)
        if code not in (EXIT_OK, EXIT_REQUEUE):
            self.ablation.failures[recipe.name] = code
        return code

    def _say_progress(self, name: str) -> None:
        finished = [path.parent for path in self.ablation.folder.glob("*-seed*/results.json")]
        took = [sum(one["whole_sec"] for one in timing) for path in finished if (timing := read_timing(path))]
        number = len(self.reached)
        eta = f", about {format_duration(fmean(took) * (self.num_runs - number + 1))} left" if took else ""
        self.say(f"[{number}/{self.num_runs}] {name}{eta}")


def _children_cpu_sec() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
