"""What only a GPU can show: run `pytest tests/gpu` on a machine that has one. Skipped elsewhere."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.checkpoint.test_resume import check_late_copies
from tests.models.test_compile import LENGTHS, batches, with_boundaries
from tests.models.test_isolation import CONFIGS, SEQ_LEN, VOCAB, make_model
from tests.models.test_loss import by_hand, problem
from tests.train.harness import Cell, cell_recipe, run_cells
from tests.train.reference import train_reference
from tests.train.test_equivalence import learning_rates
from turbolm.data.prepare.build import prepare
from turbolm.data.store.token_store import open_store
from turbolm.models.attention import choose_attention, model_inputs
from turbolm.models.compile import apply_compile, compilations
from turbolm.models.flash import start_kernels
from turbolm.models.isolation import Probe
from turbolm.models.loss import chunked_linear_loss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def check_against_plain_pytorch(folder: Path, trained: dict[str, list[list[float]]]) -> None:
    recipe = cell_recipe(folder, Cell(name="reference"))
    expected = np.array(train_reference(recipe, open_store(prepare(recipe)), learning_rates()))
    for name, values in trained.items():
        losses = np.array([step[0] for step in values])
        rtol = 1e-4 if "fp32" in name else 2e-2
        np.testing.assert_allclose(losses, expected[:, 0], rtol=rtol, err_msg=name)


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
    check_against_plain_pytorch(tmp_path, trained)


def test_checkpoints_are_copied_beside_the_next_step(tmp_path: Path) -> None:
    layouts = {f"zero{stage}": {"zero_stage": stage} for stage in (0, 1, 2, 3)}
    layouts |= {"bf16": {"zero_stage": 2, "precision": "bf16"}, "fused": {"zero_stage": 2, "adam_kernel": "deepspeed"}}
    layouts |= {"offloaded": {"zero_stage": 2, "offload_optimizer": True}}
    check_late_copies(tmp_path, 1, layouts, device="cuda")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("attention", ["sdpa", "flex", "varlen"])
def test_packed_documents_are_isolated(name: str, attention: str) -> None:
    model = make_model(CONFIGS[name], attention).cuda().to(torch.bfloat16)
    settings = {"vocab_size": VOCAB, "seq_len": SEQ_LEN, "attention": attention}
    probe = Probe(model, **settings)
    assert probe.move_by_neighbors() <= 1e-3 * probe.scale


def test_auto_takes_varlen_in_half_precision() -> None:
    kind = type(make_model(CONFIGS["llama"], "sdpa"))
    if torch.cuda.get_device_capability() >= (8, 0):
        assert choose_attention("auto", "cuda", "bf16", kind) == "varlen"
    assert choose_attention("auto", "cuda", "fp32", kind) == "sdpa"


EXECUTION = {
    "chunked": {"loss": "chunked"},
    "full": {"loss": "full"},
    "compiled-layers": {"compile": "layers"},
    "compiled-layers-zero3": {"compile": "layers", "zero_stage": 3},
    "compiled-model": {"compile": "model"},
    "compiled-model-recomputed": {"compile": "model", "activation_checkpointing": "selective"},
    "recomputed": {"activation_checkpointing": "full"},
    "selective-zero3": {"activation_checkpointing": "selective", "zero_stage": 3},
    "offloaded": {"activation_checkpointing": "offloaded"},
    "overlapping": {"overlap_communication": True, "communication_bucket": 1000},
}


def test_execution_tricks_follow_plain_pytorch(tmp_path: Path) -> None:
    if importlib.util.find_spec("liger_kernel") is not None:
        EXECUTION["liger"] = {"loss": "liger"}
    cells = [
        Cell(name=f"{name}-{precision}", device="cuda", precision=precision, execution={"zero_stage": 1, **execution})
        for name, execution in EXECUTION.items()
        for precision in ("fp32", "bf16")
    ]
    trained = run_cells(tmp_path, 1, cells)
    check_against_plain_pytorch(tmp_path, trained)


def test_the_newest_flash_kernels_agree_with_version_2() -> None:
    """Where they are installed; else the line says what is missing."""
    line = start_kernels("varlen", torch.device("cuda"))
    assert "differ" not in line and "does not work" not in line, line


@pytest.mark.parametrize("mode", ["model", "layers"])
def test_varlen_compiles_a_few_sizes(mode: str) -> None:
    """However many documents the sequences hold."""
    model = make_model(CONFIGS["llama"], "varlen").cuda().to(torch.bfloat16)
    apply_compile(model, mode)
    sizes = set()
    for seq_len in (*LENGTHS, *LENGTHS):
        for batch in batches(seq_len):
            inputs = model_inputs(with_boundaries(batch), "varlen", torch.device("cuda"))
            model(**inputs).logits.sum().backward()
            sizes.add((seq_len, len(inputs["cu_seq_lens_q"]), inputs["max_length_q"]))
    assert compilations.count == len(sizes)


def test_chunked_loss_on_a_gpu() -> None:
    values = {name: value.cuda() for name, value in problem().items()}
    leaves = [values[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    objective, _ = chunked_linear_loss(*leaves, values["targets"], z_loss=0.3, chunk_tokens=7)
    objective.backward()
    exact = [values[name].double().requires_grad_() for name in ("hidden", "weight", "bias")]
    expected, _ = by_hand(*exact, values["targets"], 0.3, None)
    expected.backward()
    torch.testing.assert_close(objective.double(), expected, rtol=1e-3, atol=1e-3)
    for leaf, reference in zip(leaves, exact, strict=True):
        torch.testing.assert_close(leaf.grad.double(), reference.grad, rtol=1e-2, atol=1e-2)
