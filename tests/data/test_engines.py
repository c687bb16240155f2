"""Faster engines give the ids of `tokenizers`, and are not used where they do not."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from turbolm.data.prepare import build as prepare_module
from turbolm.data.prepare import engines, shards
from turbolm.data.prepare.build import prepare
from turbolm.data.prepare.engines import EngineMismatch, Gigatoken, Plain, Words, check_sample, choose_engine
from turbolm.data.prepare.tokenizer import save_tokenizer, train_tokenizer
from turbolm.data.store.token_store import open_store

from .conftest import make_recipe, make_texts

TEXTS = [*make_texts(60), "", "def f(x):\n\treturn  x**2\r\n\r\n   # don't 12345", " \u00a0\n x", "a<|endoftext|>b"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(TEXTS, 380), folder)
    return folder


@pytest.fixture(scope="module")
def words(folder: Path) -> Words:
    return Words(Plain(folder))


def change(source: Path, target: Path, **parts: Any) -> Path:
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    for name, value in parts.items():
        setattr(tokenizer, name, value)
    save_tokenizer(tokenizer, target)
    return target


def ids(engine: engines.Engine, texts: list[str]) -> list[list[int]]:
    flat, lengths = engine.encode([text.encode() for text in texts])
    assert len(flat) == lengths.sum() and len(lengths) == len(texts)
    return [part.tolist() for part in np.split(flat, np.cumsum(lengths)[:-1])]


def reference(folder: Path, texts: list[str]) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def test_engines_give_the_ids_of_tokenizers(folder: Path, words: Words) -> None:
    expected = reference(folder, TEXTS)
    assert ids(Plain(folder), TEXTS) == ids(words, TEXTS) == expected
    assert ids(words, TEXTS[::-1]) == expected[::-1]  # now that it knows the words


def test_words_of_any_text(folder: Path, words: Words) -> None:
    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.text(), min_size=1, max_size=5))
    def check(texts: list[str]) -> None:
        assert ids(words, texts) == reference(folder, texts)

    check()


def test_words_of_every_character(folder: Path, words: Words) -> None:
    """Unicode's newest letters are letters to one library and not to the other: here too the ids are the same."""
    other = sorted(engines._classed_differently([r"\p{L}"], set(map(chr, range(0x10000, 0x20000)))))
    assert other
    characters = [chr(code) for code in (*range(0x2000), *range(0x2000, 0x30000, 97))]
    characters = [c for c in characters if not 0xD800 <= ord(c) < 0xE000] + other[:500]
    texts = ["".join(f"a{c}{c} {c}1{c}" for c in characters[at : at + 20]) for at in range(0, len(characters), 20)]
    assert ids(words, texts) == reference(folder, texts)


def test_words_forgets_before_memory_grows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_CACHE_BYTES", 2000)
    engine = Words(Plain(folder))
    for text, expected in zip(TEXTS, reference(folder, TEXTS), strict=True):
        assert ids(engine, [text]) == [expected]
        assert engine._known_bytes <= 2000
        assert sum(len(word) + len(known) for word, known in engine._known.items()) <= 2000


def test_words_refuses_other_kinds_of_tokenizers(folder: Path, tmp_path: Path) -> None:
    gpt2 = change(folder, tmp_path / "gpt2", pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False))
    assert ids(Words(Plain(gpt2)), TEXTS) == reference(gpt2, TEXTS)
    with pytest.raises(EngineMismatch, match="normalizes"):
        Words(Plain(change(folder, tmp_path / "nfc", normalizer=normalizers.NFC())))
    for number, splitter in enumerate(
        (
            pre_tokenizers.ByteLevel(add_prefix_space=True),
            pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(r"\s+"), "removed"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            ),
        )
    ):
        with pytest.raises(EngineMismatch, match="splitting"):
            Words(Plain(change(folder, tmp_path / str(number), pre_tokenizer=splitter)))
    # Gaps between matches are pieces too, which `findall` leaves out.
    gaps = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    other = change(folder, tmp_path / "gaps", pre_tokenizer=gaps)
    assert ids(Words(Plain(other)), TEXTS) == reference(other, TEXTS)


