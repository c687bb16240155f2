"""A forked run is the run that was planned that way from the start, from the branch on."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from tests.train.harness import BINS_PER_BATCH, SEQ_LEN, Cell, cell_recipe, make_recipe, run_cells, train_in_world
from tests.train.reference import train_reference
from tests.world import run_world
from turbolm.checkpoint.manifest import list_checkpoints, read_manifest
from turbolm.cli import app
from turbolm.data.batch.loader import BatchLoader
from turbolm.data.order.batch_order import recipe_order
from turbolm.data.prepare.build import prepare
from turbolm.data.store.token_store import TokenStore, open_store
from turbolm.errors import UserError
from turbolm.launch.forks import read_forks
from turbolm.plan.curriculum import build_curriculum
from turbolm.plan.machine import detect_machine
from turbolm.plan.plan import build_plan
from turbolm.plan.rates import preview_steps
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
    shutil.copytree(folder / "runs" / "origin" / "model", run.model)
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


DECAY_STEPS, KILLED_AT = 5, 9  # after the checkpoint of step 5; every second step is saved
SOURCES = {"old": 0, "new": 1}


def other_recipe(folder: Path, **sections: Any) -> Recipe:
    """A recipe of the same learning on two sources, of which one is new."""
    corpus = folder / "new.jsonl"
    if not corpus.exists():
        texts = [f"{i} omega " + "psi chi rho " * (1 + i % 17) for i in range(120)]
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    paths = {"old": folder / "corpus.jsonl", "new": corpus}
    sources = [
        {"type": "jsonl", "path": str(paths[label]), "label": label, "weight": weight}
        for label, weight in SOURCES.items()
    ]
    recipe = make_recipe(
        folder,
        data={"sources": sources, **sections.pop("data", {})},
        schedule={**WSD, **sections.pop("schedule", {})},
        checkpoint={"every": "2 steps", "keep_last": 9},
        evaluation={"tokens": 2 * SEQ_LEN},
        logging={"sample_tokens": 0},
        **sections,
    )
    return recipe.model_copy(update={"name": "anneal"})


def train_until_killed(recipe: Recipe) -> None:
    """One rank, which dies after some steps without a word."""
    from turbolm.train import loop
    from turbolm.train.worker import run_worker

    take_step = loop.take_step

    def take_or_die(session: Any, batch: Any) -> Any:
        if session.step == KILLED_AT:
            session.saver.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return take_step(session, batch)

    with patch.object(loop, "take_step", take_or_die):
        run_worker(recipe)


def named_copy(path: Path, name: str) -> Recipe:
    shutil.copytree(path, path.with_name(name))
    recipe = load_recipe(path / "recipe.yaml").model_copy(update={"name": name})
    (path.with_name(name) / "recipe.yaml").write_text(dump_recipe(recipe))
    return recipe


def learned(runs: Path, name: str) -> dict[int, tuple[float, float, float, str]]:
    """By step (loss, gradient norm, learning rate, ledger); one that was trained again counts once."""
    lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    keys = ("train/loss", "train/grad_norm", "train/lr", "data/samples")
    return {line["step"]: tuple(line[key] for key in keys) for line in lines if "train/loss" in line}  # type: ignore[misc]


def share_of_new(store: TokenStore, recipe: Recipe, steps: Iterator[int]) -> float:
    order, (_, (first, end)) = (
        recipe_order(recipe, store, build_curriculum(recipe), save=False),
        store.source_documents(),
    )
    batches = [order.batch(step) for step in steps]
    is_new = np.concatenate([(first <= batch.document) & (batch.document < end) for batch in batches])
    lengths = np.concatenate([batch.length for batch in batches])
    return float(lengths[is_new].sum() / lengths.sum())


@pytest.fixture(scope="module")
def annealed(forked: tuple[Path, Path, Path]) -> tuple[Path, Recipe, TokenStore]:
    """(folder, recipe of a fork on other data, its store), trained to its end."""
    folder, checkpoint, _ = forked
    recipe = load_recipe(fork(checkpoint, Span.parse("50%"), other=other_recipe(folder)) / "recipe.yaml")
    store = open_store(prepare(recipe))
    named_copy(folder / "runs" / "anneal", "killed")  # before its first start
    assert train_in_world(recipe, 2) == 0
    return folder, recipe, store


def test_other_data_begin_with_their_first_batch(annealed: tuple[Path, Recipe, TokenStore]) -> None:
    """Losses and norms are those of a plain loop that goes on with the first batches of a run of these data."""
    folder, recipe, store = annealed
    assert recipe.data.starts_at is not None
    assert (recipe.data.starts_at.step, recipe.data.starts_at.tokens) == (5, 5 * BATCH)
    assert json.loads((folder / "runs/anneal/contract.json").read_text())["contract"]["data"]["starts_at"]["step"] == 5
    fresh = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"starts_at": None}),
            "train": recipe.train.model_copy(update={"budget": DECAY_STEPS * BATCH}),
        }
    )
    plateau, decay = [1.5e-3, *[3e-3] * 4], [3e-3 * (1 - (step + 0.5) / 5) for step in range(DECAY_STEPS)]
    old = make_recipe(folder, schedule=WSD)
    expected = train_reference(old, open_store(prepare(old)), plateau, then=(fresh, store, decay))[5:]
    found = learned(folder / "runs", "anneal")
    assert list(found) == [6, 7, 8, 9, 10]
    np.testing.assert_allclose([values[:2] for values in found.values()], expected, rtol=1e-5)
    loader = BatchLoader(recipe_order(fresh, store, build_curriculum(fresh), save=False), store, "train", 1, 0, "auto")
    ledger = [loader.global_batch(index).samples_digest for index in range(DECAY_STEPS)]
    assert [values[3] for values in found.values()] == ledger
    assert share_of_new(store, recipe, iter(range(5, 10))) == 1.0
    planned = list(preview_steps(build_plan(recipe, detect_machine(), 2)))
    assert [(one["step"], one["tokens_seen"]) for one in planned] == [(step, step * BATCH) for step in range(6, 11)]
    assert [one["train/lr"] for one in planned] == pytest.approx(decay)
    assert [values[2] for values in found.values()] == pytest.approx(decay)


@pytest.mark.slow
def test_an_anneal_that_is_killed_goes_on_exactly(annealed: tuple[Path, Recipe, TokenStore]) -> None:
    folder, recipe, _ = annealed
    runs, whole = folder / "runs", learned(folder / "runs", "anneal")
    killed = recipe.model_copy(update={"name": "killed"})
    with pytest.raises(AssertionError, match="failed"):
        run_world(2, train_until_killed, killed)
    assert list_checkpoints(runs / "killed" / "checkpoints")[-1][0] == 8
    fewer = named_copy(runs / "killed", "fewer")
    assert train_in_world(killed, 2) == 0
    assert learned(runs, "killed") == whole
    assert train_in_world(fewer, 1) == 0
    found = learned(runs, "fewer")
    np.testing.assert_allclose([v[:3] for v in found.values()], [v[:3] for v in whole.values()], rtol=1e-5)
    assert [values[3] for values in found.values()] == [values[3] for values in whole.values()]


def test_forks_are_compared(annealed: tuple[Path, Recipe, TokenStore]) -> None:
    folder, _, _ = annealed
    shown = CliRunner().invoke(app, ["status", str(folder / "runs" / "cell"), "--json"])
    forks = {one["name"]: one for one in json.loads(shown.output)[0]["forks"]}
    results = json.loads((folder / "runs/anneal/results.json").read_text())
    assert forks["anneal"]["eval_loss"] == results["eval_loss"]
    assert (forks["anneal"]["shares"], forks["anneal"]["decay_tokens"]) == ({"old": 0.0, "new": 1.0}, 5 * BATCH)
    assert (forks["cell-decay-5"]["decay_tokens"], forks["cell-decay-5"]["eval_loss"]) == (3 * BATCH, None)
    table = CliRunner().invoke(app, ["status", str(folder / "runs" / "cell")]).output
    assert "old 0% new 100%" in table and f"{results['eval_loss']:.4f}" in table


def test_the_same_documents_keep_their_store(forked: tuple[Path, Path, Path]) -> None:
    folder, checkpoint, _ = forked
    other = make_recipe(folder, schedule=WSD, data={"packing": "concat"})
    path = fork(checkpoint, Span.parse("10%"), "same-documents", other=other)
    assert load_recipe(path / "recipe.yaml").tokenizer == other.tokenizer
    assert json.loads((path / "contract.json").read_text())["store_fingerprint"] == "store"
    of_each = make_recipe(folder, schedule=WSD, evaluation={"from_each_source": True})
    fork(checkpoint, Span.parse("10%"), "of-each", other=of_each)
    held_out = {one.name: one.held_out for one in read_forks(checkpoint.parents[1])}
    assert held_out["same-documents"] != held_out["of-each"], "other documents are held out"


def test_a_recipe_that_a_fork_cannot_take(forked: tuple[Path, Path, Path]) -> None:
    folder, checkpoint, _ = forked
    model = {"config": {**make_recipe(folder).model.config, "hidden_size": 64}}  # type: ignore[dict-item]
    train = {"max_grad_norm": 1.0}
    other = other_recipe(folder, model=model, optimizer={"lr": 1e-3}, train=train, schedule={"warmup": "5%"})
    with pytest.raises(UserError) as refused:
        fork(checkpoint, Span.parse("10%"), "refused", other=other)
    message = str(refused.value)
    assert "\n" not in message
    for line in ("model.config.hidden_size: 48 -> 64", "optimizer.lr: 0.003 -> 0.001", "train.max_grad_norm: 0.5 -> 1"):
        assert line in message
    assert 'schedule.warmup: "10%" -> "5%"' in message and "data" not in message.partition("these differ: ")[2]
    with pytest.raises(UserError, match=r"at 1440 tokens the learning rate is off its plateau"):
        fork(checkpoint.parent / "step-00000009", Span.parse("10%"), "refused", other=other_recipe(folder))
    assert not (folder / "runs" / "refused").exists()


def test_the_recipe_of_a_fork_needs_its_run(annealed: tuple[Path, Recipe, TokenStore], tmp_path: Path) -> None:
    _, recipe, _ = annealed
    with pytest.raises(UserError, match=r"data\.starts_at: .* has no checkpoint of step 5 to start from"):
        settle_contract(RunDirectory(tmp_path / "none"), recipe, "store")
    values = yaml.safe_load(dump_recipe(recipe))
    values["train"]["batch_ramp"] = {"start": 64}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match="batch_ramp: belongs to the start of a run"):
        load_recipe(tmp_path / "recipe.yaml")
