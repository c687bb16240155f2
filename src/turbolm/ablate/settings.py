"""The settings of an ablation: its options, its arms, and the recipe of each run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from turbolm.ablate.design import Arm, design
from turbolm.ablate.measure import Clock
from turbolm.ablate.trainer import run_recipe
from turbolm.ablate.tricks import check_name, parse_tricks
from turbolm.errors import UserError
from turbolm.plan.machine import Machine
from turbolm.recipe.paths import use_path
from turbolm.recipe.schema import Recipe
from turbolm.units import parse_share


@dataclass(frozen=True)
class Sweep:
    """Learning rates to try for the baseline. An arm whose trick sets a learning rate tries the same factors on it."""

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
    def lrs(self) -> list[float]:
        """Evenly spaced on a logarithmic scale, both ends included, rounded to three digits."""
        step = math.log(self.high / self.low) / (self.count - 1)
        return [three_digits(self.low * math.exp(index * step)) for index in range(self.count)]


@dataclass(frozen=True)
class Options:
    """The options of the command line. `noise` is a share such as `5%`; `name` defaults to the recipe's."""

    num_seeds: int = 1
    target_loss: float | None = None
    sweep: Sweep | None = None
    halving: bool = False
    alone: bool = False
    noise: str = "5%"
    num_jobs: int = 1
    clock: Clock = "wall"
    name: str | None = None
    command: str = ""


@dataclass(frozen=True)
class Rung:
    """A round of successive halving: the loss of each learning rate that took part, after `tokens`."""

    tokens: int
    losses: tuple[tuple[float, float], ...]


@dataclass
class Ablation:
    """The arms to measure, and what has been found so far.

    `machine` is the share of this machine that each run gets. `swept` has, by arm, (learning rate, final loss); where
    halving left a rate behind, its loss there. `best` are the rates chosen; `warnings` go with the results.
    """

    name: str
    folder: Path
    arms: Sequence[Arm]
    options: Options
    noise: float  # relative
    machine: Machine
    swept: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    rungs: dict[str, list[Rung]] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    failures: dict[str, int] = field(default_factory=dict)  # exit codes by run name

    @staticmethod
    def prepare(
        recipe_file: str, overrides: Sequence[str], tricks: Sequence[str], machine: Machine, options: Options
    ) -> Ablation:
        """Build and check the arms. Raises UserError with everything that cannot be compared."""
        arms = design(recipe_file, overrides, parse_tricks(tricks), machine, alone=options.alone)
        recipe = arms[0].recipe
        name = check_name("--name", options.name or recipe.name, 100)
        if options.halving and options.sweep is None:
            raise UserError("--halving: needs the learning rates to halve; give them with --sweep-lr lo,hi,n")
        if options.target_loss is not None and not 0 < options.target_loss < math.inf:
            raise UserError(f"--target-loss: expected a loss such as 4.2, got {options.target_loss}")
        try:
            noise = parse_share(options.noise)
        except ValueError as error:
            raise UserError(f"--noise: {error}") from None
        folder = use_path(recipe.execution.runs_dir, "execution.runs_dir") / "ablations" / name
        return Ablation(name, folder, arms, options, noise, machine)

    @property
    def seeds(self) -> list[int]:
        """The recipe's own seed and the numbers after it."""
        return [self.arms[0].recipe.train.seed + index for index in range(self.options.num_seeds)]

    def lr(self, arm: Arm) -> float:
        """The learning rate the arm is measured with."""
        return self.best.get(arm.name) or self.best.get(self.arms[0].name) or arm.recipe.optimizer.lr

    def sweep_tokens(self, arm: Arm, num_finished: int) -> int:
        """The tokens that halving trained for an arm, `num_finished` of whose runs used up the budget."""
        before = total = 0
        for rung in self.rungs[arm.name]:
            total += len(rung.losses) * (rung.tokens - before)
            before = rung.tokens
        return total + num_finished * (arm.recipe.train.budget - before)

    def recipe(self, arm: Arm, seed: int, lr: float, stop_tokens: int | None = None) -> Recipe:
        """The recipe of one run, or of a start that stops early."""
        swept = f"-lr{lr:.3g}" if self.options.sweep else ""
        optimizer = arm.recipe.optimizer.at_lr(lr)
        name = f"{arm.run_name}{swept}-seed{seed}"
        return run_recipe(arm.recipe, self.folder, name, seed=seed, optimizer=optimizer, stop_tokens=stop_tokens)


def three_digits(lr: float) -> float:
    """A learning rate as run names show it."""
    return float(f"{lr:.3g}")
