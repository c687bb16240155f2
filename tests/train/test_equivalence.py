"""Whatever the execution plan, training follows the same losses and gradient norms as plain PyTorch."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from tests.train.harness import BINS_PER_BATCH, Cell, cell_recipe, run_cells
from tests.train.reference import train_reference
from turbolm.data.batch.loader import BatchLoader
from turbolm.data.order.batch_order import recipe_order
from turbolm.data.prepare.build import prepare
from turbolm.data.store.token_store import open_store
from turbolm.plan.curriculum import build_curriculum

STEPS = 10


def learning_rates() -> list[float]:
    """The default schedule by hand: 2% warmup (0.2 of a step), then cosine to a tenth, read in the middle of a step."""
    warmup = 0.02 * STEPS
    rates = []
    for step in range(STEPS):
        progress = (step + 0.5 - warmup) / (STEPS - warmup)
        rates.append(3e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))))
    return rates


def settings() -> list[tuple[str, int, int, str, int]]:
    """(model, stage, accumulation, recomputation, world size): of any two, every pair of values."""
    return [
        (model, stage, accumulation, ("none", "full")[(i + j + stage) % 2], 1 + (i + j + stage // 2) % 2)
        for i, model in enumerate(("llama", "gpt2"))
        for stage in (0, 1, 2, 3)
        for j, accumulation in enumerate((1, 3))
    ]


def test_the_cells_below_have_every_pair() -> None:
    """And at every stage every pair of model, accumulation and recomputation, and both models on one rank and on two:
    GPT-2's embedding and head are one tensor, which ZeRO 2 and 3 cut."""
    values = [set(column) for column in zip(*settings(), strict=True)]
    for one, other in itertools.combinations(range(5), 2):
        assert {(row[one], row[other]) for row in settings()} == set(itertools.product(values[one], values[other]))
    for one, other in itertools.combinations((0, 2, 3), 2):
        assert len({(row[1], row[one], row[other]) for row in settings()}) == 4 * 4
    assert len({(row[0], row[1], row[4]) for row in settings()}) == 4 * 4


@pytest.mark.parametrize("world_size", [1, 2])
def test_losses_and_norms_equal_plain_pytorch(world_size: int, tmp_path: Path) -> None:
    cells = [
        Cell(
            name=f"{model}-zero{stage}-accumulation{accumulation}-{checkpointing}",
            model=model,
            zero_stage=stage,
            micro_batch_bins=math.ceil(BINS_PER_BATCH / world_size / accumulation),
            activation_checkpointing=checkpointing,
        )
        for model, stage, accumulation, checkpointing, its_world_size in settings()
        if its_world_size == world_size
    ]
    assert len(cells) == 8
    trained = run_cells(tmp_path, world_size, cells)
    for model in ("llama", "gpt2"):
        recipe = cell_recipe(tmp_path, Cell(name="reference", model=model))
        store = open_store(prepare(recipe))
        expected = np.array(train_reference(recipe, store, learning_rates()))
        assert expected[0, 0] - expected[-1, 0] > 0.1, "the reference must learn, or equality means little"
        assert (expected[:, 1] > 0.5).any(), "clipping must act in some step"
        for name, values in trained.items():
            if name.startswith(model):
                np.testing.assert_allclose(np.array(values), expected, rtol=1e-5, err_msg=name)


def test_micro_batches_hold_unequal_numbers_of_targets(tmp_path: Path) -> None:
    """The equivalence above is only worth something if a mean of means would fail it."""
    recipe = cell_recipe(tmp_path, Cell(name="cell"))
    store = open_store(prepare(recipe))
    order = recipe_order(recipe, store, build_curriculum(recipe), save=False)
    counts = {
        int((micro["targets"] != -100).sum())
        for rank in (0, 1)
        for micro in BatchLoader(order, store, "train", 2, rank, recipe.data.seq_len).global_batch(0).micro_batches
    }
    assert len(counts) > 1
    assert 0 in counts, "a filler"


@pytest.mark.parametrize("clip", [{"max_grad_norm": None}, {"max_grad_norm": None, "max_grad_value": 0.01}])
def test_clipping_off_and_by_value(clip: dict[str, float | None], tmp_path: Path) -> None:
    """Clipping by value acts on the averaged, accumulated gradient at every stage; off means off."""
    cells = [
        Cell(name=f"zero{stage}", zero_stage=stage, micro_batch_bins=1, train=clip, steps=4) for stage in (0, 1, 2, 3)
    ]
    trained = run_cells(tmp_path, 2, cells)
    recipe = cell_recipe(tmp_path, cells[0])
    store = open_store(prepare(recipe))
    expected = np.array(train_reference(recipe, store, learning_rates()[:4]))
    clipped_by_norm = train_reference(cell_recipe(tmp_path, Cell(name="default")), store, learning_rates()[:4])
    assert abs(expected[-1, 0] - clipped_by_norm[-1][0]) > 1e-5, "the setting must change the run"
    for name, values in trained.items():
        np.testing.assert_allclose(np.array(values), expected, rtol=1e-5, err_msg=name)


