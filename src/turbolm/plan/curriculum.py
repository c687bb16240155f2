"""What each step trains on, by the recipe's schedules: sequence length, batch size and source mixture. Torch-free.

A change takes effect at the first step that begins at or after its point in the token budget, so every boundary is on a
step. Shares of the budget refer to the run's first budget: an extended run continues with the final values. A fork with
its own data (`data.starts_at`) has the curriculum of a new run of what is left of its budget, from that step on.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TypeVar

from turbolm.errors import UserError
from turbolm.recipe.lengths import Changes
from turbolm.recipe.schema import Recipe
from turbolm.units import Span

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Segment:
    """Steps from `first_step` on that share their settings.

    `seq_lens` are the sequence lengths, ascending: one, or all buckets, of which each step uses one. `weights` are the
    sources' shares of the tokens, or None where all documents form one pool. With `grow`, each segment is a cycle over
    the buckets that begins with short sequences.
    """

    first_step: int
    first_token: int
    seq_lens: tuple[int, ...]
    global_batch_tokens: int
    weights: tuple[float, ...] | None = None
    grow: bool = False
    cycle: int = 0

    @property
    def seq_len(self) -> int:
        """Return the longest sequence length."""
        return self.seq_lens[-1]


@dataclass(frozen=True)
class Curriculum:
    """The segments of a run, in order; the last one is open-ended. `budgets_tokens`: the first budget, extensions."""

    segments: tuple[Segment, ...]
    budgets_tokens: tuple[int, ...]

    @cached_property
    def num_steps(self) -> int:
        """Return the steps of the run: the smallest number whose tokens reach the last budget."""
        return self.steps_for(self.budgets_tokens[-1])

    @property
    def first_step(self) -> int:
        """Return the steps that are trained on other data before, by the run that this one was forked from; or 0."""
        return self.segments[0].first_step

    @property
    def own_tokens(self) -> int:
        """Return the tokens of the run without those of `first_step` steps."""
        return self.tokens_seen(self.num_steps) - self.segments[0].first_token

    @property
    def seq_lens(self) -> tuple[int, ...]:
        """Return all sequence lengths, ascending."""
        return tuple(sorted({seq_len for segment in self.segments for seq_len in segment.seq_lens}))

    def segment(self, step: int) -> Segment:
        """Return the segment of the step after `step` finished steps."""
        return self.segments[max(bisect_right(self._first_steps, step) - 1, 0)]

    def tokens_seen(self, step: int) -> int:
        """Return the tokens (sequences x seq_len) of the first `step` steps."""
        segment = self.segment(step)
        return segment.first_token + (step - segment.first_step) * segment.global_batch_tokens

    def steps_for(self, tokens: int) -> int:
        """Return the fewest steps that see this many tokens."""
        index = max(bisect_right([segment.first_token for segment in self.segments], tokens - 1) - 1, 0)
        segment = self.segments[index]
        return segment.first_step + _ceil(tokens - segment.first_token, segment.global_batch_tokens)

    @property
    def whole_budgets_tokens(self) -> list[int]:
        """Return each budget rounded up to the end of its last step."""
        return [self.tokens_seen(self.steps_for(budget)) for budget in self.budgets_tokens]

    def source_tokens(self) -> list[float] | None:
        """Return the tokens of the run by source, or None if all documents form one pool."""
        if self.segments[0].weights is None:
            return None
        ends = [*(segment.first_token for segment in self.segments[1:]), self.tokens_seen(self.num_steps)]
        totals = [0.0] * len(self.segments[0].weights)
        for segment, end in zip(self.segments, ends, strict=True):
            for source, weight in enumerate(segment.weights or ()):
                totals[source] += weight * (end - segment.first_token)
        return totals

    @property
    def segments_of_order(self) -> tuple[Segment, ...]:
        """Return the segments as the order of the data counts them: its first batch is number 0."""
        first = self.segments[0]
        return tuple(_moved(segment, -first.first_step, -first.first_token) for segment in self.segments)

    @cached_property
    def _first_steps(self) -> list[int]:
        return [segment.first_step for segment in self.segments]


def build_curriculum(recipe: Recipe, budgets_tokens: Sequence[int] | None = None) -> Curriculum:
    """Build the curriculum of a recipe; `recipe.checks` ensures that its batches and lengths fit each other.

    `budgets_tokens` are the budgets of a run; by default the recipe's only.
    """
    budgets, start = tuple(budgets_tokens or [recipe.train.budget]), recipe.data.starts_at
    if start is None:
        return Curriculum(tuple(_build_segments(recipe, budgets)), budgets)
    own = _build_segments(recipe, [budget - start.tokens for budget in budgets])
    return Curriculum(tuple(_moved(segment, start.step, start.tokens) for segment in own), budgets)


def _build_segments(recipe: Recipe, budgets: Sequence[int]) -> list[Segment]:
    """Return the segments of a run that begins at step 0."""
    budget, full_batch = budgets[0], recipe.train.global_batch
    schedule, seq_len = recipe.data.length_schedule, recipe.data.seq_len
    batches, weights = batch_changes(recipe, budget), _weight_changes(recipe, budget)
    lengths: Changes = [(0.0, (seq_len,))]
    num_cycles = 0
    if schedule is not None:
        divided = math.gcd(*(tokens for _, tokens in batches))
        lengths = schedule.changes(seq_len, budget, full_batch, divided)
        num_cycles = schedule.num_cycles
    cycles = [(budget * number / num_cycles, number) for number in range(num_cycles)] or [(0.0, 0)]

    def segment_at(step: int, token: int, at: float, batch: int, cycle: int) -> Segment:
        return Segment(step, token, _value_at(lengths, at), batch, _value_at(weights, at), num_cycles > 0, cycle)

    starts = sorted(
        {start for changes in (lengths, batches, weights, cycles) for start, _ in changes if start < budget}
    )
    segments: list[Segment] = []
    step = token = 0
    for start, after in pairwise([*starts, budget]):
        # The step that crosses the change still has the settings before it.
        if after <= token:
            continue
        at = max(start, token)
        batch = _value_at(batches, at)
        segment = segment_at(step, token, at, batch, _value_at(cycles, at))
        if not segments or _settings(segments[-1]) != _settings(segment):
            segments.append(segment)
        num_steps = _ceil(after - token, batch)
        step, token = step + num_steps, token + num_steps * batch
    if len(budgets) > 1:  # an extension continues with the final values of the schedules
        final = segment_at(step, token, math.inf, full_batch, num_cycles)
        if _settings(final) != _settings(segments[-1]):
            segments.append(final)
    return segments


def _moved(segment: Segment, steps: int, tokens: int) -> Segment:
    return replace(segment, first_step=segment.first_step + steps, first_token=segment.first_token + tokens)


def batch_changes(recipe: Recipe, budget_tokens: int) -> list[tuple[float, int]]:
    """Return (tokens, global batch in tokens from there on), the first at 0."""
    ramp, full = recipe.train.batch_ramp, recipe.train.global_batch
    if ramp is None:
        return [(0.0, full)]
    if ramp.at:
        return [(span.tokens(budget_tokens, full), batch) for span, batch in ramp.at]
    assert ramp.start is not None
    over = ramp.over.tokens(budget_tokens, full)
    return [(over * index / (ramp.num_levels - 1), batch) for index, batch in enumerate(ramp_levels(recipe))]


def ramp_levels(recipe: Recipe) -> list[int]:
    """Return the `num_levels` batches of a linear ramp, each rounded to full sequences of the longest length."""
    ramp, full = recipe.train.batch_ramp, recipe.train.global_batch
    assert ramp is not None
    assert ramp.start is not None
    unit = recipe.data.seq_len
    steps = ramp.num_levels - 1
    levels = [round((ramp.start + (full - ramp.start) * index / steps) / unit) * unit for index in range(steps)]
    return [max(level, unit) for level in levels] + [full]


def _weight_changes(recipe: Recipe, budget_tokens: int) -> list[tuple[float, tuple[float, ...] | None]]:
    """Return (tokens, shares of the sources from there on), the first at 0; a single None if no source has a weight."""
    staged = [source.weight for source in recipe.data.sources]
    if any(weights is None for weights in staged):
        return [(0.0, None)]

    def tokens_at(span: Span) -> float:
        return span.tokens(budget_tokens, recipe.train.global_batch)

    by_source = [[(tokens_at(span), weight) for span, weight in weights or ()] for weights in staged]
    changes: list[tuple[float, tuple[float, ...] | None]] = []
    for at in sorted({at for changes_of_one in by_source for at, _ in changes_of_one}):
        values = [_value_at(changes_of_one, at) for changes_of_one in by_source]
        if not sum(values):
            raise UserError(f"data.sources: every weight is 0 from {at:.0f} tokens on; give one of them more")
        changes.append((at, tuple(value / sum(values) for value in values)))
    return changes


def _value_at(changes: Sequence[tuple[float, _Value]], tokens: float) -> _Value:
    """Return the value at `tokens`; changes are in ascending order from 0."""
    return changes[bisect_right(changes, tokens, key=lambda change: change[0]) - 1][1]


def _settings(segment: Segment) -> tuple[object, ...]:
    return segment.seq_lens, segment.global_batch_tokens, segment.weights, segment.grow, segment.cycle


def _ceil(count: int | float, parts: int) -> int:
    return max(math.ceil(count / parts), 0)
