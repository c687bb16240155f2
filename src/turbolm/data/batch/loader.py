"""Global batches of a run as each rank sees them, prefetched by one thread; and the evaluation set."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from turbolm.data.batch.collate import collate, deal_bins
from turbolm.data.order.batch_order import BatchOrder
from turbolm.data.order.packing import Bins, IntArray
from turbolm.data.order.window import Packing, pack
from turbolm.data.store.token_store import Split, TokenStore, check_held_out
from turbolm.plan.batch import choose_micro_batch_bins


@dataclass(frozen=True)
class GlobalBatch:
    """A global batch and this rank's part of it.

    `micro_batches` has the same length on every rank; the arrays are those of `collate`. `dealt` is
    int64 [num_micro, world_size, micro_batch_bins], the places in `bins` of every rank, -1 where there is none;
    `indices` those of this rank. Every number is about the whole global batch and the same on every rank.
    """

    index: int
    bins: Bins
    dealt: IntArray
    indices: IntArray
    micro_batches: list[dict[str, np.ndarray]]

    @property
    def num_targets(self) -> int:
        """Valid targets of the whole global batch."""
        return self.bins.num_positions

    @property
    def num_documents(self) -> int:
        """Different documents; those cut into pieces count once."""
        return len(np.unique(self.bins.document))

    @property
    def padding_fraction(self) -> float:
        """Share of the bins' positions that hold no document (empty places of the last micro step not counted)."""
        return 1 - self.num_targets / (len(self.bins) * self.bins.seq_len)

    @property
    def imbalance(self) -> float:
        """Attention cost of the dearest rank over the mean of all, over the micro-batches: 1 where ranks never wait."""
        cost = np.append(self.bins.attention_cost, 0)[self.dealt].sum(axis=2)
        return float(cost.max(axis=1).sum() / cost.mean(axis=1).sum())

    @property
    def attention_pairs(self) -> int:
        """Pairs of a position and one it attends to, within documents: the sum of l (l + 1) / 2."""
        return int((self.bins.length * (self.bins.length + 1) // 2).sum())

    @property
    def sample_ids(self) -> list[tuple[int, int, int]]:
        """What was trained on: (document, start, length) of each piece, in positions."""
        pieces = (self.bins.document, self.bins.start, self.bins.length)
        return list(zip(*(piece.tolist() for piece in pieces), strict=True))

    @property
    def samples_digest(self) -> str:
        """First 64 bits, in hexadecimal, of the SHA-256 of `sample_ids`: the ledger entry of this batch."""
        pieces = np.stack([self.bins.document, self.bins.start, self.bins.length]).astype("<i8")
        return hashlib.sha256(pieces.tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class BatchLoader:
    """Reads the global batches of `order` from `store` for one rank.

    `micro_batch` is as the recipe has it: tokens of one forward pass on one process, or `auto`. With `max_pieces`, the
    most pieces in a bin by row length (`order.max_pieces`), micro-batches hold `cu_seqlens` of a fixed size.
    """

    order: BatchOrder
    store: TokenStore
    split: Split
    world_size: int
    rank: int
    micro_batch: int | str
    max_pieces: Mapping[int, int] | None = None

    def global_batch(self, index: int) -> GlobalBatch:
        """Global batch `index`, counted from 0."""
        bins = self.order.batch(index)
        micro_batch_bins = choose_micro_batch_bins(self.micro_batch, bins.seq_len, len(bins), self.world_size)
        most = None if self.max_pieces is None else self.max_pieces[bins.seq_len]
        return _global_batch(index, bins, self.store, self.split, (self.world_size, self.rank, micro_batch_bins), most)

    def iterate(self, first_index: int, last_index: int) -> Generator[GlobalBatch, None, None]:
        """The batches from `first_index` up to but not including `last_index`, two of them read ahead by a thread."""
        ready: queue.Queue[GlobalBatch | BaseException] = queue.Queue(maxsize=2)
        closed = threading.Event()

        def put(item: GlobalBatch | BaseException) -> None:
            while not closed.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def read() -> None:
            try:
                for index in range(first_index, last_index):
                    if closed.is_set():
                        return
                    put(self.global_batch(index))
            except BaseException as error:  # raised again where the batches are used
                put(error)

        thread = threading.Thread(target=read, name="turbolm-prefetch", daemon=True)
        thread.start()
        try:
            for _ in range(first_index, last_index):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            closed.set()
            thread.join()


@dataclass(frozen=True)
class EvaluationSet:
    """Held-out documents, packed: `num_targets` positions whose text has `text_bytes` UTF-8 bytes."""

    bins: Bins
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
    bins = pack(lengths[:count], seq_len, "single" if packing == "single" else "best_fit")
    return EvaluationSet(bins, bins.num_positions, int(store.text_bytes("validation", 0, count).sum()))


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
    bins = evaluation_set(store, seq_len, max_tokens, packing).bins
    most = int(np.diff(bins.offsets).max()) if fixed_cu_seqlens else None
    per_batch = world_size * micro_batch_bins
    for index, first in enumerate(range(0, len(bins), per_batch)):
        part = bins.slice(first, min(first + per_batch, len(bins)))
        yield _global_batch(index, part, store, "validation", (world_size, rank, micro_batch_bins), most)


def _global_batch(
    index: int, bins: Bins, store: TokenStore, split: Split, layout: tuple[int, int, int], max_pieces: int | None
) -> GlobalBatch:
    world_size, rank, micro_batch_bins = layout
    assert 0 <= rank < world_size
    dealt = deal_bins(bins.attention_cost, world_size, micro_batch_bins)
    indices = dealt[:, rank]
    most = None if max_pieces is None else micro_batch_bins * (max_pieces + 1)  # each row may end with padding
    return GlobalBatch(index, bins, dealt, indices, collate(bins, indices, store, split, most))
