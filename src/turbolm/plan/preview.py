"""Preview the use of the data: attention spans over the budget, and epochs of each source. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from turbolm.plan.curriculum import Curriculum, Segment
from turbolm.plan.profile import SpanKind, mean_span
from turbolm.recipe.schema import Recipe


@dataclass(frozen=True)
class StoreSize:
    """The size of a prepared store: training positions by source, and the positions of a sample of its documents.

    `short_documents`: by source, those that `min_tokens` left out; empty if no source has it.
    """

    source_positions: tuple[int, ...]
    sample_lengths: tuple[int, ...]
    short_documents: tuple[int, ...] = ()


@dataclass(frozen=True)
class SourceUse:
    """How much of a source a run reads. `available_tokens` and `epochs` are None before the data is prepared."""

    label: str
    planned_tokens: float
    available_tokens: int | None
    epochs: float | None


def source_uses(recipe: Recipe, curriculum: Curriculum, store: StoreSize | None) -> tuple[SourceUse, ...]:
    """Return the use of each weighted source, or of all documents as one."""
    planned = curriculum.source_tokens()
    if planned is None:
        labels = ["all sources" if len(recipe.data.sources) > 1 else source_label(recipe, 0)]
        planned = [float(curriculum.own_tokens)]
        available = [sum(store.source_positions)] if store else [None]
    else:
        labels = [source_label(recipe, number) for number in range(len(planned))]
        available = list(store.source_positions) if store else [None] * len(planned)
    return tuple(
        SourceUse(label, tokens, size, tokens / size if size else None)
        for label, tokens, size in zip(labels, planned, available, strict=True)
    )


def source_label(recipe: Recipe, number: int) -> str:
    """Return the source's label, or its type and number."""
    source = recipe.data.sources[number]
    return source.label or f"{source.type}[{number}]"


def run_out_notes(uses: Sequence[SourceUse]) -> list[str]:
    """Yield one line for each source whose documents will be repeated."""
    return [
        f"{use.label}: its {use.available_tokens:,} tokens run out and are repeated, {use.epochs:.2f} epochs in all"
        for use in uses
        if use.epochs is not None and use.epochs > 1 and use.available_tokens is not None
    ]


def min_tokens_notes(recipe: Recipe, store: StoreSize | None) -> list[str]:
    """Return a line for each source that leaves out short documents, with their number once it is prepared."""
    short = store.short_documents if store else ()
    return [
        f"{source_label(recipe, number)}: {f'{short[number]:,} ' if short else ''}documents of fewer than "
        f"{source.min_tokens:,} tokens are left out"
        for number, source in enumerate(recipe.data.sources)
        if source.min_tokens
    ]


def mean_span_of_run(
    curriculum: Curriculum, store: StoreSize | None, span_kind: SpanKind = "full", limit: int | None = None
) -> float:
    """Return the mean keys per query over the run, from the store's documents or else one document per sequence.

    `span_kind` and `limit` are those of a layer that does not see all keys (`turbolm.plan.profile.LayerKind`).
    """
    ends = [*(segment.first_token for segment in curriculum.segments[1:]), curriculum.tokens_seen(curriculum.num_steps)]
    total = 0.0
    for segment, end in zip(curriculum.segments, ends, strict=True):
        total += (end - segment.first_token) * _segment_span(segment, store, span_kind, limit)
    return total / curriculum.own_tokens


def constant_span(curriculum: Curriculum, store: StoreSize | None) -> float:
    """Return the same if every sequence had the longest length."""
    longest = curriculum.seq_lens[-1]
    return _segment_span(Segment(0, 0, (longest,), longest), store)


def _segment_span(
    segment: Segment, store: StoreSize | None, span_kind: SpanKind = "full", limit: int | None = None
) -> float:
    if store is None:  # buckets are assumed to hold the same number of tokens
        spans = [mean_span([seq_len], span_kind, limit) for seq_len in segment.seq_lens]
        return sum(spans) / len(spans)
    slices: list[int] = []
    for length in store.sample_lengths:
        for seq_len in reversed(segment.seq_lens):
            count, length = divmod(length, seq_len)
            slices += [seq_len] * count
        if length:
            slices.append(length)
    return mean_span(slices, span_kind, limit)
