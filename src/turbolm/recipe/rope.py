"""Rotary positions for a longer context than a checkpoint was trained on (`model.rope_parameters`). Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from turbolm.errors import UserError
from turbolm.recipe.fields import Number, Positive, PositiveNumber, Section, list_is_tuple

RopeType = Literal["default", "linear", "llama3", "yarn", "longrope"]
Factors = Annotated[tuple[PositiveNumber, ...], BeforeValidator(list_is_tuple), Field(min_length=1, max_length=4096)]

_ORIGINAL = "original_max_position_embeddings"
# Settings of each type, as in Transformers: those it needs, and those it has besides.
_SETTINGS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL}, set()),
    "yarn": ({"factor", _ORIGINAL}, {"attention_factor", "beta_fast", "beta_slow"}),
    "longrope": ({"factor", "long_factor", _ORIGINAL}, {"short_factor", "attention_factor"}),
}
_ANY = {"rope_type", "rope_theta"}
_BY_LENGTH = "its factors follow the longest sequence of a batch, so a packed document would depend on the others; "


def _is_fixed(value: object) -> object:
    if value in ("dynamic", "ntk"):
        raise ValueError(f"expected no {value}: {_BY_LENGTH}use yarn, or `default` with a larger rope_theta")
    return value


class RopeParameters(Section):
    """Rotary positions that replace a checkpoint's, in Transformers' words; its rope_theta stays unless given."""

    rope_type: Annotated[RopeType, BeforeValidator(_is_fixed)] = Field(
        description="default: unstretched, with another rope_theta; linear, yarn, llama3 or longrope: stretched"
    )
    rope_theta: PositiveNumber | None = Field(None, description="base of the frequencies; none: the checkpoint's")
    factor: Annotated[Number, Field(ge=1)] | None = Field(None, description="how many times longer the context gets")
    original_max_position_embeddings: Positive | None = Field(
        None, description="positions that the checkpoint was trained on, with yarn, llama3 and longrope"
    )
    attention_factor: PositiveNumber | None = Field(
        None, description="scale of queries and keys, with yarn and longrope; none: that of their papers"
    )
    beta_fast: PositiveNumber | None = Field(None, description="yarn: more rotations than this are kept; none: 32")
    beta_slow: PositiveNumber | None = Field(None, description="yarn: fewer rotations are stretched; none: 1")
    low_freq_factor: PositiveNumber | None = Field(None, description="llama3: where frequencies are stretched in full")
    high_freq_factor: PositiveNumber | None = Field(None, description="llama3: where frequencies are kept")
    long_factor: Factors | None = Field(
        None, description="longrope: the factor of each frequency, half the head's size"
    )
    short_factor: Factors | None = Field(
        None, description="longrope: leave it out, or repeat long_factor: one set of factors for every length"
    )

    @model_validator(mode="after")
    def _coherent(self) -> RopeParameters:
        given = {name for name in type(self).model_fields if getattr(self, name) is not None} - _ANY
        needed, others = _SETTINGS[self.rope_type]
        if missing := needed - given:
            raise ValueError(f"expected {', '.join(sorted(missing))} with rope_type {self.rope_type}")
        if foreign := given - needed - others:
            raise ValueError(f"expected no {', '.join(sorted(foreign))} with rope_type {self.rope_type}")
        if self.rope_type == "default" and self.rope_theta is None:
            raise ValueError("expected rope_theta with rope_type default: it changes nothing else")
        if self.short_factor not in (None, self.long_factor):
            raise ValueError(f"expected no other short_factor than long_factor: {_BY_LENGTH}leave it out")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and low >= high:
            raise ValueError("expected low_freq_factor below high_freq_factor")
        if (self.beta_fast or 32) <= (self.beta_slow or 1):
            raise ValueError("expected beta_slow (1 by default) below beta_fast (32 by default)")
        return self

    def over(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """Return Transformers' `rope_parameters`: these, and of a checkpoint's own what they leave to it."""
        kept = {name: own[name] for name in ("rope_theta", "partial_rotary_factor") if own.get(name) is not None}
        given = self.model_dump(mode="json", exclude_none=True)
        if self.rope_type == "longrope":
            given["short_factor"] = given["long_factor"]
        return kept | given

    def positions(self, own: int, seq_len: int) -> int:
        """Return `max_position_embeddings`: a checkpoint's `own`, or what `seq_len` or the factor needs beyond."""
        original = self.original_max_position_embeddings
        stretched = int(self.factor * original) if self.factor is not None and original is not None else 0
        return max(own, seq_len, stretched)


def too_few_positions(positions: int, seq_len: int, *, pretrained: bool) -> UserError:
    """Return the error for sequences longer than a model's positions."""
    cure = "; model.rope_parameters extends rotary ones" if pretrained else ""
    return UserError(f"data.seq_len: the model has positions for {positions} tokens, fewer than {seq_len}{cure}")
