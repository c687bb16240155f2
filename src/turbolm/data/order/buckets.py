"""Dataset decomposition: every document in pieces whose lengths are powers of two of a smallest one (arXiv 2405.13226).

A document is read from its beginning in ever shorter pieces, so no piece is padded and none holds two documents; only
what is shorter than the smallest bucket is packed into rows of that length.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from turbolm.data.order.packing import Bins, IntArray, concatenate, pack_best_fit


def pack_buckets(lengths: IntArray, seq_lens: Sequence[int]) -> list[Bins]:
    """Bins of each of `seq_lens` (each twice the one before) from documents of these lengths (positions)."""
    lengths = np.asarray(lengths, dtype=np.int64)
    smallest, longest = seq_lens[0], seq_lens[-1]
    num_longest, rest = np.divmod(lengths, longest)
    packed = []
    start = num_longest * longest
    document = np.repeat(np.arange(len(lengths)), num_longest)
    number = np.arange(len(document)) - np.repeat(np.cumsum(num_longest) - num_longest, num_longest)
    packed.append(_one_piece_bins(longest, document, number * longest))
    for seq_len in reversed(seq_lens[:-1]):
        document = np.flatnonzero(rest & seq_len if seq_len & (seq_len - 1) == 0 else rest >= seq_len)
        packed.append(_one_piece_bins(seq_len, document, start[document]))
        start[document] += seq_len
        rest[document] -= seq_len
    document = np.flatnonzero(rest)
    small = pack_best_fit(rest[document], smallest)
    shifted = Bins(
        smallest, small.offsets, document[small.document], start[document][small.document] + small.start, small.length
    )
    packed[-1] = concatenate([packed[-1], shifted])
    return packed[::-1]


def cycle_order(counts: IntArray, raw: IntArray, *, grow: bool) -> IntArray:
    """The bucket of each batch of a cycle that uses up `counts` batches of each bucket (0: shortest rows).

    `raw` are random uint64, one a batch. With `grow`, a bucket is drawn at odds that double with every shorter one as
    long as it lasts, so that a cycle begins with mostly short rows and ends with long ones (Grow-P2 of the paper);
    else every batch is as likely.
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


def _one_piece_bins(seq_len: int, document: IntArray, start: IntArray) -> Bins:
    return Bins(seq_len, np.arange(len(document) + 1), document, start, np.full(len(document), seq_len))
