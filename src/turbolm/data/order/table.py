"""The windows of a plan table: which documents each window of steps draws, planned one after the other.

A window draws the next documents of each source's stream and adds the few slices left over from the window before.
Slices that do not fill a batch are carried over to the next window. So a planned window can be packed again on its own,
a change of length, batch or mixture falls on a step, and no document is lost or repeated. Planned windows never change:
a larger budget appends new ones.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from turbolm.data.order.packing import Packing, Sequences
from turbolm.data.order.stream import DocumentStream, random_order, random_raw
from turbolm.data.order.window import Grouping, Random, Slices, Window, arrange, count_batches, pack_window
from turbolm.files import sha256_json
from turbolm.plan.curriculum import Segment

ORDER_VERSION = 3  # raise it when the same arguments no longer give the same batches
_ONE = 2**32  # shares of the sources are integers, so that sums are exact
_WINDOWS = 2**32  # RNG domain separator: windows vs. sources


@dataclass(frozen=True)
class PlannedWindow:
    """Steps `first_step` to `end_step` (exclusive) of one segment of the curriculum: an entry of the plan table.

    `ranges` are the offsets [begin, end) that it draws from each source's stream. `owed` are the positions by which
    each source is behind its share at the end. `carried` are the slices left over from the window before, `carried_on`
    those that this window leaves over. `max_slices` is the largest number of slices in a sequence, by the segment's
    sequence lengths. `digest` is the SHA-256 of the table up to here.
    """

    first_step: int
    end_step: int
    segment: int
    ranges: tuple[tuple[int, int], ...]
    owed: tuple[int, ...]
    carried: Slices
    carried_on: Slices
    max_slices: tuple[int, ...]
    digest: str = ""


@dataclass(frozen=True)
class OrderSettings:
    """Everything that determines the batches, except the documents."""

    segments: tuple[Segment, ...]
    seed: int
    packing: Packing
    grouping: Grouping
    window_documents: int  # the source that sets the pace

    def digest(self, documents: str) -> str:
        """Return a SHA-256 of all settings except the segments, and of `documents`, a fingerprint of the sources."""
        settings = {name: value for name, value in asdict(self).items() if name != "segments"}
        return sha256_json([ORDER_VERSION, documents, settings])

    def key(self, documents: str) -> str:
        """Return a SHA-256 of everything that determines a table, except the end of its last segment."""
        segments = [asdict(segment) for segment in self.segments]
        return hashlib.sha256(json.dumps([self.digest(documents), segments]).encode()).hexdigest()


@dataclass(frozen=True)
class Sources:
    """The streams of the weighted sources (or one of all documents), and their mean positions per document."""

    streams: Sequence[DocumentStream]
    mean_positions: Sequence[float]

    def read(self, ranges: Sequence[tuple[int, int]]) -> Slices:
        """Return the documents at these stream offsets, source by source."""
        drawn = [stream.read(*offsets) for stream, offsets in zip(self.streams, ranges, strict=True)]
        return Slices.join([Slices(documents, np.zeros_like(documents), lengths) for documents, lengths in drawn])


def open_window(planned: PlannedWindow, number: int, sources: Sources, settings: OrderSettings) -> Window:
    """Return the batches of window `number` of the table."""
    segment = settings.segments[planned.segment]
    packed = _pack(sources.read(planned.ranges), planned.carried, number, settings, segment)
    random = _random(settings.seed, number)
    num_steps = planned.end_step - planned.first_step
    return arrange(packed, segment, num_steps, settings.packing, settings.grouping, random)[0]


def plan_window(
    last: PlannedWindow | None, number: int, sources: Sources, settings: OrderSettings, first_digest: str
) -> PlannedWindow:
    """Plan window `number`, which follows `last`; `first_digest` is the digest before the first window."""
    num_sources = len(sources.streams)
    nothing = Slices(*np.zeros((3, 0), np.int64))
    start = PlannedWindow(0, 0, 0, ((0, 0),) * num_sources, (0,) * num_sources, nothing, nothing, (), first_digest)
    last = last or start
    step, begins, owed = last.end_step, [end for _, end in last.ranges], list(last.owed)
    segments = settings.segments
    index = bisect_right([segment.first_step for segment in segments], step) - 1
    segment = segments[index]
    most_steps = segments[index + 1].first_step - step if index + 1 < len(segments) else None
    ends = list(begins)
    positions = _window_positions(sources, settings, segment, begins, most_steps) - int(last.carried_on.length.sum())
    _advance(sources, segment, positions, ends, owed, cross_epoch=False)
    while True:
        documents = sources.read(list(zip(begins, ends, strict=True)))
        packed = _pack(documents, last.carried_on, number, settings, segment)
        num_steps = count_batches(packed, segment)
        if num_steps:
            break
        # Less than one batch: draw more, past the end of an epoch.
        _advance(sources, segment, segment.global_batch_tokens, ends, owed, cross_epoch=True)
    num_steps = min(num_steps, most_steps or num_steps)
    random = _random(settings.seed, number)
    window, carried_on = arrange(packed, segment, num_steps, settings.packing, settings.grouping, random)
    planned = PlannedWindow(
        first_step=step,
        end_step=step + num_steps,
        segment=index,
        ranges=tuple(zip(begins, ends, strict=True)),
        owed=tuple(owed),
        carried=last.carried_on,
        carried_on=carried_on,
        max_slices=tuple(int(np.diff(sequences.offsets).max(initial=0)) for sequences in window.sequences),
    )
    return replace(planned, digest=_digest(planned, segment, window, last.digest))


def _advance(
    sources: Sources, segment: Segment, positions: int, ends: list[int], owed: list[int], *, cross_epoch: bool
) -> None:
    """Advance `ends` by about `positions`, split by the segment's shares; `owed` keeps the shares exact over time.

    The source whose epoch lasts longest sets the pace. It stops at the end of its epoch, so that a window mixes two
    epochs only where it would not fill a batch otherwise.
    """
    shares = _shares(segment)
    lead, _ = _lead(sources, segment)
    stream = sources.streams[lead]
    limit = None if cross_epoch else (ends[lead] // stream.num_documents + 1) * stream.num_documents
    due = positions * shares[lead] // _ONE
    if cross_epoch:  # one at least: of a tiny share and a small batch nothing would ever be drawn
        due = max(1, due)
    ends[lead], paced = stream.advance(ends[lead], due, limit)
    owed[lead] = 0
    for number, other in enumerate(sources.streams):
        if number != lead:
            owed[number] += paced * shares[number] // shares[lead]
            ends[number], drawn = other.advance(ends[number], owed[number])
            owed[number] -= drawn


def _window_positions(
    sources: Sources, settings: OrderSettings, segment: Segment, begins: Sequence[int], most_steps: int | None
) -> int:
    """Return how much a window should draw: an even part of the pacing source's epoch, or what the segment still needs.

    Windows have similar sizes, and the last one of an epoch takes the rest.
    """
    lead, share = _lead(sources, segment)
    stream = sources.streams[lead]
    left = stream.num_documents - begins[lead] % stream.num_documents
    num_windows = -(-left // settings.window_documents)
    positions = int(left / num_windows * sources.mean_positions[lead] / share * _ONE) if num_windows > 1 else 2**62
    positions = max(positions, segment.global_batch_tokens)
    return positions if most_steps is None else min(positions, most_steps * segment.global_batch_tokens)


def _lead(sources: Sources, segment: Segment) -> tuple[int, int]:
    """Return the source whose epoch lasts longest at the segment's shares, and its share in units of `_ONE`."""
    shares = _shares(segment)
    lasting = [
        stream.num_documents * mean / share if share else 0.0
        for stream, mean, share in zip(sources.streams, sources.mean_positions, shares, strict=True)
    ]
    lead = lasting.index(max(lasting))
    return lead, shares[lead]


def _shares(segment: Segment) -> list[int]:
    return [round(weight * _ONE) for weight in segment.weights or (1.0,)]


def _pack(
    documents: Slices, carried: Slices, number: int, settings: OrderSettings, segment: Segment
) -> list[Sequences]:
    slices = Slices.join([carried, documents])
    if len(segment.weights or ()) > 1:  # mix the sources, for packings that keep the order of documents
        slices = slices.select(random_order(len(slices.length), settings.seed, number, _WINDOWS, 0))
    return pack_window(slices, segment, settings.packing)


def _random(seed: int, number: int) -> Random:
    return lambda count, use: random_raw(count, seed, number, _WINDOWS, use + 1)


def _digest(planned: PlannedWindow, segment: Segment, window: Window, before: str) -> str:
    digest = hashlib.sha256(before.encode())
    numbers = [asdict(segment), planned.first_step, planned.end_step, planned.ranges, planned.owed]
    digest.update(json.dumps(numbers).encode())
    for slices in (planned.carried, planned.carried_on):
        digest.update(np.stack([slices.document, slices.start, slices.length]).astype("<i8").tobytes())
    digest.update(window.which.astype("<i8").tobytes())
    return digest.hexdigest()
