"""Load global batches as each rank sees them, prefetched by one thread; and the evaluation set."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

import numpy as np

from turbolm.data.batch.collate import collate, deal_sequences
from turbolm.data.order.batch_order import BatchOrder
from turbolm.data.order.packing import IntArray, Sequences, evaluation_packing
from turbolm.data.order.window import Packing, pack
from turbolm.data.store.token_store import Split, TokenStore, check_held_out
from turbolm.plan.batch import choose_micro_batch_size, slice_of_sequence
from turbolm.recipe.schema import Recipe


@dataclass(frozen=True)
class GlobalBatch:
    """A global batch and this rank's part of it.

    `micro_batches` has the same length on every rank; the arrays are those of `collate`. `dealt` is int64 [num_micro,
    num_groups, micro_batch_size]: the indices in `sequences` of every rank, or group of ranks that share them, -1 for
    an empty slot; `indices` are those of this rank. All statistics are of the full global batch and the same on every
    rank.
    """

    index: int
    sequences: Sequences
    dealt: IntArray
    indices: IntArray
    micro_batches: list[dict[str, np.ndarray]]

    @property
    def num_targets(self) -> int:
        """Return the number of valid targets in the global batch."""
        return self.sequences.num_positions

    @property
    def num_documents(self) -> int:
        """Return the number of distinct documents; those cut into slices count once."""
        return len(np.unique(self.sequences.document))

    @property
    def padding_fraction(self) -> float:
        """Return the share of positions that hold no document (without empty slots of the last micro-step)."""
        return 1 - self.num_targets / (len(self.sequences) * self.sequences.seq_len)

    @property
    def imbalance(self) -> float:
        """Return the attention cost of the most loaded rank over the mean, over micro-steps: 1 if ranks never wait."""
        cost = np.append(self.sequences.attention_cost, 0)[self.dealt].sum(axis=2)
        return float(cost.max(axis=1).sum() / cost.mean(axis=1).sum())

    @property
    def samples_digest(self) -> str:
        """Return the batch's ledger entry: the first 64 bits, in hexadecimal, of the SHA-256 of its slices' columns."""
        slices = np.stack([self.sequences.document, self.sequences.start, self.sequences.length]).astype("<i8")
        return hashlib.sha256(slices.tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Layout:
    """How the sequences of a global batch lie on the ranks, of which groups of `shared_by` share theirs."""

    world_size: int
    rank: int
    shared_by: int
    micro_batch_size: int

    def slice_of(self, seq_len: int) -> slice | None:
        """Return the tokens that this rank has of every sequence of its group; None for all of them."""
        alone = self.shared_by == 1
        return None if alone else slice_of_sequence(seq_len, self.shared_by, self.rank % self.shared_by)


class Memory(Protocol):
    """Memory to read batches into that a device copies from, such as `train.pinned.PinnedMemory`."""

    def start_thread(self) -> None:
        """Prepare the calling thread for `empty`."""

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return an int64 array without values."""

    def held_until_read(self, batches: Generator[GlobalBatch, None, None]) -> Generator[GlobalBatch, None, None]:
        """Yield `batches`, and keep each until the device has read it."""


@dataclass(frozen=True)
class BatchLoader:
    """Loads the global batches of `order` from `store` for one rank.

    `micro_batch` is the recipe's: tokens of one forward pass on one process, or `auto`. With `max_slices`, the most
    slices in a sequence by sequence length (`order.max_slices`), micro-batches hold `cu_seqlens` of few sizes.
    Batches are read into `memory`, by default the process's own. Groups of `shared_by` neighboring ranks share their
    sequences: each holds a slice, see `collate`.
    """

    order: BatchOrder
    store: TokenStore
    split: Split
    world_size: int
    rank: int
    micro_batch: int | str
    max_slices: Mapping[int, int] | None = None
    memory: Memory | None = None
    shared_by: int = 1

    def global_batch(self, index: int) -> GlobalBatch:
        """Return global batch `index`, counted from 0."""
        sequences = self.order.batch(index)
        ranks, seq_len = (self.world_size, self.rank, self.shared_by), sequences.seq_len
        num_groups = self.world_size // self.shared_by
        size = choose_micro_batch_size(self.micro_batch, seq_len, len(sequences), num_groups, self.shared_by)
        most = None if self.max_slices is None else self.max_slices[seq_len]
        layout = Layout(*ranks, size)
        return _global_batch(index, sequences, self.store, self.split, layout, most, self.memory)

    def iterate(self, first_index: int, last_index: int) -> Generator[GlobalBatch, None, None]:
        """Yield the batches from `first_index` to `last_index` (exclusive); a thread reads three ahead.

        Take the next batch only after all copies of the last one to the device have been queued.
        """
        batches = self._read_ahead(first_index, last_index)
        return batches if self.memory is None else self.memory.held_until_read(batches)

    def _read_ahead(self, first_index: int, last_index: int) -> Generator[GlobalBatch, None, None]:
        reader = ThreadPoolExecutor(1, "turbolm-prefetch", self.memory.start_thread if self.memory else None)
        jobs = (reader.submit(self.global_batch, index) for index in range(first_index, last_index))
        try:
            ahead = deque(islice(jobs, 3))
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(islice(jobs, 1))
                yield batch
        finally:
            reader.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class EvaluationSet:
    """Packed held-out documents: `num_targets` positions whose text has `text_bytes` UTF-8 bytes.

    `documents` are the ranges [first, end) that they are from.
    """

    sequences: Sequences
    num_targets: int
    text_bytes: int
    documents: tuple[tuple[int, int], ...] = ()


