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

    The bins of a micro step cost nearly the same (ranks wait for each other), and inside it they are dealt to and fro
    over the ranks, from dear to cheap, so that the ranks' sums are close. Where the bins do not fill the last micro
    step, its empty places are spread over the ranks, and every rank still runs the same number of micro-batches.
    """
    num_bins, per_micro = len(attention_cost), world_size * micro_batch_bins
    num_micro = -(-num_bins // per_micro)
    dealt = np.full(num_micro * per_micro, -1, dtype=np.int64)
    dealt[:num_bins] = np.argsort(-np.asarray(attention_cost), kind="stable")
    rounds = dealt.reshape(num_micro * micro_batch_bins, world_size).copy()
    rounds[1::2] = rounds[1::2, ::-1]
    return np.ascontiguousarray(rounds.reshape(num_micro, micro_batch_bins, world_size).transpose(0, 2, 1))


def collate(bins: Bins, indices: IntArray, store: TokenStore, split: Split) -> dict[str, np.ndarray]:
    """The arrays of a micro-batch from the bins `indices` [m], where -1 is a row without any target.

    `input_ids`, `position_ids` and `targets` are int64 [m, seq_len]. Targets are shifted already: a target is the token
    that follows its input in the same document, or `IGNORED`. Positions count from 0 in each piece; the padding at the
    end of a row is a piece of its own.
    """
    shape = (len(indices), bins.seq_len)
    input_ids, targets = np.zeros(shape, np.int64), np.full(shape, IGNORED, np.int64)
    position_ids = np.empty(shape, np.int64)
    counting = np.arange(bins.seq_len)
    for row, index in enumerate(indices):
        used = 0
        if index >= 0:
            for piece in range(bins.offsets[index], bins.offsets[index + 1]):
                start, length = int(bins.start[piece]), int(bins.length[piece])
                tokens = store.read(split, int(bins.document[piece]), start, length)
                input_ids[row, used : used + length] = tokens[:-1]
                targets[row, used : used + length] = tokens[1:]
                position_ids[row, used : used + length] = counting[:length]
                used += length
        position_ids[row, used:] = counting[: bins.seq_len - used]
    return {"input_ids": input_ids, "position_ids": position_ids, "targets": targets}


def cu_seqlens(bins: Bins, indices: IntArray) -> tuple[np.ndarray, int]:
    """Where the pieces of a micro-batch begin when its rows are laid end to end, and the longest of them.

    The boundaries are int32 [num_pieces + 1], from 0 to m * seq_len; padding counts as pieces of its own.
    """
    lengths: list[int] = []
    for index in indices:
        row = bins.length[bins.offsets[index] : bins.offsets[index + 1]].tolist() if index >= 0 else []
        padding = bins.seq_len - sum(row)
        lengths += row + ([padding] if padding else [])
    boundaries = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=boundaries[1:])
    return boundaries, max(lengths, default=0)