def test_other_ways_to_run_and_models_that_need_a_row_for_each_document(tmp_path: Path) -> None:
    """CPUAdam with the optimizer state offloaded, recomputation of every second layer, and a recurrent model."""
    cells = [
        Cell(name="offloaded", zero_stage=2, micro_batch_bins=1, offload_optimizer=True, adam_kernel="auto"),
        Cell(name="every-second", zero_stage=3, micro_batch_bins=1, activation_checkpointing=2),
        Cell(name="single", model="mamba", zero_stage=1, micro_batch_bins=1, packing="single"),
    ]
    trained = run_cells(tmp_path, 2, cells)
    store = open_store(prepare(cell_recipe(tmp_path, cells[0])))
    for cell in cells:
        expected = train_reference(cell_recipe(tmp_path, cell), store, learning_rates())
        # CPUAdam computes the same update in another order of operations.
        rtol = 1e-4 if cell.name == "offloaded" else 1e-5
        np.testing.assert_allclose(trained[cell.name], expected, rtol=rtol, err_msg=cell.name)


SCHEDULES: dict[str, dict[str, dict[str, object]]] = {
    "concat": {"data": {"packing": "concat"}},
    "window": {"data": {"grouping": "window"}},
    "stages": {"data": {"length_schedule": {"name": "stages", "at": {"0%": 8, "35%": 16, "70%": 32}}}},
    "growth": {
        "data": {
            "length_schedule": {
                "name": "growth", "start": 8, "over": "40%", "shape": "linear", "remix": 0.5, "remix_every": "20%"
            }
        }
    },
    "buckets": {"data": {"length_schedule": {"name": "buckets", "smallest": 8, "cycles": 2}}},
    "ramp": {"train": {"batch_ramp": {"start": 64, "over": "50%", "num_levels": 3, "lr_scaling": "linear"}}},
}  # fmt: skip


def test_every_strategy_and_schedule(tmp_path: Path) -> None:
    """Sequences and batches of changing size, through the trainer on two processes."""
    cells = [
        Cell(name=name, zero_stage=2, micro_batch_bins=2, steps=8, **settings)  # type: ignore[arg-type]
        for name, settings in SCHEDULES.items()
    ]
    trained = run_cells(tmp_path, 2, cells)
    store = open_store(prepare(cell_recipe(tmp_path, cells[0])))
    shapes = set()
    for cell in cells:
        recipe = cell_recipe(tmp_path, cell)
        curriculum = build_curriculum(recipe)
        order = recipe_order(recipe, store, curriculum, save=False)
        shapes |= {(order.batch(step).seq_len, len(order.batch(step))) for step in range(cell.steps)}
        full = recipe.train.global_batch
        rates = []
        for step in range(cell.steps):  # the default schedule by hand, in tokens
            batch = curriculum.segment(step).global_batch_tokens
            budget, tokens = curriculum.tokens_seen(curriculum.num_steps), curriculum.tokens_seen(step) + batch / 2
            warmup = 0.02 * budget
            cosine = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (tokens - warmup) / (budget - warmup)))
            rate = 3e-3 * (tokens / warmup if tokens < warmup else cosine)
            rates.append(rate * (batch / full if cell.name == "ramp" else 1))
        expected = train_reference(recipe, store, rates)
        np.testing.assert_allclose(trained[cell.name], expected, rtol=1e-5, err_msg=cell.name)
    # The ramp: 2, 3.5 and 5 sequences, rounded to an even number.
    assert {(8, 20), (16, 10), (32, 5), (32, 2), (32, 4)} <= shapes


@pytest.mark.slow
def test_bf16_follows_plain_pytorch_with_either_reduction(tmp_path: Path) -> None:
    cells = [
        Cell(name=f"zero{stage}-{reduced_in}", zero_stage=stage, precision="bf16", micro_batch_bins=1,
             execution={"reduce_precision": reduced_in})
        for stage in (1, 2, 3)
        for reduced_in in ("fp32", "bf16")
    ]  # fmt: skip
    trained = run_cells(tmp_path, 2, cells)
    recipe = cell_recipe(tmp_path, Cell(name="reference"))
    expected = np.array(train_reference(recipe, open_store(prepare(recipe)), learning_rates()))
    for name, values in trained.items():
        np.testing.assert_allclose(np.array(values)[:, 0], expected[:, 0], rtol=2e-3, err_msg=name)
        np.testing.assert_allclose(np.array(values)[:, 1], expected[:, 1], rtol=3e-2, err_msg=name)
    assert trained["zero2-fp32"] != trained["zero2-bf16"]
