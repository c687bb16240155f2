"""Blocks: consecutive documents of a source, hashed, their text in a temporary file.

Whoever reads writes the text. Who decides about documents sees only lengths and digests, and passes on where the text
lies; a worker reads it from the file.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from turbolm.data.prepare.texts import TextFile
from turbolm.errors import UserError
from turbolm.recipe.sources import Source
from turbolm.recipe.sources.base import Bad, Gauge
from turbolm.recipe.sources.urls import read_url, url_of

Offset = tuple[int, int]  # (a file of the source, how many of its documents come before): where a document begins

ANY_DIGEST = 2**64 - 1
_TASK_BYTES = 16 * 10**6  # on disk: small files are read together, large ones in parts where they have any
_MAX_DOCUMENTS = 2**16  # in a block: empty and bad ones add no bytes
_BUFFER_BYTES = 1 << 18
_NO_DIGEST = bytes(32)


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
    """Consecutive documents of a source.

    Of each: `lengths`, in bytes, int64, -1 for a document in `bad`; `digests`, its SHA-256, uint8 [num_documents, 32];
    `starts`, where in the file the text begins, in bytes, int64, -1 for a text that is not wanted.
    """

    file: TextFile
    lengths: np.ndarray
    digests: np.ndarray
    starts: np.ndarray
    runs: list[Run]
    bad: dict[int, Bad]
    share: float  # of the last file, read after the block

    def __len__(self) -> int:
        return len(self.lengths)

    def end_of(self, document: int) -> tuple[Offset, float]:
        """Return the offset after a document, and the share of its file that has been read, 0 to 1."""
        at = bisect_right(self.runs, document, key=lambda run: run.first) - 1
        first, (file, before), share = self.runs[at]
        is_last = at + 1 == len(self.runs)
        num_documents = (len(self) if is_last else self.runs[at + 1].first) - first
        count = document + 1 - first
        share += ((self.share if is_last else 1.0) - share) * count / num_documents
        return (file, before + count), share


def append_block(block: Block) -> int:
    """Write a block behind its texts, for another process; return where in the file it begins."""
    told = {
        "num_documents": len(block),
        "runs": block.runs,
        "bad": {document: (bad.where, bad.reason) for document, bad in block.bad.items()},
        "share": block.share,
    }
    with block.file.path.open("ab") as file:
        at = file.tell()
        file.write(json.dumps(told).encode() + b"\n")
        for column in (block.lengths, block.starts, block.digests):
            file.write(column.tobytes())
    return at


def load_block(path: Path, at: int) -> Block:
    """Read what `append_block` wrote."""
    with path.open("rb") as file:
        file.seek(at)
        told = json.loads(file.readline())
        count = told["num_documents"]
        lengths, starts = (np.frombuffer(file.read(8 * count), np.int64) for _ in range(2))
        digests = np.frombuffer(file.read(32 * count), np.uint8).reshape(count, 32)
    runs = [Run(first, (number, before), share) for first, (number, before), share in told["runs"]]
    bad = {int(document): Bad(*texts) for document, texts in told["bad"].items()}
    return Block(TextFile(path), lengths, digests, starts, runs, bad, told["share"])


class _Builder:
    """A block that is being read. Texts with a digest above `max_digest` are not wanted."""

    def __init__(self, path: Path, left: int, max_digest: int):
        self.lengths = array("q")
        self.runs: list[Run] = []
        self.left = left  # bytes of text, until it is full
        self.path, self._max_digest = path, max_digest
        self._starts, self._digests, self._bad = array("q"), list[bytes](), dict[int, Bad]()
        self._file_bytes = 0

    def read(self, documents: Iterator[str | Bad]) -> None:
        """Add documents until the block is full."""
        with self.path.open("ab" if self._starts else "wb", _BUFFER_BYTES) as file:
            for document in documents:
                start, length, digest = -1, -1, _NO_DIGEST
                if isinstance(document, Bad):
                    self._bad[len(self._starts)] = document
                else:
                    text = document.encode()
                    length, digest = len(text), hashlib.sha256(text).digest()
                    self.left -= length
                    if self._max_digest == ANY_DIGEST or int.from_bytes(digest[:8], "big") <= self._max_digest:
                        start = self._file_bytes
                        self._file_bytes += length
                        file.write(text)
                self.lengths.append(length)
                self._starts.append(start)
                self._digests.append(digest)
                if self.left <= 0 or len(self._starts) == _MAX_DOCUMENTS:
                    self.left = 0
                    return

    def block(self, share: float) -> Block:
        lengths, starts = np.array(self.lengths, np.int64), np.array(self._starts, np.int64)
        digests = np.frombuffer(b"".join(self._digests), np.uint8).reshape(-1, len(_NO_DIGEST))
        return Block(TextFile(self.path), lengths, digests, starts, self.runs, self._bad, share)


def read_blocks(
    source: Source,
    spans: Sequence[Span],
    paths: Iterator[Path],
    size: Callable[[], int],
    max_digest: Callable[[], int] = lambda: ANY_DIGEST,
) -> Iterator[Block]:
    """Yield the documents of the spans in blocks of `size()` bytes of text, and not one document more.

    Only texts whose digest does not begin with a larger number than `max_digest()`, 8 bytes, are kept in the files.
    Raises UserError for a file that cannot be read, after the documents before.
    """
    builder, share = _Builder(next(paths), size(), max_digest()), 0.0
    try:
        for span in spans:
            gauge, count = Gauge(), span.start
            documents = read_url(source, span.path, span.start, gauge)
            if span.stop is not None:
                documents = islice(documents, span.stop - span.start)
            share = 0.0
            while True:
                first = len(builder.lengths)
                builder.runs.append(Run(first, (span.file, count), share))
                try:
                    builder.read(documents)
                finally:
                    count += len(builder.lengths) - first
                    share = gauge.share()
                    if len(builder.lengths) == first:
                        builder.runs.pop()
                if builder.left:
                    break
                yield builder.block(share)
                builder = _Builder(next(paths), size(), max_digest())
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
    for num_documents, part_bytes in source.parts(path) if size >= _TASK_BYTES and not url_of(path) else ():
        end, num_bytes = end + num_documents, num_bytes + part_bytes
        if num_bytes >= _TASK_BYTES:
            if end > skip:
                yield Span(file, path, max(begin, skip), end), num_bytes
            begin, num_bytes = end, 0
    if num_bytes or not begin:
        yield Span(file, path, max(begin, skip), None), num_bytes if begin else size
