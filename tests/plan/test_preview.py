"""What a plan says of its data: epochs of each source and attention saved, against values worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from turbolm.plan.curriculum import Curriculum, Segment
from turbolm.plan.preview import StoreSize, constant_span, mean_span_of_run, run_out_notes, source_uses
from turbolm.recipe.schema import Recipe

WEB_AND_CODE = [{"type": "stdlib", "label": "web", "weight": 3}, {"type": "stdlib", "weight": 1}]


def recipe_with(**data: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test",
            "model": {"config": {"model_type": "llama"}},
            "tokenizer": {"train": {"vocab_size": 300}},
            "data": {"seq_len": 512, **data},
            "train": {"budget": 100_000, "global_batch": 1024},
        }
    )


def test_a_source_that_runs_out_is_named() -> None:
    recipe = recipe_with(sources=WEB_AND_CODE)
    curriculum = Curriculum((Segment(0, 0, (512,), 1000, (0.75, 0.25)),), (100_000,))
    web, code = source_uses(recipe, curriculum, StoreSize((30_000, 25_001), ()))
    assert (web.label, web.planned_tokens, web.available_tokens, web.epochs) == ("web", 75_000, 30_000, 2.5)
    assert (code.label, code.planned_tokens) == ("stdlib[1]", 25_000)
    assert run_out_notes((web, code)) == ["web: its 30,000 tokens run out and are repeated, 2.50 epochs in all"]


def test_without_weights_or_store() -> None:
    recipe = recipe_with()
    curriculum = Curriculum((Segment(0, 0, (512,), 1000),), (100_000,))
    (use,) = source_uses(recipe, curriculum, None)
    assert (use.label, use.planned_tokens, use.available_tokens, use.epochs) == ("stdlib[0]", 100_000, None, None)
    assert run_out_notes((use,)) == []
    (use,) = source_uses(recipe, curriculum, StoreSize((40_000,), ()))
    assert use.epochs == 2.5


def test_spans_of_rows_and_of_documents() -> None:
    # Half of the tokens in sequences of 2, half of 4: a full sequence of n has a mean span of (n + 1) / 2.
    stages = Curriculum((Segment(0, 0, (2,), 8), Segment(2, 16, (4,), 8)), (32,))
    assert mean_span_of_run(stages, None) == pytest.approx((1.5 + 2.5) / 2)
    assert constant_span(stages, None) == 2.5
    # One document of 7: slices 2, 2, 2, 1 and 4, 3; pairs 3 + 3 + 3 + 1 and 10 + 6.
    store = StoreSize((7,), (7,))
    assert mean_span_of_run(stages, store) == pytest.approx((10 / 7 + 16 / 7) / 2)
    assert constant_span(stages, store) == pytest.approx(16 / 7)
    # In buckets of 2 and 4 it is 4, 2, 1: pairs 10 + 3 + 1.
    assert mean_span_of_run(Curriculum((Segment(0, 0, (2, 4), 8),), (32,)), store) == pytest.approx(14 / 7)
