"""One window of the order: slices of documents packed together, shuffled and cut into full batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from turbolm.data.native import IntArray, argsort_random
from turbolm.data.order.packing import Packing, Sequences, pack, pack_buckets
from turbolm.plan.curriculum import Segment

Grouping = Literal["batch", "window"]
Random = Callable[[int, int], IntArray]  # (count, which use): random numbers, uint64 [count]


@dataclass(frozen=True)
class Slices:
    """Slices of documents: `document`, `start` and `length` are int64 [num_slices], in positions."""

    document: IntArray
    start: IntArray
    length: IntArray

    @staticmethod
    def join(parts: Sequence[Slices]) -> Slices:
        """Concatenate several `Slices`."""
        return Slices(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("document", "start", "length")))

    def select(self, indices: IntArray) -> Slices:
        """Return the slices with these indices, in this order."""
        return Slices(self.document[indices], self.start[indices], self.length[indices])

    def merged(self) -> Slices:
        """Sort by document, and join adjacent slices of one document."""
        slices = self.select(np.lexsort((self.start, self.document)))
        if not len(slices.length):
            return slices
        new = np.ones(len(slices.length), bool)
        ends = slices.start + slices.length
        new[1:] = (slices.document[1:] != slices.document[:-1]) | (slices.start[1:] != ends[:-1])
        first = np.flatnonzero(new)
        return Slices(slices.document[first], slices.start[first], np.add.reduceat(slices.length, first))


@dataclass(frozen=True)
class Window:
    """The batches of a window: batch i is `count[i]` sequences from `first[i]` on of `sequences[which[i]]`."""

    sequences: list[Sequences]  # by length
    which: IntArray
    first: IntArray
    count: IntArray

    def batch(self, index: int) -> Sequences:
        """Return the sequences of one batch."""
        first, count = int(self.first[index]), int(self.count[index])
        return self.sequences[self.which[index]].slice(first, first + count)


def pack_window(slices: Slices, segment: Segment, packing: Packing) -> list[Sequences]:
    """Pack a window's slices into sequences, by length; `document` and `start` are those of the slices."""
    if len(segment.seq_lens) > 1:
        packed = pack_buckets(slices.length, segment.seq_lens)
    else:
        packed = [pack(slices.length, segment.seq_len, packing)]
    return [
        Sequences(p.seq_len, p.offsets, slices.document[p.document], slices.start[p.document] + p.start, p.length)
        for p in packed
    ]


def count_batches(packed: Sequence[Sequences], segment: Segment) -> int:
    """Return the number of full batches that these sequences make."""
    return sum(len(sequences) // (segment.global_batch_tokens // sequences.seq_len) for sequences in packed)


def cycle_order(counts: IntArray, raw: IntArray, *, grow: bool) -> IntArray:
    """Choose the bucket of each batch in a cycle with `counts` batches of each bucket (0: shortest sequences).

    `raw` are random uint64, one per batch. With `grow`, each bucket has twice the odds of the next longer one until it
    is used up, so a cycle begins with mostly short sequences and ends with long ones (Grow-P2 of arXiv 2405.13226).
    Otherwise every batch is equally likely.
    """
    left = counts.tolist()
    order = np.empty(sum(left), np.int64)
    for index, number in enumerate(raw.tolist()):
        odds = [(1 << (len(left) - 1 - bucket)) * (count > 0) for bucket, count in enumerate(left)] if grow else left
        number %= sum(odds)
        bucket = 0
        while number >= odds[bucket]:
            number -= odds[bucket]
            bucket += 1
        order[index] = bucket
        left[bucket] -= 1
    return order


def arrange(
    packed: Sequence[Sequences], segment: Segment, num_steps: int, packing: Packing, grouping: Grouping, random: Random
) -> tuple[Window, Slices]:
    """Return `num_steps` batches of the sequences in training order, and the slices left over.

    With `best_fit` the least full sequences are left over, so their slices are packed again with others. The other
    methods leave the last documents over.
    """
    per_batch = np.array([segment.global_batch_tokens // sequences.seq_len for sequences in packed])
    counts = np.array([len(sequences) for sequences in packed]) // per_batch
    which = cycle_order(counts, random(int(counts.sum()), 0), grow=segment.grow)[:num_steps]
    first = np.zeros_like(which)
    arranged, left = [], []
    for number, sequences in enumerate(packed):
        is_here = which == number
        size = int(per_batch[number])
        num_kept = int(np.count_nonzero(is_here)) * size
        first[is_here] = np.arange(0, num_kept, size)
        order = np.argsort(-sequences.used, kind="stable") if packing == "best_fit" else np.arange(len(sequences))
        kept, rest = order[:num_kept], sequences.select(order[num_kept:])
        if grouping == "window":
            similar = kept[np.argsort(-sequences.attention_cost[kept], kind="stable")].reshape(-1, size)
            kept = similar[argsort_random(random(len(similar), number + 1))].reshape(-1)
        else:
            kept = kept[argsort_random(random(num_kept, number + 1))]
        arranged.append(sequences.select(kept))
        left.append(Slices(rest.document, rest.start, rest.length))
    return Window(arranged, which, first, per_batch[which]), Slices.join(left).merged()
