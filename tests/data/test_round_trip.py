"""How much of its text a tokenizer gives back, and what a store says of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from turbolm.data.prepare.build import prepare
from turbolm.data.prepare.engines import Plain
from turbolm.data.prepare.round_trip import _common_length, lost_bytes
from turbolm.data.prepare.tokenizer import save_tokenizer, train_tokenizer
from turbolm.data.store.token_store import open_store
from turbolm.errors import UserError

from .conftest import make_recipe, write_jsonl

WORDS = ["hello world"] * 9


def byte_level(**parts: Any) -> Tokenizer:
    tokenizer = train_tokenizer(WORDS, 258)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def trained(model: Any, trainer: Any, **parts: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    for name, part in {"pre_tokenizer": pre_tokenizers.Whitespace(), **parts}.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(WORDS, trainer)
    return tokenizer


def bpe(**unknown: Any) -> Tokenizer:
    special = ["</s>", *unknown.values()]
    return trained(models.BPE(**unknown), trainers.BpeTrainer(special_tokens=special, show_progress=False))


def unigram() -> Tokenizer:
    """As sentencepiece has it: spaces are a letter."""
    space = pre_tokenizers.Metaspace(prepend_scheme="always")
    settings = {"vocab_size": 30, "special_tokens": ["</s>", "<unk>"], "unk_token": "<unk>", "show_progress": False}
    return trained(
        models.Unigram(), trainers.UnigramTrainer(**settings), pre_tokenizer=space, decoder=decoders.Metaspace()
    )


def wordpiece() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(special_tokens=["[UNK]", "</s>"], show_progress=False)
    return trained(models.WordPiece(unk_token="[UNK]"), trainer, decoder=decoders.WordPiece())


KINDS: list[tuple[Callable[[], Tokenizer], str, int]] = [  # a text, and the bytes of it that do not come back
    (byte_level, "Any tëxt\n\n  \U0001f642 at all ▁", 0),
    (lambda: byte_level(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), "hello", 0),
    (lambda: byte_level(normalizer=normalizers.Lowercase()), "Hello World", 2),
    (lambda: byte_level(normalizer=normalizers.NFC()), "e\u0301a", 3),  # one character of two bytes instead
    (lambda: byte_level(normalizer=normalizers.Strip()), "  hello ", 3),
    (bpe, "hello", 0),
    (bpe, "hello world", 1),
    (bpe, "hexlo, \U0001f642", 1 + 1 + 1 + 4),
    (lambda: bpe(unk_token="<unk>"), "hexlo", 1),
    (lambda: bpe(unk_token="<unk>"), "x" * 9, 9),
    (unigram, "hello world", 0),
    (unigram, " hello world", 0),
    (unigram, "hello  xworld", 1),
    (wordpiece, "hello world", 0),
    (wordpiece, "hello\n\nworld", 2),
]


@pytest.mark.parametrize(("make", "text", "lost"), KINDS, ids=[f"{number}" for number in range(len(KINDS))])
def test_lost_bytes(make: Callable[[], Tokenizer], text: str, lost: int, tmp_path: Path) -> None:
    save_tokenizer(make(), tmp_path)
    assert lost_bytes(Plain(tmp_path), text) == lost


@given(st.binary(max_size=12), st.binary(max_size=12))
def test_common_length(one: bytes, other: bytes) -> None:
    one, other = bytes(b % 3 for b in one), bytes(b % 3 for b in other)

    @cache
    def longest(i: int, j: int) -> int:
        if i == len(one) or j == len(other):
            return 0
        return longest(i + 1, j + 1) + 1 if one[i] == other[j] else max(longest(i + 1, j), longest(i, j + 1))

    assert _common_length(one, other) == longest(0, 0)


def test_a_store_says_what_its_tokenizer_loses(tmp_path: Path) -> None:
    save_tokenizer(byte_level(), tmp_path / "whole")
    save_tokenizer(byte_level(normalizer=normalizers.Lowercase()), tmp_path / "lower")
    sources = [{"type": "jsonl", "path": str(write_jsonl(tmp_path / "a.jsonl", [f"Ab{i:03} c" for i in range(100)]))}]
    stores = {
        name: open_store(prepare(make_recipe(tmp_path, sources, validation=share, path=str(tmp_path / name))))
        for name, share in (("whole", 0.1), ("lower", 0.0))
    }
    whole, lower = stores["whole"], stores["lower"]
    assert whole.manifest["text_loss"]["lost_bytes"] == 0 and whole.text_loss == 0.0 and whole.notes == []
    assert lower.text_loss == pytest.approx(1 / 7)  # of 32 documents or so, each with one capital of seven bytes
    assert lower.manifest["text_loss"]["sampled_bytes"] % 7 == 0
    unseen, lossy = lower.notes
    assert unseen.startswith("data.validation is 0: no document is held out")
    assert "14.3% of the bytes" in lossy


def test_a_share_that_holds_nothing_out_is_refused(tmp_path: Path) -> None:
    save_tokenizer(byte_level(), tmp_path / "tok")
    sources = [{"type": "jsonl", "path": str(write_jsonl(tmp_path / "a.jsonl", ["one", "two"]))}]
    recipe = make_recipe(tmp_path, sources, validation=1e-9, path=str(tmp_path / "tok"))
    with pytest.raises(UserError, match=r"Raise data.validation \(it is now 1e-09\).* or set data.validation: 0, "):
        prepare(recipe)
    store = prepare(make_recipe(tmp_path, sources, validation=0.0, path=str(tmp_path / "tok")))
    assert open_store(store).num_documents("train") == 2
