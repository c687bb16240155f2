"""What an ablation has found so far, as plain data, and the files that show it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from turbolm.ablate.design import Arm
from turbolm.ablate.measure import Clock, RunMeasures, measure_run
from turbolm.ablate.render import render_csv, render_page
from turbolm.ablate.settings import Ablation
from turbolm.ablate.verdict import LOSS_NOISE, compare, words
from turbolm.recipe.schema import Recipe
from turbolm.train.run_directory import is_finished, read_json, run_directory, write_json

_MIN_EVALUATIONS = 8  # fewer leave the place between two of them where a target is reached too open


def write_results(ablation: Ablation) -> dict[str, Any]:
    """Gather what is measured and write ablation.json, ablation.csv and report.html; returns the results."""
    results = collect_results(ablation)
    ablation.folder.mkdir(parents=True, exist_ok=True)
    write_json(ablation.folder / "ablation.json", results)
    (ablation.folder / "ablation.csv").write_text(render_csv(results), encoding="utf-8")
    (ablation.folder / "report.html").write_text(render_page(results), encoding="utf-8")
    return results


def collect_results(ablation: Ablation) -> dict[str, Any]:
    """Everything measured so far, in plain JSON types; the keys are a stable interface."""
    runs = {
        arm.name: [
            measures
            for seed in ablation.seeds
            if (measures := measured(ablation.recipe(arm, seed, ablation.rate(arm)), ablation.clock)) is not None
        ]
        for arm in ablation.arms
    }
    baseline = ablation.arms[0]
    target, source = _target(ablation, runs[baseline.name])
    arms = [_arm_results(ablation, arm, runs[arm.name], runs[baseline.name], target) for arm in ablation.arms]
    results = {
        "name": ablation.name,
        "command": ablation.command,
        "complete": all(len(found) == ablation.num_seeds for found in runs.values()),
        "budget_tokens": baseline.recipe.train.budget,
        "seeds": ablation.seeds,
        "target_loss": target,
        "target_source": source,
        "clock": ablation.clock,
        "noise": {"relative": ablation.noise, "loss": LOSS_NOISE},
        "sweep": asdict(ablation.sweep) if ablation.sweep else None,
        "machine": asdict(ablation.machine) if ablation.machine else None,
        "versions": _versions(runs),
        "arms": arms,
        "notes": _notes(ablation, runs),
    }
    plain = _finite(results)
    assert isinstance(plain, dict)
    return plain


def _target(ablation: Ablation, runs: Sequence[RunMeasures]) -> tuple[float | None, str]:
    """The loss that time is measured to. By default all of the baseline's runs reach it, and so do its equals."""
    if ablation.target_loss is not None:
        return ablation.target_loss, "as asked for"
    if not runs:
        return None, ""
    worst = max(measures.final_loss for measures in runs)
    return worst * (1 + LOSS_NOISE), f"{LOSS_NOISE:.1%} above the highest final loss of the baseline's runs"


def _arm_results(
    ablation: Ablation, arm: Arm, runs: Sequence[RunMeasures], baseline: Sequence[RunMeasures], target: float | None
) -> dict[str, Any]:
    rows = [_figures(measures, target) for measures in runs]
    found: dict[str, Any] = {
        "arm": arm.name,
        "tricks": [trick.name for trick in arm.tricks],
        "lr": ablation.rate(arm),
        "sweep": ablation.swept.get(arm.name),
        "runs": [{**measures.as_dict(), **row} for measures, row in zip(runs, rows, strict=True)],
        "mean": {key: fmean(values) for key in _MEASURES if (values := _values(rows, key))},
        "spread": {key: stdev(values) for key in _MEASURES if len(values := _values(rows, key)) > 1},
        "versus_baseline": {},
        "verdict": None,
        "verdict_text": "the baseline" if arm is ablation.arms[0] else "no run is finished",
    }
    by_seed = {measures.seed: measures for measures in baseline}
    pairs = [(measures, by_seed[measures.seed]) for measures in runs if measures.seed in by_seed]
    if arm is ablation.arms[0] or not pairs:
        return found
    rows, references = ([_figures(one, target) for one in side] for side in zip(*pairs, strict=True))
    for key, (noise, less_is_better) in _MEASURES.items():
        ours, theirs = _values(rows, key), _values(references, key)
        if len(ours) == len(theirs) == len(pairs):
            noise = ablation.noise if noise is None else noise
            found["versus_baseline"][key] = asdict(compare(ours, theirs, noise, less_is_better=less_is_better))
    found["verdict"], found["verdict_text"] = words(
        [row["target_sec"] for row in rows],
        [row["target_sec"] for row in references],
        [measures.final_loss for measures, _ in pairs],
        [reference.final_loss for _, reference in pairs],
        ablation.noise,
    )
    return found


# What arms are compared in: the noise level if it is not the one asked for, and whether less is better.
_MEASURES: dict[str, tuple[float | None, bool]] = {
    "final_loss": (LOSS_NOISE, True),
    "target_tokens": (None, True),
    "target_steps": (None, True),
    "target_sec": (None, True),
    "training_sec": (None, True),
    "whole_sec": (None, True),
    "cpu_sec": (None, True),
    "tokens_per_sec": (None, False),
    "mfu": (None, False),
    "peak_bytes": (None, True),
}


def _figures(measures: RunMeasures, target: float | None) -> dict[str, float | None]:
    reached = measures.to_target(target) if target is not None else None
    figures = {key: getattr(measures, key) for key in _MEASURES if not key.startswith("target_")}
    for key in ("tokens", "steps", "sec"):
        figures[f"target_{key}"] = getattr(reached, key) if reached else None
    return figures


def _values(rows: Sequence[dict[str, float | None]], key: str) -> list[float]:
    return [value for row in rows if (value := row[key]) is not None and math.isfinite(value)]


def _finite(value: object) -> object:
    """JSON has no infinity: such a number is left open."""
    if isinstance(value, dict):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _notes(ablation: Ablation, runs: dict[str, list[RunMeasures]]) -> list[str]:
    notes = list(ablation.warnings)
    counts = [len(measures.evaluations) for found in runs.values() for measures in found]
    if counts and min(counts) < _MIN_EVALUATIONS:
        notes.append(
            f"{min(counts)} evaluations a run place the target loss coarsely; evaluation.every=5% places it better"
        )
    notes += [
        f"{name} failed with exit code {code}; see {ablation.folder / name}" for name, code in ablation.failures.items()
    ]
    return notes


def _versions(runs: dict[str, list[RunMeasures]]) -> dict[str, Any]:
    """Packages and host of the first measured run."""
    for found in runs.values():
        for measures in found:
            for path in sorted(Path(measures.path).glob("attempts/*/environment.json")):
                return read_json(path) or {}
    return {}


def measured(recipe: Recipe, clock: Clock = "wall") -> RunMeasures | None:
    """The measures of a run, or None before it is finished."""
    run = run_directory(recipe)
    if not is_finished(run, recipe.train.budget):
        return None
    return measure_run(run.path, seed=recipe.train.seed, lr=recipe.optimizer.lr, clock=clock)
