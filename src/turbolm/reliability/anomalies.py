"""Detect anomalous steps and decide what follows, from numbers that are the same on every rank. Torch-free.

A spike is measured against the median of a window of recent steps, in median absolute deviations: unlike mean and
standard deviation (OLMo's SkipStepOptimizer, arXiv 2501.00656) these are not moved by the spikes themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from turbolm.recipe.schema import Anomalies

Decision = Literal["skip", "rollback", "stop"]
_SIGMA_OF_MAD = 1.4826  # standard deviations of a normal distribution in one median absolute deviation
_LEAST_SPREAD = 0.01  # of the median: where nothing moves, not every change is a spike


@dataclass(frozen=True)
class Anomaly:
    """A step that was not applied. `loss` is the global batch's, in nats per target; `grad_norm` is before clipping.

    A norm that DeepSpeed only knows not to be finite is NaN. `limit` is what a spike was above.
    """

    kind: Literal["non_finite", "loss_spike", "norm_spike"]
    loss: float
    grad_norm: float
    limit: float | None = None

    def __str__(self) -> str:
        if self.kind == "non_finite":
            return f"loss {self.loss:.4g} and gradient norm {self.grad_norm:.4g} are not both finite"
        name, value = ("loss", self.loss) if self.kind == "loss_spike" else ("gradient norm", self.grad_norm)
        return f"{name} {value:.4g} is a spike: above {self.limit:.4g}"


@dataclass
class AnomalyWatch:
    """The anomalies of one run: recent steps, counts, and the recipe's policy. Its state goes into checkpoints."""

    policy: Anomalies
    in_a_row: int = 0
    num_rollbacks: int = 0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    segment: int = 0

    def judge(self, loss: float, grad_norm: float, segment: int = 0) -> Anomaly | None:
        """What is wrong with a step, before its update; None to go ahead.

        Only steps that are applied enter the window. A new `segment` of the curriculum (other sequence lengths, batches
        or sources) starts a new one.
        """
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return Anomaly("non_finite", loss, grad_norm)
        if self.policy.spikes == "off":
            return None
        if segment != self.segment:
            self.segment, self.losses, self.norms = segment, [], []
        if len(self.losses) >= self.policy.window:
            loss_limit, norm_limit = (
                spike_limit(values, self.policy.threshold) for values in (self.losses, self.norms)
            )
            if loss > loss_limit:
                return Anomaly("loss_spike", loss, grad_norm, loss_limit)
            if grad_norm > norm_limit:
                return Anomaly("norm_spike", loss, grad_norm, norm_limit)
        self.losses = [*self.losses, loss][-self.policy.window :]
        self.norms = [*self.norms, grad_norm][-self.policy.window :]
        return None

    def decide(self, anomaly: Anomaly | None) -> Decision | None:
        """What follows from a step that `judge` has seen; once a step. None where nothing does."""
        if anomaly is None:
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        wanted = self.policy.non_finite if anomaly.kind == "non_finite" else self.policy.spikes
        if wanted == "stop":
            return "stop"
        if wanted == "skip" and self.in_a_row <= self.policy.max_in_a_row:
            return "skip"
        return "rollback" if self.num_rollbacks < self.policy.max_rollbacks else "stop"

    def state(self) -> dict[str, Any]:
        """For the checkpoint, as JSON."""
        return {name: getattr(self, name) for name in ("in_a_row", "num_rollbacks", "losses", "norms", "segment")}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; from nothing where a checkpoint has none."""
        self.in_a_row = int(state.get("in_a_row", 0))
        self.num_rollbacks = int(state.get("num_rollbacks", 0))
        self.losses = [float(value) for value in state.get("losses", ())][-self.policy.window :]
        self.norms = [float(value) for value in state.get("norms", ())][-self.policy.window :]
        self.segment = int(state.get("segment", 0))


def spike_limit(values: Sequence[float], threshold: float) -> float:
    """The median of `values` and `threshold` standard deviations, estimated from the median absolute deviation."""
    middle = median(values)
    spread = _SIGMA_OF_MAD * median(abs(value - middle) for value in values)
    return middle + threshold * max(spread, _LEAST_SPREAD * abs(middle))


@dataclass(frozen=True)
class SkippedBatches:
    """The windows [first, end) of global batches that rollbacks left out, ascending: step -> batch, as a function."""

    windows: tuple[tuple[int, int], ...] = ()

    def batch_index(self, step: int) -> int:
        """The global batch of the step after `step` finished ones."""
        index = step
        for first, end in self.windows:
            if index >= first:
                index += end - first
        return index

    def without(self, first: int, end: int) -> SkippedBatches:
        """With another window left out, which begins after all others."""
        return SkippedBatches((*self.windows, (first, end)))

    @property
    def num_batches(self) -> int:
        """Batches left out."""
        return sum(end - first for first, end in self.windows)
