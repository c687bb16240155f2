"""Collect what an ablation has found so far as plain data, and write the files that show it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from turbolm.ablate.design import Arm
from turbolm.ablate.measure import Clock, RunMeasures, measure_run
from turbolm.ablate.render import render_csv, render_html
from turbolm.ablate.settings import Ablation
from turbolm.ablate.verdict import LOSS_NOISE, TEST, compare, words
from turbolm.files import read_json, write_json
from turbolm.recipe.schema import Recipe
from turbolm.train.run_directory import is_finished, run_directory

Run = dict[str, Any]  # measures of a run and when it met the target

_MIN_EVALUATIONS = 8  # with fewer, the point between two of them where the target is met is too uncertain
_MEASURES = (
    "final_loss", "target_tokens", "target_steps", "target_sec", "training_sec", "whole_sec", "cpu_sec",
    "tokens_per_sec", "mfu", "peak_bytes",
)  # fmt: skip
_MORE_IS_BETTER = ("tokens_per_sec", "mfu")


def write_results(ablation: Ablation) -> None:
    """Collect the results and write ablation.json, ablation.csv and report.html."""
    results = collect_results(ablation)
    ablation.folder.mkdir(parents=True, exist_ok=True)
    write_json(ablation.folder / "ablation.json", results)
    (ablation.folder / "ablation.csv").write_text(render_csv(results), encoding="utf-8")
    (ablation.folder / "report.html").write_text(render_html(results), encoding="utf-8")


def collect_results(ablation: Ablation) -> dict[str, Any]:
    """Everything measured so far, in plain JSON types. The keys are a stable interface."""
    options, baseline = ablation.options, ablation.arms[0]
    found = {
        arm.name: [
            run
            for seed in ablation.seeds
            if (run := measured(ablation.recipe(arm, seed, ablation.lr(arm)), options.clock)) is not None
        ]
        for arm in ablation.arms
    }
    target, source = _target(options.target_loss, found[baseline.name])
    runs = {name: [_with_target(run, target) for run in measures] for name, measures in found.items()}
    results = {
        "name": ablation.name,
        "command": options.command,
        "complete": all(len(measures) == options.num_seeds for measures in found.values()),
        "budget_tokens": baseline.recipe.train.budget,
        "seeds": ablation.seeds,
        "target_loss": target,
        "target_source": source,
        "clock": options.clock,
        "test": TEST,
        "noise": {"relative": ablation.noise, "loss": LOSS_NOISE},
        "sweep": {**asdict(options.sweep), "halving": options.halving} if options.sweep else None,
        "jobs": options.num_jobs,
        "machine": asdict(ablation.machine),
        "versions": _versions(runs),
        "arms": [_arm_results(ablation, arm, runs[arm.name], runs[baseline.name]) for arm in ablation.arms],
        "notes": _notes(ablation, runs),
    }
    plain = _finite(results)
    assert isinstance(plain, dict)
    return plain


def measured(recipe: Recipe, clock: Clock = "wall") -> RunMeasures | None:
    """The measures of a run, or None before it is finished."""
    run = run_directory(recipe)
    if not is_finished(run, recipe.train.budget):
        return None
    return measure_run(run.path, seed=recipe.train.seed, lr=recipe.optimizer.lr, clock=clock)


def _target(target_loss: float | None, runs: Sequence[RunMeasures]) -> tuple[float | None, str]:
    """The loss that time is measured to. By default every run of the baseline reaches it, and so does its equal."""
    if target_loss is not None:
        return target_loss, "as asked for"
    if not runs:
        return None, ""
    worst = max(run.final_loss for run in runs)
    return worst * (1 + LOSS_NOISE), f"{LOSS_NOISE:.1%} above the highest final loss of the baseline's runs"


def _with_target(run: RunMeasures, target: float | None) -> Run:
    """A run with tokens, steps and time to the target: None where it is not reached, or met at the first evaluation."""
    reached = None if target is None else run.to_target(target)
    at_first_evaluation = reached is not None and reached == run.evaluations[0]
    if at_first_evaluation:
        reached = None  # it was met at some time before
    return {
        **asdict(run),
        **{f"target_{key}": getattr(reached, key) if reached else None for key in ("tokens", "steps", "sec")},
        "target_at_first_evaluation": at_first_evaluation,
    }


def _arm_results(ablation: Ablation, arm: Arm, runs: Sequence[Run], baseline: Sequence[Run]) -> dict[str, Any]:
    is_baseline = arm is ablation.arms[0]
    found: dict[str, Any] = {
        "arm": arm.name,
        "tricks": [trick.name for trick in arm.tricks],
        "lr": ablation.lr(arm),
        "sweep": ablation.swept.get(arm.name),
        "rungs": [asdict(rung) for rung in ablation.rungs.get(arm.name, ())],
        "runs": runs,
        "mean": {key: fmean(values) for key in _MEASURES if (values := _values(runs, key))},
        "spread": {key: stdev(values) for key in _MEASURES if len(values := _values(runs, key)) > 1},
        "versus_baseline": {},
        "verdict": None,
        "smallest_effect": None,
        "verdict_text": "the baseline" if is_baseline else "no run is finished",
    }
    by_seed = {run["seed"]: run for run in baseline}
    pairs = [(run, by_seed[run["seed"]]) for run in runs if run["seed"] in by_seed]
    if is_baseline or not pairs:
        return found
    ours, theirs = zip(*pairs, strict=True)
    for key in _MEASURES:
        values, references = _values(ours, key), _values(theirs, key)
        if len(values) == len(references) == len(pairs):
            noise = LOSS_NOISE if key == "final_loss" else ablation.noise
            comparison = compare(values, references, noise, less_is_better=key not in _MORE_IS_BETTER)
            found["versus_baseline"][key] = asdict(comparison)
    found["verdict"], found["verdict_text"], found["smallest_effect"] = words(
        [run["target_sec"] for run in ours],
        [run["target_sec"] for run in theirs],
        [run["final_loss"] for run in ours],
        [run["final_loss"] for run in theirs],
        ablation.noise,
        sum(run["target_at_first_evaluation"] for run in (*ours, *theirs)),
    )
    return found


def _values(runs: Sequence[Run], key: str) -> list[float]:
    return [run[key] for run in runs if run[key] is not None and math.isfinite(run[key])]


def _finite(value: object) -> object:
    """JSON has no infinity: such a number becomes null."""
    if isinstance(value, dict):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _notes(ablation: Ablation, runs: dict[str, list[Run]]) -> list[str]:
    notes = list(ablation.warnings)
    counts = [len(run["evaluations"]) for found in runs.values() for run in found]
    if counts and min(counts) < _MIN_EVALUATIONS:
        notes.append(
            f"{min(counts)} evaluations a run place the target loss coarsely; evaluation.every=5% places it better"
        )
    neighbors = [run["neighbors"] for found in runs.values() for run in found]
    if any(neighbors):
        notes.append(
            f"each run had {min(neighbors):.1f} to {max(neighbors):.1f} others beside it, averaged over its time; the "
            "fewer, the faster it is, so times differ by this as well (--jobs 1 measures each alone)"
        )
    notes += [
        f"{name} failed with exit code {code}; see {ablation.folder / name}" for name, code in ablation.failures.items()
    ]
    return notes


def _versions(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Packages and host of the first measured run."""
    folders = [Path(run["path"]) for found in runs.values() for run in found]
    paths = [path for folder in folders for path in sorted(folder.glob("attempts/*/environment.json"))]
    return (read_json(paths[0]) or {}) if paths else {}
