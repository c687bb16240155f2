"""A resumed run goes on exactly where it was saved, at the same layout to the bit and at another to rounding."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.optim.test_sharded import RESUMED
from tests.train.harness import Cell, cell_recipe, run_cells
from tests.train.reference import train_reference
from tests.train.test_equivalence import learning_rates
from tests.world import run_world
from turbolm.checkpoint.load import CheckpointReader, load_checkpoint
from turbolm.data.prepare.build import prepare
from turbolm.data.store.token_store import open_store
from turbolm.recipe.optimizers import OPTIMIZERS

SAVED, END = 4, 8


def read_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, assembled from whoever wrote it: `<state>/<parameter>`."""
    with CheckpointReader(checkpoint) as reader:
        shapes = reader.shapes.items()
        names = [(state, name) for name, _ in shapes for state in ("weight", *sorted(reader.states_of.get(name, ())))]
        tensors = {
            f"{state}/{name}": reader.read(state, name, 0, math.prod(reader.shapes[name])) for state, name in names
        }
        for (name, layout), (_, states) in reader.whole.items():
            tensors |= {f"{state}/{name}/{layout}": reader.read_bound(state, name, layout) for state in states}
        return tensors


def saved(folder: Path, name: str, step: int) -> Path:
    return folder / "saved" / name / f"step-{step:08d}"


def writing(folder: Path, name: str, **settings: object) -> Cell:
    """A cell that trains to the end and saves half-way and there."""
    return Cell(name=name, steps=END, save_at=[SAVED, END], save_in=str(folder / "saved" / name), **settings)  # type: ignore[arg-type]


def reading(folder: Path, name: str, source: str, **settings: object) -> Cell:
    """A cell that goes on from the half-way checkpoint of `source`."""
    return Cell(
        name=name,
        steps=END,
        load=str(saved(folder, source, SAVED)),
        save_at=[SAVED + 1, END],
        save_in=str(folder / "saved" / name),
        **settings,  # type: ignore[arg-type]
    )


