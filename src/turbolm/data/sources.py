"""Read the documents of a recipe's sources, one after the other and in an order that never changes.

A null text is an empty document. Files are read as a stream wherever their format allows.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import os
import sysconfig
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from turbolm.errors import UserError
from turbolm.recipe.schema import (
    DatasetsSource,
    JsonlSource,
    ParquetSource,
    Source,
    StdlibSource,
    TextSource,
)

# Folders of the standard library that some distributions leave out, move, add, or fill with their build's settings.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def iter_documents(sources: Sequence[Source]) -> Iterator[tuple[int, str]]:
    """Every document as (index of its source, text), sources in the recipe's order and files sorted by path."""
    num_documents = 0
    for number, source in enumerate(sources):
        for text in _READERS[source.type](source):
            num_documents += 1
            yield number, text
    if not num_documents:
        raise UserError("The sources hold no documents at all (data.sources)")


def list_files(source: Source) -> list[Path]:
    """The files of a source, sorted by path; none for a data set that comes from the hub."""
    if isinstance(source, StdlibSource):
        return _stdlib_files()
    if isinstance(source, DatasetsSource):
        folder = Path(source.path).expanduser()
        return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    files: set[Path] = set()
    for pattern in source.path:
        files |= _match(pattern)
    return sorted(files)


def _match(pattern: str) -> set[Path]:
    path = Path(pattern).expanduser()
    if path.is_file():  # its name may hold characters that mean something in a glob
        return {path}
    if path.is_dir():
        raise UserError(f"data.sources: {pattern} is a folder; name its files, such as {Path(pattern) / '**' / '*'}")
    found = {Path(name) for name in glob.glob(str(path), recursive=True, include_hidden=False)}
    files = {name for name in found if name.is_file()}
    if not files:
        raise UserError(f"data.sources: no file matches {pattern!r} (looked in {Path.cwd()})")
    return files


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_STDLIB and not name.startswith("config-")]
        files += [Path(folder, n) for n in names if n.endswith(".py") and not n.startswith("_sysconfigdata")]
    if not files:
        raise UserError(f"The standard library in {root} has no source files; use another source (data.sources)")
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _read_stdlib(source: StdlibSource) -> Iterator[str]:
    for path in _stdlib_files():
        content = _read_bytes(path)
        try:
            yield content.decode()
        except UnicodeDecodeError:
            try:
                encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
                yield content.decode(encoding)
            except (SyntaxError, UnicodeDecodeError):
                continue  # a file that is broken on purpose


def _read_text(source: TextSource) -> Iterator[str]:
    for path in list_files(source):
        content = _read_bytes(path)
        try:
            yield content.decode()
        except UnicodeDecodeError as error:
            raise _bad_encoding(path, error.start) from None


def _read_jsonl(source: JsonlSource) -> Iterator[str]:
    for path in list_files(source):
        offset = 0
        for number, line in enumerate(_lines(path), start=1):
            where, start, offset = f"{path}:{number}", offset, offset + len(line)
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode())
            except UnicodeDecodeError as error:
                raise _bad_encoding(path, start + error.start) from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: not valid JSON: {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{where}: expected a JSON object, got {type(row).__name__}")
            if source.field not in row:
                raise _missing_field(where, source.field, row)
            yield _text(row[source.field], where, source.field)


def _lines(path: Path) -> Iterator[bytes]:
    from zstandard import ZstdError

    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb", buffering=1 << 20) as file:
            yield from _zstd_lines(file) if path.suffix == ".zst" else file
    except (OSError, EOFError, zlib.error, ZstdError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _zstd_lines(file: Any) -> Iterator[bytes]:
    """Lines of a file of zstd frames. The library's own reader takes a file that is cut off for a complete one."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)  # as `zstd --long=31` needs
    frame, rest = None, b""
    while compressed := file.read(1 << 18):
        while compressed:
            frame = frame or decompressor.decompressobj()
            *lines, rest = (rest + frame.decompress(compressed)).split(b"\n")
            yield from (line + b"\n" for line in lines)
            compressed = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("the file ends inside a zstd frame")
    if rest:
        yield rest


def _read_parquet(source: ParquetSource) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    for path in list_files(source):
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                if source.field not in file.schema_arrow.names:
                    raise _missing_field(path, source.field, file.schema_arrow.names)
                batches = file.iter_batches(batch_size=1024, columns=[source.field])
                values = (value for batch in batches for value in batch.column(0).to_pylist())
                for number, value in enumerate(values, start=1):
                    yield _text(value, f"{path}: row {number}", source.field)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{path} cannot be read as parquet: {error}") from None


def _read_datasets(source: DatasetsSource) -> Iterator[str]:
    where = f"data set {source.path}"
    rows: Iterable[dict[str, Any]] = _load_dataset(source, where)
    columns: list[str] | None = getattr(rows, "column_names", None)  # not known of every stream
    if columns and source.field not in columns:
        raise _missing_field(where, source.field, columns)
    try:
        for number, row in enumerate(rows, start=1):
            if source.field not in row:
                raise _missing_field(where, source.field, row)
            yield _text(row[source.field], f"{where}: row {number}", source.field)
    except (OSError, ValueError, RuntimeError) as error:  # a stream reads as it goes
        raise UserError(f"{where} cannot be read: {type(error).__name__}: {error}") from None


def _load_dataset(source: DatasetsSource, where: str) -> Any:
    import datasets

    folder = Path(source.path).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            saved = datasets.load_from_disk(str(folder))
            if not isinstance(saved, datasets.DatasetDict):
                return saved
            if source.split not in saved:
                raise UserError(f"{where} has no split {source.split!r}; it has {', '.join(map(str, saved))}")
            return saved[source.split]
        return datasets.load_dataset(
            str(folder) if folder.exists() else source.path,
            source.name,
            split=source.split,
            revision=source.revision,
            streaming=source.streaming,
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{where} cannot be loaded: {type(error).__name__}: {error}") from None


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _text(value: object, where: str, field: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: field {field!r} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: field {field!r} has half a surrogate pair at character {error.start}") from None
    return value


def _missing_field(where: str | Path, field: str, fields: Iterable[str]) -> UserError:
    return UserError(f"{where}: there is no field {field!r}; the fields are {', '.join(sorted(fields)) or '(none)'}")


def _bad_encoding(path: Path, offset: int) -> UserError:
    return UserError(f"{path}: not UTF-8 at byte {offset}; convert it first, for example with iconv")


_READERS: dict[str, Callable[[Any], Iterator[str]]] = {
    "stdlib": _read_stdlib,
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "datasets": _read_datasets,
}
