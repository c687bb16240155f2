"""The kinds of values that recipe sections are made of, and the base of every section. Torch-free."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema

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
