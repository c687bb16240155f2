"""The documents of a source in shuffled order, epoch after epoch: an endless stream with random access.

An epoch permutes contiguous blocks of documents, and then the documents inside each window of many blocks. So the order
is random, but reading it forward reads the store in long runs. Memory use does not grow with the number of documents.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from turbolm.data.native import IntArray, argsort_random

BLOCK_DOCUMENTS = 1024  # at most; a small source has this many blocks per window
WINDOW_DOCUMENTS = 65536

LengthsOf = Callable[[IntArray], IntArray]  # positions of the documents with these numbers


class DocumentStream:
    """The documents `first` to `end` (exclusive) of a store; `lengths_of(documents)` returns their positions.

    `source` gives streams with the same seed different permutations. Windows have equal sizes of at most
    `window_documents`. Not thread-safe.
    """

    def __init__(
        self,
        lengths_of: LengthsOf,
        first: int,
        end: int,
        seed: int,
        source: int = 0,
        window_documents: int = WINDOW_DOCUMENTS,
    ):
        assert 0 <= first < end and window_documents > 0
        self.first, self.num_documents = first, end - first
        self.window_documents = -(-self.num_documents // -(-self.num_documents // window_documents))
        self._lengths_of, self._seed, self._source = lengths_of, seed, source
        # Small blocks make windows similar, large ones are fast to read where the store is larger than memory.
        block = min(max(self.num_documents // WINDOW_DOCUMENTS, 1), BLOCK_DOCUMENTS)
        self._num_blocks = -(-self.num_documents // block)
        self._blocks = lru_cache(2)(self._make_blocks)
        self._window = lru_cache(3)(self._make_window)

    def read(self, begin: int, end: int) -> tuple[IntArray, IntArray]:
        """Return document numbers and positions at the offsets `begin` to `end` (exclusive), int64 [end - begin] each.

        Offset o belongs to epoch o // num_documents.
        """
        parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
        while begin < end:
            epoch, in_epoch = divmod(begin, self.num_documents)
            window, offset = divmod(in_epoch, self.window_documents)
            documents, lengths = self._window(epoch, window)
            stop = min(len(documents), offset + end - begin)
            parts.append((documents[offset:stop], lengths[offset:stop]))
            begin += stop - offset
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def advance(self, begin: int, positions: int, limit: int | None = None) -> tuple[int, int]:
        """Draw documents from offset `begin` until they hold `positions`, but none at or after offset `limit`.

        Returns the offset after the last one, and the positions they hold.
        """
        drawn = 0
        while drawn < positions and begin != limit:
            in_epoch = begin % self.num_documents
            # To the end of the window: it is computed at once anyway.
            end = begin + min(self.window_documents - in_epoch % self.window_documents, self.num_documents - in_epoch)
            lengths = self.read(begin, end if limit is None else min(end, limit))[1]
            total = np.cumsum(lengths)
            count = min(int(np.searchsorted(total, positions - drawn)) + 1, len(lengths))
            drawn += int(total[count - 1])
            begin += count
        return begin, drawn

    def _make_window(self, epoch: int, window: int) -> tuple[IntArray, IntArray]:
        order, starts = self._blocks(epoch)
        begin = window * self.window_documents
        end = min(begin + self.window_documents, self.num_documents)
        blocks = np.arange(np.searchsorted(starts, begin, side="right") - 1, np.searchsorted(starts, end))
        skipped = np.maximum(begin - starts[blocks], 0)
        first = self._block_start(order[blocks]) + skipped
        counts = np.minimum(end, starts[blocks + 1]) - starts[blocks] - skipped
        documents = np.arange(end - begin) + np.repeat(first - np.cumsum(counts) + counts, counts)
        lengths = self._lengths_of(documents)
        shuffled = random_order(len(documents), self._seed, epoch, self._source, window + 1)
        return documents[shuffled], lengths[shuffled]

    def _make_blocks(self, epoch: int) -> tuple[IntArray, IntArray]:
        """Return the epoch's order of the blocks, and the stream offset where each begins (plus one for the end)."""
        order = random_order(self._num_blocks, self._seed, epoch, self._source, 0)
        sizes = self._block_start(order + 1) - self._block_start(order)
        return order, np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])

    def _block_start(self, block: IntArray) -> IntArray:
        """Return the first document of a block; block sizes differ by at most one."""
        return self.first + block * self.num_documents // self._num_blocks


def random_order(count: int, seed: int, epoch: int, source: int, stream: int) -> IntArray:
    """Return a permutation of range(count), int64.

    It sorts raw Philox output: NumPy guarantees that stream across versions, but not `Generator.permutation`.
    """
    return argsort_random(random_raw(count, seed, epoch, source, stream))


def random_raw(count: int, seed: int, epoch: int, source: int, stream: int) -> IntArray:
    """Return random uint64 [count] from a separate generator for each (seed, epoch, source, stream)."""
    key, counter = np.array([seed, epoch], np.uint64), np.array([0, 0, source, stream], np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)
