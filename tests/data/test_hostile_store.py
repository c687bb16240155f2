"""A store made by someone else: nothing in it is executed, and nothing outside of it is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.canary import Canary, assert_it_sings, pickles
from tests.data.conftest import make_recipe
from turbolm.checkpoint.export import tokenizer as read_with_transformers
from turbolm.data.order.batch_order import recipe_order
from turbolm.data.order.plan_table import load_windows
from turbolm.data.prepare.build import prepare, store_folder
from turbolm.data.prepare.tokenizer import load_tokenizer, special_ids
from turbolm.data.store.token_store import SPLITS, TokenStore, file_record, manifest_sha256, open_store
from turbolm.errors import UserError
from turbolm.plan.curriculum import build_curriculum
from turbolm.recipe.schema import Recipe

FILES = ["manifest.json", "shard-00000.tokens", "shard-00000.index", "tokenizer/tokenizer.json",
         "tokenizer/tokenizer_config.json"]  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path, corpus: Path) -> Recipe:
    return make_recipe(tmp_path / "cache", [{"type": "jsonl", "path": str(corpus)}])


@pytest.fixture
def folder(recipe: Recipe, store: TokenStore) -> Path:
    """A copy of the store where the recipe's own would be."""
    return Path(shutil.copytree(store.folder, store_folder(recipe)))


def forge(folder: Path, change: Callable[[dict[str, Any]], None] = lambda manifest: None) -> None:
    """As a forger would: sizes and hashes of what is there now, and a manifest that vouches for them."""
    manifest = json.loads((folder / "manifest.json").read_text())
    parts = [
        *manifest["tokenizer_files"],
        *(shard[part] for shard in manifest["shards"] for part in ("tokens", "index")),
    ]
    for part in parts:
        part |= file_record(folder / part["file"])
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest | {"manifest_sha256": manifest_sha256(manifest)}))


def use(folder: Path) -> None:
    """Everything that training reads of a store."""
    store = open_store(folder, verify="full")
    load_tokenizer(store.tokenizer_dir)
    special_ids(store.tokenizer_dir)
    read_with_transformers(store.tokenizer_dir)
    for split in SPLITS:
        store.lengths(split)
        store.text_bytes(split)
        store.token_counts(split)


@pytest.mark.parametrize("kind", ["pickle", "torch.save", "text"])
@pytest.mark.parametrize("name", FILES)
def test_a_pickle_is_never_executed(name: str, kind: str, folder: Path, tmp_path: Path) -> None:
    use(folder)
    canary, file = tmp_path / "canary", folder / name
    content = pickles(canary)[kind]
    if name.startswith("shard"):  # as large as the manifest's counts want it
        content += bytes(file.stat().st_size - len(content))
    file.write_bytes(content)
    if name != "manifest.json":
        forge(folder)
    with pytest.raises(UserError) as caught:
        use(folder)
    assert Path(name).name in str(caught.value) or Path(name).stem in str(caught.value)
    assert_it_sings(canary)


@pytest.mark.parametrize("name", ["shard-00000.json", "tokenizer-files.json", "sample.jsonl"])
def test_what_an_interrupted_prepare_left_is_not_executed(
    name: str, recipe: Recipe, folder: Path, tmp_path: Path
) -> None:
    canary, whole = tmp_path / "canary", open_store(folder).fingerprint
    for kind in ("pickle", "text"):
        (folder / name).write_bytes(pickles(canary)[kind])
        (folder / "manifest.json").unlink()
        assert open_store(prepare(recipe, num_workers=1), verify="full").fingerprint == whole
    (folder / "manifest.json").unlink()
    (folder / name).write_text("[" * 100_000)
    assert open_store(prepare(recipe, num_workers=1)).fingerprint == whole
    assert_it_sings(canary)


