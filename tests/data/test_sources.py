"""Every kind of source gives its documents in a fixed order, and says what is wrong with a file."""

from __future__ import annotations

import gzip
import json
import random
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import zstandard
from pydantic import TypeAdapter

from turbolm.data.prepare.reader import Reader
from turbolm.errors import UserError
from turbolm.recipe.sources import Source

TEXTS = ["first", "zwei über\r\nlines", "", "猫 🙂", " "]


def source(**keys: Any) -> Source:
    return TypeAdapter(Source).validate_python(keys)


def read(**keys: Any) -> list[str]:
    return list(Reader(source(**keys)))


def jsonl_bytes(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)).encode()


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def test_stdlib() -> None:
    files = source(type="stdlib").files()
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root).as_posix() for path in files]
    assert names == sorted(names)
    assert len(names) > 400
    assert {"os.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    assert not {part for name in names for part in name.split("/")[:-1]} & {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
    }
    assert next(iter(Reader(source(type="stdlib")))) == files[0].read_text(encoding="utf-8")


def test_stdlib_decodes_or_skips_other_encodings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_bytes("# -*- coding: latin-1 -*-\n# é\n".encode("latin-1"))
    (tmp_path / "b.py").write_bytes(b"# \xff broken\n")
    (tmp_path / "c.py").write_bytes(b"c = 1\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "d.py").write_bytes(b"d = 1\n")
    monkeypatch.setattr("turbolm.recipe.sources.stdlib.sysconfig.get_path", lambda name: str(tmp_path))
    assert read(type="stdlib") == ["# -*- coding: latin-1 -*-\n# é\n", "c = 1\n"]


def test_text_files_sorted_by_path(tmp_path: Path) -> None:
    for name, text in zip(("b.txt", "a.txt", "sub/c.txt", "x[1].txt"), TEXTS, strict=False):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    assert read(type="text", path=str(tmp_path / "**" / "*.txt")) == [TEXTS[i] for i in (1, 0, 2, 3)]
    assert read(type="text", path=str(tmp_path / "x[1].txt")) == [TEXTS[3]]
    both = (str(tmp_path / "b.txt"), str(tmp_path / "[ab].txt"))
    assert read(type="text", path=both) == [TEXTS[1], TEXTS[0]]


def test_jsonl_plain_and_compressed(tmp_path: Path) -> None:
    content = jsonl_bytes(TEXTS)
    half = content.index(b"\n") + 1
    (tmp_path / "a.jsonl").write_bytes(content + b"\n" + b'{"text": null}')
    assert read(type="jsonl", path=str(tmp_path / "a.jsonl")) == [*TEXTS, ""]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    assert read(type="jsonl", path=str(tmp_path / "a.jsonl.gz")) == TEXTS
    frames = zstandard.compress(content[:half]) + zstandard.compress(content[half:])
    (tmp_path / "a.jsonl.zst").write_bytes(frames)
    assert read(type="jsonl", path=str(tmp_path / "a.jsonl.zst")) == TEXTS
    big = [str(i**9) * 50 for i in range(20_000)]  # more than one read
    (tmp_path / "big.jsonl.zst").write_bytes(zstandard.compress(jsonl_bytes(big)[:-1], level=1))
    assert read(type="jsonl", path=str(tmp_path / "big.jsonl.zst")) == big


def test_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"n": [1, 2, 3, 4, 5, 6], "body": [*TEXTS, None]})
    assert read(type="parquet", path=str(path), field="body") == [*TEXTS, ""]


def test_a_parquet_file_is_read_a_row_group_at_a_time(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = [random.Random(number).randbytes(100_000).hex() for number in range(180)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=15)
    del texts
    allocated = []
    for _ in Reader(source(type="parquet", path=str(tmp_path / "a.parquet"))):
        allocated.append(pyarrow.total_allocated_bytes())
    assert max(allocated) < 20e6  # of 36 MB in 12 row groups; read all at once they are taken apart to 78 MB


def test_datasets_folders(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"text": TEXTS})
    rows.save_to_disk(tmp_path / "one")
    assert read(type="datasets", path=str(tmp_path / "one")) == TEXTS
    assert len(source(type="datasets", path=str(tmp_path / "one")).files()) >= 3
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "splits")
    assert read(type="datasets", path=str(tmp_path / "splits"), split="test") == TEXTS[:1]
    with pytest.raises(UserError, match="no split 'dev'; it has train, test"):
        read(type="datasets", path=str(tmp_path / "splits"), split="dev")
    with pytest.raises(UserError, match="no field 'body'; the fields are text"):
        read(type="datasets", path=str(tmp_path / "one"), field="body")


