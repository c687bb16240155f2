"""Pack documents into bins of `seq_len` positions: which part of which document lies in which bin.

A document of `length` positions is cut only when it is longer than a bin. Its full pieces are bins of their own; what
is left over, and every shorter document, is placed by best fit decreasing. Best fit depends on lengths alone, so the
loop below runs over groups of equal pieces and equal bins rather than over documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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


def pack_best_fit(lengths: IntArray, seq_len: int) -> Bins:
    """Best fit decreasing (`lengths`: positions, int64 [num_documents]). Bins of one full piece come first."""
    lengths = np.asarray(lengths, dtype=np.int64)
    num_full, rest = np.divmod(lengths, seq_len)
    full_document = np.repeat(np.arange(len(lengths)), num_full)
    full_start = (np.arange(len(full_document)) - np.repeat(_cumulative(num_full)[:-1], num_full)) * seq_len

    document = np.flatnonzero(rest)
    document = document[_stable_argsort(seq_len - rest[document], seq_len)]  # longest first, then by number
    first_bin, num_bins, pieces_each = _place(np.bincount(rest[document], minlength=seq_len), seq_len)
    num_rest_bins = int((first_bin + num_bins).max(initial=0))
    # An action puts `pieces_each` consecutive pieces into each of `num_bins` consecutive bins.
    num_placed = num_bins * pieces_each
    within = np.arange(len(document)) - np.repeat(_cumulative(num_placed)[:-1], num_placed)
    bin_of_piece = np.repeat(first_bin, num_placed) + within // np.repeat(pieces_each, num_placed)
    document = document[_stable_argsort(bin_of_piece, num_rest_bins)]

    num_pieces = np.concatenate([np.ones(len(full_document), np.int64), np.bincount(bin_of_piece, minlength=0)])
    return Bins(
        seq_len,
        _cumulative(num_pieces),
        np.concatenate([full_document, document]),
        np.concatenate([full_start, num_full[document] * seq_len]),
        np.concatenate([np.full(len(full_document), seq_len), rest[document]]),
    )


def count_best_fit(lengths: IntArray, seq_len: int) -> int:
    """`len(pack_best_fit(lengths, seq_len))` without saying which document lies where."""
    lengths = np.asarray(lengths, dtype=np.int64)
    num_full, rest = np.divmod(lengths, seq_len)
    histogram = np.bincount(rest, minlength=seq_len)
    histogram[0] = 0
    first_bin, num_bins, _ = _place(histogram, seq_len)
    return int(num_full.sum()) + int((first_bin + num_bins).max(initial=0))


def count_single(lengths: IntArray, seq_len: int) -> int:
    """`len(pack_single(lengths, seq_len))`."""
    return int((-(-np.asarray(lengths, dtype=np.int64) // seq_len)).sum())


def _place(histogram: IntArray, seq_len: int) -> tuple[IntArray, IntArray, IntArray]:
    """Best fit decreasing over `histogram[length]` pieces, as actions in the order of the pieces, longest first.

    Action i puts `pieces_each[i]` pieces of one length into each of the bins `first_bin[i] + range(num_bins[i])`.
    Strict best fit keeps filling the bin it has just used: what is left there is smaller than in any other bin with
    room, so long as another piece of the same length goes in. That is why a bin takes `room // length` at once.
    """
    actions: list[tuple[int, int, int]] = []
    runs: list[list[tuple[int, int]]] = [[] for _ in range(seq_len + 1)]  # by room: (first bin, number of bins)
    with_room = 0  # bit r is set where runs[r] is not empty
    next_bin = 0
    sizes = np.flatnonzero(histogram)[::-1]
    for length, count in zip(sizes.tolist(), histogram[sizes].tolist(), strict=True):
        while count:
            fitting = with_room >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                first, available = runs[room].pop()
                if not runs[room]:
                    with_room ^= 1 << room
            else:
                room, first = seq_len, next_bin
                available = -(-count // (seq_len // length))
                next_bin += available
            each = room // length
            used = min(available, count // each)
            if not used:  # fewer pieces left than one bin takes
                each, used = count, 1
            actions.append((first, used, each))
            count -= used * each
            left = room - each * length
            for room_now, run in ((room, (first + used, available - used)), (left, (first, used))):
                if room_now and run[1]:
                    runs[room_now].append(run)
                    with_room |= 1 << room_now
    table = np.array(actions, dtype=np.int64).reshape(-1, 3)
    return table[:, 0], table[:, 1], table[:, 2]


def _stable_argsort(keys: IntArray, bound: int) -> IntArray:
    """Stable argsort of keys from 0 to `bound`, 16 bits at a time: NumPy sorts those by radix, in linear time."""
    order = np.argsort((keys & 0xFFFF).astype(np.uint16), kind="stable")
    shift = 16
    while bound >> shift:
        digits = ((keys[order] >> shift) & 0xFFFF).astype(np.uint16)
        order = order[np.argsort(digits, kind="stable")]
        shift += 16
    return order


def _cumulative(counts: IntArray) -> IntArray:
    """0 and the running totals, int64 [len(counts) + 1]."""
    total = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=total[1:])
    return total
