"""Mixtures of experts: loss, router loss and the routers' gradient are those of a plain loop, however it is run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.train.harness import BINS_PER_BATCH, MIXTURES, Cell, cell_recipe, run_cells
from tests.train.reference import train_reference
from tests.train.test_equivalence import learning_rates
from turbolm.data.prepare.build import prepare
from turbolm.data.store.token_store import open_store

STEPS = 3
RUNS: list[dict[str, Any]] = [
    {"execution": {"loss": "full"}},
    {"activation_checkpointing": "full"},
    {"execution": {"loss": "chunked"}, "train": {"router_aux_loss": 0.2}},
    {"activation_checkpointing": "selective", "execution": {"loss": "chunked"}},
]


def sample() -> Iterator[tuple[int, Cell]]:
    """World size and cell: of model, stage, accumulation and world size every pair of values is there."""
    for i, model in enumerate(MIXTURES):
        for stage in (0, 1, 2, 3):
            world_size, accumulation = 1 + (i + stage) % 2, 1 + 2 * ((i + stage // 2) % 2)
            num_sequences = math.ceil(BINS_PER_BATCH / world_size / accumulation)
            settings = {"model": model, "zero_stage": stage, "micro_batch_bins": num_sequences, "steps": STEPS}
            yield world_size, Cell(name=f"{model}-zero{stage}", **settings, **RUNS[(stage + 2 * i) % 4])


QUICK = ("mixtral-zero3", "qwen3_moe-zero2", "olmoe-zero1")  # each model and each sharded stage once, on two ranks


@pytest.mark.parametrize(
    ("world_size", "is_quick"),
    [(2, True), pytest.param(2, False, marks=pytest.mark.slow), pytest.param(1, False, marks=pytest.mark.slow)],
)
def test_loss_router_loss_and_gradients_equal_plain_pytorch(world_size: int, is_quick: bool, tmp_path: Path) -> None:
    cells = [cell for its_world_size, cell in sample() if its_world_size == world_size]
    assert len(cells) == 6 and BINS_PER_BATCH % 2, "some rank has a filler"
    cells = [cell for cell in cells if (cell.name in QUICK) == is_quick]
    assert len(cells) == (3 if is_quick else 6 - 3 * (world_size == 2))
    trained = run_cells(tmp_path, world_size, cells)
    store = open_store(prepare(cell_recipe(tmp_path, cells[0])))
    for cell in cells:
        setting = cell.train.get("router_aux_loss", MIXTURES[cell.model]["router_aux_loss_coef"])
        expected = train_reference(cell_recipe(tmp_path, cell), store, learning_rates()[:STEPS], setting)
        np.testing.assert_allclose(trained[cell.name], expected, rtol=1e-5, err_msg=cell.name)


@pytest.mark.slow
def test_compiled_and_recomputed_where_weights_are_gathered(tmp_path: Path) -> None:
    """The hardest way out for router logits; other modes of compilation are tested on the model alone."""
    cell = Cell(name="cell", model="mixtral", zero_stage=3, micro_batch_bins=2, steps=STEPS)
    cell.activation_checkpointing, cell.execution = "full", {"compile": "layers", "loss": "chunked"}
    trained = run_cells(tmp_path, 2, [cell])["cell"]
    recipe = cell_recipe(tmp_path, cell)
    expected = train_reference(recipe, open_store(prepare(recipe)), learning_rates()[:STEPS], 0.5)
    np.testing.assert_allclose(trained, expected, rtol=1e-5)
