"""Global batches of a run as each rank sees them, prefetched by one thread; and the evaluation set."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np

from turbolm.data.batch.collate import collate, deal_sequences
from turbolm.data.order.batch_order import BatchOrder
from turbolm.data.order.packing import IntArray, Sequences
from turbolm.data.order.window import Packing, pack
from turbolm.data.store.token_store import Split, TokenStore, check_held_out
from turbolm.plan.batch import choose_micro_batch_bins


@dataclass(frozen=True)
class GlobalBatch:
    """A global batch and this rank's part of it.

    `micro_batches` has the same length on every rank; the arrays are those of `collate`. `dealt` is
    int64 [num_micro, world_size, micro_batch_size]: the indices in `sequences` of every rank, -1 where there is none;
    `indices` are those of this rank. Every number is about the whole global batch and the same on every rank.
    """

    index: int
    sequences: Sequences
    dealt: IntArray
    indices: IntArray
    micro_batches: list[dict[str, np.ndarray]]

    @property
    def num_targets(self) -> int:
        """Valid targets of the whole global batch."""
        return self.sequences.num_positions

    @property
    def num_documents(self) -> int:
        """Different documents; those cut into slices count once."""
        return len(np.unique(self.sequences.document))

    @property
    def padding_fraction(self) -> float:
        """Share of the sequences' positions that hold no document (empty slots of the last micro-step not counted)."""
        return 1 - self.num_targets / (len(self.sequences) * self.sequences.seq_len)

    @property
    def imbalance(self) -> float:
        """Attention cost of the most loaded rank over the mean, summed over micro-batches: 1 where ranks never wait."""
        cost = np.append(self.sequences.attention_cost, 0)[self.dealt].sum(axis=2)
        return float(cost.max(axis=1).sum() / cost.mean(axis=1).sum())

    @property
    def attention_pairs(self) -> int:
        """Pairs of a position and one it attends to, within documents: the sum of l (l + 1) / 2."""
        return int((self.sequences.length * (self.sequences.length + 1) // 2).sum())

    @property
    def samples_digest(self) -> str:
        """The ledger entry of this batch: the first 64 bits, in hexadecimal, of the SHA-256 of its slices' columns."""
        slices = np.stack([self.sequences.document, self.sequences.start, self.sequences.length]).astype("<i8")
        return hashlib.sha256(slices.tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class BatchLoader:
    """Reads the global batches of `order` from `store` for one rank.

    `micro_batch` is as the recipe has it: tokens of one forward pass on one process, or `auto`. With `max_slices`, the
    most slices in a sequence by sequence length (`order.max_slices`), micro-batches hold `cu_seqlens` of a fixed size.
    """

    order: BatchOrder
    store: TokenStore
    split: Split
    world_size: int
    rank: int
    micro_batch: int | str
    max_slices: Mapping[int, int] | None = None

    def global_batch(self, index: int) -> GlobalBatch:
        """Global batch `index`, counted from 0."""
        sequences = self.order.batch(index)
        size = choose_micro_batch_bins(self.micro_batch, sequences.seq_len, len(sequences), self.world_size)
        most = None if self.max_slices is None else self.max_slices[sequences.seq_len]
        return _global_batch(index, sequences, self.store, self.split, (self.world_size, self.rank, size), most)

    def iterate(self, first_index: int, last_index: int) -> Generator[GlobalBatch, None, None]:
        """The batches from `first_index` up to but not including `last_index`; a thread reads three ahead."""
        reader = ThreadPoolExecutor(1, "turbolm-prefetch")
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
    """Held-out documents, packed: `num_targets` positions whose text has `text_bytes` UTF-8 bytes."""

    sequences: Sequences
    num_targets: int
    text_bytes: int


def evaluation_set(store: TokenStore, seq_len: int, max_tokens: int, packing: Packing = "best_fit") -> EvaluationSet:
    """The first validation documents, whole, of at most `max_tokens` positions; always at least one document.

    They are packed by best fit unless documents must stand alone: a run that trains on documents cut anywhere is
    measured as any other.
    """
    num_documents = store.num_documents("validation")
    check_held_out(num_documents, store.manifest["validation"])
    read = min(1024, num_documents)  # the split may be far larger than what is evaluated on
    while (lengths := store.lengths("validation", 0, read)).sum() <= max_tokens and read < num_documents:
        read = min(2 * read, num_documents)
    count = max(1, int(np.searchsorted(np.cumsum(lengths), max_tokens, side="right")))
    sequences = pack(lengths[:count], seq_len, "single" if packing == "single" else "best_fit")
    return EvaluationSet(sequences, sequences.num_positions, int(store.text_bytes("validation", 0, count).sum()))


def evaluation_batches(
    store: TokenStore,
    seq_len: int,
    max_tokens: int,
    packing: Packing = "best_fit",
    *,
    world_size: int = 1,
    rank: int = 0,
    micro_batch_bins: int = 1,
    fixed_cu_seqlens: bool = False,
) -> Iterator[GlobalBatch]:
    """The evaluation set as batches of one micro-batch on each rank; every rank gets the same number of them.

    With `fixed_cu_seqlens` micro-batches hold `cu_seqlens` of a fixed size.
    """
    sequences = evaluation_set(store, seq_len, max_tokens, packing).sequences
    most = int(np.diff(sequences.offsets).max()) if fixed_cu_seqlens else None
    per_batch = world_size * micro_batch_bins
    for index, first in enumerate(range(0, len(sequences), per_batch)):
        part = sequences.slice(first, min(first + per_batch, len(sequences)))
        yield _global_batch(index, part, store, "validation", (world_size, rank, micro_batch_bins), most)


def _global_batch(
    index: int,
    sequences: Sequences,
    store: TokenStore,
    split: Split,
    layout: tuple[int, int, int],
    max_slices: int | None,
) -> GlobalBatch:
    world_size, rank, micro_batch_bins = layout
    assert 0 <= rank < world_size
    dealt = deal_sequences(sequences.attention_cost, world_size, micro_batch_bins)
    indices = dealt[:, rank]
    most = None if max_slices is None else micro_batch_bins * (max_slices + 1)  # each row may end with padding
    return GlobalBatch(index, sequences, dealt, indices, collate(sequences, indices, store, split, most))
