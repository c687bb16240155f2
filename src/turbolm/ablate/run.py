"""Train every arm with every seed, and sweep learning rates before that if asked.

Each run is a normal training in a run directory of its own, so that a finished one is never done again and an
interrupted one goes on. Runs go seed by seed, not arm by arm: what else the machine does then disturbs all arms alike.
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import fmean

from turbolm.ablate.design import Arm, recipe_path
from turbolm.ablate.measure import TIMING, read_timing
from turbolm.ablate.results import measured, write_results
from turbolm.ablate.settings import Ablation, three_digits
from turbolm.errors import EXIT_FAILED, EXIT_OK, EXIT_REQUEUE, UserError
from turbolm.recipe.contract import changed_keys
from turbolm.recipe.load import RecipeError, dump_recipe, load_recipe
from turbolm.recipe.schema import Recipe
from turbolm.train.run_directory import is_finished, run_directory
from turbolm.units import format_duration

Runner = Callable[[Recipe, Path], int]  # trains the recipe, which is also in the file; returns the run's exit code

_KILLED = 128


def run_ablation(ablation: Ablation, runner: Runner, say: Callable[[str], None]) -> int:
    """Do what is left to do; returns an exit code. Results so far are written after every run.

    Raises UserError when the folder holds runs of another recipe or of another setting.
    """
    check_folder(ablation)
    progress = _Progress(ablation, say)
    for recipe, arm in _sweep_runs(ablation):
        code = _train(ablation, recipe, runner, progress)
        if code in (EXIT_REQUEUE, 130) or code > _KILLED:
            return code
        measures = measured(recipe)
        loss = measures.final_loss if measures else math.inf  # a run that failed at this rate
        ablation.swept.setdefault(arm.name, []).append((recipe.optimizer.lr, loss))
    if ablation.sweep:
        _choose_rates(ablation, say)
        _check_runs(ablation, _seed_runs(ablation))
    for recipe, _ in _seed_runs(ablation):
        code = _train(ablation, recipe, runner, progress)
        if code in (EXIT_REQUEUE, 130) or code > _KILLED:
            return code
        write_results(ablation)
    write_results(ablation)
    left = [recipe.name for recipe, _ in _seed_runs(ablation) if recipe.name in ablation.failures]
    return EXIT_FAILED if left else EXIT_OK


def check_folder(ablation: Ablation) -> None:
    """Raises UserError when runs in the folder were made with other recipes than would be written now."""
    _check_runs(ablation, _sweep_runs(ablation) if ablation.sweep else _seed_runs(ablation))


def _check_runs(ablation: Ablation, runs: Iterable[tuple[Recipe, Arm]]) -> None:
    changes = {}
    for recipe, _ in runs:
        if not run_directory(recipe).path.exists():
            continue
        path = recipe_path(ablation.folder, recipe.name)
        try:
            old = load_recipe(path)  # so that keys which are new since then have their defaults
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
    """Those whose best rate is not known: the baseline, and each with a trick of optimizer, schedule or batch."""
    return [arm for index, arm in enumerate(ablation.arms) if index == 0 or arm.changes_rate]


def _sweep_runs(ablation: Ablation) -> Iterator[tuple[Recipe, Arm]]:
    if ablation.sweep is None:
        return
    baseline = ablation.arms[0].recipe.optimizer.lr
    for rate in ablation.sweep.rates:
        for arm in _swept_arms(ablation):
            own = three_digits(rate * arm.recipe.optimizer.lr / baseline)
            yield ablation.recipe(arm, ablation.seeds[0], own), arm


def _seed_runs(ablation: Ablation) -> Iterator[tuple[Recipe, Arm]]:
    for seed in ablation.seeds:
        for arm in ablation.arms:
            yield ablation.recipe(arm, seed, ablation.rate(arm)), arm


def _choose_rates(ablation: Ablation, say: Callable[[str], None]) -> None:
    for name, tried in ablation.swept.items():
        rates = [rate for rate, _ in tried]
        best, loss = min(tried, key=lambda pair: pair[1])
        if not math.isfinite(loss):
            raise UserError(f"{name}: no learning rate of the sweep {rates[0]:g} to {rates[-1]:g} ended with a loss")
        say(f"{name}: best learning rate {best:g} (loss {loss:.4f}) of {', '.join(f'{rate:g}' for rate in rates)}")
        if best in (min(rates), max(rates)):
            warning = f"{name}: the best learning rate, {best:g}, is at the edge of the sweep: widen it"
            ablation.warnings.append(warning)
            say(warning)


def _train(ablation: Ablation, recipe: Recipe, runner: Runner, progress: _Progress) -> int:
    """Train one run unless it is finished, and note what it took."""
    run = run_directory(recipe)
    progress.reached.add(recipe.name)
    if is_finished(run, recipe.train.budget):
        return EXIT_OK
    path = recipe_path(ablation.folder, recipe.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    progress.show(recipe)
    started, cpu_started = time.monotonic(), _children_cpu_sec()
    code = runner(recipe, path)
    timing = {"whole_sec": time.monotonic() - started, "cpu_sec": _children_cpu_sec() - cpu_started, "exit_code": code}
    if run.path.is_dir():
        (run.path / TIMING).write_text(json.dumps([*read_timing(run.path), timing], indent=1), encoding="utf-8")
    ablation.failures.pop(recipe.name, None)
    if code not in (EXIT_OK, EXIT_REQUEUE):
        ablation.failures[recipe.name] = code
    return code


class _Progress:
    """Which run of how many, and when the last one will be done."""

    def __init__(self, ablation: Ablation, say: Callable[[str], None]) -> None:
        self.ablation, self.say = ablation, say
        self.reached: set[str] = set()  # names of runs, the present one included
        num_arms, num_swept = len(ablation.arms), len(_swept_arms(ablation))
        num_sweep_runs = num_swept * len(ablation.sweep.rates) if ablation.sweep else 0
        # The first seed at the best rate is a run of the sweep.
        self.total = num_sweep_runs + num_arms * ablation.num_seeds - (num_swept if ablation.sweep else 0)

    def show(self, recipe: Recipe) -> None:
        folder = self.ablation.folder
        finished = [path for path in folder.glob("*-seed*") if (path / "results.json").is_file()]
        took = [sum(one["whole_sec"] for one in timing) for path in finished if (timing := read_timing(path))]
        number = len(self.reached)
        eta = f", about {format_duration(fmean(took) * (self.total - number + 1))} left" if took else ""
        self.say(f"[{number}/{self.total}] {recipe.name}{eta}")


def _children_cpu_sec() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
