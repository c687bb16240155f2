"""Runs, stores and contracts that an earlier version wrote go on: see tests/fixtures/README.md."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field

from tests.fixtures.record import CORPUS_TIME_NS, FOLDER, STOPPED_AFTER, hash_restored, train_rank
from tests.world import run_world
from turbolm.errors import UserError
from turbolm.recipe import contract as contract_module
from turbolm.recipe import schema
from turbolm.recipe.contract import changed_keys, comparable, contract_of, fingerprint, pin_to
from turbolm.recipe.fields import Before, FormerDefault
from turbolm.recipe.load import load_recipe
from turbolm.recipe.schema import Recipe, Train
from turbolm.train.fresh import start_fresh
from turbolm.train.run_contract import as_started, check_contract, settle_contract
from turbolm.train.run_directory import RunDirectory, run_directory

CONTRACTS = json.loads((FOLDER / "contracts.json").read_text())
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.fixture
def fixtures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the recorded files, as their run left them."""
    folder = tmp_path / "recorded"
    shutil.copytree(FOLDER, folder)
    os.utime(folder / "corpus.jsonl", ns=(CORPUS_TIME_NS, CORPUS_TIME_NS))
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("path", CONTRACTS)
def test_a_run_of_a_shipped_recipe_keeps_its_fingerprint(path: str) -> None:
    old = CONTRACTS[path]
    assert fingerprint(old["contract"]) == old["fingerprint"]
    recipe, _ = pin_to(load_recipe(FOLDER.parent.parent / path), old["contract"])
    assert changed_keys(comparable(old["contract"]), comparable(contract_of(recipe))) == []
    assert fingerprint(contract_of(recipe)) == old["fingerprint"]


@pytest.mark.parametrize("name", EXPECTED)
def test_an_old_run_resumes_with_the_same_state_and_trains_on(name: str, fixtures: Path) -> None:
    assert run_world(2, hash_restored, fixtures, name) == EXPECTED[name]["restored"]
    assert run_world(2, train_rank, fixtures, name) == [0, 0]
    lines = [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]
    continued = {line["step"]: line for line in lines if line["step"] > STOPPED_AFTER and "train/loss" in line}
    recorded = {line["step"]: line for line in EXPECTED[name]["steps"] if line["step"] > STOPPED_AFTER}
    assert continued.keys() == recorded.keys() == {7, 8, 9, 10}
    for step, line in recorded.items():
        for key in ("train/loss", "train/grad_norm"):
            assert continued[step][key] == pytest.approx(line[key], rel=1e-6)
        assert continued[step]["data/samples"] == line["data/samples"]


class NewTrain(Train):
    """A `train` section of some later version."""

    dummy: Annotated[int, Before(3)] = 5
    z_loss: Annotated[float, FormerDefault(0.0)] = Field(1e-4, ge=0)


class NewRecipe(Recipe):
    """A recipe of some later version, with a new key and another default."""

    train: NewTrain


def newer(path: str, **train: Any) -> NewRecipe:
    values = load_recipe(path).model_dump(mode="json", exclude_unset=True)
    values["train"] |= train
    return NewRecipe.model_validate(values)


def test_a_new_key_and_a_new_default_lock_nobody_out(fixtures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract_module, "Recipe", NewRecipe)
    monkeypatch.setattr(comparable, "__defaults__", (NewRecipe,))
    old = json.loads(Path("runs/zero1/contract.json").read_text())
    fresh = newer("zero1.yaml")
    pinned, told = as_started(fresh)
    assert isinstance(pinned, NewRecipe)
    assert (fresh.train.dummy, fresh.train.z_loss, pinned.train.dummy, pinned.train.z_loss) == (5, 1e-4, 3, 0.0)
    assert {"train.dummy: 3 (the default is 5 now)", "train.z_loss: 0.0 (the default is 0.0001 now)"} <= set(told)
    assert contract_of(pinned)["train"]["dummy"] == 3  # a contract keeps all values
    assert fingerprint(contract_of(pinned)) == old["fingerprint"] != fingerprint(contract_of(fresh))
    assert settle_contract(RunDirectory(Path("runs/zero1")), pinned, old["store_fingerprint"]) == [2560]
    asked = as_started(newer("zero1.yaml", dummy=4, z_loss=1e-3))[0]  # what a recipe says itself is not pinned
    with pytest.raises(UserError, match=r"train\.dummy: \(not set\) -> 4\n.*train\.z_loss: 0 -> 0\.001"):
        check_contract(RunDirectory(Path("runs/zero1")), asked, old["store_fingerprint"])


def test_a_larger_budget_that_comes_with_other_changes_has_a_way_on(fixtures: Path) -> None:
    """Such as the weight decay that `scale` derives from the budget."""
    recipe = as_started(load_recipe("zero1.yaml", ["train.budget=5120", "optimizer.weight_decay=0.01"]))[0]
    with pytest.raises(UserError, match="turbolm train runs/zero1/recipe.yaml train.budget=5120"):
        check_contract(RunDirectory(Path("runs/zero1")), recipe, None)