def recipe_evaluation_set(recipe: Recipe, store: TokenStore) -> EvaluationSet:
    """Return the documents that a recipe is evaluated on."""
    data, evaluation = recipe.data, recipe.evaluation
    settings = {"from_each_source": evaluation.from_each_source}
    return evaluation_set(store, data.seq_len, evaluation.tokens, data.packing, **settings)


def evaluation_set(
    store: TokenStore,
    seq_len: int,
    max_tokens: int,
    packing: Packing = "best_fit",
    *,
    from_each_source: bool = False,
) -> EvaluationSet:
    """Return the first complete validation documents of at most `max_tokens` positions; at least one document.

    With `from_each_source` they are the first of every source, which share `max_tokens` evenly.
    """
    num_documents = store.num_documents("validation")
    check_held_out(num_documents, store.manifest["validation"])
    parts = [(0, num_documents)]
    if from_each_source:
        parts = [(first, end) for first, end in store.source_documents("validation") if first < end]
    ranges = [(first, _first_documents(store, first, end, max_tokens // len(parts))) for first, end in parts]
    lengths = np.concatenate([store.lengths("validation", *documents) for documents in ranges])
    packed = pack(lengths, seq_len, evaluation_packing(packing))
    numbers = np.concatenate([np.arange(*documents) for documents in ranges])
    sequences = replace(packed, document=numbers[packed.document])
    text_bytes = sum(int(store.text_bytes("validation", *documents).sum()) for documents in ranges)
    return EvaluationSet(sequences, sequences.num_positions, text_bytes, tuple(ranges))


def _first_documents(store: TokenStore, first: int, end: int, max_tokens: int) -> int:
    """Return the end of the first complete documents of at most `max_tokens` positions; at least one document."""
    read = min(1024, end - first)  # there may be many more
    while (lengths := store.lengths("validation", first, first + read)).sum() <= max_tokens and first + read < end:
        read = min(2 * read, end - first)
    return first + max(1, int(np.searchsorted(np.cumsum(lengths), max_tokens, side="right")))


def evaluation_batches(
    held_out: EvaluationSet,
    store: TokenStore,
    *,
    world_size: int = 1,
    rank: int = 0,
    shared_by: int = 1,
    micro_batch_size: int = 1,
    fixed_cu_seqlens: bool = False,
    memory: Memory | None = None,
) -> Generator[GlobalBatch, None, None]:
    """Yield the evaluation set as batches of one micro-batch per rank; all ranks get the same number of batches.

    With `fixed_cu_seqlens` micro-batches hold `cu_seqlens` of few sizes. They are read into `memory`, in this thread.
    Groups of `shared_by` ranks share their sequences.
    """
    sequences = held_out.sequences
    most = int(np.diff(sequences.offsets).max()) if fixed_cu_seqlens else None
    layout = Layout(world_size, rank, shared_by, micro_batch_size)
    per_batch = world_size // shared_by * micro_batch_size
    ends = ((first, min(first + per_batch, len(sequences))) for first in range(0, len(sequences), per_batch))
    batches = (
        _global_batch(index, sequences.slice(first, end), store, "validation", layout, most, memory)
        for index, (first, end) in enumerate(ends)
    )
    return batches if memory is None else memory.held_until_read(batches)


def _global_batch(
    index: int,
    sequences: Sequences,
    store: TokenStore,
    split: Split,
    layout: Layout,
    max_slices: int | None,
    memory: Memory | None = None,
) -> GlobalBatch:
    assert 0 <= layout.rank < layout.world_size
    size, num_groups = layout.micro_batch_size, layout.world_size // layout.shared_by
    dealt = deal_sequences(sequences.attention_cost, num_groups, size)
    indices = dealt[:, layout.rank // layout.shared_by]
    most = None if max_slices is None else size * (max_slices + 1)  # each sequence may end with padding
    empty = None if memory is None else memory.empty
    part = layout.slice_of(sequences.seq_len)
    micro_batches = collate(sequences, indices, store, split, most, empty, part=part)
    return GlobalBatch(index, sequences, dealt, indices, micro_batches)
