"""Of a data set of the `datasets` library only the text is read, and a refusal says where it began."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from turbolm.data.prepare.reader import Reader
from turbolm.errors import UserError
from turbolm.recipe.sources.datasets import DatasetsSource, _with_cause

SHORT = ["a", "b"]


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def read(path: Path, **keys: Any) -> list[str]:
    return list(Reader(DatasetsSource(type="datasets", path=str(path), **keys)))


def test_images_and_sounds_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface/datasets#7678: libraries that decode them may not be there, and would cost hours."""
    import datasets
    import pyarrow

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("decoded")

    features = datasets.Features(
        {"sound": datasets.Audio(), "text": datasets.Value("string"), "image": datasets.Image()}
    )
    stored = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    blobs = pyarrow.array([{"bytes": b"no image", "path": None}] * 2, stored)
    table = pyarrow.table({"sound": blobs, "text": SHORT, "image": blobs}).cast(features.arrow_schema)
    rows = datasets.Dataset(table, info=datasets.DatasetInfo(features=features))
    for column in (datasets.Audio, datasets.Image):
        monkeypatch.setattr(column, "decode_example", refuse)
    rows.save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    rows.to_parquet(tmp_path / "files" / "a.parquet")
    with pytest.raises(AssertionError, match="decoded"):
        next(iter(rows))
    assert read(tmp_path / "saved") == SHORT
    assert read(tmp_path / "files", streaming=True) == SHORT
    assert read(tmp_path / "files") == SHORT
    for streaming in (False, True):
        with pytest.raises(UserError, match="no field 'body'; the fields are image, sound, text"):
            read(tmp_path / "files", field="body", streaming=streaming)


def test_a_refusal_names_the_first_cause(tmp_path: Path) -> None:
    """hiyouga/LlamaFactory#1784: the library's own error says only that there was one."""
    (tmp_path / "files").mkdir()
    for name, row in (("a", {"text": "a"}), ("b", {"text": "b", "extra": 1})):
        (tmp_path / "files" / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="DatasetGenerationError.*because of CastError.*column names don't match"):
        read(tmp_path / "files")
    (tmp_path / "files" / "b.jsonl").write_text('{"text": "b"}\n{"text": \n')
    with pytest.raises(UserError, match="cannot be (loaded|read after row).*(JSON|Parse|parse)"):
        read(tmp_path / "files", streaming=True)


def test_causes_end_where_python_stops_showing_them() -> None:
    first = KeyError("x")
    with pytest.raises(ValueError) as chained:
        raise ValueError("hidden\nby") from first
    assert _with_cause(chained.value) == "ValueError: hidden by (because of KeyError: 'x')"
    first.__cause__ = first  # as `raise error from error` does
    assert _with_cause(chained.value) == "ValueError: hidden by (because of KeyError: 'x')"
    chained.value.__cause__ = None
    chained.value.__context__ = first  # Python shows no context after `from`
    assert _with_cause(chained.value) == "ValueError: hidden by"
