"""What each step trains on, as the recipe schedules it: row length, batch size and the mixture of sources. Torch-free.

A change takes effect at the first step that begins at or after its place in the token budget, so every boundary lies
on a step. Shares of the budget refer to the run's first budget: a run that is extended goes on with what it ended with.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TypeVar

from turbolm.errors import UserError
from turbolm.recipe.data import LengthBuckets, LengthGrowth, LengthStages
from turbolm.recipe.schema import Recipe
from turbolm.units import Span

_Value = TypeVar("_Value")
_LENGTH_MULTIPLE = 8  # derived row lengths are multiples of it: tensor cores and vector units like them


@dataclass(frozen=True)
class Segment:
    """Steps from `first_step` on that share their settings.

    `seq_lens` are the row lengths, ascending: one, or every bucket, of which each step uses one. `weights` are the
    sources' shares of the tokens, or None where all documents form one pool. With `grow`, each segment is a cycle over
    the buckets that begins with short rows.
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
        """The longest row."""
        return self.seq_lens[-1]


@dataclass(frozen=True)
class Curriculum:
    """The segments of a run, in order; the last one is open-ended. `budgets_tokens`: the first budget, extensions."""

    segments: tuple[Segment, ...]
    budgets_tokens: tuple[int, ...]

    @cached_property
    def num_steps(self) -> int:
        """Steps of the whole run: the first number whose tokens reach the last budget."""
        return self.steps_for(self.budgets_tokens[-1])

    @property
    def seq_lens(self) -> tuple[int, ...]:
        """Every row length there is, ascending."""
        return tuple(sorted({seq_len for segment in self.segments for seq_len in segment.seq_lens}))

    def segment(self, step: int) -> Segment:
        """What the step after `step` finished ones trains with."""
        return self.segments[bisect_right(self._first_steps, step) - 1]

    def tokens_seen(self, step: int) -> int:
        """Tokens (bins x seq_len) of the first `step` steps."""
        segment = self.segment(step)
        return segment.first_token + (step - segment.first_step) * segment.global_batch_tokens

    def steps_for(self, tokens: int) -> int:
        """The fewest steps that see so many tokens."""
        index = max(bisect_right([segment.first_token for segment in self.segments], tokens - 1) - 1, 0)
        segment = self.segments[index]
        return segment.first_step + _ceil(tokens - segment.first_token, segment.global_batch_tokens)

    @property
    def whole_budgets_tokens(self) -> list[int]:
        """Each budget as it is trained: to the end of its last step."""
        return [self.tokens_seen(self.steps_for(budget)) for budget in self.budgets_tokens]

    def source_tokens(self) -> list[float] | None:
        """Tokens of the whole run by source, or None where all documents form one pool."""
        if self.segments[0].weights is None:
            return None
        ends = [*(segment.first_token for segment in self.segments[1:]), self.tokens_seen(self.num_steps)]
        totals = [0.0] * len(self.segments[0].weights)
        for segment, end in zip(self.segments, ends, strict=True):
            for source, weight in enumerate(segment.weights or ()):
                totals[source] += weight * (end - segment.first_token)
        return totals

    @cached_property
    def _first_steps(self) -> list[int]:
        return [segment.first_step for segment in self.segments]


def build_curriculum(recipe: Recipe, budgets_tokens: Sequence[int] | None = None) -> Curriculum:
    """The curriculum of a recipe whose batches and lengths fit each other (`recipe.checks` has seen to it).

    `budgets_tokens` are those of a run, the recipe's alone by default.
    """
    budgets = tuple(budgets_tokens or [recipe.train.budget])
    budget, full_batch = budgets[0], recipe.train.global_batch
    lengths = length_changes(recipe, budget)
    batches = batch_changes(recipe, budget)
    weights, cycles = _weight_changes(recipe, budget), _cycles(recipe, budget)
    places = sorted(
        {place for changes in (lengths, batches, weights, cycles) for place, _ in changes if place < budget}
    )
    segments: list[Segment] = []
    step = token = 0
    for place, after in pairwise([*places, budget]):
        # The step that crosses the place still belongs to what came before it.
        if after <= token:
            continue
        at = max(place, token)
        batch = _value_at(batches, at)
        settings = _value_at(lengths, at), batch, _value_at(weights, at), _value_at(cycles, at)
        segment = _segment(recipe, step, token, *settings)
        if not segments or _settings(segments[-1]) != _settings(segment):
            segments.append(segment)
        num_steps = _ceil(after - token, batch)
        step, token = step + num_steps, token + num_steps * batch
    if len(budgets) > 1:  # an extension goes on with what the schedules lead to
        settings = _value_at(lengths, math.inf), full_batch, _value_at(weights, math.inf), len(cycles)
        final = _segment(recipe, step, token, *settings)
        if _settings(final) != _settings(segments[-1]):
            segments.append(final)
    return Curriculum(tuple(segments), budgets)


def _segment(
    recipe: Recipe,
    step: int,
    token: int,
    seq_len: int,
    batch_tokens: int,
    weights: tuple[float, ...] | None,
    cycle: int,
) -> Segment:
    schedule = recipe.data.length_schedule
    if isinstance(schedule, LengthBuckets):
        grow = schedule.order == "grow"
        return Segment(step, token, bucket_lengths(recipe), batch_tokens, weights, grow, cycle if grow else 0)
    return Segment(step, token, (seq_len,), batch_tokens, weights)


def bucket_lengths(recipe: Recipe) -> tuple[int, ...]:
    """The powers of two from the smallest bucket up to data.seq_len."""
    schedule = recipe.data.length_schedule
    assert isinstance(schedule, LengthBuckets)
    lengths = [schedule.smallest]
    while lengths[-1] < recipe.data.seq_len:
        lengths.append(lengths[-1] * 2)
    return tuple(lengths)


