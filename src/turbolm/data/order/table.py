"""The plan table: which documents each window of steps draws, built row after row, and its file.

A row draws the next documents of each source's stream and adds the few pieces that the row before left over. What does
not fill whole batches is carried on in its turn. So a row needs nothing but itself to be packed again, a change of
length, batch or mixture falls on a step, and no document is lost or repeated. Rows never change: a larger budget
appends some.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import overload

import numpy as np

from turbolm.data.order.packing import Bins, IntArray
from turbolm.data.order.stream import DocumentStream, random_order, random_raw
from turbolm.data.order.window import Grouping, Packing, Pieces, Random, Window, arrange, count_batches, pack_window
from turbolm.files import sha256_json, temporary
from turbolm.plan.curriculum import Segment

ORDER_VERSION = 3  # raise it when the same arguments no longer give the same batches
_ONE = 2**32  # shares of the sources are whole numbers, so that their sums are exact
_ROWS = 2**32  # sets the permutations of rows apart from those of sources


@dataclass(frozen=True)
class Row:
    """Steps `first_step` up to `end_step`, all of one segment of the curriculum.

    `ranges` are the places [begin, end) it draws from each source's stream and `owed` the positions by which each
    source then lags behind its share; `carried` is what the row before left over, `carried_on` what this one does.
    `max_pieces` is the largest number of pieces in a bin, by the segment's row lengths. `digest` is the SHA-256 of the
    rows up to here.
    """

    first_step: int
    end_step: int
    segment: int
    ranges: tuple[tuple[int, int], ...]
    owed: tuple[int, ...]
    carried: Pieces
    carried_on: Pieces
    max_pieces: tuple[int, ...]
    digest: str = ""


@dataclass(frozen=True)
class OrderSettings:
    """Everything but the documents that decides the batches."""

    segments: tuple[Segment, ...]
    seed: int
    packing: Packing
    grouping: Grouping
    window_documents: int  # of the source that sets the pace

    def digest(self, documents: str) -> str:
        """SHA-256 of all but the segments, and of `documents`, a fingerprint of what the sources hold."""
        settings = {name: value for name, value in asdict(self).items() if name != "segments"}
        return sha256_json([ORDER_VERSION, documents, settings])

    def key(self, documents: str) -> str:
        """SHA-256 of everything that decides a table, the end of its last segment apart."""
        segments = [asdict(segment) for segment in self.segments]
        return hashlib.sha256(json.dumps([self.digest(documents), segments]).encode()).hexdigest()


@dataclass(frozen=True)
class Sources:
    """The streams that the segments' weights speak of (or one of all documents) and their documents' mean positions."""

    streams: Sequence[DocumentStream]
    mean_positions: Sequence[float]

    def read(self, ranges: Sequence[tuple[int, int]]) -> Pieces:
        """The documents of these places, source by source."""
        return Pieces.join([Pieces.whole(*s.read(*place)) for s, place in zip(self.streams, ranges, strict=True)])


def open_window(row: Row, number: int, sources: Sources, settings: OrderSettings) -> Window:
    """The batches of row `number`."""
    segment = settings.segments[row.segment]
    packed = _pack(sources.read(row.ranges), row.carried, number, settings, segment)
    random = _random(settings.seed, number)
    return arrange(packed, segment, row.end_step - row.first_step, settings.packing, settings.grouping, random)[0]


def build_row(rows: Sequence[Row], sources: Sources, settings: OrderSettings, first_digest: str) -> Row:
    """The row that follows `rows`; `first_digest` stands for what came before the first."""
    number, num_sources = len(rows), len(sources.streams)
    if rows:
        last = rows[-1]
        step, begins, owed, carried = last.end_step, [end for _, end in last.ranges], list(last.owed), last.carried_on
        before = last.digest
    else:
        step, begins, owed, carried = 0, [0] * num_sources, [0] * num_sources, Pieces(*np.zeros((3, 0), np.int64))
        before = first_digest
    segments = settings.segments
    index = bisect_right([segment.first_step for segment in segments], step) - 1
    segment = segments[index]
    most_steps = segments[index + 1].first_step - step if index + 1 < len(segments) else None
    ends = list(begins)
    positions = _window_positions(sources, settings, segment, begins, most_steps) - int(carried.length.sum())
    _advance(sources, segment, positions, ends, owed, cross_epoch=False)
    while True:
        documents = sources.read(list(zip(begins, ends, strict=True)))
        packed = _pack(documents, carried, number, settings, segment)
        num_steps = count_batches(packed, segment)
        if num_steps:
            break
        # Not one batch: draw on, over the end of an epoch.
        _advance(sources, segment, segment.global_batch_tokens, ends, owed, cross_epoch=True)
    num_steps = min(num_steps, most_steps or num_steps)
    random = _random(settings.seed, number)
    window, carried_on = arrange(packed, segment, num_steps, settings.packing, settings.grouping, random)
    row = Row(
        first_step=step,
        end_step=step + num_steps,
        segment=index,
        ranges=tuple(zip(begins, ends, strict=True)),
        owed=tuple(owed),
        carried=carried,
        carried_on=carried_on,
        max_pieces=tuple(int(np.diff(bins.offsets).max(initial=0)) for bins in window.bins),
    )
    return replace(row, digest=_row_digest(row, segment, window, before))


def _advance(
    sources: Sources, segment: Segment, positions: int, ends: list[int], owed: list[int], *, cross_epoch: bool
) -> None:
    """Move `ends` on by about `positions`, shared as the segment says; `owed` keeps the shares exact over time.

    The source whose epoch lasts longest sets the pace. It stops at the end of its epoch, so that a window mixes two
    epochs only where it would not fill a batch otherwise.
    """
    shares = _shares(segment)
    lead, _ = _lead(sources, segment)
    stream = sources.streams[lead]
    limit = None if cross_epoch else (ends[lead] // stream.num_documents + 1) * stream.num_documents
    ends[lead], paced = stream.advance(ends[lead], positions * shares[lead] // _ONE, limit)
    owed[lead] = 0
    for number, other in enumerate(sources.streams):
        if number != lead:
            owed[number] += paced * shares[number] // shares[lead]
            ends[number], drawn = other.advance(ends[number], owed[number])
            owed[number] -= drawn


def _window_positions(
    sources: Sources, settings: OrderSettings, segment: Segment, begins: Sequence[int], most_steps: int | None
) -> int:
    """How much a window should draw: an even part of the pace-setting source's epoch, or what the segment still needs.

    Windows are alike in size, and the last one of an epoch takes all that is left.
    """
    lead, share = _lead(sources, segment)
    stream = sources.streams[lead]
    left = stream.num_documents - begins[lead] % stream.num_documents
    num_windows = -(-left // settings.window_documents)
    positions = int(left / num_windows * sources.mean_positions[lead] / share * _ONE) if num_windows > 1 else 2**62
    positions = max(positions, segment.global_batch_tokens)
    return positions if most_steps is None else min(positions, most_steps * segment.global_batch_tokens)


def _lead(sources: Sources, segment: Segment) -> tuple[int, int]:
    """The source whose epoch lasts longest at the segment's shares, and its share in parts of `_ONE`."""
    shares = _shares(segment)
    lasting = [
        stream.num_documents * mean / share if share else 0.0
        for stream, mean, share in zip(sources.streams, sources.mean_positions, shares, strict=True)
    ]
    lead = lasting.index(max(lasting))
    return lead, shares[lead]