def test_resuming_is_bitwise_at_the_same_layout_and_close_at_another(tmp_path: Path) -> None:
    two: dict[str, int] = {"micro_batch_bins": 1}
    cells = [writing(tmp_path, f"zero{stage}", zero_stage=stage, **two) for stage in (0, 1, 2, 3)]
    cells += [
        reading(tmp_path, f"zero{stage}-resumed", f"zero{stage}", zero_stage=stage, **two) for stage in (0, 1, 2, 3)
    ]
    moves = [(2, 3), (3, 2), (3, 0), (0, 1), (1, 2)]
    cells += [reading(tmp_path, f"zero{a}-to-{b}", f"zero{a}", zero_stage=b, **two) for a, b in moves]
    cells += [
        writing(tmp_path, "offloaded", zero_stage=2, offload_optimizer=True, **two),
        reading(tmp_path, "offloaded-to-zero3", "offloaded", zero_stage=3, **two),
        reading(tmp_path, "zero2-to-offloaded", "zero2", zero_stage=2, offload_optimizer=True, **two),
    ]
    trained = run_cells(tmp_path, 2, cells)
    for stage in (0, 1, 2, 3):
        assert trained[f"zero{stage}-resumed"] == trained[f"zero{stage}"][SAVED:]
        whole = read_tensors(saved(tmp_path, f"zero{stage}", END))
        resumed = read_tensors(saved(tmp_path, f"zero{stage}-resumed", END))
        assert whole.keys() == resumed.keys()
        assert {name.split("/")[0] for name in whole} == {"weight", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    expected = reference(tmp_path)
    for name, values in trained.items():
        np.testing.assert_allclose(values, expected[-len(values) :], rtol=1e-5, err_msg=name)

    # Fewer processes, and more of them, read what two wrote; three do not divide most parameters.
    one = [reading(tmp_path, f"zero{stage}-alone", f"zero{stage}", zero_stage=stage) for stage in (0, 1, 2, 3)]
    three = [reading(tmp_path, f"zero{stage}-by-three", "zero2-alone", zero_stage=stage, **two) for stage in (1, 2, 3)]
    shutil.copytree(saved(tmp_path, "zero2", SAVED), saved(tmp_path, "zero2-alone", SAVED))
    for world_size, cells in ((1, one), (3, three)):
        for name, values in run_cells(tmp_path, world_size, cells).items():
            np.testing.assert_allclose(values, expected[SAVED:], rtol=1e-5, err_msg=name)


def test_a_copy_made_when_the_next_update_waits_is_that_of_the_step(tmp_path: Path) -> None:
    """Nothing saved changes before the optimizer steps, at any stage; and every optimizer waits there."""
    layouts: dict[str, dict[str, Any]] = {f"zero{stage}": {"zero_stage": stage} for stage in (0, 1, 2, 3)}
    layouts |= {f"bf16-zero{stage}": {"zero_stage": stage, "precision": "bf16"} for stage in (1, 2, 3)}
    layouts |= {f"offloaded{stage}": {"zero_stage": stage, "offload_optimizer": True} for stage in (2, 3)}
    layouts |= {
        name: {"zero_stage": 2 if 2 in traits.zero_stages else 0, "optimizer": {"name": name}, "compiler": "eager"}
        for name, traits in OPTIMIZERS.items()
    }
    check_late_copies(tmp_path, 2, layouts, micro_batch_bins=1)


def check_late_copies(folder: Path, world_size: int, layouts: dict[str, dict[str, Any]], **settings: Any) -> None:
    """Copied as late as may be, a checkpoint has what one that was written at once has."""
    cells = [
        Cell(
            name=name, steps=4, save_at=[3], save_in=str(folder / "saved" / name),
            save_late_in=str(folder / "saved" / f"{name}-late"), **settings, **layout,
        )
        for name, layout in layouts.items()
    ]  # fmt: skip
    run_cells(folder, world_size, cells)
    for name in layouts:
        at_once, late = (read_tensors(saved(folder, name + suffix, 3)) for suffix in ("", "-late"))
        assert at_once.keys() == late.keys()
        assert [key for key in late if not torch.equal(late[key], at_once[key])] == [], name


def reference(folder: Path) -> np.ndarray:
    recipe = cell_recipe(folder, Cell(name="reference"))
    return np.array(train_reference(recipe, open_store(prepare(recipe)), learning_rates()[:END]))


def test_loading_restores_every_element_before_the_next_step(tmp_path: Path) -> None:
    """Saved, loaded elsewhere and saved again without a step in between: hash-equal, in fp32 and in bf16."""
    for precision in ("fp32", "bf16"):
        folder = tmp_path / precision
        folder.mkdir()
        source = Cell(
            name="source", zero_stage=2, micro_batch_bins=1, precision=precision, steps=3, save_at=[3],
            save_in=str(folder / "saved" / "source"),
        )  # fmt: skip
        run_cells(folder, 2, [source])
        written = read_tensors(saved(folder, "source", 3))
        for world_size, stages in ((2, (1, 2, 3)), (3, (1, 3))):
            cells = [
                Cell(
                    name=f"{world_size}-zero{stage}", zero_stage=stage, micro_batch_bins=1, precision=precision,
                    steps=3, load=str(saved(folder, "source", 3)), save_loaded_in=str(folder / f"{world_size}-{stage}"),
                )
                for stage in stages
            ]  # fmt: skip
            run_cells(folder, world_size, cells)
            for stage in stages:
                again = read_tensors(folder / f"{world_size}-{stage}" / "step-00000003")
                assert again.keys() == written.keys()
                assert all(torch.equal(again[name], written[name]) for name in written), (precision, world_size, stage)


def test_the_model_computes_with_the_weights_that_were_saved(tmp_path: Path) -> None:
    """ZeRO 1 and 2 keep them whole beside the optimizer's fp32 copy."""
    source = Cell(
        name="source", zero_stage=2, micro_batch_bins=1, precision="bf16", steps=2, save_at=[2],
        save_in=str(tmp_path / "saved" / "source"),
    )  # fmt: skip
    run_cells(tmp_path, 2, [source])
    settings: dict[str, Any] = {"micro_batch_bins": 1, "load": str(saved(tmp_path, "source", 2))}
    cells = [
        Cell(name=f"{precision}-{stage}", zero_stage=stage, precision=precision, **settings)
        for precision, stage in (("bf16", 1), ("bf16", 2))
    ]
    run_world(2, check_weights, tmp_path, cells)


def check_weights(folder: Path, cells: list[Cell]) -> None:
    from tests.train.cells import build_cell

    for cell in cells:
        checkpoint = Path(cell.load or "missing")
        weights = read_tensors(checkpoint)
        *_, engine, _ = build_cell(folder, cell)
        parameters = dict(engine.module.named_parameters())
        for parameter in parameters.values():
            parameter.detach().fill_(7)
        load_checkpoint(checkpoint, engine)
        for name, parameter in parameters.items():
            expected = weights[f"weight/{name}"].view(parameter.shape).to(parameter.dtype)
            assert torch.equal(parameter, expected), (cell.name, name)


@pytest.mark.slow
def test_every_optimizer_resumes_bitwise_and_element_wise_state_moves(tmp_path: Path) -> None:
    """At the stages where tests/optim/test_sharded.py resumes it not; from one also to another one, unless its state is
    bound to the partitions. AdamW has each stage above."""
    elsewhere = {pair for chosen, _ in RESUMED for pair in chosen}
    rates = {"sgd": 0.3, "adafactor": 0.1, "lion": 1e-3}
    cells, moves = [], {}
    for name, traits in OPTIMIZERS.items():
        settings: dict[str, Any] = {
            "micro_batch_bins": 1,
            "optimizer": {"name": name, "lr": rates.get(name, 3e-3)},
            "compiler": "eager",
        }
        stages = [stage for stage in traits.zero_stages if name != "adamw" and (name, stage) not in elsewhere]
        for stage in stages:
            cells.append(writing(tmp_path, f"{name}{stage}", zero_stage=stage, **settings))
            cells.append(reading(tmp_path, f"{name}{stage}-resumed", f"{name}{stage}", zero_stage=stage, **settings))
        if stages and 3 in traits.zero_stages and name != "adamw_8bit":
            moves[name] = f"{name}{stages[-1]}"
            to = 3 if stages[-1] != 3 else 1
            cells.append(reading(tmp_path, f"{name}-moved", moves[name], zero_stage=to, **settings))
    trained = run_cells(tmp_path, 2, cells)
    assert {"muon", "lion", "soap", "rmsprop"} <= set(moves)
    for cell in cells:
        if cell.name.endswith("-resumed"):
            source = cell.name.removesuffix("-resumed")
            assert trained[cell.name] == trained[source][SAVED:], cell.name
            whole, resumed = (read_tensors(saved(tmp_path, one, END)) for one in (source, cell.name))
            assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == [], cell.name
    for name, source in moves.items():
        rtol = {"lion": 1e-3, "cautious_adamw": 1e-3}.get(name, 1e-4)
        np.testing.assert_allclose(trained[f"{name}-moved"], trained[source][SAVED:], rtol=rtol, err_msg=name)
