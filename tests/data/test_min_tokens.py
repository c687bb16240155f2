"""`min_tokens`: a source's shorter documents are left out and counted, however the store is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from turbolm.data.prepare import build as prepare_module
from turbolm.data.prepare.build import prepare, store_key
from turbolm.data.prepare.reader import tell_left_out
from turbolm.data.prepare.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from turbolm.data.store.token_store import SPLITS, open_store
from turbolm.errors import UserError
from turbolm.launch.store import store_size
from turbolm.plan.preview import min_tokens_notes
from turbolm.recipe.contract import contract_of, fingerprint
from turbolm.recipe.schema import Recipe

from .conftest import make_recipe, write_jsonl
from .test_prepare import contents, stored_texts

MIN_TOKENS = 20
SHORT = ["too short"] * 200  # a shard of these alone


@pytest.fixture
def case(tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[list[dict[str, Any]], str]:
    """Two sources, the first with a minimum, and a tokenizer."""
    monkeypatch.setattr(prepare_module, "SHARD_TEXT_BYTES", 16_000)
    save_tokenizer(train_tokenizer(texts, 300), tmp_path / "tokenizer")
    files = [write_jsonl(tmp_path / f"{n}.jsonl", some) for n, some in enumerate([SHORT + texts, texts[:20]])]
    sources = [{"type": "jsonl", "path": str(file), "label": f"web{n}"} for n, file in enumerate(files)]
    return [sources[0] | {"min_tokens": MIN_TOKENS}, sources[1]], str(tmp_path / "tokenizer")


def build(cache: Path, case: tuple[list[dict[str, Any]], str], **changes: Any) -> Recipe:
    return make_recipe(cache, [case[0][0] | changes, case[0][1]], path=case[1])


def test_shorter_documents_are_left_out_and_counted(
    case: tuple[list[dict[str, Any]], str], texts: list[str], tmp_path: Path
) -> None:
    recipe = build(tmp_path / "a", case)
    store = open_store(prepare(recipe, num_workers=2), verify="full")
    tokenizer = load_tokenizer(case[1])
    long = [text for text in texts if len(tokenizer.encode(text, add_special_tokens=False).ids) >= MIN_TOKENS]
    assert 10 < len(long) < len(texts) - 10
    kept = long + texts[:20]
    found = stored_texts(store)
    assert sorted(found["train"] + found["validation"]) == sorted(kept)
    for split in SPLITS:
        sizes = store.text_bytes(split).tolist()
        assert sizes == [len(text.encode()) for text in found[split]]
        assert store.manifest["totals"][split]["documents"] == len(found[split])
    num_short = len(SHORT) + len(texts) - len(long)
    assert store.manifest["short_documents"] == [num_short, 0]
    assert any(not shard["tokens"]["bytes"] for shard in store.manifest["shards"]), "a shard of short documents alone"
    assert np.array_equal(store.lengths_of("train", np.arange(len(found["train"]))), store.lengths("train"))
    line = f"skipped: {num_short} documents of data.sources[0] with fewer than {MIN_TOKENS} tokens"
    assert tell_left_out(store.manifest) == [line]
    assert min_tokens_notes(recipe, store_size(recipe)) == [
        f"web0: {num_short} documents of fewer than {MIN_TOKENS} tokens are left out"
    ]
    assert min_tokens_notes(recipe, None) == [f"web0: documents of fewer than {MIN_TOKENS} tokens are left out"]
    assert contents(prepare(build(tmp_path / "b", case), num_workers=1)) == contents(store.folder)


def test_what_has_no_minimum_is_as_it_was(case: tuple[list[dict[str, Any]], str], tmp_path: Path) -> None:
    without = build(tmp_path, case, min_tokens=None)
    contract = contract_of(without)
    assert fingerprint(contract) != fingerprint(contract_of(build(tmp_path, case)))
    assert store_key(without) != store_key(build(tmp_path, case))
    for source in contract["data"]["sources"]:
        del source["min_tokens"]
    assert fingerprint(contract) == fingerprint(contract_of(without))


def test_a_source_of_short_documents_alone_is_refused(case: tuple[list[dict[str, Any]], str], tmp_path: Path) -> None:
    message = r"data\.sources\[0\]\.min_tokens: none of its \d+ documents has 1000000 tokens; lower it"
    with pytest.raises(UserError, match=message):
        prepare(build(tmp_path, case, min_tokens="1M"), num_workers=1)
