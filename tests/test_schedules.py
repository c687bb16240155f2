"""The learning rate's curve against values worked out by hand: budget 1000 tokens, steps of 10."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbolm.recipe.schedules import SCHEDULES, Ramp, Schedule, lr_ratio


def schedule(name: str, **settings: Any) -> Schedule:
    return SCHEDULES[name].model_validate({"name": name, "warmup": "10%", "min_lr_ratio": 0.1} | settings)


def ratio(tokens: float, this: Schedule, *budgets: int) -> float:
    return lr_ratio(this, tokens, budgets or (1000,), 10)


# Warmup to 100 tokens; the decay of linear, cosine and sqrt runs from 100 to 1000, that of wsd from 800 to 1000.
CURVES: list[tuple[Schedule, dict[int, float]]] = [
    (schedule("constant"), {0: 0, 50: 0.5, 100: 1, 550: 1, 1000: 1}),
    (schedule("linear"), {0: 0, 50: 0.5, 100: 1, 325: 0.775, 550: 0.55, 1000: 0.1}),
    (schedule("cosine"), {0: 0, 50: 0.5, 100: 1, 400: 0.1 + 0.9 * 0.75, 550: 0.55, 700: 0.1 + 0.9 * 0.25, 1000: 0.1}),
    (schedule("sqrt"), {0: 0, 50: 0.5, 100: 1, 325: 0.55, 550: 0.1 + 0.9 * (1 - math.sqrt(0.5)), 1000: 0.1}),
    (schedule("wsd", decay="20%"), {0: 0, 50: 0.5, 100: 1, 500: 1, 800: 1, 850: 0.775, 900: 0.55, 1000: 0.1}),
    (schedule("wsd", decay="20%", decay_shape="cosine"), {800: 1, 900: 0.55, 1000: 0.1}),
    (schedule("wsd", decay="200", decay_shape="sqrt"), {800: 1, 850: 0.55, 1000: 0.1}),
    (schedule("wsd", decay="20 steps", min_lr_ratio=0), {800: 1, 850: 0.75, 1000: 0}),
    (schedule("linear", warmup="5 steps", min_lr_ratio=0), {0: 0, 25: 0.5, 50: 1, 525: 0.5, 1000: 0}),
    (schedule("linear", warmup="0"), {0: 1, 500: 0.55, 1000: 0.1}),
    (schedule("inverse_sqrt"), {0: 0, 50: 0.5, 100: 1, 400: 0.5, 625: 0.4, 900: 1 / 3, 1000: math.sqrt(0.1)}),
    (schedule("inverse_sqrt", min_lr_ratio=0.4), {400: 0.5, 625: 0.4, 900: 0.4, 1000: 0.4}),
    (schedule("inverse_sqrt", warmup="0"), {0: 1, 10: 1, 40: 0.5, 250: 0.2, 1000: 0.1}),
    # Cosines from 100 to 400, 700 and 1000.
    (
        schedule("warm_restarts", cycle="300"),
        {0: 0, 50: 0.5, 100: 1, 250: 0.55, 400: 0.1, 550: 0.55, 700: 0.1, 1000: 0.1},
    ),
    (
        schedule("warm_restarts", cycle="300"),
        {200: 0.1 + 0.9 * 0.75, 300: 0.1 + 0.9 * 0.25, 600: 0.1 + 0.9 * 0.25, 1000: 0.1},
    ),
    # Cosines from 160 to 280, then twice as long to 520, and again to 1000.
    (
        schedule("warm_restarts", cycle_growth=2, cycle="12 steps", min_lr_ratio=0, warmup="16%"),
        {160: 1, 220: 0.5, 280: 0, 400: 0.5, 520: 0, 760: 0.5, 1000: 0},
    ),
]


@pytest.mark.parametrize(
    ("this", "points"), CURVES, ids=lambda value: value.name if isinstance(value, Schedule) else ""
)
def test_curve(this: Schedule, points: dict[int, float]) -> None:
    assert {tokens: ratio(tokens, this) for tokens in points} == pytest.approx(points)


def test_a_kind_of_parameter_decays_over_a_time_of_its_own() -> None:
    this = schedule("wsd", decay="20%", decays={"matrices": "80%", "head": "40 steps"}, min_lr_ratio=0)
    assert this.own_decays == ("head", "matrices")
    assert [ratio(tokens, this.of_kind("matrices")) for tokens in (50, 200, 600, 1000)] == [0.5, 1, 0.5, 0]
    assert [ratio(tokens, this.of_kind("head")) for tokens in (600, 800)] == [1, 0.5]
    assert this.of_kind("vectors") == this and ratio(900, this) == 0.5
    assert this.plateau(1000, 10) == (100, 200)


def test_the_curve_ends_at_its_floor_even_past_the_budget() -> None:
    assert ratio(2000, schedule("cosine")) == pytest.approx(0.1)


def test_a_warmup_as_long_as_the_budget_only_warms_up() -> None:
    this = schedule("wsd", warmup="1000", decay="50%")
    assert [ratio(tokens, this) for tokens in (0, 500, 999)] == pytest.approx([0, 0.5, 0.999])


def test_rewarm_runs_the_shape_again_over_the_added_tokens() -> None:
    """1000 tokens extended to 3000: a warmup of 200 from the floor, then down again over 1800."""
    this = schedule("linear", on_extend="rewarm")
    points = {1000: 0.1, 1100: 0.55, 1200: 1.0, 2100: 0.55, 3000: 0.1}
    assert {tokens: ratio(tokens, this, 1000, 3000) for tokens in points} == pytest.approx(points)


def test_rewarm_twice() -> None:
    """A third budget starts from where the second one ended."""
    this = schedule("linear", on_extend="rewarm", warmup="100")
    points = {50: 0.5, 1000: 0.1, 1050: 0.55, 1100: 1, 2000: 0.1, 2050: 0.55, 2100: 1, 2600: 0.55, 3100: 0.1}
    assert {tokens: ratio(tokens, this, 1000, 2000, 3100) for tokens in points} == pytest.approx(points)


def test_stretch_follows_the_larger_budget_from_where_the_run_stands() -> None:
    this = schedule("linear", on_extend="stretch", warmup="100")
    points = {550: 0.55, 1000: 0.1, 1050: 0.55, 2000 - 475: 0.325, 2000: 0.1}
    assert {tokens: ratio(tokens, this, 1000, 2000) for tokens in points} == pytest.approx(points)


def test_wsd_stretch_goes_back_to_the_plateau() -> None:
    this = schedule("wsd", decay="10%", on_extend="stretch")
    points = {900: 1, 1000: 0.1, 1001: 1, 1800: 1, 1900: 0.55, 2000: 0.1}
    assert {tokens: ratio(tokens, this, 1000, 2000) for tokens in points} == pytest.approx(points)


@pytest.mark.parametrize(
    ("settings", "points"),
    [
        ({"start": 1, "end": 0}, {0: 1, 250: 0.75, 1000: 0, 3000: 0}),
        ({"start": 0.85, "end": 0.95, "over": "20 steps"}, {0: 0.85, 100: 0.9, 200: 0.95, 1000: 0.95}),
        ({"start": 1, "end": 3, "over": "40%", "shape": "cosine"}, {0: 1, 100: 1 + 2 * (1 - math.sqrt(0.5)) / 2,
                                                                   200: 2, 400: 3, 500: 3}),
    ],
)  # fmt: skip
def test_ramps_of_weight_decay_and_momentum(settings: dict[str, Any], points: dict[int, float]) -> None:
    ramp = Ramp.model_validate(settings)
    assert {tokens: ramp.value(tokens, 1000, 10) for tokens in points} == pytest.approx(points)


names = st.sampled_from(list(SCHEDULES))
spans = st.sampled_from(["0", "1%", "10%", "100%", "7 steps", "333"])


@given(names, spans, spans, st.sampled_from(["rewarm", "stretch"]), st.floats(0, 1000))
def test_extending_changes_nothing_up_to_the_old_budget(
    name: str, warmup: str, decay: str, on_extend: str, tokens: float
) -> None:
    this = schedule(name, warmup=warmup, on_extend=on_extend, **({"decay": decay} if name == "wsd" else {}))
    assert ratio(tokens, this, 1000, 5000) == ratio(tokens, this, 1000)
    assert ratio(tokens, this, 1000, 5000, 9000) == ratio(tokens, this, 1000)
    assert ratio(4 * tokens + 1000, this, 1000, 5000, 9000) == ratio(4 * tokens + 1000, this, 1000, 5000)


@given(names, spans, spans, st.floats(0, 6000))
def test_the_ratio_stays_between_zero_and_one(name: str, warmup: str, decay: str, tokens: float) -> None:
    own = {"decay": decay} if name == "wsd" else {}
    assert 0 <= ratio(tokens, schedule(name, warmup=warmup, **own), 1000, 5000) <= 1
