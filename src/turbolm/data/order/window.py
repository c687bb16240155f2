"""One window of the order: pieces of documents packed together, shuffled and cut into whole batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from turbolm.data.order.buckets import cycle_order, pack_buckets
from turbolm.data.order.packing import Bins, IntArray, pack_best_fit, pack_concat, pack_single
from turbolm.data.order.stream import order_by
from turbolm.plan.curriculum import Segment

Packing = Literal["best_fit", "concat", "single"]
Grouping = Literal["batch", "window"]
_PACK = {"best_fit": pack_best_fit, "concat": pack_concat, "single": pack_single}

Random = Callable[[int, int], IntArray]  # (count, which use): random numbers, uint64 [count]


def pack(lengths: IntArray, seq_len: int, packing: Packing) -> Bins:
    """Pack documents of these lengths (positions) by the method a recipe names."""
    return _PACK[packing](lengths, seq_len)


@dataclass(frozen=True)
class Pieces:
    """Parts of documents: `document`, `start` and `length` are int64 [num_pieces], in positions."""

    document: IntArray
    start: IntArray
    length: IntArray

    @staticmethod
    def whole(document: IntArray, length: IntArray) -> Pieces:
        """Documents from their first position to their last."""
        return Pieces(document, np.zeros_like(document), length)

    @staticmethod
    def join(parts: Sequence[Pieces]) -> Pieces:
        """The pieces of every part, one after the other."""
        return Pieces(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("document", "start", "length")))

    def select(self, places: IntArray) -> Pieces:
        """The pieces at these places."""
        return Pieces(self.document[places], self.start[places], self.length[places])

    def merged(self) -> Pieces:
        """In the order of documents, pieces that follow each other in one document joined."""
        pieces = self.select(np.lexsort((self.start, self.document)))
        if not len(pieces.length):
            return pieces
        new = np.ones(len(pieces.length), bool)
        ends = pieces.start + pieces.length
        new[1:] = (pieces.document[1:] != pieces.document[:-1]) | (pieces.start[1:] != ends[:-1])
        first = np.flatnonzero(new)
        return Pieces(pieces.document[first], pieces.start[first], np.add.reduceat(pieces.length, first))


@dataclass(frozen=True)
class Window:
    """The batches of a window: batch i is `count[i]` bins from `first[i]` on of `bins[which[i]]`."""

    bins: list[Bins]  # by row length
    which: IntArray
    first: IntArray
    count: IntArray

    def __len__(self) -> int:
        return len(self.which)

    def batch(self, index: int) -> Bins:
        """The bins of one batch."""
        first, count = int(self.first[index]), int(self.count[index])
        return self.bins[self.which[index]].slice(first, first + count)


def pack_window(pieces: Pieces, segment: Segment, packing: Packing) -> list[Bins]:
    """The window's bins by row length; `document` and `start` are those of the pieces."""
    if len(segment.seq_lens) > 1:
        packed = pack_buckets(pieces.length, segment.seq_lens)
    else:
        packed = [pack(pieces.length, segment.seq_len, packing)]
    return [
        Bins(b.seq_len, b.offsets, pieces.document[b.document], pieces.start[b.document] + b.start, b.length)
        for b in packed
    ]


def count_batches(packed: Sequence[Bins], segment: Segment) -> int:
    """The whole batches that these bins fill."""
    return sum(len(bins) // (segment.global_batch_tokens // bins.seq_len) for bins in packed)


def arrange(
    packed: Sequence[Bins], segment: Segment, num_steps: int, packing: Packing, grouping: Grouping, random: Random
) -> tuple[Window, Pieces]:
    """`num_steps` batches of the bins, in the order they are trained on, and the pieces left over.

    The least full bins of `best_fit` are left over, so that their pieces are packed again with others; the other
    methods leave the last documents.
    """
    per_batch = np.array([segment.global_batch_tokens // bins.seq_len for bins in packed])
    counts = np.array([len(bins) for bins in packed]) // per_batch
    which = cycle_order(counts, random(int(counts.sum()), 0), grow=segment.grow)[:num_steps]
    first = np.zeros_like(which)
    arranged, left = [], []
    for number, bins in enumerate(packed):
        is_here = which == number
        size = int(per_batch[number])
        first[is_here] = np.arange(np.count_nonzero(is_here)) * size
        order = np.argsort(-bins.used, kind="stable") if packing == "best_fit" else np.arange(len(bins))
        num_kept = int(np.count_nonzero(is_here)) * size
        kept, rest = order[:num_kept], bins.select(order[num_kept:])
        if grouping == "window":
            similar = kept[np.argsort(-bins.attention_cost[kept], kind="stable")].reshape(-1, size)
            kept = similar[order_by(random(len(similar), number + 1))].reshape(-1)
        else:
            kept = kept[order_by(random(num_kept, number + 1))]
        arranged.append(bins.select(kept))
        left.append(Pieces(rest.document, rest.start, rest.length))
    return Window(arranged, which, first, per_batch[which]), Pieces.join(left).merged()
