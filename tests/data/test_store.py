"""Reading a store: what a document's positions are, and what happens when files are not what they should be."""

from __future__ import annotations

import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from turbolm.data.store import SPLITS, TokenStore, check_tokenizer, open_store, unigram_entropy
from turbolm.data.tokenizer import save_tokenizer, train_tokenizer
from turbolm.errors import UserError


@pytest.fixture
def copy(store: TokenStore, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store.folder, tmp_path / "copy"))


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


def test_token_counts_are_those_of_the_targets(store: TokenStore) -> None:
    for split in SPLITS:
        lengths = store.lengths(split).tolist()
        targets = [store.read(split, document, 0, length)[1:] for document, length in enumerate(lengths)]
        expected = np.bincount(np.concatenate(targets), minlength=store.vocab_size)
        np.testing.assert_array_equal(store.token_counts(split), expected)
        some = np.bincount(np.concatenate(targets[:3]), minlength=store.vocab_size)
        np.testing.assert_array_equal(store.token_counts(split, max_tokens=sum(lengths[:3])), some)


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
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    open_store(copy)  # sizes are right
    with pytest.raises(UserError, match=rf"Shard 0 of .* is damaged: shard-00000.{part} has changed"):
        open_store(copy, verify="full")
    file.write_bytes(content[:-8])
    with pytest.raises(UserError, match=rf"Shard 0 .*shard-00000.{part} has \d+ bytes where the manifest says \d+"):
        open_store(copy)
    file.unlink()
    with pytest.raises(UserError, match=rf"Shard 0 .*shard-00000.{part} is missing.*turbolm prepare"):
        open_store(copy)


def test_bad_manifest(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no complete token store"):
        open_store(tmp_path)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="manifest.json cannot be read"):
        open_store(copy)
    (copy / "manifest.json").write_text('{"format_version": 99}')
    with pytest.raises(UserError, match="format 99, not 1"):
        open_store(copy)


def test_check_tokenizer(store: TokenStore, tmp_path: Path) -> None:
    check_tokenizer(store, store.tokenizer_dir)
    save_tokenizer(train_tokenizer(["some other text " * 3], 260), tmp_path)
    with pytest.raises(UserError, match="differs from the one the token store"):
        check_tokenizer(store, tmp_path)
