"""The `evaluation` section: how often the model is evaluated, and on what. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
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


class WeightAverage(Section):
    """A mean of the weights of the end of a run, which training does not see."""

    last: Annotated[TrainingSpan, AfterValidator(positive_span)] = Field(
        Span(0.1, "share"), description="tokens, steps or a share of the budget: the end of the run that is averaged"
    )
    half_life: Annotated[TrainingSpan, AfterValidator(positive_span)] | None = Field(
        None,
        description="tokens, steps or a share of the budget after which weights count half (an exponential mean); "
        "none: all count the same",
    )
    every_steps: Annotated[int, Field(ge=1)] = Field(1, description="steps between the weights that are averaged")
    export: bool = Field(False, description="export the mean, not the last weights")

    def find_problems(
        self, is_evaluated: bool, budget: int | None, global_batch: int | None
    ) -> Iterator[tuple[str, str]]:
        """Yield the key and what is wrong with it beside these values of the recipe, None where one is invalid."""
        if not is_evaluated and not self.export:
            yield (
                "evaluation.weight_average",
                "has no use: data.validation is 0 and there are no evaluation.sets or tasks, so nothing evaluates the "
                "mean, and it is not exported; set export: true, raise data.validation, or remove it",
            )
        if budget and global_batch and self.last.tokens(budget, global_batch) > budget:
            yield "evaluation.weight_average.last", f"must be at most train.budget ({budget}), got {self.last}"


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
    weight_average: WeightAverage | None = Field(
        None, description="average the weights of the end of the run, and evaluate the mean beside them; none: do not"
    )

    @model_validator(mode="after")
    def _named(self) -> Evaluation:
        if any(one.label is None for one in self.sets):
            raise ValueError("expected a `label` for each of `sets`")
        for one in self.sets:
            if one.weight is not None or one.min_tokens is not None:
                raise ValueError(f"expected neither `weight` nor `min_tokens` for {one.label!r} of `sets`")
        if taken := [one.name for one in self.tasks if one.name in ("loss", "average_loss")]:
            raise ValueError(f"expected another name than {taken[0]!r} for one of `tasks`: metrics have it")
        for key, names in (("tasks", [one.name for one in self.tasks]), ("sets", [one.label for one in self.sets])):
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise ValueError(f"expected another name for each of `{key}`, got {twice[0]!r} twice")
        return self


def source_names(sources: Sequence[Source]) -> list[str]:
    """Return a name for each source, for metrics: its label, or its type and number, such as jsonl-0."""
    names = [source.label or f"{source.type}-{number}" for number, source in enumerate(sources)]
    is_unique = len(set(names)) == len(names)
    return names if is_unique else [f"{number}-{name}" for number, name in enumerate(names)]


def same_names(sets: Sequence[Source], sources: Sequence[Source]) -> Iterator[tuple[str, str]]:
    """Yield the key and what is wrong with it for each set that has the name of a source."""
    names = source_names(sources)
    for number, one in enumerate(sets):
        if one.label in names:
            yield f"evaluation.sets.{number}.label", f"{one.label!r} is the name of a source; expected another"
