"""Open the files of a source: the format is detected by the first bytes, never by the suffix.

Compressed text is decompressed, a byte order mark is dropped, UTF-16 and UTF-32 become UTF-8. Errors name the format
that was found, and what to do about it.
"""

from __future__ import annotations

import bz2
import codecs
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from turbolm.errors import UserError
from turbolm.recipe.sources.base import Gauge

Wanted = Literal["text", "JSON lines"]

_BUFFER_BYTES = 1 << 20  # read at a time: some network file systems answer each read with a round trip
_CHUNK_BYTES = 1 << 15  # processed at a time, and less of a small file, so that progress advances in steps
_HEAD_BYTES = 1024  # a git-lfs pointer file is shorter, by its specification
_MAX_LAYERS = 2  # a gzip file that a web server compressed again
_COMPRESSION = ("gzip", "zstd", "xz", "bz2")
_PADDED = ("gzip", "xz")  # formats whose files may end in zeros
_COMPRESSED_SUFFIXES = {".gz", ".gzip", ".zst", ".zstd", ".xz", ".bz2"}
_WITHOUT_BOM = ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")

_AS_PARQUET = "save it as Parquet, for example with pyarrow.parquet.write_table"
_UNPACK = "unpack it and name the files inside"
_RECOMPRESS = "decompress it, or compress it with gzip, zstd, xz or bz2 instead"
_FETCH = "fetch the file itself"
# First bytes, the format, and what to do about it if no reader supports it
_FORMATS: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "gzip", ""),
    (b"\x28\xb5\x2f\xfd", "zstd", ""),
    *((bytes([0x50 + number]) + b"\x2a\x4d\x18", "zstd", "") for number in range(16)),  # a skippable frame, as in pzstd
    (b"\xfd7zXZ\0", "xz", ""),
    *((b"BZh%d" % level + start, "bz2", "") for level in range(1, 10) for start in (b"1AY&SY", b"\x17rE8P\x90")),
    (codecs.BOM_UTF8, "utf-8-sig", ""),
    (codecs.BOM_UTF32_LE, "utf-32", ""),  # its mark starts like that of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32", ""),
    (codecs.BOM_UTF16_LE, "utf-16", ""),
    (codecs.BOM_UTF16_BE, "utf-16", ""),
    (b"PAR1", "a Parquet file", "use `type: parquet` for it"),
    (b"ARROW1\0\0", "an Arrow (Feather) file", _AS_PARQUET),
    (b"FEA1", "a Feather file of version 1", _AS_PARQUET),
    (b"\xff\xff\xff\xff", "an Arrow stream", f"use `type: datasets` with its folder, or {_AS_PARQUET}"),
    (b"PK\x03\x04", "a zip archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (b"\x04\x22\x4d\x18", "an lz4 file", _RECOMPRESS),
    (b"\xff\x06\0\0sNaPpY", "a snappy file", _RECOMPRESS),
    (b"\x1f\x9d", "a file of compress(1)", _RECOMPRESS),
    (b"Obj\x01", "an Avro file", _AS_PARQUET),
    (b"SQLite format 3\0", "an SQLite database", _AS_PARQUET),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", _AS_PARQUET),
    (b"\x93NUMPY", "a NumPy array", _AS_PARQUET),
    (b"%PDF-", "a PDF document", "extract its text"),
    (b"version https://git-lfs.github.com/spec/", "a git-lfs pointer", f"{_FETCH} with `git lfs pull`"),
    (b"version https://hawser.github.com/spec/", "a git-lfs pointer", f"{_FETCH} with `git lfs pull`"),
    (b"/annex/objects/", "a git-annex pointer", f"{_FETCH} with `git annex get`"),
)
_CURES = {name: cure for _, name, cure in _FORMATS if cure} | {
    "a tar archive": _UNPACK,
    "a page of HTML or XML": "possibly the error page of a failed download; download it again",
    "a run of zero bytes": "an interrupted download may have left that; download it again",
}
_BY_FIRST_BYTE = {first: [entry for entry in _FORMATS if entry[0][0] == first] for first in range(256)}
_MAY_BEGIN_TEXT = ("a Parquet file", "a Feather file of version 1", "a PDF document")  # all of it printable
_MARKUP = re.compile(rb"\s*<(?:!doctype\s+html|html|head|body|\?xml|error)\b", re.IGNORECASE)
_PLAIN_SUFFIXES = {"", ".txt", ".text"}  # markup is expected in files with another name


