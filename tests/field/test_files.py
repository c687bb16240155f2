"""Files are judged by their first bytes: read right whatever they are called, or refused for what they are."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from turbolm.data.prepare.reader import Reader
from turbolm.errors import UserError
from turbolm.recipe.sources import Source, files

from .cases import FILES, TEXTS, Case, compress, jsonl, parquet

COMPRESSION = ["plain", "gzip", "zstd", "xz", "bz2"]


def read(start: tuple[int, int] = (0, 0), **source: Any) -> list[str]:
    return list(Reader(TypeAdapter(Source).validate_python(source), start))


@pytest.mark.parametrize("case", FILES, ids=lambda case: f"{case.source['type']}, {case.kind}")
def test_a_case(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if isinstance(case.content, dict):
        for name, content in case.content.items():
            Path(name).write_bytes(content)
    else:
        case.content()
    source = json.loads(json.dumps(case.source).replace("{folder}", str(tmp_path)))
    if isinstance(case.right, list):
        assert read(**source) == case.right
        return
    with pytest.raises(UserError, match=case.right) as refusal:
        read(**source)
    assert "iconv" not in str(refusal.value)


@pytest.mark.parametrize("how", COMPRESSION)
def test_the_name_decides_nothing(how: str, tmp_path: Path) -> None:
    lines, text = jsonl(TEXTS), "\n".join(TEXTS)
    suffixes = ["", ".jsonl", ".txt", ".json", ".gz", ".zst", ".xz", ".bz2", ".parquet", ".html", ".jsonl.gz", ".ZST"]
    as_lines = [b"", b"\n \n", lines, lines[:-1], b"\xef\xbb\xbf" + lines, lines.replace(b"\n", b"\r\n")]
    as_lines += [lines.decode().encode(encoding) for encoding in ("utf-16", "utf-16-le", "utf-32", "utf-32-be")]
    as_lines += [json.dumps([json.loads(line) for line in lines.splitlines()]).encode()]
    as_text = [text.encode(), text.encode("utf-8-sig"), text.encode("utf-16"), text.encode("utf-32")]
    for suffix, content in itertools.product(suffixes, as_lines):
        (path := tmp_path / f"lines{suffix}").write_bytes(compress(content, how))
        if path.stat().st_size or suffix.lower() not in (".gz", ".zst", ".xz", ".bz2", ".jsonl.gz"):
            assert read(type="jsonl", path=str(path)) == (TEXTS if content.strip() else []), (suffix, content[:20])
    for suffix, content in itertools.product(suffixes, as_text):
        (path := tmp_path / f"text{suffix}").write_bytes(compress(content, how))
        assert read(type="text", path=str(path)) == [text], (suffix, content[:20])


@pytest.mark.parametrize("how", COMPRESSION[1:])
def test_a_compressed_file_cut_anywhere_is_refused(how: str, tmp_path: Path) -> None:
    path, packed = tmp_path / f"a.{how.replace('gzip', 'gz').replace('zstd', 'zst')}", compress(jsonl(TEXTS), how)
    for length in range(len(packed)):
        path.write_bytes(packed[:length])
        for kind in ("jsonl", "text"):
            with pytest.raises(
                UserError, match=r"a\.[a-z0-9]+ (cannot be read: its|has 0 bytes|begins with|is binary)"
            ):
                read(type=kind, path=str(path))
    path.write_bytes(packed)
    assert read(type="jsonl", path=str(path)) == TEXTS


def test_mangled_files_are_read_or_refused(tmp_path: Path) -> None:
    rng, path = random.Random(0), tmp_path / "file"
    outcomes, messages = set(), []
    array = json.dumps([{"text": text} for text in TEXTS]).encode()
    good = [(kind, compress(jsonl(TEXTS), how)) for how in COMPRESSION for kind in ("jsonl", "text", "parquet")]
    good += [
        ("jsonl", array),
        ("jsonl", jsonl(TEXTS).decode().encode("utf-16")),
        *[("parquet", parquet({"text": TEXTS}))] * 3,
    ]
    for number in range(450):
        kind, content = good[number % len(good)]
        start = rng.randrange(len(content))
        end = min(len(content), start + rng.choice([0, 1, 1, 4, 50]))
        middle = rng.randbytes(rng.choice([0, 1, 1, 4, 50]))
        path.write_bytes(content[:start] + (middle if rng.random() < 0.9 else bytes(len(middle))) + content[end:])
        try:
            outcomes.add((kind, all(isinstance(text, str) for text in read(type=kind, path=str(path)))))
        except UserError as error:
            outcomes.add((kind, None))
            messages.append(str(error))
    assert all(str(path) in message and "iconv" not in message for message in messages)
    assert outcomes == {(kind, outcome) for kind in ("jsonl", "text", "parquet") for outcome in (True, None)}


@pytest.mark.parametrize("how", [*COMPRESSION, "array"])
def test_the_time_is_linear_in_the_length_of_a_line(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of 128 bytes: what copies the line for each of 8,000 pieces copies 8 GB."""
    monkeypatch.setattr(files, "_CHUNK_BYTES", 128)
    text = random.Random(0).randbytes(500_000).hex()
    content = json.dumps([{"text": text}] * 2).encode() if how == "array" else jsonl([text, "end"])
    (tmp_path / "a").write_bytes(compress(content, "plain" if how == "array" else how))
    assert read(type="jsonl", path=str(tmp_path / "a")) == [text, text if how == "array" else "end"]


def test_reading_goes_on_in_the_middle(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(7)]
    (tmp_path / "0.jsonl").write_bytes(b"\xef\xbb\xbf\n" + jsonl(texts[:3]))
    (tmp_path / "1.json").write_bytes(json.dumps([{"text": text} for text in texts[3:]]).encode())
    for file, row in itertools.product(range(2), range(4)):
        expected = (texts[:3][row:] if file == 0 else []) + texts[3:][row if file else 0 :]
        assert read((file, row), type="jsonl", path=str(tmp_path / "*")) == expected
