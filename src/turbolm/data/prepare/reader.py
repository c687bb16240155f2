"""Read the documents of a recipe's sources one by one, in a fixed order.

An invalid document is refused, or skipped and counted, as `data.on_bad_document` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from turbolm.data.prepare.blocks import Offset, files_from
from turbolm.errors import UserError
from turbolm.recipe.sources import Source
from turbolm.recipe.sources.base import Bad, Gauge
from turbolm.recipe.sources.urls import read_url

OnBad = Literal["refuse", "skip"]  # data.on_bad_document

_ALL_BAD = 1000  # documents at the start of a source: if all are bad, the recipe is wrong, not the documents
_NUM_NAMED = 10
_NUM_KEY, _NAMED_KEY = "bad_documents", "first_bad_documents"  # in records of shards, and in manifests
SHORT_KEY = "short_documents"  # in manifests: for each source, how many had fewer than its `min_tokens`


@dataclass
class LeftOut:
    """The number of skipped documents, and the problems of the first ten."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, bad: Bad) -> None:
        """Count one more."""
        self.count += 1
        if len(self.first) < _NUM_NAMED:
            self.first.append(str(UserError(f"{bad.where}: {bad.reason}"))[:500])

    def extend(self, record: Mapping[str, Any]) -> None:
        """Add those of a later part, from its record."""
        self.count += record.get(_NUM_KEY, 0)
        self.first += record.get(_NAMED_KEY, ())[: _NUM_NAMED - len(self.first)]

    def record(self) -> dict[str, Any]:
        """Return plain data; empty if there are none, as in records from before documents could be skipped."""
        return {_NUM_KEY: self.count, _NAMED_KEY: self.first} if self.count else {}


class BadDocuments:
    """Refuses, or counts in `left_out`, the bad documents of one source from `start` on, in their order.

    With `on_bad` skip, a source with only bad documents raises UserError; otherwise each one does.
    """

    def __init__(self, source: Source, start: Offset, on_bad: OnBad):
        self.left_out = LeftOut()
        self._has_good = start != (0, 0)
        self._source, self._on_bad = source, on_bad

    def good(self) -> None:
        """Note that there is another document."""
        self._has_good = True

    def leave_out(self, bad: Bad) -> None:
        """Leave out a document."""
        if self._on_bad == "refuse":
            raise _refusal(f"{bad.where}: {bad.reason}")
        self.left_out.add(bad)
        if self.left_out.count >= _ALL_BAD:
            self.end()

    def end(self) -> None:
        """Check that there was a good document."""
        if self.left_out.count and not self._has_good:
            label = self._source.label or self._source.type
            raise UserError(
                f"{self._source.key}: the first {self.left_out.count} documents of the source {label!r} cannot be "
                f"used, and none before: {self.left_out.first[0]}"
            )

    def take_record(self) -> dict[str, Any]:
        """Return the record of those left out since the last call."""
        record, self.left_out = self.left_out.record(), LeftOut()
        return record


class Reader:
    """Iterates over the texts of one source from `start`, files sorted by path.

    Bad documents are skipped or refused as in `BadDocuments`; offsets include them. Raises UserError for a file that
    cannot be read.
    """

    def __init__(self, source: Source, start: Offset = (0, 0), on_bad: OnBad = "refuse"):
        self.offset = start  # of the next document
        self._source = source
        self._bad = BadDocuments(source, start, on_bad)

    @property
    def left_out(self) -> LeftOut | None:
        """Return the bad documents that were skipped so far; None if there are none."""
        return self._bad.left_out if self._bad.left_out.count else None

    def __iter__(self) -> Iterator[str]:
        for span in files_from(self._source, self.offset):
            documents = read_url(self._source, span.path, span.start, Gauge())
            for count, text in enumerate(documents, start=span.start + 1):
                self.offset = span.file, count
                if isinstance(text, Bad):
                    self._bad.leave_out(text)
                else:
                    self._bad.good()
                    yield text
        self._bad.end()


def empty_files(sources: Sequence[Source]) -> list[Path]:
    """Return the files of 0 bytes that should hold documents: allowed, but possibly left by a failed download."""
    stats = (stat for source in sources if source.empty_files_are_odd for stat in source.stats())
    return [path for path, status in stats if not status.st_size]


class SourceSizes:
    """Computes progress: the share of all sources before an offset, in bytes on disk."""

    def __init__(self, sources: Sequence[Source]):
        self._sizes: list[list[int]] = []
        for source in sources:
            sizes = [status.st_size for _, status in source.stats()]
            self._sizes.append([sum(sizes)] if source.reads_all_files_at_once else sizes)
        # The size of a data set from the hub is not known in advance.
        self.known = all(map(sum, self._sizes))
        self.num_bytes = sum(map(sum, self._sizes))

    def share(self, source: int, offset: Offset, share_of_file: float = 0.0) -> float:
        """Return the share of all bytes before the offset, 0 to 1; 0 if the size of a source is unknown."""
        if not self.known:
            return 0.0
        sizes, file = self._sizes[source], offset[0]
        before = sum(map(sum, self._sizes[:source])) + sum(sizes[:file])
        return float(before + (sizes[file] * share_of_file if file < len(sizes) else 0)) / self.num_bytes


def no_documents() -> UserError:
    """Return the error for sources without any document."""
    return UserError("The sources hold no documents at all (data.sources)")


def check_left_out(record: Mapping[str, Any], on_bad: OnBad) -> None:
    """Raise UserError if the record of a shard or store lists documents that the recipe refuses."""
    if on_bad == "refuse" and record.get(_NUM_KEY):
        raise _refusal(record[_NAMED_KEY][0])


def tell_left_out(record: Mapping[str, Any]) -> list[str]:
    """Return lines: how many short and bad documents a store skipped, and the problems of the first bad ones."""
    lines = []
    for number, count in enumerate(record.get(SHORT_KEY, ())):
        if count:
            least = record["sources"][number]["min_tokens"]
            lines.append(f"skipped: {count} documents of data.sources[{number}] with fewer than {least} tokens")
    if count := record.get(_NUM_KEY, 0):
        lines += [f"skipped: {count} bad documents, such as", *(f"  {problem}" for problem in record[_NAMED_KEY])]
    return lines


def _refusal(problem: str) -> UserError:
    return UserError(f"{problem}. `data.on_bad_document: skip` skips such documents")
