"""Every allowed cell of the table optimizer x ZeRO stage x offload trains as the formula does, unsharded."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.train.harness import Cell, cell_recipe, run_cells
from tests.train.reference import train_reference
from tests.train.test_equivalence import learning_rates
from turbolm.data.prepare.build import prepare
from turbolm.data.store.token_store import open_store
from turbolm.recipe.optimizers import OPTIMIZERS

STEPS = 4
RATES = {"sgd": 0.3, "adafactor": 0.1, "lion": 1e-3, "rmsprop": 1e-3}
WHOLE = [name for name, kind in OPTIMIZERS.items() if kind.zero_stages == (0,)]
VARIANTS: dict[str, dict[str, object]] = {
    "peak_lrs": {"name": "muon", "peak_lrs": {"matrices": 9e-3, "head": 1e-3, "vectors": 6e-3}},
    "normuon": {"name": "muon", "row_beta2": 0.9, "orthogonalization": "polar_express", "cautious_weight_decay": True},
    "soap_muon": {"name": "muon", "soap": {"every": 2, "max_dim": 47}},  # as with SOAP
    "hyperball": {"name": "muon", "hyperball": True, "lr": 2e-2},
    "cautious_decay": {"name": "adamw", "weight_decay": 3.0, "cautious_weight_decay": True},
    "ema": {"name": "muon", "ema_nesterov": {"lookahead": 2, "mean_decay": 0.5, "start": "1 steps", "end": "3 steps"}},
}
SPLIT = {"name": "wsd", "warmup": "0", "decay": "40%", "decays": {"matrices": "90%", "vectors": "100%"}}
SHARDED = [name for name in OPTIMIZERS if name not in (*WHOLE, "adamw", "adamw_8bit")]


def optimizer_cell(name: str, stage: int, **settings: object) -> Cell:
    """A cell of one optimizer; its rate does not matter as long as it learns."""
    label = "-".join([name, f"zero{stage}", *(str(value) for value in settings.values())])
    chosen: dict[str, object] = {"name": name, "lr": RATES.get(name, 3e-3), **VARIANTS.get(name, {})}
    if name == "soap":
        chosen["max_precondition_dim"] = 47  # longer sides have eigenvalues near zero, whose vectors are arbitrary
    return Cell(name=label, zero_stage=stage, micro_batch_bins=2, optimizer=chosen, steps=STEPS, **settings)  # type: ignore[arg-type]


def rates_of(cell: Cell) -> list[float]:
    if cell.schedule.get("name") == "wsd":
        return [cell.optimizer["lr"]] * STEPS
    return [rate * cell.optimizer["lr"] / 3e-3 for rate in learning_rates()[:STEPS]]


def fp32_rtol(cell: Cell) -> float:
    """The sign of a mean near zero is rounding, and so are the eigenvectors of small eigenvalues."""
    if "soap" in cell.optimizer:
        return 5e-3
    return {"lion": 1e-3, "cautious_adamw": 1e-3, "soap": 5e-3}.get(cell.optimizer["name"], 1e-4)


def check(folder: Path, world_size: int, cells: list[Cell]) -> None:
    trained = run_cells(folder, world_size, cells)
    store = open_store(prepare(cell_recipe(folder, cells[0])))
    expected: dict[tuple[str, str], np.ndarray] = {}
    for cell in cells:
        key = (repr((cell.optimizer, cell.schedule)), cell.model)
        if key not in expected:
            expected[key] = np.array(train_reference(cell_recipe(folder, cell), store, rates_of(cell)))
            assert expected[key][0, 0] - expected[key][-1, 0] > 0.05, f"{key} must learn"
        rtol = 1e-2 if cell.precision == "bf16" else fp32_rtol(cell)
        np.testing.assert_allclose(trained[cell.name], expected[key], rtol=rtol, err_msg=cell.name)


def quick_cells() -> list[Cell]:
    """Every optimizer and every option where it is cut finest or has a way of its own; the slow tests add the rest."""
    cells = [optimizer_cell(name, 3) for name in SHARDED]
    cells += [optimizer_cell(name, 0) for name in ("muon", "cautious_adamw", *WHOLE)]
    cells += [optimizer_cell("muon", stage) for stage in (1, 2)]
    cells += [optimizer_cell("cautious_adamw", 1), optimizer_cell("muon", 2, offload_optimizer=True)]
    cells += [optimizer_cell("muon", 1, precision="bf16")]
    cells += [optimizer_cell(name, 3) for name in ("peak_lrs", "normuon", "hyperball", "cautious_decay")]
    cells += [optimizer_cell("soap_muon", 2), optimizer_cell("ema", 1), optimizer_cell("soap", 1)]
    cells += [optimizer_cell("hyperball", 1, offload_optimizer=True), optimizer_cell("hyperball", 2)]
    return [*cells, replace(optimizer_cell("muon", 3), name="split", schedule=SPLIT)]


def test_two_processes(tmp_path: Path) -> None:
    check(tmp_path, 2, quick_cells())


RAMPS = {"weight_decay": {"start": 30, "end": 3}, "momentum": {"start": 0.6, "end": 0.9}}


RESUMED: list[tuple[list[tuple[str, int]], int]] = [  # optimizers and stages, and the other world size
    ([("normuon", 2), ("hyperball", 1), ("ademamix", 3), ("soap", 3)], 1),
    ([("muon", 3), ("cautious_adamw", 1), ("lion", 2), ("adafactor", 0)], 3),
    ([("muon", 1), ("sgd", 3), ("rmsprop", 2), ("cautious_adamw", 3)], 1),
    ([("soap", 0), ("soap_muon", 3), ("ema", 1), ("hyperball", 2)], 3),
    ([("soap", 2), ("soap_muon", 1), ("ema", 3), ("cautious_decay", 2)], 1),
    ([("ademamix", 1), ("lion", 3), ("sgd", 2), ("rmsprop", 1)], 3),
]


@pytest.mark.parametrize(
    ("chosen", "other_world_size"),
    [RESUMED[0], *(pytest.param(*one, marks=pytest.mark.slow) for one in RESUMED[1:])],
)
def test_resuming_each_optimizer_amid_schedules(
    chosen: list[tuple[str, int]], other_world_size: int, tmp_path: Path
) -> None:
    """What is saved half-way goes on to the bit, in the middle of every schedule; at another world size, and the first
    two at another stage."""
    cells = []
    for name, stage in chosen:
        whole = optimizer_cell(name, stage)
        whole.schedule = RAMPS if name != "adafactor" else {}
        if name == "ademamix":
            whole.optimizer["betas"] = [0.9, 0.99, 0.999]
        folder = str(tmp_path / "saved" / whole.name)
        saving = replace(whole, save_at=[2], save_in=folder)
        if name == "ema":  # which changes weights before the step, so not before they were copied
            folder += "-late"
            saving.save_late_in = folder
        cells += [saving, replace(whole, name=whole.name + "-resumed", load=f"{folder}/step-00000002")]
    moved = [
        replace(cell, name=f"{cell.name}-moved", zero_stage={0: 3, 1: 2, 2: 3}.get(cell.zero_stage, 0))
        for cell in cells[1:4:2]
    ]
    trained = run_cells(tmp_path, 2, cells + moved)
    for cell in cells[::2]:
        assert trained[cell.name + "-resumed"] == trained[cell.name][2:], cell.name
    store = open_store(prepare(cell_recipe(tmp_path, cells[0])))
    for cell in [cells[0], cells[2], *moved]:
        rates = rates_of(cell)
        expected = np.array(train_reference(cell_recipe(tmp_path, cell), store, rates))
        plain = train_reference(cell_recipe(tmp_path, replace(cell, schedule={})), store, rates)
        assert abs(expected[-1, 0] - plain[-1][0]) > 1e-3, "the schedules must change the run"
        np.testing.assert_allclose(trained[cell.name], expected[-len(trained[cell.name]) :], rtol=fp32_rtol(cell))
    elsewhere = run_cells(tmp_path, other_world_size, cells[1::2])
    for cell in cells[::2]:
        resumed = elsewhere[cell.name + "-resumed"]
        np.testing.assert_allclose(resumed, trained[cell.name][2:], rtol=fp32_rtol(cell), err_msg=cell.name)


MODES: list[dict[str, Any]] = [{}, {"offload_optimizer": True}, {"precision": "bf16"}]


def table() -> list[Cell]:
    """Each optimizer at each stage, with every pair of optimizer, stage and mode; stage 0 has the first mode alone."""
    return [
        optimizer_cell(name, stage, **(MODES[(i + stage) % 3] if stage else {}))
        for i, name in enumerate(SHARDED)
        for stage in (0, 1, 2, 3)
    ]


def options() -> list[Cell]:
    """Each option at each stage, once offloaded, which is another way at stages 2 and 3."""
    cells = [
        optimizer_cell(name, stage, **({"offload_optimizer": True} if stage == 2 + i % 2 else {}))
        for i, name in enumerate(VARIANTS)
        for stage in (0, 1, 2, 3)
    ]
    cells += [optimizer_cell("normuon", 1, precision="bf16"), optimizer_cell("ema", 1, precision="bf16")]
    return cells + [replace(optimizer_cell("muon", s), name=f"split-{s}", schedule=SPLIT) for s in (0, 1, 2)]


def without_quick(cells: list[Cell]) -> list[Cell]:
    quick = {cell.name for cell in quick_cells()}
    return [cell for cell in cells if cell.name not in quick]


def test_the_table_has_every_pair() -> None:
    rows = [(c.optimizer["name"], c.zero_stage, c.offload_optimizer, c.precision) for c in table()]
    for name, stage in itertools.product(SHARDED, (1, 2, 3)):
        for mode in ((False, "fp32"), (True, "fp32"), (False, "bf16")):
            assert {(name, stage), (name, *mode), (stage, *mode)} <= (
                {row[:2] for row in rows} | {(row[0], *row[2:]) for row in rows} | {row[1:] for row in rows}
            )


@pytest.mark.slow
def test_the_rest_of_the_table(tmp_path: Path) -> None:
    check(tmp_path, 2, without_quick(table()))


@pytest.mark.slow
def test_options_at_every_stage(tmp_path: Path) -> None:
    check(tmp_path, 2, without_quick(options()))


@pytest.mark.slow
def test_three_processes_divide_almost_no_matrix(tmp_path: Path) -> None:
    """What is done element by element is so in one way for all: each stage once."""
    cells = [optimizer_cell("muon", stage) for stage in (1, 2, 3)]
    cells += [optimizer_cell(name, stage) for name, stage in (("cautious_adamw", 1), ("ademamix", 2), ("lion", 3))]
    cells += [optimizer_cell("muon", stage, model="gpt2") for stage in (1, 3)]
    check(tmp_path, 3, cells)


@pytest.mark.slow  # compiles its update, half a minute for each shape
def test_eight_bits_stay_close_to_adamw_and_resume_to_the_bit(tmp_path: Path) -> None:
    cells = [Cell(name="adamw", zero_stage=1, steps=STEPS, optimizer={"name": "adamw"})]
    for stage, offload in ((1, False), (2, True), (3, False)):
        folder = str(tmp_path / "saved" / f"{stage}")
        settings = {"zero_stage": stage, "offload_optimizer": offload, "steps": STEPS}
        whole = Cell(name=f"zero{stage}", optimizer={"name": "adamw_8bit"}, save_at=[2], save_in=folder, **settings)
        cells += [whole, replace(whole, name=whole.name + "-resumed", load=f"{folder}/step-00000002")]
    trained = run_cells(tmp_path, 1, cells)
    exact = np.array(trained.pop("adamw"))
    for name, values in trained.items():
        np.testing.assert_allclose(values, exact[-len(values) :], rtol=1e-3, err_msg=name)
    assert trained["zero1"][1] != exact[1].tolist(), "moments in 8 bits cannot be the very same"
    for stage in (1, 2, 3):
        assert trained[f"zero{stage}-resumed"] == trained[f"zero{stage}"][2:]
