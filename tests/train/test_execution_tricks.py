"""Execution tricks change how a run is carried out, not what it learns: losses and norms are those of plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.train.harness import Cell, cell_recipe, run_cells
from tests.train.reference import train_reference
from tests.train.test_equivalence import learning_rates
from turbolm.data.prepare.build import prepare
from turbolm.data.store.token_store import open_store

STEPS = 4
COMPILED: dict[str, dict[str, Any]] = {
    "model-zero1": {"zero_stage": 1, "compile": "model"},
    "model-zero2-recomputed": {"zero_stage": 2, "compile": "model", "activation_checkpointing": "full"},
    "layers-zero0": {"zero_stage": 0, "compile": "layers"},
    "layers-zero1-selective": {"zero_stage": 1, "compile": "layers", "activation_checkpointing": "selective"},
    "layers-zero3-every-second": {"zero_stage": 3, "compile": "layers", "activation_checkpointing": 2},
}


NOT_COMPILED: dict[str, dict[str, Any]] = {
    "full-loss-zero0": {"zero_stage": 0, "loss": "full"},
    "full-loss-zero3": {"zero_stage": 3, "loss": "full"},
    "chunked-loss-zero2": {"zero_stage": 2, "loss": "chunked"},
    "chunked-loss-zero3-recomputed": {"zero_stage": 3, "loss": "chunked", "activation_checkpointing": "full"},
    "selective-zero2": {"zero_stage": 2, "activation_checkpointing": "selective"},
    "selective-zero3": {"zero_stage": 3, "activation_checkpointing": "selective"},
    "offloaded-zero3": {"zero_stage": 3, "activation_checkpointing": "offloaded"},
    "overlap-zero2": {"zero_stage": 2, "overlap_communication": True, "communication_bucket": 1000},
    "overlap-zero3": {"zero_stage": 3, "overlap_communication": True, "communication_bucket": 1000},
    "no-overlap-zero3": {"zero_stage": 3, "overlap_communication": False},
}


def check_cells(folder: Path, tricks: dict[str, dict[str, Any]], model: str = "llama") -> None:
    """Two processes train a tiny model with each of `tricks`, as the independent trainer does."""
    cells = [
        Cell(name=name, model=model, micro_batch_bins=2, steps=STEPS, execution=execution)
        for name, execution in tricks.items()
    ]
    trained = run_cells(folder, 2, cells)
    store = open_store(prepare(cell_recipe(folder, cells[0])))
    expected = train_reference(cell_recipe(folder, cells[0]), store, learning_rates()[:STEPS])
    for name, values in trained.items():
        np.testing.assert_allclose(np.array(values), expected, rtol=1e-5, err_msg=name)


def test_not_compiled(tmp_path: Path) -> None:
    check_cells(tmp_path, NOT_COMPILED)


@pytest.mark.slow
def test_not_compiled_with_tied_embeddings(tmp_path: Path) -> None:
    """What acts on the head or inside the layers; how messages are sent knows no model."""
    names = [name for name in NOT_COMPILED if "loss" in name or "selective" in name]
    assert len(names) == 6
    check_cells(tmp_path, {name: NOT_COMPILED[name] for name in names}, "gpt2")


@pytest.mark.slow
def test_compiled(tmp_path: Path) -> None:
    check_cells(tmp_path, COMPILED)
