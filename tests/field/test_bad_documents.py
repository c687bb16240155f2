"""`data.on_bad_document`: what is left out is counted and named, the same however a store came to be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.conftest import make_recipe, make_texts
from tests.data.test_prepare import contents, stored_texts
from turbolm.data.prepare import build as prepare_module
from turbolm.data.prepare.build import prepare, store_folder, store_key
from turbolm.data.prepare.progress import Progress
from turbolm.data.prepare.reader import Reader
from turbolm.data.prepare.tokenizer import save_tokenizer, train_tokenizer
from turbolm.data.store.token_store import open_store
from turbolm.errors import UserError
from turbolm.launch.store import prepare_store
from turbolm.recipe.contract import contract_of, fingerprint
from turbolm.recipe.schema import Recipe
from turbolm.recipe.sources.jsonl import JsonlSource

from .cases import not_utf8, parquet

TEXTS = make_texts(120)
BAD = [b'{"text": ', b'{"text": "\xff"}', b"[1]", b'{"body": "a"}', b'{"text": 3}', b'{"text": "\\ud800"}']


def with_policy(recipe: Recipe, policy: str, cache: Path | None = None) -> Recipe:
    execution = recipe.execution.model_copy(update={"cache_dir": str(cache or recipe.execution.cache_dir)})
    data = recipe.data.model_copy(update={"on_bad_document": policy})
    return recipe.model_copy(update={"data": data, "execution": execution})


def test_prepare_counts_what_it_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare_module, "SHARD_TEXT_BYTES", 16_000)
    lines = [json.dumps({"text": text}).encode() for text in TEXTS]
    bad_at = [*range(60, 100, 5), len(lines) - 1, len(lines), len(lines)]  # so many good lines come before
    for number, at in sorted(enumerate(bad_at), reverse=True):
        lines.insert(at, BAD[number % len(BAD)])
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.parquet").write_bytes(parquet({"text": not_utf8()}))
    save_tokenizer(train_tokenizer(TEXTS, 300), tmp_path / "tokenizer")
    sources = [{"type": "jsonl", "path": str(tmp_path / "a.jsonl")}]
    sources += [{"type": "parquet", "path": str(tmp_path / "b.parquet")}]
    refuse = make_recipe(tmp_path / "1", sources, path=str(tmp_path / "tokenizer"))
    skip = with_policy(refuse, "skip")
    assert store_key(skip) == store_key(refuse)
    assert fingerprint(contract_of(skip)) != fingerprint(contract_of(refuse))

    # What was finished before the first bad document is kept (and nothing that ends in .tmp)
    with pytest.raises(UserError, match=r"a.jsonl:61: not valid JSON.*`data.on_bad_document: skip` skips such"):
        prepare(refuse, num_workers=1)
    before = {path: path.stat().st_ino for path in store_folder(refuse).glob("shard-*[!p]")}
    assert len(before) > 4
    folder = prepare(skip, num_workers=1)
    assert {path: path.stat().st_ino for path in before} == before
    store = open_store(folder, verify="full")
    found = stored_texts(store)
    assert sorted(found["train"] + found["validation"]) == sorted([*TEXTS, "a", "b", "d"])
    assert store.manifest["bad_documents"] == len(bad_at) + 1
    first = store.manifest["first_bad_documents"]
    places = [at + number + 1 for number, at in enumerate(bad_at)]
    assert [line.split(": ")[0] for line in first] == [f"{tmp_path / 'a.jsonl'}:{place}" for place in places[:10]]
    assert "no field 'text'; the fields are body" in first[3]

    # The same with two workers at once, and interrupted with a finished shard lost
    other = contents(prepare(with_policy(skip, "skip", tmp_path / "2"), num_workers=2))
    interrupted, num_shards = with_policy(skip, "skip", tmp_path / "3"), 0

    def interrupt(progress: Progress) -> None:
        nonlocal num_shards
        num_shards += progress.stage == "tokenize"
        if num_shards == len(store.manifest["shards"]) - 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(interrupted, num_workers=1, on_progress=interrupt)
    lost = next(p for p in sorted(store_folder(interrupted).glob("*.json")) if "first_bad_documents" in p.read_text())
    lost.unlink()
    assert contents(prepare(interrupted, num_workers=1)) == other == contents(folder)

    # It is no store of a recipe that refuses them, whether complete or not; the command tells of them
    with pytest.raises(UserError, match=r"a.jsonl:61: not valid JSON"):
        prepare(refuse)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"a.jsonl:61: not valid JSON"):
        prepare(refuse, num_workers=1)
    assert prepare_store(skip) == folder
    assert [line.strip() for line in capsys.readouterr().out.splitlines()[-11:]] == [
        f"skipped: {len(bad_at) + 1} bad documents, such as", *first
    ]  # fmt: skip


def test_a_source_with_nothing_but_bad_documents_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    source = JsonlSource(type="jsonl", path=(str(path),))
    path.write_bytes(b'{"body": "a"}\n' * 3)
    with pytest.raises(
        UserError, match="first 3 documents of the source 'jsonl' cannot be used.*a.jsonl:1: there is no"
    ):
        list(Reader(source, on_bad="skip"))
    path.write_bytes(b'{"body": "a"}\n' * 2000 + b'{"text": "a"}\n')
    with pytest.raises(UserError, match="first 1000 documents"):
        list(Reader(source, on_bad="skip"))
    assert list(Reader(source, (0, 1990), on_bad="skip")) == ["a"]


@pytest.mark.parametrize("content", [b'[{"text": "a"}, {"text": }]', b"\x1f\x8b\x08cut", b"<html>"])
def test_a_damaged_file_is_no_bad_document(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="a.jsonl"):
        list(Reader(JsonlSource(type="jsonl", path=(str(tmp_path / "a.jsonl"),)), on_bad="skip"))


def test_empty_files_are_told_of(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "some text"}\n' * 9)
    (tmp_path / "b.jsonl").write_bytes(b"")
    heard: list[str] = []
    recipe = make_recipe(tmp_path, [{"type": "jsonl", "path": str(tmp_path / "*.jsonl")}], validation=0.0)
    with pytest.raises(UserError, match="vocab_size"):
        prepare(recipe, num_workers=1, warn=heard.append)
    assert heard == [f"1 files of data.sources have 0 bytes and hold no documents, such as {tmp_path / 'b.jsonl'}"]
