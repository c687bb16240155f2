"""Read the documents of a recipe's sources, one after the other and in an order that never changes.

A document that is not what its source says is refused, or left out and counted, as the recipe has it
(`data.on_bad_document`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from turbolm.errors import UserError
from turbolm.recipe.sources import Source
from turbolm.recipe.sources.base import Bad, Gauge

OnBad = Literal["refuse", "skip"]  # data.on_bad_document
Offset = tuple[int, int]  # (a file of the source, how many of its documents come before): where a document begins

_ALL_BAD = 1000  # documents at the beginning of a source: the recipe is wrong then, not the documents
_NUM_NAMED = 10
_NUM_KEY, _NAMED_KEY = "bad_documents", "first_bad_documents"  # in records of shards, and in manifests


@dataclass
class LeftOut:
    """How many documents were left out, and what was wrong with the first ten of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, bad: Bad) -> None:
        """Count one more."""
        self.count += 1
        if len(self.first) < _NUM_NAMED:
            self.first.append(str(UserError(f"{bad.where}: {bad.reason}"))[:500])

    def extend(self, record: Mapping[str, Any]) -> None:
        """Count those of a later part, which its record tells."""
        self.count += record.get(_NUM_KEY, 0)
        self.first += record.get(_NAMED_KEY, ())[: _NUM_NAMED - len(self.first)]

    def record(self) -> dict[str, Any]:
        """The same as plain data; nothing where there are none, as before they could be left out."""
        return {_NUM_KEY: self.count, _NAMED_KEY: self.first} if self.count else {}


class Reader:
    """Iterates over the texts of one source, files sorted by path, from `start` on.

    With `on_bad` skip, documents that cannot be used are left out and counted in `left_out`; an offset counts them like
    others. Raises UserError for such a document otherwise, where a file cannot be read, and where a source gives bad
    documents and no other.
    """

    def __init__(self, source: Source, start: Offset = (0, 0), on_bad: OnBad = "refuse"):
        self.offset = start  # of the next document
        self.left_out = LeftOut()
        self._has_good = start != (0, 0)
        self._source, self._on_bad = source, on_bad
        self._files = [Path()] if source.reads_all_files_at_once else source.files()
        self._gauge = Gauge()

    def __iter__(self) -> Iterator[str]:
        first, skip = self.offset
        for number in range(first, len(self._files)):
            self._gauge.share = lambda: 0.0
            begin = skip if number == first else 0
            for count, text in enumerate(self._source.read(self._files[number], begin, self._gauge), start=begin + 1):
                self.offset = number, count
                if isinstance(text, Bad):
                    self._leave_out(text)
                else:
                    self._has_good = True
                    yield text
        if self.left_out.count and not self._has_good:
            raise self._nothing_but_bad()

    def _leave_out(self, bad: Bad) -> None:
        if self._on_bad == "refuse":
            raise _refusal(f"{bad.where}: {bad.reason}")
        self.left_out.add(bad)
        if self.left_out.count >= _ALL_BAD and not self._has_good:
            raise self._nothing_but_bad()

    def _nothing_but_bad(self) -> UserError:
        label = self._source.label or self._source.type
        return UserError(
            f"data.sources: the first {self.left_out.count} documents of the source {label!r} cannot be used, and none "
            f"before: {self.left_out.first[0]}"
        )

    @property
    def share_of_file(self) -> float:
        """How much of the file at `offset` has been read, 0 to 1."""
        return self._gauge.share() if self.offset[1] else 0.0


def empty_files(sources: Sequence[Source]) -> list[Path]:
    """The files of 0 bytes that should hold documents: allowed, and perhaps what a failed download left."""
    stats = (stat for source in sources if source.empty_files_are_odd for stat in source.stats())
    return [path for path, status in stats if not status.st_size]


class SourceSizes:
    """How much of all sources lies before an offset, for progress: in bytes on disk, whatever the format."""

    def __init__(self, sources: Sequence[Source]):
        self._sizes: list[list[int]] = []
        for source in sources:
            sizes = [status.st_size for _, status in source.stats()]
            self._sizes.append([sum(sizes)] if source.reads_all_files_at_once else sizes)
        # A data set from the hub has no size that is known beforehand.
        self.known = all(map(sum, self._sizes))
        self.num_bytes = sum(map(sum, self._sizes))

    def share(self, source: int, offset: Offset, share_of_file: float = 0.0) -> float:
        """The share, 0 to 1, of all bytes that come before; 0 where the size of a source is not known."""
        if not self.known:
            return 0.0
        sizes, file = self._sizes[source], offset[0]
        before = sum(map(sum, self._sizes[:source])) + sum(sizes[:file])
        return float(before + (sizes[file] * share_of_file if file < len(sizes) else 0)) / self.num_bytes


def no_documents() -> UserError:
    """What to raise where all sources together have none."""
    return UserError("The sources hold no documents at all (data.sources)")


def check_left_out(record: Mapping[str, Any], on_bad: OnBad) -> None:
    """Raise UserError where the record of a shard or a store tells of documents that a recipe refuses."""
    if on_bad == "refuse" and record.get(_NUM_KEY):
        raise _refusal(record[_NAMED_KEY][0])


def tell_left_out(record: Mapping[str, Any]) -> list[str]:
    """Lines that say how many documents a store leaves out for being bad, and what is wrong with the first of them."""
    count, first = record.get(_NUM_KEY, 0), record.get(_NAMED_KEY, [])
    return [f"left out: {count} bad documents, such as", *(f"  {problem}" for problem in first)] if count else []


def _refusal(problem: str) -> UserError:
    return UserError(f"{problem}. `data.on_bad_document: skip` leaves such documents out")