def test_datasets_of_local_files_as_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "train.jsonl").write_bytes(jsonl_bytes(TEXTS))
    assert read(type="datasets", path=str(tmp_path / "files"), streaming=True) == TEXTS
    with pytest.raises(UserError, match="cannot be loaded"):
        read(type="datasets", path=str(tmp_path / "files"), split="nope", streaming=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', "bad.jsonl:2: not valid JSON"),
        (b"[" * 100_000, "bad.jsonl:1: not valid JSON"),
        (b'{"text": "a"}\n[1]\n', "bad.jsonl:2: expected a JSON object, got list"),
        (b'{"body": "a", "id": 1}\n', "bad.jsonl:1: there is no field 'text'; the fields are body, id"),
        (b'{"text": 3}\n', "bad.jsonl:1: field 'text' is int, not text"),
        (b'{"text": "\\ud800"}\n', "bad.jsonl:1: field 'text' has half a surrogate pair at character 0"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', r"bad.jsonl:2: byte 10 of the line \(0xff\) is not UTF-8"),
    ],
)
def test_bad_jsonl(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(type="jsonl", path=str(tmp_path / "bad.jsonl"))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_bad_compression(tmp_path: Path, suffix: str, damage: str) -> None:
    content = jsonl_bytes([str(i**9) for i in range(5000)]) + b"\n" * 1_000_000  # the cut loses no line's middle
    packed = gzip.compress(content) if suffix == ".gz" else zstandard.compress(content)
    path = tmp_path / f"bad.jsonl{suffix}"
    # Of a gzip file the checksum at its end; a zstd file may have none
    at, count = (len(packed) - 8, 8) if suffix == ".gz" else (len(packed) // 2, 100)
    path.write_bytes(packed[:-20] if damage == "cut" else packed[:at] + bytes(count) + packed[at + count :])
    found = f"truncated at byte {len(packed) - 20}, the end of the file" if damage == "cut" else "corrupt near byte"
    with pytest.raises(UserError, match=f"bad.jsonl{suffix} cannot be read: its .* data is {found}.* bytes of text"):
        read(type="jsonl", path=str(path))


def test_other_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"no file matches 'no/\*.txt' \(looked in {tmp_path}\)"):
        read(type="text", path="no/*.txt")
    with pytest.raises(UserError, match="is a folder; name its files"):
        read(type="text", path=str(tmp_path))
    (tmp_path / "bad.txt").write_bytes(b"abc\xc3(")
    with pytest.raises(UserError, match=r"bad.txt:1: byte 3 of the file \(0xc3\) is not UTF-8"):
        read(type="text", path="bad.txt")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="bad.parquet starts like a Parquet file, but has no footer"):
        read(type="parquet", path="bad.parquet")
    write_parquet(tmp_path / "n.parquet", {"text": [1, 2]})
    with pytest.raises(UserError, match="n.parquet: field 'text' is int64, not text"):
        read(type="parquet", path="n.parquet")
    with pytest.raises(UserError, match="no field 'body'; the fields are text"):
        read(type="parquet", path="n.parquet", field="body")


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")

    def refuse(path: Path, *_: Any, **__: Any) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # file modes do not stop root
    with pytest.raises(UserError, match="a.txt cannot be read: Permission denied"):
        read(type="text", path=str(tmp_path / "a.txt"))


def test_sources_do_not_import_heavy_libraries() -> None:
    import subprocess

    code = "import sys, turbolm.data.batch.loader, turbolm.data.prepare.build; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "datasets", "pyarrow", "tokenizers"} & set(modules)
