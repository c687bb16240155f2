"""A forked run is the run that was planned that way from the start, from the branch on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train.harness import BINS_PER_BATCH, SEQ_LEN, Cell, cell_recipe, make_recipe, run_cells
from turbolm.checkpoint.manifest import read_manifest
from turbolm.errors import UserError
from turbolm.recipe.contract import contract_of, fingerprint
from turbolm.recipe.load import dump_recipe, load_recipe
from turbolm.recipe.schedules import lr_ratio
from turbolm.recipe.schema import Recipe
from turbolm.train.fork import _check_plateau, _check_same_past, _decaying, fork
from turbolm.train.run_contract import settle_contract
from turbolm.train.run_directory import RunDirectory
from turbolm.units import Span

BATCH = BINS_PER_BATCH * SEQ_LEN  # 160 tokens
WSD: dict[str, Any] = {"name": "wsd", "warmup": "10%", "decay": "20%", "min_lr_ratio": 0.0}


def start_run(folder: Path, recipe: Recipe) -> RunDirectory:
    """A run directory as a first attempt leaves it."""
    run = RunDirectory(folder / "runs" / recipe.name)
    run.path.mkdir(parents=True)
    settle_contract(run, recipe, "store")
    (run.path / "recipe.yaml").write_text(dump_recipe(recipe))
    return run


def cell_of(recipe: Recipe, **settings: Any) -> Cell:
    values = recipe.model_dump(mode="json")
    return Cell(train={"budget": recipe.train.budget}, schedule=values["schedule"], **settings)


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(folder, checkpoint of step 5, the run forked from it)."""
    folder = tmp_path_factory.mktemp("fork")
    recipe = make_recipe(folder, schedule=WSD)  # 10 steps: warmup of one, plateau, decay over steps 9 and 10
    run = start_run(folder, recipe)
    origin = Cell(name="origin", schedule=WSD, steps=9, save_at=[5, 9], save_in=str(run.checkpoints))
    trained = run_cells(folder, 1, [origin])
    (folder / "origin.json").write_text(json.dumps(trained["origin"]))
    for step in (5, 9):  # as the trainer names the contract and the tokens seen
        file = run.checkpoints / f"step-{step:08d}" / "manifest.json"
        manifest = json.loads(file.read_text())
        manifest |= {"contract": fingerprint(contract_of(recipe)), "tokens_seen": step * BATCH}
        file.write_text(json.dumps(manifest))
    checkpoint = run.checkpoints / "step-00000005"
    return folder, checkpoint, fork(checkpoint, Span.parse("37.5%"), changes={"decay_shape": "sqrt"})


def test_its_recipe_and_contract(forked: tuple[Path, Path, Path]) -> None:
    folder, checkpoint, path = forked
    recipe = load_recipe(path / "recipe.yaml")
    assert (recipe.name, path) == ("cell-decay-5", folder / "runs" / "cell-decay-5")
    assert recipe.train.budget == 8 * BATCH, "5 steps are 62.5%, 3 more decay"
    assert (recipe.schedule.name, str(recipe.schedule.decay)) == ("wsd", str(3 * BATCH))
    assert str(recipe.schedule.warmup) == str(BATCH), "10% of the old budget, not of the new one"
    assert settle_contract(RunDirectory(path), recipe, "store") == [8 * BATCH]
    record = json.loads((path / "contract.json").read_text())
    assert record["origin"]["run"] == "cell"
    assert (record["origin"]["checkpoint"], record["origin"]["step"]) == ("step-00000005", 5)
    assert read_manifest(path / "checkpoints" / checkpoint.name)["contract"] == fingerprint(contract_of(recipe))
    rates = [lr_ratio(recipe.schedule, step * BATCH, [recipe.train.budget], BATCH) for step in range(9)]
    expected = [0, 1, 1, 1, 1, 1, 1 - (1 / 3) ** 0.5, 1 - (2 / 3) ** 0.5, 0]
    assert rates == pytest.approx(expected)


def test_it_trains_as_if_planned_so_from_the_start(forked: tuple[Path, Path, Path]) -> None:
    folder, checkpoint, path = forked
    recipe = load_recipe(path / "recipe.yaml")
    cells = [
        cell_of(recipe, name="planned", steps=8),
        cell_of(recipe, name="forked", steps=8, load=str(path / "checkpoints" / checkpoint.name)),
    ]
    assert cell_recipe(folder, cells[0]).schedule == recipe.schedule
    trained = run_cells(folder, 1, cells)
    origin = json.loads((folder / "origin.json").read_text())
    assert trained["planned"][:5] == origin[:5]
    assert trained["forked"] == trained["planned"][5:]
    assert trained["forked"][2] != origin[7], "the origin is still on its plateau there"


def test_what_cannot_be_forked(forked: tuple[Path, Path, Path], tmp_path: Path) -> None:
    folder, checkpoint, _ = forked
    with pytest.raises(UserError, match="exists; choose another --name"):
        fork(checkpoint, Span.parse("10%"))
    with pytest.raises(UserError, match=r"at 1440 tokens .* which lasts from 160 to 1280 tokens"):
        fork(checkpoint.parent / "step-00000009", Span.parse("10%"))
    with pytest.raises(UserError, match="less than 100%, got 100%"):
        fork(checkpoint, Span.parse("100%"), "other")
    with pytest.raises(UserError, match="expected a checkpoint inside a run directory"):
        fork(tmp_path / "checkpoints" / "step-00000001", Span.parse("10%"))
    assert sorted(path.name for path in (folder / "runs").iterdir() if path.name.startswith((".", "cell"))) == [
        "cell",
        "cell-decay-5",
    ]


def test_a_past_that_a_new_budget_would_change(tmp_path: Path) -> None:
    """Shares become tokens, which keeps a batch ramp; cycles over buckets are parts of the whole budget."""
    ramp = {"batch_ramp": {"at": {"0%": 2 * SEQ_LEN, "40%": BATCH}}}
    old = make_recipe(tmp_path, schedule=WSD, train=ramp)
    _check_same_past(old, _decaying(old, 10 * SEQ_LEN, Span.parse("50%"), {}), 5)
    buckets = {"length_schedule": {"name": "buckets", "smallest": 8, "order": "grow"}}
    old = make_recipe(tmp_path, schedule=WSD, data=buckets, train={"budget": 40 * BATCH})
    with pytest.raises(UserError, match=r"order=shuffled"):
        _check_same_past(old, _decaying(old, 20 * BATCH, Span.parse("10%"), {}), 20)


def test_a_schedule_without_a_plateau(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, schedule={"name": "cosine"})
    with pytest.raises(UserError, match=r"schedule\.name is cosine, whose learning rate has no plateau"):
        _check_plateau(recipe, 800)
