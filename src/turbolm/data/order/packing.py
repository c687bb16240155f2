"""Pack documents into bins of `seq_len` positions: which part of which document lies in which bin.

`best_fit` cuts a document only where it is longer than a bin. Its full pieces are bins of their own; what is left over,
and every shorter document, is placed by best fit decreasing. Best fit depends on lengths alone, so its loop runs over
groups of equal pieces and equal bins rather than over documents. `concat` lays documents end to end and cuts wherever a
bin is full: no padding but in the last bin. `single` gives each piece a bin of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from turbolm.data import native
from turbolm.data.sorting import stable_argsort

IntArray = np.ndarray  # int64 unless said otherwise


@dataclass(frozen=True)
class Bins:
    """Pieces of documents grouped in bins: bin b holds the pieces `offsets[b]:offsets[b + 1]`.

    `offsets` is int64 [num_bins + 1]; `document`, `start` and `length` are int64 [num_pieces], start and length in
    positions of the document.
    """

    seq_len: int
    offsets: IntArray
    document: IntArray
    start: IntArray
    length: IntArray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_positions(self) -> int:
        """Positions that hold a document, hence a target; the rest of `len(self) * seq_len` is padding."""
        return int(self.length.sum())

    @property
    def used(self) -> IntArray:
        """Positions in use, int64 [num_bins]."""
        return self._sum_by_bin(self.length)

    @property
    def attention_cost(self) -> IntArray:
        """Sum of length squared over the pieces of each bin, int64 [num_bins]."""
        return self._sum_by_bin(self.length**2)

    def select(self, bins: IntArray) -> Bins:
        """The bins with these indices, in this order."""
        bins = np.asarray(bins, dtype=np.int64)
        counts = self.offsets[bins + 1] - self.offsets[bins]
        offsets = _cumulative(counts)
        pieces = np.arange(offsets[-1]) + np.repeat(self.offsets[bins] - offsets[:-1], counts)
        return Bins(self.seq_len, offsets, self.document[pieces], self.start[pieces], self.length[pieces])

    def slice(self, first: int, end: int) -> Bins:
        """The bins from `first` up to but not including `end`; nothing is copied but their offsets."""
        begin, stop = self.offsets[first], self.offsets[end]
        pieces = [column[begin:stop] for column in (self.document, self.start, self.length)]
        return Bins(self.seq_len, self.offsets[first : end + 1] - begin, *pieces)

    def _sum_by_bin(self, values: IntArray) -> IntArray:
        return np.diff(_cumulative(values)[self.offsets])


def concatenate(parts: list[Bins]) -> Bins:
    """The bins of every part, one after the other."""
    counts = np.concatenate([np.diff(part.offsets) for part in parts])
    fields = [np.concatenate([getattr(part, name) for part in parts]) for name in ("document", "start", "length")]
    return Bins(parts[0].seq_len, _cumulative(counts), *fields)


def pack_single(lengths: IntArray, seq_len: int) -> Bins:
    """One piece a bin, in the order of the documents (`lengths`: positions, int64 [num_documents])."""
    lengths = np.asarray(lengths, dtype=np.int64)
    num_pieces = -(-lengths // seq_len)
    document = np.repeat(np.arange(len(lengths)), num_pieces)
    start = (np.arange(len(document)) - np.repeat(_cumulative(num_pieces)[:-1], num_pieces)) * seq_len
    length = np.minimum(lengths[document] - start, seq_len)
    return Bins(seq_len, np.arange(len(document) + 1), document, start, length)


def pack_concat(lengths: IntArray, seq_len: int) -> Bins:
    """Documents end to end, cut every `seq_len` (`lengths`: positions, int64 [num_documents])."""
    lengths = np.asarray(lengths, dtype=np.int64)
    begins = _cumulative(lengths)
    first_bin, last_bin = begins[:-1] // seq_len, (begins[1:] - 1) // seq_len
    num_pieces = np.where(lengths > 0, last_bin - first_bin + 1, 0)
    document = np.repeat(np.arange(len(lengths)), num_pieces)
    bin_of_piece = np.arange(len(document)) + np.repeat(first_bin - _cumulative(num_pieces)[:-1], num_pieces)
    begin = np.maximum(begins[document], bin_of_piece * seq_len)
    end = np.minimum(begins[document + 1], (bin_of_piece + 1) * seq_len)
    return Bins(seq_len, _cumulative(np.bincount(bin_of_piece)), document, begin - begins[document], end - begin)


def pack_best_fit(lengths: IntArray, seq_len: int) -> Bins:
    """Best fit decreasing (`lengths`: positions, int64 [num_documents]). Bins of one full piece come first."""
    lengths = np.asarray(lengths, dtype=np.int64)
    num_full, rest = np.divmod(lengths, seq_len)
    is_long = num_full > 0
    long = np.flatnonzero(is_long)
    full_document = np.repeat(long, num_full[long])
    full_start = (np.arange(len(full_document)) - np.repeat(_cumulative(num_full[long])[:-1], num_full[long])) * seq_len

    # Longest first, then by number; those without a rest come last and are left out.
    document = stable_argsort(seq_len - rest, seq_len)[: np.count_nonzero(rest)]
    histogram = np.bincount(rest, minlength=seq_len)
    histogram[0] = 0
    bin_sizes, position = _arrange(*_place(histogram, seq_len))

    num_full_bins = len(full_document)
    fields = np.zeros((3, num_full_bins + len(document)), dtype=np.int64)
    fields[:, :num_full_bins] = full_document, full_start, np.full(num_full_bins, seq_len)
    rests = fields[:, num_full_bins:]
    rests[0, position] = document
    rests[2, position] = np.repeat(np.arange(seq_len - 1, -1, -1), histogram[::-1])
    of_long = np.flatnonzero(is_long[document])
    rests[1, position[of_long]] = num_full[document[of_long]] * seq_len
    return Bins(seq_len, _cumulative(np.concatenate([np.ones(num_full_bins, np.int64), bin_sizes])), *fields)


def count_best_fit(lengths: IntArray, seq_len: int) -> int:
    """`len(pack_best_fit(lengths, seq_len))` without saying which document lies where."""
    lengths = np.asarray(lengths, dtype=np.int64)
    num_full, rest = np.divmod(lengths, seq_len)
    histogram = np.bincount(rest, minlength=seq_len)
    histogram[0] = 0
    first_bin, num_bins, _, _ = _place(histogram, seq_len)
    return int(num_full.sum()) + int((first_bin + num_bins).max(initial=0))


def count_concat(lengths: IntArray, seq_len: int) -> int:
    """`len(pack_concat(lengths, seq_len))`."""
    return -(-int(np.asarray(lengths, dtype=np.int64).sum()) // seq_len)


def count_single(lengths: IntArray, seq_len: int) -> int:
    """`len(pack_single(lengths, seq_len))`."""
    return int((-(-np.asarray(lengths, dtype=np.int64) // seq_len)).sum())


def _arrange(first_bin: IntArray, num_bins: IntArray, each: IntArray, before: IntArray) -> tuple[IntArray, IntArray]:
    """Carry out the actions of `_place`: pieces of each bin, and where each piece goes when the bins lie end to end."""
    visits = _cumulative(num_bins)  # a visit is an action at one of its bins
    bin_of_visit = np.arange(visits[-1]) + np.repeat(first_bin - visits[:-1], num_bins)
    each, before = np.repeat(each, num_bins), np.repeat(before, num_bins)
    bin_sizes = np.bincount(bin_of_visit, weights=each).astype(np.int64)  # sums in float64, exact below 2**53
    first_position = _cumulative(bin_sizes)[bin_of_visit] + before
    ends = np.cumsum(each)
    position = np.repeat(first_position - ends + each, each)
    position += np.arange(len(position))
    return bin_sizes, position


def _place(histogram: IntArray, seq_len: int) -> tuple[IntArray, ...]:
    """Best fit decreasing over `histogram[length]` pieces, as actions in the order of the pieces, longest first.

    Action i puts `each[i]` pieces of one length into each of the bins `first_bin[i] + range(num_bins[i])`, which hold
    `before[i]` pieces each by then.
    Strict best fit keeps filling the bin it has just used: what is left there is smaller than in any other bin with
    room, so long as another piece of the same length goes in. That is why a bin takes `room // length` at once.
    """
    sizes = np.flatnonzero(histogram)[::-1]
    place = native.place if native.library() else _place_in_python
    return tuple(place(np.ascontiguousarray(sizes), histogram[sizes], seq_len).T)


def _place_in_python(lengths: IntArray, counts: IntArray, seq_len: int) -> IntArray:
    """The actions of `_place`, int64 [num_actions, 4], for `counts` pieces of these lengths, longest first."""
    actions: list[tuple[int, int, int, int]] = []
    # By room: (first bin, number of bins, pieces in each).
    runs: list[list[tuple[int, int, int]]] = [[] for _ in range(seq_len + 1)]
    with_room = 0  # bit r is set where runs[r] is not empty
    next_bin = 0
    for length, count in zip(lengths.tolist(), counts.tolist(), strict=True):
        while count:
            fitting = with_room >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                first, available, before = runs[room].pop()
                if not runs[room]:
                    with_room ^= 1 << room
            else:
                room, first, before = seq_len, next_bin, 0
                available = -(-count // (seq_len // length))
                next_bin += available
            each = room // length
            used = min(available, count // each)
            if not used:  # fewer pieces left than one bin takes
                each, used = count, 1
            actions.append((first, used, each, before))
            count -= used * each
            left = room - each * length
            untouched, filled = (first + used, available - used, before), (first, used, before + each)
            for room_now, run in ((room, untouched), (left, filled)):
                if room_now and run[1]:
                    runs[room_now].append(run)
                    with_room |= 1 << room_now
    return np.array(actions, dtype=np.int64).reshape(-1, 4)


def _cumulative(counts: IntArray) -> IntArray:
    """0 and the running totals, int64 [len(counts) + 1]."""
    total = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=total[1:])
    return total
