"""Turn bins into arrays, and deal the bins of a global batch over processes and micro-batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from turbolm.data.packing import Bins, IntArray

if TYPE_CHECKING:
    from turbolm.data.store import Split, TokenStore

IGNORED = -100  # the target that no loss counts, torch's default `ignore_index`


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
    shards, begins, lengths = _pieces(bins, indices.ravel(), store, split)
    ends = np.cumsum(lengths)  # positions of all rows, end to end
    after = ends + np.arange(len(ends))  # where in `tokens` the token after each piece lies
    tokens = _read(store, shards, begins, lengths + 1, bins.seq_len)
    is_input = np.ones(len(tokens), bool)
    is_input[after] = False
    inputs, positions, targets = block.reshape(3, -1)
    inputs_narrow = tokens[is_input]  # still in the cache when it is read for the second time
    inputs[:] = inputs_narrow
    targets[:-1] = inputs_narrow[1:]
    targets[ends - 1] = tokens[after]
    for piece in np.flatnonzero(shards < 0).tolist():
        targets[ends[piece] - lengths[piece] : ends[piece]] = IGNORED
    positions[:] = 1
    positions[0] = 0
    positions[ends[:-1]] = 1 - lengths[:-1]
    np.cumsum(positions, out=positions)
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


def _pieces(bins: Bins, rows: IntArray, store: TokenStore, split: Split) -> tuple[IntArray, IntArray, IntArray]:
    """Shard (-1: padding), first token there and length of every piece of these rows, in their order."""
    real = np.flatnonzero(rows >= 0)
    part = bins.select(rows[real])
    shards, begins = store.locate(split, part.document)
    counts, padding = np.zeros(len(rows), np.int64), np.full(len(rows), bins.seq_len)
    counts[real] = np.diff(part.offsets)
    padding[real] -= part.used
    padded = np.flatnonzero(padding)
    at = np.cumsum(counts)[padded]
    lengths = np.insert(part.length, at, padding[padded])
    return np.insert(shards, at, -1), np.insert(begins + part.start, at, 0), lengths


def _read(store: TokenStore, shards: IntArray, begins: IntArray, counts: IntArray, seq_len: int) -> np.ndarray:
    """So many tokens of each shard (-1: zeros) from where they begin, one after the other, in the store's dtype."""
    # Joining views of bytes does in C what a loop over arrays or `np.concatenate` does at twice the cost.
    dtype = np.dtype(store.manifest["dtype"])
    numbers = shards.tolist()
    memory = {shard: store.token_bytes(shard) for shard in set(numbers) - {-1}}
    memory[-1] = memoryview(bytes((seq_len + 1) * dtype.itemsize))
    begins, ends = begins * dtype.itemsize, (begins + counts) * dtype.itemsize
    columns = zip(numbers, begins.tolist(), ends.tolist(), strict=True)
    return np.frombuffer(b"".join([memory[shard][begin:end] for shard, begin, end in columns]), dtype)


def _split(ends: IntArray, num_micro: int) -> list[IntArray]:
    """The ends of each micro-batch's pieces, counted from its own beginning; all micro-batches have one size."""
    size = int(ends[-1]) // num_micro
    parts = np.split(ends, np.searchsorted(ends, np.arange(1, num_micro) * size, side="right"))
    return [part - number * size for number, part in enumerate(parts)]
