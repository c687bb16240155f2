"""Where sequence length, batch and mixture change, against points worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from turbolm.plan.curriculum import Curriculum, build_curriculum
from turbolm.plan.rates import lr_factor
from turbolm.recipe.checks import check_recipe
from turbolm.recipe.schema import Recipe


def recipe_with(data: dict[str, Any] | None = None, train: dict[str, Any] | None = None) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test",
            "model": {"config": {"model_type": "llama"}},
            "tokenizer": {"train": {"vocab_size": 300}},
            "data": {"seq_len": 512, **(data or {})},
            "train": {"budget": 100_000, "global_batch": 1024, **(train or {})},
        }
    )


def curriculum_of(*budgets: int, data: dict[str, Any] | None = None, train: dict[str, Any] | None = None) -> Curriculum:
    recipe = recipe_with(data, train)
    assert check_recipe(recipe) == []
    return build_curriculum(recipe, budgets or None)


def lengths(curriculum: Curriculum) -> list[tuple[int, int]]:
    return [(segment.first_step, segment.seq_len) for segment in curriculum.segments]


def batches(curriculum: Curriculum) -> list[tuple[int, int, int]]:
    return [(s.first_step, s.first_token, s.global_batch_tokens) for s in curriculum.segments]


def test_nothing_scheduled() -> None:
    curriculum = curriculum_of()
    assert batches(curriculum) == [(0, 0, 1024)]
    assert curriculum.num_steps == 98  # 97.66
    assert curriculum.tokens_seen(98) == 98 * 1024
    assert curriculum.whole_budgets_tokens == [98 * 1024]
    assert [curriculum.steps_for(tokens) for tokens in (0, 1, 1024, 1025)] == [0, 1, 1, 2]


def test_stages_begin_at_the_first_step_at_or_after_their_point() -> None:
    # 30% is 30,000 tokens, in step 29.3; 60 steps are 61,440 tokens.
    stages = {"name": "stages", "at": {"0%": 128, "30%": 256, "60%": 512}}
    assert lengths(curriculum_of(data={"length_schedule": stages})) == [(0, 128), (30, 256), (59, 512)]
    stages = {"name": "stages", "at": {"0 steps": 128, "30 steps": 256, "60 steps": 512}}
    assert lengths(curriculum_of(data={"length_schedule": stages})) == [(0, 128), (30, 256), (60, 512)]


def test_exponential_growth_spends_as_long_at_each_length() -> None:
    growth = {"name": "growth", "start": 64, "over": "60%", "num_lengths": 4}
    # 64, 128, 256, 512: changes at thirds of 60,000 tokens.
    assert lengths(curriculum_of(data={"length_schedule": growth})) == [(0, 64), (20, 128), (40, 256), (59, 512)]


def test_linear_growth_reaches_a_length_when_the_line_does() -> None:
    growth = {"name": "growth", "start": 64, "over": "70%", "shape": "linear", "num_lengths": 4}
    # The line from 64 to 512 over 70,000 tokens reaches 128 at 1/7 and 256 at 3/7 of it.
    assert lengths(curriculum_of(data={"length_schedule": growth})) == [(0, 64), (10, 128), (30, 256), (69, 512)]


def test_lengths_of_growth_divide_the_batch() -> None:
    growth = {"name": "growth", "start": 64, "over": "50%", "num_lengths": 9}
    data, train = {"length_schedule": growth, "seq_len": 768}, {"global_batch": 768 * 4}
    curriculum = curriculum_of(data=data, train=train)
    assert curriculum.seq_lens[0] == 64
    assert curriculum.seq_lens[-1] == 768
    assert 96 in curriculum.seq_lens
    assert all(768 * 4 % length == 0 for length in curriculum.seq_lens)


def test_remix_brings_short_rows_back() -> None:
    growth = {"name": "growth", "start": 128, "over": "20%", "num_lengths": 3, "remix": 0.25, "remix_every": "40%"}
    # After 20,000 tokens periods of 40,000 whose last quarter is short; but the run does not end with short sequences.
    expected = [(0, 128), (10, 256), (20, 512), (49, 256), (59, 512)]
    assert lengths(curriculum_of(data={"length_schedule": growth})) == expected


def test_buckets_have_all_lengths_in_each_cycle() -> None:
    data = {"length_schedule": {"name": "buckets", "smallest": 128, "cycles": 2}}
    curriculum = curriculum_of(data=data)
    assert [(s.first_step, s.seq_lens, s.grow) for s in curriculum.segments] == [
        (0, (128, 256, 512), True),
        (49, (128, 256, 512), True),  # 50,000 tokens, 48.8 steps
    ]
    data = {"length_schedule": {"name": "buckets", "smallest": 128, "order": "shuffled"}}
    assert [(s.first_step, s.grow) for s in curriculum_of(data=data).segments] == [(0, False)]


def test_a_batch_ramp_by_hand() -> None:
    curriculum = curriculum_of(train={"batch_ramp": {"at": {"0%": 512, "10%": 1024}}})
    assert batches(curriculum) == [(0, 0, 512), (20, 10240, 1024)]  # 10,000 tokens, 19.5 steps
    assert curriculum.num_steps == 20 + 88  # 89,760 tokens are left
    assert curriculum.tokens_seen(21) == 11264
    assert curriculum.steps_for(10240) == 20
    assert curriculum.steps_for(10241) == 21


def test_a_linear_batch_ramp() -> None:
    ramp = {"start": 1024, "over": "30%", "num_levels": 4}
    curriculum = curriculum_of(train={"batch_ramp": ramp, "global_batch": 4096})
    # 1024, 2048, 3072 for a third of 30,000 tokens each, then 4096.
    assert batches(curriculum) == [(0, 0, 1024), (10, 10240, 2048), (15, 20480, 3072), (19, 32768, 4096)]


@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("sqrt", 0.5), ("linear", 0.25)])
def test_learning_rate_follows_the_batch(rule: str, factor: float) -> None:
    recipe = recipe_with(train={"batch_ramp": {"start": 512, "lr_scaling": rule}})
    assert lr_factor(recipe.train.batch_ramp, 256, 1024) == factor
    assert lr_factor(recipe.train.batch_ramp, 1024, 1024) == 1.0
    assert lr_factor(None, 256, 1024) == 1.0


def test_weights_change_with_the_budget() -> None:
    sources = [
        {"type": "stdlib", "label": "web", "weight": {"0%": 3, "50%": 1}},
        {"type": "stdlib", "label": "code", "weight": 1},
    ]
    curriculum = curriculum_of(data={"sources": sources})
    assert [(s.first_step, s.weights) for s in curriculum.segments] == [(0, (0.75, 0.25)), (49, (0.5, 0.5))]
    web, code = curriculum.source_tokens() or (0, 0)
    assert web == pytest.approx(0.75 * 49 * 1024 + 0.5 * 49 * 1024)
    assert web + code == pytest.approx(98 * 1024)


def test_an_extension_goes_on_with_what_the_schedules_lead_to() -> None:
    growth = {"name": "growth", "start": 256, "over": "100%"}
    first = curriculum_of(100_000, data={"length_schedule": growth})
    extended = curriculum_of(100_000, 150_000, data={"length_schedule": growth})
    assert lengths(first)[-1] == (0, 256)
    assert extended.segments[: len(first.segments)] == first.segments
    assert lengths(extended)[-1] == (98, 512)
    assert extended.num_steps == 147  # 146.5


def test_an_extension_without_schedules_changes_no_segment() -> None:
    assert curriculum_of(100_000, 150_000).segments == curriculum_of(100_000).segments


@pytest.mark.parametrize(
    ("data", "train", "expected"),
    [
        (
            {"length_schedule": {"name": "stages", "at": {"0%": 128, "50%": 256}}},
            {},
            "data.length_schedule.at: must reach data.seq_len (512) and no more, got 256 as its longest",
        ),
        (
            {"length_schedule": {"name": "stages", "at": {"0%": 96, "50%": 512}}},
            {},
            "data.length_schedule.at: every sequence length must divide train.global_batch (1024), got 96",
        ),
        (
            {"length_schedule": {"name": "growth", "start": 512}},
            {},
            "data.length_schedule.start: must be less than data.seq_len (512), got 512",
        ),
        (
            {"length_schedule": {"name": "buckets", "smallest": 96}, "packing": "concat"},
            {},
            "data.length_schedule.smallest: must be data.seq_len (512) divided by a power of two, got 96",
        ),
        (
            {"length_schedule": {"name": "buckets", "smallest": 64}, "packing": "concat"},
            {},
            "data.packing: must be best_fit with buckets, got concat",
        ),
        (
            {},
            {"batch_ramp": {"at": {"0%": 512, "10%": 2048}}},
            "train.batch_ramp.at: must end with train.global_batch (1024), got 2048",
        ),
        (
            {},
            {"batch_ramp": {"start": 700}},
            "train.batch_ramp.start: must be a multiple of data.seq_len (512), got 700; nearest: 512 and 1024",
        ),
    ],
)
def test_what_does_not_fit_is_named(data: dict[str, Any], train: dict[str, Any], expected: str) -> None:
    found = [f"{'.'.join(map(str, f.path))}: {f.message}" for f in check_recipe(recipe_with(data, train))]
    assert expected in found