def test_a_renamed_key_is_read_under_its_old_name(
    fixtures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(schema.RENAMED, "train.random_seed", "seed")
    path = Path("runs/zero1/contract.json")
    path.write_text(path.read_text().replace('"seed"', '"random_seed"'))
    recipe_file = Path("zero1.yaml")
    recipe_file.write_text(recipe_file.read_text().replace("seed: 3", "random_seed: 3"))
    recipe = as_started(load_recipe(recipe_file))[0]
    assert recipe.train.seed == 3
    assert "zero1.yaml:8: train.random_seed is called seed now" in capsys.readouterr().err
    assert check_contract(run_directory(recipe), recipe, None) == []
    assert load_recipe(recipe_file, ["train.random_seed=4"]).train.seed == 4
    recipe_file.write_text(recipe_file.read_text().replace("random_seed: 3", "random_seed: 3, seed: 3"))
    with pytest.raises(UserError, match=r"zero1.yaml:8: train.random_seed: is called seed now, and seed stands here"):
        load_recipe(recipe_file)


FORMER_FINGERPRINTS = {  # of zero1.yaml with overrides, as commit c5235fc computed them
    "00dfeda5b2578a7f3776420be5d59d32c2e4345fc7008742e5c4e2b871d5ce50": [
        "schedule.name=restarts", "schedule.cycle=15%", "train.restarts.seeds=2",
    ],
    "16ec76f6780d290b692d78f3993b346ade1dc2012cca17dc5d481fc7a2210686": [
        "schedule.name=wsd", "schedule.decay_shape=sqrt",
    ],
}  # fmt: skip


@pytest.mark.parametrize("former", FORMER_FINGERPRINTS)
def test_renamed_keys_and_settings_of_one_schedule_keep_their_fingerprint(
    former: str, fixtures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = FORMER_FINGERPRINTS[former]
    recipe = load_recipe("zero1.yaml", overrides)
    assert fingerprint(contract_of(recipe)) == former
    told = capsys.readouterr().err
    assert ("schedule.name restarts is called warm_restarts now" in told) == ("schedule.name=restarts" in overrides)
    assert ("train.restarts is called random_restarts now" in told) == ("schedule.name=restarts" in overrides)


def test_a_run_whose_contract_has_settings_of_another_schedule_resumes(fixtures: Path) -> None:
    """They were written down and never used: `decay` of a cosine, which a recipe can no longer say."""
    former = "599daaf541fda09c768cb178cc7d36f5a077b4c8eb54491860afd670373daaa0"  # of c5235fc, with these two settings
    run = Path("runs/zero1")
    record = json.loads((run / "contract.json").read_text())
    manifest = next(run.glob("checkpoints/step-*/manifest.json"))
    manifest.write_text(manifest.read_text().replace(record["fingerprint"], former))
    record["contract"]["schedule"] |= {"decay": "7%", "cycle": "11%"}
    (run / "contract.json").write_text(json.dumps(record | {"fingerprint": former}))
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("decay: 20%", "decay: 7%"))
    assert load_recipe(run / "recipe.yaml").schedule == load_recipe("zero1.yaml").schedule  # as `fork` reads it
    with pytest.raises(UserError, match=r"schedule\.decay: not a setting of cosine, but of wsd"):
        load_recipe("zero1.yaml", ["schedule.decay=7%"])
    other, _ = as_started(load_recipe("zero1.yaml", ["schedule.name=wsd", "schedule.decay=7%"]))
    with pytest.raises(UserError, match=r'schedule\.decay: \(not set\) -> "7%"') as refused:
        check_contract(RunDirectory(run), other, None)
    assert 'schedule.name: "cosine" -> "wsd"' in str(refused.value)
    assert run_world(2, train_rank, fixtures, "zero1") == [0, 0]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = {line["step"]: line["train/loss"] for line in EXPECTED["zero1"]["steps"]}
    resumed = {
        line["step"]: line["train/loss"] for line in lines if line["step"] > STOPPED_AFTER and "train/loss" in line
    }
    assert resumed == pytest.approx({step: expected[step] for step in (7, 8, 9, 10)}, rel=1e-6)


def test_a_start_that_ends_before_its_first_step_pins_nothing(tmp_path: Path, fixtures: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    settle_contract(run, load_recipe("zero1.yaml", ["optimizer.lr=6"]), "s")
    settle_contract(run, load_recipe("zero1.yaml", ["optimizer.lr=6e-3"]), "s")
    run.metrics.write_text('{"step": 1}\n')
    with pytest.raises(UserError, match=r"optimizer\.lr: 0\.006 -> 6\n.*--fresh"):
        settle_contract(run, load_recipe("zero1.yaml", ["optimizer.lr=6"]), "s")


def test_fresh_moves_the_old_run_aside(fixtures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load_recipe("zero1.yaml", ["optimizer.lr=1"])
    with pytest.raises(UserError, match="optimizer.lr"):
        check_contract(run_directory(recipe), recipe, None)
    start_fresh(recipe)
    (aside,) = Path("runs").glob("zero1.2*")
    assert (aside / "checkpoints").is_dir()
    assert str(aside) in capsys.readouterr().out
    assert not Path("runs/zero1").exists()
    assert check_contract(run_directory(recipe), recipe, None) == []
    start_fresh(recipe)  # nothing there: nothing to do
