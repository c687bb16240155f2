"""`data.length_schedule`: one class per schedule of the sequence length, with its settings and lengths. Torch-free.

To add one, write its class here and add it to LENGTH_SCHEDULES.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from turbolm.recipe.fields import (
    Positive,
    Section,
    Share,
    StagedTokens,
    TrainingSpan,
    by_tag,
    positive_span,
    tagged_union,
)
from turbolm.units import Span

Changes = list[tuple[float, tuple[int, ...]]]
"""(tokens, sequence lengths from there on, ascending), the first at 0: one length, or every bucket."""

_NAME = "which schedule this is"
_LENGTH_MULTIPLE = 8  # derived lengths are multiples of it: tensor cores and vector units like them


class LengthSchedule(Section):
    """Base of every length schedule."""

    length_key: ClassVar[str]  # the setting that names the lengths

    name: str

    @property
    def named_lengths(self) -> list[int]:
        """Return the lengths that the recipe names, besides data.seq_len."""
        raise NotImplementedError

    @property
    def num_cycles(self) -> int:
        """Return how many times the budget cycles through the lengths, short ones first; 0 if it does not."""
        return 0

    def find_problems(self, seq_len: int, packing: str | None) -> Iterator[tuple[str, str]]:
        """Yield (key, message) for what does not fit data.seq_len or data.packing."""
        if self.named_lengths[0] >= seq_len:
            key = f"data.length_schedule.{self.length_key}"
            yield key, f"must be less than data.seq_len ({seq_len}), got {self.named_lengths[0]}"

    def changes(self, seq_len: int, budget: int, batch: int, divided: int) -> Changes:
        """Return the lengths over a budget, in batches of `batch` tokens; each length divides `divided`."""
        raise NotImplementedError


class LengthStages(LengthSchedule):
    """Sequence lengths set by hand."""

    length_key = "at"

    name: Literal["stages"] = Field(description=_NAME)
    at: StagedTokens = Field(description="sequence length from each point on, such as {0%: 128, 30%: 512, 60%: 2048}")

    @property
    def named_lengths(self) -> list[int]:
        return [length for _, length in self.at]

    def find_problems(self, seq_len: int, packing: str | None) -> Iterator[tuple[str, str]]:
        longest = max(self.named_lengths)
        if longest != seq_len:
            message = f"must reach data.seq_len ({seq_len}) and no more, got {longest} as its longest"
            yield "data.length_schedule.at", message

    def changes(self, seq_len: int, budget: int, batch: int, divided: int) -> Changes:
        return [(span.tokens(budget, batch), (length,)) for span, length in self.at]


class LengthGrowth(LengthSchedule):
    """Sequences grow from `start` to data.seq_len; batches keep their number of tokens (arXiv 2108.06084)."""

    length_key = "start"

    name: Literal["growth"] = Field(description=_NAME)
    start: Annotated[Positive, Field(ge=8)] = Field(128, description="the first sequence length")
    over: Annotated[TrainingSpan, AfterValidator(positive_span)] = Field(
        Span(0.5, "share"), description="where data.seq_len is reached"
    )
    shape: Literal["linear", "exponential"] = Field(
        "exponential", description="linear: short sequences end early; exponential: equal time at each length"
    )
    num_lengths: Annotated[int, Field(ge=2, le=100)] = Field(5, description="number of lengths, at most")
    remix: Annotated[Share, Field(lt=1)] = Field(
        0.0, description="share of the tokens after the growth that use shorter lengths again, periodically"
    )
    remix_every: Annotated[TrainingSpan, AfterValidator(positive_span)] = Field(
        Span(0.05, "share"), description="how often short sequences come back, with `remix`"
    )

    @property
    def named_lengths(self) -> list[int]:
        return [self.start]

    def changes(self, seq_len: int, budget: int, batch: int, divided: int) -> Changes:
        lengths = self._lengths(seq_len, divided)
        over = self.over.tokens(budget, batch)
        changes: Changes = [(over * self._progress(length, seq_len), (length,)) for length in lengths]
        if not self.remix or len(lengths) < 2:
            return changes
        # Short sequences again at the end of each period, to retain what they taught; never at the end of the run.
        period = self.remix_every.tokens(budget, batch)
        for number in range(int((budget - over) / period)):
            begin = over + (number + 1) * period
            short = lengths[-2 - number % (len(lengths) - 1)]
            if begin < budget:
                changes += [(begin - self.remix * period, (short,)), (begin, (seq_len,))]
        return changes

    def _lengths(self, seq_len: int, divided: int) -> list[int]:
        """Return the lengths of the growth, ascending, in even ratios."""
        between = [n for n in range(_LENGTH_MULTIPLE, seq_len, _LENGTH_MULTIPLE) if divided % n == 0 and self.start < n]
        count, ratio = self.num_lengths - 2, seq_len / self.start
        wanted = [self.start * ratio ** ((index + 1) / (count + 1)) for index in range(count)]
        chosen = {min(between, key=lambda n: abs(math.log(n / target))) for target in wanted} if between else set()
        return sorted({self.start, seq_len, *chosen})

    def _progress(self, length: int, seq_len: int) -> float:
        """Return the progress of the growth, from 0 to 1, when the curve reaches `length`."""
        if self.shape == "linear":
            return (length - self.start) / (seq_len - self.start)
        return math.log(length / self.start) / math.log(seq_len / self.start)


class LengthBuckets(LengthSchedule):
    """Documents split into powers of two, each trained at its own length, without packing (arXiv 2405.13226)."""

    length_key = "smallest"

    name: Literal["buckets"] = Field(description=_NAME)
    smallest: Annotated[Positive, Field(ge=8)] = Field(64, description="shorter slices are packed into sequences of it")
    order: Literal["grow", "shuffled"] = Field(
        "grow", description="grow: each cycle over the lengths begins with mostly short sequences; shuffled: no order"
    )
    cycles: Annotated[int, Field(ge=1, le=1000)] = Field(
        8, description="cycles over the lengths in the budget, with `grow`"
    )

    @property
    def named_lengths(self) -> list[int]:
        return [self.smallest]

    @property
    def num_cycles(self) -> int:
        return self.cycles if self.order == "grow" else 0

    def find_problems(self, seq_len: int, packing: str | None) -> Iterator[tuple[str, str]]:
        problems = list(super().find_problems(seq_len, packing))
        if not problems and (seq_len % self.smallest or (seq_len // self.smallest).bit_count() != 1):
            message = f"must be data.seq_len ({seq_len}) divided by a power of two, got {self.smallest}"
            problems.append(("data.length_schedule.smallest", message))
        if packing not in (None, "best_fit"):
            problems.append(("data.packing", f"must be best_fit with buckets, got {packing}"))
        yield from problems

    def changes(self, seq_len: int, budget: int, batch: int, divided: int) -> Changes:
        lengths = [self.smallest]
        while lengths[-1] < seq_len:
            lengths.append(lengths[-1] * 2)
        return [(0.0, tuple(lengths))]


LENGTH_SCHEDULES = by_tag(LengthStages, LengthGrowth, LengthBuckets)
if TYPE_CHECKING:
    AnyLengthSchedule = LengthSchedule
else:
    AnyLengthSchedule = tagged_union(LENGTH_SCHEDULES)