def test_a_cached_order_is_not_executed(recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    """The table of an order is an .npz, which can hold objects; it is made anew instead."""
    store, canary = open_store(folder), tmp_path / "canary"
    expected = recipe_order(recipe, store, build_curriculum(recipe), save=True).digest(10)
    (table,) = (tmp_path / "cache" / "orders").rglob("*.npz")
    objects = tmp_path / "objects.npz"
    with np.load(table) as file:
        arrays = dict(file)
    np.savez(objects, **{**arrays, "digests": np.array([Canary(canary)], dtype=object)}, allow_pickle=True)
    for content in (objects.read_bytes(), *pickles(canary).values(), b"PK\x03\x04", b"\x93NUMPY\x01\x00"):
        table.write_bytes(content)
        assert not load_windows(table, str(arrays["key"]))
        assert recipe_order(recipe, store, build_curriculum(recipe), save=False).digest(10) == expected
    assert_it_sings(canary)


def outside(manifest: dict[str, Any]) -> None:
    manifest["shards"][0]["tokens"]["file"] = "../secret"


def absolute(manifest: dict[str, Any]) -> None:
    manifest["tokenizer_files"][0]["file"] = "/etc/hostname"


def objects(manifest: dict[str, Any]) -> None:
    manifest["dtype"] = "O"


def no_shards(manifest: dict[str, Any]) -> None:
    manifest["shards"] = {"0": None}


def more_documents(manifest: dict[str, Any]) -> None:
    manifest["shards"][0]["train"]["documents"] += 1


def negative(manifest: dict[str, Any]) -> None:
    manifest["shards"][0]["train"]["tokens"] = -1


def foreign_source(manifest: dict[str, Any]) -> None:
    manifest["shards"][0]["source"] = 99


def bos_beyond(manifest: dict[str, Any]) -> None:
    manifest["bos_id"] = manifest["vocab_size"]


def nothing_of_it(manifest: dict[str, Any]) -> None:
    for name in list(manifest):
        if name != "format_version":
            del manifest[name]


CHANGES = [outside, absolute, objects, no_shards, more_documents, negative, foreign_source, bos_beyond, nothing_of_it]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_forged_manifest_is_refused(change: Callable[[dict[str, Any]], None], folder: Path) -> None:
    shutil.copy(folder / "shard-00000.tokens", folder.parent / "secret")
    forge(folder, change)
    with pytest.raises(UserError, match=r"manifest\.json is not the manifest of a token store"):
        open_store(folder)


@pytest.mark.parametrize("name", ["shard-00000.tokens", "tokenizer/tokenizer.json"])
def test_a_link_is_not_followed(name: str, folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / name, tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link, not a file of the store"):
        open_store(folder)


def test_a_leftover_that_is_a_link_loses_the_link_alone(recipe: Recipe, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").touch()
    (folder / "manifest.json").unlink()
    (folder / "x.tmp").symlink_to(tmp_path / "precious")
    prepare(recipe, num_workers=1)
    assert not (folder / "x.tmp").is_symlink() and (tmp_path / "precious/file").exists()


def test_tokens_beyond_the_vocabulary_are_found(folder: Path) -> None:
    tokens = folder / "shard-00000.tokens"
    values = np.fromfile(tokens, "<u2")
    values[len(values) // 2] = 65_000
    tokens.write_bytes(values.tobytes())
    forge(folder)
    with pytest.raises(UserError, match=r"shard-00000\.tokens holds tokens beyond the vocabulary of 300"):
        open_store(folder, verify="full")


def test_an_index_that_makes_no_sense_is_found(folder: Path) -> None:
    index = folder / "shard-00000.index"
    values = np.fromfile(index, "<i8")
    for position, value in ((0, -5), (2, 2**60), (len(values) - 2, 3), (1, -1)):
        changed = values.copy()
        changed[position] = value
        index.write_bytes(changed.tobytes())
        forge(folder)
        with pytest.raises(UserError, match=r"shard-00000\.index is not an index of the documents"):
            open_store(folder, verify="full")


def test_a_store_is_read_as_numbers_alone(store: TokenStore) -> None:
    assert store.tokens(0).dtype == np.dtype("<u2") and not store.tokens(0).dtype.hasobject
