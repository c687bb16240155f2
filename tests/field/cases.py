"""The table of faults from the field: what came in, who met it, and the right result.

`report` is a public report of the kind (GitHub's `owner/repository#number`), or None where the case was made up. The
input is written to an empty folder, which is the working directory; `source` is what a recipe says of it.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

TEXTS = ["first", "zwei über\r\nlines", "", "猫 🙂", "(last)"]
SHORT = ["a", "b"]
PAGE = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head></html>\n"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:6652\nsize 146946961\n"


def jsonl(texts: list[str], field: str = "text") -> bytes:
    return "".join(
        json.dumps({"id": i, field: text}, ensure_ascii=False) + "\n" for i, text in enumerate(texts)
    ).encode()


def compress(content: bytes, how: str) -> bytes:
    """`content` in the format, or as it is for `plain`."""
    make: dict[str, Callable[[bytes], bytes]] = {
        "plain": bytes,
        "gzip": gzip.compress,
        "zstd": zstandard.compress,
        "xz": lambda content: lzma.compress(content, preset=0),
        "bz2": bz2.compress,
    }
    return make[how](content)


def parquet(columns: dict[str, Any] | list[tuple[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    names, arrays = zip(*(columns.items() if isinstance(columns, dict) else columns), strict=True)
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.Table.from_arrays([pyarrow.array(array) for array in arrays], names=list(names))
    pyarrow.parquet.write_table(table, sink, row_group_size=2)
    return bytes(sink.getvalue())


def arrow() -> bytes:
    import pyarrow

    table, sink = pyarrow.table({"text": SHORT}), pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def not_utf8() -> Any:
    """Four strings of Arrow, the third of which is `x\\xff`; Arrow does not look."""
    import pyarrow

    ends = (0).to_bytes(4, "little") + b"".join(end.to_bytes(4, "little") for end in (1, 2, 4, 5))
    return pyarrow.Array.from_buffers(pyarrow.string(), 4, [None, *map(pyarrow.py_buffer, (ends, b"abx\xffd"))])


def link(*links: tuple[str, str]) -> Callable[[], None]:
    """Writes real/a.jsonl, and links given as (name, what it leads to)."""

    def write() -> None:
        Path("real").mkdir()
        Path("real/a.jsonl").write_bytes(jsonl(SHORT))
        for name, target in links:
            os.symlink(target, name)

    return write


@dataclass(frozen=True)
class Case:
    """One fault: `right` is the texts that are read, or a regular expression for the refusal."""

    kind: str
    report: str | None
    content: dict[str, bytes] | Callable[[], Any]  # by name of the file
    source: dict[str, Any]
    right: list[str] | str


def one(name: str, content: bytes | Callable[[], bytes], right: list[str] | str, kind: str, report: str | None = None,
        **source: Any) -> Case:  # fmt: skip
    """A case of one file."""
    made = content if isinstance(content, bytes) else lambda: Path(name).write_bytes(content())
    type_ = {".parquet": "parquet", ".txt": "text", ".html": "text"}.get(Path(name.removesuffix(".gz")).suffix, "jsonl")
    return Case(kind, report, {name: made} if isinstance(made, bytes) else made,
                {"type": type_, "path": name} | source, right)  # fmt: skip


BAD_DOWNLOAD = "download it again"
FILES = [
    # Compressed, whatever the name says
    one("a.jsonl", gzip.compress(jsonl(TEXTS)), TEXTS, "gzip without its suffix", "huggingface/datasets#6851"),
    one("a.json", gzip.compress(jsonl(TEXTS)), TEXTS, "gzip named json", "streamlit/files-connection#11"),
    one("a.jsonl.gz", jsonl(TEXTS), TEXTS, "not compressed any more, named gz"),
    one("a.jsonl.gz", zstandard.compress(jsonl(TEXTS)), TEXTS, "zstd named gz"),
    one("a.jsonl.xz", lzma.compress(jsonl(TEXTS)), TEXTS, "xz"),
    one("a.jsonl.bz2", bz2.compress(jsonl(TEXTS)), TEXTS, "bz2"),
    one("a.jsonl.gz", gzip.compress(gzip.compress(jsonl(TEXTS))), TEXTS, "gzip twice, by a web server"),
    one("a.jsonl.gz", gzip.compress(jsonl(["a"])) + gzip.compress(jsonl(["b"])), SHORT, "two gzip members"),
    one("a.jsonl.gz", gzip.compress(jsonl(SHORT)) + bytes(512), SHORT, "gzip padded with zeros, as from tape"),
    one("a.jsonl.zst", zstandard.compress(jsonl(["a"])) + zstandard.compress(jsonl(["b"])), SHORT, "two zstd frames",
        "dotnet/runtime#129047"),
    one("a.jsonl.zst", b"\x50\x2a\x4d\x18\x02\0\0\0xx" + zstandard.compress(jsonl(SHORT)), SHORT, "a frame to skip"),
    one("a.txt.gz", gzip.compress("zwei\n猫".encode()), ["zwei\n猫"], "compressed text"),
    one("a.jsonl.gz", gzip.compress(b""), [], "gzip of nothing"),
    one("a.jsonl.gz", gzip.compress(gzip.compress(gzip.compress(b"x"))), "compressed more than 2 times", "gzip thrice"),
    # Cut off and damaged
    one("a.jsonl.gz", gzip.compress(jsonl(TEXTS))[:-9], r"gzip data is truncated at byte \d+, .* \d+ bytes of text",
        "cut gzip", "google-research-datasets/natural-questions#24"),
    one("a.jsonl.zst", zstandard.compress(jsonl(TEXTS))[:-3], "zstd data is truncated at byte", "cut zstd",
        "nodejs/node#64592"),
    one("a.jsonl.xz", lzma.compress(jsonl(TEXTS))[:-3], "xz data is truncated", "cut xz", "huggingface/datasets#3060"),
    one("a.jsonl.bz2", bz2.compress(jsonl(TEXTS))[:-3], "bz2 data is truncated", "cut bz2"),
    one("a.txt.gz", gzip.compress(b"a b c")[:-3], "gzip data is truncated", "cut gzip of a text",
        "togethercomputer/RedPajama-Data#34"),
    one("a.jsonl.gz", b"", "a.jsonl.gz has 0 bytes", "empty gz"),
    one("a.jsonl.zst", b"", "a.jsonl.zst has 0 bytes", "empty zst"),
    one("a.txt.gz", b"", "a.txt.gz has 0 bytes", "empty gz of a text"),
    one("a.jsonl.gz", gzip.compress(jsonl(SHORT)) + b"garbage", "gzip data is corrupt near byte", "gzip, then garbage"),
    one("a.jsonl.gz", b"\x8b\x1f" + gzip.compress(jsonl(SHORT))[2:], "begins with the bytes 8b 1f", "damaged header"),
    one("a.jsonl", jsonl(SHORT)[:-4], "a.jsonl:2: not valid JSON", "cut JSON lines", "kakaobrain/bassl#11"),
    one("a.jsonl", jsonl(["a"]) + bytes(4096) + jsonl(["b"]), "a.jsonl:2: not valid JSON.*zero bytes", "a hole"),
    one("a.jsonl", bytes(4096), f"run of zero bytes.*{BAD_DOWNLOAD}", "nothing but a hole"),
    one("a.parquet", lambda: parquet({"text": SHORT})[:-20], "has no footer", "cut Parquet",
        "huggingface/datasets#4077"),
    one("a.parquet", b"", "a.parquet has 0 bytes", "empty Parquet"),
    one("a.jsonl", b"", [], "no lines at all"),
    one("a.txt", b"", [""], "an empty text"),
    # Something else
    one("a.jsonl", PAGE, "is a page of HTML or XML, not JSON lines", "HTML page", "microsoft/X-Decoder#74"),
    one("a.parquet", PAGE, "is a page of HTML or XML, not Parquet", "HTML page instead of Parquet"),
    one("a.txt", PAGE, "is a page of HTML or XML, not text.*end in .html", "HTML page instead of a text"),
    one("a.html", PAGE, [PAGE.decode()], "a page that is the document"),
    one("a.jsonl.gz", PAGE, "is a page of HTML or XML", "HTML page instead of gzip", "wesm/pydata-book#42"),
    one("a.jsonl", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "HTML or XML", "refusal of S3"),
    one("a.jsonl", b"Entry not found", "begins with 'Entry not found'", "a server's refusal"),
    one("a.parquet", POINTER, "git-lfs pointer.*git lfs pull", "LFS pointer", "InertExpert2911/Mutual_Fund_Data#1"),
    one("a.jsonl", POINTER, "git-lfs pointer.*git lfs pull", "LFS pointer", "prince687028/TravelUAV#3"),
    one("a.txt", POINTER, "git-lfs pointer.*git lfs pull", "LFS pointer", "deephaven/deephaven-core#4561"),
    one("a.jsonl", lambda: parquet({"text": SHORT}), "a Parquet file, not JSON lines: use `type: parquet`", "Parquet"),
    one("a.parquet", jsonl(SHORT), "is JSON, not Parquet: use `type: jsonl`", "JSON lines named parquet"),
    one("a.parquet", arrow, r"Arrow \(Feather\) file, not Parquet", "Arrow named parquet"),
    one("a.jsonl", arrow, r"Arrow \(Feather\) file, not JSON lines", "Arrow named jsonl"),
    one("a.parquet", lambda: gzip.compress(parquet({"text": SHORT})), "compressed with gzip; dec", "Parquet in gzip"),
    one("a.jsonl.gz", gzip.compress(b"\0" * 257 + b"ustar" + bytes(250)), "holds a tar archive", "tar.gz"),
    one("a.jsonl", b"PK\x03\x04" + bytes(30), "is a zip archive, not JSON lines: unpack", "zip",
        "huggingface/datasets#4306"),
    one("a.txt", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\0", "is a PDF document", "PDF named txt"),
    one("a.txt", b"PAR1 is Parquet", ["PAR1 is Parquet"], "text that begins as a format"),
    one("a.txt", b"BZh9 and (more", ["BZh9 and (more"], "text that begins as bz2"),
    # Encodings
    one("a.jsonl", b"\xef\xbb\xbf" + jsonl(TEXTS), TEXTS, "BOM", "pydantic/pydantic-ai#8312"),
    one("a.jsonl.gz", gzip.compress(b"\xef\xbb\xbf" + jsonl(TEXTS)), TEXTS, "BOM in gzip"),
    one("a.jsonl", b"\xef\xbb\xbf" + jsonl(["a"]) + b"\xef\xbb\xbf" + jsonl(["b"]), SHORT, "two files with BOM in one"),
    one("a.txt", b"\xef\xbb\xbfthe text", ["the text"], "BOM before a text", "langchain-ai/langchain-community#138"),
    one("a.txt", "x\ufeffy".encode(), ["x\ufeffy"], "the same character inside a text stays"),
    one("a.jsonl", jsonl(TEXTS).decode().encode("utf-16"), TEXTS, "UTF-16 of PowerShell",
        "microsoft/vscode-docs#3118"),
    one("a.txt", "die 猫".encode("utf-16"), ["die 猫"], "UTF-16 text"),
    one("a.jsonl", jsonl(TEXTS).decode().encode("utf-16-be"), TEXTS, "UTF-16 without BOM"),
    one("a.jsonl", jsonl(TEXTS).decode().encode("utf-32"), TEXTS, "UTF-32"),
    one("a.txt", "die".encode("utf-16-le"), "UTF-16-LE text without a byte order mark", "UTF-16 text without BOM"),
    one("a.jsonl", "{".encode("utf-16") + b"\0\xd8\x01\0", "not valid UTF-16", "damaged UTF-16"),
    one("a.txt", "deux\nété".encode("latin-1"), r"a.txt:2: byte 5 of the file \(0xe9\) is not UTF-8", "Latin-1"),
    one("a.jsonl", jsonl(["a"]) + jsonl(["é"]).decode().encode("latin-1"), r"a.jsonl:2: byte \d+ of the line \(0xe9\)",
        "Latin-1 in JSON lines", "rowanz/merlot#17"),
    one("a.jsonl", b'{"text": "\\ud83d"}\n', "a.jsonl:1: field 'text' has half a surrogate pair", "half a character"),
    # JSON that is not JSON lines
    one("a.jsonl", json.dumps([{"text": text} for text in TEXTS], indent=1).encode(), TEXTS, "JSON array",
        "hpcaitech/ColossalAI#3658"),
    one("a.json", json.dumps([{"text": text} for text in TEXTS]).encode(), TEXTS, "JSON array in one line"),
    one("a.json.gz", gzip.compress(b'\xef\xbb\xbf [\n{"text": "a"}\n, {"text": "b"} ]\n'), SHORT, "JSON array in gzip"),
    one("a.json", b"[]\n", [], "empty JSON array"),
    one("a.json", b'[{"text": "a"},\n{"text": "b"', "after document 1: the file ends inside it", "cut JSON array"),
    one("a.json", b'[{"text": "a"}, {"text": "b', "array after document 1: the file ends inside it", "cut in a string"),
    one("a.json", b'[{"text": "a"}, {"text": }]', "array after document 1: Expecting value", "damaged JSON array"),
    one("a.json", b'[{"text": "a"}]\n[{"text": "b"}]\n', "after document 1: something follows its end", "two arrays"),
    one("a.json", b'[{"text": "a"}, 7]', "document 2: expected a JSON object, got int", "a number in a JSON array"),
    one("a.json", b'[{"text": "\xff"}]', r"byte 11 \(0xff\) is not UTF-8", "JSON array that is not UTF-8"),
    one("a.jsonl", b'{\n "text": "a"\n}\n', "a.jsonl:1: not valid JSON.*be a complete JSON object", "indented JSON",
        "longzw1997/Open-GroundingDino#96"),
    one("a.jsonl", jsonl(["a"])[:-1] + jsonl(["b"]), "a.jsonl:1: not valid JSON: Extra data", "two objects in a line",
        "facebookresearch/lingua#42"),
    one("a.jsonl", b"id,text\n1,a\n", "a.jsonl:1: not valid JSON.*begins with 'id,text'", "CSV"),
    # Columns
    one("a.parquet", lambda: parquet({"text": not_utf8()}), r"row 3: byte 1 of the text \(0xff\) is not UTF-8",
        "Parquet that is not UTF-8", "apache/arrow#29635"),
    one("a.parquet", lambda: parquet({"text.lang": ["x", "y"], "text": SHORT}), SHORT, "a dotted name beside it",
        "dask/fastparquet#117"),
    one("a.parquet", lambda: parquet({"a": [{"b": "x"}, {"b": "y"}], "a.b": SHORT}), SHORT, "a struct beside it",
        "apache/arrow#11347", field="a.b"),
    one("a.parquet", lambda: parquet({"a": [{"b": "x"}]}), "no field 'a.b'; the fields are a", "field of a struct",
        "apache/arrow#46329", field="a.b"),
    one("a.parquet", lambda: parquet([("text", ["x"]), ("text", ["a"])]), "2 columns have the name", "two columns"),
    one("a.parquet", lambda: parquet({"text": [1, 2]}), "field 'text' is int64, not text", "numbers"),
    one("a.parquet", lambda: parquet({"text": [b"a"]}), "field 'text' is binary, not text", "bytes"),
    # One file under several names
    Case("a link to it", "agsaru/Repo2Readme#171", link(("b.jsonl", "real/a.jsonl")),
         {"type": "jsonl", "path": ["real/*.jsonl", "b.jsonl"]}, SHORT),
    Case("a linked folder", "uataq/stilt#137", link(("also", "real")), {"type": "jsonl", "path": "**/*.jsonl"}, SHORT),
    Case("a link in a circle", "ClickHouse/ClickHouse#106697", link(("real/up", "..")),
         {"type": "jsonl", "path": "**/*.jsonl"}, SHORT),
    Case("several patterns", None, link(),
         {"type": "jsonl", "path": ["real/a.jsonl", "real/*", "./real/../real/a.jsonl", "{folder}/real/a.jsonl"]},
         SHORT),
    Case("a link to nothing", None, link(("b.jsonl", "gone.jsonl")), {"type": "jsonl", "path": "*.jsonl"},
         "b.jsonl, a link to gone.jsonl, cannot be read"),
    Case("two files with the same text", None, {"a.jsonl": jsonl(["a"]), "b.jsonl": jsonl(["a"])},
         {"type": "jsonl", "path": "*.jsonl"}, ["a", "a"]),
]  # fmt: skip
