"""Pack documents into sequences of `seq_len` positions: which slice of which document goes into which sequence.

`best_fit` cuts a document only where it is longer than a sequence. Each full slice is its own sequence; the rest of the
document, and every shorter document, is packed by best fit decreasing. Best fit depends only on lengths, so its loop
runs over groups of equal slices and equal sequences, not over documents. `concat` puts documents end to end and cuts
wherever a sequence is full: only the last sequence is padded. `single` gives each slice its own sequence.
`pack_buckets` is dataset decomposition (arXiv 2405.13226).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from turbolm.data import native
from turbolm.data.native import IntArray

_SORT_BLOCK = 2**16  # keys that fit in a core's cache

Packing = Literal["best_fit", "concat", "single"]


@dataclass(frozen=True)
class Sequences:
    """Packed sequences: sequence s holds the slices `offsets[s]:offsets[s + 1]`.

    `offsets` is int64 [num_sequences + 1]; `document`, `start` and `length` are int64 [num_slices], start and length in
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
        """Return the positions that hold a document, and so a target; the rest of `len(self) * seq_len` is padding."""
        return int(self.length.sum())

    @property
    def used(self) -> IntArray:
        """Return the used positions, int64 [num_sequences]."""
        return np.diff(_cumulative(self.length)[self.offsets])

    @property
    def attention_cost(self) -> IntArray:
        """Return the sum of squared slice lengths for each sequence, int64 [num_sequences]."""
        return np.diff(_cumulative(self.length**2)[self.offsets])

    def select(self, indices: IntArray) -> Sequences:
        """Return the sequences with these indices, in this order."""
        indices = np.asarray(indices, dtype=np.int64)
        counts = self.offsets[indices + 1] - self.offsets[indices]
        offsets = _cumulative(counts)
        slices = np.arange(offsets[-1]) + np.repeat(self.offsets[indices] - offsets[:-1], counts)
        return Sequences(self.seq_len, offsets, self.document[slices], self.start[slices], self.length[slices])

    def slice(self, first: int, end: int) -> Sequences:
        """Return the sequences from `first` to `end` (exclusive); only their offsets are copied."""
        begin, stop = self.offsets[first], self.offsets[end]
        slices = [column[begin:stop] for column in (self.document, self.start, self.length)]
        return Sequences(self.seq_len, self.offsets[first : end + 1] - begin, *slices)


def concatenate(parts: Sequence[Sequences]) -> Sequences:
    """Concatenate several `Sequences`."""
    counts = np.concatenate([np.diff(part.offsets) for part in parts])
    fields = [np.concatenate([getattr(part, name) for part in parts]) for name in ("document", "start", "length")]
    return Sequences(parts[0].seq_len, _cumulative(counts), *fields)


def pack(lengths: IntArray, seq_len: int, packing: Packing) -> Sequences:
    """Pack documents of these lengths (positions, int64 [num_documents]) by the method a recipe names."""
    return {"best_fit": pack_best_fit, "concat": pack_concat, "single": pack_single}[packing](lengths, seq_len)


def evaluation_packing(packing: Packing) -> Packing:
    """Return how a run that trains with `packing` packs what it evaluates: by best fit unless documents are alone.

    So a run that trains with `concat` is evaluated like any other.
    """
    return "single" if packing == "single" else "best_fit"


