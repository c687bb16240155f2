"""Atomic JSON and hashes: what a reader finds after a crash, and the same digests as other tools."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path

import pytest

from turbolm import files


def test_a_written_value_is_read_back_and_its_record_is_that_of_sha256sum(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    record = files.write_json(path, {"b": [1, "é"], "a": None}, durable=True)
    assert files.read_json(path) == {"b": [1, "é"], "a": None}
    told = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]
    assert record == {"bytes": path.stat().st_size, "sha256": told}
    assert files.sha256_file(path) == told
    assert [entry.name for entry in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_what_is_no_json_object_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert files.read_json(path) is None
    assert files.read_json(tmp_path / "missing.json") is None


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"step": 1})

    def full(file: int, content: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_json(path, {"step": 2})
    assert files.read_json(path) == {"step": 1}


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, content: write(file, content[:3]))
    files.write_json(tmp_path / "a.json", {"name": "longer than three bytes"})
    assert files.read_json(tmp_path / "a.json") == {"name": "longer than three bytes"}


def test_durable_json_is_strict_and_other_json_lenient(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"path": Path("x"), "loss": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text())["path"] == "x"
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "b.json", {"loss": float("nan")}, durable=True)
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "b.json", {"path": Path("x")}, durable=True)


def test_the_digest_of_a_value_does_not_depend_on_the_order_of_keys() -> None:
    expected = hashlib.sha256(b'{"a": 1, "b": 2}').hexdigest()
    assert files.sha256_json({"b": 2, "a": 1}) == files.sha256_json({"a": 1, "b": 2}) == expected
