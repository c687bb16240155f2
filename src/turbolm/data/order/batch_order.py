"""Random access to the global batches of a plan table: which sequences are in batch i.

Finding the batch's window and packing it is all that is needed. The number of processes, the micro-batch and the end of
the budget do not matter, so they may change during a run.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from turbolm.data.native import IntArray
from turbolm.data.order.packing import Packing, Sequences
from turbolm.data.order.plan_table import Part, PlanTable, read_index, whole_parts
from turbolm.data.order.stream import WINDOW_DOCUMENTS, DocumentStream, LengthsOf
from turbolm.data.order.table import OrderSettings, PlannedWindow, Sources, open_window, plan_window
from turbolm.data.order.window import Grouping, Window
from turbolm.errors import UserError, explain_os_error
from turbolm.plan.curriculum import Curriculum, Segment
from turbolm.recipe.paths import use_path

if TYPE_CHECKING:
    from turbolm.data.store.token_store import TokenStore
    from turbolm.recipe.schema import Recipe


class BatchOrder:
    """The global batches of a run. They do not depend on the order of calls. Thread-safe.

    `documents` is a fingerprint of the sources' documents; it is part of `key`, under which the table is kept.
    `folder` has `parts` of a table that were planned earlier; new ones are added with `build(save=True)`. Its first
    batch has the number `first_index`: batches are counted like the steps of the run, and the table from 0.
    """

    def __init__(
        self,
        sources: Sources,
        settings: OrderSettings,
        documents: str = "",
        folder: Path | None = None,
        parts: Sequence[Part] = (),
        first_index: int = 0,
    ):
        self.first_index = first_index
        self.sources, self.settings = sources, settings
        self.key, self._first_digest = settings.key(documents), settings.digest(documents)
        self.table = PlanTable(self._plan_window, self.key, folder, parts)
        self._window = lru_cache(2)(self._open_window)
        self._lock = threading.RLock()

    def batch(self, index: int) -> Sequences:
        """Return global batch `index`: sequences of one length; `document` are document numbers of the store."""
        with self._lock:
            number = self._window_of(index)
            return self._window(number).batch(index - self.first_index - self.table[number].first_step)

    @property
    def num_steps(self) -> int:
        """Return the number after the last batch in the table so far; more are added on demand."""
        return self.first_index + self.table.num_steps

    def build(
        self, num_steps: int, on_progress: Callable[[int], None] = lambda num_steps: None, *, save: bool = False
    ) -> None:
        """Extend the table to at least `num_steps` batches; `on_progress` gets their number after each window.

        With `save`, write it to its folder part by part. Raises OSError.
        """
        with self._lock:
            while self.num_steps < num_steps:
                self.table.extend()
                if save:
                    self.table.save(last=self.num_steps >= num_steps)
                on_progress(self.num_steps)

    def digest(self, num_steps: int) -> str:
        """Return a SHA-256 over everything that determines the windows of the first `num_steps` batches."""
        with self._lock:
            is_used = num_steps > self.first_index
            return self.table[self._window_of(num_steps - 1)].digest if is_used else self._first_digest

    def max_slices(self, num_steps: int) -> dict[int, int]:
        """Return the most slices per sequence of each length, over the windows of the first `num_steps` batches."""
        most: dict[int, int] = {}
        with self._lock:
            self.build(num_steps)
            for segment, counts in self.table.max_slices(self._window_of(num_steps - 1) + 1):
                for seq_len, count in zip(self.settings.segments[segment].seq_lens, counts, strict=True):
                    most[seq_len] = max(most.get(seq_len, 0), count)
        return most

    def _window_of(self, index: int) -> int:
        assert index >= self.first_index
        self.build(index + 1)
        return self.table.window_of(index - self.first_index)

    def _plan_window(self, last: PlannedWindow | None, number: int) -> PlannedWindow:
        return plan_window(last, number, self.sources, self.settings, self._first_digest)

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
    """Return the order of documents with these numbers of positions, int64 [num_documents].

    `sources` are the document numbers [first, end) of each source that has a weight in the segments; one pool by
    default.
    """
    ranges = list(sources or [(0, len(lengths))])
    positions = [int(lengths[first:end].sum()) for first, end in ranges]
    settings = OrderSettings(tuple(segments), seed, packing, grouping, window_documents)
    return BatchOrder(_sources(lambda documents: lengths[documents], ranges, positions, settings), settings)


def constant_order(
    lengths: IntArray, seq_len: int, sequences_per_batch: int, seed: int = 0, packing: Packing = "best_fit"
) -> BatchOrder:
    """Return the order of documents of these lengths (positions) in batches of one size and length."""
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
    """Return the order of a recipe's run for its full budget, from the kept table as far as there is one.

    With `save`, the rest is planned into files part by part, so that a later call goes on where this one was killed; or
    a line on standard error says why it cannot be. Raises UserError if a source has no training documents.
    """
    order = open_order(recipe, store, curriculum, check=save)
    try:
        order.build(curriculum.num_steps, on_progress, save=save)
    except OSError as error:
        print(stays_in_memory(error), file=sys.stderr)
        order.build(curriculum.num_steps, on_progress)
    return order


def stays_in_memory(error: OSError) -> str:
    """Return the line for a table that cannot be kept, such as in a cache that is mounted read-only."""
    return f"turbolm: the order of the batches stays in memory: {explain_os_error(error)}"


def open_order(recipe: Recipe, store: TokenStore, curriculum: Curriculum, *, check: bool) -> BatchOrder:
    """Return the order of a recipe's run, as far as its table is kept; with `check`, up to the first damaged file.

    Raises UserError if a source has no training documents.
    """
    settings, folder = _settings(recipe, curriculum), table_folder(recipe, store, curriculum)
    parts: Sequence[Part] = read_index(folder, settings.key(store.fingerprint))
    if check:
        parts = whole_parts(folder, parts)
    sources = _recipe_sources(recipe, store, settings)
    return BatchOrder(sources, settings, store.fingerprint, folder, parts, curriculum.first_step)


def is_order_kept(recipe: Recipe, store: TokenStore, curriculum: Curriculum) -> bool:
    """Return whether the whole plan table of a recipe's run is in files."""
    folder = table_folder(recipe, store, curriculum)
    parts = whole_parts(folder, read_index(folder, _settings(recipe, curriculum).key(store.fingerprint)))
    return bool(parts) and curriculum.first_step + parts[-1].end_step >= curriculum.num_steps