def length_changes(recipe: Recipe, budget_tokens: int) -> list[tuple[float, int]]:
    """(tokens, row length from there on), the first at 0."""
    schedule, seq_len, batch = recipe.data.length_schedule, recipe.data.seq_len, recipe.train.global_batch
    if isinstance(schedule, LengthStages):
        return [(span.tokens(budget_tokens, batch), length) for span, length in schedule.at]
    if not isinstance(schedule, LengthGrowth):
        return [(0.0, seq_len)]
    divided = math.gcd(*(tokens for _, tokens in batch_changes(recipe, budget_tokens)))
    lengths = growth_lengths(schedule, seq_len, divided)
    over = schedule.over.tokens(budget_tokens, batch)
    changes = [(over * _progress(schedule, length, seq_len), length) for length in lengths]
    if not schedule.remix or len(lengths) < 2:
        return changes
    # Short rows again at the end of each period, so that what they taught is not lost; never at the end of the run.
    period = schedule.remix_every.tokens(budget_tokens, batch)
    num_periods = int((budget_tokens - over) / period) if period else 0
    for number in range(num_periods):
        begin = over + (number + 1) * period
        short = lengths[-2 - number % (len(lengths) - 1)]
        if begin < budget_tokens:
            changes += [(begin - schedule.remix * period, short), (begin, seq_len)]
    return changes


def growth_lengths(schedule: LengthGrowth, seq_len: int, batch_tokens: int) -> list[int]:
    """The row lengths that growth goes through, ascending: they divide the batch and are spread in even ratios."""
    divisors = [n for n in range(_LENGTH_MULTIPLE, seq_len, _LENGTH_MULTIPLE) if batch_tokens % n == 0]
    between = [n for n in divisors if schedule.start < n]
    count = max(schedule.num_lengths - 2, 0)
    ratio = seq_len / schedule.start
    wanted = [schedule.start * ratio ** ((index + 1) / (count + 1)) for index in range(count)]
    chosen = {min(between, key=lambda n: abs(math.log(n / target))) for target in wanted} if between else set()
    return sorted({schedule.start, seq_len, *chosen})


def batch_changes(recipe: Recipe, budget_tokens: int) -> list[tuple[float, int]]:
    """(tokens, global batch in tokens from there on), the first at 0."""
    ramp, full = recipe.train.batch_ramp, recipe.train.global_batch
    if ramp is None:
        return [(0.0, full)]
    if ramp.at:
        return [(span.tokens(budget_tokens, full), batch) for span, batch in ramp.at]
    assert ramp.start is not None
    over = ramp.over.tokens(budget_tokens, full)
    return [(over * index / (ramp.num_levels - 1), batch) for index, batch in enumerate(ramp_levels(recipe))]


def ramp_levels(recipe: Recipe) -> list[int]:
    """The batches of a linear ramp: `num_levels` of them, each rounded to whole rows of the longest length."""
    ramp, full = recipe.train.batch_ramp, recipe.train.global_batch
    assert ramp is not None
    assert ramp.start is not None
    unit = recipe.data.seq_len
    steps = ramp.num_levels - 1
    levels = [round((ramp.start + (full - ramp.start) * index / steps) / unit) * unit for index in range(steps)]
    return [max(level, unit) for level in levels] + [full]


def _progress(schedule: LengthGrowth, length: int, seq_len: int) -> float:
    """How far growth has come, from 0 to 1, when the curve reaches `length`."""
    if length == schedule.start:
        return 0.0
    if schedule.shape == "linear":
        return (length - schedule.start) / (seq_len - schedule.start)
    return math.log(length / schedule.start) / math.log(seq_len / schedule.start)


def _weight_changes(recipe: Recipe, budget_tokens: int) -> list[tuple[float, tuple[float, ...] | None]]:
    """(tokens, shares of the sources from there on), the first at 0; one None where no source has a weight."""
    staged = [source.weight for source in recipe.data.sources]
    if any(weights is None for weights in staged):
        return [(0.0, None)]

    def place(span: Span) -> float:
        return span.tokens(budget_tokens, recipe.train.global_batch)

    by_source = [[(place(span), weight) for span, weight in weights or ()] for weights in staged]
    changes: list[tuple[float, tuple[float, ...] | None]] = []
    for at in sorted({at for changes_of_one in by_source for at, _ in changes_of_one}):
        values = [_value_at(changes_of_one, at) for changes_of_one in by_source]
        if not sum(values):
            raise UserError(f"data.sources: every weight is 0 from {at:.0f} tokens on; give one of them more")
        changes.append((at, tuple(value / sum(values) for value in values)))
    return changes


def _cycles(recipe: Recipe, budget_tokens: int) -> list[tuple[float, int]]:
    """(tokens, number of the cycle over the buckets from there on), the first at 0."""
    schedule = recipe.data.length_schedule
    count = schedule.cycles if isinstance(schedule, LengthBuckets) and schedule.order == "grow" else 1
    return [(budget_tokens * number / count, number) for number in range(count)]


def _value_at(changes: Sequence[tuple[float, _Value]], tokens: float) -> _Value:
    """What holds at `tokens`; the places ascend from 0."""
    return changes[bisect_right(changes, tokens, key=lambda change: change[0]) - 1][1]


def _settings(segment: Segment) -> tuple[object, ...]:
    return segment.seq_lens, segment.global_batch_tokens, segment.weights, segment.grow, segment.cycle


def _ceil(count: int | float, parts: int) -> int:
    return max(math.ceil(count / parts), 0)
