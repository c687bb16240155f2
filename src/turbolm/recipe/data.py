"""The `data` section: what is read, and how documents become sequences. Torch-free."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from turbolm.recipe.fields import (
    Before,
    Positive,
    Section,
    Share,
    StagedTokens,
    TrainingSpan,
    by_tag,
    list_is_tuple,
    positive_span,
    tagged_union,
)
from turbolm.recipe.sources import Source
from turbolm.recipe.sources.stdlib import StdlibSource
from turbolm.units import Span


class LengthStages(Section):
    """Row lengths by hand."""

    name: Literal["stages"] = Field(description="which schedule this is")
    at: StagedTokens = Field(description="row length from each place on, such as {0%: 128, 30%: 512, 60%: 2048}")


class LengthGrowth(Section):
    """Rows that grow from `start` to data.seq_len; batches keep their number of tokens (arXiv 2108.06084)."""

    name: Literal["growth"] = Field(description="which schedule this is")
    start: Annotated[Positive, Field(ge=8)] = Field(128, description="the first row length")
    over: Annotated[TrainingSpan, AfterValidator(positive_span)] = Field(
        Span(0.5, "share"), description="where data.seq_len is reached"
    )
    shape: Literal["linear", "exponential"] = Field(
        "exponential", description="linear: short rows are left early; exponential: as long at each length"
    )
    num_lengths: Annotated[int, Field(ge=2, le=100)] = Field(5, description="different lengths, at most")
    remix: Annotated[Share, Field(lt=1)] = Field(
        0.0, description="share of the tokens after the growth that use the shorter lengths again, now and then"
    )
    remix_every: Annotated[TrainingSpan, AfterValidator(positive_span)] = Field(
        Span(0.05, "share"), description="how often short rows come back, with `remix`"
    )


class LengthBuckets(Section):
    """Documents are split into powers of two and trained each at its own length, without packing (arXiv 2405.13226)."""

    name: Literal["buckets"] = Field(description="which schedule this is")
    smallest: Annotated[Positive, Field(ge=8)] = Field(64, description="shorter pieces are packed into rows of this")
    order: Literal["grow", "shuffled"] = Field(
        "grow", description="grow: each cycle over the lengths begins with mostly short rows; shuffled: no order"
    )
    cycles: Annotated[int, Field(ge=1, le=1000)] = Field(
        8, description="cycles over the lengths in the budget, with `grow`"
    )


LENGTH_SCHEDULES: dict[str, type[Section]] = by_tag(LengthStages, LengthGrowth, LengthBuckets)
if TYPE_CHECKING:
    LengthSchedule = LengthStages | LengthGrowth | LengthBuckets
else:
    LengthSchedule = tagged_union(LENGTH_SCHEDULES)


class Data(Section):
    """What is read and how documents become sequences."""

    sources: Annotated[tuple[Source, ...], BeforeValidator(list_is_tuple), Field(min_length=1)] = Field(
        (StdlibSource(type="stdlib"),), description="where the documents come from, read in this order"
    )
    seq_len: Annotated[Positive, Field(ge=8, le=2**24)] = Field(
        description="tokens of one sequence, the model's context"
    )
    packing: Literal["best_fit", "concat", "single"] = Field(
        "best_fit",
        description="best_fit: several documents a row, kept apart; concat: the same, cut wherever a row is full; "
        "single: one document a row, padded",
    )
    grouping: Literal["batch", "window"] = Field(
        "batch",
        description="window: rows of similar attention cost share a batch, for few rows a process; batch: they do not",
    )
    length_schedule: LengthSchedule | None = Field(None, description="none: every row has seq_len tokens")
    validation: Annotated[Share, Field(lt=1)] = Field(
        0.01,
        description="share of documents held out by content hash, so that no text is on both sides; 0: no evaluation",
    )
    deduplicate: Literal["none", "exact"] = Field(
        "none", description="exact: of documents with the same text only the first is kept"
    )
    on_bad_document: Annotated[Literal["refuse", "skip"], Before("refuse")] = Field(
        "refuse",
        description="a document that is not what its source says (not JSON, not UTF-8, without the field) ends "
        "`prepare`, or is left out and counted",
    )

    @model_validator(mode="after")
    def _coherent(self) -> Data:
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError("expected a `weight` for every one of `sources`, or for none")
        labels = [source.label for source in self.sources if source.label is not None]
        if len(set(labels)) < len(labels):
            raise ValueError("expected another `label` for each of `sources`")
        return self
