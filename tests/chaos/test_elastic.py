"""One run that changes its processes, ZeRO stage and offload at every start is the run that never did."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.checkpoint.test_resume import read_tensors
from tests.train.harness import Cell, cell_recipe, run_cells
from tests.train.reference import train_reference
from tests.train.test_equivalence import learning_rates
from turbolm.data.batch.loader import BatchLoader
from turbolm.data.order.batch_order import recipe_order
from turbolm.data.prepare.build import prepare
from turbolm.data.store.token_store import open_store
from turbolm.plan.machine import detect_machine
from turbolm.plan.plan import build_plan

pytestmark = [pytest.mark.chaos, pytest.mark.slow]
LEGS = [  # processes, ZeRO stage, optimizer offloaded, last step
    (2, 1, False, 2),
    (1, 2, True, 4),
    (3, 3, False, 6),
    (2, 0, False, 8),
    (2, 3, True, 10),
]


def digest(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


def test_a_run_that_moves_at_every_start(tmp_path: Path) -> None:
    losses, ledger, source = [], [], None  # type: ignore[var-annotated]
    for number, (world_size, stage, offload, end) in enumerate(LEGS):
        saved, again = tmp_path / f"saved{number}", tmp_path / f"again{number}"
        cell = Cell(
            name=f"leg{number}", zero_stage=stage, offload_optimizer=offload, micro_batch_bins=1, steps=end,
            load=str(source) if source else None, save_loaded_in=str(again) if source else None,
            save_at=[end], save_in=str(saved),
        )  # fmt: skip
        losses += run_cells(tmp_path, world_size, [cell])[cell.name]
        ledger += json.loads((tmp_path / f"{cell.name}.ledger.json").read_text())
        if source:
            written, read = digest(read_tensors(source)), digest(read_tensors(again / source.name))
            assert {name.split("/")[0] for name in written} == {"weight", "exp_avg", "exp_avg_sq"}
            assert read == written, f"loaded by {world_size} processes at ZeRO-{stage}, offload {offload}"
        source = saved / f"step-{end:08d}"
    recipe = cell_recipe(tmp_path, Cell(name="whole"))
    store = open_store(prepare(recipe))
    order = recipe_order(recipe, store, build_plan(recipe, detect_machine(), 1).curriculum, save=False)
    loader = BatchLoader(order, store, "train", 1, 0, "auto")
    assert ledger == [loader.global_batch(index).samples_digest for index in range(10)]
    np.testing.assert_allclose(losses, train_reference(recipe, store, learning_rates()), rtol=1e-5)
