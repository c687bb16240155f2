"""Batch arithmetic by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbolm.errors import UserError
from turbolm.plan.batch import AUTO_MICRO_BATCH_TOKENS, BatchPlan, few_sizes, plan_batch
from turbolm.recipe.schema import Recipe


def recipe(global_batch: int, seq_len: int = 1024, micro_batch: Any = "auto", budget: int = 10**6) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny",
            "model": {"config": {"model_type": "llama"}},
            "tokenizer": {"train": {}},
            "data": {"seq_len": seq_len},
            "train": {"budget": budget, "global_batch": global_batch},
            "execution": {"micro_batch": micro_batch},
        }
    )


def test_even_split() -> None:
    assert plan_batch(recipe(64 * 1024), 4) == BatchPlan(
        seq_len=1024,
        global_batch_tokens=65536,
        bins_per_batch=64,
        world_size=4,
        micro_batch_bins=16,
        gradient_accumulation_steps=1,
        num_filler_bins=0,
    )


def test_groups_that_share_sequences_are_what_batches_are_divided_by() -> None:
    shared = recipe(64 * 1024)
    shared = shared.model_copy(update={"execution": shared.execution.model_copy(update={"sequence_parallel": 4})})
    plan = plan_batch(shared, 8)
    assert (plan.num_groups, plan.micro_batch_bins, plan.gradient_accumulation_steps) == (2, 32, 1)  # 16k a process
    assert plan.num_filler_bins == 0
    with pytest.raises(UserError, match="must divide the 6 processes, got 4; set one of 1, 2, 3, 6"):
        plan_batch(shared, 6)
    with pytest.raises(UserError, match="too few for 512 processes in groups of 4; use at most 256 processes"):
        plan_batch(shared, 512)


@pytest.mark.parametrize(
    (
        "num_sequences",
        "world_size",
        "micro_batch",
        "expected",
    ),  # expected: sequences of a micro-batch, accumulation, filler
    [
        (64, 1, "auto", (16, 4, 0)),
        (40, 1, "auto", (14, 3, 2)),  # 40 in three parts of at most 16
        (64, 3, "auto", (11, 2, 2)),  # a share of 22 in two parts
        (7, 4, "auto", (2, 1, 1)),
        (8, 8, "auto", (1, 1, 0)),
        (64, 4, 1024, (1, 16, 0)),
        (64, 4, 3 * 1024, (3, 6, 8)),
        (8, 4, 8 * 1024, (2, 1, 0)),  # no more than the share
    ],
)
def test_shares(num_sequences: int, world_size: int, micro_batch: Any, expected: tuple[int, int, int]) -> None:
    plan = plan_batch(recipe(num_sequences * 1024, micro_batch=micro_batch), world_size)
    assert (plan.micro_batch_bins, plan.gradient_accumulation_steps, plan.num_filler_bins) == expected


def test_a_sequence_longer_than_16k_goes_alone() -> None:
    plan = plan_batch(recipe(4 * 32768, seq_len=32768), 2)
    assert (plan.micro_batch_bins, plan.micro_batch_tokens, plan.gradient_accumulation_steps) == (1, 32768, 2)


@given(st.integers(1, 300), st.integers(1, 300), st.none() | st.integers(1, 40))
def test_every_sequence_has_a_slot(num_sequences: int, world_size: int, micro_size: int | None) -> None:
    if world_size > num_sequences:
        return
    plan = plan_batch(recipe(num_sequences * 1024, micro_batch=micro_size * 1024 if micro_size else "auto"), world_size)
    slots = plan.micro_batch_bins * plan.gradient_accumulation_steps * world_size
    assert slots == num_sequences + plan.num_filler_bins
    assert plan.num_filler_bins < plan.micro_batch_bins * world_size  # one accumulation step less would not do
    assert plan.micro_batch_bins <= (micro_size or AUTO_MICRO_BATCH_TOKENS // 1024)


def test_errors_say_what_would_work() -> None:
    with pytest.raises(UserError) as caught:
        plan_batch(recipe(8 * 1024), 12)
    assert str(caught.value) == (
        "train.global_batch: 8192 tokens are 8 sequences of data.seq_len 1024, too few for 12 processes; use at most "
        "8 processes, a global_batch of at least 12288, or a seq_len of at most 512"
    )
    with pytest.raises(
        UserError, match=r"must be a multiple of data.seq_len \(1024\), got 5000; nearest: 4096 and 5120"
    ):
        plan_batch(recipe(5000), 1)
    with pytest.raises(UserError, match="execution.micro_batch: .* got 1500; nearest: 1024 and 2048"):
        plan_batch(recipe(4096, micro_batch=1500), 1)


@pytest.mark.parametrize("most", [1, 7, 1000, 1030, 4096])
def test_few_sizes_are_three_at_most_and_hold_the_count(most: int) -> None:
    sizes = {count: few_sizes(count, most) for count in range(1, most + 1)}
    assert all(count <= size <= most for count, size in sizes.items())
    assert len(set(sizes.values())) <= 3
    assert {size for size in sizes.values() if size & (size - 1)} <= {most}


def test_few_sizes_by_hand() -> None:
    assert [few_sizes(count, 4096) for count in (1, 1024, 1025, 2049, 4096)] == [1024, 1024, 2048, 4096, 4096]
    assert [few_sizes(count, 1000) for count in (3, 257, 513)] == [256, 512, 1000]
