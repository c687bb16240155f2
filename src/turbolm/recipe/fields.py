"""Types of recipe values, and the base class of every section. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, TypeVar, Union, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    WithJsonSchema,
)

from turbolm import units
from turbolm.recipe.paths import expand_path
from turbolm.storage import check_url, is_url
from turbolm.units import Span


class Section(BaseModel):
    """Base of every part of a recipe: frozen, strict, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


Kind = TypeVar("Kind", bound=Section)


def by_tag(*kinds: type[Kind]) -> dict[str, type[Kind]]:
    """Map section classes by their tag: the only value of their `name` or `type`."""
    return {get_args(kind.model_fields[tag_of(kind)].annotation)[0]: kind for kind in kinds}


def tag_of(kind: type[Section]) -> str:
    """Return the key of the tag: `name` or `type`."""
    return "type" if "type" in kind.model_fields else "name"


def tagged_union(kinds: Mapping[str, type[Section]], default: str | None = None) -> Any:
    """Return the annotation of a section that is one of `kinds`, by its tag; `default` applies without a tag."""
    tag = tag_of(next(iter(kinds.values())))

    def given(value: object) -> str | None:
        name = value.get(tag, default) if isinstance(value, Mapping) else getattr(value, tag, default)
        return None if name is None else str(name)

    choices = tuple(Annotated[kind, Tag(name)] for name, kind in kinds.items())
    return Annotated[Union[choices], Discriminator(given)]  # noqa: UP007 (a tuple of types)


@dataclass(frozen=True)
class Before:
    """Marks a key of the learning contract with the value that means "as before this key existed".

    Write it into the annotation: `Annotated[bool, Before(False)]`. Only that value is omitted from fingerprints, and a
    run from before the key keeps it (`turbolm.recipe.contract`).
    """

    value: Any


@dataclass(frozen=True)
class FormerDefault:
    """Marks a key of the learning contract with a former default: runs that recorded it keep it, if the recipe omits
    the key."""

    value: Any


def _number(value: object) -> object:
    """Convert text to a number: YAML 1.1 reads `3e-4` as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"expected a number such as 3e-4, got {value!r}") from None
    return value


def list_is_tuple(value: object) -> object:
    """Convert a list to a tuple: the recipe is frozen."""
    return tuple(value) if isinstance(value, list) else value


def positive_span(value: Span) -> Span:
    """Refuse an empty span."""
    if value.amount <= 0:
        raise ValueError("expected more than 0")
    return value


def off_is_none(value: object) -> object:
    return None if value == "off" else value


def text_is_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else list_is_tuple(value)


def means_a_path(value: str) -> str:
    """Refuses what `turbolm.recipe.paths` can make no path of; the text stays as it is written."""
    expand_path(value)
    return value


def means_a_path_or_url(value: str) -> str:
    """The same for what may be behind a URL."""
    return check_url(value) if is_url(value) else means_a_path(value)


def whole(value: object) -> object:
    """Refuse what a Literal of integers accepts: `true` as 1 and `2.0` as 2."""
    if isinstance(value, (bool, float)):
        raise ValueError(f"expected a whole number, got {value!r}")
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
Bytes = Annotated[int, BeforeValidator(units.parse_bytes), WithJsonSchema(UNIT_TEXT)]
Share = Annotated[float, BeforeValidator(units.parse_share), WithJsonSchema(UNIT_TEXT)]
Seconds = Annotated[int, BeforeValidator(units.parse_duration), WithJsonSchema(UNIT_TEXT)]
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00-\x1f\x7f]+$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
PathText = Annotated[Text, AfterValidator(means_a_path)]
REPOSITORY_NAME = r"^([A-Za-z0-9][A-Za-z0-9_.-]*/)?[A-Za-z0-9][A-Za-z0-9_.-]*$"  # of the Hugging Face hub
RepositoryName = Annotated[str, Field(max_length=96, pattern=REPOSITORY_NAME)]
_PATHS = {"anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
PathOrUrl = Annotated[Text, AfterValidator(means_a_path_or_url)]
Paths = Annotated[tuple[PathOrUrl, ...], BeforeValidator(text_is_tuple), Field(min_length=1), WithJsonSchema(_PATHS)]
_LIMIT = {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"const": "off"}, {"type": "null"}]}
Limit = Annotated[PositiveNumber | None, BeforeValidator(off_is_none), WithJsonSchema(_LIMIT)]
_TIME_LIMIT = {"anyOf": [{"type": "number"}, {"type": "string"}, {"type": "null"}]}
TimeLimit = Annotated[Annotated[Seconds, Field(gt=0)] | None, BeforeValidator(off_is_none), WithJsonSchema(_TIME_LIMIT)]
Weight = Annotated[Number, Field(ge=0, le=1e12)]


def _staged(value: object) -> object:
    """Convert a mapping from points in the budget to values, or a single value, to pairs (span, value)."""
    if isinstance(value, tuple):
        return value
    pairs = value if isinstance(value, dict) else {"0%": value}
    return tuple((Span.parse(start), amount) for start, amount in pairs.items())


def _starts_at_zero(pairs: tuple[tuple[Span, Any], ...]) -> tuple[tuple[Span, Any], ...]:
    if not pairs or pairs[0][0].amount != 0:
        raise ValueError("expected the first entry at 0%, the start of the run")
    if len({start.unit for start, _ in pairs[1:]}) > 1:
        raise ValueError("expected all keys in one unit: shares (30%), tokens (2M) or steps (200 steps)")
    if any(before[0].amount >= after[0].amount for before, after in pairwise(pairs)):
        raise ValueError("expected the keys in ascending order, each once")
    return pairs


def _plain_staged(pairs: tuple[tuple[Span, Any], ...]) -> Any:
    return pairs[0][1] if len(pairs) == 1 else {str(start): value for start, value in pairs}


_STAGED = (BeforeValidator(_staged), AfterValidator(_starts_at_zero), PlainSerializer(_plain_staged, return_type=Any))
_STAGED_SCHEMA = {
    "anyOf": [{"type": "number"}, {"type": "string"}, {"type": "object", "additionalProperties": UNIT_TEXT}]
}
StagedWeight = Annotated[tuple[tuple[Any, Weight], ...], *_STAGED, WithJsonSchema(_STAGED_SCHEMA)]
StagedTokens = Annotated[tuple[tuple[Any, Positive], ...], *_STAGED, WithJsonSchema(_STAGED_SCHEMA)]