def sniff(head: bytes) -> str:
    """Return the format of a file that begins with `head` (1,024 bytes, or all of it).

    `empty`; gzip, zstd, xz or bz2; the name of another format, as `_CURES` has it; or the encoding of a text: utf-8,
    utf-8-sig, utf-16 and utf-32 by the byte order mark, or by RFC 4627 (3) without one.
    """
    if not head:
        return "empty"
    for start, name, _ in _BY_FIRST_BYTE.get(head[0], ()):
        if head.startswith(start) and _is_binary(head, name):
            return name
    if head[257:262] == b"ustar":
        return "a tar archive"
    if _MARKUP.match(head):
        return "a page of HTML or XML"
    if b"\0" not in head[:4]:
        return "utf-8"
    return json.detect_encoding(head) if head.strip(b"\0") else "a run of zero bytes"


def _is_binary(head: bytes, name: str) -> bool:
    """Return whether it is that format, although some text could begin with the same signature."""
    if name.endswith("pointer"):
        return len(head) < _HEAD_BYTES
    return name not in _MAY_BEGIN_TEXT or any(byte < 9 or 13 < byte < 32 or byte > 244 for byte in head)


def read_utf8(path: Path, wanted: Wanted, gauge: Gauge) -> Iterator[bytes]:
    """Yield the text of a file as UTF-8 chunks of any length, decompressed and without a byte order mark.

    Chunks are not checked to be valid UTF-8. Raises UserError for another format than `wanted`, and for corrupt or
    truncated compressed data.
    """
    try:
        with path.open("rb", buffering=0) as raw:
            num_bytes = max(1, os.fstat(raw.fileno()).st_size)
            file = io.BufferedReader(raw, min(_BUFFER_BYTES, num_bytes + 1))
            gauge.share = lambda: 1.0 if file.closed else file.tell() / num_bytes
            step = min(_CHUNK_BYTES, 4096 + num_bytes // 64) if wanted == "JSON lines" else num_bytes + 1
            yield from _utf8(iter(lambda: file.read(step), b""), path, wanted)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _utf8(chunks: Iterator[bytes], path: Path, wanted: Wanted) -> Iterator[bytes]:
    head, chunks = _peek(chunks)
    kind, layers = sniff(head), 0
    if kind == "empty" and path.suffix.lower() in _COMPRESSED_SUFFIXES:
        raise UserError(f"{path} has 0 bytes, which is no valid {path.suffix} file. Download it again")
    while kind in _COMPRESSION:
        if layers == _MAX_LAYERS:
            raise UserError(f"{path} has been compressed more than {_MAX_LAYERS} times; decompress it")
        head, chunks = _peek(_decompress(chunks, kind, path))
        kind, layers = sniff(head), layers + 1
    if problem := _problem(path, kind, head, wanted, is_inside=layers > 0):
        raise UserError(f"{path} {problem}")
    if kind == "utf-8-sig":
        head = next(chunks)
        chunks = chain([head[len(codecs.BOM_UTF8) :]], chunks)
    yield from _transcode(chunks, kind, path) if kind.startswith(("utf-16", "utf-32")) else chunks


def _peek(chunks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """Return the first bytes, and an iterator over all of them."""
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= _HEAD_BYTES:
            break
    return head[:_HEAD_BYTES], chain([head] if head else [], chunks)


def _problem(path: Path, kind: str, head: bytes, wanted: Wanted, *, is_inside: bool) -> str | None:
    """Return why a text reader cannot use this format, or None."""
    name = f"{'holds' if is_inside else 'is'} {kind}, not {wanted}"
    suffixes = [suffix for suffix in path.suffixes if suffix.lower() not in _COMPRESSED_SUFFIXES]
    if kind == "a page of HTML or XML" and wanted == "text":
        if (suffixes or [""])[-1].lower() not in _PLAIN_SUFFIXES:
            return None
        return f"{name}: {_CURES[kind]}. If the page is the document, let its name end in .html"
    if kind in _CURES:
        return f"{name}: {_CURES[kind]}"
    if kind in _WITHOUT_BOM and (wanted == "text" or head.replace(b"\0", b"")[:1] not in b"{[ \t\r\n"):
        return f"is binary data, or {kind.upper()} text without a byte order mark: save it as UTF-8"
    if kind == "utf-8" and not is_inside and path.suffix.lower() in _COMPRESSED_SUFFIXES and not _is_text(head):
        return f"begins with the bytes {head[:4].hex(' ')}, neither compressed data nor text; download it again"
    return None


def _is_text(head: bytes) -> bool:
    """Return whether it is UTF-8, and not just the first bytes of compressed data."""
    if any(start.startswith(head) for start, name, _ in _FORMATS if name in _COMPRESSION):
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # the head may end inside a character
    except UnicodeDecodeError:
        return False
    return True


def _decompress(chunks: Iterator[bytes], kind: str, path: Path) -> Iterator[bytes]:
    """Decompress one or more concatenated streams. Raises UserError if the last is truncated."""
    from zstandard import ZstdError

    stream, num_read, num_bytes = None, 0, 0
    try:
        for chunk in chunks:
            num_read += len(chunk)
            while chunk := chunk.lstrip(b"\0") if stream is None and kind in _PADDED else chunk:
                stream = stream or _decompressor(kind)
                data = stream.decompress(chunk)
                num_bytes += len(data)
                if data:
                    yield data
                chunk = stream.unused_data
                if stream.eof:
                    stream = None
    except (zlib.error, lzma.LZMAError, ZstdError, OSError) as error:
        problem = f"is corrupt near byte {num_read} ({error})"
    else:
        if stream is None:
            return
        problem = f"is truncated at byte {num_read}, the end of the file"
    raise UserError(
        f"{path} cannot be read: its {kind} data {problem}, after {num_bytes} bytes of text. Download it again"
    )


def _decompressor(kind: str) -> Any:
    """Return a decompressor of one stream, with `decompress`, `eof` and `unused_data`.

    For zstd too, because the library's own file reader accepts truncated files.
    """
    if kind == "zstd":
        import zstandard

        return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()  # as `zstd --long=31` needs
    if kind == "gzip":
        return zlib.decompressobj(zlib.MAX_WBITS | 16)
    return lzma.LZMADecompressor() if kind == "xz" else bz2.BZ2Decompressor()


def _transcode(chunks: Iterator[bytes], encoding: str, path: Path) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)()
    num_read = 0
    try:
        for chunk in chunks:
            yield decoder.decode(chunk).encode()
            num_read += len(chunk)
        yield decoder.decode(b"", final=True).encode()
    except UnicodeError as error:
        raise UserError(
            f"{path}: not valid {encoding.upper()}, as which it begins, after byte {num_read}: {error}"
        ) from None


def split_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the lines without their ends. The time is linear in the length of a line."""
    parts: list[bytes] = []  # start of the line that the next chunk continues
    for chunk in chunks:
        lines = chunk.split(b"\n")
        if len(lines) > 1:
            parts.append(lines[0])
            yield b"".join(parts)
            yield from lines[1:-1]
            parts.clear()
        parts.append(lines[-1])
    if last := b"".join(parts):
        yield last


def why_not_parquet(path: Path) -> str | None:
    """Return the message for a file that cannot be read as Parquet; None if its first bytes do not explain it."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        file.seek(-min(4, len(head)), os.SEEK_END)
        is_complete = file.read() == b"PAR1"
    kind = sniff(head)
    if head.startswith(b"PAR1"):
        return None if is_complete else "starts like a Parquet file, but has no footer (truncated); download it again"
    if kind == "empty":
        return "has 0 bytes; download it again"
    if kind in _COMPRESSION:
        return f"is compressed with {kind}; decompress it"
    if kind in _CURES:
        return f"is {kind}, not Parquet: {_CURES[kind]}"
    if head.lstrip()[:1] in (b"{", b"["):
        return "is JSON, not Parquet: use `type: jsonl` for it"
    return None
