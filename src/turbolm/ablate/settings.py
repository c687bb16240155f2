"""The settings of an ablation: its options, its arms, and the recipe of each run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from turbolm.ablate.design import Arm, design
from turbolm.ablate.measure import Clock
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
    alone: bool = False
    noise: str = "5%"
    clock: Clock = "wall"
    name: str | None = None
    command: str = ""


@dataclass
class Ablation:
    """The arms to measure, and what has been found so far."""

    name: str
    folder: Path
    arms: Sequence[Arm]
    options: Options
    noise: float  # relative
    machine: Machine
    swept: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # by arm: (learning rate, final loss)
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
        tried = self.swept.get(arm.name) or self.swept.get(self.arms[0].name)
        return min(tried, key=lambda pair: pair[1])[0] if tried else arm.recipe.optimizer.lr

    def recipe(self, arm: Arm, seed: int, lr: float) -> Recipe:
        """The recipe of one run. It keeps only its last checkpoint and generates no sample."""
        swept = f"-lr{lr:.3g}" if self.options.sweep else ""
        recipe = arm.recipe
        return recipe.model_copy(
            update={
                "name": f"{arm.run_name}{swept}-seed{seed}",
                "train": recipe.train.model_copy(update={"seed": seed}),
                "optimizer": recipe.optimizer.model_copy(update={"lr": lr}),
                "execution": recipe.execution.model_copy(update={"runs_dir": str(self.folder)}),
                "checkpoint": recipe.checkpoint.model_copy(update={"keep_last": 1}),
                "logging": recipe.logging.model_copy(update={"sample_tokens": 0}),
            }
        )

    def recipe_file(self, run_name: str) -> Path:
        """Where the recipe of a run is written."""
        return self.folder / "recipes" / f"{run_name}.yaml"


def three_digits(lr: float) -> float:
    """A learning rate as run names show it."""
    return float(f"{lr:.3g}")
