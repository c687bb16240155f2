"""Rows of tokens: read the pieces of bins from a store into arrays, by compiled code where there is any."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from turbolm.data import native
from turbolm.data.order.packing import Bins, IntArray
from turbolm.errors import UserError

if TYPE_CHECKING:
    from turbolm.data.store.token_store import Split, TokenStore

IGNORED = -100  # the target that no loss counts, torch's default `ignore_index`


def fill_rows(block: IntArray, bins: Bins, rows: IntArray, store: TokenStore, split: Split) -> IntArray:
    """Write inputs, positions and targets of the bins `rows`, -1 for none, to `block`, int64 [3, len(rows), seq_len].

    Returns where their pieces end when all rows are laid end to end; the padding that ends a row is a piece too.
    Raises UserError where a piece lies outside its shard.
    """
    return (_fill_compiled if native.library() else _fill_numpy)(block, bins, rows, store, split)


def _fill_compiled(block: IntArray, bins: Bins, rows: IntArray, store: TokenStore, split: Split) -> IntArray:
    dtype = store.manifest["dtype"]
    try:
        ends, outside = native.fill(block, store.shards(split), dtype, bins, rows)
    except native.NotOpen:
        documents = bins.select(rows[rows >= 0]).document
        ends, outside = native.fill(block, store.shards(split, documents), dtype, bins, rows)
    if outside is not None:
        raise _outside(store, int(store.locate(split, bins.document[outside : outside + 1])[0][0]))
    return ends


def _fill_numpy(block: IntArray, bins: Bins, rows: IntArray, store: TokenStore, split: Split) -> IntArray:
    shards, begins, lengths = _pieces(bins, rows, store, split)
    tokens = {shard: store.tokens(shard) for shard in np.unique(shards).tolist() if shard >= 0}
    for shard, its_tokens in tokens.items():
        here = shards == shard
        if begins[here].min() < 0 or (begins + lengths)[here].max() >= len(its_tokens):
            raise _outside(store, shard)
    # Joining views of bytes does in C what a loop over arrays or `np.concatenate` does at twice the cost.
    dtype = np.dtype(store.manifest["dtype"])
    memory = {shard: its_tokens.view(np.uint8).data for shard, its_tokens in tokens.items()}
    memory[-1] = memoryview(bytes((bins.seq_len + 1) * dtype.itemsize))
    first_bytes, end_bytes = begins * dtype.itemsize, (begins + lengths + 1) * dtype.itemsize
    columns = zip(shards.tolist(), first_bytes.tolist(), end_bytes.tolist(), strict=True)
    joined = np.frombuffer(b"".join([memory[shard][first:end] for shard, first, end in columns]), dtype)
    ends = np.cumsum(lengths)
    after = ends + np.arange(len(ends))  # where in `joined` the token after each piece lies
    is_input = np.ones(len(joined), bool)
    is_input[after] = False
    inputs, positions, targets = block.reshape(3, -1)
    inputs_narrow = joined[is_input]  # still in the cache when it is read for the second time
    inputs[:] = inputs_narrow
    targets[:-1] = inputs_narrow[1:]
    targets[ends - 1] = joined[after]
    for piece in np.flatnonzero(shards < 0).tolist():
        targets[ends[piece] - lengths[piece] : ends[piece]] = IGNORED
    positions[:] = 1
    positions[0] = 0
    positions[ends[:-1]] = 1 - lengths[:-1]
    np.cumsum(positions, out=positions)
    return ends


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


def _outside(store: TokenStore, shard: int) -> UserError:
    file = store.folder / store.manifest["shards"][shard]["index"]["file"]
    return UserError(f"{file} has documents beyond the end of their shard; `turbolm verify` tells what is damaged")
