"""Deal the sequences of a global batch to ranks and micro-batches, and read their tokens into arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from turbolm.data import native
from turbolm.data.native import IntArray
from turbolm.data.order.packing import Sequences
from turbolm.errors import UserError
from turbolm.plan.batch import IGNORED_TARGET, few_sizes

if TYPE_CHECKING:
    from turbolm.data.store.token_store import Split, TokenStore


def deal_sequences(attention_cost: IntArray, world_size: int, micro_batch_size: int) -> IntArray:
    """Deal a global batch: int64 [num_micro, world_size, micro_batch_size] sequences, -1 for an empty slot.

    The sequences of a micro-step cost nearly the same, because ranks wait for each other. Within a micro-step, deal
    sequences most expensive first, one per rank per round, the next one to the least-loaded rank. Then the most and the
    least loaded rank swap sequences while that reduces their difference. Where the sequences do not fill the last
    micro-step, its empty slots are spread over the ranks, and every rank still runs the same number of micro-batches.
    """
    num_sequences, per_micro = len(attention_cost), world_size * micro_batch_size
    num_micro = -(-num_sequences // per_micro)
    by_cost = np.full(num_micro * per_micro, -1, dtype=np.int64)
    by_cost[:num_sequences] = np.argsort(-np.asarray(attention_cost), kind="stable")
    rounds = by_cost.reshape(num_micro, micro_batch_size, world_size)
    if world_size == 1:  # the result of the loop, a tenth of a batch's time faster
        return rounds.reshape(num_micro, 1, micro_batch_size)
    cost = np.append(attention_cost, 0)[rounds]  # an empty slot costs nothing
    dealt = np.empty((num_micro, world_size, micro_batch_size), np.int64)
    total = np.zeros((num_micro, world_size), np.int64)
    for number in range(micro_batch_size):
        ranks = np.argsort(total, axis=1, kind="stable")
        np.put_along_axis(dealt[:, :, number], ranks, rounds[:, number], axis=1)
        np.put_along_axis(total, ranks, np.take_along_axis(total, ranks, axis=1) + cost[:, number], axis=1)
    if micro_batch_size > 1:
        _even_out(dealt, np.append(attention_cost, 0)[dealt])
    return dealt


def _even_out(dealt: IntArray, cost: IntArray) -> None:
    """Swap sequences of the most and the least loaded rank of each micro-step, in place: at most twice for each rank.

    `cost` has the costs of `dealt`, int64 [num_micro, world_size, micro_batch_size].
    """
    num_micro, world_size, micro_batch_size = dealt.shape
    micro = np.arange(num_micro)
    for _ in range(2 * world_size):
        total = cost.sum(axis=2)
        most, least = total.argmax(axis=1), total.argmin(axis=1)
        gap = total[micro, most] - total[micro, least]
        less = cost[micro, most][:, :, None] - cost[micro, least][:, None, :]  # what a swap saves the most loaded rank
        is_sequence = (dealt[micro, most][:, :, None] >= 0) & (dealt[micro, least][:, None, :] >= 0)
        after = np.where(is_sequence, np.abs(gap[:, None, None] - 2 * less), gap[:, None, None]).reshape(num_micro, -1)
        best = after.argmin(axis=1)
        better = after[micro, best] < gap
        if not better.any():
            return
        for array in (dealt, cost):
            one, two = (micro, most, best // micro_batch_size), (micro, least, best % micro_batch_size)
            left, right = array[one], array[two]
            array[one], array[two] = np.where(better, right, left), np.where(better, left, right)


def collate(
    sequences: Sequences,
    indices: IntArray,
    store: TokenStore,
    split: Split,
    max_slices: int | None = None,
    empty: Callable[[tuple[int, ...]], np.ndarray] | None = None,
    *,
    part: slice | None = None,
) -> list[dict[str, np.ndarray]]:
    """Build the micro-batches of the sequences `indices` [num_micro, m]; -1 is a sequence without any target.

    `input_ids`, `position_ids` and `targets` are int64 [m, seq_len]. Targets are shifted already: a target is the token
    that follows its input in the same document, or `IGNORED_TARGET`. Positions count from 0 in each slice; the padding
    at the end of a sequence is a separate slice. With `max_slices` there is also `cu_seqlens`, see `fill_cu_seqlens`.
    `empty` allocates their int64 block, by default as numpy does.

    With `part` the three hold that slice of every sequence, and `whole_position_ids`, int64 [m, seq_len], are the
    positions of all of it, by which a rank knows the documents without asking those that have the other slices.
    """
    num_micro, micro_batch_size = indices.shape
    # All arrays share one block: the C library keeps freed memory in proportion to the largest block, and getting new
    # memory costs more than filling it here.
    shape = (3, num_micro, micro_batch_size, sequences.seq_len)
    block = np.empty(shape, np.int64) if empty is None or part is not None else empty(shape)
    ends = fill(block.reshape(3, -1, sequences.seq_len), sequences, indices.ravel(), store, split)
    whole_positions = block[1]
    if part is not None:
        whole, shape = block[..., part], (*shape[:-1], part.stop - part.start)
        block = np.empty(shape, np.int64) if empty is None else empty(shape)
        block[:] = whole
    names = ("input_ids", "position_ids", "targets")
    micro_batches = [dict(zip(names, block[:, i], strict=True)) for i in range(num_micro)]
    if part is not None:
        for micro_batch, positions in zip(micro_batches, whole_positions, strict=True):
            micro_batch["whole_position_ids"] = positions
    if max_slices is not None:
        for micro_batch, its_ends in zip(micro_batches, _split(ends, num_micro), strict=True):
            micro_batch["cu_seqlens"] = fill_cu_seqlens(its_ends, max_slices)
    return micro_batches


def documents_at(sequences: Sequences, indices: IntArray) -> IntArray:
    """Return the document of each position of the sequences `indices` [m]: int64 [m, seq_len], -1 for padding."""
    filled = np.flatnonzero(indices >= 0)
    chosen = sequences.select(indices[filled])
    found = np.full((len(indices), sequences.seq_len), -1)
    # Slices fill a sequence from its start, and `chosen` has them in this order.
    is_used = np.arange(sequences.seq_len) < chosen.used[:, None]
    found[filled[np.nonzero(is_used)[0]], np.nonzero(is_used)[1]] = np.repeat(chosen.document, chosen.length)
    return found


def fill_cu_seqlens(ends: IntArray, max_slices: int) -> np.ndarray:
    """Return where the slices of a micro-batch begin when its sequences are put end to end, int32.

    `ends` are the ends of the slices. Empty slices pad the result, so that it has one of few sizes (`few_sizes` of the
    slices, and one entry more): a compiler makes a graph for each, and attention starts blocks for every slice.
    """
    assert len(ends) <= max_slices, f"a micro-batch of {len(ends)} slices, where there should be {max_slices} at most"
    boundaries = np.full(few_sizes(len(ends), max_slices) + 1, ends[-1], np.int32)
    boundaries[0] = 0
    boundaries[1 : len(ends) + 1] = ends
    return boundaries


def _split(ends: IntArray, num_micro: int) -> list[IntArray]:
    """Return the ends of each micro-batch's slices, relative to its start; all micro-batches have one size."""
    size = int(ends[-1]) // num_micro
    parts = np.split(ends, np.searchsorted(ends, np.arange(1, num_micro) * size, side="right"))
    return [part - number * size for number, part in enumerate(parts)]


def fill(block: IntArray, sequences: Sequences, indices: IntArray, store: TokenStore, split: Split) -> IntArray:
    """Write inputs, positions and targets of the sequences `indices` to `block`, int64 [3, len(indices), seq_len].

    Index -1 gives padding only. Returns the ends of the slices when all sequences are put end to end; the padding at
    the end of a sequence is a slice too. Raises UserError for a slice outside its shard.
    """
    shards = store.shards(split, sequences.select(indices[indices >= 0]).document)
    ends, outside = native.fill(block, shards, store.manifest["dtype"], sequences, indices, IGNORED_TARGET)
    if outside is not None:
        shard = store.locate(split, int(sequences.document[outside]))[0]
        file = store.folder / store.manifest["shards"][shard]["index"]["file"]
        raise UserError(f"{file} has documents beyond the end of their shard; `turbolm verify` lists what is corrupt")
    return ends
