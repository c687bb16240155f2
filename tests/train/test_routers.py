"""Mixtures of experts: loss, router loss and the routers' gradient are those of a plain loop, however it is run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.train.harness import (
    BINS_PER_BATCH,
    MIXTURES,
    Cell,
    cell_recipe,
    run_cells,
)
from tests.train.reference import train_reference
from tests.train.test_equivalence import learning_rates
from turbolm.data.prepare import prepare
from turbolm.data.store import open_store

STEPS = 4
CHUNKED = {"loss": "chunked"}
# Every pair of (model, stage, accumulation, how it runs) is somewhere in the two worlds.
CELLS = {
    1: [
        Cell(name="mixtral-zero0", model="mixtral", zero_stage=0, micro_batch_bins=2),
        Cell(name="qwen3_moe-zero1", model="qwen3_moe", zero_stage=1, activation_checkpointing="full"),
        Cell(name="olmoe-zero2", model="olmoe", zero_stage=2, micro_batch_bins=2, execution=CHUNKED),
        Cell(name="mixtral-zero3", model="mixtral", zero_stage=3, activation_checkpointing="selective"),
    ],
    2: [
        Cell(name="qwen3_moe-zero0", model="qwen3_moe", zero_stage=0, micro_batch_bins=1),
        Cell(name="olmoe-zero1", model="olmoe", zero_stage=1, micro_batch_bins=3),
        Cell(name="mixtral-zero2", model="mixtral", zero_stage=2, micro_batch_bins=1, activation_checkpointing="full"),
        Cell(name="qwen3_moe-zero3", model="qwen3_moe", zero_stage=3, micro_batch_bins=3, execution=CHUNKED),
        Cell(name="olmoe-zero3", model="olmoe", zero_stage=3, micro_batch_bins=1, train={"router_aux_loss": 0.2}),
    ],
}  # fmt: skip


@pytest.mark.parametrize("world_size", [1, 2])
def test_loss_router_loss_and_gradients_equal_plain_pytorch(world_size: int, tmp_path: Path) -> None:
    cells = CELLS[world_size]
    for cell in cells:
        cell.steps = STEPS
    assert BINS_PER_BATCH % 2, "some rank has a filler"
    trained = run_cells(tmp_path, world_size, cells)
    store = open_store(prepare(cell_recipe(tmp_path, cells[0])))
    for cell in cells:
        setting = cell.train.get("router_aux_loss", MIXTURES[cell.model]["router_aux_loss_coef"])
        expected = train_reference(cell_recipe(tmp_path, cell), store, learning_rates()[:STEPS], setting)
        np.testing.assert_allclose(trained[cell.name], expected, rtol=1e-5, err_msg=cell.name)


@pytest.mark.slow
def test_compiled_and_recomputed_where_weights_are_gathered(tmp_path: Path) -> None:
    """The hardest way out for router logits; other modes of compilation are tested on the model alone."""
    execution = {"compile": "layers", "loss": "chunked"}
    cell = Cell(name="cell", model="mixtral", zero_stage=3, activation_checkpointing="full", execution=execution)
    cell.steps, cell.micro_batch_bins = STEPS, 2
    trained = run_cells(tmp_path, 2, [cell])["cell"]
    recipe = cell_recipe(tmp_path, cell)
    expected = train_reference(recipe, open_store(prepare(recipe)), learning_rates()[:STEPS], 0.5)
    np.testing.assert_allclose(trained, expected, rtol=1e-5)
