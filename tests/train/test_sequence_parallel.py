"""Groups of ranks that share their sequences train as plain PyTorch does, whatever the group and the stage."""

from __future__ import annotations

import itertools
import math
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from tests.checkpoint.test_resume import END, SAVED, read_tensors
from tests.train.harness import (
    BINS_PER_BATCH,
    MIXTURES,
    SEQ_LEN,
    Cell,
    cell_recipe,
    make_recipe,
    run_cells,
    train_in_world,
)
from tests.train.reference import train_reference
from tests.train.test_equivalence import STEPS, learning_rates
from turbolm.data.prepare.build import prepare
from turbolm.data.store.token_store import open_store
from turbolm.engine.start import build_accelerator
from turbolm.errors import UserError
from turbolm.plan import deepspeed
from turbolm.plan.machine import Machine
from turbolm.plan.plan import build_plan
from turbolm.report.metrics import read_lines
from turbolm.train.run_directory import run_directory

LAYOUTS = [(2, 1), (2, 2), (4, 1), (4, 2)]  # processes of a group, groups; groups of one are in test_equivalence
CPUS = Machine(0, None, None, num_cpus=2, cpu_has_bf16=True, memory_bytes=2**34)
REASON = "DeepSpeed's own sequence parallelism lets packed documents see each other"
MODELS = ["llama", "qwen3", "gpt2"]  # 4 heads of queries; 2, 1 and 4 of keys, which groups of 4 have to repeat


