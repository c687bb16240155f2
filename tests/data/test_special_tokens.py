"""Documents that spell out special and added tokens: ordinary text, or those tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

from turbolm.data.prepare import build as prepare_module
from turbolm.data.prepare.build import prepare, store_folder
from turbolm.data.prepare.engines import Gigatoken, Plain, Words, choose_engine
from turbolm.data.prepare.special_tokens import Finder
from turbolm.data.prepare.tokenizer import save_tokenizer, train_tokenizer
from turbolm.data.store.token_store import SPLITS, TokenStore, open_store
from turbolm.files import sha256_json

from .conftest import make_recipe, make_texts, write_jsonl

# Special, added and not special (as tools and thoughts are marked), and a run of spaces as tokenizers for code have it
TOKENS = [
    AddedToken("<|im_end|>", special=True),
    AddedToken("<think>", special=False),
    AddedToken("    ", special=False, normalized=False),
]
TEXTS = ["a<|im_end|>b", "<think> so", "x<|endoftext|>", "    code", "<|im_en", "plain", "<think<|im_end|>>"]
SPELLING = 4  # of them


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = train_tokenizer(make_texts(30), 300)
    tokenizer.add_special_tokens(TOKENS[:1])
    tokenizer.add_tokens(TOKENS[1:])
    save_tokenizer(tokenizer, folder)
    return folder


def reference(folder: Path, keep: bool) -> dict[str, list[int]]:
    """As `tokenizers` has it when all added tokens are looked for, or none but the spaces is there to be found."""
    content = json.loads((folder / "tokenizer.json").read_text())
    if not keep:
        content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].strip()]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    if not keep:  # ids of added tokens follow the vocabulary, so the only one left got another
        spaces = {
            tokenizer.token_to_id("    "): Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("    ")
        }
    else:
        spaces = {}
    return {t: [spaces.get(i, i) for i in tokenizer.encode(t, add_special_tokens=False).ids] for t in TEXTS}


def stored(store: TokenStore) -> list[list[int]]:
    return sorted(
        store.read(split, number, 0, int(length))[1:-1].tolist()
        for split in SPLITS
        for number, length in enumerate(store.lengths(split))
    )


@pytest.mark.parametrize("meaning", ["split", "keep"])
def test_prepare_does_as_it_is_told_and_says_how_many(folder: Path, tmp_path: Path, meaning: str) -> None:
    sources = [{"type": "jsonl", "path": str(write_jsonl(tmp_path / "a.jsonl", TEXTS))}]
    said: list[str] = []
    recipe = make_recipe(tmp_path, sources, validation=0.0, path=str(folder), special_tokens_in_text=meaning)
    store = open_store(prepare(recipe, num_workers=1, warn=said.append))
    expected = reference(folder, meaning == "keep")
    assert stored(store) == sorted(expected.values())
    where = {"split": "ordinary text", "keep": "that token"}[meaning]
    assert said == [
        f"{SPELLING} documents spell out a special or added token of the tokenizer (most often '<|im_end|>'); it "
        f"counts as {where} there (tokenizer.special_tokens_in_text: {meaning})"
    ]
    prepare(recipe, warn=pytest.fail)  # once
    assert store.text_loss == 0.0


@pytest.mark.parametrize("tokenizer", [{"train": {"vocab_size": 300}}, {}])
def test_split_has_the_key_of_stores_before_there_was_a_choice(
    folder: Path, tmp_path: Path, tokenizer: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [{"type": "jsonl", "path": str(write_jsonl(tmp_path / "a.jsonl", TEXTS))}]
    hashed: list[dict[str, Any]] = []

    def note(content: Any) -> str:
        hashed.append(content)
        return sha256_json(content)

    monkeypatch.setattr(prepare_module, "sha256_json", note)
    folders = set()
    for chosen in ({}, {"special_tokens_in_text": "split"}, {"special_tokens_in_text": "keep"}):
        recipe = make_recipe(tmp_path, sources, **(tokenizer or {"path": str(folder)}), **chosen)
        folders.add(store_folder(recipe))
    assert len(folders) == 2
    keyed = [content for content in hashed if isinstance(content, dict) and "shard_text_bytes" in content]
    assert ["special_tokens_in_text" in content for content in keyed] == [False, False, True]


@pytest.mark.parametrize("meaning", ["split", "keep"])
def test_words_gives_the_same_ids(tmp_path: Path, meaning: Any) -> None:
    tokenizer = train_tokenizer(make_texts(30), 300)
    tokenizer.add_special_tokens(TOKENS[:1])
    tokenizer.add_tokens([TOKENS[1], AddedToken("cat", special=False, single_word=True, lstrip=True)])
    save_tokenizer(tokenizer, tmp_path)
    assert choose_engine("tokenizers", tmp_path, pytest.fail, meaning) == "words"
    plain = Plain(tmp_path, meaning)
    texts = [text.encode() for text in [*TEXTS, "a cat concat cats  cat"]]
    for found, expected in zip(Words(plain).encode(texts), plain.encode(texts), strict=True):
        assert found.tolist() == expected.tolist()
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"] = content["added_tokens"] if meaning == "keep" else []
    ids = [
        Tokenizer.from_str(json.dumps(content)).encode(text.decode(), add_special_tokens=False).ids for text in texts
    ]
    assert plain.encode(texts)[0].tolist() == [one for row in ids for one in row]


def test_real_gigatoken(folder: Path) -> None:
    pytest.importorskip("gigatoken")
    texts = [text.encode() for text in TEXTS]
    for meaning in ("split", "keep"):
        plain = Plain(folder, meaning)
        assert Gigatoken(plain).encode(texts)[0].tolist() == plain.encode(texts)[0].tolist()


def test_finder() -> None:
    finder = Finder(["<|a|>", "<|ab|>", "<|reserved_1|>", "aaaabc", "  ", "\n", "</s>"])
    for text, found in {
        "": None, "x": None, "<|a": None, "  \n": None, "é<|ab|>": "<|ab|>", "<|<|a|>": "<|a|>", "aaaaabc": "aaaabc",
        "<|reserved_2|></s><|a|>": "</s>",
    }.items():  # fmt: skip
        assert finder.find(text.encode()) == found
    assert Finder([]).find(b"any") is None
