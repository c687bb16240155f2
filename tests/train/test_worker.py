"""What a rank refuses before it trains."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest.mock import Mock, patch

import pytest

from tests.checkpoint.test_mirror import begun
from tests.train.harness import make_recipe
from turbolm.data.prepare.build import prepare
from turbolm.data.prepare.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from turbolm.data.store.token_store import open_store
from turbolm.errors import UserError
from turbolm.plan.machine import detect_machine
from turbolm.plan.plan import build_plan
from turbolm.recipe.contract import contract_of, fingerprint
from turbolm.recipe.schema import Anomalies
from turbolm.train.run_contract import known_fingerprints, settle_contract
from turbolm.train.run_directory import RunDirectory
from turbolm.train.worker import _complete, _open_prepared_store


def test_a_pretrained_model_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    pretrained = tmp_path / "pretrained"
    recipe = make_recipe(tmp_path, model={"config": None, "pretrained": str(pretrained)})
    store = open_store(prepare(recipe))
    shutil.copytree(store.tokenizer_dir, pretrained)
    assert _open_prepared_store(recipe).fingerprint == store.fingerprint
    other = make_recipe(tmp_path, tokenizer={"train": {"vocab_size": 280}})
    shutil.copytree(open_store(prepare(other)).tokenizer_dir, pretrained, dirs_exist_ok=True)
    with pytest.raises(UserError, match="differs from the one the token store"):
        _open_prepared_store(recipe)


def test_a_pretrained_model_may_get_more_tokens_and_no_others(tmp_path: Path) -> None:
    more, model = tmp_path / "more", {"config": None, "pretrained": str(tmp_path / "pretrained")}
    own = prepare(make_recipe(tmp_path)) / "tokenizer"
    shutil.copytree(own, tmp_path / "pretrained")
    tokenizer = load_tokenizer(own)
    tokenizer.add_special_tokens(["<|im_end|>"])
    save_tokenizer(tokenizer, more)
    recipe = make_recipe(tmp_path, model=model, tokenizer={"train": None, "path": str(more)})
    prepare(recipe)
    with pytest.raises(UserError, match="more tokens needs model.resize_embeddings: true"):
        _open_prepared_store(recipe)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"resize_embeddings": True})})
    assert _open_prepared_store(recipe).vocab_size == 301
    save_tokenizer(train_tokenizer([f"x{number} zzz" for number in range(99)], 280), tmp_path / "pretrained")
    with pytest.raises(UserError, match="have other ids or none"):
        _open_prepared_store(recipe)


def test_a_complete_run_whose_export_was_missing_is_mirrored_to_its_end(tmp_path: Path) -> None:
    case = begun(tmp_path, f"file://{tmp_path}/far")
    for step in (1, 2):
        case.save(step)
    case.run.results.write_text('{"export": "there"}')
    plan = build_plan(case.recipe, detect_machine(), 1)
    context = Mock(plan=plan, recipe=case.recipe, run=case.run, upload=case.job(1), attempt=1)
    assert _complete(context) == 0
    assert case.mirror.steps() == [2] and case.mirror.record(2)
    said = [call.args[0] for call in context.terminal.write.call_args_list]
    assert len(said) == 1 and "is complete" in said[0]


def test_a_store_of_an_earlier_version_with_nothing_held_out_is_refused(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, data={"validation": 1e-9})
    with patch("turbolm.data.prepare.build.check_held_out"):
        prepare(recipe)
    with pytest.raises(UserError, match="set data.validation: 0, which means no evaluation"):
        _open_prepared_store(recipe)


def test_a_store_without_documents_that_the_recipe_refuses_is_refused(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, data={"on_bad_document": "skip"})
    with (tmp_path / "corpus.jsonl").open("a") as file:
        file.write("{}\n")
    prepare(recipe)
    assert _open_prepared_store(recipe).manifest["bad_documents"] == 1
    refuse = recipe.model_copy(update={"data": recipe.data.model_copy(update={"on_bad_document": "refuse"})})
    with pytest.raises(UserError, match="corpus.jsonl:151: there is no field 'text'"):
        _open_prepared_store(refuse)


def test_data_that_is_not_prepared_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `turbolm prepare RECIPE` once"):
        _open_prepared_store(make_recipe(tmp_path))


def test_what_follows_from_anomalies_may_change_at_a_start_and_nothing_else(tmp_path: Path) -> None:
    run, first = RunDirectory(tmp_path / "run"), make_recipe(tmp_path)
    second = first.model_copy(update={"anomalies": Anomalies(spikes="skip")})
    third = first.model_copy(update={"anomalies": Anomalies(spikes="rollback")})
    budget = first.train.budget
    run.path.mkdir()
    run.metrics.write_text("{}\n")  # a step was trained
    for recipe in (first, second, second, third):
        assert settle_contract(run, recipe, "store") == [budget]
    known = known_fingerprints(run, third, [budget])
    assert {fingerprint(contract_of(recipe)) for recipe in (first, second, third)} == set(known)
    other = third.model_copy(update={"optimizer": third.optimizer.model_copy(update={"lr": 1.0})})
    with pytest.raises(UserError, match="optimizer.lr"):
        settle_contract(run, other.model_copy(update={"anomalies": Anomalies()}), "store")
    with pytest.raises(UserError, match="token store"):
        settle_contract(run, first, "another store")


@pytest.mark.parametrize("content", ["", "[" * 100_000, "[]", "{}", '{"contract": {}, "fingerprint": 3}', "\x80\x04."])
def test_a_damaged_contract_is_named(content: str, tmp_path: Path) -> None:
    run, recipe = RunDirectory(tmp_path / "run"), make_recipe(tmp_path)
    settle_contract(run, recipe, "store")
    run.metrics.write_text("{}\n")  # a step was trained
    run.contract.write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"contract\.json is damaged"):
        settle_contract(run, recipe, "store")
    assert run.contract.read_text(encoding="latin-1") == content
