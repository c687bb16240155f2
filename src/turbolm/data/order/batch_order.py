"""Which sequences make up global batch i: random access to the batches of a plan table.

Find the window of the batch, pack it: nothing else has to be known. Neither the number of processes nor micro-batches
nor the end of the budget enter, so all of them may change while a run goes on.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from turbolm.data.native import IntArray
from turbolm.data.order.packing import Packing, Sequences
from turbolm.data.order.stream import WINDOW_DOCUMENTS, DocumentStream, LengthsOf
from turbolm.data.order.table import (
    OrderSettings,
    PlannedWindow,
    Sources,
    load_table,
    open_window,
    plan_window,
    save_table,
)
from turbolm.data.order.window import Grouping, Window
from turbolm.errors import UserError
from turbolm.plan.curriculum import Curriculum, Segment

if TYPE_CHECKING:
    from turbolm.data.store.token_store import TokenStore
    from turbolm.recipe.schema import Recipe


class BatchOrder:
    """The global batches of a run; the same whatever was asked for before, and safe to use from several threads.

    `documents` is a fingerprint of what the sources hold, part of `key`, under which a table is kept. `table` is what
    was built before.
    """

    def __init__(
        self, sources: Sources, settings: OrderSettings, documents: str = "", table: Sequence[PlannedWindow] = ()
    ):
        self.sources, self.settings = sources, settings
        self.key, self._first_digest = settings.key(documents), settings.digest(documents)
        self.table = list(table)
        self._window = lru_cache(2)(self._open_window)
        self._lock = threading.RLock()

    def batch(self, index: int) -> Sequences:
        """Global batch `index`: sequences of one length, whose `document` are numbers of the store."""
        with self._lock:
            number = self._window_of(index)
            return self._window(number).batch(index - self.table[number].first_step)

    @property
    def num_steps(self) -> int:
        """The batches that the table holds by now; others are added when they are asked for."""
        return self.table[-1].end_step if self.table else 0

    def build(self, num_steps: int, on_progress: Callable[[int], None] = lambda num_steps: None) -> None:
        """Extend the table to at least `num_steps` batches; `on_progress` hears how many after each window."""
        with self._lock:
            while self.num_steps < num_steps:
                self.table.append(plan_window(self.table, self.sources, self.settings, self._first_digest))
                on_progress(self.num_steps)

    def digest(self, num_steps: int) -> str:
        """SHA-256 over all that decided the windows of the first `num_steps` batches."""
        with self._lock:
            return self.table[self._window_of(num_steps - 1)].digest if num_steps else self._first_digest

    def max_slices(self, num_steps: int) -> dict[int, int]:
        """The most slices in a sequence of each length, over the windows of the first `num_steps` batches."""
        most: dict[int, int] = {}
        with self._lock:
            self.build(num_steps)
            for planned in self.table[: self._window_of(num_steps - 1) + 1]:
                seq_lens = self.settings.segments[planned.segment].seq_lens
                for seq_len, count in zip(seq_lens, planned.max_slices, strict=True):
                    most[seq_len] = max(most.get(seq_len, 0), count)
        return most

    def _window_of(self, index: int) -> int:
        assert index >= 0
        self.build(index + 1)
        return bisect_right(self.table, index, key=lambda planned: planned.end_step)

    def _open_window(self, number: int) -> Window:
        return open_window(self.table[number], number, self.sources, self.settings)


def order_of_lengths(
    lengths: IntArray,
    segments: Sequence[Segment],
    *,
    seed: int = 0,
    packing: Packing = "best_fit",
    grouping: Grouping = "batch",
    sources: Sequence[tuple[int, int]] | None = None,
    window_documents: int = WINDOW_DOCUMENTS,
) -> BatchOrder:
    """The order of documents whose positions are given, int64 [num_documents].

    `sources` are the document numbers [first, end) of each source that the segments weigh; one pool by default.
    """
    ranges = list(sources or [(0, len(lengths))])
    positions = [int(lengths[first:end].sum()) for first, end in ranges]
    settings = OrderSettings(tuple(segments), seed, packing, grouping, window_documents)
    return BatchOrder(_sources(lambda documents: lengths[documents], ranges, positions, settings), settings)


def constant_order(
    lengths: IntArray, seq_len: int, sequences_per_batch: int, seed: int = 0, packing: Packing = "best_fit"
) -> BatchOrder:
    """The order of documents of these lengths (positions) in batches of one size and length."""
    return order_of_lengths(
        lengths, [Segment(0, 0, (seq_len,), seq_len * sequences_per_batch)], seed=seed, packing=packing
    )


def recipe_order(
    recipe: Recipe,
    store: TokenStore,
    curriculum: Curriculum,
    *,
    save: bool,
    on_progress: Callable[[int], None] = lambda num_steps: None,
) -> BatchOrder:
    """The order of a recipe's run for its whole budget, from its cached table where there is one.

    With `save`, what had to be built is cached. Raises UserError where a source has no training documents.
    """
    data = recipe.data
    weighted = curriculum.segments[0].weights is not None
    ranges = store.source_documents() if weighted else [(0, store.num_documents("train"))]
    positions = store.source_positions() if weighted else [sum(store.source_positions())]
    for number, (first, end) in enumerate(ranges):
        if first == end:
            where = f"data.sources[{number}] has a weight but" if weighted else "data.sources have"
            raise UserError(
                f"{where} no training documents. Add documents, lower data.validation or remove the source."
            )
    settings = OrderSettings(curriculum.segments, recipe.train.seed, data.packing, data.grouping, WINDOW_DOCUMENTS)
    sources = _sources(lambda documents: store.lengths_of("train", documents), ranges, positions, settings)
    documents = store.fingerprint
    key = settings.key(documents)
    path = Path(recipe.execution.cache_dir).expanduser() / "orders" / f"{key[:16]}.npz"
    order = BatchOrder(sources, settings, documents, load_table(path, key))
    if order.num_steps < curriculum.num_steps:
        order.build(curriculum.num_steps, on_progress)
        if save:
            save_table(path, key, order.table)
    return order


def _sources(
    lengths_of: LengthsOf, ranges: Sequence[tuple[int, int]], positions: Sequence[int], settings: OrderSettings
) -> Sources:
    """A stream for each of these ranges of document numbers, which hold so many positions."""
    streams = [
        DocumentStream(lengths_of, *documents, settings.seed, source, settings.window_documents)
        for source, documents in enumerate(ranges)
    ]
    return Sources(streams, [total / (end - first) for total, (first, end) in zip(positions, ranges, strict=True)])
