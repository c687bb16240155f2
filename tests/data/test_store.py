"""Reading a store: what a document's positions are, and what happens when files are not what they should be."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.data.conftest import make_recipe, write_jsonl
from turbolm.data.prepare import build as prepare_module
from turbolm.data.prepare.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from turbolm.data.store.token_store import (
    SPLITS,
    TokenStore,
    check_tokenizer,
    file_record,
    manifest_sha256,
    open_store,
    unigram_entropy,
)
from turbolm.errors import UserError


@pytest.fixture
def copy(store: TokenStore, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store.folder, tmp_path / "copy"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> TokenStore:
    """Three sources in several shards each, but the second holds no text at all."""
    folder = tmp_path_factory.mktemp("sharded")
    parts = {"a": texts[:180], "b": ["", ""], "c": texts[180:]}
    sources = [{"type": "jsonl", "path": str(write_jsonl(folder / name, part))} for name, part in parts.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "SHARD_TEXT_BYTES", 40_000)
        store = open_store(prepare_module.prepare(make_recipe(folder, sources, validation=0.3), num_workers=1))
    assert len(store.manifest["shards"]) > 6
    return store


def test_a_range_is_that_part_of_the_whole(sharded: TokenStore) -> None:
    for split in SPLITS:
        lengths, text_bytes = sharded.lengths(split), sharded.text_bytes(split)
        count = sharded.num_documents(split)
        assert len(lengths) == len(text_bytes) == count
        assert lengths.dtype == np.int64
        for first, end in [(0, 0), (0, 1), (count, count), (count // 3, count // 2), (3, count - 1), (1, count)]:
            np.testing.assert_array_equal(sharded.lengths(split, first, end), lengths[first:end])
            np.testing.assert_array_equal(sharded.text_bytes(split, first, end), text_bytes[first:end])
        with pytest.raises(AssertionError):
            sharded.lengths(split, 0, count + 1)


def test_locate_finds_documents_in_any_order(sharded: TokenStore) -> None:
    for split in SPLITS:
        lengths = sharded.lengths(split)
        documents = np.random.default_rng(0).integers(0, len(lengths), 100)
        assert sharded.lengths_of(split, documents).tolist() == lengths[documents].tolist()
        for document in documents.tolist():
            shard, begin, end = sharded.locate(split, document)
            found = sharded.read(split, document, 0, int(lengths[document]))
            np.testing.assert_array_equal(found, sharded.tokens(shard)[begin:end])
    assert sharded.lengths_of("train", np.zeros(0, np.int64)).tolist() == []


def test_sources_hold_their_own_documents(sharded: TokenStore, texts: list[str]) -> None:
    tokenizer = load_tokenizer(sharded.tokenizer_dir)
    found: list[list[str]] = [[], [], []]
    for split in SPLITS:
        lengths = sharded.lengths(split)
        for source, (first, end) in enumerate(sharded.source_documents(split)):
            assert sharded.source_positions(split)[source] == lengths[first:end].sum()
            found[source] += [
                tokenizer.decode(sharded.read(split, document, 0, int(lengths[document]))[1:-1].tolist())
                for document in range(first, end)
            ]
        assert sharded.source_documents(split)[-1][1] == len(lengths)
    assert [sorted(part) for part in found] == [sorted(texts[:180]), [], sorted(texts[180:])]


def test_only_what_is_asked_for_is_read(sharded: TokenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    original = TokenStore._map
    monkeypatch.setattr(
        TokenStore, "_map", lambda self, shard, *more: opened.append(shard) or original(self, shard, *more)
    )
    sharded.lengths("train", 0, 2)
    sharded.locate("train", sharded.num_documents("train") - 1)
    sharded.source_documents(), sharded.source_positions()
    assert opened == [0, len(sharded.manifest["shards"]) - 1]


def test_read_gives_inputs_and_the_target_after_them(store: TokenStore) -> None:
    for split in SPLITS:
        for document, length in enumerate(store.lengths(split).tolist()):
            whole = store.read(split, document, 0, length)
            assert len(whole) == length + 1
            assert whole[0] == store.manifest["bos_id"]
            assert whole[-1] == store.manifest["eos_id"]
            np.testing.assert_array_equal(store.read(split, document, length // 2, 1), whole[length // 2 :][:2])
    with pytest.raises(AssertionError):
        store.read("train", 0, 0, int(store.lengths("train")[0]) + 1)


def test_reading_maps_the_file(store: TokenStore) -> None:
    assert not store.read("train", 0, 0, 1).flags.owndata
    assert not store.read("train", 0, 0, 1).flags.writeable


def test_token_counts_are_those_of_the_targets(sharded: TokenStore) -> None:
    store = sharded
    for split in SPLITS:
        lengths = store.lengths(split).tolist()
        targets = [store.read(split, document, 0, length)[1:] for document, length in enumerate(lengths)]
        expected = np.bincount(np.concatenate(targets), minlength=store.vocab_size)
        np.testing.assert_array_equal(store.token_counts(split), expected)
        for count in (3, len(lengths) // 2):
            some = np.bincount(np.concatenate(targets[:count]), minlength=store.vocab_size)
            np.testing.assert_array_equal(store.token_counts(split, max_tokens=sum(lengths[:count])), some)


def test_unigram_entropy() -> None:
    assert unigram_entropy(np.array([5, 5, 0, 5, 5])) == pytest.approx(math.log(4))
    assert unigram_entropy(np.array([0, 7])) == 0
    assert unigram_entropy(np.zeros(3, np.int64)) == 0


def test_store_can_be_pickled(store: TokenStore) -> None:
    store.read("train", 0, 0, 1)
    again = pickle.loads(pickle.dumps(store))  # noqa: S301
    assert again.fingerprint == store.fingerprint
    np.testing.assert_array_equal(again.read("train", 1, 0, 2), store.read("train", 1, 0, 2))
    assert len(pickle.dumps(store)) < 20_000


def test_fingerprint_does_not_depend_on_the_place(store: TokenStore, copy: Path) -> None:
    assert open_store(copy, verify="full").fingerprint == store.fingerprint


@pytest.mark.parametrize("part", ["tokens", "index"])
def test_damaged_files(copy: Path, part: str) -> None:
    file = copy / f"shard-00000.{part}"
    sound = file.read_bytes()
    file.write_bytes(sound[:-8])
    with pytest.raises(UserError, match=rf"Shard 0 .*shard-00000.{part} has \d+ bytes where the manifest says \d+"):
        open_store(copy)
    file.write_bytes(sound[:-5] + bytes([sound[-5] ^ 1]) + sound[-4:])
    with pytest.raises(UserError, match=rf"Shard 0 .*shard-00000.{part} is another file or has changed"):
        open_store(copy)
    file.unlink()
    with pytest.raises(UserError, match=rf"Shard 0 .*shard-00000.{part} is missing.*turbolm prepare"):
        open_store(copy)


def test_a_change_in_the_middle_is_found_by_the_full_check(copy: Path) -> None:
    file = copy / "shard-00000.tokens"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    open_store(copy)  # sizes and ends are right
    with pytest.raises(UserError, match=r"Shard 0 of .* is damaged: shard-00000.tokens has changed.*SHA-256"):
        open_store(copy, verify="full")


def test_exchanged_shards(sharded: TokenStore, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sharded.folder, tmp_path / "copy"))
    manifest = json.loads((folder / "manifest.json").read_text())
    one, two = (folder / manifest["shards"][number]["tokens"]["file"] for number in (1, 3))
    # Another shard with documents of the same lengths: as large, and sound.
    two.write_bytes(np.fromfile(one, manifest["dtype"])[::-1].tobytes())
    shutil.copy(one.with_suffix(".index"), two.with_suffix(".index"))
    files = {part: {"file": two.with_suffix(f".{part}").name} for part in ("tokens", "index")}
    files = {part: name | file_record(folder / name["file"]) for part, name in files.items()}
    manifest["shards"][3] = manifest["shards"][1] | files
    (folder / "manifest.json").write_text(json.dumps(manifest | {"manifest_sha256": manifest_sha256(manifest)}))
    open_store(folder, verify="full")
    one.rename(folder / "other"), two.rename(one), (folder / "other").rename(two)
    with pytest.raises(UserError, match=r"Shard 1 of .*shard-00001.tokens is another file"):
        open_store(folder)


def test_bad_manifest(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no complete token store"):
        open_store(tmp_path)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["shards"][0]["train"]["documents"] -= 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="manifest.json has changed since it was written"):
        open_store(copy)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="manifest.json cannot be read"):
        open_store(copy)
    (copy / "manifest.json").write_text('{"format_version": 99}')
    with pytest.raises(UserError, match="format 99, not 2"):
        open_store(copy)


def test_check_tokenizer(store: TokenStore, tmp_path: Path) -> None:
    check_tokenizer(store, store.tokenizer_dir)
    save_tokenizer(train_tokenizer(["some other text " * 3], 260), tmp_path)
    with pytest.raises(UserError, match="differs from the one the token store"):
        check_tokenizer(store, tmp_path)
