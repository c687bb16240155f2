"""What only a GPU can show: run `pytest tests/gpu` on a machine that has one. Skipped elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models.test_isolation import CONFIGS, SEQ_LEN, VOCAB, make_model
from tests.train.harness import Cell, cell_recipe, run_cells
from tests.train.reference import train_reference
from tests.train.test_equivalence import learning_rates
from turbolm.data.prepare import prepare
from turbolm.data.store import open_store
from turbolm.models.attention import choose_attention
from turbolm.models.isolation import measure_leak

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def test_every_stage_and_precision_follows_plain_pytorch(tmp_path: Path) -> None:
    fp32 = [Cell(name=f"zero{stage}-fp32", zero_stage=stage, device="cuda") for stage in (0, 1, 2, 3)]
    half = [
        Cell(name=f"zero{stage}-{precision}-{attention}", zero_stage=stage, device="cuda", precision=precision,
             attention=attention)
        for stage in (1, 2, 3)
        for precision in ("bf16", "fp16")
        for attention in ("sdpa", "varlen", "flex")
    ]  # fmt: skip
    deepspeed = [Cell(name="fused-fp32", zero_stage=2, device="cuda", adam_kernel="deepspeed")]
    trained = run_cells(tmp_path, 1, [*fp32, *half, *deepspeed])
    recipe = cell_recipe(tmp_path, Cell(name="reference"))
    expected = np.array(train_reference(recipe, open_store(prepare(recipe)), learning_rates()))
    for name, values in trained.items():
        losses = np.array([step[0] for step in values])
        rtol = 1e-4 if "fp32" in name else 2e-2
        np.testing.assert_allclose(losses, expected[:, 0], rtol=rtol, err_msg=name)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("attention", ["sdpa", "flex", "varlen"])
def test_packed_documents_are_isolated(name: str, attention: str) -> None:
    model = make_model(CONFIGS[name], attention).cuda().to(torch.bfloat16)
    settings = {"vocab_size": VOCAB, "seq_len": SEQ_LEN, "attention": attention, "device": torch.device("cuda")}
    leak, scale = measure_leak(model, **settings)
    assert leak <= 1e-3 * scale


def test_auto_takes_varlen_in_half_precision() -> None:
    kind = type(make_model(CONFIGS["llama"], "sdpa"))
    if torch.cuda.get_device_capability() >= (8, 0):
        assert choose_attention("auto", "cuda", "bf16", kind) == "varlen"
    assert choose_attention("auto", "cuda", "fp32", kind) == "sdpa"
