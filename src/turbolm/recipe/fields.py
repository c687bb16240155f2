"""The kinds of values that recipe sections are made of, and the base of every section. Torch-free."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema

from turbolm import units
from turbolm.units import Span


class Section(BaseModel):
    """Base of every part of a recipe: frozen, strict, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def _number(value: object) -> object:
    """YAML 1.1 reads `3e-4` as text; a recipe means the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"expected a number such as 3e-4, got {value!r}") from None
    return value


def list_is_tuple(value: object) -> object:
    """YAML writes a list; the frozen recipe holds a tuple."""
    return tuple(value) if isinstance(value, list) else value


def positive_span(value: Span) -> Span:
    """Refuses a span of nothing."""
    if value.amount <= 0:
        raise ValueError("expected more than 0")
    return value


UNIT_TEXT = {"anyOf": [{"type": "number"}, {"type": "string"}]}

Count = Annotated[int, BeforeValidator(units.parse_count), WithJsonSchema(UNIT_TEXT)]
Positive = Annotated[Count, Field(gt=0)]
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
PositiveNumber = Annotated[Number, Field(gt=0)]
Beta = Annotated[Number, Field(ge=0, lt=1)]
TrainingSpan = Annotated[
    Any, BeforeValidator(Span.parse), PlainSerializer(str, return_type=str), WithJsonSchema(UNIT_TEXT)
]
Weight = Annotated[Number, Field(ge=0, le=1e12)]


def _staged(value: object) -> object:
    """A mapping from places in the budget to values, or one value from the start, as pairs (span, value)."""
    if isinstance(value, tuple):
        return value
    pairs = value if isinstance(value, dict) else {"0%": value}
    return tuple((Span.parse(place), amount) for place, amount in pairs.items())


def _starts_at_zero(pairs: tuple[tuple[Span, Any], ...]) -> tuple[tuple[Span, Any], ...]:
    if not pairs or pairs[0][0].amount != 0:
        raise ValueError("expected the first entry at 0%, the start of the run")
    if len({place.unit for place, _ in pairs[1:]}) > 1:
        raise ValueError("expected all places in one unit: shares (30%), tokens (2M) or steps (200 steps)")
    if any(before[0].amount >= after[0].amount for before, after in pairwise(pairs)):
        raise ValueError("expected the places in ascending order, each once")
    return pairs


def _plain_staged(pairs: tuple[tuple[Span, Any], ...]) -> Any:
    return pairs[0][1] if len(pairs) == 1 else {str(place): value for place, value in pairs}


_STAGED = (BeforeValidator(_staged), AfterValidator(_starts_at_zero), PlainSerializer(_plain_staged, return_type=Any))
_STAGED_SCHEMA = {
    "anyOf": [{"type": "number"}, {"type": "string"}, {"type": "object", "additionalProperties": UNIT_TEXT}]
}
StagedWeight = Annotated[tuple[tuple[Any, Weight], ...], *_STAGED, WithJsonSchema(_STAGED_SCHEMA)]
StagedTokens = Annotated[tuple[tuple[Any, Positive], ...], *_STAGED, WithJsonSchema(_STAGED_SCHEMA)]
