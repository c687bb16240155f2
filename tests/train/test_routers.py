"""Mixtures of experts: loss, router loss and the routers' gradient are those of a plain loop, however it is run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.train.harness import (
    BINS_PER_BATCH,
    MIXTURES,
    MODELS,
    SEQ_LEN,
    Cell,
    cell_recipe,
    make_recipe,
    run_cells,
    train_in_world,
)
from tests.train.reference import train_reference
from tests.train.test_equivalence import learning_rates
from turbolm.checkpoint.manifest import BUFFERS, list_checkpoints
from turbolm.data.prepare.build import prepare
from turbolm.data.store.token_store import open_store
from turbolm.report.metrics import read_lines
from turbolm.train.run_directory import run_directory

STEPS, BIAS_STEPS = 3, 5
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


STEP = 0.05  # of the bias: several tokens choose another expert after each step


def balanced(folder: Path, name: str, **settings: Any) -> Cell:
    save_in = str(folder / "saved" / name)
    train = {"router_bias_update": STEP, **settings.pop("train", {})}
    return Cell(
        name=name, model="glm4_moe", train=train, steps=BIAS_STEPS, save_at=[BIAS_STEPS], save_in=save_in, **settings
    )


def paper(model: torch.nn.Module) -> Callable[[], None]:
    """Algorithm 1 of arXiv 2408.15664 for a model that is given the whole global batch, one document a call."""
    counts = {}
    for layer in model.model.layers:
        counts[layer] = torch.zeros(8, dtype=torch.int64)

        def count(_: Any, __: Any, output: Any, of_layer: torch.Tensor = counts[layer]) -> None:
            of_layer += torch.bincount(output[2].flatten(), minlength=8)

        layer.mlp.gate.register_forward_hook(count)

    def after_step() -> None:
        for layer, load in counts.items():
            for expert in range(8):
                error = load.double().mean() - load[expert]
                layer.mlp.gate.e_score_correction_bias[expert] += STEP * ((error > 0).float() - (error < 0).float())
            load.zero_()

    return after_step


def biases(folder: Path, name: str) -> torch.Tensor:
    saved = load_file(folder / "saved" / name / f"step-{BIAS_STEPS:08d}" / BUFFERS)
    return torch.stack([value for key, value in sorted(saved.items()) if key.endswith("e_score_correction_bias")])


def check_balance(folder: Path, world_size: int, cells: list[Cell]) -> None:
    kept: list[torch.nn.Module] = []

    def watch(model: torch.nn.Module) -> Callable[[], None]:
        kept.append(model)
        return paper(model)

    trained = run_cells(folder, world_size, cells)
    recipe = cell_recipe(folder, cells[0])
    rates = learning_rates()[:BIAS_STEPS]
    expected = train_reference(recipe, open_store(prepare(recipe)), rates, watch=watch)
    moved = torch.stack([layer.mlp.gate.e_score_correction_bias for layer in kept[0].model.layers])
    assert moved.min() < 0 < moved.max() and moved.unique().numel() > 2
    for cell in cells:
        if cell.precision == "fp32":
            np.testing.assert_allclose(trained[cell.name], np.array(expected)[:, :2], rtol=1e-5, err_msg=cell.name)
            assert torch.equal(biases(folder, cell.name), moved), cell.name
        else:  # its weights round, and its biases do not
            steps = biases(folder, cell.name) / STEP
            assert steps.dtype == torch.float32 and steps.unique().numel() > 2, cell.name
            torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-5)


def test_biases_move_as_in_the_paper(tmp_path: Path) -> None:
    """Over two ranks, micro-batches and fillers, recomputed layers included; the routing, and so the losses, follow."""
    check_balance(tmp_path, 2, [
        balanced(tmp_path, "zero1", zero_stage=1, micro_batch_bins=1, activation_checkpointing="full"),
        balanced(tmp_path, "zero3", zero_stage=3, micro_batch_bins=3),
    ])  # fmt: skip


@pytest.mark.slow
def test_the_load_becomes_even_and_the_biases_are_exported(tmp_path: Path) -> None:
    """The busiest expert's share of each layer, over the last steps of a run; 1/8 is even."""
    shares = {}
    for rate in (0.0, 0.02):
        recipe = make_recipe(
            tmp_path,
            model={"config": MODELS["glm4_moe"]},
            train={"budget": 40 * BINS_PER_BATCH * SEQ_LEN, "router_bias_update": rate},
            checkpoint={"every": "100%"},
            evaluation={"every": "100%", "tokens": 2 * SEQ_LEN},
            logging={"sample_tokens": 0},
        ).model_copy(update={"name": f"rate{rate}"})
        prepare(recipe)
        assert train_in_world(recipe) == 0
        run = run_directory(recipe)
        steps = [line for line in read_lines(run.metrics) if "train/loss" in line]
        shares[rate] = np.mean([line["experts/max_share"] for line in steps[-10:]], axis=0)
    exported = load_file(run.path / "export" / "model.safetensors")
    saved = load_file(list_checkpoints(run.checkpoints)[-1][1] / BUFFERS)
    names = [name for name in exported if name.endswith("e_score_correction_bias")]
    assert len(names) == 2 and all(torch.equal(exported[name], saved[name]) for name in names)
    assert (shares[0.02] < 0.8 * shares[0.0]).all(), shares


