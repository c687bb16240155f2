"""Training, saving and reading tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from turbolm.data.prepare.tokenizer import (
    END_OF_TEXT,
    copy_tokenizer,
    load_tokenizer,
    save_tokenizer,
    special_ids,
    tokenizer_fingerprint,
    train_tokenizer,
    vocabulary_size,
)
from turbolm.errors import UserError

from .conftest import make_texts

TRAINED = train_tokenizer(make_texts(50), 300)
TRAINED.encode_special_tokens = True


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tokenizer(TRAINED, tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    assert TRAINED.decode(TRAINED.encode(text, add_special_tokens=False).ids) == text


def test_every_byte_is_a_token() -> None:
    assert set(range(256)) == {ord(c) for c in bytes(range(256)).decode("latin1")}
    from tokenizers.pre_tokenizers import ByteLevel

    assert all(TRAINED.token_to_id(symbol) is not None for symbol in ByteLevel.alphabet())
    assert len(ByteLevel.alphabet()) == 256
    assert vocabulary_size(TRAINED) == 300


def test_training_does_not_depend_on_the_order_of_texts() -> None:
    again = train_tokenizer(reversed(make_texts(50)), 300)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(TRAINED)
    assert tokenizer_fingerprint(train_tokenizer(make_texts(50), 301)) != tokenizer_fingerprint(TRAINED)


def test_too_little_text_says_what_can_be_reached() -> None:
    with pytest.raises(UserError, match=r"vocab_size 5000: it gives (\d+) tokens"):
        train_tokenizer(["hello hello"], 5000)


def test_transformers_reads_the_folder_and_keeps_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    auto = AutoTokenizer.from_pretrained(folder)
    text = "the cat\n\n  sat , 12345 über 🙂 !"
    assert auto.eos_token == auto.bos_token == auto.pad_token == END_OF_TEXT
    assert auto(text).input_ids == load_tokenizer(folder).encode(text).ids
    assert auto.decode(auto(text).input_ids) == text
    auto.save_pretrained(tmp_path / "again")
    assert tokenizer_fingerprint(tmp_path / "again") == tokenizer_fingerprint(folder) == tokenizer_fingerprint(TRAINED)


def test_special_tokens_in_a_text_are_text(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    eos_id = special_ids(folder)[1]
    ids = tokenizer.encode(f"a{END_OF_TEXT}b", add_special_tokens=False).ids
    assert eos_id not in ids
    assert tokenizer.decode(ids) == f"a{END_OF_TEXT}b"


def test_truncation_and_padding_of_the_file_do_not_act(folder: Path) -> None:
    limited = Tokenizer.from_file(str(folder / "tokenizer.json"))
    limited.enable_truncation(2)
    limited.enable_padding(length=9)
    limited.save(str(folder / "tokenizer.json"))
    assert len(load_tokenizer(folder).encode("a b c d e f").ids) > 2
    assert tokenizer_fingerprint(folder) == tokenizer_fingerprint(TRAINED)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"eos_token": END_OF_TEXT}, (0, 0)),
        ({"bos_token": {"content": "a"}, "eos_token": END_OF_TEXT}, ("a", 0)),
        ({"bos_token": END_OF_TEXT, "eos_token": None}, (0, 0)),
        ({}, (0, 0)),  # by the token's name
    ],
)
def test_bos_and_eos_stand_in_for_each_other(folder: Path, config: dict, expected: tuple) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert special_ids(folder) == tuple(TRAINED.token_to_id(x) if isinstance(x, str) else x for x in expected)


def test_copy_of_a_lone_file_is_a_whole_folder(folder: Path, tmp_path: Path) -> None:
    copy_tokenizer(folder / "tokenizer.json", tmp_path / "copy")
    assert special_ids(tmp_path / "copy") == (0, 0)
    assert tokenizer_fingerprint(tmp_path / "copy") == tokenizer_fingerprint(folder)
    copy_tokenizer(folder, tmp_path / "copy2")
    assert (tmp_path / "copy2" / "tokenizer_config.json").read_bytes() == (
        folder / "tokenizer_config.json"
    ).read_bytes()


def test_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no tokenizer at .*save_pretrained"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is no tokenizer"):
        load_tokenizer(tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<gone>"}))
    with pytest.raises(UserError, match="'<gone>' is not in its vocabulary"):
        special_ids(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        special_ids(folder)
    plain = json.loads((folder / "tokenizer.json").read_text())
    plain["added_tokens"] = []
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    with pytest.raises(UserError, match="no bos or eos token; name one"):
        special_ids(tmp_path / "plain.json")