def settings() -> list[tuple[int, int, int, int, str]]:
    """(processes of a group, groups, ZeRO stage, accumulation, model): of any two, every pair of values."""
    return [
        (*layout, stage, 1 + 2 * ((i + stage + stage // 2) % 2), MODELS[(i + stage) % 3])
        for i, layout in enumerate(LAYOUTS)
        for stage in (0, 1, 2, 3)
    ]


def cell(shared_by: int, num_groups: int, stage: int, accumulation: int, model: str, **changes: Any) -> Cell:
    return Cell(
        name=f"{model}-{shared_by}x{num_groups}-zero{stage}-accumulation{accumulation}",
        model=model,
        zero_stage=stage,
        micro_batch_bins=math.ceil(BINS_PER_BATCH / num_groups / accumulation),
        execution={"sequence_parallel": shared_by},
        **changes,
    )


def test_the_cells_below_have_every_pair() -> None:
    values = [set(column) for column in zip(*settings(), strict=True)]
    for one, other in itertools.combinations(range(5), 2):
        found = {(row[one], row[other]) for row in settings()}
        assert found == set(itertools.product(values[one], values[other]))


class References:
    """Plain PyTorch's (loss, gradient norm) of every step by model, once each, on a store that all cells here share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[tuple[str, str], np.ndarray] = {}

    def of(self, model: str, packing: str = "best_fit") -> np.ndarray:
        if (model, packing) not in self.known:
            recipe = cell_recipe(self.folder, Cell("reference", model=model, packing=packing))
            store = open_store(prepare(recipe))
            coefficient = 0.5 if model in MIXTURES else None
            self.known[model, packing] = np.array(train_reference(recipe, store, learning_rates(), coefficient))
        return self.known[model, packing]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(tmp_path_factory.mktemp("shared"))


@pytest.mark.parametrize(
    "world_size", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)]
)
def test_losses_and_norms_equal_plain_pytorch(world_size: int, references: References) -> None:
    steps = STEPS if world_size == 2 else 4  # each rank more takes its time of all
    cells = [cell(*row, steps=steps) for row in settings() if row[0] * row[1] == world_size]
    trained = run_cells(references.folder, world_size, cells)
    for one in cells:
        expected = references.of(one.model)[:steps]
        assert (expected[:, 1] > 0.5).any(), "clipping must act in some step"
        np.testing.assert_allclose(trained[one.name], expected, rtol=1e-5, err_msg=one.name)


@pytest.mark.slow
def test_routers_recomputation_losses_lengths_and_compiled_layers(references: References) -> None:
    """The router loss of a sequence is made of the shares of all its slices; the exchange is a part of a graph."""
    shared = {"sequence_parallel": 2}
    stages = {"name": "stages", "at": {"0%": 8, "35%": 16, "70%": 32}}
    cells = [
        Cell("mixtral", model="mixtral", zero_stage=3, micro_batch_bins=2, execution={**shared, "loss": "full"}),
        Cell("qwen3_moe", model="qwen3_moe", activation_checkpointing="full", execution={**shared, "loss": "chunked"}),
        Cell("selective", zero_stage=3, activation_checkpointing="selective", execution=shared),
        Cell("chunked", zero_stage=2, micro_batch_bins=1, execution={**shared, "loss": "chunked"}),
        Cell("lengths", zero_stage=2, micro_batch_bins=2, data={"length_schedule": stages}, execution=shared),
        Cell("single", zero_stage=1, packing="single", execution=shared),
        *(
            Cell(f"compiled {kind}", zero_stage=stage, micro_batch_bins=2, steps=3, compiler=compiler,
                 execution={**shared, "compile": kind})
            for kind, stage, compiler in (("layers", 3, "inductor"), ("model", 1, "aot_eager"))
        ),
    ]  # fmt: skip
    unshared = Cell("unshared", zero_stage=2, micro_batch_bins=2, data={"length_schedule": stages})
    trained = run_cells(references.folder, 2, [*cells, unshared])
    np.testing.assert_allclose(trained["lengths"], trained["unshared"], rtol=1e-5)
    for one in cells:
        if one.name != "lengths":
            expected = references.of(one.model, one.packing)[: one.steps]
            np.testing.assert_allclose(trained[one.name], expected, rtol=1e-5, err_msg=one.name)


@pytest.mark.slow
def test_groups_of_any_size_resume_each_other(references: References, tmp_path: Path) -> None:
    """1 -> 2 -> 4 -> 1 processes of a group, of other stages and world sizes: bitwise what was saved, each time."""
    again, folder = tmp_path / "again", references.folder
    cells = [Cell("one", zero_stage=2, steps=END, save_at=[SAVED], save_in=str(tmp_path / "saved"))]
    source = tmp_path / "saved"
    for name, shared_by, stage in (("two", 2, 3), ("four", 4, 1), ("back", 1, 0)):
        load, execution = str(source / f"step-{SAVED:08d}"), {"sequence_parallel": shared_by}
        source = again / name
        cells.append(
            Cell(name, zero_stage=stage, steps=END, load=load, save_loaded_in=str(source), execution=execution)
        )
    trained = run_cells(folder, 4, cells[:3]) | run_cells(folder, 1, cells[3:])
    for name, values in trained.items():
        np.testing.assert_allclose(values, references.of("llama")[:END][-len(values) :], rtol=1e-5, err_msg=name)
    assert len(trained["back"]) == END - SAVED > 0
    was = read_tensors(tmp_path / "saved" / f"step-{SAVED:08d}")
    for name in ("two", "four", "back"):
        loaded = read_tensors(again / name / f"step-{SAVED:08d}")
        assert was.keys() == loaded.keys()
        assert [key for key in was if not torch.equal(was[key], loaded[key])] == [], name


@pytest.mark.slow
def test_a_run_counts_tokens_once_and_evaluates_the_same(tmp_path: Path) -> None:
    """From the plan to the export, with a schedule of lengths, whose largest micro-batch is tried first."""
    lines = []
    for shared_by in (1, 2):
        execution = {"zero_stage": 2, "sequence_parallel": shared_by, "micro_batch": 2 * SEQ_LEN}
        recipe = make_recipe(
            tmp_path,
            data={"length_schedule": {"name": "stages", "at": {"0%": 16, "50%": 32}}},
            evaluation={"every": "50%"},
            execution={**execution, "runs_dir": str(tmp_path / f"runs{shared_by}")},
        )
        prepare(recipe)
        assert train_in_world(recipe) == 0
        run = run_directory(recipe)
        assert (run.path / "export" / "model.safetensors").exists()
        lines.append(read_lines(run.metrics))
    whole, shared = lines
    assert len(whole) == len(shared) > STEPS
    for one, other in zip(whole, shared, strict=True):
        assert one.keys() == other.keys()
        counted = ["step", "tokens_seen", "train/targets", "data/batch_tokens", "data/samples", "data/padding_fraction"]
        assert {key: one.get(key) for key in counted} == {key: other.get(key) for key in counted}
        for key in {"train/loss", "train/grad_norm", "eval/loss", "eval/bits_per_byte"} & one.keys():
            assert other[key] == pytest.approx(one[key], rel=1e-5), key


def test_other_kinds_are_refused_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an accelerate configuration in a launch by hand, and of a changed base of ds_configs."""
    with patch.dict(os.environ, {"PARALLELISM_CONFIG_SP_SIZE": "2"}), pytest.raises(UserError, match=REASON) as caught:
        build_accelerator({}, device="cpu", precision="fp32", timeout_sec=60)
    assert str(caught.value).startswith("parallelism_config.sp_size of the accelerate configuration: ")
    recipe = cell_recipe(tmp_path, Cell("unused"))
    plan, base = build_plan(recipe, CPUS, 2), deepspeed._load_base("zero1")
    monkeypatch.setattr(deepspeed, "_load_base", lambda name: {**base, "sequence_parallel_size": 2})
    with pytest.raises(UserError, match=rf"zero1.json: sequence_parallel_size: {REASON}"):
        deepspeed.resolve_ds_config(recipe, plan.batch, "cpu", "fp32")
