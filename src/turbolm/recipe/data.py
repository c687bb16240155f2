"""The `data` section: the sources, and how documents become sequences. Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from turbolm.recipe.fields import (
    Before,
    Positive,
    Section,
    Share,
    list_is_tuple,
)
from turbolm.recipe.lengths import AnyLengthSchedule
from turbolm.recipe.sources import Source
from turbolm.recipe.sources.stdlib import StdlibSource


class DataStart(Section):
    """Where the order of the data begins in a run that other data began: `turbolm fork --recipe` writes it."""

    step: Positive = Field(description="steps that the forked run trained before, on its own data")
    tokens: Positive = Field(description="tokens of these steps")


class Data(Section):
    """The sources, and how documents become sequences."""

    sources: Annotated[tuple[Source, ...], BeforeValidator(list_is_tuple), Field(min_length=1)] = Field(
        (StdlibSource(type="stdlib"),), description="where the documents come from, read in this order"
    )
    seq_len: Annotated[Positive, Field(ge=8, le=2**24)] = Field(
        description="tokens of one sequence, the model's context"
    )
    packing: Literal["best_fit", "concat", "single"] = Field(
        "best_fit",
        description="best_fit: several documents per sequence, kept apart; concat: the same, cut wherever it is full; "
        "single: one document per sequence, padded",
    )
    grouping: Literal["batch", "window"] = Field(
        "batch",
        description="window: sequences of similar cost share a batch, for few per process; batch: they do not",
    )
    length_schedule: AnyLengthSchedule | None = Field(None, description="none: every sequence has seq_len tokens")
    validation: Annotated[Share, Field(lt=1)] = Field(
        0.01,
        description="share of documents held out, by content hash so that no text is in both splits; 0: no evaluation",
    )
    deduplicate: Literal["none", "exact"] = Field(
        "none", description="exact: of documents with equal text only the first is kept"
    )
    on_bad_document: Annotated[Literal["refuse", "skip"], Before("refuse")] = Field(
        "refuse",
        description="an invalid document (not JSON, not UTF-8, without the field) ends "
        "`prepare`, or is skipped and counted",
    )

    starts_at: Annotated[DataStart | None, Before(None)] = Field(
        None,
        description="written by `turbolm fork --recipe`: the step whose batch is the first of these sources; their "
        "schedules of weights and lengths begin there too",
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
