"""What a rank refuses before it trains."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.train.harness import make_recipe
from turbolm.data.prepare import prepare
from turbolm.data.store import open_store
from turbolm.errors import UserError
from turbolm.train.worker import _open_prepared_store


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


def test_data_that_is_not_prepared_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `turbolm prepare RECIPE` once"):
        _open_prepared_store(make_recipe(tmp_path))