def test_auto_takes_words_without_gigatoken(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    said: list[str] = []
    assert choose_engine("auto", folder, said.append) == "words"
    assert choose_engine("tokenizers", folder, said.append) == "words"
    other = change(folder, tmp_path / "nfc", normalizer=normalizers.NFC())
    assert choose_engine("auto", other, said.append) == "tokenizers"
    assert said == []
    assert choose_engine("gigatoken", folder, said.append) == "words"
    assert said == ["gigatoken is not installed (pip install 'turbolm[gigatoken]'); tokenizing with tokenizers"]


class FakeGigatoken(Gigatoken):
    """Has the interface and is wrong about one character."""

    wrong = "\u2581"

    def __init__(self, plain: Plain):
        self._plain = plain

    def encode(self, texts: Any) -> engines.Ids:
        return self._plain.encode([text.replace(self.wrong.encode(), b"?") for text in texts])


def test_engine_with_other_ids_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engines._ENGINES, "gigatoken", FakeGigatoken)
    said: list[str] = []
    assert choose_engine("auto", folder, said.append) == "words"
    assert len(said) == 1
    assert said[0].startswith("gigatoken is not used: it gives other ids than tokenizers for '_a __b \u2581c")
    monkeypatch.setattr(FakeGigatoken, "wrong", "\u732b\u732b")
    assert choose_engine("auto", folder, said.append) == "gigatoken"
    assert len(said) == 1


def test_mismatch_in_the_corpus_starts_again(
    folder: Path, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sample of a shard finds what the nasty strings did not: every shard is written anew."""

    class Pool:  # in this process, so that the fake engine is the workers' too
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def submit(self, call: Any, *arguments: Any) -> Any:
            from concurrent.futures import Future

            future: Future[Any] = Future()
            try:
                future.set_result(call(*arguments))
            except EngineMismatch as error:
                future.set_exception(error)
            return future

        def shutdown(self, **_: Any) -> None:
            pass

    sources = [{"type": "jsonl", "path": str(corpus)}]
    monkeypatch.setattr(prepare_module, "SHARD_TEXT_BYTES", 64_000)
    expected = prepare(make_recipe(tmp_path / "plain", sources, path=str(folder)), num_workers=1)
    documents = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    recipe = make_recipe(tmp_path / "fake", sources, path=str(folder))
    monkeypatch.setattr(prepare_module, "_ENGINE_BYTES", 0)
    monkeypatch.setattr(shards, "ProcessPoolExecutor", Pool)
    monkeypatch.setitem(engines._ENGINES, "gigatoken", FakeGigatoken)
    monkeypatch.setattr(FakeGigatoken, "wrong", documents[200])
    monkeypatch.setattr(shards, "check_sample", lambda *arguments: check_sample(*arguments, every=1))
    said: list[str] = []
    store = open_store(prepare(recipe, num_workers=1, warn=said.append), verify="full")
    assert len(said) == 1
    assert said[0].startswith("gigatoken is not used after all: it gives other ids than tokenizers for '200 ")
    assert store.fingerprint == open_store(expected).fingerprint


def test_tokenizer_that_gigatoken_cannot_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(content: str) -> None:
        raise ValueError("unknown model")

    fake = types.SimpleNamespace(Tokenizer=types.SimpleNamespace(from_json=refuse))
    monkeypatch.setitem(sys.modules, "gigatoken", fake)  # type: ignore[arg-type]
    said: list[str] = []
    assert choose_engine("gigatoken", folder, said.append) == "words"
    assert said == ["gigatoken is not used: it cannot read this tokenizer: unknown model; tokenizing with tokenizers"]


def test_real_gigatoken(folder: Path, tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gigatoken")
    monkeypatch.setattr(engines, "_RENEW_BYTES", 1000)
    assert ids(Gigatoken(Plain(folder)), TEXTS) == reference(folder, TEXTS)
    assert choose_engine("auto", folder, pytest.fail) == "gigatoken"
    monkeypatch.setattr(prepare_module, "_ENGINE_BYTES", 0)
    stores = []
    for engine in ("gigatoken", "tokenizers"):
        recipe = make_recipe(tmp_path / engine, [{"type": "jsonl", "path": str(corpus)}], path=str(folder))
        execution = recipe.execution.model_copy(update={"tokenizer_engine": engine})
        stores.append(prepare(recipe.model_copy(update={"execution": execution}), num_workers=1, warn=pytest.fail))
    one, two = ({p.name: p.read_bytes() for p in store.rglob("*") if p.is_file()} for store in stores)
    assert one == two
