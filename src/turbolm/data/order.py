"""Which bins make up global batch i: a pure function of the documents' lengths and a few numbers of the recipe.

Epoch after epoch, the documents are permuted, cut into windows, packed window by window, and the bins of each window
shuffled; the bins of all windows form one endless stream. Batch i is `bins_per_batch` bins of it. Neither the number
of processes nor the token budget enters, so both may change while a run goes on. To reach any batch only the number
of bins of the windows before it has to be known, and two windows at most have to be packed.
"""

from __future__ import annotations

import hashlib
import json
import threading
from bisect import bisect_right
from collections import OrderedDict
from typing import Literal

import numpy as np

from turbolm.data.packing import (
    Bins,
    IntArray,
    concatenate,
    count_best_fit,
    count_concat,
    count_single,
    pack_best_fit,
    pack_concat,
    pack_single,
)
from turbolm.errors import UserError

ORDER_VERSION = 1  # raise it when the same arguments no longer give the same batches
Packing = Literal["best_fit", "concat", "single"]
_PACK = {
    "best_fit": (pack_best_fit, count_best_fit),
    "concat": (pack_concat, count_concat),
    "single": (pack_single, count_single),
}


def pack(lengths: IntArray, seq_len: int, packing: Packing) -> Bins:
    """Pack documents of these lengths (positions) by the method a recipe names."""
    return _PACK[packing][0](lengths, seq_len)


class BatchOrder:
    """The global batches of a run; the same whatever was asked for before, and safe to use from several threads.

    `lengths` are the positions of each training document, int64 [num_documents]; batches hold `bins_per_batch` bins of
    `seq_len` positions.
    """

    def __init__(
        self,
        lengths: IntArray,
        seq_len: int,
        bins_per_batch: int,
        seed: int,
        packing: Packing = "best_fit",
        window_documents: int = 65536,
    ):
        self.lengths = np.asarray(lengths, dtype=np.int64)
        if not self.lengths.any():
            raise UserError("There are no training documents. Add to data.sources or lower data.validation.")
        assert seq_len > 0 and bins_per_batch > 0 and window_documents > 0
        self.seq_len, self.bins_per_batch, self.seed = seq_len, bins_per_batch, seed
        self.packing, self.window_documents = packing, window_documents
        self.windows_per_epoch = -(-len(self.lengths) // window_documents)
        self._first_bin = [0]  # stream index of the first bin of window 0, 1, ... and of the one after the last known
        self._permutations: OrderedDict[int, IntArray] = OrderedDict()
        self._windows: OrderedDict[int, Bins] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything the batches depend on."""
        settings = {
            "version": ORDER_VERSION,
            "seq_len": self.seq_len,
            "bins_per_batch": self.bins_per_batch,
            "seed": self.seed,
            "packing": self.packing,
            "window_documents": self.window_documents,
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        digest.update(self.lengths.astype("<i8").tobytes())
        return digest.hexdigest()

    def batch(self, index: int) -> Bins:
        """Global batch `index`: `bins_per_batch` bins whose `document` are the numbers in `lengths`."""
        assert index >= 0
        first, end = index * self.bins_per_batch, (index + 1) * self.bins_per_batch
        with self._lock:
            while self._first_bin[-1] < end:
                self._count_next_window()
            window = bisect_right(self._first_bin, first) - 1
            parts = []
            while first < end:
                start, stop = self._first_bin[window], min(end, self._first_bin[window + 1])
                if stop > first:
                    parts.append(self._window(window).select(np.arange(first - start, stop - start)))
                first, window = max(first, stop), window + 1
        return concatenate(parts)

    def num_bins_per_epoch(self, epoch: int) -> int:
        """Bins that hold every document once, in this epoch."""
        with self._lock:
            while len(self._first_bin) <= (epoch + 1) * self.windows_per_epoch:
                self._count_next_window()
        first, end = epoch * self.windows_per_epoch, (epoch + 1) * self.windows_per_epoch
        return self._first_bin[end] - self._first_bin[first]

    def _count_next_window(self) -> None:
        lengths = self.lengths[self._documents(len(self._first_bin) - 1)]
        self._first_bin.append(self._first_bin[-1] + _PACK[self.packing][1](lengths, self.seq_len))

    def _window(self, window: int) -> Bins:
        """The packed and shuffled bins of a window."""
        if window not in self._windows:
            documents = self._documents(window)
            bins = pack(self.lengths[documents], self.seq_len, self.packing)
            epoch, number = divmod(window, self.windows_per_epoch)
            shuffled = bins.select(_random_order(len(bins), self.seed, epoch, number + 1))
            self._windows[window] = Bins(
                self.seq_len, shuffled.offsets, documents[shuffled.document], shuffled.start, shuffled.length
            )
            if len(self._windows) > 2:
                self._windows.popitem(last=False)
        self._windows.move_to_end(window)
        return self._windows[window]

    def _documents(self, window: int) -> IntArray:
        epoch, number = divmod(window, self.windows_per_epoch)
        if epoch not in self._permutations:
            self._permutations[epoch] = _random_order(len(self.lengths), self.seed, epoch, 0)
            if len(self._permutations) > 2:  # a batch may reach over the end of an epoch
                self._permutations.popitem(last=False)
        self._permutations.move_to_end(epoch)
        return self._permutations[epoch][number * self.window_documents : (number + 1) * self.window_documents]


def _random_order(count: int, seed: int, epoch: int, stream: int) -> IntArray:
    """A permutation of range(count), int64.

    It sorts raw Philox output: NumPy keeps that stream fixed over its versions, but not `Generator.permutation`.
    """
    generator = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=np.array([0, 0, 0, stream], np.uint64))
    return np.argsort(generator.random_raw(count), kind="stable").astype(np.int64, copy=False)
