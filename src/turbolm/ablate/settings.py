"""What an ablation is asked for: its arms, seeds and learning rates, and the recipe of each run."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from turbolm.ablate.design import Arm, design
from turbolm.ablate.measure import Clock
from turbolm.ablate.tricks import parse_tricks
from turbolm.errors import UserError
from turbolm.plan.machine import Machine
from turbolm.recipe.schema import Recipe
from turbolm.units import parse_share


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
        return [three_digits(self.low * math.exp(index * step)) for index in range(self.count)]


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
    clock: Clock = "wall"
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
        clock: Clock = "wall",
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
        return Ablation(name, folder, arms, num_seeds, share, target_loss, sweep, clock, command, machine)

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


def three_digits(rate: float) -> float:
    """A learning rate as it is written."""
    return float(f"{rate:.3g}")
