"""Train every arm with every seed, sweep learning rates before that if asked, and gather what was measured.

Each run is a normal training in a run directory of its own, so that a finished one is never done again and an
interrupted one goes on. Runs go seed by seed, not arm by arm: what else the machine does then disturbs all arms alike.
"""

from __future__ import annotations

import json
import math
import re
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

from turbolm.ablate.design import Arm, design, recipe_path
from turbolm.ablate.measure import TIMING, RunMeasures, measure_run, read_timing
from turbolm.ablate.tricks import parse_tricks
from turbolm.ablate.verdict import LOSS_NOISE, compare, words
from turbolm.errors import EXIT_FAILED, EXIT_OK, EXIT_REQUEUE, UserError
from turbolm.plan.machine import Machine
from turbolm.recipe.contract import changed_keys
from turbolm.recipe.load import dump_recipe
from turbolm.recipe.schema import Recipe
from turbolm.train.run_directory import is_finished, read_json, run_directory, write_json
from turbolm.units import format_duration, parse_share

Runner = Callable[[Recipe, Path], int]  # trains the recipe, which is also in the file; returns the run's exit code

_KILLED = 128
_MIN_EVALUATIONS = 8  # fewer leave the place between two of them where a target is reached too open


@dataclass(frozen=True)
class Sweep:
    """Learning rates for the baseline; an arm whose trick sets a rate of its own tries the same factors on it."""

    low: float
    high: float
    count: int

    @staticmethod
    def parse(text: str) -> Sweep:
        """`lo,hi,n`. Raises UserError."""
        try:
            low, high, count = text.split(",")
            sweep = Sweep(float(low), float(high), int(count))
        except ValueError:
            raise UserError(f"--sweep-lr: expected lo,hi,n such as 1e-3,1e-2,5, got {text[:100]!r}") from None
        if not (0 < sweep.low < sweep.high < math.inf and 2 <= sweep.count <= 50):
            raise UserError(f"--sweep-lr: expected 0 < lo < hi and n from 2 to 50, got {text!r}")
        return sweep

    @property
    def rates(self) -> list[float]:
        """Evenly spaced in their logarithms, both ends included, in three digits."""
        step = math.log(self.high / self.low) / (self.count - 1)
        return [_three_digits(self.low * math.exp(index * step)) for index in range(self.count)]


@dataclass
class Ablation:
    """What is asked for, and what has been found so far."""

    name: str
    folder: Path
    arms: Sequence[Arm]
    num_seeds: int
    noise: float  # relative
    target_loss: float | None = None
    sweep: Sweep | None = None
    command: str = ""
    machine: Machine | None = None
    swept: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # by arm: (rate, final loss)
    warnings: list[str] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)  # exit codes by the run's name

    @staticmethod
    def prepare(
        recipe_file: str,
        overrides: Sequence[str],
        tricks: Sequence[str],
        *,
        machine: Machine,
        name: str | None = None,
        alone: bool = False,
        num_seeds: int = 1,
        noise: str = "5%",
        target_loss: float | None = None,
        sweep: Sweep | None = None,
        command: str = "",
    ) -> Ablation:
        """What a command line asks for. Raises UserError with all that cannot be compared."""
        arms = design(recipe_file, overrides, parse_tricks(tricks), machine, alone=alone)
        recipe = arms[0].recipe
        name = name or recipe.name
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise UserError(f"--name: expected letters, digits, '.', '_' and '-', got {name[:100]!r}")
        if target_loss is not None and not 0 < target_loss < math.inf:
            raise UserError(f"--target-loss: expected a loss such as 4.2, got {target_loss}")
        try:
            share = parse_share(noise)
        except ValueError as error:
            raise UserError(f"--noise: {error}") from None
        folder = Path(recipe.execution.runs_dir) / "ablations" / name
        return Ablation(name, folder, arms, num_seeds, share, target_loss, sweep, command, machine)

    @property
    def seeds(self) -> list[int]:
        """The recipe's own seed and those after it."""
        return [self.arms[0].recipe.train.seed + index for index in range(self.num_seeds)]

    def rate(self, arm: Arm) -> float:
        """The learning rate that the arm is measured with."""
        tried = self.swept.get(arm.name) or self.swept.get(self.arms[0].name)
        return min(tried, key=lambda pair: pair[1])[0] if tried else arm.recipe.optimizer.lr

    def recipe(self, arm: Arm, seed: int, rate: float) -> Recipe:
        """The recipe of one run, with only its last checkpoint kept and no sample generated."""
        swept = f"-lr{rate:.3g}" if self.sweep else ""
        recipe = arm.recipe
        return recipe.model_copy(
            update={
                "name": f"{arm.run_name}{swept}-seed{seed}",
                "train": recipe.train.model_copy(update={"seed": seed}),
                "optimizer": recipe.optimizer.model_copy(update={"lr": rate}),
                "execution": recipe.execution.model_copy(update={"runs_dir": str(self.folder)}),
                "checkpoint": recipe.checkpoint.model_copy(update={"keep_last": 1}),
                "logging": recipe.logging.model_copy(update={"sample_tokens": 0}),
            }
        )


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
        measures = _measured(recipe)
        loss = measures.final_loss if measures else math.inf  # a run that failed at this rate
        ablation.swept.setdefault(arm.name, []).append((recipe.optimizer.lr, loss))
    if ablation.sweep:
        _choose_rates(ablation, say)
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
    changes = {}
    for recipe, _ in [*_sweep_runs(ablation), *(_seed_runs(ablation) if not ablation.sweep else ())]:
        if not run_directory(recipe).path.exists():
            continue
        try:
            old = yaml.safe_load(recipe_path(ablation.folder, recipe.name).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            continue
        new = yaml.safe_load(dump_recipe(recipe))
        for key, before, after in changed_keys(old, new):
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
            own = _three_digits(rate * arm.recipe.optimizer.lr / baseline)
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
    if code != EXIT_OK:
        ablation.failures[recipe.name] = code
    return code


def _measured(recipe: Recipe) -> RunMeasures | None:
    run = run_directory(recipe)
    if not is_finished(run, recipe.train.budget):
        return None
    return measure_run(run.path, seed=recipe.train.seed, lr=recipe.optimizer.lr)


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


# ------------------------------------------------------------------------------------------------------------- results


def write_results(ablation: Ablation) -> dict[str, Any]:
    """Gather what is measured and write ablation.json, ablation.csv and report.html; returns the results."""
    from turbolm.ablate.render import render_csv, render_page

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
            if (measures := _measured(ablation.recipe(arm, seed, ablation.rate(arm)))) is not None
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
    references = [_figures(measures, target) for measures in baseline]
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
    if arm is ablation.arms[0] or not rows or not references:
        return found
    for key, (noise, less_is_better) in _MEASURES.items():
        ours, theirs = _values(rows, key), _values(references, key)
        if len(ours) == len(rows) and len(theirs) == len(references):
            noise = ablation.noise if noise is None else noise
            found["versus_baseline"][key] = asdict(compare(ours, theirs, noise, less_is_better=less_is_better))
    found["verdict"], found["verdict_text"] = words(
        [row["target_sec"] for row in rows],
        [row["target_sec"] for row in references],
        [measures.final_loss for measures in runs],
        [measures.final_loss for measures in baseline],
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


def _children_cpu_sec() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _three_digits(rate: float) -> float:
    return float(f"{rate:.3g}")
