"""The mean of the weights of the end of a run (`evaluation.weight_average`): which steps count, and how much.

Equal shares are those of torch's `AveragedModel`. With a half-life the mean is exponential once it has enough weights;
until then all count the same, so that the first ones do not count for more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from turbolm.engine.engine import Engine
from turbolm.plan.plan import Plan


@dataclass
class RunningAverage:
    """The mean of the weights after step `first_step` and every `every_steps` steps from there; `count` so far."""

    engine: Engine
    plan: Plan
    count: int = 0

    @property
    def every_steps(self) -> int:
        """Return the steps between the weights that are averaged."""
        assert self.plan.recipe.evaluation.weight_average is not None
        return self.plan.recipe.evaluation.weight_average.every_steps

    @property
    def first_step(self) -> int:
        """Return the first of the steps that are averaged."""
        return self.plan.first_averaged_step

    def add(self, step: int) -> None:
        """Add the weights as they are after `step`, if they count."""
        since = step - self.first_step
        if since < 0 or since % self.every_steps:
            return
        self.engine.add_to_average(max(1 / (self.count + 1), self._exponential_share(step)))
        self.count += 1

    def state(self) -> dict[str, int]:
        """Return what `restore` reads; empty while nothing is averaged."""
        if not self.count:
            return {}
        return {"first_step": self.first_step, "every_steps": self.every_steps, "count": self.count}

    def restore(self, saved: Mapping[str, Any] | None, step: int) -> str | None:
        """Continue the mean that a checkpoint of `step` has, or begin anew if it is of other steps; return what to say.

        The engine has loaded the checkpoint's mean.
        """
        wanted = {"first_step": self.first_step, "every_steps": self.every_steps}
        has_average = self.engine.averaged is not None and not self.engine.averaged.is_empty
        if saved is not None and has_average and {key: saved.get(key) for key in wanted} == wanted:
            self.count = int(saved["count"])
            return None
        self.count = 0
        self.engine.drop_average()
        if step < self.first_step:
            return None
        return (
            f"evaluation.weight_average begins after step {step}, not {self.first_step}: the run trained on without "
            "it, or with other settings"
        )

    def _exponential_share(self, step: int) -> float:
        settings, recipe = self.plan.recipe.evaluation.weight_average, self.plan.recipe
        if settings is None or settings.half_life is None:
            return 0.0
        half_life = settings.half_life.tokens(recipe.train.budget, recipe.train.global_batch)
        tokens_seen = self.plan.curriculum.tokens_seen
        return 1 - 0.5 ** ((tokens_seen(step) - tokens_seen(max(step - self.every_steps, 0))) / half_life)