@pytest.mark.slow
def test_biases_move_at_any_layout(tmp_path: Path) -> None:
    check_balance(tmp_path, 2, [
        balanced(tmp_path, "zero0", zero_stage=0, micro_batch_bins=3),
        balanced(tmp_path, "zero2", zero_stage=2, micro_batch_bins=1),
        balanced(tmp_path, "shared", zero_stage=1, micro_batch_bins=1, execution={"sequence_parallel": 2}),
        balanced(tmp_path, "bf16", zero_stage=1, micro_batch_bins=1, precision="bf16"),
        balanced(tmp_path, "compiled", zero_stage=2, micro_batch_bins=3, execution={"compile": "layers"},
                 compiler="aot_eager"),
        balanced(tmp_path, "compiled3", zero_stage=3, micro_batch_bins=3, activation_checkpointing="full",
                 execution={"compile": "layers"}, compiler="aot_eager"),
    ])  # fmt: skip


@pytest.mark.slow
def test_compiled_and_recomputed_where_weights_are_gathered(tmp_path: Path) -> None:
    """The hardest way out for router logits; other modes of compilation are tested on the model alone."""
    cell = Cell(name="cell", model="mixtral", zero_stage=3, micro_batch_bins=2, steps=STEPS)
    cell.activation_checkpointing, cell.execution = "full", {"compile": "layers", "loss": "chunked"}
    trained = run_cells(tmp_path, 2, [cell])["cell"]
    recipe = cell_recipe(tmp_path, cell)
    expected = train_reference(recipe, open_store(prepare(recipe)), learning_rates()[:STEPS], 0.5)
    np.testing.assert_allclose(trained, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "steps", "lr"),  # at a high rate rounding sends a token to another expert after some steps
    [("dbrx", 5, 3e-3), pytest.param("crowded", 20, 5e-4, marks=pytest.mark.slow)],
)
def test_stage_3_with_experts_without_tokens(model: str, steps: int, lr: float, tmp_path: Path) -> None:
    """One token, one expert: of 40 experts at least 8 get none in a micro-batch of 32 tokens, others on each rank."""
    assert SEQ_LEN < 40
    schedule, train = (
        {"name": "constant", "warmup": 0},
        {"router_aux_loss": "off", "budget": 50 * BINS_PER_BATCH * SEQ_LEN},
    )
    cell = Cell(name=model, model=model, zero_stage=3, micro_batch_bins=1, steps=steps, schedule=schedule, train=train)
    cell.optimizer = {"lr": lr}
    trained = run_cells(tmp_path, 2, [cell])[model]
    recipe = cell_recipe(tmp_path, cell)
    expected = train_reference(recipe, open_store(prepare(recipe)), [lr] * steps)
    assert expected[0][0] - expected[-1][0] > 0.1
    np.testing.assert_allclose(trained, np.array(expected)[:, :2], rtol=1e-5)
