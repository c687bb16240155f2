"""Turn bins into arrays, and deal the bins of a global batch over processes and micro-batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from turbolm.data.batch.rows import fill_rows
from turbolm.data.order.packing import Bins, IntArray

if TYPE_CHECKING:
    from turbolm.data.store.token_store import Split, TokenStore


def deal_bins(attention_cost: IntArray, world_size: int, micro_batch_bins: int) -> IntArray:
    """Bins of a global batch for each process: int64 [num_micro, world_size, micro_batch_bins], -1 where there is none.

    The bins of a micro step cost nearly the same (ranks wait for each other), and inside it they are dealt from dear to
    cheap, one to each rank a round, the dearest to the rank that has least by then; then the rank with most and the one
    with least exchange bins as long as that evens them out. Where the bins do not fill the last
    micro step, its empty places are spread over the ranks, and every rank still runs the same number of micro-batches.
    """
    num_bins, per_micro = len(attention_cost), world_size * micro_batch_bins
    num_micro = -(-num_bins // per_micro)
    by_cost = np.full(num_micro * per_micro, -1, dtype=np.int64)
    by_cost[:num_bins] = np.argsort(-np.asarray(attention_cost), kind="stable")
    rounds = by_cost.reshape(num_micro, micro_batch_bins, world_size)
    if world_size == 1:  # what the loop would come to, at a tenth of a batch's time
        return rounds.reshape(num_micro, 1, micro_batch_bins)
    cost = np.append(attention_cost, 0)[rounds]  # nothing costs nothing
    dealt = np.empty((num_micro, world_size, micro_batch_bins), np.int64)
    total = np.zeros((num_micro, world_size), np.int64)
    for number in range(micro_batch_bins):
        ranks = np.argsort(total, axis=1, kind="stable")
        np.put_along_axis(dealt[:, :, number], ranks, rounds[:, number], axis=1)
        np.put_along_axis(total, ranks, np.take_along_axis(total, ranks, axis=1) + cost[:, number], axis=1)
    if micro_batch_bins > 1:
        _even_out(dealt, np.append(attention_cost, 0)[dealt])
    return dealt


def _even_out(dealt: IntArray, cost: IntArray) -> None:
    """Exchange bins of the dearest and the cheapest rank of each micro step, in place: at most twice for each rank.

    `cost` are the costs of `dealt`, int64 [num_micro, world_size, micro_batch_bins].
    """
    num_micro, world_size, micro_batch_bins = dealt.shape
    micro = np.arange(num_micro)
    for _ in range(2 * world_size):
        total = cost.sum(axis=2)
        most, least = total.argmax(axis=1), total.argmin(axis=1)
        gap = total[micro, most] - total[micro, least]
        less = cost[micro, most][:, :, None] - cost[micro, least][:, None, :]  # what an exchange takes off the dearest
        is_bin = (dealt[micro, most][:, :, None] >= 0) & (dealt[micro, least][:, None, :] >= 0)
        after = np.where(is_bin, np.abs(gap[:, None, None] - 2 * less), gap[:, None, None]).reshape(num_micro, -1)
        best = after.argmin(axis=1)
        better = after[micro, best] < gap
        if not better.any():
            return
        for array in (dealt, cost):
            one, two = (micro, most, best // micro_batch_bins), (micro, least, best % micro_batch_bins)
            left, right = array[one], array[two]
            array[one], array[two] = np.where(better, right, left), np.where(better, left, right)


def collate(
    bins: Bins, indices: IntArray, store: TokenStore, split: Split, max_pieces: int | None = None
) -> list[dict[str, np.ndarray]]:
    """The micro-batches made of the bins `indices` [num_micro, m], where -1 is a row without any target.

    `input_ids`, `position_ids` and `targets` are int64 [m, seq_len]. Targets are shifted already: a target is the token
    that follows its input in the same document, or `IGNORED`. Positions count from 0 in each piece; the padding at the
    end of a row is a piece of its own. With `max_pieces` there is also `cu_seqlens`, see `fill_cu_seqlens`.
    """
    num_micro, micro_batch_bins = indices.shape
    # All arrays in one block: the C library keeps freed memory in proportion to the largest block, and memory that is
    # new to the process costs more than what is written to it here.
    block = np.empty((3, num_micro, micro_batch_bins, bins.seq_len), np.int64)
    ends = fill_rows(block.reshape(3, -1, bins.seq_len), bins, indices.ravel(), store, split)
    names = ("input_ids", "position_ids", "targets")
    micro_batches = [dict(zip(names, block[:, i], strict=True)) for i in range(num_micro)]
    if max_pieces is not None:
        for micro_batch, its_ends in zip(micro_batches, _split(ends, num_micro), strict=True):
            micro_batch["cu_seqlens"] = fill_cu_seqlens(its_ends, max_pieces)
    return micro_batches


def fill_cu_seqlens(ends: IntArray, max_pieces: int) -> np.ndarray:
    """Where the pieces of a micro-batch begin when its rows are laid end to end, int32 [max_pieces + 1].

    `ends` are where the pieces end. After the last piece follow empty ones, so that the shape is always the same.
    """
    assert len(ends) <= max_pieces, f"a micro-batch of {len(ends)} pieces, where there should be {max_pieces} at most"
    boundaries = np.full(max_pieces + 1, ends[-1], np.int32)
    boundaries[0] = 0
    boundaries[1 : len(ends) + 1] = ends
    return boundaries


def _split(ends: IntArray, num_micro: int) -> list[IntArray]:
    """The ends of each micro-batch's pieces, counted from its own beginning; all micro-batches have one size."""
    size = int(ends[-1]) // num_micro
    parts = np.split(ends, np.searchsorted(ends, np.arange(1, num_micro) * size, side="right"))
    return [part - number * size for number, part in enumerate(parts)]
