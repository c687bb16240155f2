"""The `schedule` section: one class per learning-rate schedule, with its settings and its curve. Torch-free.

To add one, write its class here and add it to SCHEDULES. A curve is a pure function of the tokens seen, so a resumed
run, a run on another world size and the preview of `turbolm plan --verbose` are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from turbolm.recipe.fields import Before, Beta, Number, Section, TrainingSpan, by_tag, positive_span, tagged_union
from turbolm.units import Span

FORMERLY_IN_ALL: dict[str, Any] = {"decay": "20%", "decay_shape": "linear", "cycle": "25%", "cycle_growth": 1}
"""Settings that every schedule once had, used or not. Fingerprints still include them, with these defaults for settings
that a schedule does not have, so that old fingerprints stay valid."""

_NAME = "which curve the learning rate follows after the warmup"


class Ramp(Section):
    """A value that changes from `start` to `end` and stays there."""

    start: Annotated[Number, Field(ge=0)] = Field(description="at the start of the run")
    end: Annotated[Number, Field(ge=0)] = Field(description="at the end of `over`, and from there on")
    over: Annotated[TrainingSpan, AfterValidator(positive_span)] = Field(
        Span(1.0, "share"), description="duration in tokens, steps or a share of the budget"
    )
    shape: Literal["linear", "cosine"] = Field("linear", description="cosine: slow at both ends")

    def value(self, tokens: float, budget_tokens: int, batch_tokens: int) -> float:
        """Return the value after `tokens` tokens; `budget_tokens` is the run's first budget, even if it was
        extended."""
        progress = min(tokens / self.over.tokens(budget_tokens, batch_tokens), 1.0)
        if self.shape == "cosine":
            progress = 1 - _SHAPES["cosine"](progress)
        return float(self.start + (self.end - self.start) * progress)


class MomentumRamp(Ramp):
    """A momentum that changes from `start` to `end` and stays there."""

    start: Beta = Field(description="at the start of the run")
    end: Beta = Field(description="at the end of `over`, and from there on")


class Schedule(Section):
    """Base of every schedule: warmup, floor, and optional curves of weight decay and momentum."""

    name: str
    warmup: TrainingSpan = Field(Span(0.02, "share"), description="linear rise from 0 to the peak")
    min_lr_ratio: Annotated[Number, Field(ge=0, le=1)] = Field(0.1, description="final value, as a share of the peak")
    weight_decay: Ramp | None = Field(None, description="factor on optimizer.weight_decay; none: 1 throughout")
    momentum: MomentumRamp | None = Field(
        None,
        description="replaces optimizer.momentum, or the first of optimizer.betas where there is no momentum; none: "
        "constant",
    )
    on_extend: Literal["rewarm", "stretch", "refuse"] = Field(
        "rewarm",
        description="when a finished run gets a larger budget: warm up again and run the same shape over the added "
        "tokens; follow the larger budget's curve from here; or refuse",
    )

    def ratio(self, tokens: float, warmup: float, length: float, batch: int) -> float:
        """Return the learning rate after `tokens` of `length` tokens, as a ratio of its peak.

        `tokens` is more than `warmup`, the tokens of the warmup; `batch` is the tokens of a step.
        """
        raise NotImplementedError

    def plateau(self, budget: int, batch: int) -> tuple[float, float] | None:
        """Return the token range in which the learning rate stays at its peak, or None."""
        return None

    @property
    def own_decays(self) -> tuple[str, ...]:
        """Return the kinds of parameters whose learning rate decays over a time of its own."""
        return ()

    def of_kind(self, kind: str) -> Schedule:
        """Return the schedule of a kind of parameters."""
        return self

    def _fall(self, shape: str, tokens: float, start: float, end: float) -> float:
        """Return the ratio between the peak at `start` and the floor at `end`."""
        progress = min((tokens - start) / max(end - start, 1), 1.0)
        return float(self.min_lr_ratio + (1 - self.min_lr_ratio) * _SHAPES[shape](progress))


class Constant(Schedule):
    """Constant at the peak."""

    name: Literal["constant"] = Field(description=_NAME)

    def ratio(self, tokens: float, warmup: float, length: float, batch: int) -> float:
        return 1.0

    def plateau(self, budget: int, batch: int) -> tuple[float, float] | None:
        return self.warmup.tokens(budget, batch), budget


class Linear(Schedule):
    """A linear decay over the budget."""

    name: Literal["linear"] = Field(description=_NAME)

    def ratio(self, tokens: float, warmup: float, length: float, batch: int) -> float:
        return self._fall("linear", tokens, warmup, length)


class Cosine(Schedule):
    """Half a cosine over the budget (arXiv 1608.03983)."""

    name: Literal["cosine"] = Field("cosine", description=_NAME)

    def ratio(self, tokens: float, warmup: float, length: float, batch: int) -> float:
        return self._fall("cosine", tokens, warmup, length)


class Sqrt(Schedule):
    """1 - sqrt of the finished share of the budget (arXiv 2405.18392)."""

    name: Literal["sqrt"] = Field(description=_NAME)

    def ratio(self, tokens: float, warmup: float, length: float, batch: int) -> float:
        return self._fall("sqrt", tokens, warmup, length)


class InverseSqrt(Schedule):
    """Decays with the inverse square root of the tokens (arXiv 1706.03762, section 5.3), counted in warmups or, without
    a warmup, in steps."""

    name: Literal["inverse_sqrt"] = Field(description=_NAME)

    def ratio(self, tokens: float, warmup: float, length: float, batch: int) -> float:
        return max(self.min_lr_ratio, math.sqrt(max(warmup, batch) / max(tokens, batch)))


class Decays(Section):
    """The decay at the end of the budget, by kind of parameter."""

    embeddings: TrainingSpan | None = Field(None, description="instead of schedule.decay")
    head: TrainingSpan | None = Field(None, description="instead of schedule.decay")
    matrices: TrainingSpan | None = Field(None, description="instead of schedule.decay; convolutions too")
    vectors: TrainingSpan | None = Field(None, description="instead of schedule.decay")


class Wsd(Schedule):
    """Warmup, stable, decay (arXiv 2404.06395)."""

    name: Literal["wsd"] = Field(description=_NAME)
    decay: TrainingSpan = Field(Span(0.2, "share"), description="the decay, at the end of the budget")
    decay_shape: Literal["linear", "cosine", "sqrt"] = Field("linear", description="shape of the decay")
    decays: Annotated[Decays, Before(Decays())] = Field(
        Decays(), description="decays of other lengths for kinds of parameters, such as {matrices: 80%}"
    )

    @property
    def own_decays(self) -> tuple[str, ...]:
        return tuple(kind for kind, decay in self.decays if decay is not None)

    def of_kind(self, kind: str) -> Schedule:
        own = getattr(self.decays, kind, None)
        return self if own is None else self.model_copy(update={"decay": own})

    def ratio(self, tokens: float, warmup: float, length: float, batch: int) -> float:
        start = max(warmup, length - self.decay.tokens(length, batch))
        return 1.0 if tokens <= start else self._fall(self.decay_shape, tokens, start, length)

    def plateau(self, budget: int, batch: int) -> tuple[float, float] | None:
        decays = [self.decay, *(decay for _, decay in self.decays if decay is not None)]
        return self.warmup.tokens(budget, batch), budget - max(decay.tokens(budget, batch) for decay in decays)


class WarmRestarts(Schedule):
    """Cosine with warm restarts (arXiv 1608.03983)."""

    name: Literal["warm_restarts"] = Field(description=_NAME)
    cycle: Annotated[TrainingSpan, AfterValidator(positive_span)] = Field(
        Span(0.25, "share"), description="length of the first cosine after the warmup"
    )
    cycle_growth: Annotated[Number, Field(ge=1, le=100)] = Field(
        1.0, description="each cosine is this much longer than the one before"
    )

    def ratio(self, tokens: float, warmup: float, length: float, batch: int) -> float:
        done, first, growth = tokens - warmup, self.cycle.tokens(length, batch), self.cycle_growth
        if growth > 1:  # cycles done: the sum of a geometric series
            number = math.ceil(math.log(1 + done / first * (growth - 1), growth)) - 1
            start = first * (growth**number - 1) / (growth - 1)
        else:
            number = math.ceil(done / first) - 1
            start = first * number
        progress = min((done - start) / (first * growth**number), 1.0)
        return float(self.min_lr_ratio + (1 - self.min_lr_ratio) * _SHAPES["cosine"](progress))


# Each decays from 1 at progress 0 to 0 at progress 1.
_SHAPES = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "sqrt": lambda progress: 1 - math.sqrt(progress),  # "1-sqrt" of arXiv 2405.18392
}
SCHEDULES = by_tag(Constant, Linear, Cosine, Sqrt, InverseSqrt, Wsd, WarmRestarts)


def _as_resolved_before(value: Any) -> Any:
    """Resolved recipes used to spell out the settings of all schedules: keep those that apply."""
    if not isinstance(value, dict) or not FORMERLY_IN_ALL.keys() <= value.keys():
        return value
    own = SCHEDULES.get(str(value.get("name")), Schedule).model_fields
    return {name: setting for name, setting in value.items() if name in own or name not in FORMERLY_IN_ALL}


if TYPE_CHECKING:
    AnySchedule = Schedule
else:
    AnySchedule = Annotated[tagged_union(SCHEDULES, default="cosine"), BeforeValidator(_as_resolved_before)]


def lr_ratio(schedule: Schedule, tokens: float, budgets_tokens: Sequence[int], batch_tokens: int) -> float:
    """Return the learning rate after `tokens` tokens, as a ratio of the recipe's peak.

    `budgets_tokens` holds the run's token budget and, for a finished run that was extended, each larger budget after
    it. With `on_extend: rewarm` every extension warms up from the final value of the previous budget and runs the same
    shape over the added tokens. With `on_extend: stretch` the curve of the larger budget, computed from the start of
    the run, applies from the extension on. Either way the values up to the earlier budget do not change.
    """
    reached = next((i for i, budget in enumerate(budgets_tokens) if tokens <= budget), len(budgets_tokens) - 1)
    if schedule.on_extend == "stretch":
        return _run_ratio(schedule, tokens, budgets_tokens[reached], batch_tokens, start_ratio=0.0)
    starts_tokens = [0, *budgets_tokens[:reached]]
    start_ratio = 0.0
    for start, end in pairwise(starts_tokens):
        start_ratio = _run_ratio(schedule, end - start, end - start, batch_tokens, start_ratio)
    start = starts_tokens[-1]
    return _run_ratio(schedule, tokens - start, budgets_tokens[reached] - start, batch_tokens, start_ratio)


def _run_ratio(schedule: Schedule, tokens: float, length_tokens: int, batch_tokens: int, start_ratio: float) -> float:
    """Return one warmup from `start_ratio`, then the schedule's curve, over `length_tokens`."""
    warmup_tokens = min(schedule.warmup.tokens(length_tokens, batch_tokens), length_tokens)
    if tokens < warmup_tokens:
        return float(start_ratio + (1 - start_ratio) * tokens / warmup_tokens)
    if tokens == warmup_tokens:
        return 1.0
    return schedule.ratio(tokens, warmup_tokens, length_tokens, batch_tokens)