def pack_single(lengths: IntArray, seq_len: int) -> Sequences:
    """Put each slice into its own sequence, in the order of the documents."""
    lengths = np.asarray(lengths, dtype=np.int64)
    num_slices = -(-lengths // seq_len)
    document = np.repeat(np.arange(len(lengths)), num_slices)
    start = (np.arange(len(document)) - np.repeat(_cumulative(num_slices)[:-1], num_slices)) * seq_len
    return _one_slice_each(seq_len, document, start, np.minimum(lengths[document] - start, seq_len))


def pack_concat(lengths: IntArray, seq_len: int) -> Sequences:
    """Put documents end to end and cut every `seq_len` positions."""
    lengths = np.asarray(lengths, dtype=np.int64)
    begins = _cumulative(lengths)
    first, last = begins[:-1] // seq_len, (begins[1:] - 1) // seq_len  # sequence of each document
    num_slices = np.where(lengths > 0, last - first + 1, 0)
    document = np.repeat(np.arange(len(lengths)), num_slices)
    sequence = np.arange(len(document)) + np.repeat(first - _cumulative(num_slices)[:-1], num_slices)
    begin = np.maximum(begins[document], sequence * seq_len)
    end = np.minimum(begins[document + 1], (sequence + 1) * seq_len)
    return Sequences(seq_len, _cumulative(np.bincount(sequence)), document, begin - begins[document], end - begin)


def pack_best_fit(lengths: IntArray, seq_len: int) -> Sequences:
    """Pack by best fit decreasing. Sequences of one full slice come first."""
    num_full, rest = np.divmod(np.asarray(lengths, dtype=np.int64), seq_len)
    long = np.flatnonzero(num_full)
    full = pack_single(num_full[long] * seq_len, seq_len)
    full = replace(full, document=long[full.document])
    document = _stable_argsort(seq_len - rest, seq_len)[: np.count_nonzero(rest)]
    histogram = np.bincount(rest, minlength=seq_len)
    histogram[0] = 0
    sizes, position = _arrange(*_best_fit(histogram, seq_len))
    slices = np.zeros((3, len(document)), np.int64)  # document, start, length; few documents have a full slice before
    slices[0, position] = document
    of_long = np.flatnonzero((num_full > 0)[document])
    slices[1, position[of_long]] = num_full[document[of_long]] * seq_len
    slices[2, position] = np.repeat(np.arange(seq_len - 1, -1, -1), histogram[::-1])
    rests = Sequences(seq_len, _cumulative(sizes), *slices)
    return concatenate([full, rests]) if len(full) else rests


def _stable_argsort(keys: IntArray, bound: int) -> IntArray:
    """Return the stable argsort, int64, of integers from 0 to a small `bound`.

    NumPy sorts 16 bits by radix, in linear time while the keys are in a core's cache: they are sorted block by block.
    """
    small = keys.astype(np.uint16 if bound < 2**16 else np.int64)
    if len(small) <= _SORT_BLOCK:
        return np.argsort(small, kind="stable")
    order = np.empty(len(keys), np.int64)
    next_index = _cumulative(np.bincount(keys, minlength=bound + 1))[:-1]  # of each key
    for first in range(0, len(keys), _SORT_BLOCK):
        block = slice(first, first + _SORT_BLOCK)
        counts = np.bincount(keys[block], minlength=bound + 1)
        index = np.repeat(next_index - _cumulative(counts)[:-1], counts) + np.arange(len(small[block]))
        order[index] = np.argsort(small[block], kind="stable") + first
        next_index += counts
    return order


def pack_buckets(lengths: IntArray, seq_lens: Sequence[int]) -> list[Sequences]:
    """Pack documents of these lengths (positions) into sequences of `seq_lens`, each twice the one before.

    A document is cut from its start into shorter and shorter slices, so no slice is padded and no sequence holds two
    documents. Only slices shorter than the smallest bucket are packed together, into sequences of that length.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    smallest, longest = seq_lens[0], seq_lens[-1]
    rest = lengths % longest
    packed = [pack_single(lengths - rest, longest)]
    for seq_len in reversed(seq_lens[:-1]):
        document = np.flatnonzero(rest >= seq_len)
        start = (lengths - rest)[document]
        packed.append(_one_slice_each(seq_len, document, start, np.full(len(document), seq_len)))
        rest[document] -= seq_len
    document = np.flatnonzero(rest)
    small = pack_best_fit(rest[document], smallest)
    document, start = document[small.document], (lengths - rest)[document][small.document]
    small = Sequences(smallest, small.offsets, document, start + small.start, small.length)
    packed[-1] = concatenate([packed[-1], small])
    return packed[::-1]


def _one_slice_each(seq_len: int, document: IntArray, start: IntArray, length: IntArray) -> Sequences:
    return Sequences(seq_len, np.arange(len(document) + 1), document, start, length)


def _arrange(first: IntArray, num_sequences: IntArray, each: IntArray, before: IntArray) -> tuple[IntArray, IntArray]:
    """Apply the actions of `_best_fit`. Returns the slices per sequence, and the rank of each slice over all
    sequences."""
    visits = _cumulative(num_sequences)  # a visit is an action at one of its sequences
    sequence = np.arange(visits[-1]) + np.repeat(first - visits[:-1], num_sequences)
    each, before = np.repeat(each, num_sequences), np.repeat(before, num_sequences)
    sizes = np.bincount(sequence, weights=each).astype(np.int64)  # sums in float64, exact below 2**53
    first_position = _cumulative(sizes)[sequence] + before
    ends = np.cumsum(each)
    position = np.repeat(first_position - ends + each, each)
    position += np.arange(len(position))
    return sizes, position


def _best_fit(histogram: IntArray, seq_len: int) -> tuple[IntArray, ...]:
    """Run best fit decreasing over `histogram[length]` slices. Returns actions in the order of the slices, longest
    first.

    Action i puts `each[i]` slices of one length into each of the sequences `first[i] + range(num_sequences[i])`, which
    hold `before[i]` slices each at that point. Strict best fit keeps filling the sequence it has just used: as long as
    another slice of the same length fits, that sequence has less room than any other with enough. So a sequence takes
    `room // length` slices at once.
    """
    sizes = np.flatnonzero(histogram)[::-1]
    return tuple(native.best_fit(np.ascontiguousarray(sizes), histogram[sizes], seq_len).T)


def _cumulative(counts: IntArray) -> IntArray:
    """Return 0 and the running totals, int64 [len(counts) + 1]."""
    total = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=total[1:])
    return total
