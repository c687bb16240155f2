"""`make gpu-check`: in three minutes, whether a GPU trains what it should. GPU_CHECK_SMOKE=1 tries it on a CPU."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from tests.models.test_isolation import CONFIGS, SEQ_LEN, VOCAB, make_model
from tests.train.harness import Cell, cell_recipe, run_cells
from tests.train.reference import train_reference
from tests.train.test_equivalence import learning_rates
from turbolm.data.prepare.build import prepare
from turbolm.data.store.token_store import open_store
from turbolm.models.isolation import Probe

ON_GPU = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not ON_GPU and "GPU_CHECK_SMOKE" not in os.environ, reason="needs an NVIDIA GPU")
DEVICE, KERNEL = ("cuda", "varlen") if ON_GPU else ("cpu", "sdpa")
SAVED_AT = 4


def _cell(name: str, zero_stage: int, **changes: object) -> Cell:
    return Cell(name, device=DEVICE, precision="bf16", attention=KERNEL, zero_stage=zero_stage, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Losses by step: plain PyTorch in fp32, bf16 at each stage, resumed, compiled; one process trains all."""
    folder = tmp_path_factory.mktemp("check")
    checkpoints = folder / "checkpoints"
    cells = [
        _cell("zero1", 1),
        _cell("zero2", 2, save_at=[SAVED_AT], save_in=str(checkpoints)),
        _cell("zero3", 3),
        _cell("resumed", 3, load=str(checkpoints / f"step-{SAVED_AT:08}")),
        _cell("compiled", 1, execution={"compile": "layers"}, steps=2),
    ]
    trained = run_cells(folder, 1, cells)
    recipe = cell_recipe(folder, Cell(name="reference"))
    trained["plain"] = train_reference(recipe, open_store(prepare(recipe)), learning_rates())
    return {name: np.array([step[0] for step in steps]) for name, steps in trained.items()}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_follows_plain_pytorch(losses: dict[str, np.ndarray], stage: int) -> None:
    np.testing.assert_allclose(losses[f"zero{stage}"], losses["plain"], rtol=5e-3)


def test_a_run_resumes_at_another_stage(losses: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(losses["resumed"], losses["zero2"][SAVED_AT:], rtol=1e-3)


def test_a_compiled_step_computes_the_same(losses: dict[str, np.ndarray]) -> None:
    np.testing.assert_allclose(losses["compiled"], losses["plain"][:2], rtol=5e-3)


def test_neighbors_in_a_sequence_do_not_see_each_other() -> None:
    model = make_model(CONFIGS["llama"], KERNEL).to(DEVICE, torch.bfloat16)
    probe = Probe(model, vocab_size=VOCAB, seq_len=SEQ_LEN, attention=KERNEL)
    assert probe.move_by_neighbors() <= 1e-3 * probe.scale
