"""Blocks: consecutive documents of a source, hashed, their text in a temporary file.

Whoever reads writes the text. Who decides about documents sees only lengths and digests, and passes on where the text
lies; a worker reads it from the file.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from turbolm.data.prepare.texts import TextFile
from turbolm.errors import UserError
from turbolm.recipe.sources import Source
from turbolm.recipe.sources.base import Bad, Gauge

Offset = tuple[int, int]  # (a file of the source, how many of its documents come before): where a document begins

_TASK_BYTES = 16 * 10**6  # on disk: small files are read together, large ones in parts where they have any
_SHA256_BYTES = 32
_MAX_DOCUMENTS = 2**16  # in a block: empty and bad ones add no bytes
_BAD = -1  # the length of a document that cannot be used
_BUFFER_BYTES = 1 << 18


class Span(NamedTuple):
    """Documents `start` to `stop` of a file; None: to its end."""

    file: int
    path: Path
    start: int
    stop: int | None


@dataclass(frozen=True)
class Task:
    """Consecutive documents of a source that one process reads; `is_last`: the source ends with them."""

    source: int
    spans: list[Span]
    is_last: bool


class Run(NamedTuple):
    """Documents of one file in a block: its first one, and where that begins; `share`: of the file, read before."""

    first: int
    offset: Offset
    share: float


@dataclass
class Block:
    """Consecutive documents of a source; the texts that are not empty lie one after the other in the file.

    `lengths`, int64 [num_documents], is in bytes, and -1 for a document in `bad`. `digests`, uint8 [num_documents, 32],
    has the SHA-256 of each text that is not empty.
    """

    file: TextFile
    lengths: np.ndarray
    digests: np.ndarray
    runs: list[Run]
    bad: dict[int, Bad]
    share: float  # of the last file, read after the block

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def starts(self) -> np.ndarray:
        """Return where each text begins in the file, in bytes."""
        sizes = np.maximum(self.lengths, 0)
        return np.cumsum(sizes) - sizes

    def end_of(self, document: int) -> tuple[Offset, float]:
        """Return the offset after a document, and the share of its file that has been read, 0 to 1."""
        at = bisect_right(self.runs, document, key=lambda run: run.first) - 1
        first, (file, before), share = self.runs[at]
        is_last = at + 1 == len(self.runs)
        num_documents = (len(self) if is_last else self.runs[at + 1].first) - first
        count = document + 1 - first
        share += ((self.share if is_last else 1.0) - share) * count / num_documents
        return (file, before + count), share


@dataclass
class _Builder:
    """A block that is being read."""

    path: Path
    lengths: array[int] = field(default_factory=lambda: array("q"))
    digests: list[bytes] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    bad: dict[int, Bad] = field(default_factory=dict)

    def read(self, documents: Iterator[str | Bad], text_bytes: int) -> int:
        """Add documents up to so many bytes of text; return how many bytes are left: 0 if the block is full."""
        lengths, digests = self.lengths, self.digests
        with self.path.open("ab" if lengths else "wb", _BUFFER_BYTES) as file:
            for document in documents:
                if isinstance(document, Bad):
                    self.bad[len(lengths)] = document
                    lengths.append(_BAD)
                    digests.append(bytes(_SHA256_BYTES))
                else:
                    text = document.encode()
                    lengths.append(len(text))
                    digests.append(hashlib.sha256(text).digest())
                    file.write(text)
                    text_bytes -= len(text)
                if text_bytes <= 0 or len(lengths) == _MAX_DOCUMENTS:
                    return 0
        return text_bytes

    def block(self, share: float) -> Block:
        digests = np.frombuffer(b"".join(self.digests), np.uint8).reshape(-1, _SHA256_BYTES)
        return Block(TextFile(self.path), np.array(self.lengths, np.int64), digests, self.runs, self.bad, share)


def read_blocks(
    source: Source, spans: Sequence[Span], paths: Iterator[Path], size: Callable[[], int]
) -> Iterator[Block]:
    """Yield the documents of the spans in blocks of `size()` bytes of text, and not one document more.

    Raises UserError for a file that cannot be read, after the documents before.
    """
    builder, left, share = _Builder(next(paths)), size(), 0.0
    try:
        for span in spans:
            gauge, count = Gauge(), span.start
            documents = source.read(span.path, span.start, gauge)
            if span.stop is not None:
                documents = islice(documents, span.stop - span.start)
            share = 0.0
            while True:
                first = len(builder.lengths)
                builder.runs.append(Run(first, (span.file, count), share))
                try:
                    left = builder.read(documents, left)
                finally:
                    count += len(builder.lengths) - first
                    share = gauge.share()
                    if len(builder.lengths) == first:
                        builder.runs.pop()
                if left:
                    break
                yield builder.block(share)
                builder, left = _Builder(next(paths)), size()
    except UserError:
        if builder.lengths:
            yield builder.block(share)
        raise
    if builder.lengths:
        yield builder.block(share)
    else:
        builder.path.unlink(missing_ok=True)


def files_from(source: Source, start: Offset) -> list[Span]:
    """Return the files of a source from an offset on."""
    files = [Path()] if source.reads_all_files_at_once else source.files()
    return [Span(file, files[file], start[1] if file == start[0] else 0, None) for file in range(start[0], len(files))]


def plan_tasks(sources: Sequence[Source], source: int, start: Offset) -> Iterator[Task]:
    """Yield what is to be read from an offset in a source on, in order; the last task of a source may have no spans."""
    for number in range(source, len(sources)):
        settings = sources[number]
        all_at_once = settings.reads_all_files_at_once
        files = [(Path(), 0)] if all_at_once else [(path, status.st_size) for path, status in settings.stats()]
        first, skip = start if number == source else (0, 0)
        spans: list[Span] = []
        size = 0
        for file in range(first, len(files)):
            for span, num_bytes in _parts(settings, file, *files[file], skip if file == first else 0):
                spans.append(span)
                size += num_bytes
                if size >= _TASK_BYTES:
                    yield Task(number, spans, is_last=False)
                    spans, size = [], 0
        yield Task(number, spans, is_last=True)


def _parts(source: Source, file: int, path: Path, size: int, skip: int) -> Iterator[tuple[Span, int]]:
    """Yield the spans of a file after its first `skip` documents, and their bytes; small parts are put together."""
    begin = end = num_bytes = 0
    for num_documents, part_bytes in source.parts(path) if size >= _TASK_BYTES else ():
        end, num_bytes = end + num_documents, num_bytes + part_bytes
        if num_bytes >= _TASK_BYTES:
            if end > skip:
                yield Span(file, path, max(begin, skip), end), num_bytes
            begin, num_bytes = end, 0
    if num_bytes or not begin:
        yield Span(file, path, max(begin, skip), None), num_bytes if begin else size
