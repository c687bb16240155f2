"""The `evaluation` section: how often the model is evaluated, and on what. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from turbolm.recipe.fields import Name, PathText, Positive, Section, TrainingSpan, list_is_tuple, positive_span
from turbolm.recipe.paths import PATH_RULE
from turbolm.recipe.sources import Source
from turbolm.units import Span


class ClozeTask(Section):
    """Questions in a file, scored by the bits per byte of the right answer while the model trains."""

    name: Name = Field(description="what metrics and reports call it")
    path: PathText = Field(
        description="a file of JSON lines, each with `context` (or `question`), `choices` and `answer` (the right "
        f"choice, counted from 0, or its text); {PATH_RULE}"
    )


class Evaluation(Section):
    """Loss and bits per byte on held-out documents, and answers to questions."""

    every: Annotated[TrainingSpan, AfterValidator(positive_span)] = Field(
        Span(0.1, "share"), description="tokens, steps or a share of the budget between evaluations"
    )
    tokens: Positive = Field(1_000_000, description="at most this many held-out tokens, and of each set and task")
    from_each_source: bool = Field(
        False, description="take held-out tokens from every source, in equal parts; false: the first of all sources"
    )
    tasks: Annotated[tuple[ClozeTask, ...], BeforeValidator(list_is_tuple)] = Field(
        (), description="questions to answer at each evaluation"
    )
    sets: Annotated[tuple[Source, ...], BeforeValidator(list_is_tuple)] = Field(
        (), description="more validation sets, each with a `label`: documents as in data.sources, none trained on"
    )

    @model_validator(mode="after")
    def _named(self) -> Evaluation:
        if any(one.label is None for one in self.sets):
            raise ValueError("expected a `label` for each of `sets`")
        for one in self.sets:
            if one.weight is not None or one.min_tokens is not None:
                raise ValueError(f"expected neither `weight` nor `min_tokens` for {one.label!r} of `sets`")
        if any(one.name == "loss" for one in self.tasks):
            raise ValueError("expected another name than 'loss' for one of `tasks`: metrics have it")
        for key, names in (("tasks", [one.name for one in self.tasks]), ("sets", [one.label for one in self.sets])):
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise ValueError(f"expected another name for each of `{key}`, got {twice[0]!r} twice")
        return self


def source_names(sources: Sequence[Source]) -> list[str]:
    """Return a name for each source, for metrics: its label, or its type and number, such as jsonl-0."""
    names = [source.label or f"{source.type}-{number}" for number, source in enumerate(sources)]
    is_unique = len(set(names)) == len(names)
    return names if is_unique else [f"{number}-{name}" for number, name in enumerate(names)]