def _shares(segment: Segment) -> list[int]:
    return [round(weight * _ONE) for weight in segment.weights or (1.0,)]


def _pack(documents: Pieces, carried: Pieces, number: int, settings: OrderSettings, segment: Segment) -> list[Bins]:
    pieces = Pieces.join([carried, documents])
    if len(segment.weights or ()) > 1:  # mix the sources, for packings that keep the order of documents
        pieces = pieces.select(random_order(len(pieces.length), settings.seed, number, _ROWS, 0))
    return pack_window(pieces, segment, settings.packing)


def _random(seed: int, number: int) -> Random:
    return lambda count, use: random_raw(count, seed, number, _ROWS, use + 1)


def _row_digest(row: Row, segment: Segment, window: Window, before: str) -> str:
    digest = hashlib.sha256(before.encode())
    digest.update(json.dumps([asdict(segment), row.first_step, row.end_step, row.ranges, row.owed]).encode())
    for pieces in (row.carried, row.carried_on):
        digest.update(np.stack([pieces.document, pieces.start, pieces.length]).astype("<i8").tobytes())
    digest.update(window.which.astype("<i8").tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------- the file


def save_table(path: Path, key: str, rows: Sequence[Row]) -> None:
    """Write the rows to `path` (.npz without pickles), through a temporary file."""
    pieces = [rows[0].carried, *(row.carried_on for row in rows)]
    joined = np.stack(list(vars(Pieces.join(pieces)).values()))
    if joined.max(initial=0) < 2**31:  # nearly all of the file, which every start reads and checks
        joined = joined.astype(np.int32)
    arrays: dict[str, IntArray] = {
        "numbers": np.array([[row.first_step, row.end_step, row.segment] for row in rows], np.int64),
        "ranges": np.array([row.ranges for row in rows], np.int64),
        "owed": np.array([row.owed for row in rows], np.int64),
        "piece_counts": np.array([len(part.length) for part in pieces], np.int64),
        "pieces": joined,
        "max_pieces_counts": np.array([len(row.max_pieces) for row in rows], np.int64),
        "max_pieces": np.array([most for row in rows for most in row.max_pieces], np.int64),
        "digests": np.array([row.digest for row in rows]),
        "key": np.array(key),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary(path).open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    temporary(path).replace(path)


class Rows(Sequence[Row]):
    """The rows of a table: those of its file, each made when it is asked for (a step needs one of thousands), and more.

    `arrays` are the file's.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray] | None = None):
        self._arrays = arrays or {"numbers": np.zeros((0, 3), np.int64)}
        self._num_stored = len(self._arrays["numbers"])
        self._added: list[Row] = []
        self.end_steps: list[int] = self._arrays["numbers"][:, 1].tolist()
        if arrays:
            self._piece_ends, self._max_pieces_ends = (
                np.cumsum(arrays[name]) for name in ("piece_counts", "max_pieces_counts")
            )

    def append(self, row: Row) -> None:
        """Add a row behind the others."""
        self._added.append(row)
        self.end_steps.append(row.end_step)

    def __len__(self) -> int:
        return self._num_stored + len(self._added)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        places = range(len(self))[index]
        return self._row(places) if isinstance(places, int) else [self._row(place) for place in places]

    def _row(self, place: int) -> Row:
        if place >= self._num_stored:
            return self._added[place - self._num_stored]
        arrays = self._arrays
        first_step, end_step, segment = arrays["numbers"][place].tolist()
        end = self._max_pieces_ends[place]
        return Row(
            first_step=first_step,
            end_step=end_step,
            segment=segment,
            ranges=tuple((begin, end) for begin, end in arrays["ranges"][place].tolist()),
            owed=tuple(arrays["owed"][place].tolist()),
            carried=self._pieces(place),
            carried_on=self._pieces(place + 1),
            max_pieces=tuple(arrays["max_pieces"][end - arrays["max_pieces_counts"][place] : end].tolist()),
            digest=str(arrays["digests"][place]),
        )

    def _pieces(self, part: int) -> Pieces:
        end = self._piece_ends[part]
        return Pieces(*self._arrays["pieces"][:, end - self._arrays["piece_counts"][part] : end])


def load_table(path: Path, key: str) -> Rows:
    """The rows that `save_table` wrote under this key; none when there is no such file, or a damaged one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        rows = Rows(arrays if str(arrays["key"]) == key else None)
        rows[-1:]  # made later as the others are, it would fail in the middle of a run
        return rows
    except Exception:  # whatever is wrong with it (it is a cache), it is made anew
        return Rows()