def table_folder(recipe: Recipe, store: TokenStore, curriculum: Curriculum) -> Path:
    """Return the folder of the plan table of a recipe's run, whether it exists or not."""
    key = _settings(recipe, curriculum).key(store.fingerprint)
    return use_path(recipe.execution.cache_dir, "execution.cache_dir") / "orders" / key[:16]


def _settings(recipe: Recipe, curriculum: Curriculum) -> OrderSettings:
    data = recipe.data
    return OrderSettings(curriculum.segments_of_order, recipe.train.seed, data.packing, data.grouping, WINDOW_DOCUMENTS)


def _recipe_sources(recipe: Recipe, store: TokenStore, settings: OrderSettings) -> Sources:
    weighted = settings.segments[0].weights is not None
    ranges = store.source_documents() if weighted else [(0, store.num_documents("train"))]
    positions = store.source_positions() if weighted else [sum(store.source_positions())]
    for number, (first, end) in enumerate(ranges):
        if first == end:
            where = f"data.sources[{number}] has a weight but" if weighted else "data.sources have"
            raise UserError(
                f"{where} no training documents. Add documents, lower data.validation or remove the source."
            )
    return _sources(lambda documents: store.lengths_of("train", documents), ranges, positions, settings)


def _sources(
    lengths_of: LengthsOf, ranges: Sequence[tuple[int, int]], positions: Sequence[int], settings: OrderSettings
) -> Sources:
    """Return a stream for each of these ranges of document numbers."""
    streams = [
        DocumentStream(lengths_of, *documents, settings.seed, source, settings.window_documents)
        for source, documents in enumerate(ranges)
    ]
    return Sources(streams, [total / (end - first) for total, (first, end) in zip(positions, ranges, strict=True)])
