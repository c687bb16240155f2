"""Train every arm with every seed, and sweep learning rates first if asked.

Runs go seed by seed, not arm by arm, so that other load on the machine disturbs all arms alike.
"""

from __future__ import annotations

from turbolm.ablate.results import write_results
from turbolm.ablate.runner import Runner
from turbolm.ablate.settings import Ablation
from turbolm.ablate.sweep import count_starts, rung_tokens, sweep, sweep_runs, swept_arms
from turbolm.ablate.trainer import Say, Trainer, check_runs
from turbolm.errors import EXIT_FAILED, EXIT_OK
from turbolm.recipe.schema import Recipe


def run_ablation(ablation: Ablation, runner: Runner, say: Say) -> int:
    """Train what is left to train; returns an exit code. Writes the results so far after every run.

    Raises UserError when the folder holds runs of another recipe or setting.
    """
    check_folder(ablation)
    options = ablation.options
    trainer = Trainer(ablation.folder, runner, say, _count_starts(ablation), ablation.failures, options.num_jobs)
    if options.sweep:
        if code := sweep(ablation, trainer.train, say):
            return code
        check_runs(ablation.folder, _seed_runs(ablation))
    recipes = _seed_runs(ablation)
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
    swept = [recipe for recipe, _ in sweep_runs(ablation)]
    check_runs(ablation.folder, swept if ablation.options.sweep else _seed_runs(ablation))


def _count_starts(ablation: Ablation) -> int:
    """How many starts of runs it takes. An arm's first seed at its best learning rate is a run of the sweep."""
    num_swept = len(swept_arms(ablation)) if ablation.options.sweep else 0
    return count_starts(ablation) + len(ablation.arms) * len(ablation.seeds) - num_swept


def _seed_runs(ablation: Ablation) -> list[Recipe]:
    return [ablation.recipe(arm, seed, ablation.lr(arm)) for seed in ablation.seeds for arm in ablation.arms]
